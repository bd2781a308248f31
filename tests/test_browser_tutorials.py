"""Tutorials as a student opens them: Run All in JupyterLab leaves no red cell, and every widget's picture changes
when it is used.

KIT_BROWSER_TUTORIALS="01_start_here 07_segvr_and_tar" chooses others than the list below; each takes a minute or
more."""
import os
import shutil
import time

import pytest
from browser import ROOT, jupyter_lab, missing, open_notebook, page, picture, run_all, until  # noqa: F401 (page is a fixture)

if reason := missing(): pytest.skip(reason, allow_module_level=True)
# add a name here: tutorials/<name>.ipynb
TUTORIALS = os.environ.get("KIT_BROWSER_TUTORIALS",
                           "01_start_here 03_noise_and_the_ddim_map 14_paint_drag_describe").split()
# seconds for Run All; a tutorial may take four minutes on two cores that do nothing else
RUN = float(os.environ.get("KIT_BROWSER_RUN", 900))

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a copy of the tutorials, as running them writes into them."
    folder = tmp_path_factory.mktemp("course")
    for part in ("tutorials", "reproduction"):
        shutil.copytree(ROOT/part, folder/part, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs"))
    with jupyter_lab(folder, tmp_path_factory.mktemp("home")) as address: yield address

PANELS = ".jp-OutputArea .widget-vbox:has(> .widget-image)"

def changes(panel, shown):
    """Use a slider, else the lists from the last one on, until the picture is another; a ranking alone, say, changes
    nothing before the judge is revealed."""
    src = shown.evaluate("e => e.src")
    for control in (*panel.locator("[role=slider]").all()[:1], *reversed(panel.locator("select").all())):
        if control.get_attribute("role") == "slider": move(control)
        else: control.select_option(index=1 if control.evaluate("e => e.selectedIndex") == 0 else 0)
        for _ in range(100):
            if shown.evaluate("e => e.src") != src: return True
            time.sleep(0.2)
    return False

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
        before = picture(page, f"{name}_{i}_before")
        assert changes(panel, shown), f"the picture of widget {i + 1} does not change"
        assert picture(page, f"{name}_{i}_after") != before
    for canvas in canvases.all():
        paint(page, canvas)
        picture(canvas, f"{name}_canvas")
    assert page.problems == [], page.problems
