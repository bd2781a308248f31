"Clips: frame choice, sizes, round trips, broken files, folders of captions."
import base64
import csv
import errno
import functools
import io
import json
import pickle
import re
import shutil
import struct
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instructvideo_kit import files, video
from instructvideo_kit.files import KitError
from instructvideo_kit.video import (
    ClipFolder,
    choose_frames,
    clip_grid,
    clip_info,
    cut_caption,
    describe_captions,
    encode_mp4,
    export_videofolder,
    film_strip,
    preview_sheet,
    read,
    read_captions,
    read_video,
    resize_frame,
    show,
    show_video,
    to_uint8,
    write,
    write_gif,
    write_preview,
    write_video,
)

SHARED = Path(__file__).parents[1]/"../shared/data"
SAMPLES = sorted((SHARED/"instructvideo_samples").glob("*.mp4"))
needs_samples = pytest.mark.skipif(not SAMPLES, reason="../shared/data/instructvideo_samples is not beside the project")
needs_prompts = pytest.mark.skipif(
    not (SHARED / "prompts").is_dir(), reason="../shared/data/prompts is not beside the project"
)


def ramp(n_frames=16, h=32, w=32):
    "A smooth clip whose mean brightness tells the frame number."
    y, x = torch.meshgrid(torch.linspace(0, .1, h), torch.linspace(0, .1, w), indexing="ij")
    level = torch.arange(n_frames)/max(1, n_frames - 1)*.7 + .1
    return (level[:, None, None, None] + torch.stack([x, y, (x + y)/2])[None]).contiguous()

def numbers(clip, n_frames): return ((clip.mean((1, 2, 3)) - .15)/.7*(n_frames - 1)).round().long().tolist()
def psnr(a, b): return float(-10*torch.log10((a - b).square().mean()))

@pytest.fixture
def make(tmp_path):
    "A folder of clips with a metadata.csv of given rows; broken.mp4 is a text file."
    def _make(rows, header=("file_name", "text"), n_frames=8):
        for i in range(3): write_video(tmp_path/f"{i}.mp4", ramp(n_frames))
        (tmp_path/"broken.mp4").write_text("this is no video\n"*20)
        with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([header, *rows])
        return tmp_path
    return _make


# ---- which frames

@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 400),
    st.integers(1, 40),
    st.one_of(st.sampled_from(["spread", "first"]), st.floats(0.5, 60)),
    st.floats(1, 60),
)
def test_chosen_frames_are_in_range_and_ascend(total, n_frames, sample, fps):
    at = choose_frames(total, n_frames, sample, fps)
    assert len(at) == n_frames and at == sorted(at) and 0 <= at[0] and at[-1] < total

@settings(deadline=None, max_examples=60)
@given(st.integers(2, 200), st.integers(2, 40))
def test_spread_covers_the_clip_evenly(total, n_frames):
    at = choose_frames(total, n_frames)
    assert (at[0], at[-1]) == (0, total - 1)
    if total >= n_frames: assert len(set(at)) == n_frames and max(np.diff(at)) - min(np.diff(at)) <= 1
    if total <= n_frames: assert set(at) == set(range(total))

@pytest.mark.parametrize("bad", [(0, 4), (4, 0), (9, 4, "middle"), (9, 4, 0), (9, 4, -8.0)])
def test_bad_choice_is_refused(bad):
    with pytest.raises(ValueError): choose_frames(*bad)

def test_read_takes_the_chosen_frames(tmp_path):
    path = write_video(tmp_path/"a.mp4", ramp(33))
    for n, sample in [(5, "spread"), (5, "first"), (4, 2), (33, "spread")]:
        assert numbers(read_video(path, n, sample=sample), 33) == choose_frames(33, n, sample, 8)

def test_only_chosen_frames_are_converted_and_decoding_stops(tmp_path, monkeypatch):
    path, converted = write_video(tmp_path/"a.mp4", ramp(64)), []
    upright = read._upright
    monkeypatch.setattr(read, "_upright", lambda frame, *a: converted.append(frame.pts) or upright(frame, *a))
    info = clip_info(path)
    converted.clear()
    assert read._decode(path, {0, 3, 9}, None, "crop")[1] == 10
    assert len(converted) == 3 and info.n_frames == 64

def test_short_clip_repeats_and_says_so(tmp_path):
    path = write_video(tmp_path/"a.mp4", ramp(3))
    with pytest.warns(UserWarning, match="3 frames at 8 fps, too few for 6: 3 repeated"): clip = read_video(path, 6)
    assert numbers(clip, 3) == [0, 0, 1, 1, 2, 2]

