"""`make lint`, and the stages lint and types of `make test`: what ruff and mypy find, against what is still allowed.

tools/allowed.json says how many findings of a rule a folder may still have. A number may fall and never grow;
the aim is an empty file.

python tools/lint.py [lint] [types]   say what is over the numbers, and exit 1 if anything is
python tools/lint.py --counts         all numbers as they are now
python tools/lint.py --accept         write them down: after they fell, or where two branches met
"""
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = ROOT/"tools/allowed.json"
LINTED = ("nbs", "tests", "tools", "benchmarks", "setup.py")
TYPED = ("diffusion", "policy", "reward", "tuning")
ERROR = re.compile(r"^(?P<path>[^:\n]+):\d+(?::\d+)?: error: .*?(?:  \[(?P<rule>[\w-]+)\])?$", re.M)
SHOWN = 40 # findings of a folder and rule that are printed


def run(*command):
    "A checker's output; the checker itself failing (not installed, bad settings) ends the program."
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        said = (done.stderr or done.stdout).strip()
        sys.exit(f"lint: {command[0]} did not run: {said}\nrun make setup; it installs {command[0]}")
    return done.stdout


def folder_of(path):
    "The folder whose numbers a file counts for: nbs/policy for its notebooks, tests for all of them."
    parts = Path(path).parts
    return "/".join(parts[:2]) if parts[0] in ("nbs", "instructvideo_kit") and len(parts) > 2 else parts[0]


def lint():
    "What ruff finds: [(folder, rule, text), ...]."
    found = []
    for item in json.loads(run("ruff", "check", "--output-format", "json", *LINTED)):
        path = Path(item["filename"]).relative_to(ROOT).as_posix()
        cell = f" cell {item['cell']}," if item.get("cell") else ""
        rule = item["code"] or "syntax"
        found.append((folder_of(path), rule, f"{path}:{cell} line {item['location']['row']}: {rule} {item['message']}"))
    return found


def types():
    "What mypy finds: [(folder, rule, text), ...]."
    said = run("mypy", *(f"instructvideo_kit/{name}" for name in TYPED))
    return [(folder_of(m["path"]), m["rule"] or "error", m[0]) for m in ERROR.finditer(said)]


CHECKS = {"lint": lint, "types": types}


def counted(found):
    "{folder: {rule: number}}, sorted, so that two files can be compared."
    numbers = Counter((folder, rule) for folder, rule, _ in found)
    table = {}
    for (folder, rule), n in sorted(numbers.items()):
        table.setdefault(folder, {})[rule] = n
    return table


def allowed():
    "{check: {folder: {rule: number}}} of tools/allowed.json."
    return json.loads(ALLOWED.read_text(encoding="utf-8")) if ALLOWED.exists() else {}


def over(found, table):
    "Where there are more findings than the table allows: [(folder, rule, allowed, texts), ...]."
    groups = {}
    for folder, rule, text in found:
        groups.setdefault((folder, rule), []).append(text)
    limits = {key: table.get(key[0], {}).get(key[1], 0) for key in groups}
    return [(*key, limits[key], groups[key]) for key in sorted(groups) if len(groups[key]) > limits[key]]


def slack(found, table):
    "How many findings fewer there are than the table allows."
    numbers = Counter((folder, rule) for folder, rule, _ in found)
    return sum(max(0, n - numbers[folder, rule]) for folder, rules in table.items() for rule, n in rules.items())


def check(name):
    "Run one check, print what is over the allowed numbers; True when nothing is."
    found, table = CHECKS[name](), allowed().get(name, {})
    grown = over(found, table)
    for folder, rule, limit, texts in grown:
        print(f"  {folder}: {len(texts)} of {rule}, {limit} allowed")
        for text in texts[:SHOWN]: print(f"    {text}")
        if len(texts) > SHOWN: print(f"    and {len(texts) - SHOWN} more")
    if not grown: print(f"  {name}: nothing new; {len(found)} old findings in tools/allowed.json")
    if fewer := slack(found, table):
        print(f"  {fewer} fewer than allowed: python tools/lint.py --accept lowers the numbers")
    return not grown


def print_counts():
    "Every number, a line per folder."
    for name, find in CHECKS.items():
        for folder, rules in counted(find()).items():
            print(f"{name:6} {folder:28} " + ", ".join(f"{rule} {n}" for rule, n in rules.items()))


def accept():
    "Write the present numbers down."
    table = {name: counted(find()) for name, find in CHECKS.items()}
    ALLOWED.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"lint: {ALLOWED.relative_to(ROOT)} written")


def main(arguments):
    if "--counts" in arguments: return print_counts()
    if "--accept" in arguments: return accept()
    unknown = [a for a in arguments if a not in CHECKS]
    if unknown: sys.exit(f'no check "{unknown[0]}"; there is {", ".join(CHECKS)}')
    failed = [name for name in arguments or CHECKS if not check(name)]
    if failed: sys.exit(f"lint: more findings than allowed in {', '.join(failed)}; CONTRIBUTING.md says what to do")


if __name__ == "__main__": main(sys.argv[1:])
