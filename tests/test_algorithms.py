"The algorithms: losses against numbers worked out by hand, limits, resuming, the moving reference, bad input."
import math
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from instructvideo_kit.diffusion import stochastic
from instructvideo_kit.diffusion.sampling import ddim_step, step_pairs, to_x0_eps
from instructvideo_kit.diffusion.schedule import Schedule, corrupt
from instructvideo_kit.files import KitError, shipped
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.lora import add_lora, lora_parameters, lora_state
from instructvideo_kit.reward.segvr import segment_frames
from instructvideo_kit.tuning import adapters, ddpo, dpo, draft, grpo, online_dpo, refl, rollouts, rwr
from instructvideo_kit.tuning.algorithm import find, tune
from instructvideo_kit.tuning.config import HEADER, load_preset
from instructvideo_kit.tuning.ddpo import advantages, ddim_gaussian, ddpo_loss, flow_gaussian, log_probability
from instructvideo_kit.tuning.dpo import best_and_worst, diffusion_dpo_loss
from instructvideo_kit.tuning.process import make_accelerator
from instructvideo_kit.tuning.rollouts import candidates
from instructvideo_kit.tuning.stream import clip_order, draw_noise, example_generator, positions_of

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_pipeline  # noqa: E402

PROMPTS = ["a red cat", "a blue fish", "a dog runs"]
DRAWN = dict(n_ddim=3, guidance_scale=1., batch=2, rank=2, lr=1e-2, steps=4, save_every=1)
# name -> (algorithm, small config); rounds of two steps, so that a stop after three is in the middle of one
ALGORITHMS = {
    "draft": ("draft", draft.DraftConfig(**DRAWN, clamp="straight", grad_steps=2)),
    "draft_lv": ("draft", draft.DraftConfig(**DRAWN, clamp="straight", lv_noises=2)),
    "vader": ("vader", draft.DraftConfig(**DRAWN, clamp="straight", grad_steps=3, truncation="random", n_segments=1)),
    "refl": ("refl", refl.ReflConfig(**DRAWN, clamp="straight", grad_accum=1, stop_from=1, stop_to=2)),
    "rwr": ("rwr", rwr.RWRConfig(**DRAWN, n_samples=2, epochs=2, inverse_temperature=5.)),
    "ddpo": ("ddpo", ddpo.DDPOConfig(**DRAWN, min_count=2, timestep_fraction=.7)),
    "grpo": ("grpo", grpo.GRPOConfig(**DRAWN, group_size=2, updates_per_round=2, window=1, beta=.1)),
    "dpo": ("dpo", dpo.DPOConfig(**DRAWN, n_candidates=2)),
    "onlinevpo": ("onlinevpo", online_dpo.OnlineDPOConfig(**DRAWN, n_candidates=2, ref_update_every=2)),
}
# tests/test_nft.py has those of nft


