"Links and names in prose: every inside link leads somewhere, every name of the kit that a page writes exists."
import ast
import importlib
import json
import re
import shlex
from functools import cache
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/"instructvideo_kit"
PAGES = ("*.md", "docs/*.md", "tutorials/*.ipynb", "tutorials/instructor/*.md", "tutorials/logs/*.md", "nbs/**/*.ipynb",
         "reproduction/**/*.md", "benchmarks/**/*.md", "instructvideo_kit/weights/**/*.md")
HISTORY = {"CHANGELOG.md"} # names what there was; its links are checked, its names are not
ROOMS = sorted(p.name for p in PACKAGE.iterdir() if (p/"__init__.py").exists() and p.name != "weights")
FOLDERS = ("nbs", "tests", "tools", "tutorials", "docs", "reproduction", "benchmarks", "instructvideo_kit", *ROOMS)
FILES = tuple(".py .md .ipynb .yaml .yml .json .jsonl .csv .css .js .txt .png .safetensors".split())
# what stands for something that the reader chooses: <folder>, FOLDER, NN_topic, name_menagerie, course (a copy), ...
PLACEHOLDER = re.compile(r"[<>{}$]|\.\.\.|NN_|FOLDER|(?<![a-z])name(?![a-z])|\bX\b")

ELSEWHERE = {
    "instructvideo_kit/course", # inside the wheel only: setup.py makes it
    "reproduction/feedback/loop.jsonl", "reproduction/feedback/loop.json", # what taste_loop.py writes
}


def pages():
    "Pages that people read, generated ones and copies of tutorials left out."
    found = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    return sorted(path for path in found if ".ipynb_checkpoints" not in path.parts)


@cache
def prose(path):
    "The text of a page: the markdown cells of a notebook, or the whole file."
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb": return text
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def found_on(pages, problems):
    "{page: problems} of the pages that have any; problems(page) gives them."
    said = {page.relative_to(ROOT).as_posix(): list(problems(page)) for page in pages}
    return {page: some for page, some in said.items() if some}


def without_code(text): return re.sub(r"(?ms)^ *```.*?^ *```|`[^`\n]*`", "", text)


# Links

def links_in(text):
    "Targets of links and pictures, in markdown and in HTML."
    text = without_code(text)
    found = re.findall(r"\]\(<?([^)\s>]+)>?(?: +\"[^\"]*\")?\)", text)
    return found + re.findall(r"(?:href|src)=[\"']([^\"']+)[\"']", text)


def anchors_in(text):
    "What #... may name on a page: its headings, as GitHub and as Jupyter spell them, and ids."
    names = set(re.findall(r"id=[\"']([^\"']+)[\"']", text))
    for heading in re.findall(r"(?m)^#+ +(.+?) *#*$", re.sub(r"(?ms)^ *```.*?^ *```", "", text)):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        names.add(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
        names.add(plain.replace(" ", "-"))
    return names


def outside(target): return bool(re.match(r"[a-z]+:|//", target))


def broken_link(target, page):
    "What is wrong with an inside link of a page; empty where nothing is."
    where, _, anchor = target.partition("#")
    file = (page.parent/unquote(where)).resolve() if where else page
    if not file.exists(): return f"{target}: no such file"
    if not file.is_relative_to(ROOT): return f"{target}: outside the repository"
    if not anchor or file.suffix not in (".md", ".ipynb"): return ""
    return "" if unquote(anchor) in anchors_in(prose(file)) else f"{target}: no such heading"


def broken_links(page):
    said = [broken_link(target, page) for target in links_in(prose(page)) if not outside(target)]
    return [problem for problem in said if problem]


def test_inside_links_lead_somewhere(): assert found_on(pages(), broken_links) == {}


def test_broken_links_are_noticed():
    page = ROOT/"README.md"
    text = "[a](docs/symbols.md) [b](docs/gone.md) ![c](docs/symbols.md#symbols) <a href='#nowhere'>d</a> `[e](f.md)`"
    assert links_in(text) == ["docs/symbols.md", "docs/gone.md", "docs/symbols.md#symbols", "#nowhere"]
    said = [broken_link(target, page) for target in links_in(text)]
    assert said == ["", "docs/gone.md: no such file", "", "#nowhere: no such heading"]
    assert broken_link("docs/symbols.md#syzygy", page).endswith("no such heading")
    assert outside("https://arxiv.org/abs/1") and outside("mailto:a@b.c") and not outside("docs/symbols.md")


# Files and notebooks

@cache
def ticked(text):
    "What stands between single backticks."
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"(?ms)^ *```.*?^ *```", "", text))


def words(code): return re.findall(r"[^\s,;()'\"=|]+", code)


