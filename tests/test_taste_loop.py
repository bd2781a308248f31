"The whole loop: tuning with a reward made from votes, blind pairs with a control, and the program that measures it."
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline

from instructvideo_kit.feedback.blind import WinRate, wilson
from instructvideo_kit.feedback.loop import against_control, taste_config
from instructvideo_kit.files import KitError

PROGRAM = Path(__file__).resolve().parent.parent/"reproduction/taste_loop.py"


def rate(won, n): return WinRate(won/n, *wilson(won, n), won, 0, n - won)


@pytest.mark.parametrize("won", range(0, 21, 4))
def test_equal_shares_are_not_told_apart_and_the_difference_turns_round(won):
    difference, low, high = against_control(rate(won, 20), rate(won, 20))
    assert difference == 0 and low < 0 < high
    there, back = against_control(rate(won, 20), rate(7, 20)), against_control(rate(7, 20), rate(won, 20))
    assert there[1] == pytest.approx(-back[2]) and there[2] == pytest.approx(-back[1])


def test_more_pairs_tell_apart_what_few_cannot():
    assert against_control(rate(14, 20), rate(9, 20))[1] < 0 < against_control(rate(140, 200), rate(90, 200))[1]


@pytest.mark.parametrize("algorithm", ["draft", "nft", "grpo"])
def test_every_frame_is_shown_to_a_reward_of_votes(algorithm):
    config = taste_config(algorithm, 12)
    assert (config.n_segments, config.lam_tar) == (12, 0.)


def loaded():
    "The program as a module."
    spec = importlib.util.spec_from_file_location("taste_loop", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_rate_is_another_run_and_rates_are_not_mixed():
    module, about = loaded(), dict(taste="warm", direction="own", votes=60, anchor="none", steps=20)
    rows = [about | dict(seed=seed, lr=lr, change=[lr, lr]) for lr in (1., 3.) for seed in range(2)]
    assert len({module.key_of(r) for r in rows}) == 4
    assert [(r["lr"], r["seeds"], r["change"]) for r in module.summary(rows)] == [(1., 2, 1.), (3., 2, 3.)]


def program(arguments):
    "Run the program with these arguments, in this process."
    module = loaded()
    module.fast_dtype = lambda: torch.float32 # the rounding of bfloat16 depends on what ran before
    old, sys.argv = sys.argv, ["taste_loop.py", *map(str, arguments)]
    try: module.main()
    finally: sys.argv = old


@pytest.mark.slow
def test_the_program_goes_on_where_it_was_cut_off(tmp_path):
    lines = tmp_path/"out/loop.jsonl"
    small = ["--policy", tiny_pipeline(tmp_path/"tiny"), "--pool", tmp_path/"pool", "--out", tmp_path/"out",
             "--captions", 4, "--held-out", 3, "--tastes", "warm", "--seeds", 2, "--steps", 2, "--batch", 2,
             "--every", 1, "--n-ddim", 2, "--tune-ddim", 2, "--figure", "--votes", 6, "--anchors", "none", "data"]
    program(small)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(rows) == 4 and {r["anchor"] for r in rows} == {"none", "data"}
    assert all(r["marks"]["step"] == [0, 1, 2] and len(r["change"]) == 3 for r in rows)
    assert all(r["marks"]["distance"][0] == 0 < r["marks"]["distance"][-1] for r in rows)
    text = lines.read_text().splitlines(keepends=True)
    lines.write_text("".join(text[:2]) + text[2][:40]) # the third was cut off, the fourth never came
    program(small)
    again = [json.loads(line) for line in lines.read_text().splitlines() if line.endswith("}")]
    assert len(again) == 4 and again[0] == rows[0] and again[2]["change"] == rows[2]["change"]
    found = json.loads((tmp_path/"out/loop.json").read_text())
    assert len(found) == 2 and all("low" in f for f in found) and (tmp_path/"out/loop.png").exists()
    assert not list((tmp_path/"out/runs").glob("*"))


def test_a_pull_that_the_algorithm_has_not_is_refused():
    with pytest.raises(KitError, match="draft has no pull"): program(["--figure", "--anchors", "kl"])