def redness(frames, prompts): return (frames[:, :, 0] - frames[:, :, 1:].mean(2)).tanh().mean((-1, -2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("tiny")/"policy", prediction_type="v_prediction", vae="patch")


def open_policy(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = VideoPolicy.from_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    for name, p in policy.unet.named_parameters(): # diffusers starts these at zero, which would hide the time
        if "temp_conv" in name and "conv4" in name: p.data = .1*torch.randn(p.shape, generator=generator)
    return policy


def awake(policy): # a LoRA that does something
    for i, p in enumerate(lora_parameters(policy)):
        p.data = .1*torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p)


def gradient_of(policy, Algorithm, reward, config, data=PROMPTS):
    step = Algorithm(policy, reward, data, config, make_accelerator(config, "cpu"))
    row = [step.step(positions_of(0, k, 0, 1, config)) for k in range(config.grad_accum)]
    return torch.cat([p.grad.flatten() for p in lora_parameters(policy)]), row


def slopes(f, x, h=1e-6): # finite differences
    unit = torch.eye(len(x), dtype=x.dtype)
    return torch.stack([(f(x + h*e) - f(x - h*e))/(2*h) for e in unit])


# ---- losses --------------------------------------------------------------------------------------------------------

def test_ddpo_loss_by_hand():
    ratio, A = torch.tensor([.5, 1.05, 1.05, 1.5], dtype=torch.float64), torch.tensor([-1., 2., -3., 7.],
        dtype=torch.float64)
    # clip .1: max(.5, .9) = .9; max(-2.1, -2.1) = -2.1; max(3.15, 3.15) = 3.15; 
    # A = 7 counts as 5: max(-7.5, -5.5) = -5.5
    assert ddpo_loss(ratio.log(), torch.zeros(4).double(), A,
                     clip=.1).item() == pytest.approx((.9 - 2.1 + 3.15 - 5.5)/4)
    assert ddpo_loss(ratio.log(), torch.zeros(4).double(), A, clip=.1,
                     adv_max=2.).item() == pytest.approx((.9 - 2.1 + 2.1 - 2.2)/4)


def test_ddpo_gradient_is_that_of_finite_differences_and_zero_where_clipped():
    x, A = torch.tensor([-.3, .02, .04, .3], dtype=torch.float64, requires_grad=True), torch.tensor([-1., 2., -3., 7.],
        dtype=torch.float64)
    def f(x): return ddpo_loss(x, torch.zeros_like(x), A, clip=.1)
    g = torch.autograd.grad(f(x), x)[0]
    assert torch.allclose(g, slopes(f, x.detach()), atol=1e-8)
    assert g[0] == 0 and g[3] == 0 and g[1] < 0 < g[2]


def test_ddpo_without_active_clip_is_the_policy_gradient():
    theta = torch.randn(5, dtype=torch.float64, requires_grad=True)
    z, A = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    logp = log_probability(z, theta[:, None].expand(5, 3), .7)
    surrogate = torch.autograd.grad(ddpo_loss(logp, logp.detach(), A), theta, retain_graph=True)[0]
    assert torch.allclose(surrogate, torch.autograd.grad(-(A*logp).mean(), theta)[0])


@pytest.mark.parametrize("call, says", [
    (lambda: ddpo_loss(torch.ones(2), torch.ones(3), torch.ones(2)), "expected one shape"),
    (lambda: ddpo_loss(*[torch.ones(2)]*3, clip=0.), "clip is 0"),
    (lambda: ddpo_loss(*[torch.ones(2)]*3, adv_max=-1), "adv_max is -1"),
    (lambda: diffusion_dpo_loss(*[torch.ones(2)]*4, 0), "beta is 0"),
    (lambda: diffusion_dpo_loss(*[torch.ones(2, 3)]*4, 1.), "expected \\(b,\\) each"),
    (lambda: diffusion_dpo_loss(*[torch.ones(0)]*4, 1.), "expected \\(b,\\)"),
    (lambda: rwr.rwr_loss(torch.ones(2), torch.ones(3)), "expected \\(b,\\) both"),
    (lambda: rwr.softmax_weights(torch.ones(2), -1.), "inverse_temperature is -1"),
    (lambda: best_and_worst(torch.ones(2)), "at least 2"),
    (lambda: ddim_gaussian(torch.ones(1, 1), torch.ones(1, 1), 5, 2, Schedule.modelscope(), 2.), "eta is 2")])
def test_losses_refuse_what_they_cannot_take(call, says):
    with pytest.raises(ValueError, match=says) as error: call()
    assert "\n" not in str(error.value)


def test_dpo_loss_by_hand():
    errors = ([.10, .30], [.20, .20], [.10, .25], [.18, .21])
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor(x, dtype=torch.float64) for x in errors)
    # margins .02 - 0 = .02 and -.01 - .05 = -.06; beta 50: arguments .5 and -1.5
    loss, info = diffusion_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 50.)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-.5)) + math.log1p(math.exp(1.5)))/2)
    assert info["implicit_accuracy"] == .5 and info["margin"].item() == pytest.approx(-.02)
    assert info["gap_w"].item() == pytest.approx(.025) and info["gap_l"].item() == pytest.approx(.005)


