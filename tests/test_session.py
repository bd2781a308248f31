"The edit session: laws of undo and redo, files good and bad, and what a brush changes and leaves alone."
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from instructvideo_kit.files import KitError
from instructvideo_kit.interactive.session import Drag, EditSession, coverage, upright

W, H = 24, 16
xs, ys = st.floats(-W, 2*W, width=32), st.floats(-H, 2*H, width=32)
inside = st.tuples(st.floats(0, W, width=32), st.floats(0, H, width=32))
lines = st.lists(st.tuples(xs, ys), min_size=1, max_size=5)
sizes, colours = st.floats(0.25, 2*W, width=32), st.sampled_from(["red", "#00ff80", "navy", "#ABCDEF"])
def step(name, *args): return st.tuples(st.just(name), st.tuples(*args))
DRAWN = [step("stroke", lines, colours, sizes, st.floats(0.01, 1)),
         step("erase", lines, sizes, st.sampled_from(["paint", "mask"])), step("mask_stroke", lines, sizes),
         step("drag", inside, inside, sizes).filter(lambda s: s[1][0] != s[1][1]),
         step("delete_drag", st.integers(0, 3)), step("clear")]
MOVES = [step("undo"), step("redo")]
plays = st.lists(st.one_of(*DRAWN, *MOVES), max_size=12)
quick = settings(deadline=None, max_examples=60)

def play(session, moves):
    "Do the moves; an arrow that is not there cannot be deleted, which leaves the session alone."
    for name, args in moves:
        before = session.state()
        try: getattr(session, name)(*args)
        except KitError: assert name == "delete_drag" and session.state() == before
    return session

def picture(seed=0): return torch.rand(3, H, W, generator=torch.Generator().manual_seed(seed))
def look(session): return session.paint(picture()), session._mask_array(), session.drags
def same(a, b): return torch.equal(a[0], b[0]) and np.array_equal(a[1], b[1]) and a[2] == b[2]

# laws

@quick
@given(plays, st.one_of(*DRAWN))
def test_undo_takes_back_the_last_step_and_redo_does_it_again(moves, last):
    session = play(EditSession(W, H), moves)
    before, at = look(session), session.at
    play(session, [last])
    assume(session.at == at + 1) # a clear of nothing and a delete of nothing are no steps
    after = look(session)
    assert session.undo() and same(look(session), before)
    assert session.redo() and same(look(session), after) and not session.redo()

@quick
@given(plays)
def test_undo_to_the_beginning_and_redo_to_the_end(moves):
    session = play(EditSession(W, H), moves)
    while session.redo(): pass
    end = look(session)
    while session.undo(): pass
    assert session.at == 0 and torch.equal(session.paint(picture()), picture())
    assert session.mask() is None and session.drags == []
    while session.redo(): pass
    assert same(look(session), end)

@quick
@given(plays, st.floats(0, 1), st.integers(0, 2**31 - 1), st.text(max_size=30), st.text(max_size=30))
def test_file_round_trip(tmp_path_factory, moves, lam, seed, content, motion):
    session = play(EditSession(W, H, lam, seed), moves)
    session.say(content, motion)
    session.save(path := tmp_path_factory.getbasetemp()/"round.json")
    back = EditSession.open(path)
    assert back == session and same(look(back), look(session))
    assert back.redo() == session.redo() and back == session # what was undone came along

@quick
@given(plays, st.one_of(*DRAWN))
def test_new_step_cuts_off_what_was_undone(moves, last):
    session = play(EditSession(W, H), moves)
    session.undo()
    at = session.at
    play(session, [last])
    assume(session.at == at + 1)
    assert len(session.steps) == session.at

@quick
@given(plays)
def test_replay_shares_nothing(moves):
    session = play(EditSession(W, H), moves)
    state = session.state()
    copy = EditSession.replay(state)
    copy.stroke([(1, 1)], "red")
    copy.lam = 1.0
    assert session.state() == state

def test_arrow_is_deleted_by_its_number_and_a_second_clear_is_no_step():
    session = EditSession(W, H)
    for x in (1, 2, 3): session.drag((x, 1), (x, 9), 2)
    session.delete_drag(1)
    assert [d.start[0] for d in session.drags] == [1, 3]
    session.clear()
    session.clear()
    assert len(session.steps) == 5 and session.undo() and len(session.drags) == 2