def test_one_frame_clip(tmp_path):
    path = write_video(tmp_path/"a.mp4", ramp(1))
    assert clip_info(path).n_frames == 1
    with pytest.warns(UserWarning, match="15 repeated"): assert read_video(path, 16).shape == (16, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_video(path, 1)


# ---- sizes

@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40), st.sampled_from(video.FITS))
def test_any_size_goes_to_any_size(height, width, h, w, fit):
    assert resize_frame(Image.new("RGB", (width, height)), (h, w), fit).size == (w, h)

def test_crop_keeps_the_centre_and_pad_the_whole():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    picture = Image.fromarray(pixels)
    assert np.asarray(resize_frame(picture, 10)).min() == 255
    squashed, padded = (np.asarray(resize_frame(picture, 30, fit)).astype(int) for fit in ("squash", "pad"))
    assert squashed[15, 5].max() < 10 and squashed[15, 15].min() > 245
    assert padded[:9].max() == 0 and padded[15, 15].min() > 245

def test_shrinking_is_antialiased():
    checks = Image.fromarray((np.indices((64, 64)).sum(0) % 2*255).astype(np.uint8)).convert("RGB")
    for side in (32, 20): assert np.abs(np.asarray(resize_frame(checks, side)).astype(int) - 127).max() < 12

@pytest.mark.parametrize("bad", [0, (8, 0), (8, 8, 8), -3])
def test_bad_size_is_refused(bad):
    with pytest.raises(ValueError, match="size is"): resize_frame(Image.new("RGB", (8, 8)), bad)

def test_odd_size_is_stored_even_and_read_back(tmp_path):
    clip = ramp(4, 33, 17)
    path = write_video(tmp_path/"odd.mp4", clip)
    assert clip_info(path)[1:3] == (34, 18)
    back = read_video(path, 4)
    assert psnr(back[:, :, :33, :17], clip) > 35 and (back[:, :, 33] - back[:, :, 32]).abs().mean() < .02

def with_rotation(data, clockwise):
    "Set the display matrix in the track header of an mp4."
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[clockwise]
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16 # version and flags; times, ids, duration; reserved, layer, volume
    return data[:at] + struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30) + data[at + 36:]

@pytest.mark.skipif(not hasattr(av.VideoFrame, "rotation"), reason="this PyAV does not expose rotation")
@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_rotated_clips_come_upright(tmp_path, clockwise):
    clip = ramp(2, 24, 48)
    clip[:, 0, :12, :12] = 1.
    path = tmp_path/"phone.mp4"
    path.write_bytes(with_rotation(encode_mp4(clip), clockwise))
    upright = torch.rot90(clip, -clockwise//90, (2, 3))
    assert clip_info(path)[1:3] == upright.shape[2:]
    assert psnr(read_video(path, 2), upright) > 25


# ---- round trips

@pytest.mark.parametrize("scale,least", [(1, 38), (2, 40)])
def test_round_trip(tmp_path, scale, least):
    clip = ramp()
    path = write_video(tmp_path/"a.mp4", clip, fps=12.5, scale=scale)
    assert psnr(read_video(path, size=32), clip) > least
    assert clip_info(path)[:4] == (16, 32*scale, 32*scale, 12.5)

def test_doubling_saves_the_colour_of_drawings(tmp_path):
    clip = (torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) > .5).float()
    plain, doubled = (
        read_video(write_video(tmp_path / f"{k}.mp4", clip, scale=k), 4, size=clip.shape[2:]) for k in (1, 2)
    )
    assert psnr(doubled, clip) > psnr(plain, clip) + 10 and psnr(doubled, clip) > 35

def test_without_x264_mpeg4_is_written_and_gif_shown(tmp_path, monkeypatch):
    for room in (show, write): monkeypatch.setattr(room, "mp4_encoder", lambda: "mpeg4")
    assert psnr(read_video(write_video(tmp_path/"a.mp4", ramp())), ramp()) > 30
    assert "data:image/gif" in show_video(ramp()).data

def test_gif_round_trip(tmp_path):
    path = write_gif(tmp_path/"a.gif", ramp(), scale=2)
    assert clip_info(path)[:3] == (16, 64, 64)
    assert numbers(read_video(path), 16) == list(range(16))

def test_container_without_a_frame_count(tmp_path):
    path = tmp_path/"a.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for frame in to_uint8(ramp(11)): out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        out.mux(stream.encode())
    assert clip_info(path).n_frames == 11
    assert numbers(read_video(path, 3), 11) == [0, 5, 10]

