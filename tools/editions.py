"""Two editions of each tutorial.

tutorials/NN_*.ipynb (the master) -> tutorials/student (no solutions) and tutorials/solved (no marks).
Also the tables made from them, in the README and in the instructor's pages: minutes, needs, the reader's path.

python tools/editions.py [PREFIX ...]          write them, and nbgrader's cell metadata into the masters
python tools/editions.py --check [PREFIX ...]  say what is out of step, and exit 1 if anything is
"""
import configparser
import copy
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"#\| (answer|graded|setup)\b ?(\w*) ?([\d.]*)[^\n]*\n?")
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n(.*?)^[ \t]*### END SOLUTION(\n|\Z)", re.M | re.S)
HIDDEN = re.compile(r"^[ \t]*### BEGIN HIDDEN TESTS\n(.*?)^[ \t]*### END HIDDEN TESTS(?:\n|\Z)", re.M | re.S)
QUIZ = re.compile(r"(check\.quiz\('\w+')((?:, '[abc]')+)\)")
MARK = re.compile(r"^[ \t]*### (?:BEGIN|END) (?:SOLUTION|HIDDEN TESTS)\n?", re.M)
COLAB = """import sys
if "google.colab" in sys.modules: # this release of the kit, beside Colab's own torch
    !git clone -q --depth 1 --branch {tag} https://github.com/{repo} kit && pip install -q ./kit
    %cd -q kit/tutorials/{edition}
"""
PICTURE = "https://colab.research.google.com/assets/colab-badge.svg"
PLACE = "https://colab.research.google.com/github/{repo}/blob/{tag}/tutorials/{edition}/{name}"
BADGE = f"[![Open in Colab]({PICTURE})]({PLACE})"


MINUTES = re.compile(r"\| minutes \| (\d+) to read, ([\d.]+) to run, (\d+) for the exercises \|")
KNOWN = re.compile(r"\| you know already \| (.+) \|")
TABLE = r"(<!-- {0} -->\n).*?(<!-- /{0} -->)" # a table stands between two marks with its name
PAGES = ("README.md", "tutorials/instructor/README.md", "tutorials/instructor/syllabus.md") # where tables stand


class Odd(ValueError): "A master that does not keep the conventions."


def masters(prefixes=(), root=ROOT):
    found = sorted((root/"tutorials").glob("[0-9][0-9]_*.ipynb"))
    return [p for p in found if not prefixes or p.name.startswith(tuple(prefixes))]


def release(root=ROOT):
    "Where a release is found: owner/name and tag."
    c = configparser.ConfigParser()
    c.read(root/"settings.ini", encoding="utf-8")
    return dict(repo=f"{c['DEFAULT']['user']}/{c['DEFAULT']['repo']}", tag=f"v{c['DEFAULT']['version']}")


def source(cell): return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def directive(cell):
    "(kind, id, points) of a cell; empty strings where it has none."
    found = DIRECTIVE.match(source(cell)) if cell["cell_type"] == "code" else None
    return found.groups() if found else ("", "", "")


def nbgrader(kind, name, points):
    "The metadata that nbgrader expects of an answer or of a graded cell."
    graded = kind == "graded"
    grade_id = name if graded else f"{name}_answer"
    data = dict(grade=graded, grade_id=grade_id, locked=graded, schema_version=3, solution=not graded, task=False)
    return {**data, "points": float(points) if "." in points else int(points)} if graded else data


def balanced(text, what): return text.count(f"### BEGIN {what}") == text.count(f"### END {what}") == 1


def problems(nb):
    "What does not keep the conventions, in words."
    found, seen = [], set()
    for cell in nb["cells"]:
        (kind, name, points), text = directive(cell), source(cell)
        if kind in ("answer", "graded") and not name: found.append(f"a cell #| {kind} has no name")
        if (kind, name) in seen: found.append(f"#| {kind} {name} stands twice")
        if kind == "answer" and not balanced(text, "SOLUTION"):
            found.append(f"answer {name}: one ### BEGIN SOLUTION and one ### END SOLUTION are needed")
        if kind == "graded" and not (points and balanced(text, "HIDDEN TESTS")):
            found.append(f"graded {name}: points and one hidden test are needed")
        if not kind and MARK.search(text) and cell["cell_type"] == "code":
            found.append(f"marks in a cell without directive: {text.splitlines()[0]}")
        if kind: seen.add((kind, name))
    names = [{n for k, n in seen if k == kind} for kind in ("answer", "graded")]
    return found + [f"{n} has no {'check' if n in names[0] else 'answer'}" for n in sorted(names[0] ^ names[1])]


def lines_of(solution):
    "How many lines a solution takes, comments aside."
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in solution.splitlines())


def budget(solution): return f"about {lines_of(solution)} line{'s' * (lines_of(solution) != 1)}"


def stub(found): return f"{found[1]}... # your code here, {budget(found[2])}\n"


def student_code(text): return HIDDEN.sub("", SOLUTION.sub(stub, DIRECTIVE.sub("", text, count=1))).rstrip("\n")


def open_quiz(text):
    "A quiz without the letters of the master."
    return QUIZ.sub(lambda m: m[1] + ", None"*m[2].count(",") + ")", text)


def solved_code(text): return MARK.sub("", DIRECTIVE.sub("", text, count=1)).rstrip("\n")


def edit_cell(cell, edition, where):
    "One cell of an edition: no outputs, no directive; solutions and metadata as the edition wants them."
    kind, _, _ = directive(cell)
    if cell["cell_type"] == "code": cell.update(outputs=[], execution_count=None)
    if edition == "solved": cell["metadata"].pop("nbgrader", None)
    text = source(cell)
    if kind: text = (student_code if edition == "student" else solved_code)(text)
    if edition == "student": text = open_quiz(text)
    cell["source"] = COLAB.format(edition=edition, **where) + text if kind == "setup" else text
    return cell


