#!/usr/bin/env python
"""What the four instructions of InteractiveVideo do, and what they cost.

    python benchmarks/interactive.py                               # all parts, about ten minutes on one core
    python benchmarks/interactive.py --only drag overhead --cases 16

Parts: `painting` (does a red blob painted at a place show there in the clip, by seed, with an interval), `drag` (does
the animal end where the arrow points, against clips without an arrow), `alignment` (the paper's Table 1: are frames
closer to the edited picture and to the text), `aligned` (Eq. 5: what a last layer, fitted on other captions, does to
the frames' closeness to the edited picture), `overhead` (a blended run against two plain runs), `latency` (the paper's
Table 2 beside ours, with memory). Times are medians of runs in turn.
"""
import argparse
import functools
import json
import statistics
from dataclasses import replace
from pathlib import Path

import step
import torch
from diffusers.utils import logging
from PIL import Image

from instructvideo_kit.files import write_atomic
from instructvideo_kit.interactive.alignment import AlignmentHead, fit_head, redrawn
from instructvideo_kit.interactive.blend import lambda_schedule
from instructvideo_kit.interactive.drag import disc, displaced
from instructvideo_kit.interactive.pipeline import InteractivePipeline
from instructvideo_kit.interactive.session import EditSession
from instructvideo_kit.measure.metrics import alignment as cosine
from instructvideo_kit.measure.metrics import paired_bootstrap
from instructvideo_kit.measure.results import weights_hash
from instructvideo_kit.menagerie.arrows import arrow_cases
from instructvideo_kit.menagerie.captions import prompts, scenes
from instructvideo_kit.menagerie.defects import render
from instructvideo_kit.menagerie.oracle import parse
from instructvideo_kit.menagerie.world import Scene
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.reward.clip import ClipReward

PAPER = {"image instruction": .01934, "content instruction": .03147, "motion instruction (the video)": 12.22,
         "trajectory instruction": .07735}
GOAL = .15 # of the frame's width, from the arrow's end


def interval(before, after):
    "Mean paired difference with its 95 % interval."
    mean, low, high = paired_bootstrap(before, after)
    return dict(mean=mean, low=low, high=high)


def redness(clip, where):
    "Mean of red minus the mean of green and blue, in a region, over all frames."
    red = clip[:, :, 0] - clip[:, :, 1:].mean(2)
    return ((red * where).sum() / (where.sum() * clip.shape[1])).item()


def side_of(pipeline):
    "Side of the frames in pixels, and the pixels of a 32nd of it: points below are laid out on 32 by 32 units."
    side = pipeline.size[0]
    return side, side / 32


def painting(pipeline, args):
    "Redness at the painted place, with and without the blob, one seed a pair."
    side, unit = side_of(pipeline)
    scene, at = Scene("fox", "rest", "meadow", 3), (13. * unit, 8. * unit)
    picture, session = render([scene], size=side)[:, 0], EditSession(side, side)
    session.stroke([at], "#e01818", 9 * unit)
    session.mask_stroke([at], 11 * unit)
    painted = session.paint(picture)
    where, elsewhere = disc(at, 4 * unit, (side, side)), 1 - disc(at, 8 * unit, (side, side))
    ways = {**{f"lambda {lam:g}": dict(lam=lam) for lam in (0., .25, .5, .75)},
            "lambda 0, masked": dict(lam=0., mask=session.mask()),
            "lambda 0, masked, hold .6": dict(lam=0., mask=session.mask(), hold=.6),
            "lambda 0, first half of the steps": dict(lam=lambda_schedule("window", args.n_ddim, 0., window=(0, .5))),
            "lambda 0, guidance 1": dict(lam=0., guidance_scale=1.)}
    def go(seed, **k):
        return pipeline.video(picture, scene.caption, seed=seed, n_ddim=args.n_ddim, **k)
    @functools.cache
    def unpainted(**k): return [go(seed, **k) for seed in range(args.seeds)] # with the same guidance
    found = {}
    for name, way in ways.items():
        plain = unpainted(**{k: v for k, v in way.items() if k == "guidance_scale"})
        clips = [go(seed, edited=painted, **way) for seed in range(args.seeds)]
        changes = [((a - b).abs() * elsewhere).mean().item() for a, b in zip(clips, plain)]
        found[name] = dict(interval([redness(c, where) for c in plain], [redness(c, where) for c in clips]),
                           elsewhere=statistics.mean(changes), elsewhere_by_seed=changes)
        print(f"{name}: {found[name]}", flush=True)
    return dict(seeds=args.seeds, of_the_blob=redness(painted[None], where) - redness(picture[None], where), ways=found)


