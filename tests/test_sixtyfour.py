"""Every door of the kit with a set of weights for the world at 64 x 64, small and untrained: nothing may assume the
size of the set that happens to be shipped. `tests/sixtyfour.py` writes such a set for a closer look."""
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from sixtyfour import small_policy, write_set  # noqa: E402
from tiny import tiny_pipeline  # noqa: E402

from instructvideo_kit import app, demo, doctor  # noqa: E402
from instructvideo_kit.files import KitError, locate  # noqa: E402
from instructvideo_kit.menagerie.captions import prompts, scenes  # noqa: E402
from instructvideo_kit.menagerie.defects import render  # noqa: E402
from instructvideo_kit.menagerie.oracle import Oracle  # noqa: E402
from instructvideo_kit.policy import VideoPolicy  # noqa: E402
from instructvideo_kit.policy.lora import LORA_FILE, add_lora, load_lora, save_lora  # noqa: E402
from instructvideo_kit.tuning.algorithm import tune  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*")
FEW = dict(steps=1, batch=2, n_ddim=2, rank=2, save_every=1)
PRESETS = { # preset -> what makes one step of it cheap
    "menagerie": {}, "draft_menagerie": {}, "ddpo_menagerie": dict(updates_per_round=1),
    "grpo_menagerie": dict(group_size=2, window=1),
    "nft_menagerie": dict(group_size=4, captions_per_round=1, updates_per_round=2, samples_at_once=4),
    "onlinevpo_menagerie": dict(batch=1, n_candidates=2, samples_at_once=2, timesteps_per_pair=1)}


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    "The set, in place of the shipped one."
    folder = write_set(tmp_path_factory.mktemp("weights"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INSTRUCTVIDEO_KIT_WEIGHTS", str(folder))
        yield folder


@pytest.fixture(scope="module")
def policy(home): return VideoPolicy.from_pretrained("menagerie")


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    "A tuned run."
    return tuned("menagerie", tmp_path_factory.mktemp("run")/"menagerie")


def tuned(preset, folder):
    policy = VideoPolicy.from_pretrained("menagerie")
    Found, config = app.choose_run(None, preset, FEW | PRESETS[preset])
    judge = app.open_judge(config.reward, config.n_segments, app.placement("no"))
    return tune(Found, policy, judge, app.menagerie_clips(policy, 4), config, folder, progress=False)


def test_the_set_is_found_and_its_parts_agree(home, policy):
    assert locate("menagerie", "policy").is_relative_to(home) and policy.size == (64, 64)
    assert policy.latent_shape == (8, 16, 8, 8) and Oracle.from_pretrained().size == 64
    assert all(doctor._weights(kind).ok for kind in ("policy", "reward", "oracle"))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "menagerie"])
def test_each_algorithm_makes_a_step(preset, tmp_path):
    rows = tuned(preset, tmp_path/"run").rows()
    assert len(rows) == 1 and abs(rows[0]["loss"]) < float("inf")


def test_sample_and_evaluate_a_run(run, tmp_path):
    words = prompts(2)
    videos = app.draw_samples("menagerie", run.run_dir, [(words[0], 0)], n_ddim=2)
    assert videos.shape == (1, 16, 3, 64, 64)
    assert app.write_samples(tmp_path/"out", ["a"], videos, words[:1])[0].is_file()
    (tmp_path/"captions.txt").write_text("\n".join(words))
    comparison, _ = app.compare_run(run.run_dir, prompts=tmp_path/"captions.txt", seeds=(0,), n_ddim=2)
    assert {"reward", "species", "sharpness"} <= {row["metric"] for row in comparison.rows}


def test_the_demo_runs_through(tmp_path):
    size = demo.DemoSize(captions=3, seeds=1, n_ddim=2, clips=2, steps=1)
    fewer = locate("menagerie", "preset").read_text().replace("n_ddim: 10", "n_ddim: 4").replace("batch: 4", "batch: 1")
    (tmp_path/"preset.yaml").write_text(fewer)
    report = demo.run_demo(tmp_path/"demo", preset=tmp_path/"preset.yaml", size=size)
    assert report.stat().st_size > 10_000


def test_figures_of_reproduce(policy):
    from instructvideo_kit.measure.execute import Metrics, drawn_clips
    metrics = Metrics()
    clips, captions = drawn_clips("usual", 2, 0, size=metrics.size)
    assert clips.shape[-1] == 64 and metrics(clips, captions)["feature_0"].isfinite().all()


