#!/usr/bin/env python
"""Peak memory of a step of OnlineVPO and of ReFL against resolution and frames (OnlineVPO, Figure 7), on small random
networks.

    python benchmarks/memory.py                      # CPU, tensors as torch counts them: a minute
    python benchmarks/memory.py --device cuda --model modelscope --pixels 128 256 --frames 8 16

Both tune the same LoRA of the same network without recomputation, and both judges look at every frame. OnlineVPO
takes a gradient through the network
alone, for two clips; ReFL through network, decoder and judge, for one.
"""
import argparse
import json
from pathlib import Path

import torch
from step import SHAPES, build, peak_memory

from instructvideo_kit.files import write_atomic
from instructvideo_kit.policy.lora import add_lora, lora_parameters
from instructvideo_kit.tuning.online_dpo import OnlineDPO, OnlineDPOConfig
from instructvideo_kit.tuning.process import make_accelerator
from instructvideo_kit.tuning.refl import Refl, ReflConfig

PROMPTS = ["a fox walking to the left in the meadow"]


def steps(policy, reward):
    "A step of each algorithm as a call."
    shared = dict(batch=1, guidance_scale=1.0, rank=4, n_ddim=2)
    online = OnlineDPOConfig(n_candidates=2, samples_at_once=1, **shared)
    refl = ReflConfig(grad_accum=1, stop_from=1, stop_to=1, n_segments=policy.n_frames, margin=10., **shared)
    accelerator = make_accelerator(online, policy.device)
    return {"onlinevpo": lambda: OnlineDPO(policy, reward, PROMPTS, online, accelerator).step(range(1)),
            "refl": lambda: Refl(policy, reward, PROMPTS, refl, accelerator).step(range(1))}


def measure(pixels, frames, args):
    "MiB of tensors that a step of each adds at its peak."
    policy, reward = build(args.model, pixels, frames, args.device)
    add_lora(policy, 4)
    for p in lora_parameters(policy): torch.nn.init.normal_(p.data, std=.01)
    found = {}
    for name, call in steps(policy, reward).items():
        found[name] = round(peak_memory(call, args.device), 1)
        for p in lora_parameters(policy): p.grad = None
    return {"pixels": pixels, "frames": frames, **found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pixels", type=int, nargs="+", default=[24, 48, 72])
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent/"results/memory.json")
    args = parser.parse_args()
    sizes = dict.fromkeys([(p, args.frames[0]) for p in args.pixels] + [(args.pixels[-2], f) for f in args.frames])
    rows = [measure(p, f, args) for p, f in sizes]
    for row in rows: print(row, flush=True)
    small, large = (pick(rows, key=lambda r: r["pixels"]**2 * r["frames"]) for pick in (min, max))
    figures = ({f"{n}_large": {"value": large[n], "unit": "MiB"} for n in ("onlinevpo", "refl")}
               | {f"{n}_growth": {"value": large[n] / small[n], "unit": "times"} for n in ("onlinevpo", "refl")})
    write_atomic(args.out,
                 json.dumps({"model": args.model, "device": args.device, "torch": torch.__version__, "rows": rows,
                             "figures": figures}, indent=1) + "\n")


if __name__ == "__main__": main()
