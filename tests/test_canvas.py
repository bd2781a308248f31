"The canvas without a browser: messages as a page would send them, runs in a thread, and the widget's traits."
import base64
import io
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from instructvideo_kit.files import KitError
from instructvideo_kit.interactive.session import EditSession
from instructvideo_kit.widgets.canvas import LAMBDAS, Canvas, CanvasController, picture_url

SIZE, STROKE = 16, dict(kind="stroke", points=[[4, 4], [9, 9]], colour="#ff0000", size=3, opacity=1)

def image(): return torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

class Steps:
    "A model that waits at each of its steps until it is let on, and counts them."
    def __init__(self, n=5):
        self.n, self.done, self.calls, self.at_once, self.most, self.gate, self.began = (
            n,
            0,
            0,
            0,
            0,
            threading.Event(),
            threading.Event(),
        )
    def __call__(self, session, progress, stop):
        self.calls += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.session = session
        try:
            for i in range(self.n):
                self.began.set()
                assert self.gate.wait(20)
                self.done += 1
                progress(i + 1, self.n)
            return session.paint(image()).expand(4, -1, -1, -1) * (1 - session.lam)
        finally: self.at_once -= 1

def ready(n=5):
    model = Steps(n)
    model.gate.set()
    return model

def test_messages_reach_the_session():
    hand = CanvasController(image(), ready())
    for message in (
        STROKE,
        dict(kind="mask_stroke", points=[[3, 3]], size=4),
        dict(kind="drag", start=[1, 1], end=[9, 9], radius=3),
        dict(kind="set", content="a fox", motion="runs", lam=0.25, seed=7),
    ):
        hand.handle(message)
    session = hand.session
    assert (
        len(session.steps) == 3
        and len(session.drags) == 1
        and (session.content, session.motion, session.lam, session.seed) == ("a fox", "runs", 0.25, 7)
    )
    hand.handle(dict(kind="delete_drag", index=0))
    hand.handle(dict(kind="undo"))
    hand.handle(dict(kind="undo"))
    hand.handle(dict(kind="redo"))
    assert len(session.drags) == 1 and hand.status["notice"] == ""
    hand.handle(dict(kind="clear"))
    assert session.marks == []

@pytest.mark.parametrize(
    "message, words",
    [
        (dict(kind="drag", start=[1, 1], end=[99, 9], radius=3), "outside the 16x16"),
        (dict(kind="stroke", points=[], colour="red", size=3, opacity=1), "empty"),
        (dict(kind="paint"), '"paint"'),
        (dict(kind="set", lam=3), "lam is 3"),
        (dict(kind="set", content="new", seed=-1), "seed is -1"),
        (dict(kind="stroke", wet=True), "wet"),
        (dict(kind=None), "None"),
        (dict(kind="open", state=dict(version=9)), "not an edit session"),
        (dict(kind="generate", lam=3), "lam is 3"),
    ],
)
def test_what_is_refused_is_said_and_changes_nothing(message, words):
    hand = CanvasController(image(), ready())
    hand.handle(STROKE)
    before = hand.session.state()
    hand.handle(message)
    assert words in hand.status["notice"] and hand.session.state() == before and not hand.busy
    hand.handle(dict(kind="undo"))
    assert hand.status["notice"] == "" # the next message that is done takes it away

def test_open_takes_a_session_of_the_same_size():
    hand, other = CanvasController(image(), ready()), EditSession(SIZE, SIZE, lam=0.75)
    other.stroke([(2, 2)], "red")
    hand.handle(dict(kind="open", state=other.state()))
    assert hand.session == other
    hand.handle(dict(kind="open", state=EditSession(8, 8).state()))
    assert "8x8, this one has 16x16" in hand.status["notice"] and hand.session == other

def test_generate_makes_a_clip_from_the_session():
    hand = CanvasController(image(), ready())
    hand.handle(STROKE)
    hand.handle(dict(kind="generate", lam=0.0, seed=3))
    assert hand.wait(20) and hand.status["message"].startswith("done in")
    assert torch.allclose(hand.video[0], hand.session.paint(image()), atol=1e-6) and (
        hand.clip_page["lam"],
        hand.clip_page["seed"],
    ) == (0.0, 3)

