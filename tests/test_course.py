"The course: masters keep the conventions, editions are made from them, cards can be read, nothing is too large."
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools")) # test.py imports clean.py beside it

def tool(name, path):
    spec = importlib.util.spec_from_file_location(name, ROOT/path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

editions, ci = tool("editions", "tools/editions.py"), tool("ci_test", "tools/test.py")
MASTERS = editions.masters()
every_master = pytest.mark.parametrize("path", MASTERS, ids=lambda p: p.stem)

ANSWER = """#| answer double
def my_double(x):
    # twice
    ### BEGIN SOLUTION
    # a comment is no line of the budget
    y = 2 * x

    return y
    ### END SOLUTION
"""
GRADED = ("#| graded double 2\nright = check.double(my_double)\n### BEGIN HIDDEN TESTS\nassert right\n### END HIDDEN "
          "TESTS")

def cell(text, kind="code"):
    extra = (dict(outputs=[dict(output_type="stream", name="stdout", text="1")], execution_count=3)
             if kind == "code" else {})
    return dict(cell_type=kind, id=str(abs(hash(text)))[:8], metadata={}, source=text, **extra)

def notebook(*cells):
    return dict(cells=[cell("# Title\n> subtitle", "markdown"), *cells], metadata={}, nbformat=4, nbformat_minor=5)

def small():
    setup = cell("#| setup\nfrom instructvideo_kit import doctor")
    hint = cell("<details><summary>Hint 1</summary>Twice.</details>", "markdown")
    return notebook(setup, cell(ANSWER), cell(GRADED), hint)

@pytest.fixture
def root(tmp_path):
    (tmp_path/"tutorials").mkdir()
    (tmp_path/"settings.ini").write_text((ROOT/"settings.ini").read_text())
    (tmp_path/"tutorials/01_small.ipynb").write_text(json.dumps(small()))
    return tmp_path

def written(root):
    found = editions.files_of(root/"tutorials/01_small.ipynb")
    return {p.relative_to(root/"tutorials").as_posix(): json.loads(t) for p, t in found.items()}

def code(nb): return ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]

def test_student_edition_has_stub_and_no_solution(root):
    nb = written(root)["student/01_small.ipynb"]
    assert code(nb)[1] == "def my_double(x):\n    # twice\n    ... # your code here, about 2 lines"
    assert code(nb)[2] == "right = check.double(my_double)"
    assert "solved/01_small.ipynb" in "".join(nb["cells"][-1]["source"])
    assert not any(c.get("outputs") for c in nb["cells"])

def test_solved_edition_keeps_code_and_hidden_test(root):
    nb = written(root)["solved/01_small.ipynb"]
    assert "y = 2 * x" in code(nb)[1] and code(nb)[2].endswith("assert right") and "###" not in "".join(code(nb))
    space = {}
    exec(code(nb)[1], space)
    assert space["my_double"](2) == 4
    assert not any("nbgrader" in c["metadata"] for c in nb["cells"])

def test_master_keeps_outputs_and_gets_metadata(root):
    nb = written(root)["01_small.ipynb"]
    answer, graded = nb["cells"][2]["metadata"]["nbgrader"], nb["cells"][3]["metadata"]["nbgrader"]
    assert ((answer["grade"], answer["solution"], graded["grade"], graded["locked"], graded["points"])
            == (False, True, True, True, 2))
    assert answer["grade_id"] != graded["grade_id"] and nb["cells"][2]["outputs"]
    assert "".join(nb["cells"][2]["source"]) == ANSWER

def test_editions_open_on_colab_at_the_release(root):
    nb, where = written(root)["student/01_small.ipynb"], editions.release(root)
    assert f"/blob/{where['tag']}/tutorials/student/01_small.ipynb" in "".join(nb["cells"][0]["source"])
    assert f"--branch {where['tag']}" in code(nb)[0] and code(nb)[0].endswith("from instructvideo_kit import doctor")

@pytest.mark.parametrize("cells, words", [
    ([cell("#| answer a\nx = 1"), cell(GRADED.replace("double 2", "a 2"))], "BEGIN SOLUTION"),
    ([cell(ANSWER)], "double has no check"),
    ([cell(GRADED)], "double has no answer"),
    ([cell(ANSWER), cell(ANSWER), cell(GRADED)], "twice"),
    ([cell(ANSWER), cell(GRADED.replace(" 2", ""))], "points"),
    ([cell("### BEGIN SOLUTION\nx = 1\n### END SOLUTION")], "without directive"),
    ([cell("#| answer\n### BEGIN SOLUTION\nx = 1\n### END SOLUTION")], "no name"),
])
def test_odd_masters_are_named(cells, words): assert any(words in p for p in editions.problems(notebook(*cells)))

