"What leaves the kit: directories and LoRAs in processes that never heard of it; and LoRAs of other programs."
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_policies import tiny_policy

from instructvideo_kit.files import KitError
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.lora import (
    LORA_FILE,
    PEFT_FILE,
    add_lora,
    load_lora,
    lora_parameters,
    merge_lora,
    save_lora,
)

PROMPTS = ["a red cat runs", "the blue horse swims left"]
FRESH = '''
import json, sys, warnings
warnings.filterwarnings("ignore")
if sys.argv[3] == "kit": import instructvideo_kit.policy
else: sys.modules["instructvideo_kit"] = None # whoever imports it now gets an ImportError
import torch
from diffusers import DiffusionPipeline
prompts, results = json.loads(sys.argv[4]), []
for job in json.load(open(sys.argv[1])):
    pipe = DiffusionPipeline.from_pretrained(job["folder"])
    pipe.set_progress_bar_config(disable=True)
    start = torch.load(job["noise"], weights_only=True)
    draw = lambda: pipe(prompts, num_inference_steps=2, latents=start, output_type="pt", **job["options"]).frames
    seen = {"base": draw()}
    if job.get("lora"):
        try:
            pipe.load_lora_weights(job["lora"])
            seen["adapted"] = draw()
            pipe.unload_lora_weights()
            seen["unloaded"] = draw()
        except Exception as error: seen["error"] = f"{type(error).__name__}: {error}"
    results.append(seen)
torch.save(results, sys.argv[2])
'''


def policy_of(folder, kind="modelscope"): return VideoPolicy.from_pretrained(tiny_policy(folder, kind))

def draw(policy, noise=None):
    return policy.generate(PROMPTS, n_ddim=2, noise=policy.noise(range(2)) if noise is None else noise)

def shake(policy, size=.3):
    "Stand-in for training: move the adapters away from their start."
    for i, p in enumerate(lora_parameters(policy)):
        p.data += size * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))

def job(policy, folder, tmp_path, lora=None):
    "What the other process needs to draw the clips that `draw` draws."
    noise, options = policy.noise(range(2)), {"guidance_scale": policy.guidance_scale, "num_frames": policy.n_frames}
    if policy.PIPELINE == "CogVideoXPipeline":
        noise = noise.transpose(1, 2)
        options |= {"height": policy.size[0], "width": policy.size[1], "max_sequence_length": 12}
    file = tmp_path / f"{policy.PIPELINE}-{lora is None}.pt"
    torch.save(noise.contiguous(), file)
    return {"folder": str(folder), "noise": str(file), "options": options, "lora": lora and str(lora)}

def elsewhere(jobs, tmp_path, kit):
    "Clips drawn by diffusers in a fresh process, which imports the kit's policies or cannot."
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    out = tmp_path / "drawn.pt"
    command = [sys.executable, "-c", FRESH, str(tmp_path / "jobs.json"), str(out), "kit" if kit else "alone",
               json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out, weights_only=True)

def distance(a, b): return (a - b).abs().max().item()


def test_every_method_that_the_class_names_is_there():
    "VideoPolicy declares for type checkers what @patch adds cell by cell; the two lists must not drift apart."
    named = {n for n, kind in vars(VideoPolicy)["__annotations__"].items() if "Callable" in str(kind)}
    methods = {n for n, value in vars(VideoPolicy).items() if callable(value)}
    in_class = {"from_pretrained", "take_settings", "modules", "defaults", "to"}
    assert named == {n for n in methods if not n.startswith("_")} - in_class


# ---- a fresh process

