"""The naming test: can somebody who has read no caption say what a clip shows?

    python reproduction/menagerie64/naming.py draw --policy FOLDER --seed 0 --out runs/naming     # sheet.png, subjects.txt
    python reproduction/menagerie64/naming.py score --out runs/naming --answers answers.txt

`draw` takes 24 held-out captions and their first clips at the policy's own settings, shows the middle frame of each,
numbered and without words, and writes the list of all subjects. `--renders` shows drawn clips of the same captions
instead: what a person can name at best. Answers are a line for each number: `7 fox`. `score` says how many are right."""
import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from instructvideo_kit.menagerie.captions import prompts
from instructvideo_kit.menagerie.defects import render
from instructvideo_kit.menagerie.oracle import parse
from instructvideo_kit.menagerie.world import NAMES

SIDE, ACROSS, FRAME = 160, 6, 8


def numbered(pictures):
    "Pictures (n, 3, h, w) in rows of six, each with its number."
    down = -(-len(pictures)//ACROSS)
    sheet = Image.new("RGB", (ACROSS*SIDE, down*(SIDE + 18)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = i % ACROSS*SIDE, i//ACROSS*(SIDE + 18)
        frame = (picture.clamp(0, 1).movedim(0, -1).numpy()*255).round().astype(np.uint8)
        sheet.paste(Image.fromarray(frame).resize((SIDE - 4, SIDE - 4), Image.Resampling.BICUBIC), (x, y + 16))
        pen.text((x + 4, y + 2), str(i + 1), fill="black")
    return sheet


def draw(asked):
    "sheet.png, subjects.txt and, not to be looked at before the answers are given, truth.json."
    captions = prompts(asked.n, seed=asked.seed)
    if asked.renders: videos = render([parse(caption) for caption in captions], size=64)
    else:
        from instructvideo_kit.policy import VideoPolicy
        from instructvideo_kit.policy.lora import load_lora
        policy = VideoPolicy.from_pretrained(asked.policy)
        if asked.lora: load_lora(policy, asked.lora)
        videos = policy.generate(captions, n_ddim=20, guidance_scale=asked.guidance_scale, seed=asked.seed)
    asked.out.mkdir(parents=True, exist_ok=True)
    numbered(videos[:, min(FRAME, videos.shape[1] - 1)]).save(asked.out/"sheet.png")
    (asked.out/"subjects.txt").write_text("\n".join(sorted(NAMES)) + "\n")
    truth = [parse(caption).species for caption in captions]
    (asked.out/"truth.json").write_text(json.dumps({"captions": captions, "subjects": truth}, indent=1))


def score(asked):
    "How many of the answers are right, and which were not."
    truth = json.loads((asked.out/"truth.json").read_text())["subjects"]
    lines = [line.split(maxsplit=1) for line in asked.answers.read_text().splitlines() if line.strip()]
    said = {int(number.rstrip(".:")): name.strip() for number, name in lines}
    unknown = sorted(set(said.values()) - set(NAMES))
    if unknown: raise SystemExit(f'"{unknown[0]}" is not in subjects.txt')
    wrong = [f"{i}: {said.get(i, '-')} for {name}" for i, name in enumerate(truth, 1) if said.get(i) != name]
    print(f"{len(truth) - len(wrong)} of {len(truth)} right; wrong: {', '.join(wrong) or 'none'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("draw", "score"))
    parser.add_argument("--policy", default="menagerie")
    parser.add_argument("--lora", type=Path, help="a tuned LoRA: does tuning keep what can be named?")
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of captions and noise")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--renders", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/naming"))
    parser.add_argument("--answers", type=Path)
    asked = parser.parse_args()
    draw(asked) if asked.what == "draw" else score(asked)


if __name__ == "__main__": main()
