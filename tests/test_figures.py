"""No measured figure without a source: what README, the page of logs and the tutorials say was measured is in a file.

The rule. A sentence with a word of MEASURED in it and a decimal or a percentage states a result.
In the README and in tutorials/logs/README.md each such number stands in the lines that SOURCES names for the sentence.
In a tutorial it stands in the output of a cell further up in the same notebook.
Whatever is no result (a quantile, a setting, an example, a figure of a paper) is in ALLOWED, with its reason.
Questions, quizzes, folded answers, cards and formulas are left out: they state no result. The scoreboard's page is
written from the results by a program, so here its template is looked at, which must hold no figure of its own.
"""
import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MEASURED = re.compile(
    r"\b(reward|gain|flicker|mark|accura|win|won|score|likeness|sharp|colour|error|loss|correlat|share|weight|subject|"
    r"faster|slower|seconds|counted|noise level)", re.I)
NUMBER = re.compile(r"(?<![\w./^*-])[+-]?(?:\d*\.\d+|\d+(?:\.\d+)?(?= ?%))(?![\w.]*\d)")
LEFT_OUT = re.compile("|".join((
    r"(?ms)^ *```.*?^ *```", r"<!-- tutorials -->.*?<!-- /tutorials -->", r"^\| minutes \|.*?$",
    r"<details>.*?</details>", r"\$\$.*?\$\$", r"\$[^$]*\$", r"`[^`\n]*`", r"\]\([^)]*\)",
    r"\b[Ss]ections? [\d.]+", r"arXiv [\d., ]+")))
DEFINED = {"95 %": "a level of intervals", "5 %": "its rest", ".025": "its quantile", ".975": "its quantile",
           "2.5 %": "its quantile", "97.5 %": "its quantile", "1.96": "its quantile under a normal distribution"}
ALLOWED = { # page -> {number: why it needs no source}
    "tutorials/04_editing_from_tau.ipynb": dict.fromkeys(("0.5", "0.6", "0.9"), "noise levels of the paper's Fig. 5b"),
    "tutorials/07_segvr_and_tar.ipynb": {"7.5": "the middle of the frames 0 to 15"},
    "tutorials/09_instructvideo_end_to_end.ipynb": {"0.135": "mean weight of Eq. (7) for 16 frames; a test has it"},
}
# page -> [(words of the sentence, file, lines of the file that may hold its numbers)]
DEMO = "reproduction/menagerie64/demo_seeds.json"
SOURCES = {
    "README.md": [
        ("the reward rises by", DEMO, r'"(reward|dullness|blurriness|flicker)":'),
        ("strict oracle finds the right subject", DEMO, r'"species":'),
        ("GRPO, which never sees", "tutorials/logs/grpo/comparison.md", r"^\| (reward|species) \| all"),
        ("The difference in reward is", "reproduction/README.md", r"^\*\*The main claim"),
        ("by a reward of +.32", "reproduction/README.md", r"^\*\*The main claim"),
        ("by a reward of +.46", "reproduction/README.md", r"^\*\*The main claim"),
        ("were counted tensor by tensor", "nbs/tuning/30_memory.ipynb", r""),
    ],
}


def sentences(text):
    "Sentences, list items and rows of a table, without code, formulas, cards and what is folded away."
    text = LEFT_OUT.sub("", text)
    ends = r"(?<=[.!?])\s+(?=[A-Z*\[(])|\n\s*\n|\n(?=[-*|] )|\n(?=\d\. )"
    return [" ".join(sentence.split()) for sentence in re.split(ends, text)]


def figures(sentence):
    "The numbers of a sentence that states a measured result; `12 %` keeps its sign of per cent."
    if not MEASURED.search(sentence) or sentence.endswith("?"): return []
    found = [(m[0], sentence[m.end():m.end() + 2].strip().startswith("%")) for m in NUMBER.finditer(sentence)]
    written = [f"{number} %" if percent else number for number, percent in found]
    return [number for number in written if number.lstrip("+").replace("0.", ".") not in DEFINED]


def numbers_in(text):
    return [abs(float(x)) for x in re.findall(r"(?<![\w.])[+-]?(?:\d+\.\d+|\.\d+|\d+)(?:e-?\d+)?", text)]


def stands_in(number, numbers):
    "Is a number, as it is written, one of `numbers` rounded? A percentage may also stand there as a share."
    digits = number.removesuffix(" %").lstrip("+-")
    places = len(digits.partition(".")[2])
    def same(x): return abs(x - float(digits)) <= .5001*10**-places
    return any(same(x) or (number.endswith("%") and same(100*x)) for x in numbers)


def outputs(cell):
    "The text that a cell has printed."
    texts = []
    for out in cell.get("outputs", []):
        texts += out.get("text", []) if out["output_type"] == "stream" else out.get("data", {}).get("text/plain", [])
        texts += out.get("data", {}).get("text/markdown", [])
    return "".join(texts)


@cache
def lines_of(path, pattern):
    "The lines of a file, or of what a notebook has printed, that match."
    text = (ROOT/path).read_text(encoding="utf-8")
    if path.endswith(".ipynb"): text = "\n".join(outputs(cell) for cell in json.loads(text)["cells"])
    return "\n".join(line for line in text.splitlines() if re.search(pattern, line))


def without_source(sentence, numbers, allowed=()):
    "Numbers of a sentence that are neither allowed nor among the numbers of its source."
    return [n for n in figures(sentence) if n not in allowed and not stands_in(n, numbers)]


# README

def sources_of(page, sentence): return [(file, lines) for words, file, lines in SOURCES[page] if words in sentence]


