"""Claims: every rule is fed data where the sentence is true, false and undecidable, and gives the three verdicts;
seeds, the untuned base, stale results, mistakes in the files, interrupted runs."""
import json
from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_pipeline, tiny_reward

from instructvideo_kit.files import KitError
from instructvideo_kit.measure import claims, execute, runs
from instructvideo_kit.measure.claims import (
    HOLDS,
    NEEDS,
    NOT_RUN,
    REFUTED,
    UNDECIDED,
    Contrast,
    Filed,
    Measurement,
    all_claims,
    decide,
    read_contrasts,
)
from instructvideo_kit.measure.curves import best_checkpoint
from instructvideo_kit.measure.results import Result, Results, facts_of, result_path
from instructvideo_kit.measure.runs import Point, Run, Split, all_runs, steps_of, trains
from instructvideo_kit.menagerie.captions import GROUPS

RULE, CLAIMS = all_claims()
RULED = [c for c in CLAIMS if c.contrasts]
CAPTIONS = [(f"{g} {i}", g) for g in GROUPS for i in range(12)]
TUNED = {run.name for run in all_runs() if trains(run)}


class MadeUp:
    "Results whose metrics have a level per run and step, and noise that captions, seeds and points share or not."
    def __init__(self, levels, seeds=range(5), spread=.02, seed_spread=.02):
        self.levels, self.seeds, self.spread, self.seed_spread = levels, list(seeds), spread, seed_spread
        self.tuned, self.known = TUNED, {}

    def at(self, point):
        step = point.step if isinstance(point.step, int) else best_checkpoint({s: s for s in self.steps(point.run)})
        key = (point.run, step, point.drawn)
        if key not in self.known:
            seeds = self.seeds if point.run in TUNED else [0]
            self.known[key] = {seed: self.result(*key, seed) for seed in seeds}
        return self.known[key]

    def steps(self, name, drawn="d10"): return steps_of(name, drawn)

    def luck(self, point, seed):
        "Of one tuning seed: from -1.5 to 1.5 over the seeds in an order of the point's own, so that it adds up to 0."
        order = point.permutation(len(self.seeds))
        return 3*order[self.seeds.index(seed)]/max(len(self.seeds) - 1, 1) - 1.5

    def result(self, run, step, drawn, seed):
        n_ddim = int(drawn[1:].split(".")[0])
        point = np.random.default_rng([*run.encode(), step, n_ddim])
        rng = np.random.default_rng([*run.encode(), step, n_ddim, seed])
        # captions differ a lot: pairing has to take that away
        shared = np.random.default_rng(1).normal(0, .3, len(CAPTIONS))
        own = self.seed_spread*self.luck(point, seed) if run in TUNED else 0.
        rows = [dict(prompt=p, group=g, seed=0, reward=step/1000) for p, g in CAPTIONS]
        for (name, at, d, metric), level in self.levels.items():
            if (name, d) == (run, drawn) and at in (step, "any"):
                for row, base in zip(rows, shared):
                    row[metric] = base + level + own + rng.normal(0, self.spread)
        near = self.levels.get((run, step, drawn, "frechet"), 3.) # data-clean lies at 3, where the best is
        features = np.random.default_rng(2).normal(size=(len(rows), execute.N_FEATURES)) + near
        for row, values in zip(rows, features):
            row |= {f"feature_{i}": float(v) for i, v in enumerate(values)}
        return Result(run, seed, step, {}, "", float(step), {"tuning": float(step)}, rows)


def nodes(contrast):
    "(node, sign) of what has to differ for a contrast; a curve or a best checkpoint is one level for all its steps."
    def node(point, metric):
        return (point.run, point.step if isinstance(point.step, int) else "any", point.drawn, metric)
    signed = [(node(p, contrast.metric), 1) for p in contrast.more]
    signed += [(node(p, contrast.less_metric or contrast.metric), -1) for p in contrast.less]
    return signed


