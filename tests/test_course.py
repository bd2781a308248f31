"The course: masters keep the conventions, editions are made from them, cards can be read, nothing is too large."
import ast, importlib.util, json, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("editions", ROOT/".ci/editions.py")
editions = importlib.util.module_from_spec(spec); spec.loader.exec_module(editions)

ANSWER = """#| answer double
def my_double(x):
    # twice
    ### BEGIN SOLUTION
    # a comment is no line of the budget
    y = 2 * x

    return y
    ### END SOLUTION
"""
GRADED = "#| graded double 2\nright = check.double(my_double)\n### BEGIN HIDDEN TESTS\nassert right\n### END HIDDEN TESTS"

def cell(text, kind="code"):
    extra = dict(outputs=[dict(output_type="stream", name="stdout", text="1")], execution_count=3) if kind == "code" else {}
    return dict(cell_type=kind, id=str(abs(hash(text)))[:8], metadata={}, source=text, **extra)

def notebook(*cells): return dict(cells=[cell("# Title\n> subtitle", "markdown"), *cells], metadata={}, nbformat=4, nbformat_minor=5)

def small():
    setup, hint = cell("#| setup\nfrom instructvideo_kit import doctor"), cell("<details><summary>Hint 1</summary>Twice.</details>", "markdown")
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
    assert (answer["grade"], answer["solution"], graded["grade"], graded["locked"], graded["points"]) == (False, True, True, True, 2)
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
    for p, t in wanted.items(): p.parent.mkdir(exist_ok=True); p.write_text(t)
    assert editions.stale(wanted) == [] and editions.strays(root) == []
    student = root/"tutorials/student/01_small.ipynb"
    student.write_text(student.read_text().replace("about 2 lines", "..."))
    (root/"tutorials/solved/02_gone.ipynb").write_text("{}")
    assert editions.stale(wanted) == [student] and [p.name for p in editions.strays(root)] == ["02_gone.ipynb"]

def test_writing_twice_changes_nothing(root):
    path = root/"tutorials/01_small.ipynb"
    for p, t in (first := editions.files_of(path)).items(): p.parent.mkdir(exist_ok=True); p.write_text(t)
    assert editions.files_of(path) == first
