"""Tutorials with another model: each with the second line of its set-up, small random models in the place of the real
ones, from top to bottom.

Two cheap ones run always; KIT_OTHER_POLICY=all runs all of them (some minutes each), KIT_OTHER_POLICY="09 15" those."""
import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tiny import tiny_pipeline, tiny_reward
from tiny_policies import tiny_policy

from instructvideo_kit.reward.videoscore import write_small_videoscore

# with the solutions in, so that every cell has what it needs
SOLVED = Path(__file__).resolve().parent.parent/"tutorials/solved"
# 8 frames of 16x16, epsilon-prediction, another autoencoder: nothing as in the menagerie
WRITE = {"ali-vilab/text-to-video-ms-1.7b": tiny_pipeline,
         "hpsv2": tiny_reward, "TIGER-Lab/VideoScore": write_small_videoscore,
         "stabilityai/stable-video-diffusion-img2vid": lambda folder: tiny_policy(folder, "svd")}
SECOND_LINE = re.compile(r"\A(?:MODEL|JUDGE), .*\n# (.*)")
CHOSEN = os.environ.get("KIT_OTHER_POLICY", "03 08").split()
SKIP = "takes minutes: KIT_OTHER_POLICY=all runs every tutorial with another model, KIT_OTHER_POLICY=%s this one"

def tutorials():
    for path in sorted(SOLVED.glob("[0-9][0-9]_*.ipynb")):
        skip = [] if path.name[:2] in CHOSEN or CHOSEN == ["all"] else [pytest.mark.skip(reason=SKIP % path.name[:2])]
        yield pytest.param(path, id=path.stem, marks=skip)

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "The real model's name -> folder of a small random one."
    folders = {name: tmp_path_factory.mktemp("models")/str(i) for i, name in enumerate(WRITE)}
    for name, folder in folders.items(): WRITE[name](folder)
    return folders

def other_line(source, models):
    "The second line of the cell that chooses the model, with small models on the CPU; None for any other cell."
    if not (found := SECOND_LINE.match(source)): return None
    line = found[1].replace("'cuda'", "'cpu'")
    for name, folder in models.items(): line = line.replace(repr(name), repr(str(folder)))
    return line

def test_the_second_line_is_taken():
    cell = "MODEL, DEVICE = 'menagerie', 'cpu'\n# MODEL, DEVICE = 'org/name', 'cuda'"
    assert other_line(cell, {"org/name": Path("/small")}) == "MODEL, DEVICE = '/small', 'cpu'"
    assert other_line("print(MODEL)", {}) is None

@pytest.mark.parametrize("path", list(tutorials()))
def test_runs_with_another_model(path, models):
    nb = nbformat.read(path, 4)
    lines = {i: line for i, c in enumerate(nb.cells) if c.cell_type == "code"
             and (line := other_line(c.source, models))}
    assert len(lines) == 1, "one cell chooses the model, and has the real one's line below it as a comment"
    for i, line in lines.items(): nb.cells[i].source = line
    # raises with the cell that failed
    NotebookClient(nb, timeout=1200, kernel_name="python3", resources={"metadata": {"path": SOLVED}}).execute()
    assert "Not the menagerie" in json.dumps([c.get("outputs") for c in nb.cells])
