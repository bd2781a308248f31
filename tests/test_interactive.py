"Eq. 4 and what stands on it: identities at both ends, linearity, masks, schedules, drags, pictures of every kind."
import copy
from unittest.mock import patch

import pytest
import torch
from einops import repeat
from hypothesis import given, settings
from hypothesis import strategies as st

from instructvideo_kit.diffusion.prediction import PREDICTION_TYPES
from instructvideo_kit.diffusion.sampling import denoise, from_x0, guide, to_x0_eps
from instructvideo_kit.diffusion.schedule import Schedule
from instructvideo_kit.interactive.blend import (
    LAMBDA_SCHEDULES, Pair, blend_noise, blended, denoise_blended, lam_at_step, lambda_schedule, masked, noised_still)
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.first_frame import FirstFramePolicy, widened

from tiny import tiny_pipeline
from tiny_policies import tiny_policy, wake

PROMPT = ["a red cat runs"]


class Toy(VideoPolicy):
    "An image-to-video policy without weights: latents are pixels, and the network pulls z_t towards the picture."
    name = "toy"
    def __init__(self, kind):
        schedule = Schedule.rectified() if kind == "flow_prediction" else Schedule.modelscope(kind)
        self.schedule, self.guidance_scale, self.calls = schedule, 3., []
    device, dtype, n_frames, size, latent_shape = torch.device("cpu"), torch.float32, 4, (6, 6), (3, 4, 6, 6)
    def conditions(self, prompts, image=None):
        still = repeat(image, "b c h w -> b c f h w", f=4)
        return (still,), (.5 * still,)
    def predict(self, z_t, t, still):
        self.calls.append(len(z_t))
        alpha_bar = self.schedule.at(t)
        x0 = .8 * still + .2 * z_t.roll(1, -1)
        return from_x0(x0, z_t, alpha_bar, self.schedule.prediction_type)
    def encode(self, video): return video.transpose(1, 2)
    def decode(self, z, frames=None): return z.transpose(1, 2)


@pytest.fixture(scope="module")
def text_policy(tmp_path_factory): return VideoPolicy.from_pretrained(tiny_pipeline(tmp_path_factory.mktemp("t2v"), "v_prediction", "patch"))

@pytest.fixture(scope="module")
def first_frame(text_policy):
    t = text_policy
    network = widened(copy.deepcopy(t.unet))
    network.conv_in.weight.data[:, 4:] = .3 * torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(5)).reshape(network.conv_in.weight[:, 4:].shape)
    wake(network, 1)
    return FirstFramePolicy(network, t.vae, t.text_encoder, t.tokenizer, t.scheduler, t.kit)

@pytest.fixture(scope="module")
def svd(tmp_path_factory): return VideoPolicy.from_pretrained(tiny_policy(tmp_path_factory.mktemp("svd"), "svd"))

def pictures(size): return torch.rand(2, 1, 3, *size, generator=torch.Generator().manual_seed(2)).unbind()

def told(policy):
    "What an image-to-video policy is told before and after an edit."
    prompts = {} if hasattr(policy, "image_encoder") else {"prompts": PROMPT}
    return [{"image": image, **prompts} for image in pictures(policy.size)]

@pytest.fixture(params=["first_frame", "svd", *PREDICTION_TYPES])
def policy(request): return Toy(request.param) if request.param in PREDICTION_TYPES else request.getfixturevalue(request.param)

def single(policy, each, noise, reading, n_ddim=3):
    "The run on one condition, without any of this module."
    timesteps = policy.schedule.timesteps(n_ddim)
    start = noise if reading == "shared" else noised_still(policy, each["image"], noise, int(timesteps[0]))
    return denoise(policy.denoiser(**each), start, timesteps, policy.schedule)

