"""`make slides`: a presentation of each master tutorial in build/slides, made of its pictures and a sentence each.

No code, no cell. A section gives a slide per picture that its cells left in the master: the heading, a sentence, the
picture or film, and the answer where the text gives one. A prediction, a formula, an exercise and each question of the
quiz are slides, too. The tutorial's own text stands in the notes (key n). A page is one file. Formulas are pictures;
for the few that matplotlib cannot set it fetches MathJax, and without a network these stay as they are written.
"""
import argparse
import base64
import html
import io
import json
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Template

from editions import directive, masters, source

ROOT = Path(__file__).resolve().parent.parent
MATHJAX = "https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-chtml.js"
FORMULAS = """<script>MathJax = {{ tex: {{ inlineMath: [["$", "$"]] }} }}</script>
<script async src="{}"></script>"""
LEFT_OUT = ("Set-up", "What we left out") # sections without slides
# what a prediction says beside its question
REMARK = re.compile(r"Write|Then |(?:The|Your) (?:answer|section|table|picture|cell)|Below|Both answers")
TOLD = re.compile(r"(?:The|Your|To the) (?:answer|prediction|picture|curve|bar|line|film|strip|clip)|"
                  "Above|Left|Right|Both|In the ") # what a text says of the picture above it
ABBREVIATION = re.compile(r"\b(?:Eq|Fig|Tab|Sec|e\.g|i\.e|vs|et al)\.$")


@dataclass
class Slide:
    "A heading, a sentence, something to look at, an answer, notes."
    title: str
    say: str = "" # markdown, a sentence
    kind: str = "say" # class of the sentence: "say", or "ask" for a prediction
    show: str = "" # HTML of a picture, a film or a formula
    options: list = field(default_factory=list) # of a question
    answer: str = "" # markdown, opened by a key
    notes: str = "" # markdown


# Formulas

# what matplotlib does not know, and what it may have instead
MATHTEXT = ((r"\lVert", r"\|"), (r"\rVert", r"\|"), (r"\lvert", "|"), (r"\rvert", "|"), (r"\dots", r"\ldots"),
            (r"\tfrac", r"\frac"), (r"\!", ""), (r"\big", ""), (r"\Big", ""), (r"\bigl", ""), (r"\bigr", ""))


FORMULA = re.compile(r"\$\$.+?\$\$|\$[^$\n]+\$", re.S)


@cache
def formula_html(formula):
    "A formula as a picture as large as its text, where matplotlib can set it; else as it is written, for MathJax."
    tex = " ".join(formula.strip("$").split())
    for ours, theirs in MATHTEXT: tex = re.sub(re.escape(ours) + "(?![a-z])", lambda _, to=theirs: to, tex)
    tex = re.sub(r"\\(mathbb|mathcal|hat|bar|tilde|sqrt) ?([A-Za-z])(?![A-Za-z])", r"\\\1{\2}", tex)
    try: picture, style = set_formula(f"${tex}$")
    except ValueError: return html.escape(formula)
    return f'<img class="set" style="{style}" alt="{html.escape(formula)}" src="data:image/svg+xml;base64,{picture}">'


def set_formula(text, size=20):
    "(picture in base64, its size and place on the line in units of the text's); ValueError for what cannot be set."
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser
    width, height, depth, *_ = MathTextParser("path").parse(text, dpi=72, prop=(font := FontProperties(size=size)))
    figure = Figure(figsize=((width + 2)/72, (height + 2)/72))
    figure.text(1/(width + 2), (depth + 1)/(height + 2), text, fontproperties=font)
    figure.savefig(made := io.BytesIO(), format="svg", transparent=True)
    style = f"height: {(height + 2)/size:.3f}em; vertical-align: {-(depth + 1)/size:.3f}em"
    return base64.b64encode(made.getvalue()).decode(), style


def rendered(text):
    "Markdown as HTML; formulas outside of code as pictures."
    from nbconvert.filters import markdown2html
    parts = re.split(r"(<code.*?</code>|<pre.*?</pre>)", markdown2html(text), flags=re.S)
    for i in range(0, len(parts), 2):
        parts[i] = FORMULA.sub(lambda m: formula_html(html.unescape(m[0])), parts[i])
    return "".join(parts)


