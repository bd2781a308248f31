"Steps with noise: four published forms against formulas written here, exact spread of the chains, probabilities."
import math

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from instructvideo_kit.diffusion.prediction import PREDICTION_TYPES, from_rectified, rectified_sigma, to_rectified
from instructvideo_kit.diffusion.sampling import ddim_step, denoise, from_x0, step_pairs
from instructvideo_kit.diffusion.schedule import Schedule, scaled_linear
from instructvideo_kit.diffusion.stochastic import (
    LEVELS,
    check_window,
    ddim_gaussian,
    draw_window,
    flow_gaussian,
    guarded_log_ratio,
    line_deviation,
    log_probability,
    replay,
    spread_along,
    step_kl,
    stochastic_chain,
    transition,
)
from instructvideo_kit.diffusion.toy import ToyDenoiser
from instructvideo_kit.tuning import ddpo


def given(**kwargs): return lambda test: settings(deadline=None, max_examples=40)(hypothesis.given(**kwargs)(test))

def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def own(n): return [torch.Generator().manual_seed(1000 + i) for i in range(n)] # not the seeds of any start noise

def schedule_of(kind): return Schedule.rectified(3.) if kind == "flow_prediction" else Schedule(scaled_linear(), kind)

class Net(torch.nn.Module):
    "Stands for a network, with two weights."
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([0.7, -0.3], dtype=dtype))
    def forward(self, z, t): return torch.tanh(self.a[0] * z + self.a[1] * z.roll(1, 2) + float(t) / 1000)

# --- the spread, by formulas of the line that share no code with the kit ---------------------------------

def line_end(sde, level, n, shift, c, window=None):
    "Spread after n steps over the shifted 1, (n-1)/n, ..., 0, perfect network for N(0, c^2): published formulas."
    y = [i / n for i in range(n, -1, -1)]
    sigmas = [shift * v / (1 + (shift - 1) * v) for v in y]
    first, end, variance = *(window or (0, n - 1)), 1.
    for i, (s, s_next) in enumerate(zip(sigmas, sigmas[1:])):
        total, dt = (1 - s) ** 2 * c * c + s * s, s_next - s
        x0, eps = (1 - s) * c * c / total, s / total # per unit of x
        v, std = eps - x0, 0.
        keep = 1 + v * dt # Euler
        if level and first <= i < end:
            if sde == "flow_grpo":
                g = level * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s)))
                keep = (1 + g * g / (2 * s) * dt) + v * (1 + g * g * (1 - s) / (2 * s)) * dt
                std = g * math.sqrt(-dt)
            if sde == "dance_grpo":
                score = -(1 - (1 - s) * x0) / s ** 2
                keep, std = 1 + v * dt - .5 * level ** 2 * score * dt, level * math.sqrt(-dt)
            if sde == "cps":
                std = s_next * math.sin(level * math.pi / 2)
                keep = (1 - s_next) * x0 + math.sqrt(s_next ** 2 - std ** 2) * eps
            if sde == "ddim": keep, std = circle_ddim(s, s_next, x0, eps, level)
        variance = keep ** 2 * variance + std ** 2
    return math.sqrt(variance)

def circle_ddim(s, s_next, x0, eps, eta):
    "Song et al.'s step for latents of the circle, told in coordinates of the line."
    length, length_next = math.hypot(1 - s, s), math.hypot(1 - s_next, s_next)
    now, then = ((1 - s) / length) ** 2, ((1 - s_next) / length_next) ** 2
    variance = eta ** 2 * (1 - then) / (1 - now) * (1 - now / then)
    keep = math.sqrt(then) * x0 + math.sqrt(1 - then - variance) * eps
    return length_next * keep, length_next * math.sqrt(variance)

@pytest.mark.parametrize("sde", LEVELS)
@pytest.mark.parametrize("n", [2, 5, 10, 50, 500])
@pytest.mark.parametrize("shift", [1., 3., 5., 8.])
def test_chains_end_with_the_spread_of_the_published_formulas(sde, n, shift):
    schedule = Schedule.rectified(shift, n_train=1000)
    for level in (0., .5 * LEVELS[sde], LEVELS[sde]):
        for c in (.3, .7, 1.5) if n < 100 else (.7,):
            ours = spread_along(schedule.timesteps(n), schedule, c, sde, level)[-1].item()
            assert math.isclose(ours, line_end(sde, level, n, shift, c), rel_tol=1e-6) # alpha_bar near 1 costs digits

