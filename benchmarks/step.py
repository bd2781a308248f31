#!/usr/bin/env python
"""What a tuning step costs: ours against "as published", and both against the sum of their parts.

    python benchmarks/step.py                        # CPU, small UNet3D + AutoencoderKL + CLIP, about five minutes
    python benchmarks/step.py --scaling              # how the cost grows with tau, D, F, S, pixels, batch
    python benchmarks/step.py --model modelscope --device cuda --dtype bf16  # random weights, 16 x 256 x 256

"As published" is what InstructVideo's released code does: two guidance calls one after the other, the last step
recomputed at two levels, all sixteen frames decoded, the reward model's weights with a gradient, adapters beside the
weights in every step. Same modules, same inputs, runs in turn; the table gives medians and ratios, which survive a
noisy machine better than seconds do. --scaling writes a picture too.
"""
import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.utils import logging

from instructvideo_kit.diffusion.schedule import n_steps
from instructvideo_kit.files import write_atomic
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.lora import add_lora, lora_parameters, merged_lora
from instructvideo_kit.policy.recompute import recomputed
from instructvideo_kit.reward.clip import ClipReward
from instructvideo_kit.reward.segvr import segment_frames
from instructvideo_kit.tuning.gradient import objective, reward_gradient, score
from instructvideo_kit.tuning.instructvideo import InstructVideoConfig, edit

SHAPES = { # a pipeline with an AutoencoderKL, so that decoding costs something
    "small": dict(unet=(64, 96), text=96, vae=(48, 96, 96), vae_layers=2, size=48, frames=16, head=8,
                  reward=dict(hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6,
                              image_size=64, patch_size=8)),
    "modelscope": dict(unet=(320, 640, 1280, 1280), text=1024, vae=(128, 256, 512, 512), vae_layers=2, size=256,
                       frames=16, head=64, reward=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                                                       num_attention_heads=16, image_size=224, patch_size=14)),
}


def build(shape, size=None, frames=None, device="cpu", dtype=torch.float32):
    "A policy and a CLIP reward with random weights, in the classes of the real ones."
    from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

    from instructvideo_kit.menagerie.tokens import menagerie_tokenizer
    k, tokenizer = SHAPES[shape], menagerie_tokenizer()
    size, scale = size or k["size"], 2 ** (len(k["vae"]) - 1)
    torch.manual_seed(0)
    levels, latents = len(k["unet"]), 4
    unet = UNet3DConditionModel(
        sample_size=size // scale, in_channels=latents, out_channels=latents, block_out_channels=k["unet"],
        layers_per_block=1 if levels == 2 else 2,
        norm_num_groups=8 if levels == 2 else 32, attention_head_dim=k["head"], cross_attention_dim=k["text"],
        down_block_types=("CrossAttnDownBlock3D",) * (levels - 1) + ("DownBlock3D",),
        up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * (levels - 1))
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * len(k["vae"]),
                        up_block_types=["UpDecoderBlock2D"] * len(k["vae"]),
                        block_out_channels=k["vae"], layers_per_block=k["vae_layers"], latent_channels=latents,
                        norm_num_groups=16, sample_size=size)
    ends = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, max_position_embeddings=16)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=k["text"], intermediate_size=2 * k["text"], num_hidden_layers=2,
                                        num_attention_heads=4, **ends))
    scheduler = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    policy = VideoPolicy(unet, vae, text, tokenizer, scheduler,
                         dict(n_frames=frames or k["frames"], guidance_scale=3.)).to(device, dtype)
    clip = CLIPModel(CLIPConfig(text_config=dict(hidden_size=96, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, **ends), vision_config=k["reward"], projection_dim=64))
    return policy, ClipReward(clip.to(device, dtype), tokenizer, "hpsv2")


PUBLISHED = dict(batched=False, merged=False, chosen=False, frozen=False, staged=False, nested=True)
OURS = dict(batched=True, merged=True, chosen=True, frozen=True, staged=True, nested=False)
WHAT = dict(batched="guidance branches in one call", merged="LoRA merged in steps without gradient",
            chosen="frames chosen before decoding", frozen="reward weights frozen",
            staged="reward differentiated frame by frame", nested="one level of recomputation, not two")


