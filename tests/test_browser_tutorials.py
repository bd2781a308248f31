"""Tutorials as a student opens them: Run All in JupyterLab leaves no red cell, every widget's picture changes when it
is used, and nothing is wider than the page, at 1280 and at 800 pixels; pictures of the whole page are kept in
runs/browser.

A run takes three of the thirty editions, others every eight hours, so that all of them have had their turn in four
days. KIT_BROWSER_TUTORIALS="student/01_start_here solved/07_segvr_and_tar" chooses others, "all" takes all; each needs
a minute or more."""
import os
import shutil
import time

import pytest
from browser import (  # noqa: F401 (page is a fixture)
    ROOT,
    jupyter_lab,
    missing,
    open_notebook,
    page,
    picture,
    run_all,
    until,
    whole_page,
)

if reason := missing(): pytest.skip(reason, allow_module_level=True)
EDITIONS = [f"{path.parent.name}/{path.stem}" for part in ("student", "solved")
            for path in sorted((ROOT/"tutorials"/part).glob("*.ipynb"))]
A_RUN = 3 # editions of a run
TURN = 8*3600 # seconds until the next ones have their turn
# seconds for Run All; a tutorial may take four minutes on two cores that do nothing else
RUN = float(os.environ.get("KIT_BROWSER_RUN", 900))

def turn_of(seconds):
    "The editions whose turn it is at a time (seconds since 1970)."
    first = A_RUN*int(seconds//TURN)
    return [EDITIONS[(first + i) % len(EDITIONS)] for i in range(A_RUN)]

def chosen():
    "What the environment asks for, or those whose turn it is."
    asked = os.environ.get("KIT_BROWSER_TUTORIALS", "").split()
    return EDITIONS if asked == ["all"] else asked or turn_of(time.time())

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

def test_all_editions_have_their_turn_within_a_week():
    turns = [name for slot in range(7*24*3600//TURN) for name in turn_of(slot*TURN)]
    assert set(turns) == set(EDITIONS) and len(EDITIONS) == 30

@pytest.mark.parametrize("name", chosen())
def test_run_all_and_use_every_widget(page, lab, name):
    open_notebook(page, lab(f"tutorials/{name}.ipynb"))
    run_all(page, RUN)
    kept, panels, canvases = name.replace("/", "_"), page.locator(PANELS), page.locator(".ivk:has(.ivk-stage)")
    for i in range(panels.count()):
        panel, shown = panels.nth(i), panels.nth(i).locator(".widget-image").first
        if not shown.is_visible(): continue # what votes have taught is shown after votes: test_browser_feedback
        panel.scroll_into_view_if_needed()
        before = picture(page, f"{kept}_{i}_before")
        assert changes(panel, shown), f"the picture of widget {i + 1} does not change"
        assert picture(page, f"{kept}_{i}_after") != before
    for canvas in canvases.all():
        paint(page, canvas)
        picture(canvas, f"{kept}_canvas")
    for width in (1280, 800):
        wider = whole_page(page, width, f"{kept}_{width}")
        assert wider == [], f"wider than the page of {width} pixels: {wider}"
    assert page.problems == [], page.problems


@pytest.fixture(autouse=True)
def no_kernel_left(page):
    "Thirty kernels with their models do not fit into memory."
    yield
    page.evaluate("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()")
