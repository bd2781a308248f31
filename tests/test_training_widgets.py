"The candidate wall and the training dashboard, without a browser."
import io
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from instructvideo_kit.tuning.algorithm import tune
from instructvideo_kit.tuning.online_dpo import OnlineDPOConfig
from instructvideo_kit.tuning.run_folder import RunFolder, read_log
from instructvideo_kit.widgets.candidates import (
    CHOSEN,
    REJECTED,
    REST,
    CandidateWall,
    accuracy_png,
    candidate_wall,
    draw_candidates,
    pair_note,
)
from instructvideo_kit.widgets.dashboard import TrainingDashboard, dashboard_png

sys.path.insert(0, str(Path(__file__).parent))
from test_tuning import SMALL, InstructVideoConfig, open_policy, patch_folder, redness, some_clips  # noqa: E402,F401

ROWS = [{"step": s, "implicit_accuracy": .5 + .1*(s % 4), "skipped": 0} for s in range(1, 13)]


def frames_of(wall, n): # colour of each candidate's frame
    rows = (wall.height - 22)//n
    return [wall.getpixel((3, 22 + i*rows + rows//2)) for i in range(n)]


def size(data): return Image.open(io.BytesIO(data)).size


# ---- candidates --------------------------------------------------------------------------------

def test_chosen_and_rejected_are_framed():
    videos = torch.rand(4, 8, 3, 16, 16)
    assert frames_of(candidate_wall(videos, [.2, .9, .1, .5], "a cat"), 4) == [REST, CHOSEN, REJECTED, REST]
    assert frames_of(candidate_wall(videos, [.5]*4), 4) == [REST]*4 # all equal: no pair
    assert "Clip 2 is chosen over clip 3, by 0.800" in pair_note(
        torch.tensor([0.2, 0.9, 0.1, 0.5])
    ) and "no pair" in pair_note(torch.ones(3))
    with pytest.raises(ValueError, match="4 candidates and 2 scores"): candidate_wall(videos, [1., 2.])
    with pytest.raises(ValueError, match="at least 2"): candidate_wall(videos[:1], [1.])


def test_candidates_are_those_of_a_training_step(patch_folder):
    from instructvideo_kit.tuning.rollouts import candidates
    from instructvideo_kit.tuning.stream import example_generator
    policy, config = open_policy(patch_folder), OnlineDPOConfig(n_ddim=2, guidance_scale=1., n_candidates=3)
    drawn = draw_candidates(policy, redness, ["a cat", "a fish"], config)
    generators = [example_generator(0, p) for p in range(2)]
    scores = candidates(policy, redness, ["a cat", "a fish"], generators, config)["reward"]
    assert [c for c, _, _ in drawn] == ["a cat", "a fish"] and torch.equal(
        torch.stack([s for _, _, s in drawn]), scores
    )
    assert drawn[0][1].shape == (3, policy.n_frames, 3, *policy.size) and not drawn[0][1].requires_grad


def test_the_curve_marks_refreshes_and_refuses_a_log_without_accuracy():
    assert accuracy_png(ROWS) != accuracy_png(ROWS, 4) and accuracy_png(ROWS) == accuracy_png(ROWS, float("inf"))
    with pytest.raises(ValueError, match="implicit_accuracy"): accuracy_png([{"step": 1, "loss": 0.}])


def test_the_wall_changes_with_the_caption():
    rounds = [(c, torch.rand(2, 8, 3, 16, 16), torch.tensor([1., 2.])) for c in ("a cat", "a dog")]
    panel, bare = CandidateWall(rounds, ROWS, 4), CandidateWall(rounds)
    before = panel.image.value
    assert size(before)[1] > size(bare.image.value)[1] # the curve stands below
    panel.controls["caption"].value = "a dog"
    assert panel.image.value != before and "Clip 2 is chosen" in panel.note.value
    assert "image/png" in panel._repr_mimebundle_()[0]
    with pytest.raises(ValueError, match="no candidates"): CandidateWall([])


# ---- dashboard --------------------------------------------------------------------------------

def test_the_picture_shows_what_there_is():
    rows = [{"step": s, "reward": s/9, "memory_mb": 500} for s in range(1, 9)]
    evaluations, profiles = [{"step": 4, "reward": .5}], [(4, [551, 1], [1., .1])]
    shown = [([],), (rows,), (rows, evaluations), (rows, [evaluations[0] | {"warning": "x"}]), (rows, [], profiles)]
    pictures = {dashboard_png(*what) for what in shown}
    assert len(pictures) == 5 and len({size(p) for p in pictures}) == 1


def board(folder, run, clips, config, **options):
    return TrainingDashboard("instructvideo", lambda: open_policy(folder), redness, clips, config, run,
                             pause=0., **options)


def test_the_button_stops_saved_and_the_run_goes_on_exactly(patch_folder, tmp_path):
    clips = some_clips(open_policy(patch_folder))
    config = InstructVideoConfig(**{**SMALL, "steps": 6, "save_every": 100, "dropout": True})
    straight = tune("instructvideo", open_policy(patch_folder), redness, clips, config, tmp_path/"straight",
                    progress=False)
    panel = board(patch_folder, tmp_path/"run", clips, config, profile=clips[0], profile_every=2)
    assert panel.halt.disabled and "step 0 of 6" in panel.note.value
    slow = panel._between_steps
    panel._between_steps = lambda: (time.sleep(.1), slow())[1]
    panel.go.click()
    assert panel.go.disabled and not panel.halt.disabled
    while len(read_log(tmp_path/"run")) < 2 and panel.running: time.sleep(.01)
    panel.halt.click()
    result = panel.wait()
    assert panel.error is None and 2 <= result.steps < 6 and not result.finished
    assert "stopped and saved" in panel.note.value and panel.halt.disabled and not panel.go.disabled
    assert RunFolder(tmp_path/"run").checkpoints()[-1].name == f"step-{result.steps:06d}"
    panel.go.click()
    result = panel.wait()
    assert result.finished and "finished" in panel.note.value
    def figures(run):
        return [(r["step"], r["loss"], r["grad_norm"]) for r in read_log(run)]
    assert figures(tmp_path/"run") == figures(straight.run_dir) # neither the stop nor the profiles changed a number
    steps = [s for s, _, _ in panel.profiles]
    assert (
        steps and len(panel.profiles[0][2]) == len(panel.profiles[0][1]) == 2 and steps == sorted(steps)
    )  # a chain of two steps


def test_an_error_in_the_thread_is_shown(patch_folder, tmp_path):
    panel = board(patch_folder, tmp_path/"run", [], InstructVideoConfig(**SMALL))
    panel.begin()
    assert panel.wait() is None and "nothing to tune on" in panel.note.value and not panel.go.disabled
    assert "image/png" in panel._repr_mimebundle_()[0]
