"The rules of the house: who imports whom, what is heavy, notebooks and modules in step, pins in step, no network."
import ast
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/"instructvideo_kit"
# menagerie trains a policy and a reward, so it stands on both
LEVEL = dict(files=0, machine=0, video=1, tutorials=1, diffusion=1, policy=2, reward=2, doctor=2, menagerie=3, tuning=3,
             interactive=3, feedback=4, measure=5, widgets=5, check=5, app=6, demo=7, cli=8)
MENAGERIE_FOLK = {"menagerie", "measure", "widgets", "app", "demo", "cli"}
NO_MODULE = {"__init__.py", "_modidx.py"}

def modules(): return [p for p in sorted(PACKAGE.rglob("*.py")) if "weights" not in p.parts and p.name != "_modidx.py"]
def room(path): return path.relative_to(PACKAGE).with_suffix("").parts[0] # its folder, or its own name at the top
def notebooks():
    found = [p for d in ("nbs", "tutorials") for p in sorted((ROOT/d).rglob("*.ipynb"))]
    return [p for p in found if ".ipynb_checkpoints" not in p.parts]

def imported(source, package):
    "Absolute dotted names of what `source`, a module of `package` (a tuple of names), imports, in functions too."
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names |= {stem, *(f"{stem}.{a.name}" for a in node.names)}
    return names

def rooms_imported(path):
    "The parts of the house that a module imports from."
    package = ("instructvideo_kit", *path.relative_to(PACKAGE).parent.parts)
    parts = [n.split(".") for n in imported(path.read_text(encoding="utf-8"), package)]
    return {p[1] for p in parts if p[0] == "instructvideo_kit" and len(p) > 1 and p[1] in LEVEL}

def upward(graph):
    "Imports that break the house: towards an equal or higher room, or of menagerie by somebody who may not."
    return sorted((a, b) for a, targets in graph.items() for b in targets - {a}
                  if LEVEL[b] >= LEVEL[a] or (b == "menagerie" and a not in MENAGERIE_FOLK))

def graph():
    "room -> rooms it imports."
    found = {}
    for path in modules():
        if path != PACKAGE/"__init__.py": found.setdefault(room(path), set()).update(rooms_imported(path))
    return found

def test_every_room_has_a_level():
    assert set(graph()) <= set(LEVEL), "a new folder or module: give it a level in this test"

def test_imports_run_downward(): assert upward(graph()) == []

def test_upward_notices():
    assert upward({"tuning": {"menagerie"}}) == [("tuning", "menagerie")]
    assert upward({"diffusion": {"policy"}, "demo": {"menagerie"}}) == [("diffusion", "policy")]
    inside = "def f():\n    from ..policy.base import VideoPolicy"
    assert imported(inside, ("instructvideo_kit", "reward")) >= {"instructvideo_kit.policy.base"}
    assert imported("from . import tar", ("instructvideo_kit", "reward")) >= {"instructvideo_kit.reward.tar"}

def test_no_circles_between_modules():
    def dotted(path): return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    known = {dotted(p): p for p in modules()}
    edges = {}
    for name, p in known.items():
        names = imported(p.read_text(encoding="utf-8"), dotted(p.parent/"__init__").split("."))
        edges[name] = {n for n in names if n in known and n != name}
    while free := {n for n, targets in edges.items() if not targets & edges.keys()}:
        edges = {n: t for n, t in edges.items() if n not in free}
    assert not edges, f"circle among {sorted(edges)}"

def test_import_is_light():
    "The package and its command line start without the heavy libraries, which is what keeps them under half a second."
    heavy = ("torch", "diffusers", "transformers", "peft", "accelerate", "matplotlib", "av")
    names = ["instructvideo_kit", "instructvideo_kit.files"] + ["instructvideo_kit.cli"] * (PACKAGE/"cli.py").exists()
    code = f"import sys, {', '.join(names)}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

def test_package_data_under_60_mb():
    size = sum(p.stat().st_size for d in ("weights", "presets") for p in (PACKAGE/d).rglob("*") if p.is_file())
    assert size < 60e6, f"{size / 1e6:.1f} MB"

@pytest.mark.parametrize("path", notebooks(), ids=lambda p: str(p.relative_to(ROOT)))
def test_notebook_is_tidy(path):
    assert path.stat().st_size < 2.5e6
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in nb["metadata"]
    ids = [c["id"] for c in nb["cells"]]
    assert len(ids) == len(set(ids))
    assert nb["cells"][0]["cell_type"] == "markdown" and nb["cells"][0]["source"][0].startswith("# ")
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"], "committed with an error in it"