# paint

def distances(points):
    "From each pixel's middle to the path, by brute force."
    y, x = np.mgrid[:H, :W] + 0.5
    far = np.full((H, W), np.inf)
    for (x0, y0), (x1, y1) in zip(points, points[1:] or points):
        length = (x1 - x0)**2 + (y1 - y0)**2
        t = np.clip(((x - x0)*(x1 - x0) + (y - y0)*(y1 - y0)) / length, 0, 1) if length > 1e-12 else 0*x
        far = np.minimum(far, np.hypot(x - x0 - t*(x1 - x0), y - y0 - t*(y1 - y0)))
    return far

@quick
@given(st.lists(inside, min_size=1, max_size=4), st.floats(1, 10), colours, st.floats(0.01, 1))
def test_stroke_changes_only_pixels_near_it(points, size, colour, opacity):
    session = EditSession(W, H)
    session.stroke(points, colour, size, opacity)
    changed = (session.paint(picture()) != picture()).any(0).numpy()
    # 0.71 is half the diagonal of a pixel, the rest is the grid
    assert not changed[distances(points) > size/2 + 1.2].any()

@quick
@given(st.lists(inside, min_size=1, max_size=4), st.floats(3, 10))
def test_opaque_stroke_covers_its_middle(points, size):
    session = EditSession(W, H)
    session.stroke(points, "#336699", size)
    core = torch.from_numpy(distances(points) < size/2 - 1.2)
    assert torch.allclose(session.paint(picture())[:, core], torch.tensor([0x33, 0x66, 0x99])[:, None]/255, atol=1e-6)

@quick
@given(st.lists(inside, min_size=1, max_size=4), st.floats(1, 8), st.floats(0.01, 1))
def test_wider_eraser_restores_the_picture_to_the_last_bit(points, size, opacity):
    session = EditSession(W, H)
    session.stroke(points, "red", size, opacity)
    session.erase(points, size + 4)
    assert torch.equal(session.paint(picture()), picture())

def test_eraser_goes_to_the_picture_not_to_the_stroke_below():
    session = EditSession(W, H)
    session.stroke([(12, 8)], "red", 12)
    session.stroke([(12, 8)], "blue", 6)
    session.erase([(12, 8)], 4)
    painted = session.paint(picture())
    assert torch.equal(painted[:, 7:9, 11:13], picture()[:, 7:9, 11:13])
    assert painted[:, 8, 8].tolist() == [1, 0, 0] and painted[:, 8, 14].argmax() == 2

def test_opacity_counts_once_where_a_stroke_crosses_itself():
    session = EditSession(W, H)
    session.stroke([(4, 8), (20, 8), (4, 8), (20, 8)], "white", 4, 0.5)
    assert torch.allclose(session.paint(torch.zeros(3, H, W))[:, 8, 6:18], torch.tensor(0.5), atol=1e-3)

@pytest.mark.parametrize("size", [1, 2.5, 6, 11])
def test_dot_has_the_area_of_its_disc(size):
    assert coverage([(12, 8)], size, W, H).sum() == pytest.approx(math.pi*size**2/4, rel=0.15)

def test_dot_lies_where_it_was_put():
    "(0, 0) is the corner of the picture, so a dot at (12, 8) is the same seen from all sides."
    for size in (2, 3.5, 5, 6):
        dot = coverage([(12, 8)], size, W, H)
        assert np.array_equal(dot, dot[::-1]) and np.array_equal(dot, dot[:, ::-1])

def test_paint_answers_in_the_kind_it_was_asked():
    session = EditSession(W, H)
    session.stroke([(3, 3)], "red", 3)
    image = Image.fromarray((picture().permute(1, 2, 0)*255).byte().numpy())
    painted = session.paint(image)
    assert painted.mode == "RGB" and painted.getpixel((2, 2)) == (255, 0, 0)
    assert painted.getpixel((20, 12)) == image.getpixel((20, 12))
    batch = picture()[None].to(torch.bfloat16)
    assert session.paint(batch).dtype == torch.bfloat16 and session.paint(batch).shape == (1, 3, H, W)

