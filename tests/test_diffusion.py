"Schedule, DDIM chain and truncation: parity with diffusers, identities, gradients in float64, bad input."
import math
from pathlib import Path

import hypothesis
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import settings
from hypothesis import strategies as st

from instructvideo_kit.diffusion.sampling import ddim_step, denoise, from_x0, guide, step_pairs, to_x0_eps
from instructvideo_kit.diffusion.schedule import (
    Schedule,
    corrupt,
    ddim_timesteps,
    ddim_to_ddpm,
    n_steps,
    noise_timestep,
    scaled_linear,
)
from instructvideo_kit.diffusion.toy import ToyDenoiser, toy_clips
from instructvideo_kit.diffusion.truncation import gradient_norms, saved_bytes, step_sensitivity, unet_cost


def given(*args): return lambda test: settings(deadline=None, max_examples=40)(hypothesis.given(*args)(test))

KINDS = ("epsilon", "v_prediction", "sample")
SHIPPED = Path(__file__).parents[1] / "instructvideo_kit/weights/policy/menagerie/scheduler"

def scheduler(kind="epsilon", to_one=False, **kwargs):
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                         set_alpha_to_one=to_one,
                         **{"steps_offset": 1, "prediction_type": kind, **kwargs})

def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

class Net(torch.nn.Module):
    "Stands for a UNet: depends on z, t and on two weights."
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([0.7, -0.3], dtype=torch.float64))
        self.calls = 0
    def forward(self, z, t):
        self.calls += 1
        return torch.tanh(self.a[0].to(z.dtype) * z + self.a[1].to(z.dtype) * z.roll(1, 2) + t / 1000)

# --- schedule ---------------------------------------------------------------------------------------------------------

def test_the_papers_numbers():
    assert [ddim_to_ddpm(i, 20) for i in (1, 2, 19, 20)] == [1, 51, 901, 951]
    assert noise_timestep(0.6, 20) == 551 and isinstance(noise_timestep(0.6, 20), int)
    assert n_steps(0.58, 50) == 29 != int(0.58 * 50)
    assert [n_steps(tau, 10) for tau in (.15, .25, .35, .45)] == [2, 3, 4, 5]    # halves up, not to even
    grid = ddim_timesteps(20)
    assert grid.dtype == torch.long and grid.tolist() == list(range(951, 0, -50))

@given(st.integers(1, 999), st.sampled_from([0, 1]))
def test_grid_is_that_of_diffusers(n_ddim, offset):
    theirs = scheduler(steps_offset=offset)
    theirs.set_timesteps(n_ddim)
    assert Schedule.from_scheduler(theirs).timesteps(n_ddim).tolist() == theirs.timesteps.tolist()

@given(st.integers(1, 200), st.floats(0, 1, exclude_min=True))
def test_partial_grid_is_the_tail_of_the_full_grid(n_ddim, tau):
    if tau * n_ddim < 1 - 1e-9:
        with pytest.raises(ValueError, match="at least one step"): ddim_timesteps(n_ddim, tau=tau)
        return
    steps = ddim_timesteps(n_ddim, tau=tau)
    assert len(steps) == int(tau * n_ddim + .5 + 1e-9) # halves up
    assert steps.tolist() == ddim_timesteps(n_ddim)[-len(steps):].tolist()
    assert steps[0] == noise_timestep(tau, n_ddim) and steps[-1] == 1

@given(st.integers(1, 500))
def test_every_whole_number_of_steps_can_be_asked_for(n_ddim):
    assert all(n_steps(k / n_ddim, n_ddim) == k for k in range(1, n_ddim + 1))    # 1/49 * 49 is a hair below 1

@pytest.mark.parametrize("tau", [0, -0.5, 1.0001, 60, math.nan, math.inf])
def test_tau_outside_is_refused(tau):
    for call in (lambda: noise_timestep(tau, 20), lambda: ddim_timesteps(20, tau=tau)):
        with pytest.raises(ValueError, match=r"\(0, 1\]"): call()

