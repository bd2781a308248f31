"What a run does beside its steps: moving average, evaluations, the best LoRA, samples, trackers, stopping."
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from instructvideo_kit.files import KitError
from instructvideo_kit.policy.lora import lora_parameters, read_lora
from instructvideo_kit.tuning import process
from instructvideo_kit.tuning.algorithm import tune as tune_with
from instructvideo_kit.tuning.config import TrainerConfig
from instructvideo_kit.tuning.instructvideo import InstructVideoConfig
from instructvideo_kit.tuning.online_dpo import OnlineDPOConfig
from instructvideo_kit.tuning.rollouts import clip_judge
from instructvideo_kit.tuning.run_folder import RunFolder, complete, read_log
from instructvideo_kit.tuning.watch import (
    best_step,
    flicker,
    held_out_evaluation,
    mean_interval,
    over_optimised,
    spread,
)

sys.path.insert(0, str(Path(__file__).parent))
from test_tuning import SMALL, open_policy, patch_folder, redness, some_clips, tune  # noqa: E402,F401

CONFIG = InstructVideoConfig(**SMALL)
LORA = "pytorch_lora_weights.safetensors"


def losses(result): return [r["loss"] for r in result.rows()]


# ---- moving average ------------------------------------------------------------------------------------------------

def test_the_result_is_the_average_of_the_steps_weights(patch_folder, tmp_path):
    policy = open_policy(patch_folder)
    config = replace(CONFIG, ema_decay=.5, save_every=1)
    result = tune(policy, redness, some_clips(policy), config, tmp_path/"run", progress=False)
    steps = [load_file(p/LORA) for p in RunFolder(tmp_path/"run").checkpoints()]
    mean = {k: v.clone() for k, v in steps[0].items()}
    for i, state in enumerate(steps): # at the start the up matrices are 0, the down matrices do not enter this check
        decay = min(.5, (2 + i)/(11 + i))
        for k in mean: mean[k] = decay*(mean[k] if i else 0*mean[k]) + (1 - decay)*state[k]
    final = load_file(result.lora/LORA)
    ups = [k for k in mean if "lora.up" in k or "lora_B" in k]
    assert ups and all(torch.allclose(final[k], mean[k], atol=1e-7) for k in ups) and any(not torch.equal(final[k],
        steps[-1][k]) for k in ups)
    own = torch.cat([p.detach().flatten() for p in lora_parameters(policy)]).sort().values # the policy carries it too
    assert torch.equal(own, torch.cat([v.flatten() for v in final.values()]).sort().values)


def test_steps_do_not_depend_on_what_is_watched_and_resuming_is_exact(patch_folder, tmp_path):
    policy = open_policy(patch_folder)
    clips, config = some_clips(policy), replace(CONFIG, dropout=True, augment_noise=.05)
    plain = tune(policy, redness, clips, config, tmp_path/"plain", progress=False)
    watching = replace(config, ema_decay=.9, eval_every=1, sample_every=1)
    # draws from the generator of the dropout
    def evaluate(policy, step):
        torch.rand(7)
        return {"held_out": torch.rand(()).item()}
    watched = tune(open_policy(patch_folder), redness, clips, watching, tmp_path/"watched", evaluate=evaluate,
                   progress=False)
    assert losses(plain) == losses(watched)
    tune(open_policy(patch_folder), redness, clips, watching, tmp_path/"halves", stop_after=2, progress=False)
    halves = tune(open_policy(patch_folder), redness, clips, watching, tmp_path/"halves", resume=True, progress=False)
    one, other = (load_file(r.lora/LORA) for r in (watched, halves))
    assert losses(halves) == losses(plain) and all(torch.equal(one[k], other[k]) for k in one)
    assert any(not torch.equal(one[k], v) for k, v in load_file(plain.lora/LORA).items())


