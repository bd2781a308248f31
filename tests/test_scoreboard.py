"The page and the command: every row, plain answers, stale results, shards, interruption, live checks that can fail."
import json, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from instructvideo_kit import cli
from instructvideo_kit.files import KitError
from instructvideo_kit.measure import runs, scoreboard
from instructvideo_kit.measure.claims import CLAIMS, FAILS, HOLDS, Results
from instructvideo_kit.measure.runs import CELLS, Result, facts_of, result_path, seeded

FIGURES = ("reward", "temporal_flicker", "video_temporal_consistency", "video_visual_quality", "subject_consistency", "background_consistency", "motion_smoothness",
           "dynamic_degree", "reward_spread", "sharpness", "saturation", "watermark", "species", "video_dynamic_degree", "video_mrr", "image_mrr")


def write_results(out, gains, seeds=2):
    "Results of all cells: noise, and a gain of the reward by cell."
    rng = np.random.default_rng(0)
    for cell in seeded(CELLS, seeds):
        for step, held in cell.points:
            captions = [(p, g) for g, many in held.captions().items() for p in many]
            rows = [dict(prompt=p, group=g, seed=0) | {f: float(rng.normal(.5, .02)) for f in FIGURES} | {f"feature_{i}": float(rng.normal()) for i in range(runs.N_FEATURES)}
                    for p, g in captions]
            for row in rows: row["reward"] += gains.get(cell.name, 0.)
            result = Result(cell.name, cell.seed, step, facts_of(cell, step, held), runs.__version__, runs.compute(cell, step), {"tuning": 60, "evaluating": 30}, rows, [.1, .2])
            result.save(result_path(out, cell, step, held))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("made-up")/"reproduction"
    write_results(out, {"iv": .2, "draft": .1, "rwr": .3})
    return out


@pytest.fixture
def plain(monkeypatch): monkeypatch.setattr(scoreboard, "draw_pictures", lambda results, out: []) # pictures take longest, and one test looks at them


def call(*args): return CliRunner().invoke(cli.app, ["reproduce", *map(str, args)])


def test_page_has_every_claim_and_keeps_those_that_fail(out):
    verdicts = {v.claim.id: v for v in scoreboard.write_page(out)}
    text = (out/"README.md").read_text()
    assert all(f"`{c.id}`" in text for c in CLAIMS)
    assert verdicts["iv-fig5a-draft"].verdict == HOLDS and verdicts["iv-fig5a-rwr"].verdict == FAILS
    assert "Of DRaFT-1: yes: +0." in text and "Of RWR: no: -0." in text
    study = text.split("## What the weights")[1]
    assert study.count("\n| lambda ") == 5 and "| all frames (no SegVR) | **-0.2" in study
    row = next(line for line in text.splitlines() if "`iv-fig5a-rwr`" in line)
    assert "does not hold" in row and "the opposite" in row and "`reproduce iv-fig5a-rwr`" in row
    for name in scoreboard.PICTURES:
        if name not in ("evolution", "temporal"): assert (out/"pictures"/f"{name}.png").stat().st_size > 3000, name # no strips were made


def test_results_alone_make_the_page(out, plain):
    "Judged again, the page is the same to the letter."
    scoreboard.write_page(out); first = (out/"README.md").read_text()
    scoreboard.write_page(out)
    assert (out/"README.md").read_text() == first


def test_one_seed_is_withheld_on_the_page(tmp_path, plain):
    write_results(tmp_path/"r", {"iv": .2}, seeds=1)
    row = next(line for line in scoreboard.page(scoreboard.write_page(tmp_path/"r", CLAIMS[:3])).splitlines() if "`iv-fig5a-draft`" in line)
    assert "withheld" in row and "1 tuning seed" in row


def test_curve_starts_at_the_base_model_and_runs_to_the_long_run(out):
    curve = scoreboard.curve_of(Results(out), "iv")
    assert [x for x, _ in curve] == [0] + [runs.compute(CELLS[1], s) for s in (10, 20, 40, 80, 120)] and len(curve[1][1]) == 2
    assert scoreboard.curve_of(Results(out.parent), "iv") == []


def test_command_refuses_in_one_line(tmp_path):
    for args, words in ((("iv-fig5a-drft",), "iv-fig5a-draft"), (("all", "--shard", "0/2"), "1 <= i <= n"), (("all", "--seeds", 0), "expected 1 or more"),
                        (("all", "--quick", "--out", tmp_path), "no results"), (("all", "--preset", "large"), "modelscope")):
        answer = call(*args)
        assert answer.exit_code == 2 and words in answer.stderr and len(answer.stderr.strip().splitlines()) == 1, answer.stderr


def test_dry_run_writes_nothing_and_modelscope_prints_commands(tmp_path):
    answer = call("iv-fig5b-high", "--dry-run", "--out", tmp_path/"r")
    assert answer.exit_code == 0 and "tau0.9" in answer.output and "minutes" in answer.output and not (tmp_path/"r").exists()
    answer = call("iv-fig5b-high", "--preset", "modelscope")
    assert "--algorithm instructvideo --preset instructvideo" in answer.output and "--set tau=0.9" in answer.output and "needs a GPU" in answer.output


def test_what_is_there_is_not_run_again_and_stale_runs_are_named(out, plain, monkeypatch):
    ran = []
    monkeypatch.setattr(scoreboard, "run_cells", lambda cells, out, say: ran.append([c.name for c, *_ in runs.todo(cells, out)]) or [])
    said = []
    scoreboard.reproduce("iv-fig5c-high", out=out, say=said.append)
    assert ran == [[]]
    path = result_path(out, replace(next(c for c in CELLS if c.name == "lam2"), seed=1), 40, runs.H)
    text = path.read_text(); path.write_text(text.replace(f'"kit": "{runs.__version__}"', '"kit": "0.0.9"'))
    scoreboard.reproduce("iv-fig5c-high", out=out, say=said.append)
    path.write_text(text)
    assert ran[1] == ["lam2"] and any("stale: lam2.s1.step0040" in line and "0.0.9" in line for line in said)


def test_interrupt_says_how_to_go_on(monkeypatch, tmp_path):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(scoreboard, "run_cells", stop)
    answer = call("iv-fig5c-high", "--out", tmp_path)
    assert answer.exit_code == 130 and "same command goes on" in answer.stderr


def test_live_checks_notice_the_opposite(monkeypatch):
    def pretend(sign):
        def run_cells(cells, out, say):
            for cell in cells:
                (step, held), = cell.points
                rows = [dict(prompt=f"{i}", group="all", seed=0, reward=.5 + sign*.1*(step > 0) + .001*i, video_mrr=.5 + sign*.1, image_mrr=.5) for i in range(12)]
                Result(cell.name, 0, step, facts_of(cell, step, held), runs.__version__, 0., {}, rows).save(result_path(out, cell, step, held))
            return []
        return run_cells
    said = []
    monkeypatch.setattr(scoreboard, "run_cells", pretend(1))
    assert all(f.low > 0 for f in scoreboard.live_checks(said.append)) and len(said) == 2
    monkeypatch.setattr(scoreboard, "run_cells", pretend(-1))
    with pytest.raises(KitError, match="other way round"): scoreboard.live_checks(said.append)
