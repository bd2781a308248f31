"""The canvas in JupyterLab: paint, drag, undo, redo, generate, compare, stop, save, reload and go on, with mouse,
keyboard and touch.

KIT_BROWSER_PIPELINE=menagerie-i2v makes the videos with that policy instead of a stand-in that slides the picture."""
import importlib.util
import json
import os

import nbformat
import numpy as np
import pytest
from browser import jupyter_lab, missing, open_notebook, page, picture, run_all, until, voila  # noqa: F401 (page is a fixture)
from PIL import Image

from instructvideo_kit.interactive.session import EditSession

if reason := missing(): pytest.skip(reason, allow_module_level=True)
POLICY = os.environ.get("KIT_BROWSER_PIPELINE")

PICTURE = """import time, torch
from pathlib import Path
from instructvideo_kit.menagerie.defects import render
from instructvideo_kit.menagerie.world import Scene
from instructvideo_kit.widgets.canvas import Canvas, pipeline_generate
fox = render([Scene('fox', 'right', 'meadow', seed=3)], size=32)[0, 0]"""
STAND_IN = """def generate(session, progress, stop):
    for i in range(8):
        while i == 3 and not Path('go').exists() and not stop(): time.sleep(.05) # until the test has looked
        time.sleep(.1); progress(i + 1, 8)
    picture = session.lam*fox + (1 - session.lam)*session.paint(fox)
    return torch.stack([picture.roll(i, dims=2) for i in range(16)])"""
PIPELINE = f"""from instructvideo_kit.interactive.pipeline import InteractivePipeline
from instructvideo_kit.policy.first_frame import FirstFramePolicy
generate = pipeline_generate(InteractivePipeline(FirstFramePolicy.from_pretrained('{POLICY}')), fox[None], n_ddim=10)"""
SHOW = "canvas = Canvas(fox, generate, 'session.json')\ncanvas"

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    cells = [nbformat.v4.new_code_cell(code) for code in (PICTURE, PIPELINE if POLICY else STAND_IN, SHOW)]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder/"canvas.ipynb")
    return folder

@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory):
    with jupyter_lab(folder, tmp_path_factory.mktemp("home")) as address: yield address

@pytest.fixture(scope="module")
def canvas(page, lab):
    "The page with the canvas on it."
    open_notebook(page, lab("canvas.ipynb"))
    run_all(page)
    stage = page.locator(".ivk-stage")
    stage.wait_for()
    page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')") # room
    stage.scroll_into_view_if_needed()
    return page

@pytest.fixture
def fresh(canvas):
    "Nothing on the picture, the brush in hand."
    if ui(canvas).get_by_role("button", name="Clear").is_enabled():
        ui(canvas).get_by_role("button", name="Clear").click()
    ui(canvas).get_by_role("button", name="Brush").click()
    return canvas

def ui(page): return page.locator(".ivk")

def at(page, x, y):
    "Point of the screen for a point of the 32x32 picture."
    box = page.locator(".ivk-stage").bounding_box()
    return box["x"] + x/32*box["width"], box["y"] + y/32*box["height"]

def pull(page, *points):
    "Press at the first point, move through the others, let go."
    page.mouse.move(*at(page, *points[0]))
    page.mouse.down()
    for point in points[1:]: page.mouse.move(*at(page, *point), steps=6)
    page.mouse.up()

def on_disk(folder): return json.loads((folder/"session.json").read_text())
def done(folder): return (lambda s: s["steps"][:s["at"]])(on_disk(folder)) if (folder/"session.json").exists() else []
PIXEL = "([x, y]) => [...document.querySelector('.ivk-paint').getContext('2d').getImageData(x, y, 1, 1).data]"
def ink(page, x, y): return page.evaluate(PIXEL, [x, y])
def assert_page_shows_what_python_paints(page, folder):
    "Two rasterisers, one picture: edges may differ by a shade, nothing else."
    data = page.evaluate(
        "() => [...document.querySelector('.ivk-paint').getContext('2d').getImageData(0, 0, 32, 32).data]")
    shown = np.array(data, dtype=np.float32).reshape(32, 32, 4)/255
    painted = EditSession.open(folder/"session.json").paint(Image.new("RGB", (32, 32)))
    apart = abs(shown[..., :3]*shown[..., 3:] - np.asarray(painted)/255)
    assert apart.mean() < 0.01 and apart.max() < 0.35, (apart.mean(), apart.max())