def test_painting_is_deterministic_and_changes_nothing():
    session, image = EditSession(W, H), picture()
    session.stroke([(3, 3), (9, 12)], "red", 3, 0.3)
    assert torch.equal(session.paint(image), session.paint(image)) and torch.equal(image, picture())

def test_mask_is_its_own_layer():
    session = EditSession(W, H)
    session.mask_stroke([(12, 8)], 6)
    assert torch.equal(session.paint(picture()), picture()) and session.mask().shape == (1, 1, H, W)
    assert session.mask()[0, 0, 8, 12] == 1
    session.erase([(12, 8)], 20)
    assert session.mask() is not None # that was the eraser for paint
    session.erase([(12, 8)], 20, "mask")
    assert session.mask() is None

def test_picture_of_any_mode_enters():
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK"):
        assert EditSession(W, H).paint(Image.new(mode, (W, H))).mode == "RGB"
    clear = Image.new("RGBA", (W, H), (0, 0, 0, 0))
    assert upright(clear).getpixel((0, 0)) == (255, 255, 255)

def test_turned_photograph_is_set_upright():
    image = Image.new("RGB", (H, W))
    image.putpixel((0, 0), (255, 0, 0))
    image.getexif()[0x0112] = 6
    assert upright(image).size == (W, H) and upright(image).getpixel((W - 1, 0)) == (255, 0, 0)
    assert EditSession(W, H).paint(image).size == (W, H)

def test_preview_shows_mask_and_arrow():
    session, image = EditSession(W, H), torch.zeros(3, H, W)
    session.mask_stroke([(4, 8)], 6)
    session.drag((10, 8), (20, 8), 3)
    shown = np.asarray(session.preview(image, scale=10))
    assert shown.shape == (160, 240, 3) and shown[80, 40].sum() > 100 and shown[80, 150].sum() > 700
    assert shown[10, 150].sum() == 0

# refusals: one clear line, nothing changed

def with_one_of_each():
    session = EditSession(W, H)
    session.stroke([(3, 3)], "red")
    session.drag((3, 3), (9, 9), 2)
    session.undo()
    return session

@pytest.mark.parametrize("method, args, words", [
    ("drag", ((3, 3), (W + 1, 3)), "drag end .* outside the 24x16 picture"),
    ("drag", ((-0.1, 3), (5, 3)), "drag start"), ("drag", ((3, 3), (3, 3)), "starts and ends"),
    ("drag", ((3, 3), (5, float("nan"))), "outside"), ("drag", ((3, 3), 5), "expected .x, y."),
    ("drag", ((3, 3), (5, 5), 0), "drag radius"),
    ("stroke", ([],), "empty"), ("stroke", ([(3, 3)], "grene"), "'grene'.*#rrggbb"),
    ("stroke", ([(3, 3)], "#ff000080"), "#rrggbb"), ("stroke", ([(3, 3)], None), "colour is None"),
    ("stroke", ([(3, 3)], "red", 0), "brush size is 0"), ("stroke", ([(3, 3)], "red", True), "brush size"),
    ("stroke", ([(3, 3)], "red", 4, 1.1), "opacity is 1.1"),
    ("stroke", ([(3, 3), (300, 3)],), "far outside"), ("stroke", ([(3, "4")],), "outside"),
    ("erase", ([(3, 3)], 4, "sky"), "'sky'.*paint.*mask"), ("mask_stroke", ([],), "empty"),
    ("delete_drag", (0,), "no arrow"), ("say", ("x"*1001,), "1000 characters"), ("say", ("fine", 3), "motion text")])
def test_refused_in_one_line(method, args, words):
    session = with_one_of_each()
    before = session.state()
    with pytest.raises(KitError, match=words) as error: getattr(session, method)(*args)
    assert "\n" not in str(error.value) and session.state() == before

@pytest.mark.parametrize("name, value",
                         [("lam", 1.01), ("lam", float("nan")), ("lam", "0.5"), ("seed", -1), ("seed", 1.5),
                          ("seed", 2**31), ("seed", True)])
def test_lam_and_seed_are_looked_at(name, value):
    session = with_one_of_each()
    before = session.state()
    with pytest.raises(KitError, match=name): setattr(session, name, value)
    assert session.state() == before