def test_dpo_gradient_and_limits():
    errors = [torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    for i in range(4):
        def f(x, i=i): return diffusion_dpo_loss(*errors[:i], x, *errors[i + 1:], 20.)[0]
        x = errors[i].clone().requires_grad_()
        assert torch.allclose(torch.autograd.grad(f(x), x)[0], slopes(f, errors[i]), atol=1e-7)
    w = errors[0].clone().requires_grad_()
    tiny, _ = diffusion_dpo_loss(w, *errors[1:], 1e-6)
    # beta -> 0: no opinion, and the gradient of beta/4 (err_w - err_l)
    assert tiny.item() == pytest.approx(math.log(2), abs=1e-6)
    assert torch.allclose(torch.autograd.grad(tiny, w)[0], torch.full((4,), 1e-6/4/4).double(), rtol=1e-4)
    same, info = diffusion_dpo_loss(errors[0], errors[1], errors[0], errors[1], 5000.)
    assert same.item() == pytest.approx(math.log(2)) and info["implicit_accuracy"] == .5
    # far from a tie nothing overflows
    assert diffusion_dpo_loss(errors[0]*0, errors[1]*0 + 9., errors[0]*0, errors[1]*0, 5000.)[0] == 0


def test_rwr_by_hand():
    r = torch.tensor([0., 1., 1., 3.], dtype=torch.float64)
    e = math.e
    assert torch.allclose(rwr.softmax_weights(r, 1.),
                          4*torch.tensor([1, e, e, e**3], dtype=torch.float64)/(1 + 2*e + e**3))
    assert torch.allclose(rwr.softmax_weights(r, 1., list("aabb")),
                          2*torch.tensor([1/(1 + e), e/(1 + e), 1/(1 + e**2), e**2/(1 + e**2)], dtype=torch.float64))
    errors = torch.tensor([1., 2., 3., 4.], dtype=torch.float64, requires_grad=True)
    loss = rwr.rwr_loss(errors, r) # linear weights: (0 + 2 + 3 + 12)/4
    assert loss.item() == 17/4
    assert torch.allclose(torch.autograd.grad(loss, errors)[0], slopes(lambda x: rwr.rwr_loss(x, r), errors.detach()))


def test_rwr_says_when_no_caption_comes_twice(folder, tmp_path):
    config = rwr.RWRConfig(**DRAWN, n_samples=2, epochs=2, per_prompt=True)
    with pytest.raises(KitError, match="2 clips are of 3 captions: each would weigh 1"):
        tune("rwr", open_policy(folder), redness, PROMPTS, config, tmp_path/"run", progress=False)
    assert not (tmp_path/"run").exists()
    tune("rwr", open_policy(folder), redness, PROMPTS[:1], config, tmp_path/"one", progress=False, stop_after=1)


def test_refl_by_hand():
    R = torch.tensor([-1., 1.5, 2., 4.], dtype=torch.float64, requires_grad=True)
    assert refl.refl_loss(R).item() == pytest.approx(1e-3*(3 + .5)/4)
    assert torch.autograd.grad(refl.refl_loss(R), R)[0].tolist() == pytest.approx([-2.5e-4, -2.5e-4, 0, 0])


def test_advantages_by_hand():
    A, history = advantages(torch.tensor([2., 4., 9.]), ["a", "a", "b"], {"a": [0.]}, keep=3, min_count=3)
    # "a": 0, 2, 4 has mean 2 and deviation sqrt(8/3)
    # "b" has one reward only, so all of 2, 4, 9: mean 5, deviation sqrt(26/3)
    assert torch.allclose(A, torch.tensor([0., 2/(8/3)**.5, 4/(26/3)**.5]), atol=1e-5)
    assert history == {"a": [0., 2., 4.], "b": [9.]}


# ---- steps with probabilities --------------------------------------------------------------------------------------

@pytest.mark.parametrize("eta", [0., .5, 1.])
def test_stochastic_ddim_keeps_the_noise_level(eta):
    schedule = Schedule.modelscope()
    # data at the single point 0: z_t = sqrt(1 - alpha_bar) n, and the perfect network says n
    for t, t_prev in step_pairs(schedule.timesteps(5)):
        z = torch.full((1, 1), (1 - schedule.at(t))**.5, dtype=torch.float64)
        mean, deviation = ddim_gaussian(z, torch.ones(1, 1).double(), t, t_prev, schedule, eta)
        assert mean.item()**2 + deviation**2 == pytest.approx(1 - schedule.at(t_prev), rel=1e-6)


def test_flow_and_its_sde_draw_the_same_density():
    "Gaussian data of deviation .5 under the exact flow: every noise level must have the spread it has in training."
    n, data = 2000, .5
    schedule, variance = Schedule.rectified(n_train=n), None
    for t, t_prev in list(step_pairs(range(int(.9*n), int(.1*n), -1)))[:-1]:
        a, s = schedule.at(t)**.5, (1 - schedule.at(t))**.5
        v = a*a*data**2 + s*s # variance of z_t; the mean of x0 given z is a data^2 / v z
        variance = v if variance is None else variance
        x0 = a*data**2/v
        flow = torch.full((1, 1), (1 - a*x0)/s - x0, dtype=torch.float64)
        mean, deviation = flow_gaussian(torch.ones(1, 1).double(), flow, t, t_prev, schedule, .7)
        variance = mean.item()**2*variance + deviation**2
        assert variance == pytest.approx(schedule.at(t_prev)*data**2 + 1 - schedule.at(t_prev), rel=.01)


def test_log_probability_moves_as_its_mean():
    z, mean = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    g = torch.autograd.grad(log_probability(z, mean, .5).sum(), mean)[0]
    assert torch.allclose(g, (z - mean)/(.25*12)) # a mean over 12 numbers


# ---- the space of the error ----------------------------------------------------------------------------------------

class Constant: # a policy whose network says the same whatever it sees
    device, n = torch.device("cpu"), None
    def __init__(self, schedule, output): self.schedule, self.output = schedule, output
    def conditions(self, prompts): return (torch.zeros(len(prompts), 1),), None
    def predict(self, z_t, t, text): return self.output[:len(z_t)]


@pytest.mark.parametrize("schedule", [Schedule.modelscope("v_prediction"), Schedule.rectified()], ids=["v", "flow"])
def test_error_is_measured_in_what_the_network_predicts(schedule):
    """An epsilon error of a v or flow network is alpha_bar_t (times a bounded factor) of its own, and its gradient:
    near pure noise, where species and motion are decided, DPO would hear nothing."""
    z, eps = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64), torch.randn(2, 1, 1, 2, 2, dtype=torch.float64)
    ratios = []
    for t in (10, 500, 990):
        output = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        policy, steps, level = Constant(schedule, output), torch.full((2,), t), schedule.at(t)
        own = rollouts.prediction_errors(policy, z, eps, steps, ["", ""])
        z_t = corrupt(z, eps, level)
        in_epsilon = (to_x0_eps(output, z_t, level, schedule.prediction_type)[1] - eps).square().flatten(1).mean(1)
        a, s = level**.5, (1 - level)**.5
        factor = a**2 if schedule.prediction_type == "v_prediction" else (a/(a + s))**2
        assert torch.allclose(in_epsilon.float(), factor*own.float(), rtol=1e-3)
        g_own, g_epsilon = (torch.autograd.grad(e.sum(), output)[0] for e in (own, in_epsilon))
        assert torch.allclose(g_epsilon, factor*g_own, rtol=1e-3)
        ratios.append(factor)
    assert ratios[0] > .5 and ratios[-1] < .01