@pytest.mark.parametrize("window", [(0, 2), (1, 3), (5, 9)])
def test_a_window_is_the_same_as_in_the_formulas(window):
    schedule = Schedule.rectified(3.)
    for sde in LEVELS:
        ours = spread_along(schedule.timesteps(10), schedule, .7, sde, window=window)[-1].item()
        assert math.isclose(ours, line_end(sde, LEVELS[sde], 10, 3., .7, window), rel_tol=1e-6)

def test_the_numbers_of_the_field():
    found = {"ddim": [], "flow_grpo": [], "dance_grpo": [], "cps": []}
    for n in (10, 500):
        schedule = Schedule.rectified()
        for sde, level in (("ddim", 0.), ("flow_grpo", .7), ("dance_grpo", .3), ("cps", .7)):
            end = spread_along(schedule.timesteps(n), schedule, .7, sde, level)[-1].item()
            found[sde].append(round(end, 3))
    expected = {"ddim": [.612, .698], "flow_grpo": [.676, .702], "dance_grpo": [.62, .698], "cps": [.527, .593]}
    assert found == expected

@pytest.mark.parametrize("shift", [1., 3., 8.])
@pytest.mark.parametrize("sde, level", [("ddim", 0.), ("ddim", 1.), ("flow_grpo", .7), ("dance_grpo", .3)])
def test_a_discretisation_error_falls_with_more_steps(sde, level, shift):
    schedule = Schedule.rectified(shift, n_train=4000)
    def error(n): return abs(spread_along(schedule.timesteps(n), schedule, .7, sde, level)[-1].item() - .7)
    many = error(4000) # Flow-GRPO's error has two parts of opposite sign, and falls as n^-(a^2): slowly
    assert many < .003 and many < error(20) / 8

@pytest.mark.parametrize("a, c", [(.2, .7), (.5, .3), (.8, 1.), (1., 1.5)])
def test_cps_loses_spread_whatever_the_number_of_steps(a, c):
    schedule = Schedule.rectified(n_train=4000)
    end = spread_along(schedule.timesteps(4000), schedule, c, "cps", a)[-1].item()
    assert end < c * (1 - .2 * a ** 2) and abs(end / (c * math.cos(a * math.pi / 4)) - 1) < .03

@pytest.mark.parametrize("sde", LEVELS)
def test_drawn_spread_is_the_exact_one(sde):
    for schedule in (Schedule.rectified(3.), Schedule.modelscope("v_prediction")):
        grid = schedule.timesteps(10)
        model = ToyDenoiser(torch.zeros(1, 1, 1, 1, 1), schedule, .7)
        drawn = stochastic_chain(model, noise(4, 1, 5, 40, 50, dtype=torch.float32), grid, schedule, own(4), sde)
        expected = spread_along(grid, schedule, .7, sde)
        for row, exact in zip([*drawn["z_next"], drawn["z_0"]], expected[1:]):
            assert abs(row.double().std() / exact - 1) < 5 / (2 * row.numel()) ** .5
        assert abs(drawn["z_0"].double().mean()) < 5 * expected[-1] / drawn["z_0"].numel() ** .5

# --- one step --------------------------------------------------------------------------------------------

@given(kind=st.sampled_from(PREDICTION_TYPES), sde=st.sampled_from(list(LEVELS)), t=st.integers(60, 990),
       back=st.integers(1, 50), seed=st.integers(0, 99))
def test_all_predictions_say_the_same_and_no_noise_is_the_deterministic_step(kind, sde, t, back, seed):
    z, x0 = noise(2, 2, 3, 2, 4, 4, seed=seed).unbind(0)
    schedule, reference = Schedule(scaled_linear(), kind), Schedule(scaled_linear(), "sample")
    prediction = from_x0(x0, z, schedule.at(t), kind)
    mean, std = transition(z, prediction, t, t - back, schedule, sde)
    other, same = transition(z, x0, t, t - back, reference, sde)
    assert torch.allclose(mean, other, atol=1e-8) and std == same > 0
    silent, nothing = transition(z, prediction, t, t - back, schedule, sde, 0.)
    assert nothing == 0 and torch.equal(silent, ddim_step(z, prediction, t, t - back, schedule))
    nearly, tiny = transition(z, prediction, t, t - back, schedule, sde, 1e-7)
    assert torch.allclose(nearly, silent, atol=1e-6) and 0 < tiny < 1e-5 # no jump at 0

