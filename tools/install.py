"""Make .venv and install the pinned packages with visible progress. Standard library only; tools/setup calls it.

python tools/install.py                   what `make setup` does
python tools/install.py --wheels FOLDER   what `make wheels` does: fill a folder for rooms without internet

From the environment, or as `make setup NAME=value`:
TORCH_INDEX  where the CPU build of torch is found, for Linux without an NVIDIA card; empty: take the registry's torch
OFFLINE      a folder that `make wheels` filled: install from it alone, without any index
UV           the program uv; by default the one on the path. UV=0: use pip
"""
import os
import platform
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

VENV, LOG = Path(".venv"), Path(".venv/set-up.log")
PYTHON = str(VENV/"bin/python")
TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
OFFLINE = os.environ.get("OFFLINE", "")
PATIENCE = 5 # seconds for the index of torch to answer
MADE_WITH = "made-with.txt" # in a folder of wheels: for which machine
INDEX_OPTIONS = ("index-url", "extra-index-url", "find-links")
STARTED = time.time()


def say(text): print(f"set-up [{time.time() - STARTED:4.0f} s] {text}", flush=True)


def stop(text): sys.exit(f"set-up: {text}")


# ---- what pip or uv is doing

class Progress:
    "What the installer is doing, from its output: a line that moves on a terminal, a line every ten seconds in a log."
    UNITS = {"kB": 1e-3, "KiB": 1e-3, "MB": 1, "MiB": 1, "GB": 1e3, "GiB": 1e3}
    COLLECTING = re.compile(r"\s*(?:Collecting|Processing|Requirement already satisfied:|Obtaining) ?([^\s=<>!~\[;]+)")
    DOWNLOADING = re.compile(r"\s*Downloading (\S+) \(([\d.]+) ?([kKMG]i?B)\)")

    def __init__(self, expected):
        self.expected, self.to_write = expected, 0
        self.before = written()
        self.names, self.mb = set(), 0.0
        self.now = "reading the package index"

    def read(self, line):
        if line.startswith("Ignoring "): self.expected -= 1 # a pin for another Python
        elif m := self.COLLECTING.match(line):
            self.names.add(m[1])
            self.now = Path(m[1]).name.split("-")[0].lower()
        elif m := self.DOWNLOADING.match(line):
            self.mb += float(m[2]) * self.UNITS[m[3]]
            self.now = f"downloading {m[1].split('-')[0]}, {m[2]} {m[3]}"
        elif line.startswith("Installing collected packages:"): self.to_write = line.count(",") + 1
        elif m := re.match(r"Resolved (\d+) package", line): self.now = f"uv fetches {m[1]} packages" # says no more
        elif m := re.match(r"Prepared (\d+) package", line): self.to_write = int(m[1])

    def share(self):
        "How much is done, 0 to 1: two thirds for finding and fetching, one for unpacking."
        found = min(1, len(self.names)/self.expected) if self.expected else 0
        unpacked = min(1, (written() - self.before)/self.to_write) if self.to_write else 0
        return max(2/3*found, 2/3 + unpacked/3 if self.to_write else 0)

    def text(self):
        bar = "#" * round(24*self.share())
        if self.to_write: what = f"unpacking: {written()} packages are in .venv"
        else: what = f"package {len(self.names)} of {self.expected or '?'}, {self.mb:.0f} MB, now: {self.now}"
        return f"[{bar:.<24}] {what}"


def written(): return sum(1 for _ in VENV.glob("lib/python*/site-packages/*.dist-info"))


def watch(progress, done):
    "Show the progress until `done`."
    live = sys.stdout.isatty()
    while not done.wait(0.3 if live else 10):
        line = f"{time.time() - STARTED:4.0f} s {progress.text()}"
        if live: print(f"\r\033[K{line[:shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        else: say(progress.text())
    if live: print("\r\033[K", end="", flush=True)


def follow(command, expected, env=None):
    "Run an installer, its whole output in the log; (exit status, its error lines)."
    progress, done, errors = Progress(expected), threading.Event(), []
    watcher = threading.Thread(target=watch, args=(progress, done), daemon=True)
    watcher.start()
    with open(LOG, "a", buffering=1) as log:
        log.write(f"\n$ {shlex.join(command)}\n")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                              env=env) as run:
            for line in run.stdout:
                log.write(line)
                progress.read(line)
                if re.search(r"error|×|╰─▶", line, re.I): errors.append(line.strip())
    done.set()
    watcher.join(1)
    return run.returncode, errors