def placed(name):
    "Where a path or a notebook of the repository may lie."
    if re.fullmatch(r"\d\d_\w+", name): return [f"nbs/*/{name}.ipynb", f"nbs/{name}.ipynb", f"tutorials/{name}.ipynb"]
    inside = [name, f"nbs/{name}", f"instructvideo_kit/{name}"]
    return [f"{place}{end}" for place in inside for end in ("", ".ipynb", ".py", ".md")]


def missing_file(name):
    "Is this the name of a file of the repository, and not there?"
    name = name.rstrip("/.:")
    numbered = re.fullmatch(r"\d\d_\w+", name)
    inside = numbered or ("/" in name and name.split("/")[0] in FOLDERS)
    if not inside or name in ELSEWHERE or PLACEHOLDER.search(name): return False
    return not any(any(ROOT.glob(place)) for place in placed(name))


def named_pages(): return [page for page in pages() if page.name not in HISTORY]


def missing_files(page):
    return sorted({word for code in ticked(prose(page)) for word in words(code) if missing_file(word)})


def test_files_that_are_named_exist(): assert found_on(named_pages(), missing_files) == {}


def test_missing_files_are_noticed():
    assert missing_file("nbs/tuning/99_gone") and missing_file("77_gone") and missing_file("policy/gone.py")
    assert not any(map(missing_file, ("nbs/check/00_verdict", "reward/tar.py", "01_start_here", "tests/", "a/b.py",
                                      "nbs/<folder>/NN_topic.ipynb", "tests/test_check*.py", "4/5")))


# Names in Python

@cache
def classes():
    "{name of a public class of the kit: dotted module}, read without importing."
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if "weights" in path.parts or path.name.startswith("_"): continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"): found[node.name] = module
    return found


def has(thing, name):
    "Has a module, a class or a value this attribute? Fields of classes and what __init__ sets count."
    if hasattr(thing, name): return True
    for one in getattr(thing, "__mro__", ()):
        if name in getattr(one, "__annotations__", {}): return True
        if re.search(rf"self\.{name}\b *[:=]|self\.{name},", source_of(one)): return True
    return False


@cache
def source_of(cls):
    import inspect
    try: return inspect.getsource(cls)
    except (OSError, TypeError): return ""


def walk(thing, names):
    "Follow attributes as far as they can be known; the first that is missing, or an empty text."
    for name in names:
        if not has(thing, name): return name
        if not hasattr(thing, name): return "" # a field: what it holds is known at run time only
        thing = getattr(thing, name)
    return ""


def absent(code):
    "What is missing of a dotted name that begins with a module or a class of the kit; empty where nothing is."
    dotted = re.match(r"[A-Za-z_]\w*(?:\.\w+)+", code)
    if not dotted or dotted[0].endswith(FILES): return ""
    first, *rest = parts = dotted[0].removeprefix("instructvideo_kit.").split(".")
    if first in classes() and rest: return walk(getattr(importlib.import_module(classes()[first]), first), rest)
    if first == "check" and not (PACKAGE/"check"/f"{rest[0]}.py").exists():
        return "" if rest[0] in dir(importlib.import_module("instructvideo_kit.check")) else rest[0]
    stem = "/".join(parts[:2] if first in ROOMS else parts[:1])
    if (PACKAGE/f"{stem}.py").exists():
        module = importlib.import_module(f"instructvideo_kit.{stem.replace('/', '.')}")
        return walk(module, parts[stem.count("/") + 1:])
    return dotted[0] if code.startswith("instructvideo_kit.") else "" # else a variable of the page: policy.size


def absent_names(page):
    return [code for code in ticked(prose(page)) if not PLACEHOLDER.search(code) and absent(code)]


def test_names_of_the_kit_exist(): assert found_on(named_pages(), absent_names) == {}


def test_missing_names_are_noticed():
    assert absent("instructvideo_kit.reward.tar.tar_wights") == "tar_wights"
    assert absent("reward.tar.tar_wights(g)") == "tar_wights" and absent("InstructVideoConfig.tauu") == "tauu"
    assert absent("instructvideo_kit.reward.tarr") and absent("check.no_such_exercise") == "no_such_exercise"
    for name in ("reward.tar.tar_weights(g, 16, 1.)", "InstructVideoConfig.tau", "check.quiz", "policy.size",
                 "demo.json", "torch.load(weights_only=True)", "measure.metrics", "instructvideo_kit.cli.app"):
        assert absent(name) == "", name


# Commands

@cache
def commands():
    "The command line as click knows it."
    import typer

    from instructvideo_kit.cli import app
    return typer.main.get_command(app)


def options_of(command): return {name for param in command.params for name in (*param.opts, *param.secondary_opts)}


def wrong_command(line):
    "What `instructvideo-kit` would not understand of a line; empty where nothing is."
    command, taken = commands(), []
    for word in shlex.split(line, comments=True):
        if word in ("|", "&&", ";", "\\"): break
        if word.startswith("--"):
            name = word.split("=")[0]
            if name != "--help" and name not in options_of(command): return f"{' '.join(taken)} {name}"
        elif hasattr(command, "commands") and not PLACEHOLDER.search(word):
            if word not in command.commands: return " ".join([*taken, word])
            command = command.commands[word]
            taken.append(word)
    return ""