class Step:
    "One tuning step, with each item of the cost floor as a switch."
    def __init__(self, policy, reward, config, batch=1, **switches):
        self.policy, self.reward, self.config, self.s = policy, reward, config, {**OURS, **switches}
        g = torch.Generator().manual_seed(0)
        self.z, self.eps = (torch.randn(batch, *policy.latent_shape, generator=g).to(policy.device, policy.dtype)
                            for _ in range(2))
        self.prompts = ["a fox walking to the left in the meadow"] * batch
        self.g = segment_frames(policy.n_frames, config.n_segments, batch, generator=g)
        policy.embed([*self.prompts, ""]), reward.text_features(self.prompts)

    def chain(self):
        "Edited latents, with a graph through the last step."
        config = replace(self.config, batched_cfg=self.s["batched"], merge_lora=self.s["merged"],
                         checkpoint=self.s["nested"], checkpoint_blocks=not self.s["nested"])
        return edit(self.policy, self.z, self.eps, self.prompts, config)

    def scores(self, z_0):
        "Scores (b, s) with a graph to z_0: of the chosen frames only, or of frames picked after all were decoded."
        if self.s["chosen"]: return score(self.policy, self.reward, z_0, self.g, self.prompts, self.config)
        frames = self.policy.decode(z_0).clamp(0, 1)
        return self.reward(frames[torch.arange(len(z_0))[:, None], self.g.to(frames.device)], self.prompts)

    def __call__(self):
        with recomputed(self.policy) if self.s["nested"] else contextlib.nullcontext():
            self.step() # open in the backward pass too: a level inside a level

    def step(self):
        self.reward.model.requires_grad_(not self.s["frozen"])
        z_0 = self.chain()
        if self.s["staged"] and self.s["chosen"]:
            gradient, scores = reward_gradient(self.policy, self.reward, z_0, self.g, self.prompts, self.config)
            (z_0 * gradient).sum().backward()
        else: objective(self.scores(z_0), self.g, self.policy.n_frames, self.config)[0].backward()
        for p in (*lora_parameters(self.policy), *self.reward.model.parameters()): p.grad = None


def synchronise(device):
    if torch.device(device).type == "cuda": torch.cuda.synchronize()


# the second is not disturbed by other work on the machine
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]


def seconds(call, device):
    "Time of one call on the clock chosen."
    synchronise(device)
    start = clock()
    call()
    synchronise(device)
    return clock() - start


def in_turn(calls, repeats, device):
    "Median seconds of each call: warmed up, then one run of each after the other, `repeats` rounds."
    for call in calls.values(): call()
    rounds = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(repeats)]
    return {name: statistics.median(r[name] for r in rounds) for name in calls}


def peak_memory(call, device):
    """MiB of tensors that one call adds at its peak, as torch counts them: on a GPU by its allocator, on the CPU
    from the profiler's events."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronise(device)
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"),
                    key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in events), initial=0)) / 2 ** 20


def process_memory(call):
    """MiB by which the process grows at its peak during a call (Linux): tensors, the allocator's gaps and the
    libraries' scratch."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError): ctypes.CDLL("libc.so.6").malloc_trim(0)
    def read(key):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
    try: Path("/proc/self/clear_refs").write_text("5") # the high-water mark starts anew
    except OSError: return float("nan")
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


def pieces(step, device, repeats):
    """The floor of design formula C = F c [(n - k) + k (2 + rho)] + S V (2 + rho_V) + S R 2, from separately timed
    parts."""
    policy, config, branch = step.policy, step.config, torch.cat([step.z] * 2)
    text = policy.embed([*step.prompts] * 2)
    out = policy.unet(branch, 551, text).sample
    down = torch.randn_like(out)
    one = step.z.detach().requires_grad_()
    def free():
        with torch.no_grad(): policy.unet(branch, 551, text)
    def grad():
        with recomputed(policy): torch.autograd.grad(policy.unet(branch, 1, text).sample, lora_parameters(policy), down)
    def judge(): reward_gradient(policy, step.reward, one, step.g, step.prompts, config)
    def free_merged():
        with merged_lora(policy): free()
    t = in_turn({"free": free_merged, "grad": grad, "judge": judge}, repeats, device)
    n, k = n_steps(config.tau, config.n_ddim), config.grad_steps
    return {**t, "floor": (n - k) * t["free"] + k * t["grad"] + t["judge"]}


def compare(args):
    "Times, memory, ablations and the floor, as a dict."
    policy, reward = build(args.model, args.pixels, device=args.device, dtype=args.torch_dtype)
    add_lora(policy, 4)
    for p in lora_parameters(policy): torch.nn.init.normal_(p.data, std=.01)
    config = InstructVideoConfig(tau=.6, n_ddim=20, n_segments=4, guidance_scale=3., frames_at_once=1)
    def make(**s):
        return Step(policy, reward, config, args.batch, **s)
    calls = {"ours": make(), "as published": make(**PUBLISHED)}
    if not args.quick:
        calls |= {f"without: {WHAT[k]}": make(**{k: PUBLISHED[k]} | ({"staged": False} if k == "chosen" else {}))
                  for k in WHAT}
    times = in_turn(calls, args.repeats, args.device)
    memory = {name: peak_memory(call, args.device) for name, call in calls.items()}
    process = {name: process_memory(call) for name, call in calls.items()} if args.device == "cpu" else {}
    parts = pieces(calls["ours"], args.device, args.repeats)
    return dict(model=args.model, pixels=policy.size[0], device=args.device, dtype=args.dtype, clock=args.clock,
                torch=torch.__version__, threads=torch.get_num_threads(), batch=args.batch, seconds=times,
                memory_mib=memory, process_mib=process, parts=parts)


