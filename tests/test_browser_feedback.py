"""Votes in JupyterLab, by keyboard: ten pairs, one taken back, the page loaded anew, gone on, trained; Voila."""
import importlib.util, json
import nbformat, pytest, torch
from browser import jupyter_lab, missing, open_notebook, page, picture, run_all, until, voila
from instructvideo_kit.feedback.pool import make_pool
from instructvideo_kit.feedback.votes import read_votes

if reason := missing(): pytest.skip(reason, allow_module_level=True)

SHOW = ("from instructvideo_kit.widgets.voting import FeedbackPage\n"
        "feedback = FeedbackPage('pool', 'Ada', votes=24)\nfeedback")

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, g = tmp_path_factory.mktemp("lab"), torch.Generator().manual_seed(0)
    across = torch.linspace(0, 1, 32)
    clips = torch.rand(24, 1, 3, 1, 1, generator=g)*.6 + .3*(across + torch.linspace(0, 1, 8)[:, None])[None, :, None,
        None].expand(24, 8, 3, 32, 32)
    make_pool(folder/"pool", clips.clamp(0, 1),
              [f"a fox walking to the left in the {place}" for place in ("meadow", "snow")]*12, range(24), "drawn")
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SHOW)], metadata=kernel),
                   folder/"vote.ipynb")
    return folder

@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory):
    with jupyter_lab(folder, tmp_path_factory.mktemp("home")) as address: yield address

def voting(page): return page.locator(".ivk-voting")
def done(page): return int(voting(page).get_attribute("data-done"))
def press(page, *keys):
    "Each key once the page has the answer to the one before."
    for key in keys:
        number = voting(page).get_attribute("data-number")
        page.keyboard.press(key)
        until(lambda: voting(page).get_attribute("data-number") != number, f"the answer to {key}")

def shown(page, address):
    "The page with the clips on it, and the keyboard at the voting."
    open_notebook(page, address)
    run_all(page)
    voting(page).wait_for()
    until(lambda: page.locator(".ivk-clip canvas[data-frame]").count() == 2, "both clips")
    voting(page).scroll_into_view_if_needed()
    voting(page).focus()

def test_vote_undo_reload_go_on_train_look(page, lab, folder):
    shown(page, lab("vote.ipynb"))
    cells = "() => window.jupyterapp.shell.currentWidget.content.widgets.length"
    before = page.evaluate(cells)
    press(page, *["ArrowLeft", "ArrowRight", "ArrowDown"]*3, "ArrowLeft")
    assert done(page) == 10 and page.locator(".ivk-count").inner_text() == "10 of 24"
    assert [v["vote"] for v in read_votes(folder/"pool")] == ["first", "second", "same"]*3 + ["first"]
    press(page, "u")
    assert done(page) == 9 and len(read_votes(folder/"pool")) == 9
    assert page.evaluate(cells) == before # no key reached the notebook
    frames = page.evaluate("() => [...document.querySelectorAll('.ivk-clip canvas')].map(c => c.dataset.frame)")
    assert frames[0] == frames[1] # in step
    picture(page, "feedback_voting")
    shown(page, lab("vote.ipynb"))
    assert done(page) == 9
    press(page, *["ArrowLeft", "ArrowRight", "Backspace", "ArrowRight"], *["ArrowLeft", "ArrowRight"]*4)
    assert done(page) == 19
    page.get_by_role("button", name="What has it learnt?").click()
    until(lambda: page.locator("pre", has_text="shipped judge").count(), "the portrait")
    assert (folder/"pool/reward/ada/kit.json").exists()
    page.locator("pre", has_text="shipped judge").scroll_into_view_if_needed()
    picture(page, "feedback_learnt")
    voting(page).focus()
    press(page, *["ArrowLeft"]*5)
    assert "Thank you" in voting(page).inner_text() and page.get_by_role("button", name="20 more").is_visible()

def test_click_and_held_key(page, folder):
    "Goes on from above: more pairs, a click on a clip, a key that repeats."
    number = voting(page).get_attribute("data-number")
    page.get_by_role("button", name="20 more").click()
    until(lambda: voting(page).get_attribute("data-number") != number, "more pairs")
    until(lambda: page.locator(".ivk-clip").first.is_visible(), "clips")
    before, number = len(read_votes(folder/"pool")), voting(page).get_attribute("data-number")
    page.locator(".ivk-clip").nth(1).click()
    until(lambda: voting(page).get_attribute("data-number") != number, "the click")
    assert read_votes(folder/"pool")[-1]["vote"] == "second" and len(read_votes(folder/"pool")) == before + 1
    voting(page).focus()
    number = voting(page).get_attribute("data-number")
    for _ in range(6): page.keyboard.down("ArrowLeft") # held down: repeats
    page.keyboard.up("ArrowLeft")
    until(lambda: voting(page).get_attribute("data-number") != number, "the vote")
    page.wait_for_timeout(1000)
    assert len(read_votes(folder/"pool")) == before + 2

def test_page_asked_nobody(page): assert [url for url in page.refused
                                          if "jupyter" not in url] == [] and page.problems == []

@pytest.mark.skipif(importlib.util.find_spec("voila") is None, reason="no voila: pip install -e '.[voila]'")
def test_voila_page(page, folder, tmp_path):
    with voila(folder, "vote.ipynb", tmp_path) as url:
        page.goto(url, wait_until="domcontentloaded")
        voting(page).wait_for()
        picture(page, "feedback_voila")
        page.goto("about:blank")
