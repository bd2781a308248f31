"""Reference solution of project 2: fool the judge on purpose, see it with an observer, mend the search, compare.

python tutorials/instructor/projects/part2_mend.py [--scenes 24] [--steps 20] [--rate .004]
"""
import argparse

import torch

from instructvideo_kit.measure.metrics import paired_bootstrap
from instructvideo_kit.menagerie.captions import scenes
from instructvideo_kit.menagerie.defects import render
from instructvideo_kit.menagerie.oracle import Oracle
from instructvideo_kit.reward.clip import ClipReward
from instructvideo_kit.widgets.hacking import attack

MENDINGS = {"as it is": {}, "shifted copies": dict(shift=2), "shifted and noisy copies": dict(shift=2, noise=.03)}


def best_frame(found):
    "The frame with the highest score on the way: any noise on a clean drawing is punished, so steps may lose."
    return found.frames[torch.tensor(found.scores).argmax()]


def attacked(judge, clip, caption, steps, rate, mending):
    "Every fourth frame of a clip after an attack on the judge, repeated to a whole clip, (f, 3, h, w)."
    frames = [best_frame(attack(judge, frame, caption, steps, rate, **mending)) for frame in clip[::4]]
    return torch.stack(frames).repeat_interleave(4, 0)[:len(clip)]


def score(judge, clip, caption):
    with torch.no_grad(): return judge(clip[None, ::4], [caption]).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=.004, help="how far each pixel moves in a step")
    chosen = parser.parse_args()
    judge, oracle = ClipReward.from_pretrained("menagerie"), Oracle.from_pretrained("menagerie")
    # each clip under a caption that it does not show: a raised score is an error by construction
    shown = scenes("evaluation", chosen.scenes, seed=12, clean=True)
    clips, captions = render(shown, size=oracle.size), [s.caption for s in shown[1:] + shown[:1]]
    before = [score(judge, clip, caption) for clip, caption in zip(clips, captions)]
    print(f"untouched: score {sum(before)/len(before):+.3f}")
    for name, mending in MENDINGS.items():
        options = chosen.steps, chosen.rate, mending
        fooled = [attacked(judge, clip, caption, *options) for clip, caption in zip(clips, captions)]
        after = [score(judge, clip, caption) for clip, caption in zip(fooled, captions)]
        mean, low, high = paired_bootstrap(before, after)
        still = oracle(torch.stack(fooled), [s.caption for s in shown])["species"].mean().item()
        print(f"{name}: score {mean:+.3f} ({low:+.3f} .. {high:+.3f}); oracle: the true subject in {still:.0%}")


if __name__ == "__main__": main()