def drag(pipeline, args):
    "Share of cases that end near the arrow's end, with the arrow and without."
    cases, found = arrow_cases(args.cases, args.case_seed, size=side_of(pipeline)[0]), {}
    ways = {"no arrow": {}, **{f"arrow, follow {share:g}": dict(follow=share) for share in args.follow}}
    for name, way in ways.items():
        def go(i, c, way=way):
            return pipeline.video(c.clip[:1], c.scene.caption, drags=[c.drag] if way else (), seed=i,
                                  n_ddim=args.n_ddim, **way)[0]
        far = [c.distance(go(i, c)) for i, c in enumerate(cases)]
        found[name] = dict(hits=sum(d <= GOAL for d in far) / len(far), distance=statistics.mean(far), distances=far)
        print(f"{name}: {found[name]['hits']:.0%} of {len(far)} within {GOAL:.0%} of the frame, mean distance "
              f"{found[name]['distance']:.3f}", flush=True)
    far = [c.distance(displaced(c.clip[:1], [c.drag], len(c.clip))[0][0]) for c in cases]
    return dict(goal=GOAL, cases=args.cases, case_seed=args.case_seed, ways=found,
                displaced_clip=sum(d <= GOAL for d in far) / len(far))


def another_animal(pipeline, args):
    "Scenes, pictures in which another animal stands, and those pictures with the right one, by the image stage."
    wanted = [parse(caption) for caption in prompts(args.captions, "evaluation", "in-domain")]
    others = [replace(scene, species=wanted[i - 1].species, seed=i) for i, scene in enumerate(wanted)]
    pictures = [render([other], size=side_of(pipeline)[0])[:, 0] for other in others]
    edits = [pipeline.image(scene.caption, picture, .8, seed=i, n_ddim=args.n_ddim)
             for i, (scene, picture) in enumerate(zip(wanted, pictures))]
    return wanted, pictures, edits


def alignment(pipeline, args):
    """Cosine of a clip's frames with the edited picture and with the text: another animal stands in the picture, the
    edit draws the one the text names. By caption."""
    judge, found = ClipReward.from_pretrained("menagerie"), {}
    wanted, pictures, edits = another_animal(pipeline, args)
    targets = {"image": judge.image_features(torch.stack(edits, 1))[0],
               "text": judge.text_features([scene.caption for scene in wanted])}
    def cosines(**way):
        "By target, one number for each caption."
        clips = [pipeline.video(picture, scene.caption, seed=i, n_ddim=args.n_ddim,
                                **(dict(way, edited=edit) if way else {}))
                 for i, (scene, picture, edit) in enumerate(zip(wanted, pictures, edits))]
        seen = judge.image_features(torch.cat(clips))
        return {name: cosine(seen, target).tolist() for name, target in targets.items()}
    plain = cosines()
    for lam in (.75, .5, .25, 0.):
        blended = cosines(lam=lam)
        found[f"lambda {lam:g}"] = {name: dict(interval(plain[name], blended[name]),
            without=statistics.mean(plain[name]), blended=statistics.mean(blended[name])) for name in targets}
        print(f"lambda {lam:g}: {found[f'lambda {lam:g}']}", flush=True)
    return dict(captions=args.captions, ways=found)


def aligned(pipeline, args):
    "Cosine of a blended clip's frames with the edited picture, after a head of Eq. 5 and before, by caption."
    judge, chosen = ClipReward.from_pretrained("menagerie"), scenes("tune", 24, seed=9, clean=True)
    clips, texts = render(chosen, size=side_of(pipeline)[0]), [scene.caption for scene in chosen]
    drawn = torch.cat([redrawn(pipeline.i2v, clips[i:i + 8], texts[i:i + 8], seed=i) for i in range(0, len(clips), 8)])
    heads = {"letter": AlignmentHead(skip=False), "skip": AlignmentHead(16)}
    for head in heads.values(): fit_head(head, drawn, clips, 250)
    wanted, pictures, edits = another_animal(pipeline, args)
    edited = torch.cat(edits)
    blended = torch.cat([pipeline.video(picture, scene.caption, edit, lam=.5, seed=i, n_ddim=args.n_ddim)
                         for i, (scene, picture, edit) in enumerate(zip(wanted, pictures, edits))]).float()
    target = judge.image_features(edited[None])[0]
    def cosines(clip): return cosine(judge.image_features(clip.clamp(0, 1)), target).tolist()
    before, found = cosines(blended), {}
    for name, head in heads.items():
        with torch.no_grad(): after = cosines(head(blended, edited))
        found[name] = dict(interval(before, after), without=statistics.mean(before), aligned=statistics.mean(after))
        print(f"{name}: {found[name]}", flush=True)
    return dict(captions=args.captions, fitted_on=len(clips), ways=found)


