"""The whole loop with known tastes: votes, reward, tuning, and what the true taste says of it on captions nobody saw.

    python reproduction/taste_loop.py                        # five tastes x five seeds, 60 votes, own and contrary
    python reproduction/taste_loop.py --figure               # over-optimisation: 20 to 1000 votes, each anchor
    python reproduction/taste_loop.py --quick                # a minute: does it run?
    python reproduction/taste_loop.py --summary              # nothing new: table and picture of what is there

One JSON line per run in OUT/loop.jsonl, written when the run is done; a run whose line is there (same taste, direction,
seed, votes, anchor, algorithm, model, steps and rate) is skipped, one that was cut off begins again. Beside it
OUT/strips (a picture of each run), OUT/loop.json (intervals over seeds and captions, subjects found), OUT/claims.json
(the same for the scoreboard) and OUT/loop.png. The direction is own (tuned to this taste) or contrary (tuned to its
opposite, asked about the same taste); the anchor is what holds the model near its base: none, a data term, a pull to
the base (kl), or both. Look at the strips: a taste may rise and the clips be lost."""
import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from instructvideo_kit.app import open_oracle
from instructvideo_kit.feedback.fit import accuracy, fit_votes, prior_head
from instructvideo_kit.feedback.loop import taste_change, taste_config, tune_taste
from instructvideo_kit.feedback.pairs import active_pairs, candidate_pairs
from instructvideo_kit.feedback.pool import Pool, draw_pool
from instructvideo_kit.feedback.raters import TASTES, SimulatedRater, standard, taste_of
from instructvideo_kit.feedback.reward import JudgeFeatures, VoteReward
from instructvideo_kit.feedback.session import pool_features
from instructvideo_kit.feedback.votes import VOTES, append_line
from instructvideo_kit.files import KitError, atomic, write_atomic
from instructvideo_kit.machine import fast_dtype, fast_precision
from instructvideo_kit.measure.execute import parse_shard
from instructvideo_kit.measure.metrics import seed_bootstrap
from instructvideo_kit.menagerie.captions import prompts, scenes
from instructvideo_kit.menagerie.defects import render
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.tuning.distance import BaseDistance
from instructvideo_kit.video import film_strip

PULLS = {"nft": "lam_ref", "grpo": "beta"} # the field that weighs the pull to the base, where an algorithm has one
DIRECTIONS = ("own", "contrary")
ANCHORS = ("none", "data", "kl", "data+kl")
BATCHES = 12 # fits on the way to the last vote


def known_tastes(features):
    "name -> callable (clips, captions) -> (n,); contrary: against the shipped judges."
    def shipped(clips, captions): return features.of(clips, captions)[:, :features.shipped].sum(1)
    return {name: taste_of(name, judge=shipped) for name in TASTES}


def turned(taste): return lambda clips, captions: -taste(clips, captions)