@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("sde", LEVELS)
def test_the_last_step_leaves_no_noise(kind, sde):
    for final in (1., .99915):
        base = schedule_of(kind)
        schedule = Schedule(base.alpha_bar, kind, final, base.steps_offset, base.spacing, base.times)
        z, prediction = noise(2, 1, 3, 2, 4, 4).unbind(0)
        last = int(schedule.timesteps(10)[-1])
        mean, std = transition(z, prediction, last, -1, schedule, sde)
        assert std == 0 and torch.equal(mean, ddim_step(z, prediction, last, -1, schedule))

@given(alpha=st.floats(.05, .95), share=st.floats(.05, .95), eta=st.floats(.05, 1.))
def test_ddim_keeps_the_noise_level_when_the_pair_is_true(alpha, share, eta):
    "(1 - alpha_bar' - std^2) + std^2: what is kept of the old noise and what is new add up."
    then = alpha + share * (1 - alpha)
    schedule = Schedule(torch.tensor([then, alpha], dtype=torch.float64), "sample")
    nothing = torch.zeros(1, 1, dtype=torch.float64) # the clip; its noise is 1
    mean, std = ddim_gaussian(nothing + (1 - alpha) ** .5, nothing, 1, 0, schedule, eta)
    assert math.isclose(mean.item() ** 2 + std ** 2, 1 - then, rel_tol=1e-9)

@given(sigma=st.floats(.1, .95), a=st.floats(.05, 2.))
def test_a_flows_drift_and_noise_belong_together(sigma, a):
    "Ito: for data at one point, d(sigma^2) must follow from drift and noise, to first order in a short step."
    short = 1e-7
    levels = torch.tensor([sigma - short, sigma], dtype=torch.float64)
    schedule = Schedule((1 - levels) ** 2 / ((1 - levels) ** 2 + levels ** 2), "flow_prediction")
    x = from_rectified(torch.ones(1, 1, dtype=torch.float64), sigma)
    for sde in ("flow_grpo", "dance_grpo"):
        mean, std = transition(x, torch.full((1, 1), 1 / sigma, dtype=torch.float64), 1, 0, schedule, sde, a)
        keep, s = to_rectified(mean, schedule.at(0)).item(), line_deviation(std, 0, schedule)
        got = keep ** 2 * sigma ** 2 + s ** 2 - sigma ** 2
        assert math.isclose(got, -2 * sigma * short, rel_tol=.01)

def test_names_of_ddpo_agree():
    "What tuning.ddpo offers under these names is the same step."
    z, prediction = noise(2, 2, 3, 2, 4, 4).unbind(0)
    schedule, flows = Schedule.modelscope("v_prediction"), Schedule.rectified(3.)
    for eta in (0., .4, 1.):
        ours = ddim_gaussian(z, prediction, 501, 401, schedule, eta)
        theirs = ddpo.ddim_gaussian(z, prediction, 501, 401, schedule, eta)
        assert torch.equal(ours[0], theirs[0]) and ours[1] == theirs[1]
    for a in (0., .7):
        for t, t_prev in ((999, 899), (499, 399)):
            ours = flow_gaussian(z, prediction, t, t_prev, flows, a)
            theirs = ddpo.flow_gaussian(z, prediction, t, t_prev, flows, a)
            assert torch.allclose(ours[0], theirs[0], atol=1e-12) and math.isclose(ours[1], theirs[1])
    assert torch.equal(log_probability(z, prediction, .3), ddpo.log_probability(z, prediction, .3))

@pytest.mark.parametrize("sde, level, words", [
    ("ode", .5, "known are 'ddim'"), ("ddim", 1.01, "noise_level is 1.01.*in 0..1"), ("cps", -.1, "in 0..1"),
    ("flow_grpo", -1, "0 or above"), ("dance_grpo", math.inf, "finite"), ("ddim", math.nan, "noise_level is nan"),
    ("ode", None, "known are")])
def test_bad_noise_is_refused(sde, level, words):
    z = noise(1, 2)
    schedule = Schedule.modelscope()
    with pytest.raises(ValueError, match=words): transition(z, z, 501, 401, schedule, sde, level)

# --- probabilities ---------------------------------------------------------------------------------------