@pytest.mark.parametrize(
    "bad,says",
    [
        (torch.rand(3, 8, 8), "shape"),
        (torch.rand(2, 4, 8, 8), "shape"),
        (torch.rand(0, 3, 8, 8), "shape"),
        (torch.full((2, 3, 8, 8), float("nan")), "NaN"),
    ],
)
def test_what_is_no_clip_is_refused(tmp_path, bad, says):
    with pytest.raises(ValueError, match=says): write_video(tmp_path/"a.mp4", bad)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("fps", [0, -1, 1e6])
def test_bad_rate_is_refused(fps):
    with pytest.raises(ValueError, match="fps is"): encode_mp4(ramp(1), fps)

def test_half_precision_and_gradients_are_fine(): assert encode_mp4(ramp(2).bfloat16().requires_grad_())[4:8] == b"ftyp"


# ---- faults

def test_text_file_named_mp4(tmp_path):
    path = tmp_path/"a cat.mp4"
    path.write_text("hello\n"*100)
    with pytest.raises(KitError, match=r"a cat\.mp4 is not a video PyAV can open: ") as e: read_video(path)
    assert "\n" not in str(e.value)

def test_missing_empty_and_folder(tmp_path):
    (tmp_path/"empty.mp4").touch()
    with pytest.raises(KitError, match="there is no file"): read_video(tmp_path/"nowhere.mp4")
    with pytest.raises(KitError, match="is empty"): read_video(tmp_path/"empty.mp4")
    with pytest.raises(KitError, match="there is no file"): read_video(tmp_path)

def test_sound_without_picture(tmp_path):
    path = tmp_path/"a.wav"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(KitError, match="has no video stream"): read_video(path)

