"Tuning: exactness of the two-stage gradient, its limits, run folders, crashes and resuming, bad input."
import json
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from instructvideo_kit.files import KitError, shipped
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.lora import add_lora, load_lora, lora_parameters, read_lora
from instructvideo_kit.reward.segvr import segment_frames
from instructvideo_kit.tuning.algorithm import tune as tune_with
from instructvideo_kit.tuning.config import HEADER, TrainerConfig, load_preset
from instructvideo_kit.tuning.gradient import objective, reward_gradient, score
from instructvideo_kit.tuning.instructvideo import InstructVideo, InstructVideoConfig, edit
from instructvideo_kit.tuning.process import make_accelerator
from instructvideo_kit.tuning.run_folder import RunFolder, complete, read_log
from instructvideo_kit.tuning.stream import clip_order, draw_noise, example_generator, positions_of
from instructvideo_kit.tuning.trainer import Trainer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from tiny import tiny_pipeline  # noqa: E402

tune = partial(tune_with, "instructvideo")
# a chain of two steps
SMALL = dict(n_ddim=5, tau=.4, guidance_scale=1., batch=2, rank=2, lr=1e-2, steps=4, save_every=2, clamp="straight")


def redness(frames, prompts): # curved, so that the gradient depends on the frame
    return (frames[:, :, 0] - frames[:, :, 1:].mean(2)).tanh().mean((-1, -2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tiny_pipeline(tmp_path_factory.mktemp("tiny")/"policy", vae="kl")


@pytest.fixture(scope="module")
def patch_folder(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("tiny")/"patch", prediction_type="v_prediction", vae="patch")


def open_policy(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = VideoPolicy.from_pretrained(path)
    generator = torch.Generator().manual_seed(0)
    for name, p in policy.unet.named_parameters(): # diffusers starts these at zero, which would hide dropout and time
        if "temp_conv" in name and "conv4" in name: p.data = .1*torch.randn(p.shape, generator=generator)
    return policy


def some_clips(policy, n=3):
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(policy.n_frames, 3, *policy.size, generator=generator), f"a {w} cat") for w in ("red", "blue",
        "night")[:n]]


@pytest.mark.parametrize("options", [dict(), dict(loss="1-R", lam_tar=0., grad_steps=2, checkpoint=True),
                                     dict(frames_at_once=2, batched_cfg=False)])
def test_two_stage_backward_equals_autograd(folder, options):
    policy = open_policy(folder).to(torch.float64)
    lora = add_lora(policy, rank=2)
    for i, p in enumerate(lora):
        p.data = .1*torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    config = InstructVideoConfig(**{**SMALL, "guidance_scale": 3., "frames_at_once": 1, **options})
    prompts, generators = ["a red cat", "a dog runs"], [example_generator(0, p) for p in range(2)]
    z, eps = draw_noise(policy.latent_shape, generators).double(), draw_noise(policy.latent_shape, generators).double()
    g = segment_frames(policy.n_frames, 4, 2, generator=generators[0])
    z_0 = edit(policy, z, eps, prompts, config)
    loss, _ = objective(score(policy, redness, z_0, g, prompts, config), g, policy.n_frames, config)
    plain = torch.autograd.grad(loss, lora, retain_graph=True, allow_unused=True)
    dz_0, scores = reward_gradient(policy, redness, z_0, g, prompts, config)
    staged = torch.autograd.grad((z_0*dz_0).sum(), lora, allow_unused=True)
    plain, staged = (torch.cat([v.flatten() for v in vs if v is not None]) for vs in (plain, staged))
    assert plain.norm() > 0 and (plain - staged).norm() < 1e-6*plain.norm()
    assert torch.allclose(objective(scores, g, policy.n_frames, config)[0], loss)


def test_limits_of_the_objective():
    scores, g = torch.rand(2, 8), segment_frames(8, 8, 2)
    everything = InstructVideoConfig(n_segments=8, lam_tar=0.)
    assert torch.allclose(objective(scores, g, 8, everything)[0], -scores.mean())
    paper, code = InstructVideoConfig(), InstructVideoConfig(loss="1-R")
    assert torch.allclose(objective(scores, g, 8, code)[0] - objective(scores, g, 8, paper)[0], torch.tensor(1.))
    hand = sum(scores[0, i]*torch.exp(torch.tensor(-abs(i - 4.))) for i in range(8)) / 8
    assert torch.allclose(objective(scores[:1], g[:1], 8, paper)[1], hand)


def test_full_tau_starts_near_pure_noise_and_small_tau_near_the_clip(patch_folder):
    policy = open_policy(patch_folder)
    z, eps = torch.zeros(1, *policy.latent_shape), draw_noise(policy.latent_shape, [example_generator(0, 0)])
    def run(z, tau):
        return edit(policy, z, eps, ["a cat"], InstructVideoConfig(tau=tau, guidance_scale=None, n_ddim=20))
    with torch.no_grad():
        def apart(tau):
            return (run(z + 1., tau) - run(z, tau)).square().mean().item() # how much of the clip comes through
        assert 0 < apart(1.) < .3*apart(.1)


def test_only_the_lora_has_a_gradient(folder):
    policy = open_policy(folder)
    add_lora(policy, 2)
    config = InstructVideoConfig(**SMALL)
    step = InstructVideo(policy, redness, some_clips(policy), config, make_accelerator(config, "cpu"))
    row = step.step(range(2))
    assert {"loss", "reward", "R"} <= set(row) and all(p.grad is not None for p in lora_parameters(policy))
    moved = {n for part in (policy.unet, policy.vae, policy.text_encoder) for n,
             p in part.named_parameters() if p.grad is not None}
    assert moved and all(".lora_" in n for n in moved)


def test_dropout_is_off_unless_asked_for(folder):
    rewards = {}
    for dropout in (False, True):
        policy = open_policy(folder)
        add_lora(policy, 2)
        config = InstructVideoConfig(**SMALL, dropout=dropout)
        step = InstructVideo(policy, redness, some_clips(policy), config, make_accelerator(config, "cpu"))
        rewards[dropout] = [step.step(range(2))["reward"].item() for _ in range(2)]
        assert not policy.unet.training
    assert rewards[False][0] == rewards[False][1] and rewards[True][0] != rewards[True][1]


def test_micro_batches_give_the_gradient_of_the_batch(folder):
    gradients = []
    for accum in (1, 2):
        policy = open_policy(folder)
        add_lora(policy, 2)
        config = InstructVideoConfig(**{**SMALL, "grad_accum": accum, "augment_shift": 1, "augment_noise": .1,
                                        "offset_noise": .1})
        step = InstructVideo(policy, redness, some_clips(policy), config, make_accelerator(config, "cpu"))
        for micro in range(accum): step.step(positions_of(0, micro, 0, 1, config))
        gradients.append(torch.cat([p.grad.flatten() for p in lora_parameters(policy)]))
    assert gradients[0].norm() > 0 and (gradients[0] - gradients[1]).norm() < 1e-4*gradients[0].norm()


def test_a_half_written_checkpoint_is_never_loaded(patch_folder, tmp_path):
    config, clips = InstructVideoConfig(**SMALL), some_clips(open_policy(patch_folder))
    whole = tune(open_policy(patch_folder), redness, clips, config, tmp_path/"run", progress=False).rows()
    for damage in ("optimizer.pt", "state.json"):
        last = RunFolder(tmp_path/"run").checkpoints()[-1]
        with open(last/damage, "r+b") as f: f.truncate(10)
        assert not complete(last)
        (tmp_path/"run/checkpoints/step-000099.tmp").mkdir(exist_ok=True) # killed while saving
        again = tune(open_policy(patch_folder), redness, clips, config, tmp_path/"run", resume=True, progress=False)
        assert [r["loss"] for r in again.rows()] == [r["loss"] for r in whole]
    assert not list((tmp_path/"run").rglob(".*"))


def test_resume_without_any_checkpoint_starts_over(patch_folder, tmp_path):
    config, clips = InstructVideoConfig(**{**SMALL, "steps": 2}), some_clips(open_policy(patch_folder))
    first = tune(open_policy(patch_folder), redness, clips, config, tmp_path/"run", resume=True, progress=False).rows()
    for p in RunFolder(tmp_path/"run").checkpoints(): (p/"state.json").unlink()
    with open(tmp_path/"run/log.jsonl", "a") as f: f.write('{"kind": "step", "ste')
    again = tune(open_policy(patch_folder), redness, clips, config, tmp_path/"run", resume=True, progress=False).rows()
    assert [r["loss"] for r in again] == [r["loss"] for r in first]


def test_more_steps_are_a_fair_reason_to_resume_and_another_lr_is_not(patch_folder, tmp_path):
    config, clips = InstructVideoConfig(**{**SMALL, "steps": 2}), some_clips(open_policy(patch_folder))
    tune(open_policy(patch_folder), redness, clips, config, tmp_path/"run", progress=False)
    result = tune(open_policy(patch_folder), redness, clips, replace(config, steps=4), tmp_path/"run", resume=True,
                  progress=False)
    assert result.finished and result.steps == 4
    with pytest.raises(KitError, match="lr was 0.01, is 0.5"):
        tune(open_policy(patch_folder), redness, clips, replace(config, lr=.5), tmp_path/"run", resume=True,
             progress=False)
    with pytest.raises(KitError, match="clips was"):
        tune(open_policy(patch_folder), redness, clips[:2], config, tmp_path/"run", resume=True, progress=False)
    with pytest.raises(KitError, match="holds a run already"):
        tune(open_policy(patch_folder), redness, clips, config, tmp_path/"run", progress=False)


def test_evaluations_are_logged_and_the_result_loads(patch_folder, tmp_path):
    policy = open_policy(patch_folder)
    seen = []
    config = InstructVideoConfig(**{**SMALL, "steps": 4, "eval_every": 2})
    result = tune(policy, redness, some_clips(policy), config, tmp_path/"run", evaluate=lambda p,
                  step: (seen.append(p is policy), {"held_out": step})[1], progress=False)
    assert [r["held_out"] for r in result.rows("eval")] == [0, 2, 4] and all(seen)
    state, about = read_lora(result.lora)
    assert about["r"] == 2 and any(v.abs().sum() > 0 for k, v in state.items() if "lora_B" in k)
    assert {"step", "loss", "reward", "R", "grad_norm", "seconds", "memory_mb"} <= set(result.rows()[0])


def test_nan_reward_stops_with_one_line_and_keeps_the_checkpoint(patch_folder, tmp_path):
    calls = []
    def breaks(frames, prompts):
        calls.append(1)
        return redness(frames, prompts)*(float("nan") if len(calls) > 3 else 1.)
    with pytest.raises(KitError, match="step 4: .*not finite.*step-000002"):
        policy = open_policy(patch_folder)
        tune(policy, breaks, some_clips(policy), InstructVideoConfig(**SMALL), tmp_path/"run", progress=False)
    assert all(p.isfinite().all() for p in lora_parameters(policy)) and len(read_log(tmp_path/"run")) == 3


def test_a_gradient_that_is_nan_stops_though_the_loss_is_a_number(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(3)) # the root of 0 is 0, its slope is not
    config = InstructVideoConfig(**SMALL)
    def step(positions):
        loss = (weight*0).sqrt().sum()
        loss.backward()
        return {"loss": loss.item()}
    trainer = Trainer(config, RunFolder.open(tmp_path/"run", config), [weight], lambda folder: None, None)
    with pytest.raises(KitError, match="step 1: grad_norm is not finite, stopped before the weights moved"):
        trainer.fit(step)
    assert torch.equal(weight, torch.zeros(3))


def test_every_epoch_is_shuffled_anew():
    epochs = [tuple(clip_order(range(k*20, (k + 1)*20), 20, seed=0)) for k in range(4)]
    assert len({*epochs, tuple(range(20))}) == 5 and epochs[0] != tuple(clip_order(range(20), 20, seed=1))


def test_two_runs_with_one_seed_are_the_same_bit_for_bit(patch_folder, tmp_path):
    def run(name, **options):
        policy = open_policy(patch_folder)
        config = InstructVideoConfig(**SMALL | dict(steps=2, augment_noise=.1) | options)
        rows = tune(policy, redness, some_clips(policy), config, tmp_path/name, progress=False).rows()
        return torch.cat([p.detach().flatten() for p in lora_parameters(policy)]), [r["loss"] for r in rows]
    (weights, losses), (again, same), (other, _) = run("a"), run("b"), run("c", seed=1)
    assert torch.equal(weights, again) and losses == same
    assert not torch.equal(weights, other)


def test_a_lora_draws_at_another_size_than_it_was_tuned_at(patch_folder, tmp_path):
    small = open_policy(patch_folder)
    tuned = tune(small, redness, some_clips(small), InstructVideoConfig(**SMALL | dict(steps=2)), tmp_path/"run",
                 progress=False)
    twice = tuple(2*side for side in small.size)
    base, large = (VideoPolicy.from_pretrained(patch_folder, size=twice) for _ in range(2))
    load_lora(large, tuned.lora)
    clips = [policy.generate(["a red cat"], n_ddim=2, seed=0) for policy in (base, large)]
    assert clips[1].shape[-2:] == twice and clips[1].isfinite().all()
    assert (clips[1] - clips[0]).abs().max() > 1e-4 # it does something there, too


@pytest.mark.parametrize("reward, says", [
    (lambda frames, prompts: redness(frames, prompts).mean(1), "expected one score per frame"),
    (lambda frames, prompts: redness(frames.detach(), prompts), "no gradient")])
def test_rewards_that_do_not_fit(patch_folder, tmp_path, reward, says):
    policy = open_policy(patch_folder)
    with pytest.raises(KitError, match=says):
        tune(policy, reward, some_clips(policy), InstructVideoConfig(**SMALL), tmp_path/"run", progress=False)


@pytest.mark.parametrize("options, says", [
    (dict(tau=0), "tau is 0"), (dict(tau=1.01), "tau is 1.01"), (dict(tau=.04), "at least one step"),
    (dict(grad_steps=13), "1..12"),
    (dict(lam_tar=-1), "lam_tar is -1"), (dict(frames="randon"), "did you mean"), (dict(loss="R"), '"R"'),
    (dict(rank=0), "rank is 0"),
    (dict(batch=0), "batch is 0"), (dict(mixed_precision="fp8"), "fp8"), (dict(n_ddim=0), "n_ddim is 0")])
def test_values_out_of_range(options, says):
    with pytest.raises(KitError, match=says) as error: InstructVideoConfig(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, says", [
    ("lam_tarr: 1", 'did you mean "lam_tar"'), ("tau: high", "tau is 'high', expected float"),
    ("batch: 2.5", "expected int"),
    ("mixed_precision: no", "in quotes"), ("dropout: 1", "expected bool"), ("tau: [", "not YAML"),
    ("- 1", "field: value"), ("tau:", "tau is None")])
