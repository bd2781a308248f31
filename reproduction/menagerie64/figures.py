"""The policy beside drawn clips of the same captions: held-out captions, one clip each, first draws.

    python reproduction/menagerie64/figures.py --n 64 --out reproduction/menagerie64/figures.json
    python reproduction/menagerie64/figures.py --guidance-scale 1 --out reproduction/menagerie64/figures-w1.json

Writes what the oracle reads in the clips, in clean renders and in renders with the data's defects, a contact sheet of
the first 24 clips and strips of the first 8 beside the file. Captions and noise are those of the seed; nothing is
chosen or drawn again."""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from instructvideo_kit.machine import fast_dtype, fast_precision
from instructvideo_kit.menagerie.captions import prompts, scenes
from instructvideo_kit.menagerie.defects import render
from instructvideo_kit.menagerie.oracle import Oracle, parse
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.video import clip_grid, film_strip


def means(read):
    "Mean of each figure and its standard error."
    told = {}
    for name, values in read.items():
        known = values[~values.isnan()]
        told[name] = dict(mean=round(known.mean().item(), 4), error=round((known.std() / len(known) ** .5).item(), 4))
    return told


def spoiled(captions, seed):
    "Scenes of these captions with defects as often as in the training data."
    others = scenes("evaluation", len(captions), seed=seed + 1)
    return [replace(parse(caption), seed=other.seed, defects=other.defects)
            for caption, other in zip(captions, others)]


def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--policy", default="menagerie")
    asked.add_argument("--n", type=int, default=256, help="captions")
    asked.add_argument("--n-ddim", type=int, default=None, help="steps; the policy's own by default")
    asked.add_argument("--guidance-scale", type=float, default=None, help="the policy's own by default")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--out", type=Path, required=True)
    asked = asked.parse_args()
    policy, oracle = VideoPolicy.from_pretrained(asked.policy, dtype=fast_dtype()), Oracle.from_pretrained()
    captions = prompts(asked.n, seed=asked.seed)
    drawn = dict(guidance_scale=asked.guidance_scale, seed=asked.seed, progress=True)
    clips = policy.generate(captions, asked.n_ddim, **drawn).float().clamp(0, 1)
    asked_for = spoiled(captions, asked.seed)
    clean = [replace(scene, defects=()) for scene in asked_for]
    drawn = {"generated": clips, "renders with defects": render(asked_for, size=oracle.size),
             "clean renders": render(clean, size=oracle.size)}
    told = {name: means(oracle(c, captions)) for name, c in drawn.items()}
    w = policy.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
    settings = dict(policy=asked.policy, n=asked.n, n_ddim=asked.n_ddim or policy.n_ddim, guidance_scale=w,
                    precision=fast_precision())
    asked.out.write_text(json.dumps(dict(settings=settings | dict(seed=asked.seed), figures=told), indent=1) + "\n")
    stem = asked.out.with_suffix("")
    clip_grid(clips[:24], scale=2, labels=captions[:24]).save(f"{stem}-sheet.png")
    film_strip(clips[:8], every=3, scale=2, labels=captions[:8]).save(f"{stem}-strips.png")
    for name, figures in told.items():
        print(f"{name:22}", "  ".join(f"{k} {v['mean']:.4f}" for k, v in figures.items()))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