@pytest.mark.parametrize("reading", ["shared", "two_latents"])
def test_ends_are_the_single_runs_bit_for_bit(policy, reading):
    before, after = told(policy)
    noise = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    run = lambda lam: denoise_blended(policy, before, after, noise, lam, reading, n_ddim=3)
    ends = single(policy, before, noise, reading), single(policy, after, noise, reading)
    assert not torch.allclose(*ends, atol=1e-4)
    assert torch.equal(run(1), ends[0]) and torch.equal(run(0), ends[1])
    assert torch.equal(run(torch.ones(1, 1, 1, *policy.latent_shape[2:])), ends[0]) and torch.equal(run([0., 0., 0.]), ends[1])
    middle = run(.5)
    assert all((middle - end).abs().mean() < (ends[0] - ends[1]).abs().mean() for end in ends)

@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_two_latents_keep_their_difference(kind):
    policy, seen = Toy(kind), []
    before, after = told(policy)
    noise = torch.randn(1, *policy.latent_shape)
    denoise_blended(policy, before, after, noise, .4, "two_latents", n_ddim=4, callback=lambda i, t, z: seen.append(z))
    steps = [*policy.schedule.timesteps(4)[1:].tolist(), -1]
    gap = repeat(after["image"] - before["image"], "b c h w -> b c f h w", f=4) if policy.schedule.alpha_bar[-1] > 0 else 0
    for twins, t in zip(seen, steps):
        z, z_edit = twins.chunk(2)
        assert torch.allclose(z_edit - z, torch.as_tensor(gap * policy.schedule.at(t) ** .5), atol=2e-4)

def test_two_latents_blend_noise_not_velocity():
    "One step by hand: the blended epsilon, and not the blended v, moves both chains."
    policy = Toy("v_prediction")
    before, after = told(policy)
    t, z, z_edit = 700, *torch.randn(2, 1, 3, 4, 6, 6)
    from instructvideo_kit.interactive.blend import blended_twins
    model = blended_twins(Pair(policy, before, after), lam_at_step([.3], [t]), policy.schedule)
    alpha_bar = policy.schedule.at(t)
    eps = lambda v, z: to_x0_eps(v, z, alpha_bar, "v_prediction")[1]
    p = model(torch.cat([z, z_edit]), t).chunk(2)
    expected = .3 * eps(policy.denoiser(**before)(z, t), z) + .7 * eps(policy.denoiser(**after)(z_edit, t), z_edit)
    for each, latents in zip(p, (z, z_edit)): assert torch.allclose(eps(each, latents), expected, atol=1e-4)

