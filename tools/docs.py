"""The documentation site: `make docs` -> build/site/index.html.

Pages are gathered in build/pages: the README, the symbol table, the tutorials with their outputs, a page per module
(a table of parameters from the types and comments beside them), the pages for teachers, and the scoreboard.
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


def comment_on(line):
    "What stands behind the last # of a line of code; empty without one."
    found = re.search(r"#\s(.*)$", line)
    return found[1].strip() if found else ""


def parameters_of(node, lines):
    "(name, type, default, comment) of each parameter of a function, self and cls left out."
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    defaults = dict(zip([a.arg for a in reversed(plain)], reversed(given.defaults)))
    defaults |= {a.arg: d for a, d in zip(given.kwonlyargs, given.kw_defaults) if d is not None}
    stars = [[x] if x else [] for x in (given.vararg, given.kwarg)]
    named = [*plain, *stars[0], *given.kwonlyargs, *stars[1]]
    rows = []
    for arg in named:
        if arg.arg in ("self", "cls"): continue
        default = defaults.get(arg.arg)
        end = max(arg.end_lineno, default.end_lineno if default else 0)
        kind, value = (ast.unparse(x) if x else "" for x in (arg.annotation, default))
        behind = comment_on(lines[end - 1]) if end > node.lineno or len(named) == 1 else ""
        rows.append((arg.arg, kind, value, behind))
    return rows


def returned_by(node, lines):
    "What a function returns: its annotation and the comment behind it; empty where neither is said."
    line = lines[node.body[0].lineno - 2] if node.body[0].lineno > node.lineno else ""
    kind = ast.unparse(node.returns) if node.returns else ""
    return f"`{kind}` {comment_on(line)}".strip() if kind else comment_on(line) if line.lstrip().startswith(")") else ""


def as_table(rows, heading):
    "A table of Markdown; cells may hold |."
    lines = [f"| {heading} | type | default | |", "|---|---|---|---|"]
    for *code, comment in rows:
        cells = [f"`{text}`" if text else "" for text in code]
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in [*cells, comment]) + " |")
    return "\n".join(lines)


def function_page(node, lines):
    "Docstring, table of parameters, and what comes back."
    rows, back = parameters_of(node, lines), returned_by(node, lines)
    table = as_table(rows, "parameter") if rows else ""
    parts = [ast.get_docstring(node) or "", table, f"Returns {back}" if back else ""]
    return "\n\n".join(part for part in parts if part)


def class_page(node, lines):
    "Docstring, table of fields, and its public methods."
    fields = [(x.target.id, ast.unparse(x.annotation), ast.unparse(x.value) if x.value else "",
               comment_on(lines[x.end_lineno - 1])) for x in node.body if isinstance(x, ast.AnnAssign)]
    methods = [x for x in node.body if isinstance(x, ast.FunctionDef) and is_public(x)]
    parts = [ast.get_docstring(node) or "", as_table(fields, "field") if fields else ""]
    parts += [f"### {node.name}.{x.name}\n\n{function_page(x, lines)}" for x in methods]
    return "\n\n".join(part for part in parts if part)


def page_for(node, lines): return (class_page if isinstance(node, ast.ClassDef) else function_page)(node, lines)


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
    return title + "".join(f"\n## {n.name}\n\n{page_for(n, lines)}\n" for n in shown)


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


def from_docs():
    "The pages of the folder docs, as they are; they may point to one another."
    titles = {"symbols": "Symbols", "coming_from_trl": "Coming from TRL", "users_reports": "Users' reports"}
    texts = {name: (ROOT/f"docs/{name}.md").read_text(encoding="utf-8") for name in titles}
    return [{title: write(f"{name}.md", texts[name])} for name, title in titles.items()]


def pages():
    "Write all pages; the navigation."
    shutil.rmtree(PAGES, ignore_errors=True)
    nav = [
        {"Home": write("index.md", page_of("README.md"))}, {"Tutorials": tutorials()},
        *from_docs(), {"API": api()}, {"Teaching": teaching()}]
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