def test_prediction_error_of_a_perfect_network_is_zero():
    kinds = ("epsilon", "v_prediction", "sample")
    for schedule in (*(Schedule.modelscope(kind) for kind in kinds), Schedule.rectified()):
        z, eps = torch.randn(1, 1, 1, 2, 2), torch.randn(1, 1, 1, 2, 2)
        a, s = schedule.at(400)**.5, (1 - schedule.at(400))**.5
        answers = {"epsilon": eps, "v_prediction": a*eps - s*z, "flow_prediction": eps - z, "sample": z}
        answer = answers[schedule.prediction_type]
        assert rollouts.prediction_errors(Constant(schedule, answer), z, eps, torch.tensor([400]), [""]).item() < 1e-8


# ---- gradients through the chain -----------------------------------------------------------------------------------

def by_autograd(policy, config, k):
    "DRaFT's gradient without any of its machinery: a plain loop with the last k steps open."
    positions = positions_of(0, 0, 0, 1, config)
    prompts = [PROMPTS[i] for i in clip_order(positions, len(PROMPTS), config.seed)]
    generators = [example_generator(config.seed, p) for p in positions]
    z = draw_noise(policy.latent_shape, generators)
    g = torch.cat([segment_frames(policy.n_frames, config.n_segments, 1, "random",
                                  generator) for generator in generators])
    pairs, model = step_pairs(policy.schedule.timesteps(config.n_ddim)), policy.denoiser(prompts, config.guidance_scale)
    for i, (t, t_prev) in enumerate(pairs):
        if i == len(pairs) - k: z = z.detach()
        z = ddim_step(z, model(z, t), t, t_prev, policy.schedule)
    frames = policy.decode(z, g)
    frames = frames + (frames.clamp(0, 1) - frames).detach()
    return torch.cat([v.flatten() for v in torch.autograd.grad(-redness(frames, prompts).mean(),
        lora_parameters(policy))])


def test_draft_k_is_the_truncated_gradient_and_k_equal_d_the_full_one(folder):
    found = {}
    for k in (1, 2, 3):
        policy = open_policy(folder)
        add_lora(policy, 2)
        awake(policy)
        config = draft.DraftConfig(**{**DRAWN, "guidance_scale": 3.}, clamp="straight", grad_steps=k)
        found[k], _ = gradient_of(policy, draft.Draft, redness, config)
        plain = by_autograd(policy, config, k)
        assert plain.norm() > 0 and (found[k] - plain).norm() < 1e-4*plain.norm()
    assert (found[1] - found[3]).norm() > .01*found[3].norm()


@pytest.mark.parametrize("kind", ["checkpoint", "checkpoint_blocks"])
def test_recomputing_changes_no_gradient_not_even_with_dropout(folder, kind):
    gradients = []
    for options in ({}, {kind: True}):
        policy = open_policy(folder)
        add_lora(policy, 2)
        awake(policy)
        torch.manual_seed(0)
        gradients.append(gradient_of(policy, draft.Draft, redness,
                                     draft.DraftConfig(**DRAWN, clamp="straight", grad_steps=2, dropout=True,
                                                       **options))[0])
        assert not policy.unet.training
    assert gradients[0].norm() > 0 and (gradients[0] - gradients[1]).norm() < 1e-4*gradients[0].norm()


def test_refl_at_the_last_step_is_draft_1_times_its_scale(folder):
    gradients = []
    for Algorithm, config in ((draft.Draft, draft.DraftConfig(**DRAWN, clamp="straight", grad_steps=1)),
                              (refl.Refl, refl.ReflConfig(**DRAWN, clamp="straight", grad_accum=1, stop_from=2,
                                                          stop_to=2))):
        policy = open_policy(folder)
        add_lora(policy, 2)
        awake(policy)
        # only then the end of the chain is the predicted clip
        policy.schedule = replace(policy.schedule, final_alpha_bar=1.)
        gradients.append(gradient_of(policy, Algorithm, redness, config)[0])
    assert (gradients[1] - 1e-3*gradients[0]).norm() < 1e-4*gradients[1].norm() and gradients[0].norm() > 0


def test_refl_hears_only_clips_below_the_margin(folder):
    policy = open_policy(folder)
    add_lora(policy, 2)
    config = refl.ReflConfig(**DRAWN, grad_accum=1, stop_from=1, stop_to=2, margin=-5.)
    g, (row,) = gradient_of(policy, refl.Refl, redness, config)
    assert g.norm() == 0 and row["loss"] == 0


@pytest.mark.parametrize("name", ["dpo", "onlinevpo", "ddpo", "rwr"])
def test_micro_batches_give_the_gradient_of_the_batch(folder, name):
    algorithm, config = ALGORITHMS[name]
    Algorithm = find(algorithm)
    # the cat's candidates are all 0
    def some_equal(frames, prompts):
        return redness(frames, prompts)*torch.tensor([[float("cat" not in p)] for p in prompts])
    gradients, skipped = [], []
    for accum in (1, 3):
        policy = open_policy(folder)
        add_lora(policy, 2)
        awake(policy)
        g, rows = gradient_of(policy, Algorithm, some_equal,
                              replace(config, batch=3, grad_accum=accum, timestep_fraction=1.) if name == "ddpo" else
                              replace(config, batch=3, grad_accum=accum, **({"n_samples": 3} if name == "rwr" else {})))
        gradients.append(g)
        skipped.append(sum(r.get("skipped", 0) for r in rows)/accum)
    assert gradients[0].norm() > 0 and (gradients[0] - gradients[1]).norm() < 1e-3*gradients[0].norm()
    if name == "onlinevpo": assert skipped == [1, 1]