@pytest.mark.parametrize("call, words", [
    (lambda: noise_timestep(0.04, 20), "at least one step"), (lambda: ddim_timesteps(0), "n_ddim is 0"),
    (lambda: ddim_timesteps(1001), "1001"),
    (lambda: ddim_timesteps(50, n_train=40), "n_train = 40"), (lambda: ddim_to_ddpm(0, 20), "1-based"),
    (lambda: ddim_to_ddpm(21, 20), "1..20"),
    (lambda: Schedule(scaled_linear(), "score"), "score"),
    (lambda: Schedule.modelscope().at(1000), "outside the schedule"),
    (lambda: corrupt(torch.zeros(2, 3), torch.zeros(3), 0.5), "shape"),
    (lambda: corrupt(torch.zeros(2), torch.zeros(2), 551), "timestep"),
    (lambda: corrupt(torch.zeros(2), torch.zeros(2), torch.tensor([0.1, -0.1])), r"\[0, 1\]"),
])
def test_bad_input_has_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as e: call()
    assert "\n" not in str(e.value)

def test_schedule_reads_a_diffusers_scheduler():
    assert torch.equal(scaled_linear(), scheduler().alphas_cumprod)
    ours = Schedule.from_scheduler(scheduler("v_prediction", to_one=True))
    assert ((ours.n_train, ours.prediction_type, ours.final_alpha_bar, ours.steps_offset)
            == (1000, "v_prediction", 1.0, 1))
    assert Schedule.from_scheduler(scheduler()).final_alpha_bar == scheduler().alphas_cumprod[0].item()
    assert Schedule.modelscope("v_prediction").final_alpha_bar == scheduler().alphas_cumprod[0].item()
    with pytest.warns(UserWarning, match="clip_sample: ignored"):
        trailing = Schedule.from_scheduler(DDIMScheduler(clip_sample=True, timestep_spacing="trailing"))
    assert trailing.timesteps(20, .1).tolist() == [99, 49]

@given(st.floats(0, 1), st.integers(0, 99))
def test_corrupt_keeps_the_variance_and_mixes_linearly(alpha_bar_t, seed):
    z, eps = noise(2, 4, 8, 8, 8, seed=seed).unbind(0)
    z_t = corrupt(z, eps, alpha_bar_t)
    assert torch.allclose(corrupt(2 * z, 2 * eps, alpha_bar_t), 2 * z_t)
    assert abs(z_t.var() - 1) < 0.25
    batch = corrupt(torch.stack([z, z]), torch.stack([eps, eps]), torch.tensor([alpha_bar_t, 1.0], dtype=torch.float64))
    assert torch.allclose(batch[0], z_t, atol=1e-6) and torch.allclose(batch[1], z, atol=1e-6)

def test_corrupt_keeps_the_dtype():
    z = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert corrupt(z, z, torch.tensor([0.2, 0.3])).dtype == corrupt(z, z, 0.2).dtype == torch.bfloat16

# --- one step ---------------------------------------------------------------------------------------------------------

@given(st.floats(0.001, 0.9999), st.sampled_from(KINDS), st.integers(0, 99))
def test_prediction_and_x0_eps_are_inverse(alpha_bar_t, kind, seed):
    z_t, prediction = noise(2, 2, 3, 4, 5, 5, seed=seed).unbind(0)
    x0, eps = to_x0_eps(prediction, z_t, alpha_bar_t, kind)
    assert torch.allclose(corrupt(x0, eps, alpha_bar_t), z_t, atol=1e-9)
    assert torch.allclose(from_x0(x0, z_t, alpha_bar_t, kind), prediction, atol=1e-6)
    v = alpha_bar_t ** 0.5 * eps - (1 - alpha_bar_t) ** 0.5 * x0                      # v <-> epsilon
    assert torch.allclose(to_x0_eps(v, z_t, alpha_bar_t, "v_prediction")[1],
                          to_x0_eps(eps, z_t, alpha_bar_t, "epsilon")[1], atol=1e-6)