def voted(rater, phi, captions, features, votes, seed):
    "Active votes of a rater who has looked at the pool: (first, second, vote), and the head fitted to them."
    head, asked, at_once = prior_head(phi, features.blocks, features.shipped), [], max(1, -(-votes//BATCHES))
    while len(asked) < votes:
        taken = [(a, b) for a, b, _ in asked]
        candidates = candidate_pairs(captions, False, 3000, seed + len(asked), taken)
        pairs = active_pairs(head, phi, candidates, min(at_once, votes - len(asked)))
        asked += [(a, b, VOTES[rater.answer(a, b)]) for a, b in pairs.tolist()]
        if any(v for _, _, v in asked): head = fit_votes(phi, *zip(*asked), features.blocks, features.shipped)
    return head


def held_out_accuracy(head, phi, captions, utility, seed):
    "How often the head orders two clips of the pool as the true taste does; seen and unseen pairs."
    pairs = candidate_pairs(captions, False, 1000, 10_000 + seed)
    truth = (utility[pairs[:, 0]] - utility[pairs[:, 1]]).sign().long()
    return accuracy(head, phi, pairs[:, 0], pairs[:, 1], truth)["accuracy"]


class World:
    "What all runs share: model, judges, pool, held-out captions, tuning data, and the clips of the base."
    def __init__(self, given):
        self.given = given
        self.policy = VideoPolicy.from_pretrained(given.policy, dtype=fast_dtype())
        self.features = JudgeFeatures.from_pretrained()
        self.pool = self.open_pool()
        self.phi = pool_features(self.pool, self.features)
        self.tastes = known_tastes(self.features)
        self.captions = prompts(given.held_out, "evaluation", seed=7)
        self.before = self.draw()
        self.oracle = open_oracle(self.policy, self.captions)
        looked = {name: taste(self.pool.pixels(), self.pool.captions) for name, taste in self.tastes.items()}
        self.deviation = {name: float(torch.as_tensor(u).double().std()) for name, u in looked.items()}
        self.looked = looked

    def open_pool(self):
        if (self.given.pool/"pool.json").exists(): return Pool.open(self.given.pool)
        chosen = prompts(self.given.captions, "tune", seed=5)
        return draw_pool(self.given.pool, self.policy, chosen, 4, self.given.n_ddim)

    def draw(self):
        "The held-out captions, always from the same noise."
        noise = self.policy.noise(range(len(self.captions)), 12345)
        return self.policy.generate(self.captions, self.given.n_ddim, noise=noise).cpu()

    def subjects(self, clips):
        "Share of the clips in which the oracle finds what the caption names; nothing where it does not know the world."
        if self.oracle is None: return {}
        return dict(species=torch.as_tensor(self.oracle(clips, self.captions)["species"]).double().mean().item())

    def data(self, anchor):
        "Captions, or clips with their captions where a data term wants them."
        if "data" not in anchor: return prompts(48, "tune", seed=9)
        chosen = scenes("tune", 48, seed=9)
        n, side = self.policy.n_frames, max(32, self.policy.size[0]) # a watermark needs its pixels
        clips = render(chosen, n_frames=n, size=side)
        if (side, side) != tuple(self.policy.size): clips = resized(clips, self.policy.size)
        return list(zip(clips, [s.caption for s in chosen]))

    def reward(self, job):
        "The reward that a known rater's votes make, and how right it is."
        taste, sign = self.tastes[job["taste"]], 1 if job["direction"] == "own" else -1
        rater = SimulatedRater(job["taste"], taste if sign > 0 else turned(taste), seed=job["seed"])
        rater.utility = sign*standard(self.looked[job["taste"]])
        head = voted(rater, self.phi, self.pool.captions, self.features, job["votes"], job["seed"])
        right = held_out_accuracy(head, self.phi, self.pool.captions, rater.utility, job["seed"])
        return VoteReward(self.features, head, f"{job['taste']} {job['direction']}"), right


def resized(clips, size):
    "Clips (n, f, 3, h, w) at another size."
    n = clips.shape[1]
    small = torch.nn.functional.interpolate(clips.flatten(0, 1), tuple(size), mode="bilinear", antialias=True)
    return small.unflatten(0, (-1, n)).clamp(0, 1)


def fields_of(given, job, anchor):
    "Settings of a run beyond its preset."
    found = dict(steps=given.steps, batch=given.batch, seed=job["seed"], n_ddim=given.tune_ddim, distance_every=0)
    found |= dict(eval_every=given.every, save_every=given.every, lr=given.lr)
    if "data" in anchor: found |= dict(data_term=given.data_term)
    if "kl" in anchor: found |= {PULLS[given.algorithm]: given.pull}
    return found


def run(world, job):
    "One line: the votes, the reward, the run, and at each mark distance, learned reward and true taste."
    given, began = world.given, time.perf_counter()
    reward, right = world.reward(job)
    taste, deviation = world.tastes[job["taste"]], world.deviation[job["taste"]]
    fields = fields_of(given, job, job["anchor"])
    config = taste_config(given.algorithm, world.policy.n_frames, **fields)
    measured = BaseDistance(world.policy, world.captions, config)
    with torch.no_grad(): scored = reward.score(world.before, world.captions)
    spread = reward.head(world.phi.double()).std().item()
    changes, name = {}, "-".join(str(v) for v in job.values())
    def mark(policy, step):
        after = world.draw() if step else world.before # the new adapter adds nothing yet
        with torch.no_grad(): learned = (reward.score(after, world.captions) - scored).double()/spread
        changes[step] = taste_change(world.before, after, world.captions, taste, deviation)
        if step: save_strip(given.out/"strips"/(name + ".png"), world.before, after)
        numbers = dict(distance=measured(), learned=learned.mean().item(), true=changes[step].mean().item())
        return numbers | world.subjects(after)
    folder = given.out/"runs"/name
    shutil.rmtree(folder, ignore_errors=True) # a run that was cut off left no line: begin it again
    done = tune_taste(world.policy, reward, world.data(job["anchor"]), given.algorithm, folder, mark, False, **fields)
    marks = done.rows("eval")
    last = [round(v, 4) for v in changes[done.steps].tolist()]
    strip_lora(world.policy)
    shutil.rmtree(folder, ignore_errors=True)
    names = [k for k in ("step", "distance", "learned", "true", "species") if all(k in m for m in marks)]
    about = dict(**job, algorithm=given.algorithm, model=world.policy.name, precision=fast_precision(),
                 steps=done.steps, lr=config.lr, reward_accuracy=right)
    return {**about, "marks": {k: [m[k] for m in marks] for k in names}, "change": last,
            "seconds": round(time.perf_counter() - began)}


def save_strip(path, before, after, n=8):
    "The middle frames of the first n held-out captions, from the same noise: before above, after below."
    middle = before.shape[1]//2
    rows = [before[:n, middle], after[:n, middle]]
    with atomic(path) as beside: film_strip(rows, every=1, scale=2, labels=["before", "after"]).save(beside, "PNG")


def strip_lora(policy):
    "Take the adapters away without adding them to the weights."
    policy.network.unload_lora()


def jobs_of(given):
    "Every combination that was asked for."
    if given.figure: combinations = [("own", v, a) for v in given.votes for a in given.anchors]
    else: combinations = [(direction, 12 if given.quick else 60, "none") for direction in given.directions]
    names = ("taste", "direction", "seed", "votes", "anchor")
    jobs = [dict(zip(names, (taste, direction, seed, votes, anchor)))
            for seed in range(given.seeds) for direction, votes, anchor in combinations for taste in given.tastes]
    i, n = parse_shard(given.shard)
    return jobs[i::n]


def lines_of(path):
    "What was measured already; a line that was cut off is left out."
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try: rows.append(json.loads(line))
        except ValueError: print(f"{path}: a damaged line is left out and run again")
    return rows


KEY = ("taste", "direction", "seed", "votes", "anchor", "algorithm", "model", "steps", "lr")

def key_of(row): return tuple(row.get(k) for k in KEY) # older lines name no rate


def summary(rows):
    "Mean change of the true taste with its interval over seeds and captions; a row for each kind of run."
    groups, names = {}, ("taste", "direction", "votes", "anchor", "steps", "lr")
    for r in rows: groups.setdefault(tuple(r.get(k) for k in names), []).append(r)
    found = []
    for kind, runs in sorted(groups.items()):
        changes = [r["change"] for r in runs]
        row = dict(zip(names, kind), seeds=len(changes), change=round(float(np.mean(changes)), 3))
        row |= subjects_of(runs)
        if len(changes) > 1:
            low, high = seed_bootstrap(np.array(changes))[1:]
            row |= dict(low=round(low, 3), high=round(high, 3))
        found.append(row)
    return found


def figures_of(found):
    "What the claims of the scoreboard read: how far each true taste moved towards it; tuned to its opposite, away."
    figures = {}
    for row in found:
        if "low" not in row: continue
        towards = row["direction"] == "own"
        name = f"{row['taste']}_{'up' if towards else 'down'}"
        ends = (row["low"], row["high"]) if towards else (-row["high"], -row["low"])
        figures[name] = dict(value=row["change"]*(1 if towards else -1), low=ends[0], high=ends[1], seeds=row["seeds"])
    return figures


def subjects_of(runs):
    "Share of clips in which the oracle finds the subject, before and after; nothing where it was not asked."
    asked = [r["marks"]["species"] for r in runs if "species" in r.get("marks", {})]
    if not asked: return {}
    return dict(species_before=round(float(np.mean([s[0] for s in asked])), 3),
                species_after=round(float(np.mean([s[-1] for s in asked])), 3))


def draw_tastes(found, path):
    "Change of each true taste with its interval, and beside it the subjects that the oracle finds, before and after."
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    rows = [r for r in found if "low" in r]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, .9 + .4*len(rows)), sharey=True, layout="constrained")
    for y, r in enumerate(rows):
        left.plot([r["low"], r["high"]], [y, y], color="#1b7f79", lw=2.5)
        left.plot(r["change"], y, "o", color="#1b7f79")
        if "species_after" not in r: continue
        right.plot([r["species_before"], r["species_after"]], [y, y], color="#bbbbbb", lw=1.5, zorder=0)
        right.plot(r["species_before"], y, "o", mfc="white", color="#444444", label="before" if y == 0 else None)
        right.plot(r["species_after"], y, "o", color="#e06c32", label="after" if y == 0 else None)
    names = [r["taste"] if r["direction"] == "own" else f"opposite of {r['taste']}" for r in rows]
    left.set_yticks(range(len(rows)), names)
    left.axvline(0, color="#444444", lw=.8)
    left.invert_yaxis()
    left.set(xlabel="change of the true taste, in deviations of the pool", title="95 % interval: seeds and captions")
    right.set(xlabel="share of clips with the subject of the caption", xlim=(0, 1), title="what the oracle finds")
    if right.lines: right.legend(fontsize=8, frameon=False)
    for ax in (left, right): ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=90)


