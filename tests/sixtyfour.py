"""A whole set of weights for the world at 64 x 64, small and untrained but for its autoencoder, to try every door with.

    python tests/sixtyfour.py FOLDER
    INSTRUCTVIDEO_KIT_WEIGHTS=FOLDER pytest tests/test_demo.py        # or a notebook, or a command

What the models draw and say is noise; sizes, shapes and files are those of the real set."""
import sys
from pathlib import Path

import torch

AUTOENCODER = Path(__file__).resolve().parent.parent/"instructvideo_kit/weights/policy/menagerie/vae"


def autoencoder():
    "The one that is trained for the new world; where it is not there, a fresh one of its shape."
    from diffusers import AutoencoderKL

    from instructvideo_kit.menagerie.autoencoder import new_autoencoder
    trained = AutoencoderKL.from_pretrained(AUTOENCODER) if AUTOENCODER.is_dir() else new_autoencoder()
    return trained.float().requires_grad_(False)


def small_policy(width=(16, 32)):
    "Text to video, with a small network."
    from instructvideo_kit.menagerie.models import as_policy, new_text_encoder, new_unet
    from instructvideo_kit.menagerie.tokens import menagerie_tokenizer
    tokenizer = menagerie_tokenizer()
    modules = dict(unet=new_unet(width=width), text_encoder=new_text_encoder(tokenizer))
    return as_policy(modules, autoencoder(), tokenizer)


def write_policies(folder):
    "policy/menagerie and policy/menagerie-i2v."
    from instructvideo_kit.policy.first_frame import FirstFramePolicy, widened
    base = small_policy()
    base.save_pretrained(folder/"menagerie")
    kit = {**base.kit, "name": "menagerie-i2v"}
    wide = FirstFramePolicy(widened(base.unet), base.vae, base.text_encoder, base.tokenizer, base.scheduler, kit)
    wide.save_pretrained(folder/"menagerie-i2v")


def write_set(folder, seed=0):
    "policy/, reward/, videoscore/ and oracle/ as in instructvideo_kit/weights; the folder."
    from instructvideo_kit.menagerie.judge import new_judge, save_judge
    from instructvideo_kit.menagerie.oracle import Oracle, OracleNet
    from instructvideo_kit.menagerie.video_judge import new_video_judge, save_video_judge
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        write_policies(folder/"policy")
        Oracle(OracleNet(64)).save_pretrained(folder/"oracle/menagerie")
        save_judge(*new_judge(size=64), folder/"reward/menagerie")
        save_video_judge(*new_video_judge(size=64), folder/"videoscore/menagerie")
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    print(write_set(sys.argv[1]))