def notice(page): return page.locator(".ivk-notice").inner_text()
def message(page): return page.locator(".ivk-message").inner_text()
def arrows(page): return page.locator(".ivk-arrow.ivk-light").count()
def last(folder, kind):
    return until(lambda: (lambda s: s and s[-1]["kind"] == kind and s[-1])(done(folder)), f"a {kind} on disk")

def test_paint_drag_undo_redo_generate_save_reload_replay(fresh, folder, lab):
    page = fresh
    ui(page).get_by_role("button", name="yellow").click()
    pull(page, (21, 5), (26, 4), (24, 8))
    stroke = last(folder, "stroke")
    assert stroke["colour"] == "#ffd23f" and abs(stroke["points"][0][0] - 21) < 0.3
    assert abs(stroke["points"][-1][1] - 8) < 0.3
    assert ink(page, 25, 5) == [255, 210, 63, 255] and ink(page, 5, 25)[3] == 0
    assert_page_shows_what_python_paints(page, folder)
    ui(page).get_by_role("button", name="Mask").click()
    pull(page, (20, 5), (27, 6))
    last(folder, "mask_stroke")
    ui(page).get_by_role("button", name="Arrow").click()
    pull(page, (11, 19), (25, 19))
    drag = last(folder, "drag")
    assert abs(drag["start"][0] - 11) < 0.3 and abs(drag["end"][0] - 25) < 0.3 and arrows(page) == 1
    ui(page).get_by_role("button", name="Undo").click()
    until(lambda: len(done(folder)) and done(folder)[-1]["kind"] == "mask_stroke", "undo on disk")
    assert arrows(page) == 0
    ui(page).get_by_role("button", name="Redo").click()
    last(folder, "drag")
    assert arrows(page) == 1
    ui(page).get_by_label("Content").fill("a fox in the meadow")
    ui(page).get_by_label("Motion").fill("the fox runs to the right")
    ui(page).get_by_role("button", name="Generate").click()
    until(lambda: "left" in message(page) or POLICY, "progress")
    ui(page).get_by_role("button", name="Generate").click()
    until(lambda: "being made" in notice(page) or POLICY, "the refusal of the second press")
    picture(ui(page), "canvas_running")
    (folder/"go").touch()
    until(lambda: message(page).startswith("done"), "the video")
    screen = page.locator(".ivk-screen").first
    until(lambda: screen.get_attribute("data-frame"), "the video's first frame")
    frame = screen.get_attribute("data-frame")
    until(lambda: screen.get_attribute("data-frame") != frame, "the video to play", 20)
    picture(ui(page), "canvas_video")
    assert on_disk(folder)["content"] == "a fox in the meadow"
    ui(page).get_by_role("button", name="Compare").click()
    until(lambda: page.locator(".ivk-strip .ivk-screen").count() == 5, "the comparison")
    ui(page).get_by_role("button", name="Pause").click()
    ui(page).get_by_label("Frame").fill("6")
    until(lambda: {each.get_attribute("data-frame") for each in page.locator(".ivk-screen").all()} == {"6"},
          "all clips at frame 6")
    picture(ui(page), "canvas_compared")
    before = on_disk(folder)
    page.reload(wait_until="domcontentloaded")
    open_notebook(page, lab("canvas.ipynb"))
    run_all(page)
    page.locator(".ivk-stage").wait_for()
    until(lambda: page.locator(".ivk-stage").get_attribute("data-marks") == str(len(done(folder))),
          "the session to be there again")
    assert on_disk(folder) == before and arrows(page) == 1 and ink(page, 25, 5) == [255, 210, 63, 255]
    assert ui(page).get_by_label("Motion").input_value() == "the fox runs to the right"
    page.locator(".ivk-stage").scroll_into_view_if_needed()
    picture(ui(page), "canvas_reloaded")

@pytest.mark.skipif(bool(POLICY), reason="a model does not wait for the test")
def test_stop_ends_the_run(fresh, folder):
    (folder/"go").unlink(missing_ok=True)
    ui(fresh).get_by_role("button", name="Generate").click()
    until(lambda: "left" in message(fresh), "progress")
    ui(fresh).get_by_role("button", name="Stop").click()
    until(lambda: message(fresh).startswith("stopped"), "the stop", 60)
    assert ui(fresh).get_by_role("button", name="Stop").is_disabled()