def command_lines(text):
    "What follows `instructvideo-kit` in blocks of code and between backticks; `tune --set ...` alone counts too."
    blocks = "\n".join(re.findall(r"(?ms)^ *```\w*\n(.*?)^ *```", text))
    indented = "\n".join(re.findall(r"(?m)^    (?=\S).*$", text))
    lines = re.sub(r"\\\n *", " ", f"{blocks}\n{indented}").splitlines()
    found = [m[1] for line in lines if (m := re.match(r"[\s!$%]*(?:\.venv/bin/)?instructvideo-kit +(.+)", line))]
    for code in ticked(text):
        if m := re.match(r"(?:\.venv/bin/)?instructvideo-kit +(.+)", code): found.append(m[1])
        elif re.match(r"[a-z]+ .*--", code) and code.split()[0] in commands().commands: found.append(code)
    return found


def lines_in_code(path):
    "Commands in the code of a notebook: shell lines, and what messages tell people to run."
    if path.suffix != ".ipynb": return []
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    return re.findall(r"instructvideo-kit ([a-z][^`'\"\n{}#;,)\\]*)", text)


def wrong_commands(page):
    return [wrong for line in command_lines(prose(page)) + lines_in_code(page) if (wrong := wrong_command(line))]


def test_commands_exist(): assert found_on(named_pages(), wrong_commands) == {}


def test_wrong_commands_are_noticed():
    said = "`tune --no-such x` and `instructvideo-kit tunee`, `.venv/bin/instructvideo-kit doctor`\n"
    block = "```bash\ninstructvideo-kit tune --data FOLDER --sett tau=.4 # words\n```\n"
    found = [wrong_command(line) for line in command_lines(said + block)]
    assert found == ["tune --sett", "tune --no-such", "tunee", ""]
    assert wrong_command("feedback collekt") == "feedback collekt" and wrong_command("feedback --help") == ""


def missing_script_option(line):
    "An option that a program of this repository, run by python, does not have."
    program, *rest = line.split()
    if PLACEHOLDER.search(program) or not (ROOT/program).is_file(): return ""
    text = (ROOT/program).read_text(encoding="utf-8")
    options = {word.split("=")[0].rstrip(",.") for word in rest if word.startswith("--")}
    return " ".join(sorted(option for option in options if f'"{option}"' not in text))


def wrong_programs(page):
    found = re.findall(r"python3? ((?:tools|tests|benchmarks|reproduction)/[\w/]+\.py(?: [^`\n|#]*)?)", prose(page))
    return [wrong for line in found if (wrong := missing_script_option(line))]


def test_programs_have_the_options_that_are_named(): assert found_on(named_pages(), wrong_programs) == {}


def test_missing_options_of_programs_are_noticed():
    assert missing_script_option("tools/lint.py --counts --no-such") == "--no-such"
    assert missing_script_option("tools/lint.py --counts") == ""


@cache
def targets(): return set(re.findall(r"(?m)^([a-z-]+):", (ROOT/"Makefile").read_text(encoding="utf-8")))


def wrong_targets(page):
    asked = {code.split()[1] for code in ticked(prose(page)) if re.match(r"make [a-z]", code)}
    return sorted(asked - targets())


def test_targets_of_make_exist(): assert found_on(named_pages(), wrong_targets) == {} and "check" in targets()


# Numbers of notebooks and tutorials

def missing_numbers(page):
    "\"notebook 12\" means one of the same folder, \"tutorial 12\" one of the course."
    found = []
    for kind, number in re.findall(r"\b([Nn]otebook|[Tt]utorial) (\d\d?)\b", prose(page)):
        folder = page.parent if kind.lower() == "notebook" else ROOT/"tutorials"
        if not list(folder.glob(f"{int(number):02}_*.ipynb")): found.append(f"{kind} {number}")
    return found


def test_numbers_of_notebooks_exist(): assert found_on(named_pages(), missing_numbers) == {}


def test_a_page_with_problems_is_named(tmp_path):
    page = ROOT/"README.md"
    assert found_on([page], lambda p: ["x"]) == {"README.md": ["x"]} and found_on([page], lambda p: []) == {}
    odd = tmp_path/"odd.md"
    odd.write_text("see notebook 12, tutorial 01, tutorial 77, `make nothing`, `make check`, `77_gone`, `reward.tar.x`")
    assert missing_numbers(odd) == ["notebook 12", "tutorial 77"] and wrong_targets(odd) == ["nothing"]
    assert missing_files(odd) == ["77_gone"] and absent_names(odd) == ["reward.tar.x"]