def exports():
    "module path -> notebook, from the default_exp lines."
    found = {}
    for nb in notebooks():
        for cell in json.loads(nb.read_text(encoding="utf-8"))["cells"]:
            if match := re.match(r"#\|\s*default_exp\s+(\S+)", "".join(cell["source"])):
                found[PACKAGE/(match[1].replace(".", "/") + ".py")] = nb
    return found

def generated(): return [p for p in modules() if p.name not in NO_MODULE]

@pytest.mark.parametrize("path", generated(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_has_its_notebook(path):
    assert path in exports(), "no notebook says default_exp for this module"
    text = path.read_text(encoding="utf-8")
    written_from = re.search(r"AUTOGENERATED! DO NOT EDIT! File to edit: (\S+?)\.?$", text, flags=re.M)
    assert written_from and (path.parent/written_from[1]).resolve() == exports()[path].resolve()

def test_notebook_has_its_module(): assert [p for p in exports() if not p.exists()] == []

WIDTH = 120
ALLOWED_LONG_LINES = 28 # of generated modules; lower it with every notebook that gets shorter lines, it must go to 0

def long_lines(text):
    "Lines over WIDTH, without the imports and the __all__ that nbdev writes in one line each."
    written_by_nbdev = ("from ", "import ", "__all__")
    return [line for line in text.splitlines() if len(line) > WIDTH and not line.startswith(written_by_nbdev)]

def test_long_lines_become_fewer():
    counts = {p.relative_to(PACKAGE).as_posix(): len(long_lines(p.read_text(encoding="utf-8"))) for p in generated()}
    worst = sorted(counts, key=counts.get, reverse=True)[:5]
    assert sum(counts.values()) <= ALLOWED_LONG_LINES, f"most are in {', '.join(worst)}"

def test_a_long_line_is_seen():
    assert long_lines("x = 1\n" + "y"*WIDTH) == [] and long_lines("y"*(WIDTH + 1)) == ["y"*(WIDTH + 1)]
    assert long_lines(f"from a import {'b, '*50}c") == []

PIN = re.compile(r"\s*-?\s*([\w.-]+)==([\w.]+)")

def pins(lines):
    "package -> version of lines `name==version`, without those for old Pythons."
    found = [PIN.match(line) for line in lines if ' < "3.' not in line]
    return {m[1].lower().replace("_", "-"): m[2] for m in found if m}

def test_conda_pins_are_those_of_pip():
    pip, conda = (pins((ROOT/f).read_text().splitlines()) for f in ("constraints.txt", "environment.yml"))
    assert len(conda) > 100 and conda["torch"] == "2.13.0"
    differ = {n: v for n, v in conda.items() if n in pip and v != pip[n]}
    assert differ == {"pytest": conda["pytest"]} # hpsv2 asks for an old one

def test_every_requirement_is_pinned():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") for r in wanted}
    assert names - pins((ROOT/"constraints.txt").read_text().splitlines()).keys() == set()

def test_network_is_closed_and_loopback_open():
    stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
    ways = [
        (stream, lambda s, a: s.connect(a)), (stream, lambda s, a: s.connect_ex(a)),
        (datagram, lambda s, a: s.sendto(b"", a))]
    for kind, reach in ways:
        with socket.socket(socket.AF_INET, kind) as s, pytest.raises(OSError, match="without a network"):
            s.settimeout(1)
            reach(s, ("192.0.2.1", 80))
    with pytest.raises(OSError, match="without a network"): socket.getaddrinfo("example.invalid", 80)
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=1): pass

def test_network_is_closed_in_child_processes():
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    assert "without a network" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


def exported(path):
    "(module that a notebook of nbs/ exports, text of its exported cells)."
    nb = json.loads(path.read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
    name = next((m[1] for c in cells if (m := re.search(r"^#\| *default_exp +(\S+)", c, re.M))), None)
    return name, [c for c in cells if re.search(r"^#\| *export", c, re.M)]


def test_notebooks_are_numbered_in_import_order():
    "A reader who opens a folder's notebooks in order meets nothing that comes later."
    found = {p: exported(p) for p in sorted((ROOT/"nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts}
    by_module = {name: path for path, (name, _) in found.items()}
    forward = []
    for path, (_, cells) in found.items():
        for module in re.findall(r"from instructvideo_kit\.([\w.]+) import", "\n".join(cells)):
            target = by_module.get(module)
            same_folder = target and target.parent == path.parent
            if same_folder and target.name > path.name: forward.append((path.name, target.name))
    assert len(by_module) > 80 and forward == []


def test_functions_are_short():
    "At most 30 lines below the signature; each exception has its reason here."
    excused = {"feedback_app"} # the commands of one sub-command, registered together
    long = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef): continue
            if node.end_lineno - node.body[0].lineno + 1 > 30: long.append(node.name)
    assert set(long) <= excused