def test_one_alpha_bar_per_sample():
    z_t, prediction = noise(2, 2, 3, 4, 5, 5).unbind(0)
    both = to_x0_eps(prediction, z_t, torch.tensor([0.2, 0.9], dtype=torch.float64), "v_prediction")
    for i, a in enumerate((0.2, 0.9)):
        for whole, part in zip(both, to_x0_eps(prediction[i:i + 1], z_t[i:i + 1], a, "v_prediction")):
            assert torch.allclose(whole[i:i + 1], part)

@given(st.integers(0, 999), st.integers(-1, 999), st.sampled_from(KINDS))
def test_a_step_with_the_true_noise_lands_on_the_corrupted_clip(t, t_prev, kind):
    schedule = Schedule.modelscope(kind)
    x0, eps = noise(2, 1, 3, 2, 4, 4).unbind(0)
    z_t = corrupt(x0, eps, schedule.at(t))
    z_prev = ddim_step(z_t, from_x0(x0, z_t, schedule.at(t), kind), t, t_prev, schedule)
    assert torch.allclose(z_prev, corrupt(x0, eps, schedule.at(t_prev)), atol=1e-8)

@given(st.floats(-2, 10), st.floats(-2, 2), st.floats(-2, 2))
def test_guidance(w, cond, uncond):
    cond, uncond = torch.tensor([cond, uncond], dtype=torch.float64)
    assert guide(cond, uncond, 1) == uncond + (cond - uncond) and guide(cond, uncond, 0) == uncond
    assert torch.allclose(guide(cond, uncond, w), w * cond + (1 - w) * uncond, atol=1e-9)

# --- the chain --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("n_ddim", [7, 20, 50])
def test_chain_equals_diffusers(kind, to_one, n_ddim):
    theirs, net = scheduler(kind, to_one), Net().requires_grad_(False)
    theirs.set_timesteps(n_ddim)
    z = start = noise(2, 4, 3, 5, 5, dtype=torch.float32)
    for t in theirs.timesteps: z = theirs.step(net(z, int(t)), t, z).prev_sample
    ours = denoise(net, start, ddim_timesteps(n_ddim), Schedule.from_scheduler(theirs))
    assert (ours - z).abs().max() <= 1e-5 * max(1, z.abs().max())
    other_end = denoise(net, start, ddim_timesteps(n_ddim), Schedule.from_scheduler(scheduler(kind, not to_one)))
    # the end of the chain is not a detail
    assert (other_end - z).abs().max() > 1e-3

@pytest.mark.skipif(not SHIPPED.exists(), reason="weights/policy/menagerie is not there yet")
def test_chain_equals_diffusers_on_the_shipped_scheduler():
    theirs, net = DDIMScheduler.from_pretrained(SHIPPED), Net().requires_grad_(False)
    schedule = Schedule.from_scheduler(theirs)
    theirs.set_timesteps(20)
    assert schedule.timesteps(20).tolist() == theirs.timesteps.tolist()
    z = start = noise(2, 4, 3, 5, 5, dtype=torch.float32)
    for t in theirs.timesteps: z = theirs.step(net(z, int(t)), t, z).prev_sample
    assert (denoise(net, start, schedule.timesteps(20), schedule) - z).abs().max() < 1e-5

@pytest.mark.parametrize("kind", KINDS)
def test_full_gradient_in_float64(kind):
    schedule, net, steps = Schedule.modelscope(kind), Net(), ddim_timesteps(20, tau=0.3)
    start = noise(2, 3, 3, 4, 4).requires_grad_()
    def loss(grad_steps=6, **kwargs): return (denoise(net, start, steps, schedule, grad_steps, **kwargs) ** 2).mean()
    z = start
    for t, t_prev in step_pairs(steps): z = ddim_step(z, net(z, t), t, t_prev, schedule)
    expected = torch.autograd.grad((z ** 2).mean(), [net.a, start])
    for got in (torch.autograd.grad(loss(), [net.a, start]),
                torch.autograd.grad(loss(checkpoint=True), [net.a, start])):
        assert all(torch.allclose(g, e, rtol=1e-12, atol=0) for g, e in zip(got, expected))
    for i in range(2):                                                                # finite differences
        values = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                net.a[i] += h
                values.append(loss(0).item())
                net.a[i] -= h
        assert math.isclose((values[0] - values[1]) / 2e-5, expected[0][i].item(), rel_tol=1e-6)

