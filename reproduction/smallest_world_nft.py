"""The smallest world for DiffusionNFT: one caption, and the brightness of the clip as reward.

    python reproduction/smallest_world_nft.py                     # 24 rounds, then as many with the sign swapped
    python reproduction/smallest_world_nft.py --rounds 12 --signs +

A group of 16 clips a round, no guidance, 10 DDIM steps, LoRA of rank 8, AdamW 1e-3, beta 1, and four updates a round,
each at another time. The gain is the mean of the last four rounds minus that of the first four, and its standard error
that of the clips' rewards. Runs go on where they were stopped (--out). Writes smallest_world_nft.json beside them."""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from instructvideo_kit.files import write_atomic

CAPTION = "a fox walking to the left in the meadow"
GROUP, UPDATES = 16, 4


def brightness(sign):
    "A judge that likes bright clips, or dark ones."
    def reward(frames, prompts): return sign*frames.mean((1, 2, 3, 4))
    reward.name = "brightness" if sign > 0 else "darkness"
    return reward


def settings(rounds, seed):
    "The config of a run."
    from instructvideo_kit.tuning.nft import NFTConfig
    return NFTConfig(
        steps=rounds*UPDATES, batch=GROUP, lr=1e-3, weight_decay=0., max_grad_norm=1., seed=seed, rank=8, n_ddim=10,
        solver="ddim", guidance_scale=1., n_segments=0, samples_at_once=GROUP, group_size=GROUP, captions_per_round=1,
        advantage_std="group", updates_per_round=UPDATES, timesteps_per_update=1, beta_nft=1., lam_ref=0.,
        old_decay="none", save_every=UPDATES)


def learn(sign, rounds, seed, folder):
    "One run; mean brightness and spread of each round, deviation from the old policy after each update, seconds."
    from instructvideo_kit.policy import VideoPolicy
    from instructvideo_kit.tuning.algorithm import tune
    start = time.perf_counter()
    policy = VideoPolicy.from_pretrained("menagerie")
    result = tune("nft", policy, brightness(sign), [CAPTION], settings(rounds, seed), folder, resume=True,
                  progress=False)
    rows = result.rows()
    first = rows[::UPDATES] # the reward stays the same for the updates of a round
    return {"sign": sign, "seed": seed, "rounds": len(first), "brightness": [sign*r["reward"] for r in first],
            "std": [r["reward_std"] for r in first], "deviation": [r["deviation"] for r in rows],
            "grad_norm": [r["grad_norm"] for r in rows], "seconds": round(time.perf_counter() - start)}


def gain(run, width=4):
    "Change of brightness from the first rounds to the last, its standard error, and their ratio."
    mean, std = np.array(run["brightness"]), np.array(run["std"])
    width = min(width, len(mean)//2)
    def error(part): return (part**2).sum()/(GROUP*len(part)**2)
    change = mean[-width:].mean() - mean[:width].mean()
    deviation = float(np.sqrt(error(std[-width:]) + error(std[:width])))
    return {"gain": float(change), "standard_error": deviation, "errors": float(change/deviation), "width": width}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--signs", default="+-", help="+ likes bright clips, - dark ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/smallest_world_nft"))
    args = parser.parse_args()
    runs = {}
    for sign in args.signs:
        name = {"+": "brightness", "-": "darkness"}[sign]
        run = learn(1 if sign == "+" else -1, args.rounds, args.seed, args.out/f"{name}-{args.seed}")
        runs[name] = {**run, **gain(run)}
        shown = {k: round(v, 4) for k, v in gain(run).items()}
        print(name, shown, f"{run['seconds']} s", flush=True)
    write_atomic(args.out/"smallest_world_nft.json", json.dumps({"threads": torch.get_num_threads(), **runs}, indent=1))


if __name__ == "__main__": main()