def unsourced_on_a_page(page, text):
    "{sentence: numbers} of a page whose sentences have sources."
    found = {}
    for sentence in sentences(text):
        numbers = numbers_in("\n".join(lines_of(*source) for source in sources_of(page, sentence)))
        if missing := without_source(sentence, numbers, ALLOWED.get(page, ())): found[sentence] = missing
    return found


@pytest.mark.parametrize("page", SOURCES)
def test_figures_of_the_page_have_a_source(page):
    text = (ROOT/page).read_text(encoding="utf-8")
    assert unsourced_on_a_page(page, text) == {}
    for words, file, lines in SOURCES[page]:
        assert words in " ".join(text.split()) and lines_of(file, lines), f"{words}: {file} has no such line"


# The page of logs: a row's folder is its source

def log_numbers(folder):
    "Figures over all captions; of the log the first and last reward, its mean in each quarter, mean fresh accuracy."
    compared, log = folder/"comparison.md", folder/"log.jsonl"
    text = compared.read_text(encoding="utf-8") if compared.exists() else ""
    numbers = numbers_in("\n".join(line for line in text.splitlines() if "| all |" in line))
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    rewards = [row["reward"] for row in rows if row.get("kind") == "step" and "reward" in row]
    fresh = [row["fresh_accuracy"] for row in rows if "fresh_accuracy" in row]
    if fresh: numbers.append(sum(fresh)/len(fresh))
    if not rewards: return numbers
    quarters = [rewards[i*len(rewards)//4:(i + 1)*len(rewards)//4] for i in range(4)]
    return numbers + [abs(x) for x in (rewards[0], rewards[-1], *(sum(q)/len(q) for q in quarters if q))]


def unsourced_logs(text, root):
    found = {}
    for row in re.findall(r"(?m)^\| `.*$", text):
        told = row.split("|", 3)[3]
        numbers = [x for name in re.findall(r"`([\w.-]+)/`", row.split("|")[1]) for x in log_numbers(root/name)]
        missing = [n for sentence in sentences(told) for n in without_source(sentence, numbers)]
        if missing: found[row.split("|")[1].strip()] = missing
    return found


def test_figures_of_the_logs_are_in_the_logs():
    logs = ROOT/"tutorials/logs"
    assert unsourced_logs((logs/"README.md").read_text(encoding="utf-8"), logs) == {}


def test_the_template_of_the_scoreboard_holds_no_figure():
    text = (ROOT/"instructvideo_kit/measure/page.md").read_text(encoding="utf-8").replace("$", "") # of its blanks
    assert {s: figures(s) for s in sentences(text) if figures(s)} == {} and len(sentences(text)) > 5


# Tutorials

def unsourced_in_a_notebook(cells, allowed=()):
    "{sentence: numbers} that no cell above has printed."
    found, seen = {}, []
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code": seen += numbers_in(outputs(cell))
        elif "## Quiz" not in text:
            for sentence in sentences(text):
                if missing := without_source(sentence, seen, allowed): found[sentence] = missing
    return found


@pytest.mark.parametrize("path", sorted((ROOT/"tutorials").glob("*.ipynb")), ids=lambda p: p.stem)
def test_figures_of_a_tutorial_stand_in_an_output_above(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert unsourced_in_a_notebook(cells, ALLOWED.get(path.relative_to(ROOT).as_posix(), ())) == {}


def test_what_is_allowed_is_still_there():
    for page, numbers in ALLOWED.items():
        text = (ROOT/page).read_text(encoding="utf-8")
        assert [n for n in numbers if n.removesuffix(" %") not in text] == [], page
        assert all(len(reason) > 8 for reason in numbers.values()), page


def test_the_mean_weight_that_tutorials_quote():
    from instructvideo_kit.reward.tar import expected_weights
    assert round(float(expected_weights(16, 4, 1.).mean()), 3) == .135


# The test is tested

def test_figures_are_read():
    assert figures("The reward rises by .16 (95 % interval +.12 to 0.20), 12.5 % of it at once.") == [
        ".16", "+.12", "0.20", "12.5 %"]
    assert figures("Does the reward rise by .5?") == []
    assert figures("Python 3.10 and tau = 0.6.") == [] and figures("Its quantile .975 of the reward.") == []
    assert sentences("A reward. B `code .5` $x = .7$.\n\n| minutes | 2.5 |\n* c") == ["A reward.", "B .", "* c"]


def test_a_number_is_found_rounded_to_the_digits_it_is_written_with():
    assert stands_in(".16", [.1616]) and stands_in("-.014", [.0139]) and stands_in("84 %", [.8401])
    assert stands_in("12.5 %", [12.48]) and not stands_in(".17", [.1616]) and not stands_in("84 %", [.83])


def test_made_up_figures_are_noticed():
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    assert unsourced_on_a_page("README.md", readme.replace("rises by .46", "rises by .71"))
    assert unsourced_on_a_page("README.md", f"{readme}\n\nGRPO gains .123 of reward in a minute.")
    logs = ROOT/"tutorials/logs"
    page = (logs/"README.md").read_text(encoding="utf-8")
    assert list(unsourced_logs(page.replace("+.087", "+.099"), logs)) == ["`grpo/`"]
    printed = dict(cell_type="code", source="", outputs=[dict(output_type="stream", text=["reward 0.4213\n"])])
    said = dict(cell_type="markdown", source="The reward is .42 now.")
    assert unsourced_in_a_notebook([printed, said]) == {}
    assert unsourced_in_a_notebook([said, printed]) == {said["source"]: [".42"]} # the output has to stand above
    assert unsourced_in_a_notebook([printed, said | dict(source="The reward is .43 now.")])
