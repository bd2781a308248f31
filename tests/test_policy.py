"The policy room: patch autoencoder, VideoPolicy, LoRA; on random pipelines of ModelScope's classes."
import copy
import json
import shutil
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import tiny_pipeline

from instructvideo_kit.diffusion.sampling import denoise
from instructvideo_kit.files import KitError
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.lora import (
    add_lora,
    disabled_lora,
    load_lora,
    lora_parameters,
    lora_state,
    merge_lora,
    save_lora,
)
from instructvideo_kit.policy.patch_autoencoder import PatchAutoencoder, from_patches, patch_pca, to_patches

PROMPTS = ["a red cat runs", "the blue horse swims left"]
KINDS = {"kl": "epsilon", "patch": "v_prediction"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {vae: tiny_pipeline(tmp_path_factory.mktemp(vae), prediction, vae) for vae, prediction in KINDS.items()}

@pytest.fixture(scope="session")
def opened(folders): return {vae: VideoPolicy.from_pretrained(folder) for vae, folder in folders.items()}

@pytest.fixture(params=KINDS)
def kind(request): return request.param

@pytest.fixture
def folder(folders, kind): return folders[kind]

def copied(policy):
    "A policy with weights of its own (the tokenizer is shared: transformers' do not survive a deepcopy unharmed)."
    weights = [copy.deepcopy(part) for part in (policy.unet, policy.vae, policy.text_encoder)]
    return VideoPolicy(*weights, policy.tokenizer, policy.scheduler, policy.kit)

@pytest.fixture
def policy(opened, kind): return copied(opened[kind])

@pytest.fixture
def patch_policy(opened): return copied(opened["patch"])

def draw(policy, n_ddim=2, **kwargs): return policy.generate(PROMPTS, n_ddim=n_ddim, **kwargs)

def shake(policy, size=.1):
    "Stand-in for training: move the adapters away from their start."
    for i, p in enumerate(lora_parameters(policy)):
        p.data += size * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))

def pipeline_video(folder, policy, latents, lora=None):
    "The same clips by diffusers' own pipeline."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if lora: pipe.load_lora_weights(lora)
    return pipe(PROMPTS, num_inference_steps=2, guidance_scale=policy.guidance_scale, latents=latents,
                num_frames=policy.n_frames, output_type="pt").frames


# ---- patch autoencoder

@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 3), c=st.integers(1, 3), h=st.integers(1, 4), w=st.integers(1, 4),
       patch=st.sampled_from([1, 2, 4]))
def test_patches_are_a_permutation(n, c, h, w, patch):
    x = torch.randn(n, c, h * patch, w * patch)
    assert to_patches(x, patch).shape == (n, h, w, c * patch ** 2)
    assert torch.equal(from_patches(to_patches(x, patch), patch), x)

def smooth_frames(n=48):
    x = torch.nn.functional.interpolate(torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
                                        size=(16, 16), mode="bilinear")
    return x.clamp(0, 1)

def test_fit_error_falls_with_channels_and_is_the_dropped_variance():
    frames, errors = smooth_frames(), []
    for channels in (3, 8, 20, 48):
        vae = PatchAutoencoder.fit(frames, 4, channels)
        errors.append((vae(2 * frames - 1).sample - 2 * frames + 1).pow(2).mean().item())
    dropped = patch_pca(2 * frames - 1, 4, 48)[2].pow(2)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-8
    assert errors[0] == pytest.approx(dropped[3:].sum().item() / 48, rel=1e-3)

def test_fit_gives_unit_latents_and_inverse_matrices():
    frames = smooth_frames()
    vae = PatchAutoencoder.fit(frames, 4, 20)
    z = vae.encode(2 * frames - 1).latent_dist.mode()
    assert z.shape == (48, 20, 4, 4)
    assert z.var(dim=(0, 2, 3), unbiased=False).mean().item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(vae.encoder @ vae.decoder, torch.eye(20), atol=1e-3, rtol=0)
    assert torch.equal(vae.encode(2 * frames - 1).latent_dist.sample(), z)

def test_patch_autoencoder_round_trip(tmp_path):
    vae = PatchAutoencoder.fit(smooth_frames(), 2, 5)
    vae.save_pretrained(tmp_path)
    again = PatchAutoencoder.from_pretrained(tmp_path)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(again(x).sample, vae(x).sample) and len(again.config.block_out_channels) == 2

def test_fit_survives_constant_frames():
    vae = PatchAutoencoder.fit(torch.full((4, 3, 8, 8), .5), 4, 20)
    assert all(p.isfinite().all() for p in vae.parameters())