def inequalities(claim):
    "What has to be true, the untuned base included where it is asked for."
    found = []
    for contrast in claim.contrasts:
        if isinstance(contrast, Contrast):
            found.append(nodes(contrast))
        if getattr(contrast, "over_base", "") == "required":
            found.append([nodes(contrast)[0], (("base", 0, contrast.more[0].drawn, contrast.metric), -1)])
    return found


def levels_of(claim, sign=1.):
    "Levels that make every inequality of a claim true (1), false (-1) or without effect (0): steps towards a solution."
    wanted = inequalities(claim)
    level = {node: 0. for signed in wanted for node, _ in signed}
    for contrast in claim.contrasts:
        if getattr(contrast, "equal", "") or getattr(contrast, "over_base", ""): # curves begin there
            level.setdefault(("base", 0, contrast.more[0].drawn, contrast.metric), 0.)
    for _ in range(400):
        for signed in wanted:
            if sum(s*level[node] for node, s in signed) < .4:
                for node, s in signed:
                    level[node] += s*.1
    margins = {nodes(c)[0][0]: c.margin for c in claim.contrasts if isinstance(c, Contrast)} # "without effect": there
    return {node: sign*value + margins.get(node, 0.) for node, value in level.items()}


def write_files(claim, root, sign):
    "The measurements that a claim reads: true, false, or an interval around its margin."
    for contrast in claim.contrasts:
        if not isinstance(contrast, Filed):
            continue
        path = root/contrast.file
        path.parent.mkdir(parents=True, exist_ok=True)
        figures = json.loads(path.read_text())["figures"] if path.exists() else {}
        value = contrast.margin + .3*sign
        one = {contrast.figures[0]: {"value": value, "low": value - .1, "high": value + .1}}
        several = {name: figures.get(name, {"value": 1. + sign*i}) for i, name in enumerate(contrast.figures)}
        path.write_text(json.dumps({"figures": figures | (one if len(contrast.figures) == 1 else several)}))


def verdict_on(claim, tmp_path, sign, **how):
    write_files(claim, tmp_path, sign)
    return decide(claim, MadeUp(levels_of(claim, sign), **how), tmp_path)


@pytest.mark.parametrize("claim", RULED, ids=lambda c: c.id)
def test_rule_gives_its_three_verdicts(claim, tmp_path):
    "True: holds. False: refuted. No difference, with seeds that vary: cannot tell."
    for sign, expected in ((1., HOLDS), (-1., REFUTED), (0., UNDECIDED)):
        verdict = verdict_on(claim, tmp_path/str(sign), sign)
        assert verdict.word == expected and verdict.why, (sign, verdict.why)


@pytest.mark.parametrize("claim", [c for c in RULED if len(inequalities(c)) > 1], ids=lambda c: c.id)
def test_every_contrast_counts(claim, tmp_path):
    "Each inequality alone can refute a claim, that with the untuned base, too."
    for signed in inequalities(claim):
        levels = levels_of(claim)
        for _ in range(200):
            if sum(s*levels[node] for node, s in signed) > -.4:
                for node, s in signed:
                    levels[node] -= s*.1
        assert decide(claim, MadeUp(levels), tmp_path).word == REFUTED, signed


def test_a_rival_worse_than_no_tuning_does_not_make_a_claim_hold():
    "A over B, and both below the untuned base: refuted where A has to be above it, and said where it need not."
    levels = {("ovpo", 36, "d10.w1", "subject_consistency"): -.2,
              ("ovpo-image", 36, "d10.w1", "subject_consistency"): -.6,
              ("base", 0, "d10.w1", "subject_consistency"): 0.}
    claim = next(c for c in CLAIMS if c.id == "ov-table4a")
    verdict = decide(claim, MadeUp(levels))
    assert verdict.measurements[0].verdict == HOLDS and verdict.word == REFUTED and "untuned base" in verdict.why
    lenient = replace(claim, contrasts=tuple(replace(c, over_base="reported") for c in claim.contrasts))
    verdict = decide(lenient, MadeUp(levels))
    assert verdict.word == HOLDS and verdict.reported[0].verdict == REFUTED