def line(text):
    "A sentence as HTML without the paragraph around it."
    return re.sub(r"^\s*<p>|</p>\s*$", "", rendered(text).strip())


# Sentences

def prose(text):
    "The paragraphs of a markdown text: no headings, tables, lists, formulas, HTML."
    text = re.sub(r"\$\$.*?\$\$", "", text, flags=re.S)
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
    return [p for p in paragraphs if p and not re.match(r"#|\||[*-] |\d+\. |>|<|```", p)]


def sentences(paragraph):
    "A paragraph's sentences; a full stop inside a formula, code or an abbreviation ends none."
    found, start = [], 0
    for match in re.finditer(r"[.?!:][*)]*\s+(?=[*(\"]*[A-Z`$])", paragraph):
        piece = paragraph[start:match.end()].strip()
        if piece[-1] == ":" or ABBREVIATION.search(piece) or piece.count("$") % 2 or piece.count("`") % 2: continue
        found, start = [*found, piece], match.end()
    return [*found, paragraph[start:].strip()] if paragraph[start:].strip() else found


def first_sentence(text):
    "The first sentence of a text that says something: no prediction, no invitation to try, no answer."
    for paragraph in prose(text):
        if not re.match(r"\*\*(Predict|Try)|(The|Your) answer", paragraph): return sentences(paragraph)[0]
    return ""


def prediction(text):
    "What a text asks the reader to predict, or nothing."
    for paragraph in prose(text):
        found = re.search(r"\*\*Predict(?: first)?[.:]?\*\*[.:,]?\s*(.*)", paragraph)
        if found: return " ".join(s for s in sentences(found[1]) if not REMARK.match(s))
    return ""


def answer_to(text):
    "What a text says of the picture above it, or answers to the prediction: its first sentences, or nothing."
    for paragraph in prose(text)[:2]:
        if TOLD.match(paragraph): return " ".join(sentences(paragraph)[:2])
    return ""


def before_formula(text, formula):
    "The sentence that leads to a formula, or the first one of the text."
    for paragraph in reversed(re.split(r"\n\s*\n", text.split(formula)[0])):
        if found := prose(paragraph): return sentences(found[-1])[-1]
    return first_sentence(text)


# Pictures

def films(text):
    "How many films or pictures an HTML output holds."
    return len(re.findall(r"<(?:video|img)\b", text))