def test_run_folders_older_than_a_field_can_be_resumed(patch_folder, tmp_path):
    clips = some_clips(open_policy(patch_folder))
    tune(open_policy(patch_folder), redness, clips, CONFIG, tmp_path/"run", stop_after=2, progress=False)
    path, inputs = tmp_path/"run/config.yaml", tmp_path/"run/inputs.json"
    old = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in ("ema_decay", "tracker",
        "sample_every")}
    path.write_text(yaml.safe_dump(old))
    inputs.write_text(json.dumps({k: v for k, v in json.loads(inputs.read_text()).items() if k != "algorithm"}))
    with pytest.raises(KitError, match="ema_decay was 0.0, is 0.9"):
        tune(open_policy(patch_folder), redness, clips, replace(CONFIG, ema_decay=.9), tmp_path/"run", resume=True,
             progress=False)
    assert tune(open_policy(patch_folder), redness, clips, CONFIG, tmp_path/"run", resume=True, progress=False).finished


# ---- evaluations ---------------------------------------------------------------------------------------------------

def rows(**figures): # name -> list of means; every clip has its own level, all change alike but for a little noise
    def clips(name, mean):
        return (mean + .01*torch.randn(8, generator=torch.Generator().manual_seed(len(name)))).tolist()
    n = len(next(iter(figures.values())))
    return [{"step": 20*i, **{k: v[i] for k, v in figures.items()},
             "clips": {k: clips(k, v[i]) for k, v in figures.items()}} for i in range(n)]


@pytest.mark.parametrize("figures, says", [
    (dict(reward=[0, 1, 2], second=[0, 1, .5]), "the second judge fell"),
    (dict(reward=[0, 1, 2], second=[0, 1, 2]), ""), (dict(reward=[0, 1, .9], second=[0, 1, .5]), ""),
    (dict(reward=[0, 1, 2], flicker=[.1, .1, .3]), "flicker rose"), (dict(reward=[0, 1, 2], flicker=[.3, .2, .1]), ""),
    (dict(reward=[0, 1, 2], spread=[.9, .9, .2]), "became alike"), (dict(reward=[0, 1, 2], spread=[.2, .5, .9]), ""),
    (dict(reward=[0, 1, 2], second=[0, 1, .9999]), "")]) # certain, but next to nothing
def test_the_watch_warns_of_what_it_should(figures, says):
    message = over_optimised(rows(**figures))
    assert bool(message) == bool(says) and says in message and "\n" not in message


def test_a_difference_within_its_interval_is_none():
    told = rows(reward=[0., 1.], second=[1., 1.])
    told[1]["clips"]["second"] = [a + d for a,
                                  d in zip(told[0]["clips"]["second"], (-.5, .4, -.4, .5, -.6, .4, -.3, .2))]
    told[1]["second"] = sum(told[1]["clips"]["second"])/8
    assert told[1]["second"] < told[0]["second"] and over_optimised(told) == ""
    single = [{**r, "clips": {k: v[:1] for k, v in r["clips"].items()}} for r in rows(reward=[0., 1.], second=[1., 0.])]
    assert over_optimised(single) == "" # one clip has no interval


def test_interval_is_students():
    quantiles = {2: 4.302653, 4: 2.776445, 9: 2.262157, 30: 2.042272} # of the 97.5 % point, from tables
    for nu, t in quantiles.items():
        d = torch.randn(nu + 1, generator=torch.Generator().manual_seed(nu), dtype=torch.float64)
        _, low, high = mean_interval(d)
        assert (high - low)/2 == pytest.approx(t*d.std().item()/(nu + 1)**.5, rel=.05 if nu < 4 else .005)
    with pytest.raises(ValueError, match="at least one"): mean_interval([])


def test_flicker_and_spread_by_hand():
    video = torch.zeros(2, 3, 3, 2, 2)
    video[0, 1] = .5
    video[1] = 1.
    assert flicker(video).tolist() == [.5, 0.] # up and down again: .5 twice, over two pairs
    assert spread(video).tolist() == pytest.approx([(1/4 + 1/16 + 1/4)/3]*2)