def faststart(data, path):
    "The same clip with its index in front, as downloads have it."
    with av.open(io.BytesIO(data)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    return path

@pytest.mark.parametrize("share", [.97, .7, .3, .05])
@pytest.mark.parametrize("front", [False, True])
def test_every_cut_is_refused(tmp_path, share, front):
    clip = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    path = tmp_path/"a.mp4"
    faststart(encode_mp4(clip), path) if front else path.write_bytes(encode_mp4(clip))
    read_video(path)
    path.write_bytes(path.read_bytes()[:int(share*path.stat().st_size)])
    with pytest.raises(KitError, match="is not a video|cut off") as e: read_video(path)
    assert "\n" not in str(e.value)

def test_cut_is_found_by_the_decoder_where_there_is_no_index(tmp_path, monkeypatch):
    path = faststart(encode_mp4(torch.rand(16, 3, 64, 64)), tmp_path/"a.mp4")
    path.write_bytes(path.read_bytes()[:path.stat().st_size//2])
    monkeypatch.setattr(read, "_ends_early", lambda path, stream: False)
    with pytest.raises(KitError, match="only .* of 16 frames|cannot be decoded"): read_video(path)

def test_header_that_promises_too_much_is_corrected(tmp_path, monkeypatch):
    path = write_video(tmp_path/"a.mp4", ramp(15))
    monkeypatch.setattr(read, "clip_info", lambda path: video.ClipInfo(16, 32, 32, 8.))
    assert numbers(read_video(path, 3), 15) == [0, 7, 14]
    monkeypatch.setattr(read, "clip_info", lambda path: video.ClipInfo(40, 32, 32, 8.))
    with pytest.raises(KitError, match="only 15 of 40 frames"): read_video(path, 3)

@pytest.mark.parametrize("name", [
    "a dir/a clip.mp4", "mötley 猫.mp4", "a:b.mp4", "50%d #1.mp4", "pipe:0.mp4", "-i.mp4"])
def test_odd_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert read_video(write_video(name, ramp(4)), 4).shape == (4, 3, 32, 32)

@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_full_disk_keeps_the_old_clip(tmp_path, monkeypatch, where):
    path = write_video(tmp_path/"a.mp4", ramp(4))
    old = path.read_bytes()
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files.os, where, full)
    for save in (write_video, write_gif):
        with pytest.raises(OSError, match="No space"): save(path, ramp(16))
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


# ---- pictures

def test_film_strip_shape_and_pixels():
    clip = torch.rand(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    strip = np.asarray(film_strip(clip, every=2, scale=3))
    assert strip.shape == (2*12 + 4, 3*18 + 2*2, 3)
    assert (strip[16, 20] == (clip[1, 2, :, 0, 0]*255).round().numpy()).all()

def test_pictures_take_unicode_long_and_missing_labels():
    clips = [ramp(3), ramp(5)]
    film_strip(clips, labels=["猫 ёж — ñ", None])
    clip_grid(clips, columns=9, labels=["a "*60, "donaudampfschifffahrtsgesellschaft"])
    assert clip_grid(clips, columns=1).size == (96, 2*96 + 4)
    film_strip(ramp(3), labels="one caption")

@pytest.mark.parametrize("draw", [film_strip, clip_grid, show_video])
def test_wrong_number_of_labels(draw):
    with pytest.raises(ValueError, match="1 labels for 2 clips"): draw(torch.rand(2, 4, 3, 8, 8), labels=["a"])
    with pytest.raises(ValueError, match="no clip"): draw([])

def test_shown_clip_is_self_contained_and_escaped():
    page = show_video(ramp(), width=96, labels=["<b>cats & dogs</b>"]).data
    assert "&lt;b&gt;cats &amp; dogs" in page and "pixelated" in page and "http" not in page
    data = base64.b64decode(re.search("base64,([^\"]+)", page)[1])
    with av.open(io.BytesIO(data)) as c: assert c.streams.video[0].width == 96


# ---- folders

def test_folder(make):
    data = ClipFolder.open(make([["0.mp4", "a cat"], ["1.mp4", "a dog, walking"], ["2.mp4", "a cat"]]), 4, 16)
    assert (
        len(data) == 3 and data.captions == ["a cat", "a dog, walking", "a cat"] and not data.skipped
    )  # duplicates stay
    clip, caption = data[-1]
    assert clip.shape == (4, 3, 16, 16) and clip.dtype == torch.float32 and 0 <= clip.min() <= clip.max() <= 1
    assert len(list(data)) == 3
    assert "3 clips of 32x32" in data.report and "16x16; 4 frames spread over each clip of 8" in data.report

def test_bad_clips_are_left_out_counted_and_named(make):
    rows = [["broken.mp4", "x"], ["0.mp4", "猫が歩く — a cat"], ["missing.mp4", "y"], ["1.mp4", "  "], ["2.mp4"]]
    folder = make(rows)
    data = ClipFolder.open(folder, 4, 16)
    assert data.captions == ["猫が歩く — a cat"] and len(data.skipped) == 4 and "4 of 5 left out" in data.report
    for word in ("broken.mp4 is not a video", "no file", "1.mp4: the caption is empty", "2.mp4: the caption is empty"):
        assert word in data.report
    assert data[0][0].shape == (4, 3, 16, 16)

def test_many_reasons_are_cut_short(make):
    data = ClipFolder.open(make([["0.mp4", "a"]] + [[f"x{i}.mp4", "b"] for i in range(9)]), 4, 16)
    assert "... and 4 more" in data.report and len(data.report.splitlines()) == 8

def test_refused_when_nothing_is_left(make):
    with pytest.raises(
        KitError, match="none of the 2 clips in .* can be used; the first: .*broken.mp4 is not a video"
    ) as e:
        ClipFolder.open(make([["broken.mp4", "x"], ["0.mp4", ""]]), 4, 16)
    assert "\n" not in str(e.value)

def test_folder_without_captions(make, tmp_path):
    (make([])/"metadata.csv").unlink()
    says = f"no captions: {tmp_path} has 4 clips but no metadata.csv; write one with columns file_name,text"
    with pytest.raises(KitError, match=re.escape(says)): ClipFolder.open(tmp_path, 4, 16)
    with pytest.raises(KitError, match="no folder or list"): ClipFolder.open(tmp_path/"nowhere", 4, 16)
    export_videofolder(tmp_path/"up"/"train", [ramp(2)], ["a"])
    with pytest.raises(KitError, match="up/train has one; open that folder"): ClipFolder.open(tmp_path/"up", 4, 16)

@pytest.mark.parametrize(
    "name,text,says",
    [
        ("metadata.csv", "", "lists no clips"),
        ("metadata.csv", "file_name,text\n", "lists no clips"),
        ("list.txt", "\n\n", "lists no clips"),
        ("metadata.csv", "video,text\na.mp4,x\n", "has the columns video, text; it needs file_name"),
        ("metadata.csv", "file_name,label\na.mp4,x\n", "text or caption"),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}\n{oops\n', "cannot be read as jsonl"),
        ("metadata.jsonl", "[1]\n", "one JSON object per line"),
        ("metadata.csv", b"file_name,text\na.mp4,caf\xe9\n", "is not UTF-8"),
    ],
)
def test_bad_lists(tmp_path, name, text, says):
    path = tmp_path/name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(KitError, match=says) as e: ClipFolder.open(path, 4, 16)
    assert "\n" not in str(e.value)

def test_other_layouts(make, tmp_path):
    folder = make([["0.mp4", "a cat"]], header=("file_name", "caption"))
    assert ClipFolder.open(folder, 4, 16).captions == ["a cat"]
    (folder / "metadata.csv").write_text(
        '\ufefffile_name,text\r\n0.mp4,"a cat,\nasleep"\r\n', encoding="utf-8"
    )  # a spreadsheet wrote it
    assert ClipFolder.open(folder, 4, 16).captions == ["a cat,\nasleep"]
    (folder/"metadata.csv").unlink()
    (folder/"metadata.jsonl").write_text('{"file_name": "1.mp4", "text": "a dog"}\n\n')
    assert ClipFolder.open(folder, 4, 16).captions == ["a dog"]
    (tmp_path/"vgen.txt").write_text("0.mp4|||a cat, walking|||16\n\n1.mp4|||a dog\n2.mp4\n")
    data = ClipFolder.open(tmp_path/"vgen.txt", 4, 16)
    assert data.captions == ["a cat, walking", "a dog"] and len(data.skipped) == 1
    (tmp_path/"lists").mkdir()
    shutil.move(tmp_path/"vgen.txt", tmp_path/"lists")
    assert len(ClipFolder.open(tmp_path/"lists"/"vgen.txt", 4, 16, root=tmp_path)) == 2

def test_report_says_short_clips_and_long_captions(make):
    data = ClipFolder.open(
        make([["0.mp4", "one two three four"], ["1.mp4", "one"]]), 16, (16, 24), max_words=3, fit="pad", sample=4
    )
    for words in (
        "padded with black to 24x16",
        "at 4 fps",
        "2 too short",
        "captions that have more than 3 words and lose the rest: 1",
        "one two three four",
    ):
        assert words in data.report

def test_cache_is_bounded_and_bytes(make, monkeypatch):
    rows = [[f"{i}.mp4", "x"] for i in range(3)]
    data = ClipFolder.open(make(rows), 4, 16, cache_mb=2*4*3*16*16/1e6)
    first = [data[i][0] for i in range(3)]
    assert len(data._cache) == 2 and all(c.dtype == torch.uint8 for c in data._cache.values())
    monkeypatch.setattr(read, "_decode", None) # cached clips need no decoder
    assert torch.equal(data[0][0], first[0])
    with pytest.raises(TypeError): data[2]
    with pytest.raises(IndexError): data[3]

def test_clip_that_vanishes_later_is_named(make):
    data = ClipFolder.open(make([["0.mp4", "x"]]), 4, 16)
    data.paths[0].unlink()
    with pytest.raises(KitError, match=r"no file .*0\.mp4"): data[0]

def test_loader_workers_get_the_same_clips(make):
    data = pickle.loads(pickle.dumps(ClipFolder.open(make([[f"{i}.mp4", f"c{i}"] for i in range(3)]), 4, 16)))
    clips, captions = next(iter(torch.utils.data.DataLoader(data, batch_size=3)))
    assert clips.shape == (3, 4, 3, 16, 16) and list(captions) == ["c0", "c1", "c2"]


# ---- clips from the wild

def clock_picture(seconds, h=48, w=80):
    "A white hand that runs along the top once in two seconds: the picture says when it was shown."
    picture = np.full((h, w, 3), 60, np.uint8)
    hand = round(seconds/2*(w - 8))
    picture[:12, hand:hand + 8] = 255
    return picture

def clock_file(path, times, ratio=None, codec="libx264", base=Fraction(1, 600), **options):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=60, options=options)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv420p"
        stream.codec_context.time_base = base
        if ratio: stream.codec_context.sample_aspect_ratio = ratio
        for t in times:
            frame = av.VideoFrame.from_ndarray(clock_picture(t), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = round(t/base), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path

def clock(clip):
    "Seconds at which each frame was shown, read off the hand."
    bright = (clip[:, :, :12].mean((1, 2)) > .75).float()
    middle = (bright*torch.arange(clip.shape[-1])).sum(1)/bright.sum(1)
    return ((middle - 3.5)*2/(clip.shape[-1] - 8)).numpy()

SLOWER = [i/60 for i in range(60)] + [1 + i/10 for i in range(10)] # 60 frames a second, then 10

@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"]) # with an index, and without
def test_changing_rate_is_sampled_by_time(tmp_path, name):
    path = clock_file(tmp_path/name, SLOWER, base=Fraction(1, 1000))
    info = clip_info(path)
    assert info.n_frames == 70 and np.allclose(info.times, SLOWER, atol=1e-3)
    assert np.abs(clock(read_video(path, 8)) - np.linspace(0, 1.9, 8)).max() < .07
    assert (
        np.abs(clock(read_video(path, 8, sample=5)) - (0.25 + np.arange(8) / 5)).max() < 0.07
    )  # 1.4 s of 1.9, from the middle
    assert np.abs(clock(read_video(path, 8, sample="first")) - np.arange(8)/60).max() < .03

def test_steady_rate_needs_no_times_and_a_dropped_frame_does(tmp_path):
    steady = [i/30 for i in range(60)]
    assert clip_info(clock_file(tmp_path/"a.mp4", steady)).times is None
    assert (
        clip_info(clock_file(tmp_path / "b.mkv", steady, base=Fraction(1, 1000))).times is None
    )  # 33, 33, 34 milliseconds
    assert clip_info(clock_file(tmp_path/"c.mp4", steady[:20] + steady[24:])).times is not None

@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0.01, 0.5), min_size=3, max_size=60),
    st.integers(2, 30),
    st.one_of(st.just("spread"), st.floats(1, 30)),
)
def test_frames_chosen_by_time_are_the_nearest(gaps, n_frames, sample):
    times = np.cumsum(gaps)
    at = choose_frames(len(times), n_frames, sample, times=times)
    assert at == sorted(at) and 0 <= at[0] and at[-1] < len(times)
    if sample == "spread":
        wanted = np.linspace(times[0], times[-1], n_frames)
        nearest = np.abs(times[:, None] - wanted).min(0)
        assert np.allclose(np.abs(times[at] - wanted), nearest)