# ---- runs ----------------------------------------------------------------------------------------------------------

def figures(rows): return [{k: v for k, v in r.items() if k not in ("seconds", "memory_mb")} for r in rows]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(folder, tmp_path, name):
    algorithm, config = ALGORITHMS[name]
    def run(where, **options):
        return tune(algorithm, open_policy(folder), redness, PROMPTS, config, tmp_path/where, progress=False, **options)
    straight = run("straight")
    run("halves", stop_after=3) # in the middle of a round
    halves = run("halves", resume=True)
    assert figures(halves.rows()) == figures(straight.rows()) and len(straight.rows()) == 4
    one, other = (load_file(r.lora/"pytorch_lora_weights.safetensors") for r in (straight, halves))
    assert all(torch.equal(one[k], other[k]) for k in one) and any(v.abs().sum() > 0 for k,
        v in one.items() if "lora.up" in k or "lora_B" in k)
    with pytest.raises(KitError, match="lr was 0.01, is 0.5"):
        tune(algorithm, open_policy(folder), redness, PROMPTS, replace(config, lr=.5), tmp_path/"halves", resume=True,
             progress=False)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_cost_is_what_is_counted(folder, name):
    algorithm, config = ALGORITHMS[name]
    Algorithm = find(algorithm)
    # else it is a mean
    if name in ("vader", "refl"):
        config = replace(config, **({"truncation": "fixed"} if name == "vader" else {"stop_from": 2}))
    config, policy, calls = replace(config, guidance_scale=3.,
                                    **({"timestep_fraction": 1.} if name == "ddpo" else {})), open_policy(folder), []
    add_lora(policy, 2)
    policy.network.register_forward_hook(lambda m, args,
                                         out: calls.append(len(args[0])*(2 if torch.is_grad_enabled() else 1)))
    step = Algorithm(policy, redness, PROMPTS, config, make_accelerator(config, "cpu"))
    for n in range(2): step.step(positions_of(n, 0, 0, 1, config))
    once = Algorithm.setup_cost(config, len(PROMPTS))
    assert once == (2*config.n_ddim*config.n_candidates*len(PROMPTS) if name == "dpo" else 0)
    assert sum(calls) == Algorithm.step_cost(config)*config.batch*2 + once


def test_ddpo_on_a_flow_model_takes_the_sde(folder, monkeypatch):
    policy, seen = open_policy(folder), []
    policy.schedule = Schedule.rectified()
    monkeypatch.setitem(stochastic.GAUSSIANS, "flow_grpo", lambda *a: (seen.append(1), flow_gaussian(*a))[1])
    add_lora(policy, 2)
    g, (row,) = gradient_of(policy, ddpo.DDPO, redness, ALGORITHMS["ddpo"][1])
    assert seen and g.isfinite().all() and g.norm() > 0 and row["ratio_off"] < 1e-4


def test_score_function_equals_importance_sampling_in_the_first_update(folder):
    gradients = []
    for options in (dict(estimator="sf", updates_per_round=1), dict(estimator="is", updates_per_round=1, clip=.01)):
        policy = open_policy(folder)
        add_lora(policy, 2)
        awake(policy)
        gradients.append(gradient_of(policy, ddpo.DDPO, redness, replace(ALGORITHMS["ddpo"][1], **options))[0])
    assert gradients[0].norm() > 0 and (gradients[0] - gradients[1]).norm() < 1e-3*gradients[0].norm()


def test_candidates_do_not_depend_on_batching_or_merging(folder):
    policy = open_policy(folder)
    add_lora(policy, 2)
    awake(policy)
    config = replace(ALGORITHMS["onlinevpo"][1], n_candidates=3)
    def draw(**options):
        generators = [example_generator(0, p) for p in range(3)]
        return candidates(policy, redness, PROMPTS, generators, replace(config, **options))
    table, again = draw(samples_at_once=16), draw(samples_at_once=1, merge_lora=False)
    z, scores, one, alone = table["z"], table["reward"], again["z"], again["reward"]
    assert z.shape[:2] == (3, 3) and torch.allclose(z, one, atol=1e-4) and torch.allclose(scores, alone, atol=1e-5)
    assert not torch.allclose(z[:, 0], z[:, 1], atol=.1) # and they differ from one another


# ---- the curriculum ------------------------------------------------------------------------------------------------

def watch(folder, run_dir, K, steps=7):
    "After each step: the learner, and the reference if it is not the base model."
    seen = {}
    def look(policy, step):
        learner = {k: v.clone() for k, v in lora_state(policy).items()}
        seen[step] = learner, {k: v.clone() for k,
                               v in lora_state(policy, "ref").items()} if "ref" in policy.network.peft_config else None
        return {"watched": 1}
    policy = open_policy(folder)
    config = replace(ALGORITHMS["onlinevpo"][1], ref_update_every=K, steps=steps, eval_every=1, save_every=steps)
    rows = tune("onlinevpo", policy, redness, PROMPTS, config, run_dir, evaluate=look, progress=False).rows()
    return policy, seen, rows