def mean_marks(rows, votes, anchor):
    "The marks of all own runs of a kind, a mean over them; nothing where there are none."
    runs = [r["marks"] for r in rows if (r["direction"], r["votes"], r["anchor"]) == ("own", votes, anchor)]
    if not runs: return {}
    n = min(len(m["step"]) for m in runs)
    names = [k for k in ("distance", "learned", "true", "species") if all(k in m for m in runs)]
    return {k: np.mean([m[k][:n] for m in runs], 0) for k in names}


def draw_figure(rows, path):
    "Learned reward (dashed), true taste (solid) and subjects over the distance from the base; a column per votes."
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    columns = sorted({r["votes"] for r in rows if r["direction"] == "own"})
    shape = dict(figsize=(1 + 3.6*len(columns), 5), height_ratios=(3, 2), layout="constrained")
    fig, axes = plt.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False, **shape)
    colours = dict(zip(ANCHORS, ("#444444", "#1b7f79", "#e06c32", "#7a5ea8")))
    for (above, below), votes in zip(axes.T, columns):
        for anchor, colour in colours.items():
            mean = mean_marks(rows, votes, anchor)
            if not mean: continue
            above.plot(mean["distance"], mean["learned"], "--o", ms=2, color=colour, lw=1, label=f"{anchor}: learned")
            above.plot(mean["distance"], mean["true"], "-o", ms=3, color=colour, label=f"{anchor}: true")
            if "species" in mean: below.plot(mean["distance"], mean["species"], "-o", ms=3, color=colour)
        above.axhline(0, color="#999999", lw=.6)
        above.set(title=f"{votes} votes")
        below.set(xlabel="distance from the base (mean square)", ylim=(0, 1))
        below.set_xscale("symlog", linthresh=3e-3) # a data term keeps a run many times nearer
        for ax in (above, below): ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("change, deviations of the pool")
    axes[1, 0].set_ylabel("subjects found")
    axes[0, 0].legend(title="anchor: reward", fontsize=8, frameon=False)
    fig.savefig(path, dpi=90)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="menagerie", help="the model that is tuned")
    parser.add_argument("--pool", type=Path, default=Path("runs/taste-pool"), help="drawn when it is not there")
    parser.add_argument("--captions", type=int, default=48, help="of the pool, four clips each")
    parser.add_argument("--tastes", nargs="+", choices=TASTES, default=list(TASTES))
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shard", default="1/1", help="the part of the runs this process takes, such as 2/2")
    parser.add_argument("--held-out", type=int, default=48, help="captions on which the true taste is asked")
    parser.add_argument("--algorithm", default="draft", help="draft, nft, grpo ...")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, help="learning rate; 1e-3 for draft, else the preset's")
    parser.add_argument("--batch", type=int, help="clips of an update; the preset's by default")
    parser.add_argument("--n-ddim", type=int, default=10, help="steps of the clips that are judged")
    parser.add_argument("--tune-ddim", type=int, help="steps of the clips that are tuned on; the preset's by default")
    parser.add_argument("--every", type=int, default=15, help="updates between two marks")
    parser.add_argument("--figure", action="store_true", help="the over-optimisation figure")
    parser.add_argument("--votes", nargs="+", type=int, default=[20, 60, 200, 1000], help="of the figure")
    parser.add_argument("--anchors", nargs="+", choices=ANCHORS, help="of the figure; all that the algorithm has")
    parser.add_argument("--data-term", type=float, default=1.0, help="weight of the diffusion loss on real clips")
    parser.add_argument("--pull", type=float, default=.01, help="weight of the pull to the base (kl)")
    parser.add_argument("--quick", action="store_true", help="a minute: two tastes, one seed, few of everything")
    parser.add_argument("--summary", action="store_true", help="only table and picture of what is there")
    parser.add_argument("--out", type=Path, default=Path("reproduction/feedback"))
    given = parser.parse_args()
    given.anchors = given.anchors or [a for a in ANCHORS if "kl" not in a or given.algorithm in PULLS]
    if any("kl" in a for a in given.anchors) and given.algorithm not in PULLS:
        raise KitError(f"{given.algorithm} has no pull to the base; expected {' or '.join(PULLS)} for the anchor kl")
    return quick(given) if given.quick else given