@pytest.mark.parametrize("size", [(0, 4), (4, 9000), (4.5, 4), ("4", 4)])
def test_size_of_the_picture(size):
    with pytest.raises(KitError, match="width|height"): EditSession(*size)

@pytest.mark.parametrize("image, words", [(torch.zeros(3, H, W + 1), "25x16 pixels, the session 24x16"),
                                          (torch.zeros(1, H, W), "shape"), (torch.zeros(2, 3, H, W), "shape"),
                                          ("cat.png", "PIL image"), (Image.new("F", (W, H)), "8-bit"),
                                          (Image.new("L", (H, W)), "16x24 pixels")])
def test_picture_that_does_not_fit(image, words):
    with pytest.raises(KitError, match=words): EditSession(W, H).paint(image)

# files

def test_file_is_cut_anywhere(tmp_path):
    "A file that lost its end is refused; the session in memory and the file stay."
    session, path = with_one_of_each(), tmp_path/"s.json"
    session.save(path)
    whole = path.read_bytes()
    before = session.state()
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        with pytest.raises(KitError, match="damaged"): session.load(path)
        assert session.state() == before and path.read_bytes() == whole[:n]

@pytest.mark.parametrize("change, words", [
    (dict(version=2), "version 2; this kit reads version 1"), (dict(version=None), "version None"),
    (dict(format="x"), "not an edit session"), (dict(steps={}), "not a list"),
    (dict(steps=[dict(kind="stroek", points=[[1, 1]])]), 'step 1 .*"stroke"'),
    (dict(steps=[dict(kind="stroke", points=[[1, 1]], colour="red", size=1, opacity=1, wet=True)]), "step 1 .stroke."),
    (dict(steps=[dict(kind="stroke", points=5)]), "step 1"), (dict(steps=["stroke"]), "step 1"),
    (dict(steps=[dict(kind="delete_drag", index=0)]), "no arrow"), (dict(steps=[dict(kind=[])]), "step 1"),
    (dict(steps=[dict(kind="save", path="x")]), "step 1"), (dict(at=9), "place among the steps"), (dict(lam=2), "lam"),
    (dict(seed="a"), "seed"), (dict(width=-1), "width"), (dict(content=3), "content text")])
def test_file_that_says_nonsense(tmp_path, change, words):
    session, path = with_one_of_each(), tmp_path/"s.json"
    path.write_text(json.dumps({**session.state(), **change}))
    before = session.state()
    with pytest.raises(KitError, match=words): session.load(path)
    assert session.state() == before

def test_file_without_a_key_or_of_another_kind(tmp_path):
    session, path = with_one_of_each(), tmp_path/"s.json"
    for text, words in [(json.dumps({k: v for k, v in session.state().items() if k != "at"}), "lacks at"),
                        ("[]", "not an edit session"), ("\xff", "not|damaged"), ("[" * 100000, "damaged")]:
        path.write_text(text)
        with pytest.raises(KitError, match=words): session.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KitError, match="damaged"): session.load(path)
    with pytest.raises(KitError, match="no session"): session.load(tmp_path/"none.json")

def test_session_of_another_picture_is_not_loaded(tmp_path):
    EditSession(W + 1, H).save(tmp_path/"s.json")
    with pytest.raises(KitError, match="25x16, this one has 24x16"): with_one_of_each().load(tmp_path/"s.json")

def test_load_takes_all_of_it(tmp_path):
    session, other = with_one_of_each(), EditSession(W, H, lam=0.25, seed=9)
    session.say("a fox", "runs")
    session.save(tmp_path/"s.json")
    other.stroke([(1, 1)], "blue")
    other.load(tmp_path/"s.json")
    assert other == session and other.redo() and other.drags == [Drag((3, 3), (9, 9), 2)]

def test_killed_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    session, path = with_one_of_each(), tmp_path/"s.json"
    session.save(path)
    old = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): session.save(path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]

def test_session_needs_no_torch():
    code = ("import sys; from instructvideo_kit.interactive.session import EditSession; s = EditSession(8, 8); "
            "s.stroke([(1, 1)]); s.preview(__import__('PIL.Image').Image.new('RGB', (8, 8))); print('torch' in "
            "sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "False"