def test_directories_and_loras_open_without_the_kit(tmp_path):
    "AutoencoderKL's directory as saved, merged or not, and a transformer's LoRA: diffusers needs nothing of ours."
    modelscope, cog = policy_of(tmp_path / "m"), policy_of(tmp_path / "c", "cogvideox")
    modelscope.save_pretrained(tmp_path / "saved")
    base = draw(modelscope)
    add_lora(modelscope, rank=2, alpha=4)
    shake(modelscope)
    adapted = draw(modelscope)
    file = save_lora(modelscope, tmp_path / "unet-lora")
    merge_lora(modelscope).save_pretrained(tmp_path / "merged")
    cog_base = draw(cog)
    add_lora(cog, rank=2, alpha=4)
    shake(cog)
    save_lora(cog, tmp_path / "cog-lora")
    saved, merged, transformer = elsewhere([
        job(modelscope, tmp_path / "saved", tmp_path, file.parent), job(modelscope, tmp_path / "merged", tmp_path),
        job(cog, tmp_path / "c", tmp_path, tmp_path / "cog-lora")], tmp_path, kit=False)
    assert distance(saved["base"], base) < 1e-5
    assert distance(merged["base"], adapted) < 1e-4 and distance(adapted, base) > 1e-3
    # diffusers 0.42 cannot put adapters into this UNet and says so; whatever a later one does, it must not be silence
    assert "error" in saved or distance(saved["adapted"], adapted) < 1e-4
    assert distance(transformer["adapted"], transformer["base"]) > 1e-4
    assert distance(transformer["base"], cog_base) < 1e-4 and distance(transformer["adapted"], draw(cog)) < 1e-4
    assert distance(transformer["unloaded"], transformer["base"]) < 1e-5


def test_lora_of_a_video_unet_loads_after_one_import(tmp_path):
    policy = policy_of(tmp_path / "m")
    add_lora(policy, rank=2, alpha=4)
    shake(policy)
    save_lora(policy, tmp_path / "lora")
    (seen,) = elsewhere([job(policy, tmp_path / "m", tmp_path, tmp_path / "lora")], tmp_path, kit=True)
    assert "error" not in seen, seen.get("error")
    assert distance(seen["adapted"], seen["base"]) > 1e-3
    assert distance(seen["adapted"], draw(policy)) < 1e-4
    assert distance(seen["unloaded"], seen["base"]) < 1e-5


# ---- AutoencoderKL

@pytest.mark.parametrize("shift", [None, .3])
def test_autoencoder_kl_scale_and_shift(tmp_path, shift):
    "z = (mode - shift) * scale on the way in, z / scale + shift on the way out, as in diffusers' pipelines."
    policy = policy_of(tmp_path)
    policy.vae.register_to_config(scaling_factor=.5, shift_factor=shift)
    video = torch.rand(1, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): mode = policy.vae.encode(2 * video[0] - 1).latent_dist.mode()
    z = policy.encode(video)
    torch.testing.assert_close(z[0].transpose(0, 1), (mode - (shift or 0)) * .5, atol=1e-5, rtol=1e-5)
    with torch.no_grad(): shown = policy.vae.decode(mode).sample / 2 + .5
    torch.testing.assert_close(policy.decode(z)[0], shown, atol=1e-5, rtol=1e-4)

def test_each_frame_is_coded_alone(tmp_path):
    "Of AutoencoderKL's frames none looks at another: one at a time gives what all together give, and the gradient too."
    policy = policy_of(tmp_path)
    z = policy.noise([0]).requires_grad_()
    together = policy.decode(z)
    alone = torch.cat([policy.decode(z, torch.tensor([[i]])) for i in range(policy.n_frames)], 1)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    (g,) = torch.autograd.grad(policy.decode(z, torch.tensor([[3]])).sum(), z)
    touched = g.abs().amax((0, 1, 3, 4)) > 0
    assert touched.tolist() == [i == 3 for i in range(policy.n_frames)]

