"""One door for ModelScopeT2V, CogVideoX, Wan 2.1 and Stable Video Diffusion: the six calls, LoRA, diffusers' own
pipelines, full sizes."""
import copy
import importlib.util
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_policies import COGVIDEOX_SCHEDULER, FIRST_ORDER, SVD_SCHEDULER, WAN_SCHEDULER, tiny_policy

from instructvideo_kit.diffusion.prediction import (
    PREDICTION_TYPES,
    euler_step,
    from_rectified,
    rectified_alpha_bar,
    rectified_sigma,
    to_rectified,
)
from instructvideo_kit.diffusion.sampling import ddim_step, denoise, from_x0, to_x0_eps
from instructvideo_kit.diffusion.schedule import Schedule, corrupt
from instructvideo_kit.diffusion.truncation import step_sensitivity
from instructvideo_kit.files import KitError
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.base import kinds
from instructvideo_kit.policy.lora import (
    LORA_FILE,
    TARGETS,
    add_lora,
    disabled_lora,
    load_lora,
    lora_parameters,
    merge_lora,
    save_lora,
)
from instructvideo_kit.tuning.instructvideo import InstructVideoConfig, edit

PROMPTS = ["a red cat runs", "the blue horse swims left"]
KINDS = ["modelscope", "cogvideox", "wan", "svd"]
LATENTS = {"modelscope": (4, 8, 4, 4), "cogvideox": (4, 5, 4, 4), "wan": (4, 3, 4, 4), "svd": (4, 5, 8, 8)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny_policy(tmp_path_factory.mktemp(kind), kind)
            for kind in [*KINDS, "cogvideox-rotary", "wan-euler"]}

@pytest.fixture(scope="module")
def opened(folders): return {kind: VideoPolicy.from_pretrained(folder) for kind, folder in folders.items()}

@pytest.fixture(params=KINDS)
def kind(request): return request.param

def copied(policy):
    "The same parts with a network of its own."
    network, *others = [getattr(policy, part) for part in policy.PARTS]
    return type(policy)(copy.deepcopy(network), *others, policy.kit)

@pytest.fixture
def policy(opened, kind): return copied(opened[kind])

def pictures(policy):
    "Two pictures with eight bits, as files have."
    return (torch.rand(2, 3, *policy.size, generator=torch.Generator().manual_seed(3)) * 255).round() / 255

def told(policy, n=2):
    "What the policy wants to be told: prompts, or pictures."
    return {"image": pictures(policy)[:n]} if hasattr(policy, "image_encoder") else {"prompts": PROMPTS[:n]}

def draw(policy, n_ddim=2, **kwargs): return policy.generate(n_ddim=n_ddim, **told(policy), **kwargs)

def shake(policy, size=.1):
    "Stand-in for training: move the adapters away from their start."
    for i, p in enumerate(lora_parameters(policy)):
        p.data += size * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))

def pipeline(folder):
    "Diffusers' own pipeline from the same directory, with first-order steps."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = DiffusionPipeline.from_pretrained(folder)
    if isinstance(pipe.scheduler, UniPCMultistepScheduler):
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, **FIRST_ORDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def pipeline_video(pipe, policy, noise, n_ddim, w):
    "(b, f, 3, h, w) by diffusers from the same start, the noise brought into each pipeline's own layout and scale."
    h, w_pixels = policy.size
    common = dict(num_inference_steps=n_ddim, num_frames=policy.n_frames, output_type="pt")
    if policy.PIPELINE == "TextToVideoSDPipeline":
        return pipe(PROMPTS, guidance_scale=w, latents=noise, **common).frames
    common |= dict(height=h, width=w_pixels)
    if policy.PIPELINE == "CogVideoXPipeline":
        return pipe(PROMPTS, guidance_scale=w, latents=noise.transpose(1, 2), max_sequence_length=12, **common).frames
    if policy.PIPELINE == "WanPipeline":
        start = to_rectified(noise, policy.schedule.at(policy.schedule.timesteps(n_ddim)[0]))
        return pipe(PROMPTS, guidance_scale=w, latents=start, max_sequence_length=12, **common).frames
    images = [Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
              for picture in pictures(policy)]
    def one(image, x):
        return pipe(image, max_guidance_scale=w, latents=x[None].transpose(1, 2),
                    generator=torch.Generator().manual_seed(0), **common).frames
    return torch.cat([one(image, x) for image, x in zip(images, noise)])


