"""`make test`: lint, types, clean-diff, export-diff, editions, notebooks, student, solved, pytest.
`make check` (--fast): lint, clean-diff, export-diff, editions, two-notebooks, fast-tests; at most three minutes.

Two processor cores are enough; sockets are blocked from the notebooks on.
What took longest stands in the report at the end. Coverage is printed from Python 3.12 on, where measuring it costs
little; COVERAGE=1 prints it on older ones (pytest takes half as long again), COVERAGE=0 never.
"""
import difflib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clean import notebooks

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
DOCS = "CONTRIBUTING.md says how"
FAST_SECONDS = 180 # what make check may take
TWO_NOTEBOOKS = ("diffusion.schedule", "reward.segvr") # by the module they export: numbers may change
LONGEST = 20 # tests and notebooks in the report
SPENT = {} # test or notebook -> seconds, for the report


def environment(threads):
    "Workers x threads = 2, no network."
    offline = dict(PYTHONPATH=str(ROOT/"tools/offline"), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **offline, "OMP_NUM_THREADS": str(threads), "PATH": path}


def tool(name, *arguments):
    "Run a program of tools/; True when it was content."
    return subprocess.run([sys.executable, ROOT/"tools"/name, *arguments], cwd=ROOT).returncode == 0


def copy_of_sources(folder):
    "The notebooks, the settings and the modules, without weights."
    left_out = shutil.ignore_patterns("weights", "__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "tutorials", "instructvideo_kit"):
        if (ROOT/name).exists(): shutil.copytree(ROOT/name, folder/name, ignore=left_out)
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT/name, folder/name)


def first_lines(old, new, n=12):
    "The beginning of the difference between two files, either of which may be missing."
    def read(path): return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    difference = difflib.unified_diff(read(old), read(new), "as it is", "as it should be", lineterm="", n=1)
    return "\n".join(line[:160] for line in list(difference)[:n])


def differs(folder, path):
    "Does this file (relative path) read otherwise here than in `folder`, or is it missing in one of them?"
    here, there = ROOT/path, folder/path
    return not (here.exists() and there.exists()) or here.read_bytes() != there.read_bytes()


def same(folder, paths):
    "Do these files read the same here and in `folder`? Names and shows those that do not."
    different = [p for p in paths if differs(folder, p)]
    for p in different:
        what = "differs"
        if not (ROOT/p).exists(): what = "is missing"
        elif not (folder/p).exists(): what = "comes from no notebook"
        print(f"  {p} {what}\n{first_lines(ROOT/p, folder/p)}".rstrip())
    return not different


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
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                          **options) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    return process.returncode, "".join(said)


def run_notebooks(where):
    "nbdev_test on a folder, two workers with one thread each; then each notebook's time beside what its card says."
    if not any(p.is_relative_to(ROOT/where) for p in notebooks(ROOT)):
        print(f"  skipped: {where}/ holds no notebook")
        return True
    command = [BIN/"nbdev_test", "--path", where, "--n_workers", "2", "--do_print", "--timing"]
    status, said = spoken(command, cwd=ROOT, env=environment(threads=1))
    seconds = seconds_of(said)
    SPENT.update({f"{where}: {name}": s for name, s in seconds.items()})
    minutes = {p.name: minutes_to_run(p) for p in notebooks(ROOT) if p.parent == ROOT/where}
    for line in beside_cards(seconds, minutes): print(line)
    return status == 0


def exporting(modules):
    "The notebooks under nbs/ that export these modules."
    def first(path): return re.search(r"#\|\s*default_exp\s+([\w.]+)", path.read_text(encoding="utf-8"))
    found = {m[1]: path for path in notebooks(ROOT) if path.is_relative_to(ROOT/"nbs") and (m := first(path))}
    return [found[name] for name in modules]


def two_notebooks():
    "Two quick ones, one after the other: enough to see that notebooks run at all."
    ok = True
    for path in exporting(TWO_NOTEBOOKS):
        started = time.time()
        command = [BIN/"nbdev_test", "--path", path, "--do_print"]
        ok &= subprocess.run(command, cwd=ROOT, env=environment(threads=2)).returncode == 0
        SPENT[str(path.relative_to(ROOT))] = time.time() - started
    return ok


def seconds_of(said):
    "{notebook: seconds} from what nbdev_test --timing printed."
    return {name: int(s) for name, s in re.findall(r"^(\S+\.ipynb): (\d+) secs", said, re.M)}


def minutes_to_run(path):
    "What the card of a tutorial promises; None where there is no card."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = "".join("".join(c["source"]) for c in cells[:2])
    found = re.search(r"\| minutes \| [\d.]+ to read, ([\d.]+) to run", first)
    return float(found[1]) if found else None


