"""How many votes does a taste take? Five known tastes, active and random pairs, on captions nobody voted on.

    python reproduction/feedback.py                     # draws a pool (6 minutes of one core), then votes (4 minutes)
    python reproduction/feedback.py --pool runs/pool    # a pool that is there already

Writes reproduction/feedback/curves.json and curves.png."""
import argparse, json, time
from pathlib import Path

import numpy as np

from instructvideo_kit.feedback.experiment import learning_curve
from instructvideo_kit.feedback.pool import Pool, draw_pool
from instructvideo_kit.feedback.raters import TASTES, SimulatedRater, standard, taste_of
from instructvideo_kit.feedback.reward import JudgeFeatures
from instructvideo_kit.files import write_atomic


def open_pool(folder, policy, captions):
    "The pool of a folder, drawn when there is none."
    if (folder/"pool.json").exists(): return Pool.open(folder)
    from instructvideo_kit.menagerie.captions import prompts
    from instructvideo_kit.policy import VideoPolicy
    return draw_pool(folder, VideoPolicy.from_pretrained(policy), prompts(captions, "tune", seed=5), 4, n_ddim=10)


def curves(pool, features, phi, seeds, votes, within, tested):
    "{taste: {active: [{votes, accuracy, calibration, needed} per seed]}}"
    clips, found = pool.pixels(), {}
    shipped = sum(standard(phi[:, i]) for i in range(features.shipped))
    for name in TASTES:
        taste, found[name] = taste_of(name, judge=lambda *_: shipped), {"active": [], "random": []}
        for how, rows in found[name].items():
            for seed in range(seeds):
                rater = SimulatedRater(name, taste, seed=seed).look(clips, pool.captions)
                curve = learning_curve(phi, pool.captions, rater, features.blocks, how == "active", votes,
                                       shipped=features.shipped, within=within, seed=seed, tested=tested)
                rows.append(dict(votes=curve.votes, accuracy=curve.accuracy, calibration=curve.calibration,
                                 needed=curve.needed()))
        print(name, {how: summary(rows) for how, rows in found[name].items()}, flush=True)
    return found


def summary(rows):
    "Median votes needed (beyond the last point where a seed never got there), accuracy and calibration after 60."
    last = rows[0]["votes"][-1]
    needed = float(np.median([r["needed"] if r["needed"] is not None else last + 1 for r in rows]))
    at = rows[0]["votes"].index(60) if 60 in rows[0]["votes"] else -1
    mean = lambda what: round(float(np.mean([r[what][at] for r in rows])), 3)
    return dict(needed=needed if needed <= last else f"> {last}", reached=sum(r["needed"] is not None for r in rows),
                accuracy_60=mean("accuracy"), calibration_60=mean("calibration"))


def draw(found, path):
    "Accuracy over votes, a panel for each taste."
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, len(found), figsize=(3*len(found), 2.8), sharey=True)
    for ax, (name, ways) in zip(axes, found.items()):
        for how, rows in ways.items():
            all_seeds = np.array([r["accuracy"] for r in rows])
            ax.plot(rows[0]["votes"], all_seeds.mean(0), label=how)
            ax.fill_between(rows[0]["votes"], all_seeds.min(0), all_seeds.max(0), alpha=.2)
        ax.axhline(.8, color="grey", lw=.8)
        ax.set(title=name, xlabel="votes", ylim=(.2, 1))
    axes[0].set_ylabel("held-out pairs right")
    axes[0].legend()
    fig.tight_layout()
    fig.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, default=Path("runs/feedback-pool"))
    parser.add_argument("--policy", default="menagerie")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--votes", type=int, default=120)
    parser.add_argument("--within", action="store_true", help="ask about pairs of one caption only")
    parser.add_argument("--tested", choices=("any", "within"),
                        help="test on any pairs or on those of one caption; as asked by default")
    parser.add_argument("--out", type=Path, default=Path("reproduction/feedback"))
    given = parser.parse_args()
    tested = given.within if given.tested is None else given.tested == "within"
    pool, began = open_pool(given.pool, given.policy, given.captions), time.perf_counter()
    features = JudgeFeatures.from_pretrained()
    found = curves(pool, features, features.of(pool.pixels(), pool.captions), given.seeds, given.votes, given.within,
                   tested)
    about = dict(clips=len(pool), captions=len(set(pool.captions)), model=pool.model, within=given.within,
                 tested_within=tested, seconds=round(time.perf_counter() - began))
    name = "curves_within" if given.within else "curves_tested_within" if tested else "curves"
    told = {taste: {how: summary(rows) for how, rows in ways.items()} for taste, ways in found.items()}
    write_atomic(given.out/f"{name}.json", json.dumps(dict(about=about, summary=told, curves=found), indent=1))
    draw(found, given.out/f"{name}.png")


if __name__ == "__main__": main()