# ---- pip, or uv where there is one

def pip_command(verb):
    "pip without questions and without compiling: Python compiles what it imports, all of it takes minutes."
    quiet = ["--disable-pip-version-check", "--no-input"]
    plain = ["--progress-bar", "off"] + (["--no-compile"] if verb == "install" else [])
    return [PYTHON, "-m", "pip", *quiet, verb, *plain]


def uv_program():
    "The program uv, or None."
    wanted = os.environ.get("UV", "uv")
    return None if wanted in ("", "0") else shutil.which(wanted)


def settings_of_pip(text):
    "Options that say to uv what pip's own settings say: mirrors and folders. `text` is what `pip config list` prints."
    found = []
    for option, value in re.findall(r"^(?:[\w:]+)\.([\w-]+)='(.*)'$", text, re.M):
        if option in INDEX_OPTIONS:
            for one in value.replace("\\n", " ").split(): found += [f"--{option}", one]
    return found


def uv_command(uv):
    "uv, pointed at .venv and at the places pip would look in."
    said = subprocess.run([PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    places = [] if OFFLINE else [*settings_of_pip(said), "--index-strategy", "unsafe-best-match"]
    return [uv, "pip", "install", "--python", PYTHON, *places]


def without_settings():
    "The environment without anybody's index: for OFFLINE."
    kept = {k: v for k, v in os.environ.items() if k not in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS")}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1", "UV_OFFLINE": "1"}


def install(*args, expected=0):
    "pip install, or uv pip install; uv failing is no reason to stop, pip failing is."
    if OFFLINE: args = ("--no-index", "--find-links", OFFLINE, *args)
    env = without_settings() if OFFLINE else None
    if uv := uv_program():
        status, errors = follow([*uv_command(uv), *args], expected, env)
        if status == 0: return
        say(f"uv failed ({errors[-1] if errors else f'exit {status}'}); pip tries the same")
    finish(*follow([*pip_command("install"), *args], expected, env))


def finish(status, errors):
    "Stop with the installer's own error lines when it failed."
    if status == 0: return
    for line in errors[-3:]: say(line)
    mend = "mend the cause (network? disk space?)"
    if OFFLINE: mend = f"the folder {OFFLINE} lacks something ({made_with(Path(OFFLINE))}); make wheels fills it"
    stop(f"it failed, its whole output is in {LOG}; {mend} and run the same command again")


# ---- torch without CUDA

def has_nvidia():
    "Is there an NVIDIA card whose driver works?"
    if Path("/proc/driver/nvidia/version").exists(): return True
    try: found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired): return False
    return found.returncode == 0 and "GPU" in found.stdout


def pinned(name):
    "The requirement of constraints.txt for a package that has one line there."
    return next(line for line in Path("constraints.txt").read_text().splitlines() if line.startswith(f"{name}=="))


def page_of(address):
    "The text at an address, within PATIENCE seconds: looking up a name may take longer than any time-out of a socket."
    got = []
    def fetch():
        try:
            trusted = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or None)
            with urllib.request.urlopen(address, timeout=PATIENCE, context=trusted) as answer:
                got.append(answer.read().decode(errors="replace"))
        except (OSError, ValueError): pass
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return got[0] if got else None


def why_not_cpu(requirement):
    "Why the CPU build cannot be had from TORCH_INDEX, in words; None when it can."
    page = page_of(f"{TORCH_INDEX.rstrip('/')}/torch/")
    if page is None: return f"{TORCH_INDEX} could not be reached within {PATIENCE} s"
    version = re.escape(requirement.split("==")[1])
    if not re.search(rf"torch-{version}(?:%2B|\+)cpu-", page): return f"{TORCH_INDEX} has no {requirement} for the CPU"


def wants_cpu_build():
    "On Linux the registry's torch brings CUDA, 2 GB that nobody needs without an NVIDIA card."
    return sys.platform == "linux" and bool(TORCH_INDEX) and not OFFLINE and not has_nvidia()