def shown(output):
    "HTML of an output that can be looked at, or nothing; a table of numbers is no picture."
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="" src="data:image/png;base64,{picture}">'
    if "image/svg+xml" in data:
        picture = base64.b64encode("".join(data["image/svg+xml"]).encode()).decode()
        return f'<img alt="" src="data:image/svg+xml;base64,{picture}">'
    text = "".join(data.get("text/html", ""))
    if not films(text): return ""
    width = min(40, 84//films(text)) # of the screen's, so that they stand in one row while there is room for it
    return f'<div class="film" style="--film: {max(14, width)}vw">{text}</div>'


def pictures(cell):
    "What the outputs of a cell show."
    return [found for output in cell.get("outputs", []) if (found := shown(output))]


# Slides

def sections(nb):
    "(heading, cells) for each part of a notebook that a heading of the first two levels opens."
    found = []
    for cell in nb["cells"]:
        parts = [source(cell)]
        if cell["cell_type"] == "markdown": parts = re.split(r"(?m)^(?=#{1,2} )", source(cell))
        for part in filter(str.strip, parts):
            heading = re.match(r"#{1,2} (.+)", part) if cell["cell_type"] == "markdown" else None
            if heading or not found: found.append((heading[1].strip() if heading else "", []))
            found[-1][1].append({**cell, "source": part})
    return found


def exercise_slides(title, cells):
    "An exercise: its task in a sentence or two, and how long it takes."
    text = source(cells[0])
    row = re.search(r"\|\s*\d of 3\s*\|\s*\d of 3\s*\|\s*(\d+)\s*\|\s*(\d+)\s*\|", text)
    about = f" ({row[1]} minutes, about {row[2]} lines)" if row else ""
    task = [s for paragraph in prose(text)[:2] for s in sentences(paragraph)]
    return [Slide(title + about, " ".join(task[:2]), notes=text)]


def quiz_slides(title, cells):
    "A slide per question, with its options; the answer opens."
    text = "\n\n".join(source(c) for c in cells if c["cell_type"] == "markdown")
    told = re.search(r"<summary>Answer</summary>(.*?)</details>", text, re.S)
    answers = re.split(r"(?:^|\s)(?=[123] [abc]\b)", told[1])[1:] if told else []
    found = []
    for number, part in enumerate(re.split(r"(?m)^\*\*[123]\.\*\* ", text.split("<details>")[0])[1:]):
        question, *options = re.split(r"\s\((?=[abc]\) )", " ".join(part.split()))
        answer = answers[number].strip() if number < len(answers) else ""
        options = [f"({option}" for option in options]
        found.append(Slide(f"{title}, question {number + 1}", question, options=options, answer=answer))
    return found


def picture_slides(title, cells):
    "A section: a prediction, formulas, and a slide per picture."
    found, before = [], ""
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            before = source(cell)
            if asked := prediction(before): found.append(Slide(title, asked, "ask", notes=before))
            for formula in re.findall(r"\$\$.*?\$\$", before, re.S)[:2]:
                large = f'<div class="formula">{formula_html(formula)}</div>'
                found.append(Slide(title, before_formula(before, formula), show=large, notes=before))
            continue
        after = source(cells[i + 1]) if i + 1 < len(cells) and cells[i + 1]["cell_type"] == "markdown" else ""
        for picture in pictures(cell):
            found.append(Slide(title, first_sentence(before), show=picture, answer=answer_to(after), notes=before))
    return found


def slides_of(nb):
    "The slides of a master."
    (title, opening), *others = sections(nb)
    text = "\n\n".join(source(c) for c in opening)
    subtitle = re.search(r"(?m)^> (.+)", text)
    found = [Slide(title, subtitle[1] if subtitle else "", "title", notes=text)]
    if asked := prediction(text): found.append(Slide("Predict first", asked, "ask", notes=text))
    found += picture_slides(title, opening)[1:] if prediction(text) else picture_slides(title, opening)
    for heading, cells in others:
        if heading.startswith(LEFT_OUT): continue
        make = picture_slides
        if heading.startswith("Quiz"): make = quiz_slides
        elif heading.startswith("Exercise"): found += exercise_slides(heading, cells)
        found += make(heading, [c for c in cells if not directive(c)[0]])
    return found


def slide_html(slide):
    "A slide as a section of the page."
    head = "h1" if slide.kind == "title" else "h2"
    parts = [f"<{head}>{line(slide.title)}</{head}>"]
    if slide.say: parts.append(f'<p class="{slide.kind}">{line(slide.say)}</p>')
    options = "".join(f"<li>{line(option)}</li>" for option in slide.options)
    if options: parts.append(f'<ul class="options">{options}</ul>')
    if slide.show: parts.append(f'<div class="show">{slide.show}</div>')
    if slide.answer: parts.append(f'<p class="answer">{line(slide.answer)}</p>')
    if slide.notes: parts.append(f"<aside>{rendered(slide.notes)}</aside>")
    return "<section>" + "\n".join(parts) + "</section>"


def page(nb, formulas=MATHJAX):
    "The whole presentation of a master as one page."
    slides = slides_of(nb)
    template = Template((Path(__file__).resolve().parent/"slides.html").read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(slides[0].title), slides="\n".join(map(slide_html, slides)),
                               formulas=FORMULAS.format(formulas) if formulas else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mathjax", default=MATHJAX, help="address of MathJax; empty: none")
    parser.add_argument("prefixes", nargs="*", help="only tutorials whose names begin so")
    chosen, out = parser.parse_args(), ROOT/"build/slides"
    out.mkdir(parents=True, exist_ok=True)
    empty = []
    for path in masters(chosen.prefixes):
        nb = json.loads(path.read_text(encoding="utf-8"))
        (out/f"{path.stem}.html").write_text(page(nb, chosen.mathjax), encoding="utf-8")
        n = sum(bool(re.search("<video|image/png|image/gif|class=.film", s.show)) for s in slides_of(nb))
        print(f"slides: {path.stem}: {len(slides_of(nb))}, {n} with a picture", flush=True)
        if not n: empty.append(path.name)
    if empty: sys.exit(f"slides: {', '.join(empty)} hold no pictures: run the masters first, so that they do")
    print(f"slides: open {out}/*.html; right arrow: on, n: notes")


if __name__ == "__main__": main()