def test_keys(fresh, folder):
    "Undo and redo by keys, a stroke without a mouse, and no key reaches the notebook."
    page, cells = fresh, "() => window.jupyterapp.shell.currentWidget.content.widgets.length"
    n_cells, n = page.evaluate(cells), len(done(folder))
    page.locator(".ivk-stage").focus()
    for key in ("b", "ArrowRight", "Space", "ArrowRight", "ArrowRight", "ArrowDown", "Space"): page.keyboard.press(key)
    stroke = last(folder, "stroke")
    assert stroke["points"][0] == [17, 16] and stroke["points"][-1] == [19, 17]
    page.keyboard.press("Control+z")
    until(lambda: len(done(folder)) == n, "undo")
    page.keyboard.press("Control+Shift+z")
    until(lambda: len(done(folder)) == n + 1, "redo")
    for key in ("a", "Space", "Shift+ArrowRight", "Space"): page.keyboard.press(key)
    last(folder, "drag")
    page.keyboard.press("Delete")
    last(folder, "delete_drag")
    for key in "bamejk": page.keyboard.press(key)
    assert page.evaluate(cells) == n_cells

def test_eraser_arrow_delete_and_refusals(fresh, folder):
    page = fresh
    pull(page, (8, 8), (20, 8))
    last(folder, "stroke")
    ui(page).get_by_role("button", name="Eraser").click()
    pull(page, (8, 8), (20, 8))
    assert last(folder, "erase")["layer"] == "paint" and ink(page, 14, 8)[3] < 10
    ui(page).get_by_role("button", name="Arrow").click()
    pull(page, (11, 19), (25, 19))
    last(folder, "drag")
    ui(page).get_by_role("button", name="delete arrow 1").click()
    last(folder, "delete_drag")
    assert arrows(page) == 0
    page.mouse.click(*at(page, 11, 19))
    assert "press, move, let go" in notice(page)
    ui(page).get_by_label("Seed").fill("-4")
    ui(page).get_by_label("Seed").press("Tab")
    until(lambda: "seed is -4" in notice(page), "the refusal of the seed")
    ui(page).get_by_label("Seed").fill("5")
    ui(page).get_by_label("Seed").press("Tab")
    until(lambda: on_disk(folder)["seed"] == 5 and not notice(page), "the seed")

def test_session_file_leaves_and_comes_back(fresh, folder, tmp_path):
    page = fresh
    pull(page, (8, 8), (20, 8))
    last(folder, "stroke")
    with page.expect_download() as download: ui(page).get_by_role("button", name="Save session").click()
    download.value.save_as(tmp_path/"kept.json")
    kept = json.loads((tmp_path/"kept.json").read_text())
    assert kept["steps"] == on_disk(folder)["steps"] and "echo" not in kept
    ui(page).get_by_role("button", name="Undo").click()
    page.locator(".ivk input[type=file]").set_input_files(tmp_path/"kept.json")
    until(lambda: on_disk(folder) == kept, "the session to be opened")
    (tmp_path/"bad.json").write_text(json.dumps({**kept, "version": 2}))
    page.locator(".ivk input[type=file]").set_input_files(tmp_path/"bad.json")
    until(lambda: "version 2" in notice(page), "the refusal of another version")
    assert on_disk(folder) == kept

def test_touch_paints(fresh, folder):
    "A finger: the browser's own touch events, as a tablet sends them."
    page = fresh
    wire = page.context.new_cdp_session(page)
    def touch(kind, *points):
        wire.send("Input.dispatchTouchEvent",
                  dict(type=kind, touchPoints=[dict(zip("xy", at(page, *p))) for p in points]))
    touch("touchStart", (6, 20))
    touch("touchMove", (12, 22))
    touch("touchMove", (20, 24))
    touch("touchEnd")
    assert abs(last(folder, "stroke")["points"][-1][0] - 20) < 0.5

def test_page_asked_nobody(canvas):
    assert [url for url in canvas.refused if "jupyter" not in url] == [] and canvas.problems == []

@pytest.mark.skipif(importlib.util.find_spec("voila") is None, reason="no voila: pip install -e '.[voila]'")
def test_voila_page(page, folder, tmp_path):
    "The same notebook as a web page: paint, generate, see the video."
    (folder/"session.json").unlink(missing_ok=True)
    (folder/"go").touch()
    with voila(folder, "canvas.ipynb", tmp_path) as url:
        page.goto(url, wait_until="domcontentloaded")
        page.locator(".ivk-stage").wait_for()
        pull(page, (21, 5), (26, 4))
        last(folder, "stroke")
        ui(page).get_by_role("button", name="Generate").click()
        until(lambda: message(page).startswith("done"), "the video")
        until(lambda: page.locator(".ivk-screen").first.get_attribute("data-frame"), "the video's first frame")
        picture(page, "canvas_voila")
        page.goto("about:blank") # the kernel of the page ends