def test_a_changed_edition_is_noticed(root):
    wanted = editions.files_of(root/"tutorials/01_small.ipynb")
    for p, t in wanted.items():
        p.parent.mkdir(exist_ok=True)
        p.write_text(t)
    assert editions.stale(wanted) == [] and editions.strays(root) == []
    student = root/"tutorials/student/01_small.ipynb"
    student.write_text(student.read_text().replace("about 2 lines", "..."))
    (root/"tutorials/solved/02_gone.ipynb").write_text("{}")
    assert editions.stale(wanted) == [student] and [p.name for p in editions.strays(root)] == ["02_gone.ipynb"]

def test_writing_twice_changes_nothing(root):
    path = root/"tutorials/01_small.ipynb"
    for p, t in (first := editions.files_of(path)).items():
        p.parent.mkdir(exist_ok=True)
        p.write_text(t)
    assert editions.files_of(path) == first

# Every tutorial of this checkout

def cells_of(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def text_of(path, kind=None):
    return "\n".join(editions.source(c) for c in cells_of(path) if kind in (None, c["cell_type"]))

@every_master
def test_editions_are_in_step(path): assert editions.stale(editions.files_of(path)) == [], "run `make editions`"

def test_tables_are_in_step(): assert editions.stale(editions.tables()) == [], "run `make editions`"

def test_a_table_has_a_row_for_each_tutorial(root):
    nb = small()
    nb["cells"].insert(1, cell("| minutes | 20 to read, 1.5 to run, 30 for the exercises |", "markdown"))
    (root/"tutorials/01_small.ipynb").write_text(json.dumps(nb))
    (root/"README.md").write_text("before\n<!-- tutorials -->\nold\n<!-- /tutorials -->\nafter")
    text = editions.tables(root)[root/"README.md"]
    assert "| 01 | Title | subtitle | 20 | 1.5 | 30 |\n<!-- /tutorials -->\nafter" in text and "old" not in text

def test_no_edition_is_left_over(): assert editions.strays() == []

@every_master
def test_opening_is_in_the_usual_form(path):
    first, card = (editions.source(c) for c in cells_of(path)[:2])
    assert re.match(r"# .+\n> .+", first)
    for row in ("device", "memory", "minutes", "you know already", "symbols"): assert f"| {row} |" in card, row
    assert re.search(r"\| minutes \| \d+ to read, [\d.]+ to run, \d+ for the exercises \|", card)
    assert ci.minutes_to_run(path) <= 4
    assert "Predict" in card and all(f"({i})" in card for i in (1, 2, 3))

@every_master
def test_parts_are_there(path):
    text = text_of(path, "markdown")
    for part in ("## Set-up", "## Quiz", "## What we left out", "**Where to go on.**"): assert part in text, part
    assert 3 <= len([c for c in cells_of(path) if editions.directive(c)[0] == "graded"]) <= 6
    assert "<summary>Solution" not in text and "](../" not in text and "](./" not in text

@every_master
def test_setup_is_the_same_everywhere(path):
    setup = [editions.source(c) for c in cells_of(path) if editions.directive(c)[0] == "setup"]
    assert len(setup) == 1 and "doctor.check()" in setup[0]
    assert setup[0] == next(editions.source(c) for c in cells_of(MASTERS[0]) if editions.directive(c)[0] == "setup")

@every_master
def test_students_see_no_solution(path):
    student = path.parent/"student"/path.name
    assert "BEGIN SOLUTION" not in text_of(student) and "HIDDEN" not in text_of(student)
    solutions = [m[2].strip() for c in cells_of(path) for m in editions.SOLUTION.finditer(editions.source(c))]
    assert solutions and not any(s in text_of(student, "code") for s in solutions if len(s) > 25)
    assert text_of(student, "code").count("# your code here") == len(solutions)

@pytest.mark.parametrize("path", sorted((ROOT/"tutorials").rglob("*.ipynb")), ids=lambda p: str(p.relative_to(ROOT)))
def test_notebooks_are_small_and_carry_no_widget_state(path):
    assert path.stat().st_size < 2.5e6 and "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]
    if path.parent.name in ("student", "solved"): assert not any(c.get("outputs") for c in cells_of(path))

@every_master
def test_links_name_what_exists(path):
    found = re.findall(r"`((?:nbs|instructvideo_kit|tutorials)/[\w/.]+)`", text_of(path, "markdown"))
    missing = [f for f in found if not any((ROOT/(f + e)).exists() for e in ("", ".ipynb"))]
    others = [f for f in re.findall(r"`(\d\d_\w+)`", text_of(path, "markdown"))
              if not list(ROOT.glob(f"tutorials/{f}*.ipynb")) + list(ROOT.glob(f"nbs/*/{f}.ipynb"))]
    assert missing == [] and others == []

# The times on the cards

SAID = "Starting /x/a.ipynb\nSuccess.\na.ipynb: 60 secs\nb.ipynb: 200 secs\nc.ipynb: 130 secs\n"

def test_times_are_read(): assert ci.seconds_of(SAID) == {"a.ipynb": 60, "b.ipynb": 200, "c.ipynb": 130}

def test_output_is_passed_on_and_kept(capfd):
    assert (ci.spoken([sys.executable, "-c", "print('x.ipynb: 3 secs'); raise SystemExit(2)"])
            == (2, "x.ipynb: 3 secs\n"))
    assert "3 secs" in capfd.readouterr().out

def test_a_card_that_is_off_is_named_and_a_slow_machine_is_not():
    lines = ci.beside_cards(ci.seconds_of(SAID), {"a.ipynb": .5, "b.ipynb": .5, "c.ipynb": 1.})
    assert [("WARNING" in line) for line in lines] == [False, True, False, False]
    assert "2.17 times" in lines[-1] and "off" in lines[-1]
    assert not any("WARNING" in line for line in ci.beside_cards({"a": 30, "b": 60, "c": 90}, {"a": 1, "b": 2, "c": 3}))
    # five seconds are nothing
    assert not any("WARNING" in line for line in ci.beside_cards({"a": 1, "b": 60, "c": 60}, {"a": .1, "b": 1, "c": 1}))
    assert ci.beside_cards({"a": 30}, {"a": None}) == []

# The symbol table and the pages made from the modules

def symbols():
    return [line.split("|")[2].strip().strip("`")
            for line in (ROOT/"docs/symbols.md").read_text(encoding="utf-8").splitlines() if line.startswith("| $")]

@pytest.mark.parametrize("name", symbols())
def test_every_symbol_exists(name):
    import dataclasses
    import importlib
    import inspect
    dotted, _, parameter = name.partition(":")
    room, module, *rest = dotted.split(".")
    thing = getattr(importlib.import_module(f"instructvideo_kit.{room}.{module}"), rest[0])
    if len(rest) > 1: assert rest[1] in {f.name for f in dataclasses.fields(thing)} or hasattr(thing, rest[1])
    if parameter: assert parameter in inspect.signature(thing).parameters

def test_there_are_symbols(): assert len(symbols()) > 25 and len(set(symbols())) == len(symbols())

def fields_named(text, preset):
    "Fields in the second column of a table that the config of the preset does not have."
    import dataclasses

    from instructvideo_kit.tuning.algorithm import find
    known = {field.name for field in dataclasses.fields(find(preset).Config)}
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("| ") and line.count("|") >= 3]
    return set(re.findall("`([a-z_0-9]+)`", " ".join(rows[1:]))), known

