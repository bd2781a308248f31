"The gallery of two small runs from the command line: films, same noise for all, names, and one clear line otherwise."
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from instructvideo_kit import cli
from instructvideo_kit.app import draw_samples, gallery_runs, make_gallery
from instructvideo_kit.files import KitError
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.lora import add_lora, save_lora

sys.path.insert(0, str(Path(__file__).parent))
from tiny import N_FRAMES, SIZE, tiny_pipeline  # noqa: E402

CAPTIONS = ["a red cat", "the blue dog runs", "a bird flies", "a horse", "a fish"]


def call(*args): return CliRunner().invoke(cli.app, [str(a) for a in args])


def write_run(folder, policy, seed):
    "A run folder with a LoRA that changes the model; seed 0: one that changes nothing."
    model = VideoPolicy.from_pretrained(policy)
    generator = torch.Generator().manual_seed(seed)
    for p in add_lora(model, 2):
        with torch.no_grad(): p.copy_(torch.randn(p.shape, generator=generator)*(.2 if seed else 0.))
    (folder/"lora").mkdir(parents=True)
    save_lora(model, folder/"lora")
    (folder/"config.yaml").write_text(f"policy: {policy}\nreward: menagerie\nsteps: {seed}\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("gallery")
    tiny_pipeline(home/"policy", prediction_type="v_prediction", vae="patch")
    for seed, name in enumerate(("still", "draft")): write_run(home/"logs"/name, home/"policy", seed)
    (home/"captions.txt").write_text("\n".join(CAPTIONS))
    return home


def test_command_writes_page_and_sheet(home):
    answer = call("gallery", home/"logs", f"nothing={home}/logs/still", "--prompts", home/"captions.txt",
                  "--steps", 2, "--out", home/"out")
    assert answer.exit_code == 0, (answer.output, answer.exception)
    page = (home/"out/gallery.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["All at a glance", "draft", "nothing"]
    assert page.count("image/webp") == 2*4 and not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "the first 4 captions" in page and "a fish" not in page
    changes = [float(x) for x in re.findall(r"mean change of a pixel ([\d.]+)", page)]
    assert min(changes[:4]) > 0 and changes[4:] == [0.]*4 # the second LoRA is all zeros: same noise, same clip
    width = Image.open(home/"out/gallery.png").width
    assert width == 3*128 + 2*4 and SIZE < 128


def test_clips_are_those_of_sample(home):
    gallery = make_gallery([home/"logs/draft"], captions=home/"captions.txt", n=1, n_ddim=2, seed=5)
    assert gallery.base.shape == (1, N_FRAMES, 3, SIZE, SIZE) and gallery.prompts == CAPTIONS[:1]
    alone = draw_samples(str(home/"policy"), home/"logs/draft", [(CAPTIONS[0], 5)], 2)
    assert torch.equal(gallery.tuned["draft"], alone) and not torch.equal(gallery.base, alone)


def test_runs_of_two_policies_are_refused(home):
    write_run(other := home/"other", home/"policy", 2)
    (other/"config.yaml").write_text("policy: elsewhere\n")
    with pytest.raises(KitError, match="2 policies"): make_gallery([home/"logs/draft", other])


@pytest.mark.parametrize("given, words", [("{home}/policy", "no LoRA in"), ("x={home}/logs", "names 2 runs"),
                                          ("{home}/nowhere", "no LoRA in")])
def test_wrong_folders_are_named(home, given, words):
    answer = call("gallery", given.format(home=home))
    assert answer.exit_code == 2 and words in answer.stderr


def test_one_name_for_two_runs_is_refused(home):
    with pytest.raises(KitError, match='two runs are called "draft"'):
        gallery_runs([f"{home}/logs/draft", f"draft={home}/logs/still"])