def test_presets_that_are_wrong(tmp_path, text, says):
    (tmp_path/"p.yaml").write_text(text + "\n")
    with pytest.raises(KitError, match=says.replace("[", r"\[")) as error:
        load_preset(tmp_path/"p.yaml", InstructVideoConfig)
    assert "\n" not in str(error.value)


def test_half_precision_on_a_cpu_is_refused(patch_folder, tmp_path):
    policy = open_policy(patch_folder)
    with pytest.raises(KitError, match="needs a GPU"):
        tune(policy, redness, some_clips(policy), InstructVideoConfig(**SMALL, mixed_precision="fp16"), tmp_path/"run",
             progress=False)
    assert not (tmp_path/"run").exists()


def test_unknown_preset_names_the_near_ones():
    with pytest.raises(KitError, match='did you mean "menagerie'): load_preset("menagrie", InstructVideoConfig)


@pytest.mark.parametrize("name", [n for n in shipped("preset") if n.startswith(("instructvideo", "menagerie"))])
def test_shipped_presets_load_and_every_value_names_its_source(name):
    load_preset(name, InstructVideoConfig)
    lines = [line for line in shipped("preset")[name].read_text().splitlines() if line and not line.startswith(("#",
        *HEADER))]
    assert all(" # " in line for line in lines)