def quick(given):
    "Small enough for a minute, in a place of its own."
    given.tastes, given.seeds, given.captions, given.held_out = ["warm", "slow"], 1, 6, 4
    given.steps, given.batch, given.every, given.n_ddim, given.tune_ddim = 4, 2, 2, 4, 4
    given.pool, given.out = Path("runs/taste-quick/pool"), Path("runs/taste-quick")
    return given


def main():
    given = arguments()
    path = given.out/"loop.jsonl"
    if not given.summary: measure(given, path)
    rows = lines_of(path)
    if not rows: raise KitError(f"{path} holds no line yet")
    found = summary(rows)
    write_atomic(given.out/"loop.json", json.dumps(found, indent=1))
    several = len({(r["votes"], r["anchor"]) for r in rows}) > 1 # the over-optimisation figure was asked for
    if several: draw_figure(rows, given.out/"loop.png")
    else:
        write_atomic(given.out/"claims.json", json.dumps({"figures": figures_of(found)}, indent=1) + "\n")
        draw_tastes(found, given.out/"loop.png")
    for row in found: print(row)


def measure(given, path):
    "Run what has no line yet."
    given.out.mkdir(parents=True, exist_ok=True)
    world = World(given)
    there = {key_of(r) for r in lines_of(path)}
    lr = given.lr or taste_config(given.algorithm, world.policy.n_frames).lr
    settings = dict(algorithm=given.algorithm, model=world.policy.name, steps=given.steps, lr=lr)
    for job in jobs_of(given):
        if key_of({**job, **settings}) in there: continue
        row = run(world, job)
        append_line(path, row)
        told = {k: row[k] for k in ("taste", "direction", "seed", "votes", "anchor", "seconds")}
        print(told, f"true {row['marks']['true'][-1]:+.2f}, learned {row['marks']['learned'][-1]:+.2f}", flush=True)


if __name__ == "__main__":
    try: main()
    except KitError as error: raise SystemExit(f"taste_loop: {error}") from None
