"""Tutorials as a student opens them: Run All in JupyterLab leaves no red cell, and every widget's picture changes when its control is moved.

KIT_BROWSER_TUTORIALS="01_start_here 11_interactive" chooses others than the list below; each takes a minute or more."""
import os, shutil
import pytest
from browser import ROOT, jupyter_lab, missing, open_notebook, page, picture, run_all, until

if reason := missing(): pytest.skip(reason, allow_module_level=True)
TUTORIALS = os.environ.get("KIT_BROWSER_TUTORIALS", "01_start_here").split() # add a name here: tutorials/<name>.ipynb
RUN = 600 # seconds for Run All; a tutorial may take four minutes on two cores that do nothing else

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a copy of the tutorials, as running them writes into them."
    folder = tmp_path_factory.mktemp("course")
    shutil.copytree(ROOT/"tutorials", folder/"tutorials", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs"))
    with jupyter_lab(folder, tmp_path_factory.mktemp("home")) as address: yield address

PANELS = ".jp-OutputArea .widget-vbox:has(> .widget-image)"

def move(slider):
    "One stop further with the keyboard, as the mouse would; back where there is no further."
    handle = slider.locator("[role=slider]").first
    handle.focus()
    before = handle.get_attribute("aria-valuenow")
    handle.press("ArrowRight")
    if handle.get_attribute("aria-valuenow") == before: handle.press("ArrowLeft")

@pytest.mark.parametrize("name", TUTORIALS)
def test_run_all_and_move_sliders(page, lab, name):
    open_notebook(page, lab(f"tutorials/{name}.ipynb"))
    run_all(page, RUN)
    panels = page.locator(PANELS)
    page.locator(PANELS).first.scroll_into_view_if_needed() # a tutorial has at least one widget
    for i in range(panels.count()):
        panel = panels.nth(i)
        panel.scroll_into_view_if_needed()
        still = panel.locator(".widget-image").first.evaluate("e => e.src")
        picture(page, f"{name}_{i}_before")
        move(panel.locator(".widget-slider").first)
        until(lambda: panel.locator(".widget-image").first.evaluate("e => e.src") != still, f"the picture of widget {i + 1} to change")
        picture(page, f"{name}_{i}_after")
    assert page.problems == [], page.problems
