"Setting up, linting, tiers, packaging, and the pages that say how: tools/, CONTRIBUTING, the forge's files."
import ast
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/"instructvideo_kit"
sys.path.insert(0, str(ROOT/"tools")) # test.py imports clean.py beside it


def tool(name):
    spec = importlib.util.spec_from_file_location(f"kit_{name}", ROOT/"tools"/f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install, lint, runner = tool("install"), tool("lint"), tool("test")


def tracked():
    "Paths that git knows of, or would with the next commit; skips outside a repository."
    found = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode: pytest.skip("this copy is no git repository")
    return [line for line in found.stdout.splitlines() if (ROOT/line).is_file()]


def text_of(name): return (ROOT/name).read_text(encoding="utf-8")


# ---- the set-up

def progress(*lines, expected=4):
    seen = install.Progress(expected)
    for line in lines: seen.read(line)
    return seen


def test_progress_reads_pip():
    fetch = "  Downloading torch-2.13.0-cp311.whl (184.2 MB)"
    seen = progress("Ignoring av: markers", "Collecting torch==2.13.0", fetch)
    assert "package 1 of 3, 184 MB, now: downloading torch, 184.2 MB" in seen.text() and 0 < seen.share() < 2/3
    seen.read("Installing collected packages: a, b, c")
    assert seen.to_write == 3 and seen.text().startswith("[################") and "unpacking" in seen.text()


def test_progress_reads_uv():
    assert "uv fetches 169 packages" in progress("Resolved 169 packages in 5.31s").text()
    seen = progress("Downloading torch (175.5MiB)", "Prepared 12 packages in 3.1s")
    assert (round(seen.mb), seen.to_write) == (176, 12)


def test_progress_grows_and_ends_at_one(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "VENV", tmp_path)
    seen, shares = progress(), []
    for name in "abcd":
        seen.read(f"Collecting {name}")
        shares.append(seen.share())
    seen.read("Installing collected packages: a, b")
    for name in "ab":
        (tmp_path/f"lib/python3.11/site-packages/{name}.dist-info").mkdir(parents=True)
        shares.append(seen.share())
    assert shares == sorted(shares) and shares[-1] == 1


def test_uv_is_told_what_pip_would_do():
    said = "global.find-links='/opt/wheels'\n:env:.extra-index-url='https://a https://b'\nglobal.cert='/etc/x'\n"
    assert install.settings_of_pip(said) == [
        "--find-links", "/opt/wheels", "--extra-index-url", "https://a", "--extra-index-url", "https://b"]


@pytest.mark.parametrize("value,found", [("0", False), ("", False), ("no-such-uv", False), (sys.executable, True)])
def test_uv_is_chosen(monkeypatch, value, found):
    monkeypatch.setenv("UV", value)
    assert bool(install.uv_program()) == found


@pytest.fixture
def index():
    "An index of wheels on this machine, with one CPU build; its address."
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/whl/torch/" else 404)
            self.end_headers()
            if self.path != "/whl/torch/": return
            self.wfile.write(b'<a href="torch-2.13.0%2Bcpu-cp311-cp311-linux.whl">x</a>')
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/whl"
    server.shutdown()


def test_the_cpu_build_is_found_in_an_index(monkeypatch, index):
    monkeypatch.setattr(install, "TORCH_INDEX", index)
    assert install.why_not_cpu("torch==2.13.0") is None
    assert "has no torch==2.13.1 for the CPU" in install.why_not_cpu("torch==2.13.1")
    assert "has no torch==2.1 for" in install.why_not_cpu("torch==2.1") # not the beginning of 2.13.0


def test_an_index_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setattr(install, "TORCH_INDEX", "http://127.0.0.1:9/whl")
    monkeypatch.setattr(install, "wants_cpu_build", lambda: True)
    monkeypatch.chdir(ROOT)
    install.cpu_torch(lambda *args: pytest.fail("nothing may be fetched from there"))
    said = capsys.readouterr().out
    assert "could not be reached within 5 s" in said and "package registry instead" in said and "TORCH_INDEX" in said


def test_an_index_that_is_silent_costs_the_patience_only(monkeypatch):
    import socket
    import time
    monkeypatch.setattr(install, "PATIENCE", .3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.time()
        assert install.page_of(f"http://127.0.0.1:{server.getsockname()[1]}/") is None
    assert time.time() - started < 5


def test_the_cpu_build_is_fetched_alone(monkeypatch, capsys, index):
    monkeypatch.setattr(install, "TORCH_INDEX", index)
    monkeypatch.setattr(install, "wants_cpu_build", lambda: True)
    monkeypatch.setattr(install, "pinned", lambda name: "torch==2.13.0")
    asked = []
    install.cpu_torch(lambda *args: asked.append(args) or 0)
    assert asked == [("--no-deps", "--index-url", index, "torch==2.13.0")] and "CPU build" in capsys.readouterr().out
    install.cpu_torch(lambda *args: 1)
    assert "could not be fetched" in capsys.readouterr().out


@pytest.mark.parametrize("system,card,address,offline,wanted", [
    ("linux", False, "https://x", "", True), ("linux", True, "https://x", "", False),
    ("darwin", False, "https://x", "", False),
    ("linux", False, "", "", False), ("linux", False, "https://x", "wheels", False)])
def test_who_gets_the_cpu_build(monkeypatch, system, card, address, offline, wanted):
    monkeypatch.setattr(install.sys, "platform", system)
    monkeypatch.setattr(install, "has_nvidia", lambda: card)
    monkeypatch.setattr(install, "TORCH_INDEX", address)
    monkeypatch.setattr(install, "OFFLINE", offline)
    assert install.wants_cpu_build() == wanted


def test_a_folder_without_wheels_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "OFFLINE", str(tmp_path))
    with pytest.raises(SystemExit, match="holds no wheels; where there is a network, make wheels"):
        install.check_folder()
    (tmp_path/"a-1-py3-none-any.whl").touch()
    install.check_folder()
    (tmp_path/install.MADE_WITH).write_text("Python 3.9, plan9, pdp11\n")
    with pytest.raises(SystemExit, match="filled for Python 3.9, plan9, pdp11, this is Python 3"):
        install.check_folder()


def test_offline_asks_no_index(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "OFFLINE", str(tmp_path))
    monkeypatch.setattr(install, "uv_program", lambda: None)
    monkeypatch.setenv("PIP_INDEX_URL", "https://somewhere")
    ran = []
    def follow(command, expected, env=None):
        ran.append((command, env))
        return 0, []
    monkeypatch.setattr(install, "follow", follow)
    install.install("-r", "constraints.txt")
    (command, env), = ran
    assert "--no-index" in command and command[command.index("--find-links") + 1] == str(tmp_path)
    assert "PIP_INDEX_URL" not in env and env["PIP_CONFIG_FILE"] == os.devnull


def test_uv_that_fails_leaves_it_to_pip(monkeypatch, capsys):
    monkeypatch.setattr(install, "uv_program", lambda: "/bin/uv")
    monkeypatch.setattr(install, "OFFLINE", "")
    monkeypatch.setattr(install, "uv_command", lambda uv: [uv, "pip", "install"])
    ran = []
    def follow(command, expected, env=None):
        ran.append(command[0])
        return int(command[0] == "/bin/uv"), []
    monkeypatch.setattr(install, "follow", follow)
    install.install("x")
    assert ran == ["/bin/uv", install.PYTHON] and "pip tries the same" in capsys.readouterr().out


def test_a_python_that_does_not_fit_is_named(tmp_path):
    (tmp_path/"tools").mkdir()
    for name in ("constraints.txt", "pyproject.toml", "tools/install.py", "tools/setup"):
        (tmp_path/name).write_text(text_of(name))
    old = tmp_path/"python2"
    old.write_text("#!/bin/sh\necho 2.7.18 version")
    old.chmod(0o755)
    env = {**os.environ, "PYTHON": str(old)}
    done = subprocess.run(["sh", "tools/setup"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "Python 3.10 to 3.13 is needed, found" in done.stderr and "2.7.18" in done.stderr


# ---- lint, and the report of make test

FOUND = [("nbs", "E501", "a"), ("nbs", "E501", "b"), ("tests", "F401", "c")]


def test_findings_may_become_fewer_and_never_more():
    table = lint.counted(FOUND)
    assert table == {"nbs": {"E501": 2}, "tests": {"F401": 1}} and lint.over(FOUND, table) == []
    assert lint.over([*FOUND, ("nbs", "E501", "d")], table) == [("nbs", "E501", 2, ["a", "b", "d"])]
    assert lint.over(FOUND, {}) == [("nbs", "E501", 0, ["a", "b"]), ("tests", "F401", 0, ["c"])]
    assert lint.slack(FOUND[1:], table) == 1


def test_a_check_that_grew_fails(monkeypatch, capsys):
    monkeypatch.setitem(lint.CHECKS, "lint", lambda: [*FOUND, ("tools", "E501", "x.py: line 1: E501 long")])
    monkeypatch.setattr(lint, "allowed", lambda: {"lint": lint.counted(FOUND)})
    with pytest.raises(SystemExit, match="more findings than allowed in lint"): lint.main(["lint"])
    assert "tools: 1 of E501, 0 allowed" in capsys.readouterr().out


def test_mypy_is_read(monkeypatch):
    said = ('instructvideo_kit/policy/base.py:12: error: "A" has no attribute "b"  [attr-defined]\n'
            "instructvideo_kit/policy/base.py:12: note: see above\nFound 1 error in 1 file\n")
    monkeypatch.setattr(lint, "run", lambda *command: said)
    assert lint.counted(lint.types()) == {"instructvideo_kit/policy": {"attr-defined": 1}}


def test_ruff_looks_into_notebooks(tmp_path):
    pytest.importorskip("ruff")
    cell = dict(cell_type="code", id="a", metadata={}, execution_count=None, outputs=[], source=["import os; x = 1"])
    (tmp_path/"a.ipynb").write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    options = ["--no-cache", "--config", ROOT/"pyproject.toml", "--output-format", "json"]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", *options, tmp_path], capture_output=True, text=True)
    assert {item["code"] for item in json.loads(done.stdout)} >= {"E702", "F401"}


def test_what_took_longest_comes_first():
    said = ("  12.50s call     tests/test_a.py::test_x[a b]\n   1.00s setup    tests/test_a.py::test_x[a b]\n"
            "   3.00s call tests/test_b.py::test_y\n")
    spent = runner.durations_of(said)
    assert spent == {"tests/test_a.py::test_x[a b]": 13.5, "tests/test_b.py::test_y": 3}
    assert [line.split()[-1] for line in runner.longest({**spent, "nbs: c.ipynb": 5}, n=2)] == ["b]", "c.ipynb"]


@pytest.mark.parametrize("value,measured", [("1", True), ("0", False), (None, sys.version_info >= (3, 12))])
def test_coverage_is_asked_for(monkeypatch, value, measured):
    if value is None: monkeypatch.delenv("COVERAGE", raising=False)
    else: monkeypatch.setenv("COVERAGE", value)
    assert runner.measures_coverage() == measured


def test_the_fast_tier_says_when_it_is_slow():
    assert "over 180 s" in runner.report(["lint 1 s"], 200, fast=True)
    assert "over 180 s" not in runner.report(["lint 1 s"], 170, fast=True)
    assert "over 180 s" not in runner.report(["lint 1 s"], 2000, fast=False)


def test_tiers_name_stages_and_files_that_exist():
    assert set(runner.FULL) | set(runner.FAST) == set(runner.STAGES)
    from conftest import TIERS
    names = {p.stem for p in (ROOT/"tests").glob("test_*.py")}
    assert {f for files in TIERS.values() for f in files} <= names
    assert [p.suffix for p in runner.exporting(runner.TWO_NOTEBOOKS)] == [".ipynb", ".ipynb"]


def test_marks_are_given(request):
    marks = {m.name for item in request.session.items if item.path.stem == "test_kills" for m in item.iter_markers()}
    if not marks: pytest.skip("test_kills was not collected in this run")
    assert "slow" in marks


# ---- the wheel

def test_a_wheel_carries_all_data_and_the_course(tmp_path):
    # an old build/ or a stale list of sources must not help: the egg-info goes elsewhere
    steps = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run([sys.executable, "setup.py", "-q", *steps], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    built = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert {p for p in tracked() if p.startswith("instructvideo_kit/")} <= built
    course = {f"instructvideo_kit/course/{p.removeprefix('tutorials/')}" for p in tracked()
              if p.startswith(("tutorials/student/", "tutorials/solved/", "tutorials/logs/"))}
    assert len(course) > 50 and course <= built


def test_the_course_is_copied_and_answers_stay(tmp_path):
    from typer.testing import CliRunner

    from instructvideo_kit.cli import app
    first = CliRunner().invoke(app, ["tutorials", "--to", str(tmp_path/"mine")])
    assert first.exit_code == 0 and "01_start_here.ipynb" in first.stdout
    notebook = tmp_path/"mine/tutorials/student/01_start_here.ipynb"
    notebook.write_text("answers")
    again = CliRunner().invoke(app, ["tutorials", "--to", str(tmp_path/"mine")])
    assert notebook.read_text() == "answers" and "1 files there differ" in again.stderr
    assert (tmp_path/"mine/tutorials/logs/README.md").is_file() # what the notebooks look for in a folder above them


def test_the_course_is_not_copied_onto_itself():
    from instructvideo_kit.files import KitError
    from instructvideo_kit.tutorials import copy_course
    with pytest.raises(KitError, match="is the course itself"): copy_course(ROOT)


# ---- pages and the forge's files

PLACE = re.compile(r"`((?:\w+/)*\w+\.py|\w+/)`(?: `(\w+)`)?")


def files_at(place):
    "The modules that a place on the map means: a file, or a folder that may still be one file."
    path = PACKAGE/place
    if place.endswith(".py"): return [path] if path.is_file() else sorted(path.with_suffix("").glob("*.py"))
    return sorted(path.rglob("*.py")) or [p for p in [path.with_suffix(".py")] if p.is_file()]


def defined(path):
    "Names of functions and classes of a module, methods too."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def places():
    page = text_of("CONTRIBUTING.md")
    part = page[page.index("## To change X"):page.index("## Before a commit")]
    folders = ("tools/", "instructvideo_kit/") # of the repository
    return sorted({(place, name) for place, name in PLACE.findall(part) if place not in folders})


@pytest.mark.parametrize("place,name", places())
def test_the_map_is_true(place, name):
    found = files_at(place)
    assert found, f"CONTRIBUTING.md names {place}, which is not in {PACKAGE.name}/"
    assert not name or any(name in defined(p) for p in found), f"{place} has no {name}"


def test_the_map_is_large_enough():
    page = text_of("CONTRIBUTING.md")
    assert len(places()) > 25 and page.count("\n| ", page.index("## To change X"), page.index("## The path")) > 10
    assert {name for _, name in places()} >= {
        "encode", "corrupt", "denoise", "segment_frames", "decode", "ClipReward", "tar_weights", "add_lora"}


def test_every_make_command_on_a_page_exists():
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.M))
    pages = ["README.md", "CONTRIBUTING.md", ".ci/run", ".github/workflows/test.yml",
             ".github/pull_request_template.md"]
    pages += [p for p in tracked() if p.startswith("tutorials/instructor/") and p.endswith(".md")]
    asked = {m for page in pages for m in re.findall(r"(?:`|\n\s*|run: |; )make ([a-z][\w-]*)", text_of(page))}
    assert {"demo", "test", "check", "wheels", "setup"} <= asked and asked - targets == set()


def test_programs_are_named_where_they_are():
    kinds = (".py", ".md", ".yml", ".yaml", "Makefile", "setup", "run")
    pages = [p for p in tracked() if p.endswith(kinds) and "weights" not in p]
    program = re.compile(r"(?<![\w/])(?:tools|\.ci)/\w+(?:\.\w+)?")
    named = {(page, m) for page in pages for m in program.findall(text_of(page))}
    known = {m for _, m in named if (ROOT/m).exists()}
    assert "tools/test.py" in known and {(page, m) for page, m in named if m not in known} == set()


def test_addresses_of_a_fork_are_in_one_place():
    allowed = {"settings.ini", "instructvideo_kit/_modidx.py", "CONTRIBUTING.md", "tests/test_house.py"}
    assert {p for p in tracked() if p.endswith((".py", ".md", ".ini", ".toml", ".cff", ".yml", ".ipynb"))
            and "example" + ".invalid" in text_of(p)} <= allowed
    assert text_of("settings.ini").count("example" + ".invalid") == 1


def test_the_forge_runs_what_is_supported():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(text_of(".github/workflows/test.yml"))["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"}
    assert '>=3.10,<3.14' in text_of("pyproject.toml")
    steps = [s.get("run", "") for job in jobs.values() for s in job["steps"]]
    assert any("make test" in s for s in steps) and any("torch.version.cuda is None" in s for s in steps)
    assert jobs["cpu-build"]["env"]["TORCH_INDEX"] == install.TORCH_INDEX or "TORCH_INDEX" in os.environ
    hooks = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    stages = {word for hook in hooks for word in hook["entry"].split()}
    assert {"clean-diff", "export-diff", "editions", "lint"} <= stages
    for name in ("bug", "question", "proposal", "config"):
        assert yaml.safe_load(text_of(f".github/ISSUE_TEMPLATE/{name}.yml"))


def test_tools_have_one_version():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", text_of("constraints.txt"), re.M))
    for name in ("ruff", "mypy", "nbdev"): assert f'"{name}=={pins[name]}"' in text_of("pyproject.toml"), name
    version = re.search(r"^version = (\S+)", text_of("settings.ini"), re.M)[1]
    assert f"version: {version}" in text_of("CITATION.cff") and f"First edition, {version}" in text_of("CHANGELOG.md")
