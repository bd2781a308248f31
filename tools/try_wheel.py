"""Does the kit work as an installed wheel, in a bare environment and away from the repository?

python tools/try_wheel.py WHEEL [options of pip install ...]
"""
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    ("doctor",),
    ("tutorials", "--to", "course"),
    ("sample", "a cheetah walking to the left in the desert", "--steps", "4", "--out", "runs/cheetah"),
    ("tune", "--data", "menagerie", "--steps", "1", "--out", "runs/mine"),
    ("demo", "--quick"))
WRITTEN = ("course/tutorials/student/01_start_here.ipynb", "course/tutorials/logs/README.md", "runs/cheetah/strip.png",
           "runs/mine/lora/pytorch_lora_weights.safetensors", "runs/demo/report.html")


def bare():
    "An environment without anybody's Python path."
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def step(what, *command, folder):
    "Run a command in `folder`, say how long it took; stop with its output when it fails."
    started = time.time()
    done = subprocess.run(command, cwd=folder, env=bare(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"{'ok    ' if done.returncode == 0 else 'FAILED'} {time.time() - started:5.0f} s  {what}", flush=True)
    if done.returncode: sys.exit(done.stdout[-3000:])
    return done.stdout


def main(wheel, *options):
    with tempfile.TemporaryDirectory() as tmp:
        home, python = Path(tmp)/"work", Path(tmp)/"env/bin/python"
        home.mkdir()
        venv.create(Path(tmp)/"env", with_pip=True)
        install = (python, "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT/"constraints.txt", *options)
        step(f"pip install {Path(wheel).name}", *install, Path(wheel).resolve(), folder=home)
        where = step("import", python, "-c", "import instructvideo_kit as k; print(k.__file__)", folder=home).strip()
        if not Path(where).is_relative_to(Path(tmp).resolve()): sys.exit(f"the kit came from {where}, not the wheel")
        for command in COMMANDS: step(" ".join(command), Path(tmp)/"env/bin/instructvideo-kit", *command, folder=home)
        missing = [name for name in WRITTEN if not (home/name).is_file()]
        if missing: sys.exit(f"not written: {', '.join(missing)}")
    print("the wheel works outside the repository")


if __name__ == "__main__":
    if len(sys.argv) < 2: sys.exit(__doc__.strip())
    main(*sys.argv[1:])