def test_too_few_seeds_cannot_tell_whatever_the_interval(tmp_path):
    claim = next(c for c in CLAIMS if c.id == "iv-fig5a-draft")
    for n in (1, 4):
        verdict = verdict_on(claim, tmp_path, 1., seeds=range(n), seed_spread=.001)
        assert verdict.word == UNDECIDED and f"{n} tuning seed" in verdict.why and verdict.seeds == n
    assert verdict_on(replace(claim, seeds=4), tmp_path, 1., seeds=range(4), seed_spread=.001).word == HOLDS


def test_figures_of_a_file_that_stand_on_few_seeds_cannot_tell(tmp_path):
    claim = next(c for c in CLAIMS if c.id == "rl-unseen-pairs")
    for seeds, word in ((3, UNDECIDED), (5, HOLDS)):
        write_files(claim, tmp_path, 1.)
        path = tmp_path/claim.contrasts[0].file
        figures = json.loads(path.read_text())["figures"]
        path.write_text(json.dumps({"figures": {name: {**f, "seeds": seeds} for name, f in figures.items()}}))
        verdict = decide(claim, MadeUp({}), tmp_path)
        assert verdict.word == word and verdict.seeds == seeds


def test_seeds_that_disagree_cannot_tell(tmp_path):
    "Captions agree to a thousandth, tuning seeds do not: resampling captions alone would call it."
    claim = next(c for c in CLAIMS if c.id == "iv-fig8-clarity")
    verdict = verdict_on(claim, tmp_path, 1., spread=.001, seed_spread=1.)
    assert verdict.word == UNDECIDED and min(m.sees for m in verdict.measurements) > .4


def test_power_is_the_smaller_the_more_seeds(tmp_path):
    claim = next(c for c in CLAIMS if c.id == "iv-fig8-clarity")
    few, many = (verdict_on(claim, tmp_path, 1., seeds=range(n)).measurements[0].sees for n in (3, 12))
    assert few > 1.5*many


def test_every_claim_states_what_it_takes():
    for claim in CLAIMS:
        assert claim.sentence and claim.numbers and claim.where
        assert bool(claim.contrasts) != bool(claim.needs) and (not claim.needs or claim.needs in NEEDS and claim.why)
    assert len(CLAIMS) >= 50 and RULE.seeds >= 5 and RULE.statistic and RULE.refuted


def test_a_margin_is_what_has_to_be_exceeded():
    assert [Measurement("", .2, .1, .3, margin=m).verdict for m in (.05, .2, .35)] == [HOLDS, UNDECIDED, REFUTED]


def test_missing_results_are_not_run(tmp_path):
    verdict = decide(CLAIMS[0], Results(tmp_path), tmp_path)
    assert verdict.word == NOT_RUN and all(point in verdict.why for point in ("iv@last", "draft@last", "base@0"))
    filed = next(c for c in RULED if isinstance(c.contrasts[0], Filed))
    assert decide(filed, Results(tmp_path), tmp_path).word == NOT_RUN


def save_point(out, run, reward, kit=execute.__version__, **changed):
    step, split = [point for point in run.points if point[1].drawn == "d10"][-1]
    rows = [dict(prompt=p, group=g, seed=0, reward=reward) for g, many in split.captions().items() for p in many]
    result = Result(run.name, run.seed, step, facts_of(run, step, split) | changed, kit, 0., {}, rows)
    result.save(result_path(out, run, step, split))


def test_results_of_another_version_are_named_and_used_those_of_other_weights_are_not(tmp_path):
    iv, draft = (next(r for r in all_runs() if r.name == name) for name in ("iv", "draft"))
    save_point(tmp_path, iv, .5, kit="0.0.1")
    save_point(tmp_path, draft, .4, **{"set lr": 9.})
    results = Results(tmp_path)
    assert any("iv.s0" in line and "version 0.0.1" in line for line in results.stale)
    assert any("draft.s0" in line and "set lr was 9.0" in line for line in results.stale)
    assert results.at(Point("iv", 40)) and not results.at(Point("draft", 26))
    assert {run.name for run, *_ in execute.todo([iv, draft], tmp_path)} == {"iv", "draft"} # a run takes neither


