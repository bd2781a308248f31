"""Reference solution of project 2: fool the judge on purpose, see it with an observer, mend it, and pay for the mending.

python tutorials/instructor/projects/part2_mend.py [--scenes 24] [--steps 20]
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


def attacked(judge, clip, caption, steps, mending):
    "Every fourth frame of a clip after an attack on the judge, repeated to a whole clip, (f, 3, h, w)."
    frames = [attack(judge, frame, caption, n=steps, **mending).frames[-1] for frame in clip[::4]]
    return torch.stack(frames).repeat_interleave(4, 0)[:len(clip)]


def score(judge, clip, caption):
    with torch.no_grad(): return judge(clip[None, ::4], [caption]).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    chosen = parser.parse_args()
    judge, oracle = ClipReward.from_pretrained("menagerie"), Oracle.from_pretrained("menagerie")
    # each clip under a caption that it does not show: a raised score is an error by construction
    shown = scenes("evaluation", chosen.scenes, seed=12, clean=True)
    clips, captions = render(shown, size=oracle.size), [s.caption for s in shown[1:] + shown[:1]]
    before = [score(judge, clip, caption) for clip, caption in zip(clips, captions)]
    print(f"untouched: score {sum(before)/len(before):+.3f}")
    for name, mending in MENDINGS.items():
        fooled = [attacked(judge, clip, caption, chosen.steps, mending) for clip, caption in zip(clips, captions)]
        after = [score(judge, clip, caption) for clip, caption in zip(fooled, captions)]
        mean, low, high = paired_bootstrap(before, after)
        still = oracle(torch.stack(fooled), [s.caption for s in shown])["species"].mean().item()
        print(f"{name}: score {mean:+.3f} ({low:+.3f} .. {high:+.3f}); the oracle still sees the true subject in {still:.0%}")


if __name__ == "__main__": main()