def test_the_reference_changes_exactly_at_multiples_of_k(folder, tmp_path):
    _, seen, rows = watch(folder, tmp_path/"run", 3)
    def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)
    # until 3 updates are done it is the base model
    assert [seen[s][1] is None for s in range(8)] == [True]*4 + [False]*4
    for step in (4, 5, 6): assert same(seen[step][1], seen[3][0]) # used in updates 4, 5, 6: the learner after 3
    assert same(seen[7][1], seen[6][0])
    assert not same(seen[3][0], seen[6][0])
    # right after a refresh learner and reference are one
    assert [abs(r["margin"]) < 1e-9 for r in rows] == [s % 3 == 1 for s in range(1, 8)]


def test_k_infinity_is_the_base_model(folder, tmp_path):
    policy, seen, rows = watch(folder, tmp_path/"run", math.inf, steps=4)
    assert all(ref is None for _, ref in seen.values())
    assert [abs(r["margin"]) < 1e-9 for r in rows] == [True] + [False]*3
    z, eps, t = torch.randn(1, *policy.latent_shape), torch.randn(1, *policy.latent_shape), torch.tensor([500])
    with torch.no_grad():
        base = rollouts.prediction_errors(open_policy(folder), z, eps, t, PROMPTS[:1])
        with adapters.reference(policy):
            assert torch.equal(rollouts.prediction_errors(policy, z, eps, t, PROMPTS[:1]), base)
        assert not torch.equal(rollouts.prediction_errors(policy, z, eps, t, PROMPTS[:1]), base)
    assert len(lora_parameters(policy)) == len(lora_state(policy)) # the learner is the one that trains


# ---- whether a preference generalises ------------------------------------------------------------------------------

def test_labels_by_hand():
    ones, zeros = torch.ones(3, 1, 1, 1, 1), torch.zeros(3, 1, 1, 1, 1)
    pairs = {"prompts": PROMPTS, "chosen": ones, "rejected": zeros}
    assert dpo.relabel(pairs)["chosen"] is ones and not dpo.relabel(pairs)["flipped"].any()
    swapped = dpo.relabel(pairs, "swapped")
    assert swapped["chosen"].sum() == 0 and swapped["rejected"].sum() == 3 and swapped["flipped"].all()
    coins = [dpo.relabel(pairs, "random", range(i, i + 3)) for i in range(50)]
    assert .35 < torch.stack([c["flipped"].float().mean() for c in coins]).mean() < .65
    assert all(torch.equal(c["chosen"].flatten() == 0, c["flipped"]) for c in coins)
    with pytest.raises(ValueError, match="2 coins for 3 pairs"): dpo.relabel(pairs, "random", range(2))


def test_facts_of_pairs_by_hand():
    # margins .05 - 0 = .05 and .01 - .05 = -.04: the judge is followed once, and twice if the second pair was flipped
    errors, ref = torch.tensor([.10, .30, .25, .22]), torch.tensor([.10, .25, .20, .21])
    said = dpo.pair_facts(errors, ref, torch.tensor([False, False]))
    assert said["chosen_error"].item() == pytest.approx(.2) and said["rejected_error"].item() == pytest.approx(.235)
    assert said["judge_accuracy"] == .5
    assert dpo.pair_facts(errors, ref, torch.tensor([False, True]))["judge_accuracy"] == 1
    assert dpo.pair_facts(ref, ref, torch.tensor([False, True]))["judge_accuracy"] == .5


def test_a_word_when_both_errors_grow_and_only_once():
    watch = dpo.ErrorWatch(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6): watch({"gap_w": -.01, "gap_l": .02})
        for i in range(4): watch({"gap_w": .01*(-1)**i, "gap_l": .02}) # noise about 0
    with pytest.warns(UserWarning, match="worse at both"):
        for _ in range(4): watch({"gap_w": .01, "gap_l": .02})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch({"gap_w": .01, "gap_l": .02})


@pytest.mark.parametrize("n", [2, 4, 6])
def test_swapped_labels_train_on_the_worse_clip(folder, n):
    "The update with swapped labels is that of a judge with the opposite opinion, and is measured against the judge."
    config, gradients, rows = replace(ALGORITHMS["onlinevpo"][1], n_candidates=n), [], []
    def opposite(frames, prompts): return -redness(frames, prompts)
    for reward, labels in ((redness, "swapped"), (opposite, "judge")):
        policy = open_policy(folder)
        add_lora(policy, 2)
        awake(policy)
        g, (row,) = gradient_of(policy, online_dpo.OnlineDPO, reward, replace(config, labels=labels))
        gradients.append(g)
        rows.append(row)
    assert gradients[0].norm() > 0 and torch.allclose(*gradients)
    assert rows[0]["implicit_accuracy"] == rows[1]["implicit_accuracy"] == rows[1]["fresh_accuracy"]
    assert rows[0]["fresh_accuracy"] == 1 - rows[1]["fresh_accuracy"]