@pytest.mark.parametrize(
    "ratio,size",
    [(Fraction(2, 1), (48, 160)), (Fraction(1, 2), (96, 80)), (Fraction(1, 1), (48, 80)), (None, (48, 80))],
)
def test_pixels_that_are_not_square_are_stretched(tmp_path, ratio, size):
    path = clock_file(tmp_path/"a.mp4", [i/30 for i in range(9)], ratio)
    assert clip_info(path)[1:3] == size and read_video(path, 2).shape[2:] == size

def test_wide_pixels_are_cut_as_they_look(tmp_path):
    "320 x 180 at 2:1 is meant to be 640 x 180: a square crop then takes 90 stored columns, not 180."
    picture = np.zeros((180, 320, 3), np.uint8)
    picture[:, 115:205] = 255
    with av.open(str(tmp_path/"a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for _ in range(2): out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    assert clip_info(tmp_path/"a.mp4")[1:3] == (180, 640)
    assert read_video(tmp_path/"a.mp4", 1, size=32).min() > .9

def test_interlaced_clips_are_said_to_be_so(tmp_path):
    woven = {"flags": "+ildct+ilme", "x264-params": "tff=1"}
    path = clock_file(tmp_path/"0.mp4", [i/25 for i in range(9)], **woven)
    assert clip_info(path).interlaced
    with pytest.warns(UserWarning, match="0.mp4 is interlaced: .*yadif"): read_video(path, 4)
    (tmp_path/"0.txt").write_text("a clock")
    assert "1 interlaced" in ClipFolder.open(tmp_path, 4, 16).report

def test_report_says_what_files_hide(tmp_path):
    clock_file(tmp_path/"a.mp4", SLOWER)
    clock_file(tmp_path/"b.mp4", [i/30 for i in range(9)], Fraction(2, 1))
    for name in "ab": (tmp_path/f"{name}.txt").write_text("a clock")
    report = ClipFolder.open(tmp_path, 4, 16).report
    assert (
        "1 with a frame rate that changes, sampled by time" in report and "1 with pixels that are not square" in report
    )
    assert "interlaced" not in report


# ---- lists from the wild

def test_captions_beside_the_clips(tmp_path):
    for name in ("a", "b", "c"): write_video(tmp_path/f"{name}.mp4", ramp(4))
    (tmp_path/"a.txt").write_text("a cat,\n  asleep\n", encoding="utf-8")
    (tmp_path/"b.txt").write_text("")
    data = ClipFolder.open(tmp_path, 4, 16)
    assert data.captions == ["a cat, asleep"] and [p.name for p in data.paths] == ["a.mp4"]
    assert "b.mp4: the caption is empty" in data.report and "c.mp4: there is no c.txt beside it" in data.report

def test_a_list_wins_over_captions_beside(make):
    folder = make([["0.mp4", "from the list"]])
    (folder/"0.txt").write_text("from beside")
    assert ClipFolder.open(folder, 4, 16).captions == ["from the list"]

def test_parquet(make, monkeypatch):
    folder = make([])
    (folder/"metadata.csv").unlink()
    (folder/"metadata.parquet").write_bytes(b"PAR1 no table PAR1")
    try:
        from pyarrow import Table, parquet
    except ImportError:
        with pytest.raises(
            KitError, match="metadata.parquet is read with pyarrow, which is not installed; pip install pyarrow"
        ):
            ClipFolder.open(folder, 4, 16)
        return
    with pytest.raises(KitError, match="cannot be read as parquet"): ClipFolder.open(folder, 4, 16)
    parquet.write_table(Table.from_pylist([{"file_name": "0.mp4", "text": "a cat"}]), folder/"metadata.parquet")
    assert ClipFolder.open(folder, 4, 16).captions == ["a cat"]

def test_parquet_rows_are_read_like_others(make, monkeypatch):
    "Where pyarrow is not installed, a stand-in for it gives the rows: all after them is the same."
    from types import SimpleNamespace
    folder = make([])
    (folder/"metadata.csv").unlink()
    (folder/"metadata.parquet").touch()
    rows = [{"file_name": "1.mp4", "caption": "a dog"}]
    table = SimpleNamespace(to_pylist=lambda: rows)
    stand_in = SimpleNamespace(parquet=SimpleNamespace(read_table=lambda path: table), ArrowException=KeyError)
    monkeypatch.setitem(sys.modules, "pyarrow", stand_in)
    assert ClipFolder.open(folder, 4, 16).captions == ["a dog"]
    rows[:] = [{"video": {"bytes": b"", "path": None}, "text": "a dog"}]
    with pytest.raises(KitError, match="has the columns video, text; .*its clips lie inside the table"):
        ClipFolder.open(folder, 4, 16)

def test_paths_absolute_relative_spaced_linked(tmp_path):
    far, near = tmp_path/"far away", tmp_path/"my clips"
    export_videofolder(far, [ramp(4), ramp(4)], ["x", "y"])
    near.mkdir()
    (near/"link.mp4").symlink_to(far/"00000.mp4")
    (near/"dead.mp4").symlink_to(tmp_path/"gone.mp4")
    names = ["../far away/00000.mp4", str(far/"00001.mp4"), "link.mp4", "dead.mp4"]
    (near/"metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": n}) + "\n" for n in names))
    data = ClipFolder.open(near, 4, 16)
    assert data.captions == names[:3] and len(data.skipped) == 1
    assert "dead.mp4 is a link to" in data.report and "gone.mp4, which is not there" in data.report
    (tmp_path/"folder").symlink_to(near)
    assert len(ClipFolder.open(tmp_path/"folder", 4, 16)) == 3