@given(st.integers(0, 6), st.booleans())
def test_truncated_gradient_is_that_of_the_last_steps_alone(grad_steps, checkpoint):
    schedule, net, steps = Schedule.modelscope(), Net(), ddim_timesteps(20, tau=0.3)
    start = noise(1, 3, 3, 4, 4)
    z_0 = denoise(net, start, steps, schedule, grad_steps, checkpoint)
    with torch.no_grad(): assert torch.equal(z_0, denoise(net, start, steps, schedule))      # values do not depend on K
    assert z_0.requires_grad == (grad_steps > 0)
    if not grad_steps: return
    with torch.no_grad():
        z, pairs = start, step_pairs(steps)
        for t, t_prev in pairs[:6 - grad_steps]: z = ddim_step(z, net(z, t), t, t_prev, schedule)
    for t, t_prev in pairs[6 - grad_steps:]: z = ddim_step(z, net(z, t), t, t_prev, schedule)
    assert torch.allclose(torch.autograd.grad(z_0.sum(), net.a)[0], torch.autograd.grad(z.sum(), net.a)[0], rtol=1e-12)

def test_network_calls_and_callback():
    schedule, net, steps = Schedule.modelscope(), Net(), ddim_timesteps(20, tau=0.6)
    seen = []
    z_0 = denoise(net, noise(1, 2, 2, 4, 4), steps, schedule, grad_steps=2,
                  callback=lambda i, t, z: seen.append((i, t, z)))
    assert net.calls == 12
    assert [s[:2] for s in seen] == list(enumerate(steps.tolist())) and seen[-1][2] is z_0
    assert [s[2].requires_grad for s in seen] == [False] * 10 + [True] * 2
    denoise(net, noise(1, 2, 2, 4, 4), steps, schedule, grad_steps=2, checkpoint=True).sum().backward()
    assert net.calls == 12 + 12 + 2    # one level of checkpointing: each gradient step once more

def test_dropout_is_repeated_in_the_checkpointed_step():
    schedule, net, drop = Schedule.modelscope(), Net(), torch.nn.Dropout(0.5)
    def gradient(checkpoint):
        torch.manual_seed(0)
        z_0 = denoise(lambda z, t: drop(net(z, t)), noise(1, 2, 2, 4, 4), [51, 1], schedule, 2, checkpoint)
        return torch.autograd.grad(z_0.sum(), net.a)[0]
    assert torch.allclose(gradient(False), gradient(True), rtol=1e-12)

def test_no_grad_of_the_caller_is_respected():
    with torch.no_grad():
        assert not denoise(Net(), noise(1, 2, 2, 4, 4), [51, 1], Schedule.modelscope(), grad_steps=2).requires_grad

@pytest.mark.parametrize("grad_steps", [-1, 3])
def test_grad_steps_outside_is_refused(grad_steps):
    with pytest.raises(ValueError, match=rf"grad_steps is {grad_steps}.*0\.\.2"):
        denoise(Net(), noise(1, 2, 2, 4, 4), [51, 1], Schedule.modelscope(), grad_steps)

@pytest.mark.parametrize("steps", [[], [1, 51], [51, 51], [51, -1]])
def test_timesteps_must_descend(steps):
    with pytest.raises(ValueError, match="must descend"):
        denoise(Net(), noise(1, 2, 2, 4, 4), steps, Schedule.modelscope())

# --- truncation -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("final", [1.0, 0.9991499781608582])
def test_sensitivity_is_the_derivative_of_the_step(kind, final):
    schedule, steps = Schedule(scaled_linear(), kind, final), ddim_timesteps(20)
    for (t, t_prev), s in zip(step_pairs(steps), step_sensitivity(steps, schedule)):
        z, p = noise(2, 3).unbind(0)
        def step(p, z=z, t=t, t_prev=t_prev): return ddim_step(z, p, t, t_prev, schedule)
        J = torch.autograd.functional.jacobian(step, p)
        assert torch.allclose(J, s * torch.eye(3, dtype=torch.float64), atol=1e-12)

