"""`make map`: the map of the course as a picture, tutorials/pictures/map.png, drawn by the cell of tutorial 01."""
import json

import matplotlib
from editions import ROOT, masters, source

matplotlib.use("Agg")


def map_code(root=ROOT):
    "The cell of the first tutorial that draws the map."
    (first,) = masters(["01"], root)
    cells = json.loads(first.read_text(encoding="utf-8"))["cells"]
    return next(text for text in map(source, cells) if text.startswith("PARTS ="))


def course_map(root=ROOT):
    "PARTS (name -> tutorials), TITLES and NEEDS (pairs: needed, by whom), and the figure."
    import matplotlib.pyplot as plt
    space = {"plt": plt}
    exec(map_code(root), space) # of this repository
    return space


def needed(needs, number):
    "All tutorials that one needs, directly or not; each needs the first."
    found = {1} - {number}
    for before, after in needs:
        if after == number: found |= {before} | needed(needs, before)
    return found


if __name__ == "__main__":
    path = ROOT/"tutorials/pictures/map.png"
    course_map()["fig"].savefig(path, dpi=110)
    print(f"map: {path}")