@pytest.mark.parametrize("kwargs, message", [
    ({"patch": 3}, "power of two"), ({"channels": 49}, "48 numbers"), ({"channels": 0}, "1 ... 48"),
    ({"patch": 32}, "multiples of the patch")])
def test_fit_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message): PatchAutoencoder.fit(smooth_frames(2), **kwargs)


# ---- opening a pipeline directory

def test_same_video_as_diffusers(folder, policy):
    latents = policy.noise(range(2), seed=5)
    assert ((policy.generate(PROMPTS, n_ddim=2, noise=latents) - pipeline_video(folder, policy, latents)).abs().max()
            < 1e-5)

def test_shapes_follow_from_the_parts(policy):
    assert policy.size == (16, 16) and policy.latent_shape == (4, 8, 4, 4) and policy.n_frames == 8
    assert policy.guidance_scale == 3 and policy.max_words == 10 and policy.name == "tiny"

def test_all_frozen_and_no_dropout(policy):
    for part in (policy.unet, policy.vae, policy.text_encoder):
        assert not any(p.requires_grad for p in part.parameters()) and not any(m.training for m in part.modules())

@pytest.mark.parametrize("name", [
    "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"])
def test_missing_file_is_named(folders, tmp_path, name):
    shutil.copytree(folders["patch"], tmp_path / "p")
    (tmp_path / "p" / name).unlink()
    with pytest.raises(KitError, match=f"^{name} is missing in .*: a pipeline directory holds") as error:
        VideoPolicy.from_pretrained(tmp_path / "p")
    assert "\n" not in str(error.value)

def test_missing_tokenizer_is_named(folders, tmp_path):
    shutil.copytree(folders["patch"], tmp_path / "p")
    for file in ("tokenizer.json", "vocab.json"): (tmp_path / "p/tokenizer" / file).unlink(missing_ok=True)
    with pytest.raises(KitError, match="tokenizer/tokenizer.json is missing"):
        VideoPolicy.from_pretrained(tmp_path / "p")