def test_pictures_paint_and_arrows(policy):
    from instructvideo_kit.interactive.pipeline import InteractivePipeline
    from instructvideo_kit.interactive.session import EditSession
    from instructvideo_kit.menagerie.arrows import arrow_cases
    pipeline = InteractivePipeline(VideoPolicy.from_pretrained("menagerie-i2v"), policy)
    case, session = arrow_cases(1, size=pipeline.size[0])[0], EditSession(64, 64)
    session.stroke([(20, 10)], "#e01818", 8)
    session.mask_stroke([(20, 10)], 12)
    image = pipeline.image(case.scene.caption, session.paint(case.clip[:1]), n_ddim=2)
    clip = pipeline.video(image, case.scene.caption, edited=session.paint(image), mask=session.mask(), lam=.5,
                          drags=[case.drag], n_ddim=2)
    assert clip.shape == (1, 16, 3, 64, 64) and 0 <= case.distance(clip[0]) < 2


def test_widgets_show_it(policy):
    from instructvideo_kit.widgets.guidance import guided
    from instructvideo_kit.widgets.segments import segment_strip
    from instructvideo_kit.widgets.tau import tau_edit
    scene = scenes("evaluation", 1, 0)[0]
    clip = render([scene], size=policy.size[0])[0]
    assert tau_edit(policy, clip, scene.caption, taus=(.5,), n_ddim=2)[0].edited.shape == clip.shape
    assert guided(policy, scene.caption, [1.], 2)[0].video.shape == clip.shape
    assert segment_strip(clip)[0].width < 2000


def test_votes_on_clips_and_their_portrait(tmp_path):
    from instructvideo_kit.feedback.commands import simulate, train_reward
    from instructvideo_kit.feedback.pool import make_pool
    drawn = scenes("tune", 12, 0)
    make_pool(tmp_path/"pool", render(drawn, size=64), [s.caption for s in drawn])
    simulate(tmp_path/"pool", "warm", votes=6)
    assert train_reward(tmp_path/"pool", "warm", echo=lambda *_: None).is_dir()


# ---- what was made with an older model

@pytest.fixture(scope="module")
def older(tmp_path_factory):
    "A policy with other latents, under the same name."
    folder = tiny_pipeline(tmp_path_factory.mktemp("older")/"menagerie", "v_prediction", "patch")
    kit = json.loads((folder/"kit.json").read_text()) | {"name": "menagerie"}
    (folder/"kit.json").write_text(json.dumps(kit))
    return folder


def refusal(call):
    with pytest.raises(KitError) as error: call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_lora_of_an_older_model_says_so(older, policy, tmp_path):
    old = VideoPolicy.from_pretrained(older)
    add_lora(old, 2)
    save_lora(old, tmp_path)
    said = refusal(lambda: load_lora(policy, tmp_path))
    assert "perhaps an older one of the same name" in said and "8 frames of 16 x 16" in said and "64 x 64" in said


def test_a_lora_from_before_its_header_knew_says_so(policy, tmp_path):
    "Such as those of the world at 32 x 32: the same layers, other widths."
    old = small_policy(width=(16, 24))
    add_lora(old, 2)
    state = load_file(save_lora(old, tmp_path))
    save_file(state, tmp_path/LORA_FILE)
    assert "perhaps an older one of the same name" in refusal(lambda: load_lora(policy, tmp_path))


def test_a_run_of_an_older_model_says_so(older, tmp_path):
    def redness(frames, prompts): return frames[:, :, 0].mean((2, 3))
    Found, config = app.choose_run(None, "menagerie", FEW)
    old = VideoPolicy.from_pretrained(older)
    clips = [(torch.rand(8, 3, 16, 16), word) for word in ("a cat", "a dog")]
    tune(Found, old, redness, clips, config, tmp_path/"run", progress=False)
    def go_on():
        new = VideoPolicy.from_pretrained("menagerie")
        larger = [(torch.rand(16, 3, 64, 64), word) for _, word in clips]
        tune(Found, new, redness, larger, config, tmp_path/"run", resume=True, progress=False)
    said = refusal(go_on)
    assert "belongs to another model, perhaps an older one" in said and "8 frames of 16 x 16" in said
    inputs = json.loads((tmp_path/"run/inputs.json").read_text())
    (tmp_path/"run/inputs.json").write_text(json.dumps({k: v for k, v in inputs.items() if k != "base"}))
    assert "perhaps an older one" in refusal(go_on), "its checkpoint says so where the folder does not"