def test_a_result_made_in_another_number_format_is_no_other_result(tmp_path):
    iv = next(r for r in all_runs() if r.name == "iv")
    save_point(tmp_path, iv, .5, dtype="fp16", **{"set mixed_precision": "fp16"})
    assert Results(tmp_path).stale == []


def test_unknown_claim_names_the_near_ones():
    with pytest.raises(KitError, match="iv-fig5c-low"):
        claims.pick_claims("iv-fig5c-lo")
    assert {c.paper for c in claims.pick_claims("ov")} == {"OnlineVPO"}
    assert len(claims.pick_claims("all")) == len(CLAIMS)


@pytest.mark.parametrize("claim", RULED, ids=lambda c: c.id)
def test_the_runs_of_a_claim_are_all_it_needs(claim, tmp_path):
    "Whoever runs `reproduce CLAIM` in an empty folder gets a verdict, not `not run`."
    known = {(run.name, step, split.drawn) for run in claims.runs_of([claim]) for step, split in run.points}
    for contrast in claim.contrasts:
        for point in claims._needed(contrast) if isinstance(contrast, Contrast) else ():
            steps = [point.step] if isinstance(point.step, int) else steps_of(point.run)
            assert all((point.run, step, point.drawn) in known for step in steps), point


@pytest.mark.parametrize("slip, says", [
    ({"sentense": "x"}, 'did you mean "sentence"'), ({"needs": "GPUs"}, "contrasts and needs GPUs"),
    ({"contrasts": ["iv"]}, "unknown field"), ({"contrasts": [{"what": "x"}]}, "more is missing")])
def test_a_slip_in_a_claim_is_one_clear_line(slip, says):
    contrast = {"what": "x", "more": "iv@40", "less": "base@0"}
    good = {"id": "x-1", "where": "", "sentence": "", "numbers": "", "contrasts": [contrast]}
    rule = {"statistic": "", "holds": "", "refuted": "", "undecided": ""}
    assert len(claims.read_claims({"rule": rule, "P": [good]})[1]) == 1
    with pytest.raises(KitError, match=says) as error:
        claims.read_claims({"rule": rule, "P": [{**good, **slip}]})
    assert "x-1" in str(error.value) and "\n" not in str(error.value)


def test_a_comparison_of_two_tuned_models_must_say_what_it_asks_of_the_base():
    given = {"what": "x", "more": "iv@40", "less": "draft@26"}
    with pytest.raises(KitError, match="over_base"):
        read_contrasts(given, "claim x")
    with pytest.raises(KitError, match="one side is not tuned"):
        read_contrasts({**given, "less": "base@0", "over_base": "required"}, "claim x")


def test_shards_cover_all_runs_once_and_keep_a_run_together():
    every = runs.seeded(list(all_runs()), 2)
    parts = [execute.shard(every, (i, 3)) for i in range(3)]
    assert sorted(map(id, sum(parts, []))) == sorted(map(id, every))
    for seed in (0, 1):
        where = [i for i, part in enumerate(parts) for run in part if run.name == "iv" and run.seed == seed]
        assert len(where) == 2 and len(set(where)) == 1


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    done = []

    def run_point(run, step, split, *_):
        if run.name == "bad":
            raise RuntimeError("no luck")
        done.append((run.name, step))
        save_point(tmp_path, replace(run, points=((step, split),)), 1.)

    monkeypatch.setattr(execute, "run_point", run_point)
    monkeypatch.setattr(execute, "Metrics", object)
    points, said = ((1, Split()), (2, Split())), []
    bad, good = Run("bad", "instructvideo", points=points), Run("good", "instructvideo", points=points)
    assert execute.run_all([bad, good], tmp_path, said.append) == [("bad", "RuntimeError: no luck")]
    assert done == [("good", 1), ("good", 2)] and "no luck" in said[0]
    done.clear()
    execute.run_all([good], tmp_path, said.append)
    assert done == [] # an interrupted run goes on: what is there is not made again