@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@settings(max_examples=20, deadline=None)
@given(lam=st.floats(0, 1, allow_subnormal=False), w=st.floats(0, 15, allow_subnormal=False), alpha_bar=st.floats(.02, .98, allow_subnormal=False), seed=st.integers(0, 99))
def test_blend_is_linear(kind, lam, w, alpha_bar, seed):
    "Before or after guidance, as epsilon or as the network's own prediction: the same up to rounding."
    a, b, c, d, z = torch.randn(5, 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    eps = lambda p: to_x0_eps(p, z, alpha_bar, kind)[1]
    assert torch.allclose(guide(blend_noise(a, b, lam), blend_noise(c, d, lam), w), blend_noise(guide(a, c, w), guide(b, d, w), lam))
    assert torch.allclose(eps(blend_noise(a, b, lam)), blend_noise(eps(a), eps(b), lam))

@settings(max_examples=30, deadline=None)
@given(lam=st.floats(0, 1, allow_subnormal=False), f=st.integers(1, 4), h=st.integers(1, 5), seed=st.integers(0, 99))
def test_blend_stays_between(lam, f, h, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 2, 3, f, h, 4, generator=g)
    out = blend_noise(a, b, lam)
    assert (out <= torch.maximum(a, b) + 1e-6).all() and (out >= torch.minimum(a, b) - 1e-6).all()
    frames = torch.rand(1, 1, f, 1, 1, generator=g)
    assert torch.equal(blend_noise(a, b, frames), blend_noise(a, b, frames.expand(1, 1, f, h, 4)))

@settings(max_examples=30, deadline=None)
@given(lam=st.floats(0, 1, allow_subnormal=False), h=st.integers(4, 9), seed=st.integers(0, 99))
def test_mask_is_lam_inside_and_one_outside(lam, h, seed):
    mask = (torch.rand(1, 1, 2 * h, 2 * h, generator=torch.Generator().manual_seed(seed)) < .5).float()
    mask[..., 0, 0] = 1
    out = masked(lam, mask, (h, h))
    assert out.shape == (1, 1, 1, h, h) and ((out >= lam - 1e-6) & (out <= 1)).all()
    assert torch.allclose(masked(lam, torch.ones_like(mask), (h, h)), torch.tensor(lam, dtype=torch.float32), atol=1e-6)
    assert (masked(lam, torch.zeros_like(mask).index_fill(-1, torch.tensor([0]), 1), (h, h))[..., 1:] == 1).all()

def test_unguided_branch_is_shared_only_where_it_is_the_same(svd, first_frame):
    for policy, clips in ((svd, 3), (first_frame, 4)):
        before, after = told(policy)
        pair, z = Pair(policy, before, after), torch.randn(1, *policy.latent_shape)
        with patch.object(policy, "predict", wraps=policy.predict) as network: both = pair.both(z, 500)
        assert network.call_count == 1 and len(network.call_args.args[0]) == clips
        for got, alone in zip(both, (pair.plain, pair.edit)): assert torch.allclose(got, alone(z, 500), atol=1e-5)
        with patch.object(policy, "predict", wraps=policy.predict) as network: both = pair.both(z, 500, 2 * z)
        assert len(network.call_args.args[0]) == 4 and torch.allclose(both[1], pair.edit(2 * z, 500), atol=1e-5)

def test_without_guidance_two_branches(first_frame):
    before, after = told(first_frame)
    pair, z = Pair(first_frame, before, after, 1.), torch.randn(1, *first_frame.latent_shape)
    with patch.object(first_frame, "predict", wraps=first_frame.predict) as network: both = pair.both(z, 500)
    assert len(network.call_args.args[0]) == 2
    for got, alone in zip(both, (pair.plain, pair.edit)): assert torch.allclose(got, alone(z, 500), atol=1e-5)

def test_schedule_decides_which_branches_run():
    policy = Toy("v_prediction")
    before, after = told(policy)
    lam = lambda_schedule("window", 4, 0., window=(0., .5))[:2] + [.5, 1.]
    denoise_blended(policy, before, after, torch.randn(1, *policy.latent_shape), lam, n_ddim=4)
    assert policy.calls == [2, 2, 4, 2]

@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(LAMBDA_SCHEDULES), n=st.integers(1, 30), lam=st.floats(0, 1, allow_subnormal=False), end=st.floats(0, 1, allow_subnormal=False))
def test_schedules_stay_in_range(name, n, lam, end):
    values = lambda_schedule(name, n, lam, end)
    assert len(values) == n and all(-1e-6 <= v <= 1 + 1e-6 for v in values)
    if name != "window": assert values[0] == pytest.approx(lam)

@pytest.mark.parametrize("call, words", [
    (lambda e: blend_noise(e, e, 1.01), "must lie in"), (lambda e: blend_noise(e, e, -.1), "must lie in"),
    (lambda e: blend_noise(e, e, torch.tensor([.5, float("nan")])), "must lie in"), (lambda e: blend_noise(e, e[:1], .5), "expected the same"),
    (lambda e: blend_noise(e, e, torch.ones(5, 1, 1, 1, 1)), "does not broadcast"), (lambda e: blend_noise(e, e, torch.ones(1, 2, 1, 1, 1, 1)), "does not broadcast"),
    (lambda e: masked(.5, torch.zeros(1, 1, 4, 4), (2, 2)), "mask is empty"), (lambda e: masked(.5, torch.ones(4, 4), (2, 2)), "mask of shape"),
    (lambda e: lambda_schedule("window", 4, .5, window=(.5, .5)), "window"), (lambda e: lambda_schedule("cosine", 4, .5), "constant, ramp, window"),
    (lambda e: lam_at_step([.5, .5], [3, 2, 1]), "2 entries")])
def test_bad_blends(call, words):
    with pytest.raises(ValueError, match=words): call(torch.randn(2, 2, 2, 4, 4))

def test_bad_reading():
    policy = Toy("v_prediction")
    with pytest.raises(ValueError, match="shared and two_latents"): denoise_blended(policy, *told(policy), torch.randn(1, *policy.latent_shape), .5, "both")