SOLVED = """
<details><summary>Solution</summary>The same cell of <a href="../solved/{}">the solved edition</a>.</details>"""


def link_solution(cells, name):
    "Below the last hint of each exercise: where its solution is."
    hints = [i for i, c in enumerate(cells) if c["cell_type"] == "markdown" and "<summary>Hint" in c["source"]]
    for i in hints:
        if i + 1 not in hints: cells[i]["source"] += SOLVED.format(name)


def edition_of(nb, name, edition, where):
    "The notebook of an edition."
    nb = copy.deepcopy(nb)
    nb["cells"] = [edit_cell(c, edition, where) for c in nb["cells"]]
    nb["cells"][0]["source"] += "\n\n" + BADGE.format(edition=edition, name=name, **where)
    if edition == "student": link_solution(nb["cells"], name)
    return nb


def with_metadata(nb):
    "The master with nbgrader's metadata."
    nb = copy.deepcopy(nb)
    for cell in nb["cells"]:
        kind, name, points = directive(cell)
        cell["metadata"].pop("nbgrader", None)
        if kind in ("answer", "graded"): cell["metadata"]["nbgrader"] = nbgrader(kind, name, points)
    return nb


def lines(cell): return {**cell, "source": source(cell).splitlines(keepends=True)}


def dump(nb):
    "The text of a notebook's file."
    listed = {**nb, "cells": [lines(c) for c in nb["cells"]]}
    return json.dumps(listed, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def files_of(path):
    "What must stand in the master and in its two editions: path -> text."
    nb = json.loads(path.read_text(encoding="utf-8"))
    if odd := problems(nb): raise Odd(f"{path.name}: " + "; ".join(odd))
    plain, where = {**nb, "cells": [{**c, "source": source(c)} for c in nb["cells"]]}, release(path.parent.parent)
    made = {path: dump(with_metadata(nb))}
    for edition in ("student", "solved"):
        made[path.parent/edition/path.name] = dump(edition_of(with_metadata(plain), path.name, edition, where))
    return made


def tutorial_row(path):
    "A line of the table: name, subtitle, minutes to read, run and do."
    first, card = (source(c) for c in json.loads(path.read_text(encoding="utf-8"))["cells"][:2])
    title, about = (line.lstrip("#> ").strip() for line in first.splitlines()[:2])
    if not (found := MINUTES.search(card)): raise Odd(f"{path.name}: no line with the minutes on its card")
    return f"| {path.name[:2]} | {title} | {about} | {found[1]} | {found[2]} | {found[3]} |\n"


def needs_row(path):
    "A line of the table of needs: name, what one must know already, exercises, points, the longest solution."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    title, text = source(cells[0]).splitlines()[0].lstrip("# "), "\n".join(map(source, cells))
    known = KNOWN.search(source(cells[1]))
    points = [float(points) for kind, _, points in map(directive, cells) if kind == "graded"]
    longest = max((lines_of(m[2]) for m in SOLUTION.finditer(text)), default=0)
    needs = known[1] if known else ""
    return f"| {path.name[:2]} | {title} | {needs} | {len(points)} | {sum(points):g} | {longest} |\n"


def readers_path(root=ROOT):
    "The reader's path as tutorial 15 has it: command, minutes, what to look at; or nothing."
    text = "\n".join(source(c) for p in masters(["15"], root) for c in json.loads(p.read_text("utf-8"))["cells"])
    found = re.search(r"## The reader's path\n.*?\n((?:\|[^\n]*\n)+)", text, re.S)
    return found[1] if found else ""


def tables(root=ROOT):
    "Pages with tables made from the tutorials: path -> text."
    minutes, needs = ("".join(map(row, masters(root=root))) for row in (tutorial_row, needs_row))
    made = {"tutorials": f"| | tutorial | about | read | run | do |\n|---|---|---|---|---|---|\n{minutes}",
            "needs": f"| | tutorial | you know already | exercises | points | longest, lines |\n{'|---'*6}|\n{needs}",
            "reader": readers_path(root)}
    pages = {root/name: (root/name).read_text(encoding="utf-8") for name in PAGES if (root/name).is_file()}
    for name, table in made.items():
        mark = re.compile(TABLE.format(name), re.S)
        pages = {path: mark.sub(lambda m, table=table: m[1] + table + m[2], text) for path, text in pages.items()}
    return pages


def strays(root=ROOT):
    "Editions without a master."
    found = [p for edition in ("student", "solved") for p in sorted((root/"tutorials"/edition).glob("*.ipynb"))]
    return [p for p in found if not (root/"tutorials"/p.name).exists()]


def stale(wanted): return [p for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text]


def main(arguments):
    check, prefixes = "--check" in arguments, [a for a in arguments if a != "--check"]
    try: wanted = {p: t for m in masters(prefixes) for p, t in files_of(m).items()} | ({} if prefixes else tables())
    except Odd as error: sys.exit(f"editions: {error}")
    changed, lost = stale(wanted), [] if prefixes else strays()
    for p in [] if check else changed:
        p.parent.mkdir(exist_ok=True)
        p.write_text(wanted[p], encoding="utf-8")
    for p in changed: print(f"  {p.relative_to(ROOT)} {'is out of step' if check else 'written'}")
    for p in lost: print(f"  {p.relative_to(ROOT)} has no master")
    if check and (changed or lost): sys.exit("editions: run `make editions` and commit")
    if not changed: print(f"  {len(masters(prefixes))} tutorials, both editions in step")


if __name__ == "__main__": main(sys.argv[1:])
