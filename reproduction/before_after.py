"""The README's picture: the first eight held-out captions before (left) and after tuning, from the same noise.

    python reproduction/before_after.py --lora tutorials/logs/menagerie/lora --out tutorials/pictures/before_after.png

Captions are the first eight of the evaluation split's order for the seed, drawn once each: nothing is chosen."""
import argparse
from pathlib import Path

from instructvideo_kit.menagerie.captions import prompts
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.lora import disabled_lora, load_lora
from instructvideo_kit.video.show import beside, film_strip


def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--lora", type=Path, required=True, help="folder of the tuned LoRA")
    asked.add_argument("--policy", default="menagerie")
    asked.add_argument("--n", type=int, default=8, help="captions")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--out", type=Path, required=True)
    asked = asked.parse_args()
    policy, captions = VideoPolicy.from_pretrained(asked.policy), prompts(asked.n, seed=asked.seed)
    load_lora(policy, asked.lora)
    after = policy.generate(captions, seed=asked.seed).clamp(0, 1)
    with disabled_lora(policy): before = policy.generate(captions, seed=asked.seed).clamp(0, 1)
    said = {when: [f"{caption}, {when}" for caption in captions] for when in ("before", "after")}
    columns = [film_strip(clips, every=4, scale=2, labels=said[when])
               for when, clips in (("before", before), ("after", after))]
    beside(columns, gap=16).save(asked.out)


if __name__ == "__main__": main()