def beside_cards(seconds, minutes):
    """Lines of a table. Machines differ and runs scatter, so this warns and never fails: the median over all tutorials
    says how fast this machine is against the one the cards were written on, and a notebook is named when it is more
    than 50 % off what that leads one to expect."""
    known = {name: seconds[name]/(60*m) for name, m in minutes.items() if m and name in seconds}
    if not known: return []
    pace = statistics.median(known.values())
    def odd(name):
        expected = 60*minutes[name]*pace
        off = abs(seconds[name] - expected) > max(.5*expected, 5) # which worker imports torch first is luck
        return "   WARNING: more than 50 % off, correct the card" if off and len(known) > 2 else ""
    lines = [f"  {name:45} {seconds[name]:4} s, its card says {60*minutes[name]:3.0f} s{odd(name)}" for name in known]
    far = " (more than 50 % off)" if abs(pace - 1) > .5 else ""
    return [*lines, f"  median: this machine takes {pace:.2f} times the cards' time{far}"]


def durations_of(said):
    "{test: seconds} from pytest's list of durations; set-up, call and tear-down of a test added up."
    found = {}
    for seconds, name in re.findall(r"^\s*([\d.]+)s (?:setup|call|teardown)\s+(\S+::.*?)\s*$", said, re.M):
        found[name] = found.get(name, 0) + float(seconds)
    return found


def run_pytest(*options):
    "Two workers with one thread each; the tests of one file stay together, as they share what is dear to make."
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--durations=60", "--durations-min=.5"]
    status, said = spoken([*command, *options], cwd=ROOT, env=environment(threads=1))
    SPENT.update(durations_of(said))
    return status == 0


def measures_coverage():
    "Is coverage measured? From Python 3.12 on the interpreter itself counts lines (sys.monitoring)."
    return os.environ.get("COVERAGE", str(int(sys.version_info >= (3, 12)))) != "0"


def all_tests():
    "pytest, with coverage; the modules that are covered from end to end are left out of its table."
    if sys.version_info >= (3, 12): os.environ.setdefault("COVERAGE_CORE", "sysmon")
    return run_pytest(*(("--cov", "--cov-report", "term") if measures_coverage() else ()))


def longest(spent, n=LONGEST):
    "Lines: the tests and notebooks that took longest, longest first."
    first = sorted(spent.items(), key=lambda item: -item[1])[:n]
    return [f"  {seconds:6.1f} s  {name}" for name, seconds in first]


STAGES = {
    "lint": lambda: tool("lint.py", "lint"), "types": lambda: tool("lint.py", "types"),
    "clean-diff": clean_diff, "export-diff": export_diff, "editions": lambda: tool("editions.py", "--check"),
    "notebooks": lambda: run_notebooks("nbs"), "student": lambda: run_notebooks("tutorials/student"),
    "solved": lambda: run_notebooks("tutorials/solved"), "pytest": all_tests,
    "two-notebooks": two_notebooks, "fast-tests": lambda: run_pytest("-m", "not slow and not browser and not gpu")}
FULL = ("lint", "types", "clean-diff", "export-diff", "editions", "notebooks", "student", "solved", "pytest")
FAST = ("lint", "clean-diff", "export-diff", "editions", "two-notebooks", "fast-tests")


def report(times, total, fast):
    "What took longest, first; then the stages, and whether the fast tier kept its time."
    lines = ["", "== what took longest", *longest(SPENT)] if SPENT else [""]
    lines += ["== stages", *(f"  {line}" for line in times), f"  {total:.0f} s in all"]
    if fast and total > FAST_SECONDS:
        lines.append(f"  over {FAST_SECONDS} s: a second job? Else mark what is slow (TIERS in tests/conftest.py)")
    return "\n".join(lines)


def run_stages(chosen):
    "(names of those that failed, a line with the time of each)."
    failed, times = [], []
    for name in chosen:
        print(f"\n== {name}", flush=True)
        started = time.time()
        if not STAGES[name](): failed.append(name)
        times.append(f"{name} {time.time() - started:.0f} s{' FAILED' if name in failed else ''}")
        print(f"-- {times[-1]}", flush=True)
    return failed, times


def main(arguments):
    fast = "--fast" in arguments
    chosen = [a for a in arguments if a != "--fast"]
    unknown = [s for s in chosen if s not in STAGES]
    if unknown: sys.exit(f'no stage "{unknown[0]}"; there is {", ".join(STAGES)}')
    started = time.time()
    failed, times = run_stages(chosen or (FAST if fast else FULL))
    print(report(times, time.time() - started, fast and not chosen), flush=True)
    if failed: sys.exit(f"{'make check' if fast else 'make test'}: failed in {', '.join(failed)}")


if __name__ == "__main__": main(sys.argv[1:])
