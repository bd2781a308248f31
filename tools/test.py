"`make test`: clean-diff, export-diff, editions, notebooks, student, solved, pytest. Two processor cores are enough; sockets are blocked from the notebooks on."
import difflib, json, os, re, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path
from clean import notebooks

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
DOCS = "CONTRIBUTING.md says how"


def environment(threads):
    "Workers x threads = 2, no network."
    offline = dict(PYTHONPATH=str(ROOT/"tools/offline"), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    return {**os.environ, **offline, "OMP_NUM_THREADS": str(threads), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def copy_of_sources(folder):
    "The notebooks, the settings and the modules, without weights."
    for name in ("nbs", "tutorials", "instructvideo_kit"):
        if (ROOT/name).exists(): shutil.copytree(ROOT/name, folder/name, ignore=shutil.ignore_patterns("weights", "__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT/name, folder/name)


def first_lines(old, new, n=12):
    "The beginning of the difference between two files, either of which may be missing."
    read = lambda p: p.read_text(encoding="utf-8").splitlines() if p.exists() else []
    return "\n".join(l[:160] for l in list(difflib.unified_diff(read(old), read(new), "as it is", "as it should be", lineterm="", n=1))[:n])


def same(folder, paths):
    "Do these files (relative paths) read the same here and in `folder`? Names and shows those that do not."
    differ = [p for p in paths if not (ROOT/p).exists() or not (folder/p).exists() or (ROOT/p).read_bytes() != (folder/p).read_bytes()]
    for p in differ:
        what = "is missing" if not (ROOT/p).exists() else "comes from no notebook" if not (folder/p).exists() else "differs"
        print(f"  {p} {what}\n{first_lines(ROOT/p, folder/p)}".rstrip())
    return not differ


def clean_diff():
    "Cleaning changes nothing."
    with tempfile.TemporaryDirectory() as tmp:
        copy_of_sources(folder := Path(tmp))
        if subprocess.run([sys.executable, ROOT/"tools/clean.py", folder], cwd=folder).returncode: return False
        ok = same(folder, [p.relative_to(ROOT) for p in notebooks(ROOT)])
    print("  notebooks are clean" if ok else f"  run `make clean-notebooks` and commit; {DOCS}")
    return ok


def export_diff():
    "Exporting changes no module (the index _modidx.py aside, which depends on the order of things)."
    with tempfile.TemporaryDirectory() as tmp:
        copy_of_sources(folder := Path(tmp))
        if subprocess.run([BIN/"nbdev_export"], cwd=folder).returncode: return False
        modules = {p.relative_to(r) for r in (ROOT, folder) for p in (r/"instructvideo_kit").rglob("*.py")}
        ok = same(folder, sorted(p for p in modules if p.name != "_modidx.py" and "weights" not in p.parts))
    print("  modules are what the notebooks say" if ok else f"  run `make export` and commit; {DOCS}")
    return ok


def spoken(command, **options):
    "Run a command, pass its output on, and return (exit status, output)."
    process, said = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **options), []
    for line in process.stdout: print(line, end="", flush=True); said.append(line)
    return process.wait(), "".join(said)


def run_notebooks(where):
    "nbdev_test on one folder, two workers with one thread each; then the time of each notebook beside what its card says."
    if not any(p.is_relative_to(ROOT/where) for p in notebooks(ROOT)):
        print(f"  skipped: {where}/ holds no notebook"); return True
    command = [BIN/"nbdev_test", "--path", where, "--n_workers", "2", "--do_print", "--timing"]
    status, said = spoken(command, cwd=ROOT, env=environment(threads=1))
    for line in beside_cards(seconds_of(said), {p.name: minutes_to_run(p) for p in notebooks(ROOT) if p.parent == ROOT/where}): print(line)
    return status == 0


def seconds_of(said):
    "{notebook: seconds} from what nbdev_test --timing printed."
    return {name: int(s) for name, s in re.findall(r"^(\S+\.ipynb): (\d+) secs", said, re.M)}


def minutes_to_run(path):
    "What the card of a tutorial promises; None where there is no card."
    first = "".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"][:2])
    found = re.search(r"\| minutes \| [\d.]+ to read, ([\d.]+) to run", first)
    return float(found[1]) if found else None


def beside_cards(seconds, minutes):
    """Lines of a table. Machines differ and runs scatter, so this warns and never fails: the median over all tutorials says how fast this machine is
    against the one the cards were written on, and a notebook is named when it is more than 50 % off what that leads one to expect."""
    known = {name: seconds[name]/(60*m) for name, m in minutes.items() if m and name in seconds}
    if not known: return []
    pace = statistics.median(known.values())
    def odd(name):
        expected = 60*minutes[name]*pace
        off = abs(seconds[name] - expected) > max(.5*expected, 5) # which worker imported torch first is a matter of seconds, and luck
        return "   WARNING: more than 50 % off, correct the card" if off and len(known) > 2 else ""
    lines = [f"  {name:45} {seconds[name]:4} s, its card says {60*minutes[name]:3.0f} s{odd(name)}" for name in known]
    return [*lines, f"  median: this machine takes {pace:.2f} times the cards' time" + (" (more than 50 % off)" if abs(pace - 1) > .5 else "")]


def editions():
    "Student and solved editions are what the masters say."
    return subprocess.run([sys.executable, ROOT/"tools/editions.py", "--check"], cwd=ROOT).returncode == 0


def run_pytest():
    "Two workers with one thread each; the tests of one file stay together, as they share what is dear to make."
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--durations", "5"]
    return subprocess.run(command, cwd=ROOT, env=environment(threads=1)).returncode == 0


STAGES = {"clean-diff": clean_diff, "export-diff": export_diff, "editions": editions, "notebooks": lambda: run_notebooks("nbs"),
          "student": lambda: run_notebooks("tutorials/student"), "solved": lambda: run_notebooks("tutorials/solved"), "pytest": run_pytest}


def main(chosen):
    unknown = [s for s in chosen if s not in STAGES]
    if unknown: sys.exit(f'no stage "{unknown[0]}"; there is {", ".join(STAGES)}')
    failed, times = [], []
    for name in chosen or STAGES:
        if name == "pytest" and times: print("\nso far: " + ", ".join(times), flush=True)
        print(f"\n== {name}", flush=True)
        started = time.time()
        if not STAGES[name](): failed.append(name)
        times.append(f"{name} {time.time() - started:.0f} s{' FAILED' if name in failed else ''}")
        if name != "pytest": print(f"-- {times[-1]}", flush=True)
    if failed: sys.exit(f"make test: failed in {', '.join(failed)}")


if __name__ == "__main__": main(sys.argv[1:])