def test_the_paper_preset_is_the_paper():
    config = load_preset("instructvideo", InstructVideoConfig)
    assert (config.n_ddim, config.tau, config.grad_steps, config.n_segments, config.lam_tar) == (20, .6, 1, 4, 1.)
    assert (config.lr, config.batch, config.steps) == (1e-5, 8, 20000)
    named = set(yaml.safe_load(shipped("preset")["instructvideo"].read_text()))
    assert named - set(HEADER) == set(InstructVideoConfig.__dataclass_fields__) # nothing is left to a default
    assert InstructVideo.step_cost(replace(config, checkpoint=False, checkpoint_blocks=False)) == 26


def test_overrides_win_and_none_is_not_given():
    config = load_preset("menagerie", InstructVideoConfig, {"steps": 3, "tau": None})
    assert (config.steps, config.tau) == (3, .6)


def test_streams_of_two_processes_are_disjoint_and_cover_the_batch():
    config = TrainerConfig(batch=8)
    one, two = list(positions_of(5, 0, 0, 1, config)), [list(positions_of(5, 0, r, 2, config)) for r in (0, 1)]
    assert two[0] + two[1] == one and not set(two[0]) & set(two[1])
    assert sorted(clip_order(range(30, 40), 10, seed=4)) == list(range(10))
    with pytest.raises(KitError, match="multiple of 3"): positions_of(0, 0, 0, 3, config)


