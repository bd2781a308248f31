"The page and the command: every row, plain answers, stale results, shards, interruption, live checks that can fail."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from instructvideo_kit import cli
from instructvideo_kit.files import KitError
from instructvideo_kit.measure import execute, pictures, runs, scoreboard
from instructvideo_kit.measure.claims import HOLDS, REFUTED, UNDECIDED, all_claims
from instructvideo_kit.measure.data import metrics_known, read_yaml
from instructvideo_kit.measure.results import Result, Results, facts_of, result_path
from instructvideo_kit.measure.runs import Split, all_runs, compute, seeded

CLAIMS = all_claims()[1]
NAMES = [name for name in metrics_known() if name != "frechet"]


def write_results(out, gains, seeds=5):
    "Results of all runs: noise, and a gain of the reward by run."
    rng = np.random.default_rng(0)
    for run in seeded(list(all_runs()), seeds):
        for step, split in run.points:
            rows = []
            for group, many in split.captions().items():
                for prompt in many:
                    row = dict(prompt=prompt, group=group, seed=0)
                    row |= {name: float(rng.normal(.5, .02)) for name in NAMES}
                    row |= {f"feature_{i}": float(rng.normal()) for i in range(execute.N_FEATURES)}
                    row["reward"] += gains.get(run.name, 0.)
                    rows.append(row)
            facts, seconds = facts_of(run, step, split), {"tuning": 60*step, "evaluating": 30}
            cost = compute(run, step)
            result = Result(run.name, run.seed, step, facts, execute.__version__, cost, seconds, rows, [.1, .2])
            result.save(result_path(out, run, step, split))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("made-up")/"reproduction"
    write_results(out, {"iv": .2, "draft": .1, "rwr": .3})
    return out


@pytest.fixture
def plain(monkeypatch): # pictures take longest, and one test looks at them
    monkeypatch.setattr(scoreboard, "write_pictures", lambda results, out, verdicts: [])


def call(*args): return CliRunner().invoke(cli.app, ["reproduce", *map(str, args)])


def test_page_has_every_claim_and_keeps_those_that_are_refuted(out):
    verdicts = {v.claim.id: v for v in scoreboard.write_page(out)}
    text = (out/"README.md").read_text()
    assert all(f"`{claim.id}`" in text for claim in CLAIMS)
    assert (verdicts["iv-fig5a-draft"].word, verdicts["iv-fig5a-rwr"].word) == (HOLDS, REFUTED)
    assert verdicts["iv-fig5c-spread"].word == UNDECIDED
    assert "Of DRaFT-1: yes: +0." in text and "Of RWR: no: -0." in text
    study = text.split("## What the weights")[1]
    assert study.count("\n| lambda ") == 5 and "| all frames (no SegVR) | **-0.2" in study
    row = next(line for line in text.splitlines() if "`iv-fig5a-rwr`" in line)
    assert "**refuted**" in row and "the opposite" in row and "`reproduce iv-fig5a-rwr`" in row and "; sees 0.0" in row
    assert text.index("pictures/claims.png") < text.index("| claim | paper |") # the picture comes first
    drawn = [name for name, picture in pictures.all_pictures().items() if picture.kind != "strips"] # none were made
    for name in ("claims", *drawn):
        assert (out/"pictures"/f"{name}.png").stat().st_size > 3000, name


def test_results_alone_make_the_page(out, plain):
    "Decided again, the page is the same to the letter."
    scoreboard.write_page(out, CLAIMS[:12])
    first = (out/"README.md").read_text()
    scoreboard.write_page(out, CLAIMS[:12])
    assert (out/"README.md").read_text() == first


def test_two_seeds_cannot_tell_on_the_page(tmp_path, plain):
    write_results(tmp_path/"r", {"iv": .2}, seeds=2)
    page = scoreboard.page(scoreboard.write_page(tmp_path/"r", CLAIMS[:1]))
    row = next(line for line in page.splitlines() if "`iv-fig5a-draft`" in line)
    assert "cannot tell" in row and "2 tuning seeds, a verdict takes 5" in row


def test_curve_starts_at_the_base_model_and_runs_to_the_last_point(out):
    iv = next(run for run in all_runs() if run.name == "iv")
    curve = pictures.mean_curve(Results(out), "iv")
    assert [x for x, _ in curve] == [0] + [compute(iv, s) for s in (10, 20, 40)] and len(curve[1][1]) == 5
    assert pictures.mean_curve(Results(out.parent), "iv") == []


def test_every_metric_that_is_measured_has_a_meaning():
    found = execute.evaluate_data(runs.Run("data-clean", "data", clips="clean"), Split((1, 0, 0)), execute.Metrics())
    assert set(found.metrics) - {f"feature_{i}" for i in range(execute.N_FEATURES)} <= set(metrics_known())


def test_the_forest_has_a_line_for_each_claim_that_was_measured(out):
    verdicts = scoreboard.write_page(out, CLAIMS[:4]) # draws
    axes = pictures.draw_forest(verdicts).axes[0]
    assert len(axes.get_yticks()) == 4 and len({line.get_color() for line in axes.lines}) >= 3


