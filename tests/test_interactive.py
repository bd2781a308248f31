"Eq. 4 and what stands on it: identities at both ends, linearity, masks, schedules, drags, pictures of every kind."
import copy
import io
from unittest.mock import patch

import numpy as np
import pytest
import torch
from einops import repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_pipeline
from tiny_policies import tiny_policy, wake

from instructvideo_kit.diffusion.prediction import PREDICTION_TYPES
from instructvideo_kit.diffusion.sampling import denoise, from_x0, guide, to_x0_eps
from instructvideo_kit.diffusion.schedule import Schedule
from instructvideo_kit.files import KitError
from instructvideo_kit.interactive.blend import (
    LAMBDA_SCHEDULES,
    Pair,
    blend_noise,
    denoise_blended,
    lam_at_step,
    lambda_schedule,
    masked,
    noised_still,
)
from instructvideo_kit.interactive.drag import disc, displaced, fill, matte, moved, steered
from instructvideo_kit.interactive.pipeline import InteractivePipeline, img2img, join_texts, to_image
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.first_frame import FirstFramePolicy, widened

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
    def count(self, prompts, image): return len(image)
    def encode(self, video): return video.transpose(1, 2)
    def decode(self, z, frames=None): return z.transpose(1, 2)


@pytest.fixture(scope="module")
def text_policy(tmp_path_factory):
    return VideoPolicy.from_pretrained(tiny_pipeline(tmp_path_factory.mktemp("t2v"), "v_prediction", "patch"))

@pytest.fixture(scope="module")
def first_frame(text_policy):
    t = text_policy
    network = widened(copy.deepcopy(t.unet))
    network.conv_in.weight.data[:, 4:] = .3 * torch.randn(8, 4, 3, 3,
        generator=torch.Generator().manual_seed(5)).reshape(network.conv_in.weight[:, 4:].shape)
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
def policy(request):
    return Toy(request.param) if request.param in PREDICTION_TYPES else request.getfixturevalue(request.param)

def single(policy, each, noise, start_at, n_ddim=3):
    "The run on one condition, without any of this module."
    timesteps = policy.schedule.timesteps(n_ddim)
    start = noise if start_at == "noise" else noised_still(policy, each["image"], noise, int(timesteps[0]))
    return denoise(policy.denoiser(**each), start, timesteps, policy.schedule)

@pytest.mark.parametrize("reading, start", [("shared", "noise"), ("shared", "picture"), ("two_latents", "picture")])
def test_ends_are_the_single_runs_bit_for_bit(policy, reading, start):
    before, after = told(policy)
    noise = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    def run(lam):
        return denoise_blended(policy, before, after, noise, lam, reading, n_ddim=3, start=start)
    ends = single(policy, before, noise, start), single(policy, after, noise, start)
    assert not torch.allclose(*ends, atol=1e-4)
    assert torch.equal(run(1), ends[0]) and torch.equal(run(0), ends[1])
    if not isinstance(policy, Toy): return
    assert torch.equal(run(torch.ones(1, 1, 1, *policy.latent_shape[2:])), ends[0])
    assert torch.equal(run([0., 0., 0.]), ends[1])
    middle = run(.5)
    assert all((middle - end).abs().mean() < (ends[0] - ends[1]).abs().mean() for end in ends)

@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_two_latents_keep_their_difference(kind):
    policy, seen = Toy(kind), []
    before, after = told(policy)
    noise = torch.randn(1, *policy.latent_shape)
    denoise_blended(policy, before, after, noise, .4, "two_latents", n_ddim=4, callback=lambda i, t, z: seen.append(z))
    steps = [*policy.schedule.timesteps(4)[1:].tolist(), -1]
    gap = (repeat(after["image"] - before["image"], "b c h w -> b c f h w", f=4)
           if policy.schedule.alpha_bar[-1] > 0 else 0)
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
    def eps(v, z):
        return to_x0_eps(v, z, alpha_bar, "v_prediction")[1]
    p = model(torch.cat([z, z_edit]), t).chunk(2)
    expected = .3 * eps(policy.denoiser(**before)(z, t), z) + .7 * eps(policy.denoiser(**after)(z_edit, t), z_edit)
    for each, latents in zip(p, (z, z_edit)): assert torch.allclose(eps(each, latents), expected, atol=1e-4)

