#!/usr/bin/env python
"""What the demo's tuning does, with three tuning seeds: intervals over seeds and captions.

    for s in 0 1 2; do
        instructvideo-kit tune --data menagerie --seed $s --set mixed_precision=bf16 --out runs/demo$s
        instructvideo-kit evaluate runs/demo$s --seeds 2 --steps 10         # 48 held-out captions, two clips each
    done
    python reproduction/menagerie64/demo_seeds.py runs/demo[012]/evaluation-d10

Reads before.json and after.json of each, prints a table and writes demo_seeds.json beside this program. The last column
is what the same measure says of clean drawings (reproduction/results/data-clean: 32 held-out captions)."""
import argparse
import json
from pathlib import Path

import numpy as np

from instructvideo_kit.files import write_atomic
from instructvideo_kit.measure.evaluate import Evaluation
from instructvideo_kit.measure.metrics import seed_bootstrap
from instructvideo_kit.measure.results import Result

HERE = Path(__file__).resolve().parent
CLEAN = HERE.parent/"results/data-clean.s0.step0000.d10.n32.json"
TOLD = ("reward", "species", "dullness", "blurriness", "watermark", "flicker", "sharpness", "place", "motion")


def by_caption(path, name):
    "Mean of a figure over each caption's clips, captions in order."
    values = Evaluation.load(path).values(name)
    captions = sorted({caption for caption, _ in values})
    return [np.mean([value for key, value in values.items() if key[0] == caption]) for caption in captions]


def change(folders, name, clean):
    "A figure before and after, its change with the interval over tuning seeds and captions, and of clean drawings."
    before, after = (np.array([by_caption(folder/f"{side}.json", name) for folder in folders])
                     for side in ("before", "after"))
    mean, low, high = seed_bootstrap(after - before)
    found = dict(before=before.mean(), after=after.mean(), change=mean, low=low, high=high, clean=clean[name])
    return {k: round(float(v), 4) for k, v in found.items()} | {"seeds": after.mean(1).round(4).tolist()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="what `evaluate` wrote of each seed's run")
    folders, clean = parser.parse_args().folders, Result.load(CLEAN).evaluation.means()
    found = {name: change(folders, name, clean) for name in TOLD}
    print("| figure | before | after | change | 95 % interval | clean drawings |\n|---|---|---|---|---|---|")
    for name, r in found.items():
        interval = f"{r['low']:+} to {r['high']:+}"
        print(f"| {name} | {r['before']} | {r['after']} | {r['change']:+} | {interval} | {r['clean']} |")
    lines = ",\n".join(f'  "{name}": {json.dumps(row)}' for name, row in found.items()) # a line for each figure
    write_atomic(HERE/"demo_seeds.json", f'{{"tuning seeds": {len(folders)}, "figures": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