def test_second_press_is_refused_and_never_two_at_once():
    hand = CanvasController(image(), model := Steps())
    hand.handle(dict(kind="generate"))
    assert model.began.wait(20)
    for kind in ("generate", "compare"):
        hand.handle(dict(kind=kind))
        assert "being made" in hand.status["notice"] and hand.status["busy"]
    model.gate.set()
    assert hand.wait(20) and (model.calls, model.most) == (1, 1)
    hand.handle(dict(kind="generate"))
    assert hand.wait(20) and model.calls == 2

def test_many_presses_from_many_threads_start_one():
    hand, refused = CanvasController(image(), model := Steps()), []
    def press():
        try: hand.start()
        except KitError: refused.append(1)
    presses = [threading.Thread(target=press) for _ in range(8)]
    for thread in presses: thread.start()
    for thread in presses: thread.join()
    model.gate.set()
    assert hand.wait(20) and model.calls == 1 and len(refused) == 7

def test_stop_ends_after_the_step_it_is_at():
    hand = CanvasController(image(), model := Steps(50))
    hand.handle(dict(kind="generate"))
    assert model.began.wait(20)
    hand.handle(dict(kind="stop"))
    assert hand.status["message"].startswith("stopping") and hand.busy
    model.gate.set()
    assert hand.wait(20) and model.done == 1 and hand.video is None and "stopped" in hand.status["message"]
    hand.handle(dict(kind="generate")) # the stop is not remembered
    assert hand.wait(20) and hand.video is not None

def test_stop_with_nothing_on_does_nothing():
    hand = CanvasController(image(), ready())
    hand.handle(dict(kind="stop"))
    hand.handle(dict(kind="generate"))
    assert hand.wait(20) and hand.video is not None

def test_generate_that_returns_none_on_stop_is_stopped():
    gate = threading.Event()
    def polite(session, progress, stop):
        gate.wait(20)
        return None if stop() else torch.zeros(2, 3, 8, 8)
    hand = CanvasController(image(), polite)
    hand.start()
    hand.stop()
    gate.set()
    assert hand.wait(20) and "stopped" in hand.status["message"] and hand.status["notice"] == ""

def test_refusal_stays_while_the_steps_go_on():
    hand = CanvasController(image(), model := Steps())
    hand.start()
    model.began.wait(20)
    hand.handle(dict(kind="generate"))
    seen = []
    hand.changed = lambda: seen.append(hand.status)
    model.gate.set()
    hand.wait(20)
    steps = [s for s in seen if s["message"].startswith("step")]
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5] and all(
        "being made" in s["notice"] and s["steps"] == 5 and "left" in s["message"] for s in steps
    )

def test_comparison_is_one_run_with_one_progress():
    hand, seen = CanvasController(image(), model := ready(3)), []
    hand.handle(dict(kind="set", lam=0.3))
    hand.changed = lambda: seen.append((hand.status["step"], hand.status["steps"]))
    hand.handle(dict(kind="compare"))
    assert (
        hand.wait(20)
        and model.calls == 5
        and tuple(hand.strip) == LAMBDAS
        and [page["lam"] for page in hand.strip_page] == list(LAMBDAS)
    )
    assert {(i, 15) for i in range(1, 16)} <= set(seen)
    assert hand.clip_page["lam"] == 0.25 and hand.session.lam == 0.3 # the nearest is shown, the slider stays

def test_painting_during_a_run_does_not_reach_it():
    hand = CanvasController(image(), model := Steps())
    hand.start()
    model.began.wait(20)
    hand.handle(STROKE)
    model.gate.set()
    assert hand.wait(20) and model.session.steps == [] and len(hand.session.steps) == 1

@pytest.mark.parametrize(
    "returned, words",
    [
        (None, "NoneType"),
        (torch.zeros(2, 4, 3, 8, 8), "(2, 4, 3, 8, 8)"),
        (torch.full((2, 3, 8, 8), float("nan")), "NaN"),
        (torch.zeros(0, 3, 8, 8), "shape"),
    ],
)
def test_what_generate_returns_is_looked_at(returned, words):
    hand = CanvasController(image(), lambda *a: returned)
    hand.start()
    assert hand.wait(20) and words in hand.status["notice"] and hand.video is None and not hand.status["busy"]

def test_generate_that_breaks_is_told_and_the_last_video_stays():
    model = ready()
    hand = CanvasController(image(), lambda *a: model(*a) if model.calls == 0 else 1/0)
    hand.start()
    hand.wait(20)
    first = hand.video
    hand.start()
    assert (
        hand.wait(20)
        and "ZeroDivisionError" in hand.status["notice"]
        and isinstance(hand.error, ZeroDivisionError)
        and hand.video is first
    )

