"""The smallest world in which an algorithm must learn: one caption, brightness as reward, groups of 16 clips.

Nothing here is hard to see, and every clip costs the same, so an algorithm that gains nothing here has a mistake or
a setting that hides its signal. The control is the same run with the sign of the reward swapped: it must get darker.

    python reproduction/smallest_world.py --algorithm grpo --seed 0
    python reproduction/smallest_world.py --algorithm grpo --seed 0 --sign -1
    python reproduction/smallest_world.py --every --rounds 20 --set lr=3e-3    # 3 algorithms, 5 seeds, both signs; goes on

A run says the mean brightness of its first and last rounds with standard errors (over clips), and the gain in units of
its own error. A round is drawn before the policy is moved, so the first round is the base. With --every, a line for
each run goes into reproduction/rl/smallest_world.jsonl; runs that stand there are not made again. smallest_world.json
beside it has the gain of each algorithm and sign with its interval over seeds."""
import argparse
import json
import math
import tempfile
from itertools import product
from pathlib import Path

import numpy as np

from instructvideo_kit.feedback.votes import append_line
from instructvideo_kit.files import write_atomic
from instructvideo_kit.measure.execute import parse_shard
from instructvideo_kit.measure.metrics import t_quantile
from instructvideo_kit.reward.plain import brightness

CAPTION = "a fox walking to the left in the meadow"
LINES = Path(__file__).parent/"rl/smallest_world.jsonl"
ALGORITHMS, SEEDS, SIGNS = ("ddpo", "grpo", "nft"), range(5), (1, -1)
WORLD = dict(n_ddim=10, guidance_scale=1., batch=16, lr=1e-3, rank=8, max_grad_norm=1.)
WINDOW = dict(group_size=16, window=3, window_first=0, updates_per_round=1)
OWN = { # what an algorithm needs besides
    "grpo": WINDOW,
    "ddpo": dict(**WINDOW, min_count=16, keep=16, timestep_fraction=1.),
    "nft": dict(group_size=16, captions_per_round=1, updates_per_round=4),
}


def signed(sign):
    "A judge that likes bright clips (1) or dark ones (-1)."
    def judge(frames, prompts): return sign*brightness(frames, prompts)
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


def run(algorithm, seed, sign, rounds, out=None, settings=(), model="menagerie"):
    "Tune, and say what came of it."
    from instructvideo_kit.policy import VideoPolicy
    from instructvideo_kit.tuning.algorithm import find, tune
    from instructvideo_kit.tuning.config import load_preset
    own = OWN.get(algorithm, {})
    steps = rounds*own.get("updates_per_round", 1)
    fields = {**WORLD, **own, "steps": steps, "seed": seed, "save_every": 4}
    config = load_preset(f"{algorithm}_menagerie", find(algorithm).Config, fields | overrides(settings))
    out = out or Path(tempfile.mkdtemp())/"run"
    policy = VideoPolicy.from_pretrained(model)
    result = tune(algorithm, policy, signed(sign), [CAPTION], config, out, resume=out.exists(), progress=False)
    found = rounds_of(result.rows())
    told = dict(algorithm=algorithm, seed=seed, sign=sign, model=model) | summary(found, config.batch, sign)
    told["brightness"] = [round(sign*mean, 5) for mean, _ in found]
    told["seconds"] = round(sum(row["seconds"] for row in result.rows()))
    return told


def every(rounds, model, settings, shard):
    "All runs that are not in the file yet, a line for each."
    LINES.parent.mkdir(exist_ok=True)
    about = dict(rounds=rounds, model=model, settings=sorted(settings))
    i, n = parse_shard(shard)
    for seed, algorithm, sign in list(product(SEEDS, ALGORITHMS, SIGNS))[i::n]:
        if known(dict(algorithm=algorithm, seed=seed, sign=sign, **about)): continue
        told = run(algorithm, seed, sign, rounds, settings=settings, model=model) | about
        append_line(LINES, told)
        print(algorithm, seed, sign, f"{told['gain']:+.4f}", f"{told['errors']:+.1f} errors", told["seconds"], flush=True)
    write_atomic(LINES.with_suffix(".json"), json.dumps({"figures": gains(known(about))}, indent=1) + "\n")


def known(about):
    "The lines of the file that say so."
    lines = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []
    return [line for line in lines if all(line.get(name) == value for name, value in about.items())]


def gains(lines):
    "algorithm, up or down -> how far brightness moved the way it should, and the interval: Student's t over seeds."
    figures = {}
    for algorithm, sign in product(ALGORITHMS, SIGNS):
        runs = [line for line in lines if (line["algorithm"], line["sign"]) == (algorithm, sign)]
        if len(runs) < 2: continue
        gained, n = np.array([line["gain"] for line in runs]), len(runs)
        mean, half = float(gained.mean()), float(t_quantile(.975, n - 1)*gained.std(ddof=1)/n**.5)
        about = dict(low=mean - half, high=mean + half, seeds=n, fewest_errors=min(line["errors"] for line in runs))
        figures[f"{algorithm}_{'up' if sign > 0 else 'down'}"] = dict(value=mean, **about)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithm", default="grpo", choices=sorted(OWN))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sign", type=int, choices=(1, -1), default=1, help="-1: darker is better, the control")
    parser.add_argument("--rounds", type=int, default=16, help="of 16 clips")
    parser.add_argument("--model", default="menagerie", help="a policy's name or folder")
    parser.add_argument("--out", type=Path, help="run folder; one that is there is gone on with")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the config")
    parser.add_argument("--every", action="store_true", help="all algorithms, seeds and signs")
    parser.add_argument("--shard", default="1/1", help="the part of --every that this process takes, such as 2/2")
    asked = parser.parse_args()
    if asked.every: return every(asked.rounds, asked.model, asked.set, asked.shard)
    told = run(asked.algorithm, asked.seed, asked.sign, asked.rounds, asked.out, asked.set, asked.model)
    print(json.dumps(told, indent=1))


if __name__ == "__main__": main()