@given(deviation=st.floats(.01, 5.), seed=st.integers(0, 99))
def test_log_probability_and_kl_are_those_of_torch(deviation, seed):
    z, mean, other = noise(3, 4, 2, 3, seed=seed).unbind(0)
    here, there = torch.distributions.Normal(mean, deviation), torch.distributions.Normal(other, deviation)
    assert torch.allclose(log_probability(z, mean, deviation), here.log_prob(z).mean((1, 2)), rtol=1e-9)
    divergence = torch.distributions.kl_divergence(here, there).mean((1, 2))
    assert torch.allclose(step_kl(mean, other, deviation), divergence, rtol=1e-9)

def test_half_precision_is_lifted():
    z, mean = noise(2, 3, 500).unbind(0)
    half = log_probability(z.bfloat16(), mean.bfloat16(), .3)
    assert half.dtype == torch.float32
    assert torch.allclose(half, log_probability(z.bfloat16().float(), mean.bfloat16().float(), .3))

@pytest.mark.parametrize("deviation", [0., -1., math.nan])
def test_no_density_without_noise(deviation):
    z = noise(1, 2)
    for call in (log_probability, step_kl):
        with pytest.raises(ValueError, match="without noise"): call(z, z, deviation)

@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("sde", LEVELS)
def test_ratio_is_one_before_the_first_update_in_float32(kind, sde):
    net, schedule = Net(), schedule_of(kind)
    start = noise(3, 4, 3, 6, 6, dtype=torch.float32)
    if kind == "epsilon": start = .3 * start
    drawn = stochastic_chain(net, start, schedule.timesteps(8), schedule, own(3), sde)
    for i in range(7):
        logp, mean, std = replay(net, drawn, i, schedule, sde)
        assert logp.requires_grad and std == drawn["std"][i] and torch.equal(mean.detach(), drawn["mean"][i])
        assert ((logp - drawn["logp"][i]).exp() - 1).abs().max() < 1e-6
        guarded = guarded_log_ratio(logp, drawn["logp"][i], mean, drawn["mean"][i], std)
        assert (guarded.exp() - 1).abs().max() < 1e-6
    with torch.no_grad(): net.a += .05
    moved = (replay(net, drawn, 0, schedule, sde)[0] - drawn["logp"][0]).exp()
    assert (moved - 1).abs().min() > 1e-6 # the test can fail

def test_gradient_of_the_log_probability_by_finite_differences():
    net, schedule = Net(torch.float64), Schedule.modelscope("v_prediction")
    drawn = stochastic_chain(net, noise(2, 4, 3, 6, 6), schedule.timesteps(6), schedule, own(2))
    for i in (0, 4):
        def total(i=i): return replay(net, drawn, i, schedule)[0].sum()
        gradient = torch.autograd.grad(total(), net.a)[0]
        for k in range(2):
            values = []
            for h in (1e-6, -1e-6):
                with torch.no_grad():
                    net.a[k] += h
                    values.append(total().item())
                    net.a[k] -= h
            assert math.isclose((values[0] - values[1]) / 2e-6, gradient[k].item(), rel_tol=1e-5, abs_tol=1e-7)

@given(deviation=st.floats(.05, .8), scale=st.sampled_from([None, .3]), seed=st.integers(0, 99))
def test_guards_ratio_by_hand(deviation, scale, seed):
    drawn, mean, old = noise(3, 2, 5, seed=seed).unbind(0)
    k = deviation if scale is None else scale
    logp, logp_old = log_probability(drawn, mean, deviation), log_probability(drawn, old, deviation)
    expected = (logp - logp_old) * k + (mean - old).square().mean(1) / (2 * deviation ** 2) * k
    got = guarded_log_ratio(logp, logp_old, mean, old, deviation, scale)
    assert torch.allclose(got, expected)
    if scale is None: # the published form, k = deviation
        assert torch.allclose(got, (logp - logp_old) * k + (mean - old).square().mean(1) / (2 * k))
    else: # the product (drawn - old)(mean - old), whose mean is 0
        assert torch.allclose(got, k * ((drawn - old) * (mean - old)).mean(1) / deviation ** 2)

# --- the chain -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_no_noise_is_denoise_bit_for_bit(kind):
    net, schedule = Net(), schedule_of(kind)
    start = .3 * noise(2, 4, 3, 6, 6, dtype=torch.float32)
    for sde in LEVELS:
        drawn = stochastic_chain(net, start, schedule.timesteps(9), schedule, own(2), sde, 0.)
        assert torch.equal(drawn["z_0"], denoise(net, start, schedule.timesteps(9), schedule))
        assert drawn["logp"].shape == (0, 2) and drawn["z_t"].shape == (0, *start.shape) and drawn["std"].shape == (0,)