def table(found):
    "The comparison as markdown."
    t, m, process = found["seconds"], found["memory_mib"], found["process_mib"]
    lines = ["| step | seconds | of published | peak MiB of tensors | of published | of the process |",
             "|---|---|---|---|---|---|"]
    lines += [f"| {name} | {t[name]:.3f} | {t[name] / t['as published']:.2f} | {m[name]:.0f} | "
              f"{m[name] / m['as published']:.2f} | {process.get(name, 0):.0f} |" for name in t]
    p = found["parts"]
    return "\n".join(lines
                     + ["", f"Floor from separately timed parts: {p['floor']:.3f} s (a UNet pass of both branches "
                            f"{p['free']:.4f}, with backward {p['grad']:.4f}, "
                                  f"decoding, scoring and back {p['judge']:.4f}); ours is "
                                  f"{t['ours'] / p['floor']:.2f} of it."])


SWEEPS = {"tau": (.1, .3, .5, .7, .9), "D": (5, 10, 20, 40), "F": (4, 8, 16, 32), "S": (1, 2, 4, 8, 16),
          "pixels": (16, 32, 64), "batch": (1, 2, 4)}


def sweep(name, args):
    "Seconds and peak memory of our step at each value of one variable."
    rows = []
    for value in SWEEPS[name]:
        config = InstructVideoConfig(tau=value if name == "tau" else .6, n_ddim=value if name == "D" else 20,
                                     n_segments=value if name == "S" else 4 if name != "F" else min(4, value),
                                     guidance_scale=3., frames_at_once=1)
        policy, reward = build(args.model, size=value if name == "pixels" else None, frames=value if name == "F"
                               else None, device=args.device, dtype=args.torch_dtype)
        add_lora(policy, 4)
        step = Step(policy, reward, config, value if name == "batch" else 1)
        step()
        rows.append((value, statistics.median(seconds(step, args.device) for _ in range(args.repeats)),
                     peak_memory(step, args.device)))
        print(f"{name} = {value}: {rows[-1][1]:.3f} s, {rows[-1][2]:.0f} MiB", flush=True)
    return rows


def fit(rows, column=1):
    "Exponent of a power law, and R^2 of a straight line, of a sweep."
    import numpy as np
    x, y = np.array([r[0] for r in rows], float), np.array([r[column] for r in rows], float)
    exponent = np.polyfit(np.log(x), np.log(np.maximum(y, 1e-9)), 1)[0]
    line = np.polyval(np.polyfit(x, y, 1), x)
    return dict(exponent=float(exponent),
                r2=float(1 - ((y - line) ** 2).sum() / max(((y - y.mean()) ** 2).sum(), 1e-12)))


def scaling(args):
    "All sweeps, their fits, and a picture."
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = {name: sweep(name, args) for name in SWEEPS}
    fig, axes = plt.subplots(2, len(found), figsize=(2.6 * len(found), 4.6), sharex="col")
    for (name, rows), top, low in zip(found.items(), *axes):
        x = [r[0] for r in rows]
        top.plot(x, [r[1] for r in rows], "o-")
        low.plot(x, [r[2] for r in rows], "o-", color="#e45756")
        top.set_title(f"{name}: time ~ {name}^{fit(rows)['exponent']:.2f}", fontsize=9)
        low.set_xlabel(name)
        for ax, column in ((top, 1), (low, 2)): ax.set_ylim(0, 1.1 * max(r[column] for r in rows))
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("peak MiB above weights")
    fig.tight_layout()
    fig.savefig(args.out.with_suffix(".png"), dpi=80)
    return {name: dict(rows=rows, time=fit(rows), memory=fit(rows, 2)) for name, rows in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="small", help="sizes of the random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--batch", type=int, default=1, help="clips a step")
    parser.add_argument("--pixels", type=int, default=None, help="height and width; the model's own by default")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="cpu: processor time, for a machine that is busy with other things")
    parser.add_argument("--quick", action="store_true", help="ours and as published only")
    parser.add_argument("--scaling", action="store_true", help="sweep tau, D, F, S, resolution and batch instead")
    parser.add_argument("--out", type=Path, default=None,
                        help="JSON file of the results (default: runs/benchmark/step.json or scaling.json)")
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here: run with --device cpu")
    logging.set_verbosity_error() # a note on types for each model that is built
    global clock
    clock = CLOCKS[args.clock]
    args.torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    args.out = args.out or Path("runs/benchmark") / ("scaling.json" if args.scaling else "step.json")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = scaling(args) if args.scaling else compare(args)
    write_atomic(args.out, json.dumps(found, indent=1))
    print("\n".join(f"{k}: time exponent {v['time']['exponent']:.2f}, R^2 of a line {v['time']['r2']:.4f}; memory "
                    f"exponent {v['memory']['exponent']:.2f}" for k, v in found.items()) if args.scaling
                    else table(found))
    print(f"written to {args.out}")


if __name__ == "__main__": main()