def test_a_linked_list_is_relative_to_where_it_is_linked(tmp_path):
    "As in the cache of the Hugging Face hub, whose files are links to blobs."
    (tmp_path/"blob").write_text("file_name,text\n0.mp4,a cat\n")
    (tmp_path/"set").mkdir()
    write_video(tmp_path/"set"/"0.mp4", ramp(4))
    (tmp_path/"set"/"metadata.csv").symlink_to(tmp_path/"blob")
    assert len(ClipFolder.open(tmp_path/"set", 4, 16)) == 1

def test_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_video(tmp_path/"0.mp4", ramp(4))
    (tmp_path/"list.txt").write_text("~/0.mp4|||a cat\n")
    assert len(ClipFolder.open("~/list.txt", 4, 16)) == 1

@functools.cache
def menagerie_words():
    from instructvideo_kit.menagerie.tokens import menagerie_tokenizer
    return menagerie_tokenizer()

def test_captions_in_other_languages_are_told(make):
    folder = make([["0.mp4", "a cat walking at night"], ["1.mp4", "一只猫在夜里走路"], ["2.mp4", "un chat marche"]])
    report = ClipFolder.open(folder, 4, 16, 14, tokenizer=menagerie_words()).report
    assert (
        'captions that are spelled out, which an encoder trained on other words reads badly: 2; the first: "一只猫'
        in report
    )
    assert "24 tokens for 8 words" in report # three bytes a character
    assert "captions that take more than 14 tokens and lose the rest: 1" in report and 'loses "夜里走路"' in report
    plain = ClipFolder.open(folder, 4, 16, 14).report
    assert (
        "captions that hold letters outside English, which CLIP spells out in bytes: 1" in plain
        and "un chat" not in plain
    )