def test_over_optimisation_is_warned_of_and_the_best_lora_is_kept(patch_folder, tmp_path):
    "The second judge is happiest at step 2."
    policy, figures = open_policy(patch_folder), {0: (.1, .1), 1: (.2, .2), 2: (.3, .9), 3: (.4, .3), 4: (.5, .2)}
    def evaluate(policy, step): return rows(reward=[figures[step][0]], second=[figures[step][1]])[0] | {"step": step}
    config = replace(CONFIG, eval_every=1, save_every=4)
    with pytest.warns(UserWarning, match="step 3: over-optimisation.*second judge fell") as caught:
        result = tune(policy, redness, some_clips(policy), config, tmp_path/"run", evaluate=evaluate, progress=False)
    # said once, although step 4 has it too
    assert len([w for w in caught if "over-optimisation" in str(w.message)]) == 1
    evaluations = result.rows("eval")
    assert [r["step"] for r in evaluations] == [0, 1, 2, 3,
                                                4] and ["warning" in r for r in evaluations] == [False]*3 + [True]*2
    assert best_step(evaluations) == 2 and result.best == tmp_path/"run/best/step-000002"
    kept, last = load_file(result.best/LORA), load_file(result.lora/LORA)
    assert read_lora(result.best)[1]["r"] == 2 and any(not torch.equal(kept[k], last[k]) for k in kept)
    again = tune(open_policy(patch_folder), redness, some_clips(policy), replace(config, steps=5, eval_every=9),
                 tmp_path/"run", resume=True, progress=False)
    assert again.best == result.best and result.best.is_dir()


def test_an_evaluation_has_the_same_noise_each_time_and_judges_of_any_kind(patch_folder, tmp_path):
    policy = open_policy(patch_folder)
    class Video: # a judge with several numbers
        dims = ("visual_quality", "temporal_consistency", "dynamic_degree", "text_to_video_alignment",
                "factual_consistency")
        def __call__(self, video, prompts): return video.mean((1, 2, 3, 4))[:, None]*torch.ones(5)
    config = OnlineDPOConfig(n_ddim=2, guidance_scale=1., batch=2, rank=2, steps=2, n_candidates=2, eval_every=1,
                             save_every=2)
    evaluate = held_out_evaluation(["a red dog", "a blue bird"],
                                   {"reward": clip_judge(Video(), 0, "dynamic_degree"), "second": clip_judge(redness)},
                                   2)
    first = evaluate(policy, 0)
    assert first == evaluate(policy, 7) and set(first) == {"reward", "second", "flicker", "spread", "clips"}
    result = tune_with("onlinevpo", policy, Video(), ["a cat", "a fish"], config, tmp_path/"run", evaluate=evaluate,
                       progress=False)
    assert len(result.rows("eval")) == 3
    assert result.rows("eval")[0]["reward"] == first["reward"]
    assert result.best is not None
    with pytest.raises(ValueError, match="expected at least one caption"):
        held_out_evaluation(["a"], {"second": redness})


# ---- samples, trackers, stop ---------------------------------------------------------------------------------------

def test_sample_strips_are_comparable(patch_folder, tmp_path):
    policy = open_policy(patch_folder)
    result = tune(policy, redness, some_clips(policy), replace(CONFIG, sample_every=2, lr=1e-9), tmp_path/"run",
                  progress=False)
    strips = [Image.open(p).convert("RGB") for p in sorted((result.run_dir/"samples").iterdir())]
    assert [p.name for p in sorted((result.run_dir/"samples").iterdir())] == ["step-000000.png", "step-000002.png",
        "step-000004.png"]
    # next to no learning: the same clips
    assert len({s.size for s in strips}) == 1 and strips[0].tobytes() == strips[2].tobytes()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_without_its_package_is_one_line_before_a_folder_is_made(patch_folder, tmp_path, monkeypatch, name):
    monkeypatch.setitem(process.AVAILABLE, name, lambda: False)
    policy = open_policy(patch_folder)
    with pytest.raises(KitError, match=f"pip install {name}") as error:
        tune(policy, redness, some_clips(policy), replace(CONFIG, tracker=name), tmp_path/"run", progress=False)
    assert "\n" not in str(error.value) and not (tmp_path/"run").exists()
    with pytest.raises(KitError, match='did you mean "tensorboard"'): TrainerConfig(tracker="tensorbord")


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_wandb_is_offline_and_inside_the_run_folder_unless_told_otherwise(patch_folder, tmp_path, monkeypatch, mode):
    calls, told = [], []
    class Tracker:
        name = "wandb"
        def log(self, values, step=None, **kwargs): told.append((step, values))
        def finish(self): told.append("finished")
    def init_trackers(self, name, config=None, init_kwargs=None):
        calls.append((name, config, init_kwargs))
        self.trackers = [Tracker()]
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda log_with,
                        *args: [log_with] if log_with else [])
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", init_trackers)
    monkeypatch.setitem(process.AVAILABLE, "wandb", lambda: True)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for kind in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", "x")
        monkeypatch.delenv(f"WANDB_{kind}_DIR")
    if mode: monkeypatch.setenv("WANDB_MODE", mode)
    policy = open_policy(patch_folder)
    def evaluate(policy, step):
        return {"reward": .5, "clips": {}}
    tune(policy, redness, some_clips(policy), replace(CONFIG, tracker="wandb", eval_every=2), tmp_path/"run",
         evaluate=evaluate, progress=False)
    (name, config, options), *_ = calls
    assert options["wandb"] == {"dir": str(tmp_path/"run"),
                                "mode": mode or "offline"} and config["lr"] == .01 and None not in config.values()
    assert told[-1] == "finished" and told[0] == (0, {"eval/reward": .5}) and "step/loss" in told[1][1]


