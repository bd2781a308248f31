"""Tutorials as a student opens them: Run All in JupyterLab leaves no red cell, and every widget's picture changes when it is used.

KIT_BROWSER_TUTORIALS="01_start_here 05_segvr_and_tar" chooses others than the list below; each takes a minute or more."""
import os, shutil
import pytest
from browser import ROOT, jupyter_lab, missing, open_notebook, page, picture, run_all, until

if reason := missing(): pytest.skip(reason, allow_module_level=True)
TUTORIALS = os.environ.get("KIT_BROWSER_TUTORIALS", "01_start_here 02_noise_and_the_ddim_map 10_interactive_blending").split() # add a name here: tutorials/<name>.ipynb
RUN = float(os.environ.get("KIT_BROWSER_RUN", 900)) # seconds for Run All; a tutorial may take four minutes on two cores that do nothing else

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a copy of the tutorials, as running them writes into them."
    folder = tmp_path_factory.mktemp("course")
    for part in ("tutorials", "reproduction"): shutil.copytree(ROOT/part, folder/part, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs"))
    with jupyter_lab(folder, tmp_path_factory.mktemp("home")) as address: yield address

PANELS = ".jp-OutputArea .widget-vbox:has(> .widget-image)"

def change(panel):
    "Use the first control of a panel: a slider, or a list where there is no slider."
    slider, listed = panel.locator("[role=slider]"), panel.locator("select")
    if slider.count(): move(slider.first)
    else: listed.first.select_option(index=1 if listed.first.evaluate("e => e.selectedIndex") == 0 else 0)

def move(handle):
    "One stop further with the keyboard, as the mouse would; back where there is no further."
    handle.focus()
    before = handle.get_attribute("aria-valuenow")
    handle.press("ArrowRight")
    if handle.get_attribute("aria-valuenow") == before: handle.press("ArrowLeft")

def paint(page, canvas):
    "One stroke on a canvas; it is drawn and counted."
    stage = canvas.locator(".ivk-stage")
    stage.scroll_into_view_if_needed()
    box, marks = stage.bounding_box(), int(stage.get_attribute("data-marks"))
    page.mouse.move(box["x"] + 0.3*box["width"], box["y"] + 0.3*box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6*box["width"], box["y"] + 0.4*box["height"], steps=5)
    page.mouse.up()
    until(lambda: int(stage.get_attribute("data-marks")) == marks + 1, "the stroke")

@pytest.mark.parametrize("name", TUTORIALS)
def test_run_all_and_use_every_widget(page, lab, name):
    open_notebook(page, lab(f"tutorials/{name}.ipynb"))
    run_all(page, RUN)
    panels, canvases = page.locator(PANELS), page.locator(".ivk")
    until(lambda: panels.count() + canvases.count(), "a widget on the page")
    for i in range(panels.count()):
        panel, shown = panels.nth(i), panels.nth(i).locator(".widget-image").first
        panel.scroll_into_view_if_needed()
        src, before = shown.evaluate("e => e.src"), picture(page, f"{name}_{i}_before")
        change(panel)
        until(lambda: shown.evaluate("e => e.src") != src, f"the picture of widget {i + 1} to change")
        assert picture(page, f"{name}_{i}_after") != before
    for canvas in canvases.all():
        paint(page, canvas)
        picture(canvas, f"{name}_canvas")
    assert page.problems == [], page.problems