# the file

def test_restart_goes_on_from_the_file(tmp_path):
    path = tmp_path/"s.json"
    hand = CanvasController(image(), ready(), path)
    hand.handle(STROKE)
    hand.handle(STROKE)
    hand.handle(dict(kind="undo"))
    hand.handle(dict(kind="set", content="a fox"))
    again = CanvasController(image(), ready(), path)
    assert again.session == hand.session and again.session.redo()

def test_restart_in_the_middle_of_a_run_finds_the_session(tmp_path):
    hand = CanvasController(image(), model := Steps(), path := tmp_path/"s.json")
    hand.handle(STROKE)
    hand.handle(dict(kind="generate", lam=0.25))
    model.began.wait(20)
    assert CanvasController(image(), ready(), path).session.lam == 0.25
    hand.stop()
    model.gate.set()
    hand.wait(20)

@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "damaged"),
        (json.dumps({**EditSession(SIZE, SIZE).state(), "version": 2}), "version 2"),
        (json.dumps(EditSession(9, 9).state()), "9x9"),
    ],
)
def test_file_that_does_not_fit_is_named_and_left(tmp_path, content, words):
    (path := tmp_path/"s.json").write_text(content)
    with pytest.raises(KitError, match=words): CanvasController(image(), ready(), path)
    assert path.read_text() == content

def test_disk_full_is_said_and_work_goes_on(tmp_path, monkeypatch):
    hand = CanvasController(image(), ready(), tmp_path/"s.json")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("No space left on device")))
    hand.handle(STROKE)
    assert "No space left" in hand.status["notice"] and len(hand.session.steps) == 1

# the widget

def test_widget_answers_with_the_number_of_the_message():
    canvas = Canvas(image(), ready())
    canvas.receive({**STROKE, "echo": ["page", 1]})
    assert canvas.session["echo"] == ["page", 1] and len(canvas.session["steps"]) == 1
    canvas.receive(dict(kind="drag", start=[0, 0], end=[99, 0], radius=1, echo=["page", 2]))
    assert canvas.session["echo"] == ["page", 2] and "outside" in canvas.status["notice"]

def test_widget_hears_the_page():
    canvas = Canvas(image(), ready())
    canvas._handle_custom_msg(STROKE, [])
    assert len(canvas.controller.session.steps) == 1

def test_widget_shows_the_clip():
    canvas = Canvas(image(), ready(), fps=4)
    canvas.receive(dict(kind="generate"))
    assert canvas.controller.wait(20)
    assert len(canvas.clip["frames"]) == 4 and canvas.strip == [] and canvas.fps == 4 and not canvas.status["busy"]
    frame = Image.open(io.BytesIO(base64.b64decode(canvas.clip["frames"][0].split(",")[1])))
    assert frame.size == (SIZE, SIZE)

def test_page_asks_the_network_for_nothing():
    canvas = Canvas(image(), ready())
    page = canvas._esm + canvas._css
    assert page.count("http") == page.count("http://www.w3.org/2000/svg") and "import" not in canvas._esm.replace(
        "important", ""
    )

def test_still_picture_where_nothing_is_alive():
    data, _ = Canvas(image(), ready())._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data and Image.open(
        io.BytesIO(base64.b64decode(data["image/png"]))
    ).size == (320, 320)

def test_canvas_shows_what_code_did_to_the_session():
    canvas = Canvas(image(), ready())
    canvas.controller.session.stroke([(3, 3)], "red")
    canvas._repr_mimebundle_()
    assert len(canvas.session["steps"]) == 1

def test_large_frames_travel_as_jpeg_small_ones_exactly():
    assert picture_url(torch.zeros(3, 200, 300)).startswith("data:image/jpeg")
    frame = (image()*255).round()/255
    back = Image.open(io.BytesIO(base64.b64decode(picture_url(frame).split(",")[1])))
    assert np.array_equal(np.asarray(back), (frame.permute(1, 2, 0)*255).round().byte().numpy())

def test_any_picture_enters():
    assert CanvasController(Image.new("RGBA", (20, 10)), ready()).session.width == 20
    with pytest.raises(KitError, match="shape"): CanvasController(torch.zeros(1, 8, 8), ready())