def test_held_pairs_are_measured_and_never_trained_on(folder, tmp_path):
    config = replace(ALGORITHMS["dpo"][1], held_pairs=1, steps=3)
    rows = tune("dpo", open_policy(folder), redness, PROMPTS, config, tmp_path/"held", progress=False).rows()
    assert [r["pairs"] for r in rows] == [2]*3 and rows[0]["held_accuracy"] == .5
    assert all(0 <= r["held_accuracy"] <= 1 for r in rows)
    policy = open_policy(folder)
    add_lora(policy, 2)
    awake(policy)
    step = dpo.DPO(policy, redness, PROMPTS, config, make_accelerator(config, "cpu"))
    step.step(positions_of(0, 0, 0, 1, config))
    one = torch.cat([p.grad.flatten() for p in lora_parameters(policy)])
    pairs = step.rounds.at(0)
    for p in lora_parameters(policy): p.grad = None
    pairs["chosen"][-1] += 1. # the held one
    step.step(positions_of(0, 0, 0, 1, config))
    assert torch.equal(one, torch.cat([p.grad.flatten() for p in lora_parameters(policy)]))
    with pytest.raises(KitError, match="nothing would be left"):
        tune("dpo", open_policy(folder), redness, PROMPTS, replace(config, held_pairs=3), tmp_path/"all",
             progress=False)


@pytest.mark.parametrize("name", ["dpo", "onlinevpo"])
def test_pairs_from_edits_are_near_the_clip_and_near_one_another(folder, tmp_path, name):
    config = replace(ALGORITHMS[name][1], pairs_from="edit", edit_tau=.34, n_ddim=6, steps=1, n_candidates=3)
    policy = open_policy(folder)
    frames = torch.rand(3, policy.n_frames, 3, *policy.size, generator=torch.Generator().manual_seed(0))
    data = list(zip(frames, PROMPTS))
    add_lora(policy, 2)
    step = find(name)(policy, redness, data, config, make_accelerator(config, "cpu"))
    generators = [example_generator(0, i) for i in range(3)]
    z = policy.encode(frames)
    edits = step.propose([0, 1, 2], PROMPTS, generators)["z"]
    drawn = candidates(policy, redness, PROMPTS, [example_generator(0, i) for i in range(3)], config)["z"]
    def spread(c): return (c[:, 0] - c[:, 1]).square().mean()
    assert edits.shape == drawn.shape and 0 < spread(edits) < spread(drawn)
    # the tiny network is random: what is kept is the share of the clip in the first noisy latents
    def alike(c): return torch.corrcoef(torch.stack([c[:, 0].flatten(), z.flatten()]))[0, 1]
    assert alike(edits) > alike(drawn) + .1
    assert find(name).needs(config) == "clips"
    with pytest.raises(KitError, match="captions alone were given"):
        tune(name, open_policy(folder), redness, PROMPTS, config, tmp_path/"no", progress=False)
    row, = tune(name, open_policy(folder), redness, data, config, tmp_path/"run", progress=False).rows()
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)


# ---- bad input -----------------------------------------------------------------------------------------------------

def never(*args): raise AssertionError


@pytest.mark.parametrize("name", ["rwr", "ddpo", "grpo", "dpo", "onlinevpo"])
def test_rewards_of_a_wrong_shape_or_nan_stop_with_one_line(folder, tmp_path, name):
    algorithm, config = ALGORITHMS[name]
    for i, (reward, says) in enumerate([(lambda f, p: torch.zeros(len(f), 7, 2), r"returned the shape \(\d, 7, 2\)"),
                                        (lambda f, p: f.mean((1, 2, 3, 4))*math.nan, 'reward is nan for "a ')]):
        with pytest.raises(KitError, match=says) as error:
            tune(algorithm, open_policy(folder), reward, PROMPTS, config, tmp_path/str(i), progress=False)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["draft", "refl"])
def test_rewards_without_a_gradient_or_of_another_shape(folder, tmp_path, name):
    algorithm, config = ALGORITHMS[name]
    for i, (reward, says) in enumerate([(lambda f, p: redness(f, p).mean(1), "expected one score per frame"),
                                        (lambda f, p: redness(f.detach(), p), "no gradient"),
                                        (lambda f, p: redness(f, p)*math.nan, "not finite")]):
        with pytest.raises(KitError, match=says):
            tune(algorithm, open_policy(folder), reward, PROMPTS, config, tmp_path/str(i), progress=False)


def test_equal_candidates_are_skipped_and_counted(folder, tmp_path):
    config, flat = replace(ALGORITHMS["onlinevpo"][1], steps=2), lambda frames, prompts: torch.zeros(len(frames))
    result = tune("onlinevpo", open_policy(folder), flat, PROMPTS, config, tmp_path/"run", progress=False)
    assert [r["skipped"] for r in result.rows()] == [2]*2
    assert all(r["loss"] == 0 and r["grad_norm"] == 0 for r in result.rows())
    state = load_file(result.lora/"pytorch_lora_weights.safetensors")
    assert all(v.abs().sum() == 0 for k, v in state.items() if "lora_B" in k or "lora.up" in k)
    with pytest.raises(KitError, match="no pair to learn from"):
        tune("dpo", open_policy(folder), flat, PROMPTS, ALGORITHMS["dpo"][1], tmp_path/"dpo", progress=False)


