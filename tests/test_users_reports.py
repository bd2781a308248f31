"The page of users' reports names tests that exist, has a row for each report, and can be found."
import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT/"docs/users_reports.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE)))
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines()
        if re.match(r"\| \d+ \|", line)]


@cache
def names_in(file):
    "Names of the test functions of a file."
    tree = ast.parse((ROOT/"tests"/file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("file, name", NAMED, ids=lambda x: x)
def test_a_test_that_is_named_exists(file, name): assert name in names_in(file)


def test_each_report_has_a_row_with_an_answer_and_a_test():
    assert [int(row[0]) for row in ROWS] == list(range(1, 26))
    for number, report, answer, tests in ROWS:
        assert len(report) > 15 and len(answer) > 15, number
        assert re.findall(r"`test_\w+\.py::\w+`", tests), number


def test_nothing_else_is_called_a_test():
    "A slip in the form of a name would hide it from the check above."
    assert not re.sub(r"`test_\w+\.py::\w+`", "", PAGE).replace("tests/test_users_reports.py", "").count("test_")


def test_the_page_can_be_found(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("docs_of_reports", ROOT/"tools/docs.py")
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    monkeypatch.setattr(docs, "PAGES", tmp_path)
    nav = docs.from_docs()
    assert {"Users' reports": "users_reports.md"} in nav
    assert (tmp_path/"users_reports.md").read_text(encoding="utf-8") == PAGE
    assert "docs/users_reports.md" in (ROOT/"CONTRIBUTING.md").read_text(encoding="utf-8")