@pytest.mark.parametrize("args, says", [
    (("iv-fig5a-drft",), "iv-fig5a-draft"), (("all", "--shard", "0/2"), "1 <= i <= n"),
    (("all", "--seeds", 0), "expected 1 or more"), (("all", "--preset", "large"), "modelscope")])
def test_command_refuses_in_one_line(args, says):
    answer = call(*args)
    assert answer.exit_code == 2 and says in answer.stderr, answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr


def test_quick_needs_results(tmp_path):
    answer = call("all", "--quick", "--out", tmp_path)
    assert answer.exit_code == 2 and "no results" in answer.stderr


def test_dry_run_writes_nothing_and_modelscope_prints_commands(tmp_path):
    answer = call("iv-fig5b-high", "--dry-run", "--out", tmp_path/"r")
    assert answer.exit_code == 0 and "tau0.9" in answer.output and "minutes" in answer.output
    assert not (tmp_path/"r").exists()
    answer = call("iv-fig5b-high", "--preset", "modelscope")
    assert "--algorithm instructvideo --preset instructvideo" in answer.output and "--set tau=0.9" in answer.output
    assert "needs a GPU" in answer.output


def test_what_is_there_is_not_run_again_and_stale_runs_are_named(out, plain, monkeypatch):
    ran, said = [], []

    def run_all(every, out, say):
        ran.append([run.name for run, *_ in execute.todo(every, out)])
        return []

    monkeypatch.setattr(scoreboard, "run_all", run_all)
    monkeypatch.setattr(scoreboard, "write_page", lambda out: [])
    scoreboard.reproduce("iv-fig5c-high", out=out, say=said.append)
    path = result_path(out, replace(runs.point_of("lam2", 40), seed=1), 40, Split())
    text = path.read_text()
    path.write_text(text.replace(f'"kit": "{execute.__version__}"', '"kit": "0.0.9"'))
    scoreboard.reproduce("iv-fig5c-high", out=out, say=said.append)
    path.write_text(text)
    assert ran == [[], ["lam2"]]
    assert any("stale: lam2.s1.step0040" in line and "0.0.9" in line for line in said)


def test_interrupt_says_how_to_go_on(monkeypatch, tmp_path):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(scoreboard, "run_all", stop)
    answer = call("iv-fig5c-high", "--out", tmp_path)
    assert answer.exit_code == 130 and "same command goes on" in answer.stderr


def pretend(sign):
    "Results of the live checks as they should be (1) or the other way round (-1)."
    def run_all(every, out, say):
        for run in every:
            (step, split), = run.points
            rows = []
            for i in range(12):
                values = dict(reward=.5 + sign*.1*(step > 0) + .001*i, video_mrr=.5 + sign*.1 + .001*i, image_mrr=.5)
                rows.append(dict(prompt=f"{i}", group="all", seed=0, **values))
            result = Result(run.name, 0, step, facts_of(run, step, split), execute.__version__, 0., {}, rows)
            result.save(result_path(out, run, step, split))
        return []
    return run_all


def test_live_checks_notice_the_opposite(monkeypatch):
    said = []
    monkeypatch.setattr(scoreboard, "run_all", pretend(1))
    assert [found.verdict for found in scoreboard.live_checks(said.append)] == [HOLDS]*2 and len(said) == 2
    monkeypatch.setattr(scoreboard, "run_all", pretend(-1))
    with pytest.raises(KitError, match="other way round"):
        scoreboard.live_checks(said.append)


def test_a_live_check_that_does_not_run_says_why(monkeypatch):
    monkeypatch.setattr(scoreboard, "run_all", lambda every, out, say: [("iv", "RuntimeError: no luck")])
    with pytest.raises(KitError, match="no luck"):
        scoreboard.live_checks(checks=scoreboard.read_checks(read_yaml("live.yaml")))


def test_a_run_has_the_rate_that_its_sweep_found_best():
    "Where a sweep is complete, the run's rate is the one with the highest reward on the captions tuned on."
    from instructvideo_kit.measure.runs import all_runs, config_of
    from instructvideo_kit.measure.sweep import all_sweeps, best_rate, rates_tried
    runs = {run.name: run for run in reversed(all_runs())}
    for sweep in all_sweeps():
        best = best_rate(sweep, rates_tried(sweep, Path(__file__).parents[1]/"reproduction"))
        assert best is None or config_of(runs[sweep.run]).lr == best, sweep.run


def test_sweeps_use_no_seed_and_no_caption_of_the_claims():
    from instructvideo_kit.measure.runs import Split
    from instructvideo_kit.measure.sweep import TUNED_ON, all_sweeps
    assert {run.seed for sweep in all_sweeps() for run in sweep.runs}.isdisjoint(range(50))
    held_out = set(sum(Split((48, 24, 24)).captions().values(), []))
    assert held_out.isdisjoint(TUNED_ON.captions()["tuned on"])
