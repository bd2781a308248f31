#!/usr/bin/env python
"""Does what online preference optimisation learnt hold of pairs that no update has seen?

    python reproduction/implicit_accuracy.py                                   # the runs of the scoreboard, five seeds
    python reproduction/implicit_accuracy.py --runs ovpo-long --seeds 1 --set lr=1e-3 --captions 24

For each run the policy is trained (or its checkpoint taken) and asked about pairs of the *base model's* clips for
held-out captions: the best and the worst of four by the video judge. Implicit reward of a clip: how much less the
tuned policy errs on it than the base model, a mean over several noise levels and draws of noise. The accuracy is the
share of pairs in which it is higher for the judge's choice; 1/2 is a coin. Runs: the judge's labels, swapped ones and
random ones. Written to implicit_accuracy.json, a line per run and seed as soon as it is known.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from instructvideo_kit.cli import parse_set
from instructvideo_kit.files import write_atomic
from instructvideo_kit.measure.execute import DTYPES, Metrics, run_folder, tuned_policy
from instructvideo_kit.measure.metrics import seed_bootstrap
from instructvideo_kit.measure.runs import all_runs, config_of, precision_of
from instructvideo_kit.menagerie.captions import prompts
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.lora import disabled_lora, load_lora
from instructvideo_kit.tuning.dpo import choose_pairs
from instructvideo_kit.tuning.rollouts import candidates, prediction_errors
from instructvideo_kit.tuning.stream import draw_noise, example_generator

HERE = Path(__file__).resolve().parent
RUNS = ("ovpo-long", "ovpo-swapped", "ovpo-random")
PAIRS = 7001 # seed of the pairs' noise: no run has it
LEVELS = 8 # noise levels of each clip, evenly spread over the chain


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), help="names in runs.yaml; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="tuning seeds of each; default: %(default)s")
    parser.add_argument("--captions", type=int, default=48, help="held-out captions, a pair each; default: %(default)s")
    parser.add_argument("--step", type=int, default=0, help="update to look at; default: the run's last")
    parser.add_argument("--set", action="append", default=[], help="a setting of the runs, such as lr=1e-3")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results; default: %(default)s")
    return parser.parse_args()


def the_run(name, seed, step, changed):
    "A run of the scoreboard up to a step, with other settings where asked."
    run = next(run for run in all_runs() if run.name == name)
    last = step or max(s for s, _ in run.points)
    return replace(run, seed=seed, settings={**run.settings, **changed}, points=((last, run.points[0][1]),)), last


def unseen_pairs(run, judge, captions):
    "Best and worst of the base model's clips of each caption, drawn as the run draws its own."
    config = config_of(run)
    policy = VideoPolicy.from_pretrained(run.policy, dtype=DTYPES[precision_of(run)])
    generators = [example_generator(PAIRS, i) for i in range(len(captions))]
    pairs = choose_pairs(candidates(policy, judge, captions, generators, config))
    return {name: pairs[name] for name in ("prompts", "chosen", "rejected")}


@torch.no_grad()
def implicit_margins(policy, pairs, batch=16):
    "(n,) how much more the tuned policy gained over the base model on the chosen clip than on the rejected one."
    n, schedule, total = len(pairs["prompts"]), policy.schedule, 0.
    times = torch.linspace(0, schedule.n_train - 1, LEVELS + 2)[1:-1].long().tolist()
    for level, t in enumerate(times):
        noise = draw_noise(policy.latent_shape, [example_generator(PAIRS + 1 + level, i) for i in range(n)])
        gains = [gain(policy, pairs[side], noise, t, pairs["prompts"], batch) for side in ("chosen", "rejected")]
        total = total + gains[0] - gains[1]
    return total/len(times)


def gain(policy, z, noise, t, captions, batch):
    "(n,) error of the base model less that of the tuned one on the same noisy clips."
    gains = []
    for i in range(0, len(captions), batch):
        part = z[i:i + batch].to(policy.dtype), noise[i:i + batch].to(policy.dtype)
        asked = *part, torch.full((len(part[0]),), t), captions[i:i + batch]
        with disabled_lora(policy):
            before = prediction_errors(policy, *asked)
        gains.append(before - prediction_errors(policy, *asked))
    return torch.cat(gains)


def measure(name, seed, args, changed, metrics, pairs):
    "One line: the run's accuracy on each pair."
    run, step = the_run(name, seed, args.step, changed)
    tuned_policy(run, step, args.out, metrics) # trains, where no checkpoint is there
    policy = VideoPolicy.from_pretrained(run.policy, dtype=DTYPES[precision_of(run)])
    load_lora(policy, run_folder(args.out, run)/"checkpoints"/f"step-{step:06d}")
    margins = implicit_margins(policy, pairs)
    right = ((margins > 0).float() + .5*(margins == 0).float()).tolist()
    return {"run": name, "seed": seed, "step": step, "asked": args.step, "settings": changed, "right": right}


def summary(lines):
    "By how much the accuracy of each run is above 1/2, with its interval over seeds and pairs, from two seeds on."
    figures = {}
    for name in dict.fromkeys(line["run"] for line in lines):
        right = torch.tensor([line["right"] for line in lines if line["run"] == name])
        if len(right) > 1:
            mean, low, high = seed_bootstrap((right - .5).numpy())
            figures[name] = {"value": mean, "low": low, "high": high, "seeds": len(right)}
            figures[f"{name}_below"] = {"value": -mean, "low": -high, "high": -low, "seeds": len(right)}
    return figures


def main():
    args = read_arguments()
    changed = parse_set(args.set)
    path = args.out/"implicit_accuracy.json"
    kept = json.loads(path.read_text())["lines"] if path.exists() else []
    def asked(line): return (line["settings"], line["asked"], len(line["right"])) == (changed, args.step, args.captions)
    lines, others = [line for line in kept if asked(line)], [line for line in kept if not asked(line)]
    metrics, pairs, figures = Metrics(), None, summary(lines)
    for seed in range(args.seeds):
        for name in args.runs:
            if any((line["run"], line["seed"]) == (name, seed) for line in lines):
                continue
            pairs = pairs or unseen_pairs(the_run(name, seed, 0, changed)[0], metrics.video,
                                          prompts(args.captions, "evaluation"))
            lines.append(measure(name, seed, args, changed, metrics, pairs))
            figures = summary(lines)
            write_atomic(path, json.dumps({"figures": figures, "lines": lines + others}) + "\n")
            print(f"{name} seed {seed}: {sum(lines[-1]['right'])/args.captions:.3f}", flush=True)
    for name in args.runs:
        if name not in figures: continue
        found = figures[name]
        print(f"{name}: {.5 + found['value']:.3f} ({.5 + found['low']:.3f} to {.5 + found['high']:.3f})")


if __name__ == "__main__":
    main()
