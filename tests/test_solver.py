"DPM-Solver++(2M): parity with diffusers, its order, its chain, and the policy's option."
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tiny import tiny_pipeline

from instructvideo_kit.diffusion.prediction import PREDICTION_TYPES
from instructvideo_kit.diffusion.sampling import denoise
from instructvideo_kit.diffusion.schedule import Schedule, scaled_linear
from instructvideo_kit.diffusion.solver import dpm2m, solve
from instructvideo_kit.diffusion.toy import ToyDenoiser, toy_clips
from instructvideo_kit.policy import VideoPolicy


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def net(z, t): return torch.tanh(.7 * z - .3 * z.roll(1, 2) + float(t) / 1000)

@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("n", [1, 2, 14, 15, 30])
def test_chain_equals_diffusers(kind, end, n):
    beta = dict(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012)
    theirs = DPMSolverMultistepScheduler(**beta, prediction_type=kind, final_sigmas_type=end)
    alpha_bar = scaled_linear()
    schedule = Schedule(alpha_bar, kind, 1. if end == "zero" else alpha_bar[0].item())
    theirs.set_timesteps(timesteps=schedule.timesteps(n).tolist())
    z = start = noise(2, 4, 3, 5, 5)
    for t in theirs.timesteps: z = theirs.step(net(z, t), t, z).prev_sample
    ours = dpm2m(net, start, schedule.timesteps(n), schedule)
    assert (ours - z).abs().max() < 2e-5 * z.abs().max()
    if n > 2: assert (denoise(net, start, schedule.timesteps(n), schedule) - z).abs().max() > 1e-3 * z.abs().max()

def perfect(schedule):
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    model = ToyDenoiser(0 * one, schedule, .7)
    return lambda solver, n: solve(model, one, schedule.timesteps(n), schedule, solver).item()

@pytest.mark.parametrize("shift", [1., 2., 3.])
def test_ten_steps_are_as_good_as_twenty_of_ddim(shift):
    end = perfect(Schedule.rectified(shift)) # the exact flow carries 1 to .7
    assert abs(end("dpm2m", 10) - .7) <= abs(end("ddim", 20) - .7)

@pytest.mark.parametrize("shift", [5., 8.])
def test_a_large_shift_leaves_the_last_step_long(shift):
    end = perfect(Schedule.rectified(shift)) # better than DDIM with the same steps, not with half
    assert abs(end("ddim", 20) - .7) < abs(end("dpm2m", 10) - .7) < abs(end("ddim", 10) - .7)

def test_ten_steps_are_as_good_as_twenty_on_clips():
    clips = toy_clips(n_frames=4, size=8)[1]
    start, schedule = noise(4, *clips.shape[1:], seed=3, dtype=torch.float64), Schedule.modelscope("v_prediction")
    for spread in (.08, .3):
        model = ToyDenoiser(clips, schedule, spread).double()
        def end(solver, n, model=model): return solve(model, start, schedule.timesteps(n), schedule, solver)
        exact = end("dpm2m", 500)
        errors = [(end(solver, n) - exact).square().mean() for solver, n in (("dpm2m", 10), ("ddim", 20))]
        assert errors[0] <= errors[1]

@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_all_predictions_walk_the_same_chain(kind):
    clips = toy_clips(n_frames=2, size=6)[1]
    schedule, reference = Schedule(scaled_linear(), kind), Schedule(scaled_linear(), "sample")
    start = noise(2, *clips.shape[1:], dtype=torch.float64)
    def walk(s):
        return dpm2m(ToyDenoiser(clips, s).double(), start, s.timesteps(8), s)
    assert torch.allclose(walk(schedule), walk(reference), atol=1e-8)

def test_one_step_is_ddim_and_no_graph_is_left():
    schedule = Schedule.modelscope("v_prediction")
    model = ToyDenoiser(toy_clips(n_frames=2, size=6)[1], schedule) # it has a parameter
    start, seen = noise(1, 3, 2, 6, 6), []
    assert torch.allclose(dpm2m(net, start, [1], schedule), denoise(net, start, [1], schedule), atol=1e-6)
    z = dpm2m(model, start, [501, 251, 1], schedule, callback=lambda i, t, z: seen.append((i, t)))
    assert not z.requires_grad and seen == [(0, 501), (1, 251), (2, 1)]
    assert torch.equal(solve(model, start, [51, 1], schedule), denoise(model, start, [51, 1], schedule))
    with pytest.raises(ValueError, match="must descend"): dpm2m(net, start, [1, 51], schedule)

def test_a_policy_draws_with_either(tmp_path):
    policy = VideoPolicy.from_pretrained(tiny_pipeline(tmp_path / "p", "v_prediction", "patch"))
    ddim, dpm = (policy.generate(["a cat"], 4, seed=1, solver=solver) for solver in ("ddim", "dpm2m"))
    assert torch.equal(ddim, policy.generate(["a cat"], 4, seed=1)) and not torch.equal(ddim, dpm)
    start, grid = policy.noise(range(1), 1), policy.schedule.timesteps(4)
    with torch.no_grad(): z_0 = dpm2m(policy.denoiser(["a cat"]), start, grid, policy.schedule)
    assert torch.allclose(dpm, policy.decode(z_0).clamp(0, 1), atol=1e-5)
    with pytest.raises(ValueError, match="solver is 'heun'; known are 'ddim', 'dpm2m'"):
        policy.generate(["a cat"], 4, solver="heun")