def test_warnings_about_cut_captions_show_whole_characters():
    "Of the policy and of the reward: a cut within the three bytes of a character is not shown as half a character."
    from types import SimpleNamespace

    from instructvideo_kit.policy.base import VideoPolicy
    from instructvideo_kit.reward.clip import ClipReward
    for n in range(6, 12): # characters; the cut after 14 tokens falls within the fifth
        caption = "一只猫在夜里走过大街上去"[:n]
        narrow = SimpleNamespace(tokenizer=menagerie_words(), max_tokens=16, name="a judge")
        assert VideoPolicy.lost_words(narrow, caption) == caption[4:]
        with pytest.warns(UserWarning, match="does not see") as said: ClipReward._say_what_is_cut(narrow, [caption])
        assert f'"{caption[4:]}"' in str(said[0].message) and "\ufffd" not in str(said[0].message)
    assert VideoPolicy.lost_words(narrow, "a cat " * 9) == "a cat a cat "
    assert VideoPolicy.lost_words(narrow, "a cat") == ""

@settings(deadline=None, max_examples=40)
@given(st.text(alphabet="猫走路のabc é", max_size=30), st.integers(1, 20))
def test_a_cut_falls_between_characters(caption, most):
    tokenizer = menagerie_words()
    kept, lost = cut_caption(caption, tokenizer, most)
    assert (kept + lost).replace(" ", "") == caption.replace(" ", "") and "\ufffd" not in kept + lost
    assert len(tokenizer(kept, add_special_tokens=False).input_ids) <= most
    assert bool(lost.strip()) == (len(tokenizer(caption, add_special_tokens=False).input_ids) > most)