def cpu_torch(get):
    "Let `get` install or download the CPU build of torch, or say in a sentence why the registry's is taken instead."
    if not wants_cpu_build(): return
    requirement = pinned("torch")
    why = why_not_cpu(requirement)
    if why is None and get("--no-deps", "--index-url", TORCH_INDEX, requirement) != 0: why = "it could not be fetched"
    if why is None: say("torch is the CPU build")
    else: say(f"no CPU build of torch: {why}. torch comes from the package registry instead, on most machines with "
              "2 GB of CUDA (TORCH_INDEX names another index)")


def install_torch(*args): return follow([*pip_command("install"), *args], 0)[0]


# ---- the virtual environment, the set-up, the folder of wheels

def reusable(version):
    "Is .venv of this Python version and made in this very folder (a moved one holds wrong paths)?"
    try: here = str(VENV.absolute()) in (VENV/"bin/pip").read_text().splitlines()[0]
    except (OSError, IndexError): return False
    return here and f"version = {version}" in (VENV/"pyvenv.cfg").read_text()


def make_venv():
    version = platform.python_version()
    again = reusable(version)
    say(f"step 1 of 3: virtual environment .venv with Python {version}" + (", there already" if again else ""))
    if not again: subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)


def pins(): return sum(not line.startswith("#") for line in Path("constraints.txt").read_text().splitlines())


def this_machine():
    "Python's version and the platform: what wheels depend on."
    return f"Python {'.'.join(platform.python_version_tuple()[:2])}, {sys.platform}, {platform.machine()}"


def made_with(folder):
    "For which machine a folder of wheels was filled, as a sentence."
    note = folder/MADE_WITH
    if not note.exists(): return "it was not filled by make wheels"
    return f"it was filled for {note.read_text().strip()}, this is {this_machine()}"


def check_folder():
    "Stop early when OFFLINE is no folder of wheels, or one for another machine."
    folder = Path(OFFLINE)
    if not any(folder.glob("*.whl")):
        stop(f'OFFLINE="{OFFLINE}" holds no wheels; where there is a network, make wheels WHEELS={OFFLINE} fills it')
    note = folder/MADE_WITH
    if note.exists() and note.read_text().strip() != this_machine():
        stop(f'OFFLINE="{OFFLINE}": {made_with(folder)}; run make wheels with the Python and the system of this room')


def set_up():
    "Everything that `make setup` does."
    (VENV/"set-up.stamp").unlink(missing_ok=True)
    if OFFLINE: check_folder()
    make_venv()
    where = f"from {OFFLINE}, no network" if OFFLINE else "half a GB, several with CUDA; minutes, only this once"
    say(f"step 2 of 3: pinned packages, {where}{', with uv' if uv_program() else ''}")
    cpu_torch(install_torch)
    install("--no-deps", "-r", "constraints.txt", expected=pins()) # all by name: nothing to resolve, so no wrong turns
    say("step 3 of 3: the kit itself, and what only this platform needs")
    install("-c", "constraints.txt", "--no-build-isolation", "-e", ".[dev]", expected=written())
    subprocess.run([PYTHON, "-c", "import torch, diffusers, transformers, instructvideo_kit"], check=True)
    say("ready")


def fill(folder):
    "Everything that `make wheels` does: all pins, what this platform needs beside them, and the kit itself, as wheels."
    folder.mkdir(parents=True, exist_ok=True)
    make_venv()
    say(f"step 2 of 3: wheels of all pinned packages -> {folder}")
    cpu_torch(lambda *args: follow([*pip_command("download"), "--dest", str(folder), *args], 0)[0])
    into = [*pip_command("wheel"), "--wheel-dir", str(folder), "--find-links", str(folder)]
    finish(*follow([*into, "--no-deps", "-r", "constraints.txt"], pins()))
    say("step 3 of 3: the kit itself, and what only this platform needs")
    finish(*follow([*into, "-c", "constraints.txt", ".[dev]"], len(list(folder.glob("*.whl")))))
    (folder/MADE_WITH).write_text(this_machine() + "\n")
    size = sum(p.stat().st_size for p in folder.glob("*.whl"))/1e9
    say(f"ready: {len(list(folder.glob('*.whl')))} wheels, {size:.1f} GB; in the room: make setup OFFLINE={folder}")


def main(arguments):
    if arguments[:1] == ["--wheels"]: fill(Path(arguments[1] if arguments[1:] and arguments[1] else "wheels"))
    else: set_up()


if __name__ == "__main__": main(sys.argv[1:])
