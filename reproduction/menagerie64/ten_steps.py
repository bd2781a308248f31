#!/usr/bin/env python
"""InstructVideo with other settings on 48 held-out captions that no claim of the scoreboard uses: what is gained, and
is the subject kept? One line per setting, after one of the untuned model.

    python reproduction/menagerie64/ten_steps.py '{"n_ddim": 10, "lr": 0.003}' '{"n_ddim": 10, "lr": 0.003, "seed": 0}'
"""
import json
import sys
from contextlib import nullcontext

from instructvideo_kit.measure.evaluate import evaluate
from instructvideo_kit.measure.execute import DTYPES, Metrics, precision_of, tuned_policy
from instructvideo_kit.measure.runs import Run, Split
from instructvideo_kit.menagerie.captions import prompts
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.lora import merged_lora

OUT = "runs/ten_steps"
TOLD = ("reward", "species", "dullness", "blurriness", "watermark", "temporal_flicker", "flicker",
        "video_temporal_consistency", "sharpness")


def other_captions(n=48):
    "Held-out captions without those of the scoreboard."
    taken = {caption for many in Split().captions().values() for caption in many}
    return [caption for caption in prompts(90, "evaluation", seed=11) if caption not in taken][:n]


def look(policy, metrics, captions, tuned):
    "Means over the captions, one clip each, ten steps."
    with merged_lora(policy) if tuned else nullcontext():
        found = evaluate(policy, metrics.reward, {"all": captions}, (0,), 10, oracle=metrics, progress=False, batch=16)
    means = found.means()
    return {name: round(means[name], 3) for name in TOLD}


def main():
    metrics, captions = Metrics(), other_captions()
    untuned = VideoPolicy.from_pretrained("menagerie", dtype=DTYPES[precision_of(Run("base"))])
    print("base", look(untuned, metrics, captions, False), flush=True)
    for given in sys.argv[1:]:
        settings = json.loads(given)
        seed, step = settings.pop("seed", 100), settings.pop("steps", 40)
        run = Run("trial", "instructvideo", settings=settings, points=((step, Split()),), seed=seed)
        print(given, look(tuned_policy(run, step, OUT, metrics, False), metrics, captions, True), flush=True)


if __name__ == "__main__":
    main()