def test_a_shift_that_diffusers_ignores_is_said(tmp_path):
    policy = policy_of(tmp_path / "m")
    policy.vae.register_to_config(shift_factor=.1)
    with pytest.warns(UserWarning, match="shift_factor of 0.1.*TextToVideoSDPipeline does not"):
        policy.save_pretrained(tmp_path / "s")
    policy.vae.register_to_config(shift_factor=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.save_pretrained(tmp_path / "s")


# ---- LoRAs of other programs

@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    "A policy's directory, its adapter's file (rank 2, alpha 6) and what it draws with it."
    home = tmp_path_factory.mktemp("tuned")
    policy = policy_of(home / "policy")
    add_lora(policy, rank=2, alpha=6)
    shake(policy)
    return home / "policy", load_file(save_lora(policy, home / "lora")), draw(policy)

def kohya(state):
    "The same adapter under kohya's names: underscores, down and up, and an alpha beside each."
    out = {}
    for key, value in state.items():
        layer, _, end = key.removeprefix("unet.").rpartition(".lora_")
        name = "lora_unet_" + layer.replace(".", "_")
        out[f"{name}.lora_{'down' if end.startswith('A') else 'up'}.weight"] = value
        out[f"{name}.alpha"] = torch.tensor(6.)
    return out

def older(state):
    "The names of diffusers before PEFT; they know no alpha, so the scale is in the up matrices."
    out = {}
    for key, value in state.items():
        layer, _, end = key.rpartition(".lora_")
        block, _, name = layer.removesuffix(".0").rpartition(".")
        down = end.startswith("A")
        out[f"{block}.processor.{name}_lora.{'down' if down else 'up'}.weight"] = value if down else 3 * value
    return out

def write_peft(folder, state):
    folder.mkdir()
    save_file({"base_model.model." + k.removeprefix("unet."): v for k, v in state.items()}, folder / PEFT_FILE)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6,
                                                            "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}))
    return folder

def write(folder, state):
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / LORA_FILE)
    return folder

@pytest.mark.parametrize("style", ["kohya", "older", "peft"])
def test_other_names_are_read(tuned, tmp_path, style):
    folder, state, adapted = tuned
    file = {"kohya": lambda: write(tmp_path / "l", kohya(state)), "older": lambda: write(tmp_path / "l", older(state)),
            "peft": lambda: write_peft(tmp_path / "l", state)}[style]()
    policy = VideoPolicy.from_pretrained(folder)
    base = draw(policy)
    assert len(load_lora(policy, file)) == len(state)
    assert distance(draw(policy), base) > 1e-3 and distance(draw(policy), adapted) < 1e-5

def test_a_lora_of_some_layers_only(tuned, tmp_path):
    "A file that covers only part of the layers of a name gets adapters exactly there."
    folder, state, _ = tuned
    some = {k: v for k, v in state.items() if "down_blocks" in k}
    assert 0 < len(some) < len(state)
    policy = VideoPolicy.from_pretrained(folder)
    assert len(load_lora(policy, write(tmp_path / "l", some))) == len(some)

def refusal(policy, folder):
    with pytest.raises(KitError) as error: load_lora(policy, folder)
    assert "\n" not in str(error.value) and not lora_parameters(policy), "refused before anything is attached"
    return str(error.value)

def test_a_lora_that_matches_no_layer_is_refused(tuned, tmp_path):
    folder, state, _ = tuned
    policy = VideoPolicy.from_pretrained(folder)
    foreign = {k.replace("blocks", "layers"): v for k, v in state.items()}
    assert "none of its" in refusal(policy, write(tmp_path / "a", {k: v for k, v in foreign.items() if "layers" in k}))
    half = {k: v for k, v in state.items() if "down_blocks" in k} | {k: v for k,
                                                                     v in foreign.items() if "up_layers" in k}
    assert "only" in refusal(policy, write(tmp_path / "b", half))
    assert "named unet" in refusal(policy, write(tmp_path / "c", {"transformer." + k: v for k, v in state.items()}))

def test_a_lora_of_other_sizes_belongs_to_another_model(tuned, tmp_path):
    "As an older model of the same name with other widths would have made it."
    folder, state, _ = tuned
    policy = VideoPolicy.from_pretrained(folder)
    wide = {k: torch.cat([v, v], 1 if "lora_A" in k else 0) for k, v in state.items()}
    assert "belongs to another model" in refusal(policy, write(tmp_path / "l", wide))
