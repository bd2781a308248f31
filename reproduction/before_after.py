"""The README's picture: the first four held-out captions before and after tuning, from the same noise.

    python reproduction/before_after.py --lora tutorials/logs/menagerie/lora --out tutorials/pictures/before_after.png

Captions are the first four of the evaluation split's order for the seed, drawn once each: nothing is chosen."""
import argparse
from pathlib import Path

from einops import rearrange

from instructvideo_kit.menagerie.captions import prompts
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.lora import disabled_lora, load_lora
from instructvideo_kit.video import film_strip


def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--lora", type=Path, required=True, help="folder of the tuned LoRA")
    asked.add_argument("--policy", default="menagerie")
    asked.add_argument("--n", type=int, default=4, help="captions")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--out", type=Path, required=True)
    asked = asked.parse_args()
    policy, captions = VideoPolicy.from_pretrained(asked.policy), prompts(asked.n, seed=asked.seed)
    load_lora(policy, asked.lora)
    after = policy.generate(captions, seed=asked.seed).clamp(0, 1)
    with disabled_lora(policy): before = policy.generate(captions, seed=asked.seed).clamp(0, 1)
    pairs = rearrange([before, after], "k n f c h w -> (n k) f c h w")
    labels = [f"{caption}, {when}" for caption in captions for when in ("before", "after")]
    film_strip(pairs, every=2, scale=2, labels=labels).save(asked.out)


if __name__ == "__main__": main()