def overhead(pipeline, args):
    "Seconds of a blended run against those of two plain runs."
    scene = Scene("fox", "rest", "meadow", 3)
    picture = render([scene], size=side_of(pipeline)[0])[:, 0]
    painted = (picture + .3).clamp(0, 1)
    def one(image, **k):
        return pipeline.video(image, scene.caption, n_ddim=4, **k)
    def two():
        one(picture)
        one(painted)
    times = step.in_turn({"two plain runs": two, "blended, shared": lambda: one(picture, edited=painted, lam=.5),
                          "blended, two latents": lambda: one(picture, edited=painted, lam=.5, reading="two_latents")},
                          args.repeats, args.device)
    return dict(seconds=times,
                ratio={name: t / times["two plain runs"] for name, t in times.items() if name != "two plain runs"})


def latency(pipeline, args):
    "Seconds of each instruction and of the two stages, and peak memory of a video."
    photo = Image.effect_noise((512, 512), 60).convert("RGB")
    scene = Scene("fox", "rest", "meadow", 3)
    device, words = args.device, iter(range(10 ** 6))
    side, unit = side_of(pipeline)
    picture, session = render([scene], size=side)[:, 0], EditSession(side, side)
    def content():
        "A stroke is painted and a caption nobody has read yet is read."
        session.stroke([(x * unit, y * unit) for x, y in ((4, 4), (9, 20), (28, 12))], "red", 3 * unit)
        session.paint(picture)
        pipeline.i2v.embed([f"a fox {next(words)}"])
    arrow = (10. * unit, 10. * unit), (20. * unit, 16. * unit), 8. * unit
    def trajectory(): pipeline.target(picture, picture, [arrow], torch.tensor(1.))
    calls = {"image instruction": lambda: pipeline.i2v.image_latents(pipeline.to_image(photo)),
             "content instruction": content, "trajectory instruction": trajectory}
    times = step.in_turn(calls, 5 * args.repeats, device)
    made = {"motion instruction (the video)": lambda: pipeline.video(picture, scene.caption, n_ddim=args.n_ddim),
            "the video, blended": lambda: pipeline.video(picture, scene.caption, picture.flip(-1), lam=.5,
                                                         n_ddim=args.n_ddim),
            "image stage, strength .6": lambda: pipeline.image(scene.caption, picture, n_ddim=args.n_ddim)}
    if pipeline.t2v is None: del made["image stage, strength .6"]
    times |= step.in_turn(made, args.repeats, device)
    memory = {name: step.peak_memory(call, device) for name, call in made.items()}
    process = {name: step.process_memory(call) for name, call in made.items()} if device == "cpu" else {}
    return dict(seconds=times, paper=PAPER, memory_mib=memory, process_mib=process, n_ddim=args.n_ddim)


def table(found):
    "Table 2 of the paper beside ours, as markdown."
    def name(seconds):
        return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
    rows = [f"| {what} | {name(PAPER[what]) if what in PAPER else '-'} | {name(t)} | "
            f"{found['memory_mib'].get(what, 0) or '-':.4} |" for what, t in found["seconds"].items()]
    return "\n".join(["| process | paper, RTX 4090 | here | peak MiB of tensors |", "|---|---|---|---|", *rows])


PARTS = {"painting": painting, "drag": drag, "alignment": alignment, "aligned": aligned, "overhead": overhead,
         "latency": latency}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="menagerie-i2v",
                        help="image-to-video policy: a shipped name or a pipeline directory")
    parser.add_argument("--images", default="menagerie", help="text-to-video policy of the image stage")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--seeds", type=int, default=16, help="of painting")
    parser.add_argument("--captions", type=int, default=32, help="of alignment and aligned")
    parser.add_argument("--cases", type=int, default=32, help="of drag")
    parser.add_argument("--case-seed", type=int, default=0,
                        help="which arrows; 0 is the set that the filling of the hole was chosen on")
    parser.add_argument("--follow", type=float, nargs="+", default=[.8],
                        help="shares of the steps that follow the arrow")
    parser.add_argument("--n-ddim", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--clock", choices=step.CLOCKS, default="wall",
                        help="cpu: processor time, for a machine that is busy with other things")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark/interactive.json"),
                        help="JSON file; parts that are not measured again stay in it")
    args = parser.parse_args()
    logging.set_verbosity_error()
    step.clock, dtype = step.CLOCKS[args.clock], {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    pipeline = InteractivePipeline(*(VideoPolicy.from_pretrained(name, dtype, args.device)
                                     for name in (args.policy, args.images)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    about = dict(policy=pipeline.i2v.name, weights=weights_hash(args.policy, "policy"), device=args.device,
                 dtype=args.dtype, clock=args.clock, torch=torch.__version__, threads=torch.get_num_threads(),
                 n_ddim=args.n_ddim)
    for part in args.only:
        found[part] = dict(PARTS[part](pipeline, args), about=about)
        write_atomic(args.out, json.dumps(found, indent=1))
    if "overhead" in args.only: print({name: round(ratio, 3) for name, ratio in found["overhead"]["ratio"].items()})
    if "latency" in args.only: print(table(found["latency"]))
    print(f"written to {args.out}")


if __name__ == "__main__": main()