# ---- prediction types

@settings(max_examples=30, deadline=None)
@given(st.floats(.01, .99), st.sampled_from(PREDICTION_TYPES), st.integers(0, 99))
def test_every_prediction_stands_for_the_same_pair(alpha_bar_t, kind, seed):
    x0, eps = torch.randn(2, 1, 3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z_t = corrupt(x0, eps, alpha_bar_t)
    got = to_x0_eps(from_x0(x0, z_t, alpha_bar_t, kind), z_t, alpha_bar_t, kind)
    torch.testing.assert_close(got, (x0, eps), atol=1e-9, rtol=0)

@settings(max_examples=30, deadline=None)
@given(st.floats(.02, 1.), st.floats(0., .98), st.integers(0, 99))
def test_ddim_step_is_the_euler_step(sigma, share, seed):
    sigma_prev, levels = sigma * share, None
    z, u = torch.randn(2, 1, 3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    levels = Schedule(torch.tensor([rectified_alpha_bar(sigma_prev), rectified_alpha_bar(sigma)], dtype=torch.float64),
                      "flow_prediction")
    # 1e-7: the square root of 1 - alpha_bar near alpha_bar = 1, in float64
    euler = euler_step(z, u, sigma, sigma_prev)
    torch.testing.assert_close(to_rectified(ddim_step(from_rectified(z, sigma), u, 1, 0, levels), levels.at(0)), euler,
                               atol=1e-7, rtol=0)

def test_sensitivity_of_a_flow_step_is_that_of_autograd():
    schedule = Schedule.rectified(3.0)
    steps = schedule.timesteps(5)
    for (t, t_prev), closed in zip(zip(steps.tolist(), [*steps[1:].tolist(), -1]), step_sensitivity(steps, schedule)):
        z, u = torch.randn(2, 3, dtype=torch.float64)
        def step(p, z=z, t=t, t_prev=t_prev): return ddim_step(z, p, t, t_prev, schedule)
        jacobian = torch.autograd.functional.jacobian(step, u)
        torch.testing.assert_close(jacobian, closed * torch.eye(3, dtype=torch.float64))


# ---- the same steps as diffusers' schedulers

class Net:
    "Stand-in for a network: mixes its input and its time."
    def __call__(self, z, t): return .7 * z + .1 * torch.sin(3 * z) + .05 * float(t) / 1000

def scheduler_chain(scheduler, start):
    z = start
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
        z = scheduler.step(Net()(seen, t), t, z).prev_sample
    return z

def our_chain(schedule, start, n_ddim, on_line=False):
    def model(z, t): return Net()(to_rectified(z, schedule.at(t)) if on_line else z, schedule.time(t))
    return denoise(model, start, schedule.timesteps(n_ddim), schedule)

NOISE = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize("n_ddim", [4, 20, 50])
def test_chain_is_diffusers_cogvideox(n_ddim):
    theirs = CogVideoXDDIMScheduler(**COGVIDEOX_SCHEDULER)
    theirs.set_timesteps(n_ddim)
    schedule = Schedule.from_scheduler(theirs)
    assert schedule.timesteps(n_ddim).tolist() == theirs.timesteps.tolist() and schedule.at(999) == 0
    assert (our_chain(schedule, NOISE, n_ddim) - scheduler_chain(theirs, NOISE)).abs().max() < 1e-5

@pytest.mark.parametrize("n_ddim", [4, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_chain_is_diffusers_flow_euler(n_ddim, shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=[i / n_ddim for i in range(n_ddim, 0, -1)])
    schedule = Schedule.from_scheduler(theirs)
    assert [schedule.time(t) for t in schedule.timesteps(n_ddim)] == pytest.approx(theirs.timesteps.tolist(), rel=1e-5)
    assert (our_chain(schedule, NOISE, n_ddim, on_line=True) - scheduler_chain(theirs, NOISE)).abs().max() < 1e-5

@pytest.mark.parametrize("n_ddim", [4, 20, 50])
def test_chain_is_diffusers_unipc_of_first_order(n_ddim):
    theirs = UniPCMultistepScheduler(**WAN_SCHEDULER, **FIRST_ORDER)
    theirs.set_timesteps(n_ddim)
    schedule = Schedule.from_scheduler(theirs)
    assert [schedule.time(t) for t in schedule.timesteps(n_ddim)] == theirs.timesteps.tolist()
    assert (our_chain(schedule, NOISE, n_ddim, on_line=True) - scheduler_chain(theirs, NOISE)).abs().max() < 1e-4

@pytest.mark.parametrize("n_ddim", [2, 4, 10, 28])
def test_chain_is_diffusers_edm(n_ddim):
    theirs = EulerDiscreteScheduler(**SVD_SCHEDULER)
    theirs.set_timesteps(n_ddim)
    schedule = Schedule.from_scheduler(theirs)
    assert [schedule.time(t) for t in schedule.timesteps(n_ddim)] == pytest.approx(theirs.timesteps.tolist(), abs=1e-4)
    got, expected = our_chain(schedule, NOISE, n_ddim), scheduler_chain(theirs, NOISE * theirs.init_noise_sigma)
    assert (got - expected).abs().max() < 5e-4 * expected.abs().max()

def test_tau_takes_the_tail_of_every_grid():
    for schedule in (Schedule.rectified(3.0), Schedule.karras(), Schedule.modelscope()):
        assert torch.equal(schedule.timesteps(20, .6), schedule.timesteps(20)[-12:])
    assert Schedule.rectified().time(999) == 1000 and rectified_sigma(Schedule.rectified().at(999)) == 1

def test_schedulers_that_cannot_be_followed_are_refused():
    with pytest.raises(ValueError, match="known are"): Schedule.from_scheduler(DDIMScheduler(prediction_type="score"))
    flow = UniPCMultistepScheduler(prediction_type="flow_prediction")
    ends_in_noise = CogVideoXDDIMScheduler(**COGVIDEOX_SCHEDULER | {"prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="without use_flow_sigmas"): Schedule.from_scheduler(flow)
    with pytest.raises(ValueError, match="alpha_bar reaches 0"): Schedule.from_scheduler(ends_in_noise)
    with pytest.warns(UserWarning, match="use_dynamic_shifting"):
        Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


# ---- the six calls

def test_the_door_knows_the_kind(opened):
    assert [type(opened[k]).__name__ for k in KINDS] == ["VideoPolicy", "CogVideoXPolicy", "WanPolicy",
                                                         "StableVideoDiffusionPolicy"]
    assert {k: opened[k].latent_shape for k in KINDS} == LATENTS
    assert len(kinds(VideoPolicy)) == 5 # and FirstFramePolicy, in test_first_frame.py

@pytest.mark.parametrize("name", [*KINDS, "cogvideox-rotary"])
@pytest.mark.parametrize("w", [1.0, 3.0])
def test_same_video_as_diffusers(folders, opened, name, w):
    policy, noise = opened[name], opened[name].noise(range(2), seed=5)
    theirs = pipeline_video(pipeline(folders[name]), policy, noise, 4, w)
    difference = (policy.generate(n_ddim=4, noise=noise, guidance_scale=w, **told(policy)) - theirs).abs().max()
    print(f'{name}, w = {w:g}: largest difference of a pixel from diffusers {difference:.1e}')
    assert difference < 1e-4
    assert theirs.std() > .01

def test_frozen_evaluating_and_in_float32(policy):
    for module in policy.modules():
        assert not any(p.requires_grad for p in module.parameters()) and not any(m.training for m in module.modules())
    assert len(policy.modules()) == 3 and policy.dtype == torch.float32 and policy.unet is policy.network

def test_encode_and_decode(policy):
    video = torch.rand(2, policy.n_frames, 3, *policy.size)
    z = policy.encode(video)
    assert z.shape == (2, *policy.latent_shape) and policy.decode(z).shape == video.shape
    torch.testing.assert_close(policy.unscaled(policy.scaled(z)), z)
    with pytest.raises(ValueError, match="this policy takes"): policy.encode(video[:, 1:])

def test_chosen_frames_are_those_of_the_full_decode(policy, monkeypatch):
    z, last = policy.noise(range(2)), policy.n_frames - 1
    everything = policy.decode(z)
    for frames in ([[0, 1], [1, 0]], [[0, last], [last, 1]], [[last // 2, 2], [3, 3]]):
        some = policy.decode(z, torch.tensor(frames))
        for i in range(2): torch.testing.assert_close(some[i], everything[i, frames[i]], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=f"expected 0 ... {last}"):
        policy.decode(z, torch.tensor([[0, last + 1], [0, 1]]))

@pytest.mark.parametrize("name, lengths",
                         [("cogvideox", {0: 3, 8: 3, 9: 5, 16: 5}), ("wan", {0: 1, 1: 2, 4: 2, 5: 3, 8: 3})])
def test_only_the_prefix_is_decoded(opened, name, lengths, monkeypatch):
    policy, seen = opened[name], []
    decode, z = policy.vae.decode, opened[name].noise([0])
    monkeypatch.setattr(policy.vae, "decode", lambda x: seen.append(x.shape[2]) or decode(x))
    for frame in lengths: policy.decode(z, torch.tensor([[frame]]))
    assert seen == list(lengths.values())

@pytest.mark.parametrize("n_frames", [1, 9, 17, 25])
def test_cogvideox_frames_round_trip(opened, n_frames):
    policy = type(opened["cogvideox"])(*[getattr(opened["cogvideox"], part) for part in opened["cogvideox"].PARTS],
                                       {"n_frames": n_frames})
    video = torch.rand(1, n_frames, 3, 16, 16)
    z = policy.encode(video)
    whole = policy.decode(z)
    assert whole.shape == video.shape
    for g in range(0, n_frames, 3):
        torch.testing.assert_close(policy.decode(z, torch.tensor([[g]]))[:, 0], whole[:, g], atol=1e-5, rtol=1e-5)

def test_embeddings(opened):
    for name in ("cogvideox", "wan"):
        policy = opened[name]
        assert policy.max_tokens == 12 and policy.max_words == 11
        text = policy.embed(PROMPTS)
        assert text.shape == (2, 12, 16) and torch.equal(policy.embed(PROMPTS[1:])[0], text[1])
        with pytest.warns(UserWarning, match="loses 'night'"):
            policy.embed(["the red cat runs left in the blue sea on the night"])
    # Wan: zero behind four words and the end
    assert not policy.embed(PROMPTS)[0, 5:].any() and policy.embed(PROMPTS)[0, :5].any()

@pytest.mark.parametrize("grad_steps, w, batched",
                         [(0, 3., True), (1, 1., True), (1, 3., True), (1, 3., False), (3, 1., True), (3, 3., False)])
def test_gradient_reaches_lora_and_only_lora(policy, grad_steps, w, batched):
    parameters, steps = add_lora(policy, rank=2), policy.schedule.timesteps(3, tau=1.)
    z_0 = denoise(policy.denoiser(guidance_scale=w, batched=batched, **told(policy)), policy.noise(range(2)), steps,
                  policy.schedule, grad_steps)
    loss = policy.decode(z_0, torch.tensor([[1], [0]])).square().sum()
    assert loss.requires_grad == (grad_steps > 0) and loss.isfinite()
    if not grad_steps: return
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    assert sum(p.grad.abs().sum() for p in parameters) > 0
    assert all(p.grad is None for module in policy.modules() for p in module.parameters() if not p.requires_grad)

def test_guidance_in_one_call_or_two(policy):
    z, t = policy.noise(range(2)), int(policy.schedule.timesteps(4)[1])
    with torch.no_grad():
        one, two, plain = (policy.denoiser(guidance_scale=w, batched=b, **told(policy))(z, t)
                           for w, b in ((3., True), (3., False), (1., True)))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert one.shape == z.shape and (one - plain).abs().max() > 1e-5

def test_a_clip_does_not_depend_on_its_batch(policy):
    torch.testing.assert_close(draw(policy, seed=3), draw(policy, seed=3, batch=1), atol=1e-4, rtol=0)

def test_low_precision_weights_keep_latents_in_float32(opened, kind):
    parts = [getattr(opened[kind], part) for part in opened[kind].PARTS]
    parts = [copy.deepcopy(part) if isinstance(part, torch.nn.Module) else part for part in parts]
    policy = type(opened[kind])(*parts, opened[kind].kit)
    add_lora(policy.to(torch.bfloat16))
    assert draw(policy).dtype == policy.encode(torch.rand(1, policy.n_frames, 3, *policy.size)).dtype == torch.float32

def test_an_edit_of_a_clip_begins_and_ends_where_it_should(policy):
    "tau of a chain, corrupt and denoise: a network that knows the clip brings it back."
    z = policy.encode(torch.rand(2, policy.n_frames, 3, *policy.size))
    eps = policy.noise(range(2))
    schedule = policy.schedule
    steps = schedule.timesteps(10, .6)
    z_t = corrupt(z, eps, schedule.at(steps[0]))
    z_0 = denoise(lambda x, t: from_x0(z, x, schedule.at(t), schedule.prediction_type), z_t, steps, schedule)
    torch.testing.assert_close(z_0, corrupt(z, eps, schedule.final_alpha_bar), atol=2e-3, rtol=1e-3)
    assert len(steps) == 6 and 0 < schedule.at(steps[0]) < 1


@pytest.mark.parametrize("name", ["modelscope", "cogvideox", "wan"])
def test_instructvideo_edits_on_the_model_s_own_grid(opened, name):
    policy, config = copied(opened[name]), InstructVideoConfig(n_ddim=5, tau=.6, grad_steps=1, merge_lora=False)
    add_lora(policy, rank=2)
    z = policy.encode(torch.rand(2, policy.n_frames, 3, *policy.size))
    eps = policy.noise(range(2))
    schedule = policy.schedule
    steps = schedule.timesteps(5, .6)
    with torch.no_grad():
        by_hand = denoise(policy.denoiser(PROMPTS, config.guidance_scale), corrupt(z, eps, schedule.at(steps[0])),
                          steps, schedule)
    edited = edit(policy, z, eps, PROMPTS, config)
    assert edited.requires_grad and torch.allclose(edited, by_hand, atol=1e-5)


# ---- LoRA and directories

def test_save_and_open_again(policy, tmp_path):
    policy.save_pretrained(tmp_path / "copy")
    again = VideoPolicy.from_pretrained(tmp_path / "copy")
    assert type(again) is type(policy) and torch.equal(draw(again), draw(policy))
    pipe = pipeline(tmp_path / "copy")
    assert type(pipe).__name__ == policy.PIPELINE and again.size == policy.size

def load_into(pipe, folder, policy):
    "load_lora_weights where the pipeline has it; Stable Video Diffusion's has not, its UNet loads the same file."
    if hasattr(pipe, "load_lora_weights"): pipe.load_lora_weights(folder)
    else: getattr(pipe, policy.part).load_lora_adapter(str(folder), prefix=policy.part, weight_name=LORA_FILE)

def test_lora_gives_the_same_video_here_in_diffusers_and_merged(folders, kind, policy, tmp_path):
    again, noise, base = copied(policy), policy.noise(range(2)), draw(policy)
    parameters = add_lora(policy, rank=2, alpha=4)
    attentions = sum(name.endswith(("attn1", "attn2")) for name, _ in policy.network.named_modules())
    assert len(parameters) == attentions * len(TARGETS) * 2 > 0 and torch.equal(draw(policy), base)
    shake(policy)
    adapted = draw(policy, n_ddim=4, noise=noise)
    assert (adapted - policy_base(policy, noise)).abs().max() > 1e-4
    save_lora(policy, tmp_path)
    load_lora(again, tmp_path)
    assert torch.equal(draw(again, n_ddim=4, noise=noise), adapted)
    pipe = pipeline(folders[kind])
    load_into(pipe, tmp_path, policy)
    loaded = (pipeline_video(pipe, policy, noise, 4, policy.guidance_scale) - adapted).abs().max()
    merge_lora(policy)
    merged = (draw(policy, n_ddim=4, noise=noise) - adapted).abs().max()
    print(f'{kind}: largest difference of a pixel, LoRA in diffusers {loaded:.1e}, merged {merged:.1e}')
    assert loaded < 1e-4 and merged < 1e-4 and not lora_parameters(policy)

def policy_base(policy, noise):
    with disabled_lora(policy): return draw(policy, n_ddim=4, noise=noise)

def test_lora_of_another_network_is_refused(opened, tmp_path):
    wan, modelscope = copied(opened["wan"]), copied(opened["modelscope"])
    add_lora(wan, rank=2)
    save_lora(wan, tmp_path)
    with pytest.raises(KitError, match="belongs to another model"): load_lora(modelscope, tmp_path)


# ---- bad input

def broken(folders, kind, tmp_path):
    return shutil.copytree(folders[kind], tmp_path / "p")

@pytest.mark.parametrize("kind, name", [
    ("cogvideox", "transformer/config.json"), ("cogvideox", "transformer/diffusion_pytorch_model.safetensors"),
    ("cogvideox", "tokenizer/tokenizer.json"),
    ("wan", "vae/config.json"), ("wan", "text_encoder/model.safetensors"), ("wan", "scheduler/scheduler_config.json"),
    ("svd", "image_encoder/config.json"),
    ("svd", "feature_extractor/preprocessor_config.json"), ("svd", "model_index.json")])
def test_missing_file_is_named(folders, tmp_path, kind, name):
    folder = broken(folders, kind, tmp_path)
    (folder / name).unlink()
    with pytest.raises(KitError, match=f"^{name} is missing in") as error: VideoPolicy.from_pretrained(folder)
    assert "\n" not in str(error.value)

def edit_json(path, **changes): path.write_text(json.dumps(json.loads(path.read_text()) | changes))

def refused(folder, match, **kwargs):
    with pytest.raises(KitError, match=match) as error: VideoPolicy.from_pretrained(folder, **kwargs)
    assert "\n" not in str(error.value)

def test_unknown_directories_are_refused(folders, tmp_path):
    folder = broken(folders, "wan", tmp_path)
    edit_json(folder / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    refused(folder, "the vae is a AutoencoderKL by model_index.json: WanPolicy can drive AutoencoderKLWan")
    edit_json(folder / "model_index.json", transformer=["diffusers", "FluxTransformer2DModel"])
    refused(folder,
            "the transformer is a FluxTransformer2DModel by model_index.json: the kit can drive UNet3DConditionModel, "
            "CogVideoX")
    (folder / "model_index.json").write_text('{"_class_name": "X"}')
    refused(folder, "neither a unet nor a transformer is named")

@pytest.mark.parametrize("kind, prediction, expected", [
    ("modelscope", "score", "epsilon or v_prediction or sample"),
    ("cogvideox", "score", "epsilon or v_prediction or sample"),
    ("wan", "epsilon", "flow_prediction"), ("wan", "sample", "flow_prediction"),
    ("svd", "epsilon", "v_prediction")])
def test_prediction_type_is_refused(folders, tmp_path, kind, prediction, expected):
    folder = broken(folders, kind, tmp_path)
    edit_json(folder / "scheduler/scheduler_config.json", prediction_type=prediction)
    refused(folder, f"prediction type {prediction} in scheduler_config.json is not supported: expected {expected}$")

@pytest.mark.parametrize("kind, kwargs, match", [
    ("cogvideox", {"n_frames": 13}, r"n_frames is 13: .* takes 1, 9, 17, ... \(8 k \+ 1\) frames, so give 9 or 17"),
    ("wan", {"n_frames": 16}, r"takes 1, 5, 9, ... \(4 k \+ 1\) frames, so give 13 or 17"),
    ("svd", {"n_frames": 0}, "takes 1 or more frames"),
    ("wan", {"size": (40, 32)}, "size is 40x32: height and width must be multiples of 16, so give 32 or 48 by 32"),
    ("cogvideox", {"size": (16, 4)}, "multiples of 8, so give 16 by 8"),
    ("modelscope", {"size": (18, 16)}, "multiples of 4, so give 16 or 20 by 16"),
    ("svd", {"size": (16, 15)}, "multiples of 2")])
def test_shapes_that_cannot_be_are_refused(folders, kind, kwargs, match): refused(folders[kind], match, **kwargs)

def test_other_frames_and_sizes_can_be_asked_for(folders):
    policy = VideoPolicy.from_pretrained(folders["wan"], n_frames=5, size=(48, 32))
    assert policy.latent_shape == (4, 2, 6, 4) and draw(policy).shape == (2, 5, 3, 48, 32)

SMALL_COGVIDEOX = dict(
    num_attention_heads=1, attention_head_dim=16, out_channels=4, text_embed_dim=16, num_layers=1, sample_width=4,
    sample_height=4, sample_frames=17)

def test_a_spiece_model_alone_says_what_to_install(folders, tmp_path):
    if importlib.util.find_spec("sentencepiece"): pytest.skip("sentencepiece is here, so the file opens")
    folder = broken(folders, "cogvideox", tmp_path)
    (folder / "tokenizer/tokenizer.json").rename(folder / "tokenizer/spiece.model")
    refused(folder, "spiece.model and no tokenizer.json: to read it, pip install sentencepiece")

def test_variants_are_refused(folders, tmp_path):
    folder = broken(folders, "cogvideox", tmp_path)
    CogVideoXTransformer3DModel(**SMALL_COGVIDEOX, in_channels=4,
                                patch_size_t=1).save_pretrained(folder / "transformer")
    refused(folder, "patch_size_t 1 as in CogVideoX 1.5")
    CogVideoXTransformer3DModel(**SMALL_COGVIDEOX, in_channels=8).save_pretrained(folder / "transformer")
    refused(folder, "takes 8 channels for latents of 4")

def test_image_or_text_but_not_the_other(opened):
    with pytest.raises(ValueError, match="draws from pictures"): opened["svd"].generate(PROMPTS)
    with pytest.raises(ValueError, match="this policy takes"): opened["svd"].denoiser(image=torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"expected float in \[0, 1\]"):
        opened["svd"].denoiser(image=3 * pictures(opened["svd"]))
    with pytest.raises(ValueError, match="draws from text alone"):
        opened["wan"].denoiser(PROMPTS, image=torch.rand(2, 3, 32, 32))


# ---- the full sizes, on paper

FULL = { # network, its published config, weights, adapters' matrices, some keys and shapes
    "ModelScopeT2V": (UNet3DConditionModel, dict(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=1024, attention_head_dim=64),
        1_411_233_860, 264, {"conv_in.weight": (320, 4, 3, 3), "transformer_in.proj_in.weight": (512, 320),
                             "up_blocks.2.temp_attentions.2.transformer_blocks.0.attn1.to_q.weight": (640, 640),
                             "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (1280, 1024)}),
    "CogVideoX-2B": (CogVideoXTransformer3DModel, dict(
        num_attention_heads=30, attention_head_dim=64, in_channels=16, out_channels=16, time_embed_dim=512,
        text_embed_dim=4096, num_layers=30, sample_width=90,
        sample_height=60, sample_frames=49, patch_size=2, max_text_seq_length=226,
        use_rotary_positional_embeddings=False),
        1_693_783_872, 120, {"patch_embed.proj.weight": (1920, 16, 2, 2), "patch_embed.text_proj.weight": (1920, 4096),
                             "transformer_blocks.29.attn1.to_out.0.weight": (1920, 1920),
                             "proj_out.weight": (64, 1920)}),
    "Wan 2.1 T2V 1.3B": (WanTransformer3DModel, dict(
        num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096, freq_dim=256,
        ffn_dim=8960, num_layers=30, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", patch_size=(1, 2, 2)),
        1_418_996_800, 240, {"patch_embedding.weight": (1536, 16, 1, 2, 2),
                             "condition_embedder.text_embedder.linear_1.weight": (1536, 4096),
                             "blocks.29.attn2.to_k.weight": (1536, 1536),
                             "blocks.0.ffn.net.0.proj.weight": (8960, 1536), "proj_out.weight": (64, 1536)}),
    "Stable Video Diffusion": (UNetSpatioTemporalConditionModel, dict(
        sample_size=96, in_channels=8, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
        num_attention_heads=(5, 10, 20, 20), num_frames=25,
        cross_attention_dim=1024, addition_time_embed_dim=256, projection_class_embeddings_input_dim=768),
        1_524_623_082, 256, {"conv_in.weight": (320, 8, 3, 3), "add_embedding.linear_1.weight": (1280, 768),
                             "mid_block.attentions.0.temporal_transformer_blocks.0.attn1.to_q.weight": (1280, 1280),
                             "conv_out.weight": (4, 320, 3, 3)}),
}
PUBLISHED = { # billions, and the share by which the network alone may differ
    "ModelScopeT2V": (1.7, .2), "CogVideoX-2B": (2., .2), "Wan 2.1 T2V 1.3B": (1.3, .1),
    "Stable Video Diffusion": (1.521, .003)}

@pytest.mark.parametrize("name", FULL)
def test_full_size_has_the_published_keys_shapes_and_weights(name):
    cls, config, n_weights, n_adapters, shapes = FULL[name]
    with torch.device("meta"): network = cls(**config)
    state = network.state_dict()
    assert {k: tuple(state[k].shape) for k in shapes} == shapes
    assert sum(p.numel() for p in network.parameters()) == n_weights
    # ModelScope counts its text encoder (0.3) and autoencoder too; 2B is a rounded name
    published, share = PUBLISHED[name]
    assert abs(n_weights / 1e9 / published - 1) < share
    with torch.device("meta"): parameters = add_lora(type("Holder", (), {"network": network}), rank=4)
    assert len(parameters) == 2 * n_adapters

def test_full_size_clips_have_the_published_latents():
    with torch.device("meta"): wan = AutoencoderKLWan()
    assert (wan.config.scale_factor_temporal, 1 + (81 - 1) // 4, 480 // 8, 832 // 8) == (4, 21, 60, 104)
    with torch.device("meta"): vae = AutoencoderKLCogVideoX()
    assert vae.config.temporal_compression_ratio * vae.num_latent_frames_batch_size == 8
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 8
    assert len(vae.config.block_out_channels) == 4 and (49 - 1) % 8 == 0 and 1 + (49 - 1) // 4 == 13