def test_last_step_is_about_fifteen_times_less_sensitive():
    s = step_sensitivity(ddim_timesteps(20, tau=0.6), Schedule.modelscope())
    assert torch.allclose(s[[0, -3, -2, -1]],
                          torch.tensor([-0.157, -0.115, -0.187, -0.0121], dtype=torch.float64), atol=6e-4)
    assert 14 < s[-2] / s[-1] < 17
    assert math.isclose(step_sensitivity([51, 1], Schedule(scaled_linear()))[-1], -0.0413, abs_tol=1e-4)

@given(st.integers(1, 6))
def test_gradient_norms(grad_steps):
    schedule, net, steps = Schedule.modelscope(), Net(), ddim_timesteps(20, tau=0.3)
    def loss(z): return (z ** 2).sum()
    norms = gradient_norms(net, noise(1, 3, 3, 4, 4), steps, schedule, loss, grad_steps)
    z_0 = denoise(net, noise(1, 3, 3, 4, 4), steps, schedule)
    assert norms.shape == (grad_steps,)
    assert torch.allclose(norms[-1], step_sensitivity(steps, schedule)[-1].abs() * (2 * z_0).norm())
    assert torch.allclose(norms, gradient_norms(net.requires_grad_(False), noise(1, 3, 3, 4, 4), steps, schedule, loss,
                                                6)[-grad_steps:])
    assert net.a.grad is None

def test_gradient_norms_refuses_no_steps():
    for k in (0, 3):
        with pytest.raises(ValueError, match="grad_steps"):
            gradient_norms(Net(), noise(1, 2, 2, 4, 4), [51, 1], Schedule.modelscope(), torch.sum, k)

@given(st.integers(1, 50), st.data())
def test_unet_cost(n, data):
    k = data.draw(st.integers(0, n))
    assert unet_cost(n, 0) == 2 * n and unet_cost(n, n) == 4 * n and unet_cost(n, k) == 2 * unet_cost(n, k, cfg=False)
    assert unet_cost(n, k, recompute=1) - unet_cost(n, k) == 2 * k

def test_published_costs(): assert (unet_cost(12), unet_cost(20), unet_cost(12, recompute=2)) == (26, 42, 30)

def test_memory_grows_with_k_and_checkpointing_stops_it():
    schedule, steps = Schedule.modelscope(), ddim_timesteps(20, tau=0.3)
    net = torch.nn.Sequential(torch.nn.Conv3d(3, 16, 3, padding=1), torch.nn.SiLU(),
                              torch.nn.Conv3d(16, 3, 3, padding=1))
    def kept(k, checkpoint=False):
        start = noise(1, 3, 4, 8, 8, dtype=torch.float32)
        return saved_bytes(lambda: denoise(lambda z, t: net(z), start, steps, schedule, k, checkpoint),
                           net.parameters())
    assert kept(0) == 0 and kept(4) == 4 * kept(1) > 0
    assert kept(6, checkpoint=True) < kept(1)

# --- the toy model ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_toy_model_walks_back_to_the_clip(kind):
    captions, clips = toy_clips()
    schedule = Schedule.modelscope(kind)
    z_t = corrupt(clips, noise(*clips.shape, dtype=torch.float32), schedule.at(551))
    with torch.no_grad():
        z_0 = denoise(ToyDenoiser(clips, schedule, spread=0.0), z_t, ddim_timesteps(20, tau=0.6), schedule)
    assert len(set(captions)) == 6
    # what remains is the noise of alpha_bar[0]
    assert (z_0 - clips).abs().max() < 0.2 and (z_0 - clips).std() < 0.04


def test_a_chain_of_no_steps_is_refused():
    from instructvideo_kit.diffusion.schedule import n_steps
    with pytest.raises(ValueError, match="n_ddim is 0"): n_steps(.5, 0)
