"GRPO: groups, windows, noise that nobody shares, the ratio before an update, each term's gradient, bad input."
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructvideo_kit.diffusion.schedule import Schedule
from instructvideo_kit.files import KitError
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.lora import add_lora, lora_parameters
from instructvideo_kit.tuning.algorithm import cost_table, find, tune
from instructvideo_kit.tuning.ddpo import DDPO, DDPOConfig
from instructvideo_kit.tuning.distance import BaseDistance
from instructvideo_kit.tuning.dpo import DPOConfig
from instructvideo_kit.tuning.draft import DraftConfig
from instructvideo_kit.tuning.grpo import GRPO, GRPOConfig, training_weights
from instructvideo_kit.tuning.process import make_accelerator
from instructvideo_kit.tuning.rollouts import SampledConfig, judge
from instructvideo_kit.tuning.stream import PURPOSES, example_generator, positions_of
from instructvideo_kit.tuning.trajectories import TrajectoryConfig, roll_out, window_of

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_pipeline  # noqa: E402

PROMPTS = ["a red cat", "a blue fish", "a dog runs"]
SMALL = dict(n_ddim=4, guidance_scale=1., batch=4, group_size=2, rank=2, lr=1e-2, steps=4, save_every=1)


def redness(frames, prompts): return (frames[:, :, 0] - frames[:, :, 1:].mean(2)).tanh().mean((-1, -2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("tiny")/"policy", prediction_type="v_prediction", vae="patch")


def open_policy(path, awake=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = VideoPolicy.from_pretrained(path)
    if awake is None: return policy
    add_lora(policy, 2)
    for i, p in enumerate(lora_parameters(policy)): # a LoRA that does something, if awake is above 0
        if awake: p.data = awake*torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return policy


def made(policy, config, reward=redness, data=PROMPTS, Algorithm=GRPO):
    return Algorithm(policy, reward, data, config, make_accelerator(config, "cpu"))


def gradient(policy): return torch.cat([p.grad.flatten() for p in lora_parameters(policy)])


# ---- positions, groups, noise ---------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(world=st.integers(1, 4), accum=st.integers(1, 3), size=st.integers(1, 4), K=st.integers(2, 6),
       updates=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_no_two_of_rank_round_group_member_and_micro_batch_share_noise(world, accum, size, K, updates, seed):
    batch = size*world*accum*K
    config = TrajectoryConfig(batch=batch, grad_accum=accum, group_size=K, updates_per_round=updates, seed=seed,
                              n_ddim=3)
    steps = range(2*updates) # two rounds
    places = [p for step in steps for micro in range(accum) for rank in range(world)
              for p in positions_of(step, micro, rank, world, config)]
    assert sorted(places) == list(range(len(places)))
    first = [example_generator(seed, p).initial_seed() for p in places]
    groups = [example_generator(seed, g, "group").initial_seed() for g in range(len(places)//K)]
    rounds = [example_generator(seed, r, "round").initial_seed() for r in range(2)]
    real = [example_generator(seed, p, "data").initial_seed() for p in places]
    assert len({*first, *groups, *rounds, *real}) == len(first) + len(groups) + len(rounds) + len(real)


def test_purposes_have_numbers_of_their_own():
    assert len(set(PURPOSES.values())) == len(PURPOSES) and PURPOSES["example"] == 0


def test_a_group_is_of_one_caption_whoever_draws_it(folder):
    algorithm = made(open_policy(folder, 0), GRPOConfig(**SMALL))
    words = algorithm.captions_at(range(12))
    assert all(words[2*g] == words[2*g + 1] for g in range(6)) and set(words[:6]) == set(PROMPTS)
    assert words[2:4] == algorithm.captions_at([2, 3])


def test_start_noise_is_shared_when_asked(folder):
    policy, starts = open_policy(folder, 0), {}
    for shared in (False, True):
        config = GRPOConfig(**SMALL, shared_noise=shared, window=2, window_first=0)
        algorithm = made(policy, config)
        clips = algorithm.clips_at(range(4))
        starts[shared] = clips["z_t"][:, 0]
        assert not torch.equal(clips["z_next"][0, 0], clips["z_next"][1, 0]) # the steps' noise is never shared
    def same(z, i, j): return torch.equal(z[i], z[j])
    assert same(starts[True], 0, 1) and same(starts[True], 2, 3) and not same(starts[True], 1, 2)
    assert not any(same(starts[False], i, j) for i in range(4) for j in range(i))


# ---- the chain -------------------------------------------------------------------------------------------------------

def test_noise_only_in_the_window_and_never_in_the_last_step(folder):
    policy = open_policy(folder, 0)
    config = TrajectoryConfig(n_ddim=5, guidance_scale=1., batch=1)
    def draw(window, seed):
        return roll_out(policy, PROMPTS[:1], [torch.Generator().manual_seed(seed)], config, window)
    assert draw(None, 0)["step"].tolist() == [[0, 1, 2, 3]] and draw((1, 3), 0)["step"].tolist() == [[1, 2]]
    with pytest.raises(ValueError, match=r"window is \(3, 5\)"): draw((3, 5), 0)


@pytest.mark.parametrize("kind, sde", [
    ("v_prediction", ""), ("epsilon", ""), ("sample", ""), ("v_prediction", "cps"),
    ("flow_prediction", ""), ("flow_prediction", "dance_grpo"), ("flow_prediction", "ddim")])
def test_ratio_is_one_before_the_first_update(folder, kind, sde):
    policy = open_policy(folder, .1)
    policy.schedule = Schedule.rectified() if kind == "flow_prediction" else Schedule.modelscope(kind)
    algorithm = made(policy, GRPOConfig(**SMALL, sde=sde))
    row = algorithm.step(range(4))
    assert row["ratio_off"] < 1e-6 and row["outside"] == 0
    assert gradient(policy).isfinite().all() and gradient(policy).norm() > 0


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_ratio_is_one_whatever_the_roll_outs_batch(folder, at_once):
    algorithm = made(open_policy(folder, .1), GRPOConfig(**SMALL | dict(guidance_scale=3.), samples_at_once=at_once))
    assert algorithm.step(range(4))["ratio_off"] < 1e-6


def test_ddpo_is_on_policy_too_and_leaves_the_last_step(folder):
    policy = open_policy(folder, .1)
    algorithm = made(policy, DDPOConfig(n_ddim=4, guidance_scale=1., batch=3, rank=2, min_count=2), Algorithm=DDPO)
    assert algorithm.step(range(3))["ratio_off"] < 1e-6
    assert algorithm.rounds.data["step"][0].tolist() == [0, 1, 2]


# ---- what is trained -----------------------------------------------------------------------------------------------

def test_micro_batches_give_the_gradient_of_the_batch(folder):
    "Also where the clips that count are spread unevenly."
    def some_equal(frames, prompts):
        return redness(frames, prompts)*torch.tensor([[float("cat" not in p)] for p in prompts])
    found = []
    for accum in (1, 3):
        policy = open_policy(folder, .1)
        config = GRPOConfig(**SMALL | dict(batch=12, group_size=4), grad_accum=accum, best=1, worst=1)
        algorithm = made(policy, config, some_equal)
        rows = [algorithm.step(positions_of(0, k, 0, 1, config)) for k in range(accum)]
        found.append((gradient(policy), sum(r["left_out"] for r in rows)/accum, sum(r["loss"] for r in rows)/accum))
    (g, out, loss), (g3, out3, loss3) = found
    assert out == pytest.approx(8/12) and out3 == pytest.approx(out) and loss == pytest.approx(float(loss3), abs=1e-5)
    assert g.norm() > 0 and (g - g3).norm() < 1e-3*g.norm()


def test_weights_of_several_updates():
    r = torch.tensor([1., 2., 3., 3., 5., 1., 2., 9.])
    assert training_weights(r, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), 4).tolist() == [2., 2., 0., 0., 1., 1., 1., 1.]


def with_only(folder, scale=.1, **options):
    "Gradient of an update in which all advantages are 0, so that only what is left has one."
    policy = open_policy(folder, scale)
    algorithm = made(policy, GRPOConfig(**SMALL, **options))
    clips = algorithm.clips_at(range(4))
    algorithm.rounds.data["advantage"] = clips["advantage"]*0
    algorithm.step(range(4))
    return gradient(policy)


def test_the_pull_to_the_base_alone_has_a_gradient(folder):
    assert with_only(folder, beta=1.).norm() > 0
    assert with_only(folder).norm() == 0
    assert with_only(folder, scale=0, beta=1.).norm() == 0 # at the base there is nothing to pull


def test_the_data_term_alone_has_a_gradient(folder):
    policy = open_policy(folder, .1)
    clip = torch.rand(policy.n_frames, 3, *policy.size)
    config = GRPOConfig(**SMALL, data_term=.5)
    algorithm = made(policy, config, data=[(clip, p) for p in PROMPTS])
    row = algorithm.anchor(0)
    one = gradient(policy)
    assert row["data_loss"] > 0 and one.norm() > 0
    for p in lora_parameters(policy): p.grad = None
    algorithm.config = replace(config, data_term=1.)
    algorithm.anchor(0)
    assert torch.allclose(gradient(policy), 2*one, rtol=1e-4, atol=1e-9)


def test_guard_has_the_gradient_of_the_ratio_times_its_scale(folder):
    found = []
    for guard in (False, True):
        policy = open_policy(folder, .1)
        algorithm = made(policy, GRPOConfig(**SMALL, guard=guard, window=1, window_first=1))
        algorithm.step(range(4))
        found.append((gradient(policy), algorithm.rounds.data["std"][0, 0].item()))
    (plain, std), (guarded, _) = found
    assert plain.norm() > 0 and torch.allclose(guarded, std*plain, rtol=1e-3, atol=1e-8)


# ---- runs ----------------------------------------------------------------------------------------------------------

def figures(rows): return [{k: v for k, v in r.items() if k not in ("seconds", "memory_mb")} for r in rows]


def test_a_resumed_run_is_the_uninterrupted_one(folder, tmp_path):
    config = GRPOConfig(**SMALL, window=2, beta=.1, updates_per_round=2)
    def run(where, **options):
        return tune("grpo", open_policy(folder), redness, PROMPTS, config, tmp_path/where, progress=False, **options)
    straight = run("straight")
    run("halves", stop_after=3) # in the middle of a round
    assert figures(run("halves", resume=True).rows()) == figures(straight.rows())
    assert [row["ratio_off"] < 1e-6 for row in straight.rows()] == [True, False, True, False]


def test_cost_is_what_is_counted(folder):
    for options in (dict(), dict(beta=.1), dict(window=1), dict(best=1, worst=1, group_size=4)):
        config, policy, calls = GRPOConfig(**SMALL | dict(guidance_scale=3.) | options), open_policy(folder, 0), []
        def count(m, args, out, calls=calls): calls.append(len(args[0])*(2 if torch.is_grad_enabled() else 1))
        policy.network.register_forward_hook(count)
        made(policy, config).step(range(4))
        assert sum(calls) == GRPO.step_cost(config)*config.batch, options


def test_constant_rewards_stop_the_run_in_words_also_after_a_pause(folder, tmp_path):
    def flat(frames, prompts): return torch.zeros(len(frames))
    config = GRPOConfig(**SMALL | dict(steps=9), flat_rounds=3)
    def run(**options):
        return tune("grpo", open_policy(folder), flat, PROMPTS, config, tmp_path/"run", progress=False, **options)
    rows = run(stop_after=2).rows()
    assert [r["left_out"] for r in rows] == [1, 1] and all(r["grad_norm"] == 0 for r in rows)
    with pytest.raises(KitError, match="in 3 rounds in a row") as error: run(resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("algorithm, config", [
    ("grpo", GRPOConfig(**SMALL, window=1)), ("draft", DraftConfig(n_ddim=3, batch=2, rank=2, steps=4, lr=1e-2)),
    ("rwr", None)])
def test_every_algorithm_logs_its_distance_from_the_base(folder, tmp_path, algorithm, config):
    if config is None: config = find("rwr").Config(n_ddim=3, guidance_scale=1., batch=2, rank=2, steps=4, lr=1e-2,
                                                   n_samples=4, epochs=1)
    result = tune(algorithm, open_policy(folder), redness, PROMPTS, replace(config, distance_every=2), tmp_path/"run",
                  progress=False)
    lines = result.rows("distance")
    assert [line["step"] for line in lines] == [2, 4] and 0 < lines[0]["distance"] < lines[1]["distance"]
    off = tune(algorithm, open_policy(folder), redness, PROMPTS, replace(config, distance_every=0), tmp_path/"off",
               progress=False)
    assert off.rows("distance") == [] and figures(off.rows()) == figures(result.rows()) # looking changes nothing


def test_distance_of_the_base_is_zero_and_on_the_same_noise(folder):
    policy = open_policy(folder, 0)
    distance = BaseDistance(policy, PROMPTS, GRPOConfig(**SMALL))
    assert distance() == 0
    for p in lora_parameters(policy): p.data += .1
    assert distance() == distance() > 0


def test_the_data_term_is_a_switch_of_any_algorithm(folder, tmp_path):
    policy = open_policy(folder)
    clips = [(torch.rand(policy.n_frames, 3, *policy.size), p) for p in PROMPTS]
    config = GRPOConfig(**SMALL | dict(steps=2), data_term=.1)
    def run(data, name, config=config):
        return tune("grpo", open_policy(folder), redness, data, config, tmp_path/name, progress=False)
    assert all(row["data_loss"] > 0 for row in run(clips, "with").rows())
    assert all("data_loss" not in row for row in run(PROMPTS, "without", replace(config, data_term=0.)).rows())
    with pytest.raises(KitError, match="captions alone were given"): run(PROMPTS, "none")
    draft = DraftConfig(n_ddim=3, batch=2, rank=2, steps=1, data_term=.1)
    drafted = tune("draft", open_policy(folder), redness, clips, draft, tmp_path/"draft", progress=False)
    assert drafted.rows()[0]["data_loss"] > 0
    with pytest.raises(KitError, match="takes pairs"): find("dpo").wants(DPOConfig(data_term=.1))


def test_tar_weighs_the_frames_of_the_sampled_methods(folder):
    policy = open_policy(folder)
    z = torch.randn(2, *policy.latent_shape)
    said = {}
    def ramp(frames, prompts): return torch.arange(frames.shape[1]).float().expand(len(frames), -1)
    for lam in (0., 1.):
        said[lam] = judge(policy, ramp, z, PROMPTS[:2], SampledConfig(n_segments=0, lam_tar=lam))
    F = policy.n_frames
    frames = torch.arange(F).float()
    assert torch.allclose(said[0.], frames.mean().expand(2))
    assert torch.allclose(said[1.], (torch.exp(-(frames - F//2).abs())*frames).mean().expand(2))
    with pytest.raises(KitError, match="lam_tar weighs frames"):
        judge(policy, lambda f, p: torch.ones(len(f)), z, PROMPTS[:2], SampledConfig(lam_tar=1.))


# ---- the register, and bad input -------------------------------------------------------------------------------------

def test_it_is_in_the_table_of_costs():
    row = next(row for row in cost_table() if row["algorithm"] == "grpo")
    assert row["takes"] == "captions" and row["cost"] == 10 + 2*3
    assert row["total"]*.032/60 < 15 # minutes of two cores


@pytest.mark.parametrize("options, says", [
    (dict(group_size=1), "group_size is 1"), (dict(group_size=8), "a round has 4 clips"),
    (dict(group_size=3), "a round has 4 clips"), (dict(window=4), "window of 4 steps"),
    (dict(window=2, window_first=2), r"window is \(2, 4\)"), (dict(n_ddim=1), "the chain has 1 step"),
    (dict(eta=0.), "eta is 0.0"), (dict(noise_level=0.), "noise_level is 0.0"), (dict(std="both"), '"both"'),
    (dict(sde="euler"), '"euler"'), (dict(beta=-1.), "beta is -1"), (dict(best=2, worst=1), "more than the 2 clips"),
    (dict(flat_rounds=0), "flat_rounds is 0"), (dict(clip=0.), "clip is 0"), (dict(data_term=-1.), "data_term is -1"),
    (dict(lam_tar=math.nan), "lam_tar is nan")])
def test_values_out_of_range(options, says):
    with pytest.raises(KitError, match=says) as error: GRPOConfig(**SMALL | options)
    assert "\n" not in str(error.value)


def test_a_pull_to_the_base_without_adapters_is_refused(folder):
    with pytest.raises(KitError, match="beta is 0.1, but the policy has no LoRA"):
        made(open_policy(folder), GRPOConfig(**SMALL, beta=.1))


def test_windows_of_a_round_are_the_same_for_everyone():
    config = GRPOConfig(**SMALL | dict(n_ddim=12), window=2)
    assert [window_of(config, r) for r in range(20)] == [window_of(replace(config, grad_accum=2), r) for r in range(20)]
    assert len({window_of(config, r) for r in range(20)}) > 2
