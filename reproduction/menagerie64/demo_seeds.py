#!/usr/bin/env python
"""What the demo's tuning does, with three tuning seeds: intervals over seeds and captions.

    for s in 0 1 2; do
        instructvideo-kit tune --data menagerie --seed $s --out runs/demo-seed$s    # with bf16 where it is fast
        instructvideo-kit evaluate runs/demo-seed$s --seeds 2 --steps 10            # 48 held-out captions, two clips each
    done
    python reproduction/menagerie64/demo_seeds.py runs/demo-seed0 runs/demo-seed1 runs/demo-seed2

Reads before.json and after.json of each run, prints a table and writes demo_seeds.json beside this program."""
import argparse
import json
from pathlib import Path

import numpy as np

from instructvideo_kit.files import write_atomic
from instructvideo_kit.measure.metrics import seed_bootstrap

TOLD = ("reward", "species", "dullness", "blurriness", "watermark", "flicker", "sharpness", "place", "motion")


def rows_of(path):
    "(caption, noise seed) -> figures of a clip."
    return {(row["prompt"], row["seed"]): row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def by_caption(rows, name):
    "Mean over a caption's clips, captions in order."
    captions = sorted({caption for caption, _ in rows})
    return np.array([np.mean([row[name] for key, row in rows.items() if key[0] == c]) for c in captions])


def change(folders, name):
    "A figure before and after, and its change with the interval over tuning seeds and captions."
    sides = [[by_caption(rows_of(folder/f"{side}.json"), name) for folder in folders] for side in ("before", "after")]
    before, after = np.array(sides[0]), np.array(sides[1])
    mean, low, high = seed_bootstrap(after - before)
    found = dict(before=before.mean(), after=after.mean(), change=mean, low=low, high=high)
    return {k: round(float(v), 4) for k, v in found.items()} | {"seeds": after.mean(1).round(4).tolist()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="tuned runs that were evaluated, one for each seed")
    given = parser.parse_args()
    found = {name: change(given.folders, name) for name in TOLD}
    print("| figure | before | after | change | 95 % interval |\n|---|---|---|---|---|")
    for name, r in found.items():
        print(f"| {name} | {r['before']} | {r['after']} | {r['change']:+} | {r['low']:+} to {r['high']:+} |")
    out = Path(__file__).resolve().parent/"demo_seeds.json"
    lines = ",\n".join(f'  "{name}": {json.dumps(row)}' for name, row in found.items()) # a line for each figure
    write_atomic(out, f'{{"tuning seeds": {len(given.folders)}, "figures": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