def test_tensorboard_writes_into_the_run_folder(patch_folder, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    policy = open_policy(patch_folder)
    tune(policy, redness, some_clips(policy), replace(CONFIG, tracker="tensorboard"), tmp_path/"run", progress=False)
    assert list((tmp_path/"run/tensorboard").rglob("events.*")) and len(read_log(tmp_path/"run")) == 4


def test_stop_saves_and_the_run_goes_on_exactly(patch_folder, tmp_path):
    clips, asked = some_clips(open_policy(patch_folder)), []
    straight = tune(open_policy(patch_folder), redness, clips, CONFIG, tmp_path/"straight", progress=False)
    def stop():
        asked.append(1)
        return len(asked) == 3
    result = tune(open_policy(patch_folder), redness, clips, replace(CONFIG, save_every=100), tmp_path/"run",
                  progress=False, stop=stop)
    assert (result.steps, result.finished, result.lora.name) == (3, False, "step-000003")
    assert losses(tune(open_policy(patch_folder), redness, clips, CONFIG, tmp_path/"run", resume=True,
                       progress=False)) == losses(straight)
    config = OnlineDPOConfig(n_ddim=2, guidance_scale=1., batch=2, rank=2, steps=9, n_candidates=2)
    online = tune_with("onlinevpo", open_policy(patch_folder), redness, ["a cat", "a fish"], config, tmp_path/"online",
                       progress=False, stop=lambda: True)
    assert online.steps == 1 and online.lora.is_dir()



def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_can_go_on(patch_folder, tmp_path):
    "The system lets no file grow beyond half of the optimiser's, from the third step on, as a full disk does."
    resource = pytest.importorskip("resource", reason="this system has no limit for the size of a file")
    clips, calls, run = some_clips(open_policy(patch_folder)), [], tmp_path/"run"
    straight = tune(open_policy(patch_folder), redness, clips, CONFIG, tmp_path/"straight", progress=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    def fills(frames, prompts):
        calls.append(1)
        if len(calls) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE,
                               ((run/"checkpoints/step-000002/optimizer.pt").stat().st_size//2, hard))
        return redness(frames, prompts)
    fills.__name__ = "redness"
    try:
        with pytest.raises(KitError, match="step 4 could not be saved .*last good checkpoint: .*step-000002") as error:
            tune(open_policy(patch_folder), fills, clips, CONFIG, run, progress=False)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert [p.name for p in (run/"checkpoints").iterdir()] == ["step-000002"]
    assert complete(run/"checkpoints/step-000002")
    assert losses(tune(open_policy(patch_folder), redness, clips, CONFIG, run, resume=True,
                       progress=False)) == losses(straight)


@pytest.mark.parametrize("options, says", [
    (dict(ema_decay=1.), "ema_decay is 1.0"), (dict(ema_decay=-.1), "ema_decay is -0.1"),
    (dict(sample_every=-1), "sample_every is -1"), (dict(eval_every=-2), "eval_every is -2")])
def test_values_out_of_range(options, says):
    with pytest.raises(KitError, match=says): TrainerConfig(**options)