@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@settings(max_examples=20, deadline=None)
@given(lam=st.floats(0, 1, allow_subnormal=False), w=st.floats(0, 15, allow_subnormal=False),
       alpha_bar=st.floats(.02, .98, allow_subnormal=False), seed=st.integers(0, 99))
def test_blend_is_linear(kind, lam, w, alpha_bar, seed):
    "Before or after guidance, as epsilon or as the network's own prediction: the same up to rounding."
    a, b, c, d, z = torch.randn(5, 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    def eps(p):
        return to_x0_eps(p, z, alpha_bar, kind)[1]
    assert torch.allclose(guide(blend_noise(a, b, lam), blend_noise(c, d, lam), w),
                          blend_noise(guide(a, c, w), guide(b, d, w), lam))
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
@given(name=st.sampled_from(LAMBDA_SCHEDULES), n=st.integers(1, 30), lam=st.floats(0, 1, allow_subnormal=False),
       end=st.floats(0, 1, allow_subnormal=False))
def test_schedules_stay_in_range(name, n, lam, end):
    values = lambda_schedule(name, n, lam, end)
    assert len(values) == n and all(-1e-6 <= v <= 1 + 1e-6 for v in values)
    if name != "window": assert values[0] == pytest.approx(lam)

@pytest.mark.parametrize("call, words", [
    (lambda e: blend_noise(e, e, 1.01), "must lie in"), (lambda e: blend_noise(e, e, -.1), "must lie in"),
    (lambda e: blend_noise(e, e, torch.tensor([.5, float("nan")])), "must lie in"),
    (lambda e: blend_noise(e, e[:1], .5), "expected the same"),
    (lambda e: blend_noise(e, e, torch.ones(5, 1, 1, 1, 1)), "does not broadcast"),
    (lambda e: blend_noise(e, e, torch.ones(1, 2, 1, 1, 1, 1)), "does not broadcast"),
    (lambda e: masked(.5, torch.zeros(1, 1, 4, 4), (2, 2)), "mask is empty"),
    (lambda e: masked(.5, torch.ones(4, 4), (2, 2)), "mask of shape"),
    (lambda e: lambda_schedule("window", 4, .5, window=(.5, .5)), "window"),
    (lambda e: lambda_schedule("cosine", 4, .5), "constant, ramp, window"),
    (lambda e: lam_at_step([.5, .5], [3, 2, 1]), "2 entries")])
def test_bad_blends(call, words):
    with pytest.raises(ValueError, match=words): call(torch.randn(2, 2, 2, 4, 4))

def test_bad_reading():
    policy = Toy("v_prediction")
    with pytest.raises(ValueError, match="shared and two_latents"):
        denoise_blended(policy, *told(policy), torch.randn(1, *policy.latent_shape), .5, "both")


# drags

def spot(x, y, size=32):
    "A red disc of radius 4 on grey."
    cover = disc((x, y), 4, (size, size))
    return .5 * (1 - cover) + cover * torch.tensor([1., .2, .2])[:, None, None]

def red_centre(clip):
    "Centroid (x, y) of redness per frame."
    weight = (clip[0, :, 0] - clip[0, :, 1]).clamp(min=0)
    y, x = (torch.arange(n) + .5 for n in clip.shape[-2:])
    return torch.stack([(weight.sum(1) * x).sum(-1), (weight.sum(2) * y).sum(-1)], -1) / weight.sum((1, 2))[:, None]

@settings(max_examples=25, deadline=None)
@given(start=st.tuples(st.floats(9, 23), st.floats(9, 23)), end=st.tuples(st.floats(8, 24), st.floats(8, 24)),
       f=st.integers(2, 9))
def test_displaced_object_walks_along_the_arrow(start, end, f):
    image = spot(*start)
    clip, touched = displaced(image, [(start, end, 6)], f)
    assert clip.shape == (1, f, 3, 32, 32) and torch.equal(clip[:, 0], image)
    assert clip.min() >= -1e-6 and clip.max() <= 1 + 1e-6
    path = torch.lerp(torch.tensor(start), torch.tensor(end), torch.linspace(0, 1, f)[:, None])
    assert (red_centre(clip) - path).abs().max() < .35
    assert torch.allclose((clip - image[:, None]) * (touched == 0), torch.zeros(()), atol=1e-5) # nothing else moves

def test_two_drags_and_a_region():
    image = spot(8, 8) + spot(24, 24) - .5
    clip, _ = displaced(image, [((8, 8), (8, 20), 6), ((24, 24), (24, 12), 6)], 4)
    assert clip.shape == (1, 4, 3, 32, 32)
    assert (red_centre(clip[..., :16])[-1] - torch.tensor([8., 20])).abs().max() < .5
    assert (red_centre(clip[..., 16:])[-1] - torch.tensor([8., 12])).abs().max() < .5
    region = disc((8, 8), 6, (32, 32))
    assert torch.equal(displaced(image, [((8, 8), (8, 20), 1)], 4, region)[0],
                       displaced(image, [((8, 8), (8, 20), 9)], 4, region)[0])

def test_matte_takes_the_object_and_leaves_the_grass():
    image = spot(16, 16)
    cut, inside = matte(image, disc((16, 16), 10, (32, 32))), disc((16, 16), 4, (32, 32))
    assert cut[inside == 1].min() == 1 and cut[disc((16, 16), 7, (32, 32)) == 0].max() == 0
    flat = torch.full((1, 3, 32, 32), .3)
    assert torch.equal(matte(flat, inside), inside) # nothing stands out: the whole disc

@settings(max_examples=25, deadline=None)
@given(h=st.integers(1, 33), w=st.integers(1, 33), seed=st.integers(0, 99))
def test_fill_keeps_what_is_known_and_a_flat_picture_flat(h, w, seed):
    g = torch.Generator().manual_seed(seed)
    hole = (torch.rand(1, 1, h, w, generator=g) < .4).float()
    hole[..., 0, 0] = 0
    x = torch.rand(1, 3, h, w, generator=g)
    out = fill(x * (1 - hole) + 9 * hole, hole)
    assert torch.allclose(out * (1 - hole), x * (1 - hole), atol=1e-6) and out.max() <= 1 + 1e-5
    assert torch.allclose(fill(torch.full_like(x, .3) * (1 - hole), hole), torch.tensor(.3), atol=1e-5)

def test_moved_by_whole_pixels():
    x = torch.rand(2, 3, 6, 8)
    out = moved(x, torch.tensor([[2., 0], [0., -1]]))
    assert torch.allclose(out[0, :, :, 2:], x[0, :, :, :-2], atol=1e-5)
    assert torch.allclose(out[1, :, :-1], x[1, :, 1:], atol=1e-5)

@pytest.mark.parametrize("drag, words", [
    (((-1, 3), (4, 4), 3), r"start \(-1, 3\) lies outside"), (((1, 3), (40, 4), 3), "end .* lies outside"),
    (((1, 3), (4, 4), 0), "radius"),
    (((1, 3), (float("nan"), 4), 3), "outside")])
def test_bad_drags(drag, words):
    with pytest.raises(ValueError, match=words): displaced(spot(8, 8), [drag], 4)

@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_steered_all_the_way_arrives(kind):
    "lambda = 0 in every step leads to the target whatever the network says; lambda = 1 is the network."
    policy = Toy(kind)
    target, noise = torch.rand(1, *policy.latent_shape), torch.randn(1, *policy.latent_shape)
    ts, model = policy.schedule.timesteps(4), policy.denoiser(**told(policy)[0])
    def run(lam):
        return denoise(steered(model, target, lam_at_step(lam, ts), policy.schedule), noise, ts, policy.schedule)
    first, last = policy.schedule.at(int(ts[0])), policy.schedule.final_alpha_bar
    eps = (noise - first ** .5 * target) / (1 - first) ** .5
    assert torch.allclose(run(0.), last ** .5 * target + (1 - last) ** .5 * eps, atol=1e-3)
    assert torch.equal(run(1.), denoise(model, noise, ts, policy.schedule))


# pictures of every kind

def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return Image.open(buffer)

@settings(max_examples=25, deadline=None)
@given(w=st.integers(1, 80), h=st.integers(1, 80), mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"]))
def test_any_picture_becomes_the_policys(w, h, mode):
    x = to_image(Image.new(mode, (w, h)), (24, 32))
    assert x.shape == (1, 3, 24, 32) and x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1

def test_picture_keeps_its_shape_and_turn(tmp_path):
    tall = Image.fromarray(np.repeat(np.linspace(0, 255, 90).astype(np.uint8)[:, None], 30, 1)) # dark top
    x = to_image(tall, (10, 10))[0, 0]
    assert .3 < x[0].mean() < .37 and .63 < x[-1].mean() < .7 # the middle third
    exif = Image.Exif()
    exif[274] = 6 # a quarter turn clockwise
    turned = to_image(saved(tall.convert("RGB"), "JPEG", exif=exif, quality=95), (10, 30))[0, 0]
    assert turned[:, 0].mean() > .9 and turned[:, -1].mean() < .1
    saved(tall.convert("RGB"), "JPEG", exif=exif, quality=95)
    tall.convert("RGB").save(tmp_path/"a.jpg", exif=exif, quality=95)
    assert torch.equal(to_image(tmp_path/"a.jpg", (10, 30)), to_image(str(tmp_path/"a.jpg"), (10, 30)))
    assert to_image(tmp_path/"a.jpg", (10, 30))[0, 0, :, 0].mean() > .9
    assert torch.allclose(to_image(torch.rand(3, 10, 10, generator=torch.Generator().manual_seed(0)), (10, 10)),
                          torch.rand(3, 10, 10, generator=torch.Generator().manual_seed(0)))

def test_bad_pictures(tmp_path):
    (tmp_path/"a.png").write_text("no picture")
    for picture, words in ((tmp_path/"a.png", "does not open"), (tmp_path/"b.png", "there is no picture"),
                           (Image.new("I;16", (4, 4)), "8 bits"),
                           (torch.rand(1, 10, 10), "shape"), (torch.full((3, 10, 10), 255.), "expected"),
                           (torch.full((3, 4, 4), float("nan")), "expected"), ([1], "PIL")):
        with pytest.raises(KitError, match=words) as caught: to_image(picture, (10, 10))
        assert "\n" not in str(caught.value)


# the pipeline

@pytest.fixture(params=["first_frame", "v_prediction"])
def pipeline(request):
    name = request.param
    return (InteractivePipeline(Toy(name)) if name in PREDICTION_TYPES
            else InteractivePipeline(request.getfixturevalue(name)))

def test_policy_without_text(svd):
    pipeline, (before, after) = InteractivePipeline(svd), pictures(svd.size)
    assert (pipeline.video(before, "a red cat runs", after, "left", [((5, 5), (9, 9), 3)], .5, n_ddim=2).shape
            == (1, 5, 3, 16, 16))

def test_instructions_alone_and_together(pipeline):
    h, w = pipeline.size
    before, after = pictures(pipeline.size)
    def go(**k):
        return pipeline.video(before, "a red cat runs", n_ddim=4, **k)
    plain = go()
    assert plain.shape == (1, pipeline.i2v.n_frames, 3, h, w) and plain.min() >= 0 and plain.max() <= 1
    assert torch.equal(go(start="noise"), pipeline.i2v.generate(n_ddim=4, noise=pipeline.i2v.noise([0], 0),
                                                                **pipeline.told("a red cat runs", before)))
    assert torch.equal(go(edited=after, lam=1), plain)
    assert torch.equal(go(edited=after, lam=0), pipeline.video(after, "a red cat runs", n_ddim=4))
    assert torch.equal(go(reading="two_latents"), plain)
    drag, mask = [((w / 3, h / 3), (w / 2, h / 2), 2)], torch.zeros(1, 1, h, w).index_fill(-1, torch.arange(w // 2), 1.)
    seen = [plain, go(seed=1), go(edited=after, lam=.5), go(edited=after, lam=.5, mask=mask), go(drags=drag),
            go(edited=after, lam=.5, drags=drag),
            go(edited=after, lam=[0., 0., 1., 1.]), go(edited=after, lam=.5, reading="two_latents")]
    if hasattr(pipeline.i2v, "text_encoder"): seen.append(go(motion="left"))
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert all(clip.isfinite().all() for clip in seen)

def test_progress_and_stop():
    pipeline, seen = InteractivePipeline(Toy("v_prediction")), []
    image = pictures(pipeline.size)[0]
    assert pipeline.video(image, "a", n_ddim=3, progress=lambda *a: seen.append(a)) is not None
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert pipeline.video(image, "a", n_ddim=5, progress=lambda *a: seen.append(a), stop=lambda: len(seen) >= 5) is None
    assert seen[3:] == [(1, 5), (2, 5)]

def test_hold_keeps_the_painted_place():
    pipeline = InteractivePipeline(Toy("v_prediction"))
    before = pictures(pipeline.size)[0]
    after = before.clone()
    after[..., :2, :2] = 1 - after[..., :2, :2]
    def go(**k):
        return pipeline.video(before, "a", after, n_ddim=5, **k)
    assert torch.equal(go(lam=1., hold=.6), go(lam=1.))
    assert torch.equal(pipeline.video(before, "a", hold=.6, n_ddim=5), pipeline.video(before, "a", n_ddim=5))
    held, free = go(lam=0., hold=1.), go(lam=0.)
    def wrong(clip):
        return (clip[..., :2, :2] - after[:, None, :, :2, :2].clamp(0, 1)).abs().mean()
    assert wrong(held) < .03 and wrong(held) < wrong(free) / 2

def test_following_costs_no_network():
    "While lambda is 0 for the arrow, the network is not asked."
    pipeline = InteractivePipeline(Toy("v_prediction"))
    pipeline.video(pictures(pipeline.size)[0], "a", drags=[((2, 2), (4, 4), 2)], n_ddim=10, follow=.7)
    assert len(pipeline.i2v.calls) == 3

@pytest.mark.parametrize("options, words", [
    (dict(image=torch.rand(1, 3, 5, 6)), "image of shape"), (dict(edited=torch.rand(1, 3, 5, 6)), "image of shape"),
    (dict(mask=torch.ones(1, 1, 5, 6)), "mask of shape"),
    (dict(mask=torch.zeros(1, 1, 6, 6)), "mask is empty"), (dict(lam=1.5), "lam goes"),
    (dict(lam=[.5] * 2), "2 entries"), (dict(reading="twin"), "shared and two"),
    (dict(start="middle"), "noise and picture"),
    (dict(drags=[((1, 1), (9, 1), 2)]), "lies outside the 6x6"),
    (dict(drags=[((1, 1), (5, 1), 2)], follow=2), "share of the steps"), (dict(hold=-1), "share of the steps"),
    (dict(image=255 * torch.rand(1, 3, 6, 6)), "expected float")])
def test_bad_instructions(options, words):
    pipeline = InteractivePipeline(Toy("v_prediction"))
    before, after = pictures(pipeline.size)
    with pytest.raises(ValueError, match=words) as caught:
        pipeline.video(**{"image": before, "prompt": "a", "edited": after, "n_ddim": 3, **options})
    assert "\n" not in str(caught.value)

def test_image_stage(text_policy, first_frame):
    pipeline, image = InteractivePipeline(first_frame, text_policy), pictures(text_policy.size)[0]
    assert torch.equal(pipeline.image(*PROMPT, image, strength=0), image)
    made = [pipeline.image(*PROMPT, n_ddim=4), pipeline.image(*PROMPT, seed=1, n_ddim=4),
            *(pipeline.image(*PROMPT, image, s, n_ddim=4) for s in (.25, .5, 1.))]
    assert all(x.shape == image.shape and 0 <= x.min() and x.max() <= 1 for x in made)
    assert not any(torch.equal(a, b) for i, a in enumerate(made) for b in made[:i])
    assert torch.equal(made[3], img2img(text_policy, *PROMPT, image, .5, n_ddim=4))
    for bad, words in ((dict(strength=1.1), "strength"), (dict(image=torch.rand(1, 3, 4, 4)), "image of shape"),
                       (dict(strength=.1), "at least one step")):
        with pytest.raises(ValueError, match=words):
            pipeline.image(**{"prompt": PROMPT[0], "image": image, "n_ddim": 4, **bad})
    with pytest.raises(ValueError, match="no image stage"): InteractivePipeline(first_frame).image("a")

def test_texts():
    assert [join_texts("a cat"), join_texts("a cat", " "), join_texts("a cat", "runs"),
            join_texts("a cat", "a cat runs"), join_texts("", "runs")] == ["a cat", "a cat", "a cat runs",
                                                                           "a cat runs", "runs"]
