"""The smallest world in which an algorithm must learn: one caption, brightness as reward, groups of 16 clips.

Nothing here is hard to see, and every clip costs the same, so an algorithm that gains nothing here has a mistake or
a setting that hides its signal. The control is the same run with the sign of the reward swapped: it must get darker.

    python reproduction/smallest_world.py --algorithm grpo --seed 0
    python reproduction/smallest_world.py --algorithm grpo --seed 0 --sign -1

It prints the mean brightness of the first and the last rounds with standard errors (over clips), and the gain in units
of its own error. A round is drawn before the policy is moved, so the first round is the base."""
import argparse
import json
import math
import tempfile
from pathlib import Path

CAPTION = "a fox walking to the left in the meadow"
WORLD = dict(n_ddim=10, guidance_scale=1., batch=16, lr=1e-3, rank=8, max_grad_norm=1.)
OWN = { # what an algorithm needs besides
    "grpo": dict(group_size=16, window=3, window_first=0),
    "ddpo": dict(group_size=16, min_count=16, keep=16, updates_per_round=1, window=3, window_first=0,
                 timestep_fraction=1.),
}


def brightness(sign):
    "A judge: mean of all pixels, times the sign."
    def judge(frames, prompts): return sign*frames.mean((2, 3, 4))
    return judge


def rounds_of(rows):
    "(mean reward, deviation) of each round: steps that share their clips say the same."
    found = []
    for row in rows:
        said = row["reward"], row["reward_std"]
        if not found or found[-1] != said: found.append(said)
    return found


def mean_and_error(rounds, clips):
    "Mean over rounds of `clips` clips each, and its standard error from the spread within rounds."
    mean = sum(r for r, _ in rounds)/len(rounds)
    variance = sum(s*s for _, s in rounds)/len(rounds)*clips/(clips - 1)
    return mean, math.sqrt(variance/(clips*len(rounds)))


def summary(rounds, clips, sign, width=4):
    "First and last rounds in brightness, and the gain in units of its error."
    width = min(width, len(rounds)//2)
    first, e_first = mean_and_error(rounds[:width], clips)
    last, e_last = mean_and_error(rounds[-width:], clips)
    error = math.hypot(e_first, e_last)
    gain = sign*(last - first)
    return {"rounds": len(rounds), "first": sign*first, "first_error": e_first, "last": sign*last, "last_error": e_last,
            "gain": gain, "gain_error": error, "errors": gain/error}


def overrides(pairs):
    "field=value, read as YAML."
    import yaml
    return {name: yaml.safe_load(value) for name, value in (pair.split("=", 1) for pair in pairs)}


def run(args):
    "Tune, and say what came of it."
    from instructvideo_kit.policy import VideoPolicy
    from instructvideo_kit.tuning.algorithm import find, tune
    from instructvideo_kit.tuning.config import load_preset
    Config = find(args.algorithm).Config
    fields = {**WORLD, **OWN.get(args.algorithm, {}), "steps": args.steps, "seed": args.seed, "save_every": 4}
    config = load_preset(f"{args.algorithm}_menagerie", Config, fields | overrides(args.set))
    out = args.out or Path(tempfile.mkdtemp())/"run"
    policy, judge = VideoPolicy.from_pretrained("menagerie"), brightness(args.sign)
    result = tune(args.algorithm, policy, judge, [CAPTION], config, out, resume=out.exists(), progress=False)
    told = dict(algorithm=args.algorithm, seed=args.seed, sign=args.sign)
    told |= summary(rounds_of(result.rows()), config.batch, args.sign)
    told["seconds"] = round(sum(row["seconds"] for row in result.rows()))
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithm", default="grpo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sign", type=int, choices=(1, -1), default=1, help="-1: darker is better, the control")
    parser.add_argument("--steps", type=int, default=24, help="optimiser steps")
    parser.add_argument("--out", type=Path, help="run folder; one that is there is gone on with")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the config")
    print(json.dumps(run(parser.parse_args()), indent=1))


if __name__ == "__main__": main()