def test_unknown_class_prediction_and_json_are_refused(folders, tmp_path):
    shutil.copytree(folders["patch"], tmp_path / "p")
    index = json.loads((tmp_path / "p/model_index.json").read_text())
    (tmp_path / "p/model_index.json").write_text(json.dumps({**index, "unet": ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(KitError, match="unet is a UNet2DConditionModel.*can drive UNet3DConditionModel"):
        VideoPolicy.from_pretrained(tmp_path / "p")
    (tmp_path / "p/model_index.json").write_text("{")
    with pytest.raises(KitError, match="not valid JSON"): VideoPolicy.from_pretrained(tmp_path / "p")
    (tmp_path / "p/model_index.json").write_text(json.dumps(index))
    DDIMScheduler(prediction_type="score").save_pretrained(tmp_path / "p/scheduler")
    with pytest.raises(KitError, match="prediction type score"): VideoPolicy.from_pretrained(tmp_path / "p")

def test_without_kit_json_the_defaults_are_modelscopes(folders, tmp_path):
    shutil.copytree(folders["patch"], tmp_path / "p")
    (tmp_path / "p/kit.json").unlink()
    policy = VideoPolicy.from_pretrained(tmp_path / "p")
    assert policy.n_frames == 16 and policy.guidance_scale == 9 and policy.name == "p"

def test_save_and_open_again(policy, tmp_path):
    policy.save_pretrained(tmp_path / "copy")
    # no paths of this machine
    assert str(tmp_path.parent) not in "".join(file.read_text() for file in (tmp_path / "copy").rglob("*config.json"))
    assert torch.equal(draw(VideoPolicy.from_pretrained(tmp_path / "copy")), draw(policy))


# ---- encode, decode, embed

def test_only_chosen_frames_are_decoded(policy, monkeypatch):
    z, seen, decode = policy.noise(range(2)), [], policy.vae.decode
    everything = policy.decode(z)
    monkeypatch.setattr(policy.vae, "decode", lambda x: seen.append(len(x)) or decode(x))
    frames = torch.tensor([[0, 3, 7], [5, 5, 1]])
    some = policy.decode(z, frames)
    assert seen == [6] and some.shape == (2, 3, 3, 16, 16)
    for i in range(2): torch.testing.assert_close(some[i], everything[i, frames[i]], atol=1e-5, rtol=1e-5)

def test_encode_undoes_decode_of_the_linear_autoencoder(patch_policy):
    z = patch_policy.noise(range(2)) * .1
    video = patch_policy.decode(z)
    assert 0 < video.min() and video.max() < 1
    torch.testing.assert_close(patch_policy.encode(video), z, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize("video, message", [
    (torch.rand(1, 7, 3, 16, 16), r"\(1, 7, 3, 16, 16\).*\(b, 8, 3, 16, 16\)"),
    (torch.rand(1, 3, 8, 16, 16), "this policy takes"),
    (torch.rand(8, 3, 16, 16), "this policy takes"),
    (torch.rand(1, 8, 3, 16, 16) * 2 - 1, r"expected float in \[0, 1\]"),
    (torch.zeros(1, 8, 3, 16, 16, dtype=torch.uint8), "expected float")])
def test_encode_refuses(patch_policy, video, message):
    with pytest.raises(ValueError, match=message): patch_policy.encode(video)

@pytest.mark.parametrize("frames", [[[0, 8], [0, 1]], [[-1, 0], [0, 1]], [[0, 1]], [0, 1]])
def test_decode_refuses(patch_policy, frames):
    with pytest.raises(ValueError, match="expected"):
        patch_policy.decode(patch_policy.noise(range(2)), torch.tensor(frames))

def test_embeddings_are_cached_and_do_not_depend_on_company(patch_policy, opened, monkeypatch):
    calls, forward = [], patch_policy.text_encoder.forward
    monkeypatch.setattr(patch_policy.text_encoder, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    both = patch_policy.embed(PROMPTS)
    assert torch.equal(patch_policy.embed(PROMPTS[::-1]).flip(0), both) and len(calls) == 2
    monkeypatch.undo()
    assert torch.equal(opened["patch"].embed(PROMPTS[1:])[0], both[1])

def test_cut_caption_warns_once_and_names_the_words(patch_policy):
    long = "the blue horse swims left in the field the sea the night"
    with pytest.warns(UserWarning, match="takes 10 tokens.*loses 'the night'"): patch_policy.embed([long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_policy.embed([long, PROMPTS[0]])

@pytest.mark.parametrize("prompts", ["a cat", [], [1]])
def test_prompts_must_be_a_list_of_strings(patch_policy, prompts):
    for call in (patch_policy.embed, patch_policy.generate):
        with pytest.raises(ValueError, match="expected a list of at least one string"): call(prompts)


# ---- guidance, noise, generation

def test_guidance_in_one_call_or_two(policy, monkeypatch):
    calls, forward, z = [], policy.unet.forward, policy.noise(range(2))
    monkeypatch.setattr(policy.unet, "forward", lambda x, *a, **k: calls.append(len(x)) or forward(x, *a, **k))
    with torch.no_grad():
        one, two = policy.denoiser(PROMPTS, 3.)(z, 501), policy.denoiser(PROMPTS, 3., batched=False)(z, 501)
        plain = policy.denoiser(policy.embed(PROMPTS), 1.)(z, 501)
    assert calls == [4, 2, 2, 2]
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert (one - plain).abs().max() > 1e-4

def test_a_clip_does_not_depend_on_its_batch(patch_policy):
    together, apart = draw(patch_policy, seed=3), draw(patch_policy, seed=3, batch=1)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    assert torch.equal(patch_policy.noise([1], 3)[0], patch_policy.noise(range(2), 3)[1])
    assert not torch.equal(draw(patch_policy, seed=4), together)

def test_generate_refuses_other_count_of_noises(patch_policy):
    with pytest.raises(ValueError, match="noise for 3 clips, but 2 prompts"):
        draw(patch_policy, noise=patch_policy.noise(range(3)))

def test_low_precision_weights_keep_latents_in_float32(policy):
    add_lora(policy.to(torch.bfloat16))
    assert (draw(policy).dtype == policy.noise([0]).dtype == policy.encode(torch.rand(1, 8, 3, 16, 16)).dtype
            == torch.float32)
    assert {p.dtype for p in lora_parameters(policy)} == {torch.float32}


# ---- LoRA

def test_adapters_start_at_the_base_bit_for_bit(policy):
    before = draw(policy)
    parameters = add_lora(policy, rank=4)
    assert torch.equal(draw(policy), before)
    trainable = {n for n, p in policy.unet.named_parameters() if p.requires_grad}
    assert len(trainable) == len(parameters) and all(".lora_" in n for n in trainable)
    assert all(("to_q" in n) or ("to_k" in n) or ("to_v" in n) or ("to_out.0" in n) for n in trainable)
    n_attention = sum(n.endswith(("attn1", "attn2")) for n, _ in policy.unet.named_modules())
    assert len(parameters) == n_attention * 4 * 2
    down = torch.cat([p.flatten() for n, p in policy.unet.named_parameters() if ".lora_A" in n])
    assert down.std().item() == pytest.approx(1 / 4, rel=.1)                    # the released code's N(0, 1/rank)

def test_start_is_seeded_and_leaves_the_global_generator_alone(opened):
    states, after = [], []
    for seed in (0, 0, 1):
        policy = copied(opened["patch"])
        before = torch.get_rng_state()
        add_lora(policy, seed=seed)
        after.append(torch.equal(torch.get_rng_state(), before))
        states.append(lora_state(policy))
    def same(a, b):
        return all(torch.equal(a[k], b[k]) for k in a)
    assert same(states[0], states[1]) and not same(states[0], states[2]) and all(after)

@pytest.mark.parametrize("grad_steps, w, batched",
                         [(0, 3., True), (1, 1., True), (1, 3., True), (1, 3., False), (3, 1., True), (3, 3., True)])
def test_gradient_reaches_lora_and_only_lora(patch_policy, grad_steps, w, batched):
    parameters = add_lora(patch_policy)
    z_0 = denoise(patch_policy.denoiser(PROMPTS, w, batched), patch_policy.noise(range(2)), torch.tensor([501, 251, 1]),
                  patch_policy.schedule, grad_steps)
    loss = patch_policy.decode(z_0, torch.tensor([[1, 4], [0, 7]])).square().sum()
    assert loss.requires_grad == (grad_steps > 0)
    if not grad_steps: return
    loss.backward()
    assert all(p.grad is not None for p in parameters) and sum(p.grad.abs().sum() for p in parameters) > 0
    others = [p for part in (patch_policy.unet, patch_policy.vae, patch_policy.text_encoder)
              for p in part.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in others)

def test_disabled_lora_is_the_base_and_is_undone(policy):
    before = draw(policy)
    with disabled_lora(policy): assert torch.equal(draw(policy), before)        # no adapter: nothing to do
    add_lora(policy)
    shake(policy)
    adapted, trained = draw(policy), [id(p) for p in lora_parameters(policy)]
    assert (adapted - before).abs().max() > 1e-3
    with pytest.raises(RuntimeError), disabled_lora(policy):
        assert torch.equal(draw(policy), before)
        raise RuntimeError
    assert torch.equal(draw(policy), adapted) and [id(p) for p in lora_parameters(policy)] == trained

@pytest.mark.parametrize("kind, alpha", [("kl", 8), ("patch", None)])
def test_saved_lora_gives_the_same_video_here_and_in_diffusers(folder, policy, tmp_path, alpha):
    again = copied(policy)
    add_lora(policy, rank=2, alpha=alpha)
    shake(policy)
    latents = policy.noise(range(2))
    adapted = policy.generate(PROMPTS, n_ddim=2, noise=latents)
    file = save_lora(policy, tmp_path)
    assert file.name == "pytorch_lora_weights.safetensors" and all(k.startswith("unet.") for k in load_file(file))
    assert len(load_lora(again, tmp_path)) == len(lora_parameters(policy))
    assert torch.equal(again.generate(PROMPTS, n_ddim=2, noise=latents), adapted)
    assert (pipeline_video(folder, policy, latents, tmp_path) - adapted).abs().max() < 1e-5

def test_merged_lora_gives_the_same_video(policy, tmp_path):
    add_lora(policy)
    shake(policy)
    adapted = draw(policy)
    with pytest.raises(ValueError, match="merge_lora"): policy.save_pretrained(tmp_path)
    merge_lora(policy)
    assert (draw(policy) - adapted).abs().max() < 1e-5
    assert not lora_parameters(policy) and not any("lora" in n for n, _ in policy.unet.named_parameters())
    policy.save_pretrained(tmp_path / "merged")
    assert torch.equal(draw(VideoPolicy.from_pretrained(tmp_path / "merged")), draw(policy))

def test_lora_refuses(patch_policy, tmp_path):
    with pytest.raises(KitError, match="pytorch_lora_weights.safetensors is missing"): load_lora(patch_policy, tmp_path)
    with pytest.raises(ValueError, match="rank=0"): add_lora(patch_policy, rank=0)
    with pytest.raises(ValueError, match="no adapter 'learner'"): lora_state(patch_policy)
    with pytest.raises(ValueError, match="no layer is named to_nowhere"):
        add_lora(patch_policy, targets=("to_nowhere",))
    add_lora(patch_policy, rank=2)
    with pytest.raises(ValueError, match="is there already"): add_lora(patch_policy, rank=2)
    save_lora(patch_policy, tmp_path)
    add_lora(patch_policy, rank=3, adapter="other")
    with pytest.raises(KitError, match="do not match"): load_lora(patch_policy, tmp_path, "other")
