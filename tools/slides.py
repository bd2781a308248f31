"""`make slides`: a reveal.js presentation of each master tutorial in build/slides, with its outputs.

A heading opens a slide, what follows stands below it (press down); set-up cells, checks and hints are left out, answers
are stubs. --reveal says where reveal.js is: an address, or a folder beside the slides. Nothing else is fetched but
MathJax; without a network formulas stay as they are written.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from editions import MARK, directive, masters, source, student_code

ROOT = Path(__file__).resolve().parent.parent
STARTER = """<style>.reveal .slides section section {{ max-height: 95vh; overflow-y: auto }}</style>
<script src="{reveal}/dist/reveal.js"></script>
<script src="{reveal}/plugin/notes/notes.js"></script>
<script>Reveal.initialize({{ controls: true, progress: true, history: true, slideNumber: true, transition: "none",
  width: 1200, height: 800, plugins: [RevealNotes] }})</script>
"""


def kind_of(cell, first):
    "slide, subslide or skip."
    text, kind = source(cell), directive(cell)[0]
    machinery = text.startswith(("import ", "from ", "MODEL,", "JUDGE,")) or "<summary>Hint" in text
    if kind in ("setup", "graded") or machinery: return "skip"
    return "slide" if first or re.match(r"#{1,2} ", text) else "subslide"


def split_headings(cell):
    "One markdown cell per heading in it, so that each heading opens a slide."
    if cell["cell_type"] != "markdown": return [cell]
    parts = [p for p in re.split(r"(?m)^(?=#{1,2} )", source(cell)) if p.strip()]
    return [{**cell, "id": f"{cell['id']}{i}" if i else cell["id"], "source": p} for i, p in enumerate(parts)]


def as_slides(nb):
    "The notebook with nbconvert's slide types; answers as students see them."
    cells = [part for cell in nb["cells"] for part in split_headings(cell)]
    for i, cell in enumerate(cells):
        cell["metadata"] = {"slideshow": {"slide_type": kind_of(cell, i == 0)}}
        if directive(cell)[0] == "answer": cell["source"] = student_code(source(cell))
        elif cell["cell_type"] == "code": cell["source"] = MARK.sub("", source(cell))
    return {**nb, "cells": cells}


def start_plainly(page, reveal):
    "The page without require.js and jQuery, which nbconvert loads from the network only to start reveal.js."
    page = re.sub(r'<script src="[^"]*(?:require|jquery)[^"]*"></script>', "", page)
    return re.sub(r"<script>\s*require\(.*?</script>", lambda _: STARTER.format(reveal=reveal), page, flags=re.S)


def build(path, reveal, out):
    with tempfile.TemporaryDirectory() as folder:
        notebook = Path(folder)/path.name
        notebook.write_text(json.dumps(as_slides(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
        where = f"--SlidesExporter.reveal_url_prefix={reveal}"
        command = [sys.executable, "-m", "nbconvert", "--to", "slides", where, "--log-level", "ERROR"]
        if subprocess.run([*command, "--output-dir", out, notebook]).returncode: return False
    page = out/f"{path.stem}.slides.html"
    page.write_text(start_plainly(page.read_text(encoding="utf-8"), reveal), encoding="utf-8")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    address = "https://cdn.jsdelivr.net/npm/reveal.js@4.6.1"
    parser.add_argument("--reveal", default=address, help="address or folder of reveal.js")
    parser.add_argument("prefixes", nargs="*", help="only tutorials whose names begin so")
    chosen = parser.parse_args()
    out = ROOT/"build/slides"
    bad = []
    for path in masters(chosen.prefixes):
        print(f"slides: {path.stem}", flush=True)
        if not build(path, chosen.reveal, out): bad.append(path.name)
    if bad: sys.exit(f"slides: failed for {', '.join(bad)}")
    print(f"slides: open {out}/*.slides.html; reveal.js comes from {chosen.reveal}")


if __name__ == "__main__": main()