def test_fields_of_other_trainers_exist():
    text = (ROOT/"docs/coming_from_trl.md").read_text(encoding="utf-8")
    parts = re.findall(r"^## [^\n]*: `(\w+)`\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert [preset for preset, _ in parts] == ["ddpo", "draft", "grpo", "nft"]
    for preset, part in parts:
        named, known = fields_named(part, preset)
        assert named and named <= known, named - known

docs = tool("docs_pages", "tools/docs.py")

def test_a_page_shows_a_table_of_parameters_and_nothing_of_the_body():
    page = docs.api_page(ROOT/"instructvideo_kit/reward/tar.py")
    assert "# instructvideo_kit.reward.tar" in page and "## tar_weights" in page
    row = next(line for line in page.splitlines() if line.startswith("| `lam` |"))
    assert "`float`" in row and "`1.0`" in row and "decay" in row and "Eq. (7)" in page and "Returns `" in page
    assert "torch.exp" not in page and "nbs/reward/02_tar.ipynb" in page

def test_classes_show_fields_and_methods():
    page = docs.api_page(ROOT/"instructvideo_kit/tuning/instructvideo.py")
    assert "| `tau` | `float` | `0.6` | noise level" in page
    assert "### InstructVideo.step" in page and "| `positions` |" in page and "### InstructVideoConfig.check" in page

slides = tool("slides", "tools/slides.py")
PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg==")

def drawn(text, **data): return {**cell(text), "outputs": [dict(output_type="display_data", data=data)]}

def deck():
    "Slides of a small tutorial: a picture, a film, a table of numbers, an exercise, a formula, a quiz."
    film = "<div><video src='x'></video><video src='y'></video></div>"
    nb = small()
    nb["cells"][1:1] = [
        cell("**Predict first.** Is it red, or is it blue? Write it down.", "markdown"),
        cell("## A picture\n\nIt is e.g. red. More.\n\n**Predict:** what colour? The answer comes below.", "markdown"),
        drawn("plot()", **{"image/png": PIXEL, "text/plain": "<Figure>"}),
        cell("The answer: it is blue. And so on.", "markdown"),
        drawn("table()", **{"text/html": "<table></table>"}), drawn("show()", **{"text/html": film}),
        cell("## A formula\n\nFirst. This leads to it:\n\n$$\\bar\\alpha_t = \\frac{a}{b}$$", "markdown")]
    nb["cells"] += [cell("## Quiz\n\n**1.** Why? (a) So. (b) No.\n\n**2.** What? (a) It. (b) Else.", "markdown"),
                    cell("<details><summary>Answer</summary>1 a: so. 2 b: else.</details>", "markdown")]
    return slides.slides_of(nb)

def test_slides_are_pictures_and_a_sentence():
    made = deck()
    seen = [(s.title, s.say, s.kind) for s in made]
    assert seen[:3] == [("Title", "subtitle", "title"), ("Predict first", "Is it red, or is it blue?", "ask"),
                        ("A picture", "what colour?", "ask")]
    picture, film = made[3], made[4]
    assert PIXEL in picture.show and picture.say == "It is e.g. red."
    assert picture.answer == "The answer: it is blue. And so on."
    assert film.show.count("<video") == 2 and not any("<table>" in s.show for s in made)

def test_slides_hold_no_code():
    text = "".join(map(slides.slide_html, deck()))
    assert not any(word in text for word in ("plot()", "def my_double", "check.double", "<pre>", "doctor"))

def test_a_formula_is_set_where_it_can_be():
    formula = deck()[5]
    assert formula.say == "This leads to it:" and "image/svg+xml" in formula.show
    assert "$$" in slides.formula_html("$$\\begin{cases} a \\end{cases}$$") # matplotlib cannot: left for MathJax
    inline = slides.line("It is $\\tau < 1$, not `$x`.")
    assert inline.startswith("It is <img") and "<code>$x</code>" in inline and "vertical-align" in inline

def test_each_question_is_a_slide_whose_answer_opens():
    first, second = deck()[-2:]
    assert first.options == ["(a) So.", "(b) No."] and first.answer == "1 a: so." and second.answer == "2 b: else."
    assert '<p class="answer">' in slides.slide_html(first)

def test_sentences_end_where_they_end():
    text = "See Eq. (3). It holds for $a. B$ too! What is `x. Y`? Yes."
    assert slides.sentences(text) == ["See Eq. (3).", "It holds for $a. B$ too!", "What is `x. Y`?", "Yes."]

@every_master
def test_slides_of_each_tutorial(path):
    made = slides.slides_of(json.loads(path.read_text(encoding="utf-8")))
    exercises = [c for c in cells_of(path) if editions.directive(c)[0] == "graded"]
    assert made[0].kind == "title" and made[1].kind == "ask" and all(s.title for s in made)
    assert sum("question" in s.title for s in made) == 3 and all(s.answer for s in made if "question" in s.title)
    assert sum(s.title.startswith("Exercise") and not s.show for s in made) >= len(exercises)

# The map of the course, and what each tutorial needs

course_map = tool("course_map", "tools/course_map.py")

@pytest.fixture(scope="module")
def drawn_map(): return course_map.course_map()

def test_the_map_has_every_tutorial(drawn_map):
    assert sorted(n for part in drawn_map["PARTS"].values() for n in part) == [int(p.name[:2]) for p in MASTERS]

def numbers_of(text):
    "1, 3, 4, 5 of `tutorials 01, 03 to 05: ...`."
    found = {int(n) for n in re.findall(r"\b(\d\d)\b", text)}
    for first, last in re.findall(r"\b(\d\d) to (\d\d)\b", text): found |= set(range(int(first), int(last) + 1))
    return found

@every_master
def test_arrows_of_the_map_lead_to_all_that_a_card_asks_for(path, drawn_map):
    known = editions.KNOWN.search(editions.source(cells_of(path)[1]))[1]
    missing = numbers_of(known) - course_map.needed(drawn_map["NEEDS"], int(path.name[:2]))
    assert not missing, f"the card asks for {sorted(missing)}, to which no arrow leads back"

def test_numbers_on_a_card_are_read():
    assert numbers_of("tutorials 01, 03 to 05 and 08: noise") == {1, 3, 4, 5, 8} and numbers_of("nothing") == set()

def test_needed_follows_arrows(): assert course_map.needed(((2, 3), (3, 4), (5, 6)), 4) == {1, 2, 3}

INSTRUCTOR = ROOT/"tutorials/instructor"

@pytest.mark.parametrize("page", sorted(INSTRUCTOR.glob("*.md")), ids=lambda p: p.stem)
def test_instructors_pages_name_what_exists(page):
    text = page.read_text(encoding="utf-8")
    links = [p for p in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in p]
    exercises = {name for p in MASTERS for kind, name, _ in map(editions.directive, cells_of(p)) if kind == "graded"}
    named = re.findall(r"`check\.(\w+)`", text)
    assert [p for p in links if not (page.parent/p).exists()] == [] and set(named) <= exercises, set(named) - exercises

def test_notes_name_sections_that_exist():
    text = (INSTRUCTOR/"teaching_notes.md").read_text(encoding="utf-8").split("## In the room")[0]
    for number, met in re.findall(r"(?m)^\| (\d\d) \|.*\| ([^|]+) \|$", text):
        (path,) = [p for p in MASTERS if p.name.startswith(number)]
        headings = re.findall(r"(?m)^#{1,2} (.+)", text_of(path, "markdown"))
        for name in re.findall(r"\*([^*]+)\*", met):
            assert any(h.startswith(name) for h in headings), f"{number}: no section {name}"
        for name in re.findall(r"`check\.(\w+)`", met):
            assert f"#| graded {name} " in text_of(path), f"{number}: {name}"

def test_every_tutorial_has_misconceptions():
    text = (INSTRUCTOR/"teaching_notes.md").read_text(encoding="utf-8").split("## In the room")[0]
    rows = re.findall(r"(?m)^\| (\d\d) \|", text)
    assert all(rows.count(p.name[:2]) >= 2 for p in MASTERS), sorted(rows)

@every_master
def test_quiz_is_of_the_usual_form(path):
    from instructvideo_kit.check.quiz import QUIZZES
    (questions,) = [s for s in map(editions.source, cells_of(path)) if "## Quiz" in s]
    called = re.search(r"(?m)^check\.quiz\('(\w+)', '([abc])', '([abc])', '([abc])'\);$", text_of(path, "code"))
    assert called, "the answers at once"
    assert list(called.groups()[1:]) == [q.right for q in QUIZZES[called[1]]]
    student = text_of(ROOT/"tutorials/student"/path.name, "code")
    assert f"check.quiz('{called[1]}', None, None, None);" in student and called[0] not in student, "all open"
    asked = re.split(r"(?m)^\*\*(?=[123]\.\*\* )", questions.split("## Quiz")[1])[1:]
    assert [q[0] for q in asked] == ["1", "2", "3"]
    assert all(f"({letter}) " in q.replace("\n", " ") for q in asked for letter in "abc")
    answer = re.search(r"<summary>Answer</summary>(.*?)</details>", text_of(path, "markdown"), re.S)[1]
    for i, question in enumerate(QUIZZES[called[1]], 1):
        assert re.search(rf"\b{i} {question.right}\b", answer), f"question {i}: {question.right}"