def test_a_video_judge_is_asked_for_its_dimension():
    class Judge:
        dims = ("visual_quality", "temporal_consistency", "dynamic_degree", "text_to_video_alignment",
                "factual_consistency")
        def __call__(self, video, prompts): return torch.tensor([[1., 2., 3., 4., 10.]]*len(video))
    frames = torch.zeros(2, 5, 3, 4, 4) # as many frames as dimensions: still not one score per frame
    assert rollouts.clip_scores(Judge(), frames, PROMPTS[:2], "factual_consistency").tolist() == [10., 10.]
    assert rollouts.clip_scores(Judge(), frames, PROMPTS[:2], "mean").tolist() == [4., 4.]


@pytest.mark.parametrize("make, says", [
    (lambda: online_dpo.OnlineDPOConfig(n_candidates=1), "n_candidates is 1"),
    (lambda: online_dpo.OnlineDPOConfig(ref_update_every=0), "ref_update_every is 0"),
    (lambda: online_dpo.OnlineDPOConfig(ref_update_every=2.5), "whole number"),
    (lambda: online_dpo.OnlineDPOConfig(ref_update_every=math.nan), "ref_update_every is nan"),
    (lambda: online_dpo.OnlineDPOConfig(held_pairs=2), "fresh_accuracy"),
    (lambda: dpo.DPOConfig(labels="wrong"), "labels"), (lambda: dpo.DPOConfig(pairs_from="clips"), "pairs_from"),
    (lambda: dpo.DPOConfig(edit_tau=0.), "edit_tau is 0"),
    (lambda: dpo.DPOConfig(beta_dpo=0), "beta_dpo is 0"), (lambda: dpo.DPOConfig(dimension="temporal"), "did you mean"),
    (lambda: draft.DraftConfig(tau=.5), "tau is 0.5"),
    (lambda: draft.DraftConfig(grad_steps=51), "1..50"),
    (lambda: refl.ReflConfig(stop_from=39, stop_to=38), "stop_from is 39"),
    (lambda: rwr.RWRConfig(epochs=0), "epochs is 0"),
    (lambda: ddpo.DDPOConfig(clip=0.), "clip is 0"), (lambda: ddpo.DDPOConfig(estimator="SF"), '"sf"'),
    (lambda: ddpo.DDPOConfig(n_segments=-1), "n_segments is -1")])
def test_values_out_of_range(make, says):
    with pytest.raises(KitError, match=says) as error: make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data, says", [([], "nothing to tune on"), ("a cat", "single text"),
                                        (["a cat", ""], "captions are empty")])
def test_bad_captions_are_refused_before_a_folder_is_made(folder, tmp_path, data, says):
    for name, (algorithm, config) in ALGORITHMS.items():
        with pytest.raises(KitError, match=says):
            tune(algorithm, open_policy(folder) if name == "draft" else never, redness, data, config, tmp_path/"no",
                 progress=False)
        if name == "draft": break
    assert not (tmp_path/"no").exists()


# ---- presets -------------------------------------------------------------------------------------------------------

PRESETS = ["draft", "vader", "refl", "rwr", "ddpo", "grpo", "dpo", "onlinevpo", "nft"]


@pytest.mark.parametrize("name", [f"{name}{twin}" for name in PRESETS for twin in ("", "_menagerie")])
def test_presets_load_and_every_value_names_its_source(name):
    ConfigClass = find(name.removesuffix("_menagerie")).Config
    load_preset(name, ConfigClass)
    path = shipped("preset")[name]
    assert all(" # " in line for line in path.read_text().splitlines() if line and not line.startswith(("#", *HEADER)))
    # nothing is left to a default
    if "_menagerie" not in name:
        assert set(yaml.safe_load(path.read_text())) - set(HEADER) == {f.name for f in fields(ConfigClass)}


@pytest.mark.parametrize("name", PRESETS)
def test_twins_are_made_for_two_cores(name):
    # for one clip in one network evaluation on two cores, from the log of the instructvideo run
    Algorithm, seconds = find(name), .032
    config = load_preset(f"{name}_menagerie", Algorithm.Config)
    minutes = Algorithm.step_cost(config)*config.batch*config.steps*seconds/60
    assert minutes < (40 if name in ("rwr", "ddpo") else 15)


def test_the_papers_numbers():
    online = load_preset("onlinevpo", online_dpo.OnlineDPOConfig)
    assert (online.n_candidates, online.ref_update_every, online.n_ddim, online.batch, online.lr) == (4, 200, 30, 8,
        1e-5)
    policy_gradient = load_preset("ddpo", ddpo.DDPOConfig)
    assert (policy_gradient.clip, policy_gradient.adv_max, policy_gradient.n_ddim, policy_gradient.lr) == (1e-4, 5., 50,
        3e-4)
    assert load_preset("dpo", dpo.DPOConfig).beta_dpo == 5000
    vader = load_preset("vader", draft.DraftConfig)
    assert (vader.truncation, vader.n_segments, vader.n_ddim, vader.rank) == ("random", 1, 25, 16)


def test_a_run_of_no_steps_is_refused_before_anything_is_opened():
    for steps in (0, -1):
        with pytest.raises(KitError, match=f"stop_after is {steps}"):
            tune("draft", None, None, [], None, "nowhere", stop_after=steps)
