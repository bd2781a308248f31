"doctor: every check can say no, in one line that says what to do."
import collections
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from instructvideo_kit import doctor, files

ROOT = Path(__file__).resolve().parent.parent

def says_no(check, part):
    assert check.ok is False and part in check.message and "\n" not in check.message, check

def test_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    says_no(doctor._python(), "3.10 to 3.13")
    monkeypatch.setattr(sys, "version_info", (3, 13, 9))
    assert doctor._python().ok

def test_packages(monkeypatch):
    says_no(doctor._package(Requirement("no-such-thing")), "make setup")
    says_no(doctor._package(Requirement("packaging<1")), "<1 is needed")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert doctor._package(Requirement("torch==2.13.0")).ok

def test_requirements_are_the_core_ones():
    names = {r.name for r in doctor._requirements()}
    assert "torch" in names and not names & {"hpsv2", "nbdev", "playwright"}

def test_kit_not_installed(monkeypatch):
    def absent(name): raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "requires", absent)
    says_no(doctor._packages()[0], "pip install -e .")

def test_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_package_data", lambda: tmp_path)
    says_no(doctor._weights("policy"), "menagerie train")
    (folder := tmp_path/"weights/policy/menagerie/unet").mkdir(parents=True)
    (folder/"model.safetensors").write_text("version https://git-lfs")
    says_no(doctor._weights("policy"), "pointer")
    (folder/"model.safetensors").write_bytes(bytes(2048))
    assert doctor._weights("policy") == ("policy weights", True, "menagerie: 0.0 MB")

def test_no_ffmpeg(monkeypatch):
    import imageio_ffmpeg
    def missing(): raise RuntimeError("No ffmpeg exe could be found")
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    says_no(doctor._ffmpeg(), "IMAGEIO_FFMPEG_EXE")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    says_no(doctor._ffmpeg(), "pip install imageio-ffmpeg")

def test_little_memory_and_disk(tmp_path, monkeypatch):
    import psutil
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=0.5e9, total=8e9))
    says_no(doctor._memory(), "0.5 GB free")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage(1e10, 1e10, 2e8))
    says_no(doctor._disk(tmp_path), "--out")

def test_folder_not_writable(tmp_path, monkeypatch):
    assert doctor._writable(tmp_path).ok
    says_no(doctor._writable(tmp_path/"absent"), "another folder")

def test_one_core_is_fine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert doctor._cores().ok and "twice" in doctor._cores().message

def fake_torch(gpu):
    return types.SimpleNamespace(
        __version__="9", cuda=types.SimpleNamespace(is_available=lambda: gpu, get_device_name=lambda: "A100")
    )

def test_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "_nvidia", lambda: [])
    monkeypatch.setitem(sys.modules, "torch", None)
    says_no(doctor._gpu(), "torch does not start")
    monkeypatch.setitem(sys.modules, "torch", fake_torch(False))
    assert doctor._gpu().ok
    monkeypatch.setitem(sys.modules, "torch", fake_torch(True))
    assert "A100" in doctor._gpu().message
    monkeypatch.setitem(sys.modules, "torch", fake_torch(False))
    monkeypatch.setattr(doctor, "_nvidia", lambda: ["L4"])
    says_no(doctor._gpu(), "CUDA build")

def test_nvidia_smi(monkeypatch):
    def answer(rc, text):
        return lambda *a, **k: subprocess.CompletedProcess(a, rc, text)
    monkeypatch.setattr(subprocess, "run", answer(0, "L4\nL4\n"))
    assert doctor._nvidia() == ["L4", "L4"]
    monkeypatch.setattr(subprocess, "run", answer(9, "no devices"))
    assert doctor._nvidia() == []

def test_report_counts_and_lists_the_bad_last():
    lines = doctor.report([("b", False, "do x"), ("a", True, "1")]).splitlines()
    assert lines == ["ok    a  1", "MEND  b  do x", "1 to mend"]

def test_doctor_starts_without_heavy_imports():
    code = (
        "import sys, instructvideo_kit.doctor; print([m for m in ('torch', 'diffusers', 'psutil') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


# ---- how long things take

def test_time_goes_with_the_speed_of_the_processor():
    here, slower = doctor.expected_minutes(doctor.REFERENCE), doctor.expected_minutes(doctor.REFERENCE/4)
    assert here["demo"] == doctor.DEMO_MINUTES and set(here) == set(slower)
    assert all(slower[name] == pytest.approx(4*here[name]) for name in here)

def test_the_measured_demo_is_foretold():
    "3 min 28 s at 433 GFLOP/s."
    assert doctor.expected_minutes(433)["demo"] == pytest.approx(3 + 28/60, rel=.1)

def test_every_tutorial_is_named_with_the_minutes_of_its_card():
    minutes = doctor.expected_minutes(doctor.REFERENCE)
    masters = sorted(p.stem for p in (ROOT/"tutorials").glob("[0-9]*.ipynb"))
    assert masters and set(minutes) == {"demo", *masters}
    for name in masters:
        card = "".join(json.loads((ROOT/f"tutorials/{name}.ipynb").read_text())["cells"][1]["source"])
        assert f" {minutes[name]:g} to run" in card

def test_a_card_without_minutes_and_no_course(tmp_path, monkeypatch):
    (tmp_path/"a.ipynb").write_text('{"cells": [{"source": ["# A"]}]}')
    (tmp_path/"b.ipynb").write_text("no notebook")
    assert doctor._card_minutes(tmp_path/"a.ipynb") is None and doctor._card_minutes(tmp_path/"b.ipynb") is None
    monkeypatch.setattr(doctor, "_course", lambda: [tmp_path/"a.ipynb"])
    assert list(doctor.expected_minutes(100)) == ["demo"]
    monkeypatch.setattr(doctor, "_course", lambda: [])
    assert len(doctor.durations(100)) == 2

def test_times_are_said_as_a_person_says_them():
    assert [doctor._as_time(m) for m in (.1, 1.2, 1.6, 16.7)] == ["6 s", "72 s", "2 min", "17 min"]

def test_processor_is_measured_and_times_follow(monkeypatch):
    from instructvideo_kit import machine
    found = machine.Machine(2, 2, 100., 300.)
    monkeypatch.setattr(machine, "machine", lambda: found)
    check = doctor._processor()
    assert check.ok and "2 threads" in check.message and "100 GFLOP/s in float32, 300 in bfloat16" in check.message
    text = doctor.report([check])
    assert "at 100 GFLOP/s (cards: 200)" in text and "  demo" in text and text.splitlines()[-1] == "everything is there"
    assert "demo" not in doctor.report([("disk", False, "make room")])

def test_without_torch_nothing_is_foretold(monkeypatch):
    monkeypatch.setitem(sys.modules, "instructvideo_kit.machine", None)
    assert doctor._processor().ok and doctor.durations() == []