def test_a_folder_with_foreign_files_is_left_alone(tmp_path):
    (tmp_path/"thesis.tex").write_text("years of work")
    with pytest.raises(KitError, match="holds no run"): RunFolder.open(tmp_path, TrainerConfig())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_log_rows_are_json_lines(tmp_path):
    run = RunFolder.open(tmp_path/"run", TrainerConfig())
    for step in (1, 2, 3): run.log({"kind": "step", "step": step, "loss": .5})
    run.rewind(2)
    assert [json.loads(line)["step"] for line in run.log_path.read_text().splitlines()] == [1, 2]
    with pytest.raises(ValueError): run.log({"loss": float("nan")})


@pytest.mark.parametrize("level", ["checkpoint", "checkpoint_blocks"])
def test_recomputation_changes_no_gradient_even_with_dropout(folder, level):
    gradients = []
    for options in (dict(), {level: True}):
        policy = open_policy(folder)
        torch.manual_seed(0)
        add_lora(policy, 2)
        for p in lora_parameters(policy):
            p.data = .1*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        config = InstructVideoConfig(**SMALL, dropout=True, merge_lora=False, **options)
        torch.manual_seed(1)
        InstructVideo(policy, redness, some_clips(policy), config, make_accelerator(config, "cpu")).step(range(2))
        gradients.append(torch.cat([p.grad.flatten() for p in lora_parameters(policy)]))
        assert not policy.network.training
    assert (gradients[0] - gradients[1]).norm() < 1e-5*gradients[0].norm()
