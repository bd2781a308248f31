"Make .venv and install the pinned packages with visible progress. Standard library only; tools/setup calls it."
import re, shutil, subprocess, sys, threading, time
from pathlib import Path

VENV, LOG = Path(".venv"), Path(".venv/set-up.log")
PIP = [str(VENV/"bin/python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
STARTED = time.time()


def say(text): print(f"set-up [{time.time() - STARTED:4.0f} s] {text}", flush=True)


class Progress:
    "What pip is doing, read from its output: a line that moves on a terminal, a line every ten seconds in a log."
    def __init__(self, expected): self.expected, self.names, self.mb, self.to_write, self.now = expected, set(), 0.0, 0, "reading the package index"

    def read(self, line):
        if line.startswith("Ignoring "): self.expected -= 1 # a pin for another Python
        elif m := re.match(r"\s*(?:Collecting|Processing|Requirement already satisfied:|Obtaining) ?([^\s=<>!~\[;]+)", line):
            self.now = Path(m[1]).name.split("-")[0].lower(); self.names.add(m[1])
        elif m := re.match(r"\s*Downloading (\S+) \(([\d.]+) (kB|MB|GB)\)", line):
            self.mb += float(m[2]) * {"kB": 1e-3, "MB": 1, "GB": 1e3}[m[3]]; self.now = f"downloading {m[1].split('-')[0]}, {m[2]} {m[3]}"
        elif line.startswith("Installing collected packages:"): self.to_write = line.count(",") + 1

    def text(self):
        if not self.to_write: return f"package {len(self.names)}{f' of {self.expected}' if self.expected else ''}, {self.mb:.0f} MB downloaded, now: {self.now}"
        written = sum(1 for _ in VENV.glob("lib/python*/site-packages/*.dist-info"))
        if written >= self.to_write: return "the last and largest packages are being written; about a minute more"
        return f"unpacking into .venv: {written} of {self.to_write} packages are in place"


def watch(progress, done):
    "Show the progress until `done`."
    live = sys.stdout.isatty()
    while not done.wait(0.3 if live else 10):
        if live: print(f"\r\033[K  {progress.text()[:shutil.get_terminal_size().columns - 3]}", end="", flush=True)
        else: say(progress.text())
    if live: print("\r\033[K", end="", flush=True)


def pip(*args, expected):
    "Run pip install, its whole output in the log; stop with its own error lines when it fails."
    progress, done, errors = Progress(expected), threading.Event(), []
    threading.Thread(target=watch, args=(progress, done), daemon=True).start()
    command = [*PIP, "install", "--progress-bar", "off", "--no-compile", *args] # Python compiles what it imports; all of it takes minutes
    with open(LOG, "a", buffering=1) as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as run:
        for line in run.stdout:
            log.write(line); progress.read(line)
            if "error" in line.lower(): errors.append(line.strip())
    done.set(); time.sleep(0.05)
    if run.returncode:
        for line in errors[-3:]: say(line)
        sys.exit(f"set-up: pip failed; its whole output is in {LOG}. Mend the cause (network? disk space?) and run the same command again.")


def reusable(version):
    "Is .venv of this Python version and made in this very folder (a moved one holds wrong paths)?"
    try: here = str(VENV.absolute()) in (VENV/"bin/pip").read_text().splitlines()[0]
    except (OSError, IndexError): return False
    return here and f"version = {version}" in (VENV/"pyvenv.cfg").read_text()


def main():
    version = "{}.{}.{}".format(*sys.version_info[:3])
    (VENV/"set-up.stamp").unlink(missing_ok=True)
    again = reusable(version)
    say(f"step 1 of 3: virtual environment .venv with Python {version}" + (", there already" if again else ""))
    if not again: subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    expected = sum(not line.startswith("#") for line in Path("constraints.txt").read_text().splitlines())
    say("step 2 of 3: pinned packages, about 0.8 GB; on Linux 2 GB more in step 3, for CUDA; minutes, and only this once")
    pip("--no-deps", "-r", "constraints.txt", expected=expected) # all of them by name: nothing to resolve, so no wrong turns
    say("step 3 of 3: the kit itself, and what only this platform needs")
    pip("-c", "constraints.txt", "--no-build-isolation", "-e", ".[dev]", expected=0)
    subprocess.run([VENV/"bin/python", "-c", "import torch, diffusers, transformers, instructvideo_kit"], check=True)
    say("ready")


if __name__ == "__main__": main()
