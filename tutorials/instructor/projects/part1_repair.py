"""Reference solution of project 1: at which noise level is a defect repaired, and at which is the clip lost?

python tutorials/instructor/projects/part1_repair.py [--scenes 12] [--steps 20]
"""
import argparse

import torch

from instructvideo_kit.measure.metrics import paired_bootstrap
from instructvideo_kit.menagerie.captions import scenes
from instructvideo_kit.menagerie.defects import render
from instructvideo_kit.menagerie.world import Scene
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.reward.clip import ClipReward
from instructvideo_kit.widgets.tau import tau_edit

TAUS = (.2, .4, .6, .8, 1.)


def pair(scene, defect, policy):
    "The same scene clean and spoilt, (2, f, 3, h, w)."
    both = [Scene(scene.species, scene.motion, scene.place, scene.seed, spoilt) for spoilt in ((), ((defect, .8),))]
    return render(both, n_frames=policy.n_frames, size=policy.size[0])


def likeness(a, b):
    "Correlation of two clips over all their numbers."
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@torch.no_grad()
def measure(scene, defect, policy, judge, n_ddim):
    "Of one scene: the judge's score of the spoilt clip, of the clean one, and score and likeness after each edit."
    clean, spoilt = pair(scene, defect, policy)
    edited = [edit.edited for edit in tau_edit(policy, spoilt, scene.caption, TAUS, n_ddim, seed=scene.seed % 1000)]
    clips = torch.stack([spoilt, clean, *edited])
    scores = judge(clips[:, ::4], [scene.caption]*len(clips)).mean(1).tolist()
    return scores, [likeness(clean, clip) for clip in edited]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--defects", nargs="+", default=["dull", "blur", "noise"])
    chosen = parser.parse_args()
    policy, judge = VideoPolicy.from_pretrained("menagerie"), ClipReward.from_pretrained("menagerie")
    # held-out captions in the order in which they are drawn, none chosen
    asked = scenes("evaluation", chosen.scenes, seed=11, clean=True)
    for defect in chosen.defects:
        found = [measure(scene, defect, policy, judge, chosen.steps) for scene in asked]
        scores = torch.tensor([s for s, _ in found])
        kept = torch.tensor([k for _, k in found])
        whole = (scores[:, 1] - scores[:, 0]).mean().item()
        print(f"{defect}: a clean clip scores {whole:+.3f} above the spoilt one")
        for i, tau in enumerate(TAUS):
            mean, low, high = paired_bootstrap(scores[:, 0], scores[:, 2 + i])
            said = f"score {mean:+.3f} ({low:+.3f} .. {high:+.3f}), likeness to the clean clip {kept[:, i].mean():.2f}"
            print(f"  tau {tau:.1f}: {said}")


if __name__ == "__main__": main()
