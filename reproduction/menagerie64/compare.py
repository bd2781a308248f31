"""One arm of the comparison on single pictures: prediction type, width, latent channels; same seed, same steps.

    python reproduction/menagerie64/compare.py --prediction sample --width 64 128 --steps 2850 --out runs/compare/x0
"""
import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from instructvideo_kit.diffusion.schedule import corrupt
from instructvideo_kit.menagerie.autoencoder import SIZE
from instructvideo_kit.menagerie.captions import scenes
from instructvideo_kit.menagerie.defects import render
from instructvideo_kit.menagerie.models import (looker, new_scheduler, new_text_encoder, new_unet, pictures_only,
                                                train_phase)
from instructvideo_kit.menagerie.tokens import menagerie_tokenizer, token_ids

TIMES = 50, 150, 300, 500, 700, 900 # noise steps at which the guess of x0 is measured


def held_out(vae, tokenizer, n=512):
    "Latents and token ids of held-out pictures."
    chosen = scenes("evaluation", n, seed=4)
    x = 2 * render(chosen, torch.full((n, 1), 8), size=SIZE)[:, 0] - 1
    with torch.no_grad(): z = torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(64)])
    return z[:, :, None] * vae.config.scaling_factor, token_ids(tokenizer, [s.caption for s in chosen])


@torch.no_grad()
def guess_errors(modules, vae, tokenizer, prediction):
    "Mean squared error of the guess of x0 (unit-variance latents) at each of TIMES."
    z, ids = held_out(vae, tokenizer)
    alpha_bar, g, errors = new_scheduler().alphas_cumprod, torch.Generator().manual_seed(5), {}
    text = modules["text_encoder"](ids).last_hidden_state
    for t in TIMES:
        eps, a = torch.randn(z.shape, generator=g), alpha_bar[t]
        z_t = corrupt(z, eps, a)
        with pictures_only(modules["unet"]): out = modules["unet"](z_t, t, text).sample
        x0 = out if prediction == "sample" else a.sqrt() * z_t - (1 - a).sqrt() * out
        errors[t] = round((x0 - z).square().mean().item(), 4)
    return errors


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--prediction", default="v_prediction", choices=["v_prediction", "sample"])
    cli.add_argument("--width", type=int, nargs="+", default=[64, 128])
    cli.add_argument("--vae", default="instructvideo_kit/weights/policy/menagerie/vae")
    cli.add_argument("--steps", type=int, default=13000, help="of the whole run (the rate falls in its last quarter)")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--out", required=True)
    asked = cli.parse_args()
    torch.manual_seed(asked.seed)
    tokenizer, folder = menagerie_tokenizer(), Path(asked.out)
    vae = AutoencoderKL.from_pretrained(asked.vae).float().requires_grad_(False)
    modules = dict(unet=new_unet(vae.config.latent_channels, tuple(asked.width)),
                   text_encoder=new_text_encoder(tokenizer))
    look = looker(folder, "pictures", modules, vae, tokenizer, asked.prediction)
    run = train_phase("pictures", folder / "pictures", modules, vae, tokenizer, asked.steps, asked.seed,
                      asked.prediction, look)
    errors = guess_errors(modules, vae, tokenizer, asked.prediction)
    print(json.dumps(dict(prediction=asked.prediction, width=asked.width, steps=run.step, minutes=round(run.seconds / 60, 1),
                          parameters=sum(p.numel() for p in modules["unet"].parameters()), errors=errors)))