def test_points_of_equal_compute():
    "The comparison of algorithms: rivals get as much as InstructVideo, or a little more."
    named = {run.name: run for run in reversed(all_runs())}
    own = runs.compute(named["iv"], 40)
    for name, step in (("draft", 26), ("rwr", 140), ("ddpo", 7)):
        assert 1 <= runs.compute(named[name], step)/own < 1.1, name
    online = runs.compute(named["ovpo"], 36)
    for name, step in (("offline", 24), ("refl-video", 38), ("ovpo-image", 36)):
        assert .95 < runs.compute(named[name], step)/online < 1.05, name
    assert not trains(named["base"]) and Split().cost == 2*32*10


# Every run's algorithm is handed what `tune_run` would hand it: its own config from its own preset and settings, clips
# or captions, the image or the video reward. So this still fails when an algorithm's data, config fields or call change
# under the scoreboard, when a run asks the video reward for what it has not (a dimension, a value per frame), or when a
# run's settings no longer load. What it leaves out is size: the policy has 8 frames of 16 pixels, the video reward is a
# stand-in without weights, four DDIM steps, one step of the optimiser. nbs/measure/09_execute tests measuring a point.
@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return {"policy": str(tiny_pipeline(folder/"policy", prediction_type="v_prediction", vae="patch")),
            "reward": str(tiny_reward(folder/"reward"))}


class VideoStandIn:
    "The video reward's face: dims, score, and a value per frame."
    dims = ("visual_quality", "temporal_consistency", "dynamic_degree", "text_to_video_alignment",
            "factual_consistency")

    def __call__(self, clips, prompts):
        return self.per_frame(clips, prompts).mean(1)[:, None].expand(-1, len(self.dims))

    def score(self, clips, prompts, dimension): return self(clips, prompts)[:, self.dims.index(dimension)]
    def per_frame(self, frames, prompts): return frames.mean((-1, -2)).diff(dim=-1).abs().mean(-1)


FEWER = { # what an algorithm needs to be small, besides
    "refl": {"stop_from": 1, "stop_to": 2, "n_segments": 8}, # it rewards all frames
    "grpo": {"group_size": 2, "window": 1},
    "nft": {"group_size": 2, "captions_per_round": 1},
    "vader": {"grad_steps": 2},
}
FIRSTS = {run.algorithm: run for run in reversed(all_runs()) if trains(run)}

@pytest.mark.parametrize("name", sorted(FIRSTS))
def test_every_algorithm_takes_what_its_run_gives_it(name, small, tmp_path):
    import torch

    from instructvideo_kit.policy import VideoPolicy
    from instructvideo_kit.reward.clip import ClipReward
    run = FIRSTS[name]
    fewer = {"batch": 2, "n_ddim": 4, "rank": 2, **small, "mixed_precision": "no", "guidance_scale": 3.0}
    fewer.pop("policy")
    fewer |= FEWER.get(name, {})
    settings, points = {**run.settings, **fewer}, ((1, Split((1, 0, 0), n_ddim=2)),)
    run = replace(run, policy=small["policy"], settings=settings, n_clips=4, points=points)
    captions = ["a cat runs left", "a dog runs right", "a fish swims in", "a red bird flies"]
    clips = list(torch.rand(4, 8, 3, 16, 16))
    data = list(zip(clips, captions)) if runs.wants_clips(run) else captions
    rewards = {"image": ClipReward.from_pretrained(small["reward"]), "video": VideoStandIn()}
    policy = VideoPolicy.from_pretrained(small["policy"])
    assert runs.tune_run(run, 1, policy, rewards, data, tmp_path/"run", progress=False) == 1
    assert runs.compute(run, 1) > 0 and list((tmp_path/"run").rglob("*.safetensors"))