def test_unknown_signs_are_told():
    class T5ish:
        unk_token_id, eos_token_id = 2, 1
        def __call__(self, text, **kwargs):
            return type("Ids", (), {"input_ids": [2 if max(map(ord, w)) > 127 else 5 for w in text.split()]})
    assert describe_captions(["a cat", "une 猫"], T5ish(), 9) == [
        'captions that hold signs the tokenizer does not know: 1; the first: "une 猫"'
    ]

def test_preview_shows_what_the_model_sees(make):
    data = ClipFolder.open(make([[f"{i}.mp4", f"clip {i}"] for i in range(3)]), 4, 16)
    sheet = np.asarray(preview_sheet(data, n_clips=2, columns=4))
    clip = to_uint8(data[0][0], 6)
    assert any(
        (sheet[y : y + 96, :96] == clip[0]).all() for y in range(sheet.shape[0] - 95)
    ), "the first frame at the model's size, enlarged"
    path = write_preview(data.paths[0].parent/"look.png", data)
    assert Image.open(path).size[0] == 4*96 + 3*2


# ---- export

def test_export_and_open_again(tmp_path):
    clips, captions = torch.stack([ramp(4), ramp(4).flip(0), ramp(4)]), ["a cat, \"tabby\"", "猫", "a cat"]
    listing = export_videofolder(tmp_path/"out", clips, captions)
    data = ClipFolder.open(tmp_path/"out", 4, 32)
    assert data.captions == captions and all(psnr(data[i][0], clips[i]) > 38 for i in range(3))
    assert read_captions(listing)[0] == ("00000.mp4", captions[0])
    with pytest.raises(KitError, match="already holds"): export_videofolder(tmp_path/"out", clips, captions)

@pytest.mark.parametrize("n", [1, 3])
def test_export_of_uneven_lists_writes_no_metadata(tmp_path, n):
    with pytest.raises(ValueError): export_videofolder(tmp_path, (ramp(2) for _ in range(2)), ["x"]*n)
    assert not (tmp_path/"metadata.csv").exists()

def test_interrupted_export_leaves_no_metadata(tmp_path):
    def clips():
        yield ramp(2)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): export_videofolder(tmp_path, clips(), ["a", "b"])
    assert [p.name for p in tmp_path.iterdir()] == ["00000.mp4"]


# ---- the authors' clips and lists

@needs_samples
@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem[:12])
def test_real_clips(path, tmp_path):
    assert clip_info(path)[:5] == (16, 256, 256, 8., None)
    clip = read_video(path, size=64)
    assert psnr(read_video(write_video(tmp_path/"a.mp4", clip, scale=2), size=64), clip) > 36

@needs_samples
def test_real_folder(tmp_path):
    for p in SAMPLES: shutil.copy(p, tmp_path)
    rows = "".join(f"{p.name}|||{p.stem.split('_')[-1].replace('-', ' ')}|||16\n" for p in SAMPLES)
    (tmp_path/"list.txt").write_text(rows)
    data = ClipFolder.open(tmp_path/"list.txt", 16, 32)
    assert len(data) == 6 and "adorable rabbit" in data.captions and data[0][0].shape == (16, 3, 32, 32)

@needs_prompts
def test_real_prompt_lists():
    for path in sorted((SHARED/"prompts").glob("*.txt")):
        pairs = read_captions(path)
        assert len(pairs) > 15 and all(caption and "|" not in caption for _, caption in pairs)