@given(n=st.integers(2, 12), data=st.data())
def test_a_window_records_its_steps_and_leaves_the_others(n, data):
    first = data.draw(st.integers(0, n - 2))
    end = data.draw(st.integers(first + 1, n - 1))
    net, schedule = Net(), Schedule.modelscope("v_prediction")
    seen, grid = [], schedule.timesteps(n)
    start = noise(2, 4, 3, 4, 4, dtype=torch.float32)
    def watch(i, t, z): seen.append(z)
    drawn = stochastic_chain(net, start, grid, schedule, own(2), window=(first, end), callback=watch)
    assert drawn["step"].tolist() == list(range(first, end)) and not drawn["z_0"].requires_grad
    pairs = step_pairs(grid)
    assert list(zip(drawn["t"].tolist(), drawn["t_prev"].tolist())) == pairs[first:end]
    assert torch.equal(drawn["z_next"], torch.stack(seen[first:end])) and torch.equal(seen[-1], drawn["z_0"])
    with torch.no_grad():
        z = seen[end - 1]
        for t, t_prev in pairs[end:]: z = ddim_step(z, net(z, t), t, t_prev, schedule)
    assert torch.equal(z, drawn["z_0"]) # deterministic after the window
    assert (drawn["std"] > 0).all()
    for z, mean, std, logp in zip(*(drawn[k] for k in ("z_next", "mean", "std", "logp"))):
        assert torch.allclose(log_probability(z, mean, std.item()), logp)

def test_a_clips_noise_is_its_own():
    net, schedule = Net(), Schedule.modelscope("v_prediction")
    start = noise(3, 4, 3, 4, 4, dtype=torch.float32)
    together = stochastic_chain(net, start, schedule.timesteps(5), schedule, own(3))
    alone = stochastic_chain(net, start[2:], schedule.timesteps(5), schedule, own(3)[2:])
    assert torch.allclose(together["z_0"][2], alone["z_0"][0], atol=1e-6)
    steps = (together["z_next"] - together["mean"]).flatten(2)
    drawn = (steps / together["std"][:, None, None]).flatten(0, 1) # (4 * 3, n): the noises themselves
    distance = torch.cdist(drawn, drawn) + 10 * torch.eye(len(drawn))
    assert distance.min() > 1 # no two steps, no two clips share a noise
    again = stochastic_chain(net, start, schedule.timesteps(5), schedule, own(3))
    assert all(torch.equal(together[k], again[k]) for k in together)

@pytest.mark.parametrize("n, window", [(10, (0, 10)), (10, (-1, 3)), (10, (4, 4)), (10, (5, 3)), (2, (1, 2))])
def test_windows_outside_the_chain_are_refused(n, window):
    words = rf"window is \({window[0]}, {window[1]}\).*expected 0 <= first < end <= {n - 1}"
    with pytest.raises(ValueError, match=words): check_window(n, window)

@given(n=st.integers(2, 30), length=st.integers(1, 29), seed=st.integers(0, 99))
def test_drawn_windows_fit(n, length, seed):
    rng = torch.Generator().manual_seed(seed)
    if length > n - 1:
        with pytest.raises(ValueError, match="no more than"): draw_window(n, length, rng)
        return
    first, end = draw_window(n, length, rng)
    assert end - first == length and check_window(n, (first, end)) == (first, end) and end <= max(n // 2, length)

def test_a_chain_of_one_step_and_a_wrong_count_of_generators():
    net, schedule = Net(), Schedule.modelscope()
    start = noise(2, 4, 3, 4, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="expected 2 or more"): stochastic_chain(net, start, [1], schedule, own(2))
    with pytest.raises(ValueError, match="3 generators for 2"): stochastic_chain(net, start, [51, 1], schedule, own(3))

def test_line_deviation_is_the_published_one():
    schedule = Schedule.rectified(3.)
    _, std = transition(noise(1, 3), noise(1, 3), 899, 799, schedule, "dance_grpo", .3)
    step = rectified_sigma(schedule.at(899)) - rectified_sigma(schedule.at(799))
    assert math.isclose(line_deviation(std, 799, schedule), .3 * step ** .5, rel_tol=1e-9)
