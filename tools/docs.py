"""The documentation site: `make docs` -> build/site/index.html.

Pages are gathered in build/pages: the README, the symbol table, the tutorials with their outputs, a page per module
(what a function takes is written in comments beside its parameters, so the page shows the head of each function as it
stands), the pages for teachers, and the scoreboard.
Formulas are set by MathJax, which the reader's browser fetches; without a network they stay as they are written.
"""
import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES, SITE = ROOT/"build/pages", ROOT/"build/site"
FORMULAS = {"pymdownx.arithmatex": dict(generic=True)}
STYLE = dict(
    theme=dict(name="material", features=["navigation.tabs", "toc.follow", "content.code.copy"], font=False),
    use_directory_urls=False,
    plugins=["search", {"mkdocs-jupyter": dict(execute=False, include_source=True)}],
    markdown_extensions=["tables", "attr_list", "md_in_html", FORMULAS, "pymdownx.superfences"],
    extra_javascript=["https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"])


def is_public(node): return not node.name.startswith("_") or node.name in ("__init__", "__call__")


def head_of(node, lines):
    "A function down to its docstring; a class with its fields and the heads of its public methods."
    if isinstance(node, ast.ClassDef):
        parts = ["\n".join(lines[node.lineno - 1:node.body[0].end_lineno])]
        for x in node.body[1:]:
            if isinstance(x, ast.AnnAssign): parts.append(lines[x.lineno - 1])
            elif isinstance(x, ast.FunctionDef) and is_public(x): parts.append(head_of(x, lines))
        return "\n".join(parts)
    last = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    return "\n".join(lines[node.lineno - 1:max(last, node.lineno)])


def public_names(tree):
    "What a module's __all__ lists; nothing without one."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def api_page(path):
    "Markdown of one module; empty for a module without public names."
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    public = public_names(tree)
    shown = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in public]
    if not shown: return ""
    source = re.search(r"File to edit: (?:\.\./)*(nbs/\S+\.ipynb)", text)
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    title = f"# {name}\n\n{ast.get_docstring(tree) or ''}\n\n"
    if source: title += f"Explained, with pictures and tests, in `{source[1]}`.\n"
    return title + "".join(f"\n## {n.name}\n\n```python\n{head_of(n, lines)}\n```\n" for n in shown)


def write(name, text):
    path = PAGES/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return name


def api():
    "{room: [{module: page}, ...]} for the navigation."
    nav = {}
    for path in sorted((ROOT/"instructvideo_kit").rglob("*.py")):
        if "weights" in path.parts or not (page := api_page(path)): continue
        parts = path.relative_to(ROOT/"instructvideo_kit").with_suffix("").parts
        room = parts[0] if len(parts) > 1 else "kit"
        nav.setdefault(room, []).append({parts[-1]: write(f"api/{'/'.join(parts)}.md", page)})
    return [{room: pages} for room, pages in nav.items()]


def tutorials():
    "The masters, with outputs; links to editions and Colab are theirs."
    nav = []
    for path in sorted((ROOT/"tutorials").glob("[0-9][0-9]_*.ipynb")):
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
        title = "".join(first).splitlines()[0].lstrip("# ")
        (PAGES/"tutorials").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, PAGES/"tutorials"/path.name)
        nav.append({f"{path.name[:2]} {title}": f"tutorials/{path.name}"})
    return nav


def page_of(name):
    "A page of the repository: its pictures are put beside it, its links to files become plain text."
    text, folder = (ROOT/name).read_text(encoding="utf-8"), (ROOT/name).parent
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)|src=\"([^\"]+)\"", text):
        picture = "".join(picture)
        if (folder/picture).is_file():
            (PAGES/picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder/picture, PAGES/picture)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)[^)]+\)", r"\1", text)


def teaching():
    "The pages for teachers, without their table of contents."
    found = [p for p in sorted((ROOT/"tutorials/instructor").glob("*.md")) if p.stem != "README"]
    return [{p.stem.replace("_", " "): write(f"instructor/{p.name}", p.read_text(encoding="utf-8"))} for p in found]


def pages():
    "Write all pages; the navigation."
    shutil.rmtree(PAGES, ignore_errors=True)
    symbols = (ROOT/"docs/symbols.md").read_text(encoding="utf-8")
    nav = [
        {"Home": write("index.md", page_of("README.md"))}, {"Tutorials": tutorials()},
        {"Symbols": write("symbols.md", symbols)}, {"API": api()}, {"Teaching": teaching()}]
    board = "reproduction/README.md"
    return nav + [{"Scoreboard": write("scoreboard.md", page_of(board))}] if (ROOT/board).is_file() else nav


def main():
    missing = [name for name in ("mkdocs", "mkdocs_jupyter", "yaml") if importlib.util.find_spec(name) is None]
    if missing: sys.exit(f"docs: {missing[0]} is not installed; run .venv/bin/python -m pip install -e '.[docs]'")
    import yaml
    config = dict(STYLE, site_name="instructvideo_kit", docs_dir=str(PAGES), site_dir=str(SITE), nav=pages())
    (ROOT/"build/mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--clean", "-f", ROOT/"build/mkdocs.yml"]
    quiet = dict(os.environ, NO_MKDOCS_2_WARNING="1") # the theme's advertisement for its successor
    done = subprocess.run(command, cwd=ROOT/"build", env=quiet) # its cache stays there
    if done.returncode: sys.exit(done.returncode)
    print(f"docs: {SITE/'index.html'}")


if __name__ == "__main__": main()
