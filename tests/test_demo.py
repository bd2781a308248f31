"The demo on tiny random models, its report, and the frames it says were chosen."
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from instructvideo_kit import app, demo
from instructvideo_kit.files import KitError
from instructvideo_kit.measure.report import chosen_frames, settings
from instructvideo_kit.tuning.config import load_preset
from instructvideo_kit.tuning.instructvideo import InstructVideoConfig

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_pipeline, tiny_preset, tiny_reward  # noqa: E402

SMALL = demo.DemoSize(captions=3, seeds=2, n_ddim=2, clips=3, steps=2)
pytestmark = pytest.mark.filterwarnings("ignore:the text encoder takes", "ignore:.*does not see")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("demo")
    tiny_pipeline(home/"policy", prediction_type="v_prediction", vae="patch")
    tiny_reward(home/"reward")
    tiny_preset(home, batch=2)
    return home


@pytest.fixture(scope="module")
def run(home):
    "The demo, with the frames that the tuning decoded for its reward."
    decoded, plain = [], demo.VideoPolicy.decode
    def decode(policy, z, frames=None):
        if frames is not None: decoded.append(frames.clone())
        return plain(policy, z, frames)
    demo.VideoPolicy.decode = decode
    try: report = demo.run_demo(home/"out", preset=home/"preset.yaml", size=SMALL)
    finally: demo.VideoPolicy.decode = plain
    return report, decoded


def test_report_is_one_file_that_needs_nothing_else(run):
    page = run[0].read_text()
    assert page.count("data:image/webp") == 3 and not re.findall(r'(?:src|href)=["\'](?!data:)',
        page) and "<script" not in page and "@import" not in page
    for words in ("95 % interval", "DRaFT-1", "Fig. 5b", "instructvideo-kit evaluate", "TAR weighs"):
        assert words in page, words


def test_figures_are_saved(run):
    out = run[0].parent
    found = json.loads((out/"comparison.json").read_text())
    groups = {r["group"] for r in found["rows"]}
    assert groups == {"all", "in-domain", "new animals", "non-animals"}
    assert next(r for r in found["rows"] if r["metric"] == "reward")["difference"] != 0


def test_frames_in_the_report_are_those_that_were_judged(run, home):
    config = load_preset(home/"preset.yaml", InstructVideoConfig, {"steps": 2})
    g = chosen_frames(config, 8, (4, 8, 4, 4), 2)
    assert torch.equal(g, torch.stack([frames[0] for frames in run[1]]))


def test_a_demo_replaces_a_demo_and_nothing_else(run, home, capsys):
    (home/"out/old.txt").write_text("from the earlier demo")
    demo.run_demo(home/"out", preset=home/"preset.yaml", size=SMALL)
    said = capsys.readouterr().out
    assert not (home/"out/old.txt").exists() and (home/"out/report.html").exists()
    assert [f"[{i}/5]" in said for i in range(1, 6)] == [True]*5 and "left" in said
    (home/"mine").mkdir()
    (home/"mine/thesis.txt").write_text("years")
    with pytest.raises(KitError, match="holds something else"):
        demo.run_demo(home/"mine", preset=home/"preset.yaml", size=SMALL)
    assert (home/"mine/thesis.txt").read_text() == "years"


def test_a_failing_start_leaves_the_old_demo(run, home):
    with pytest.raises(KitError): demo.run_demo(home/"out", preset="nonesuch")
    assert (home/"out/demo.json").exists()


def test_lora_is_found_and_the_config_with_it(run, home):
    for path in (home/"out", home/"out/tune", home/"out/tune/lora"):
        lora, config = app.find_lora(path)
        assert lora.resolve() == (home/"out/tune/lora").resolve() and config["reward"] == str(home/"reward")


def test_sources_of_settings(home):
    config = load_preset(home/"preset.yaml", InstructVideoConfig, {"seed": 3})
    said = {name: source for name, _, source in settings(config, home/"preset.yaml")}
    assert said["tau"] == "Fig. 5b" and said["seed"] == "given for this run" and "Eq. 7" in said["lam_tar"]


def test_stages_learn_their_pace(capsys):
    now = [0.]
    stages = demo.Stages(["a", "b", "c"], clock=lambda: now[0])
    stages.works |= {"a": 10, "b": 10, "c": 20}
    stages.seconds = 100.
    stages.begin("a")
    now[0] = 20.
    stages.begin("b")
    now[0] = 60.
    stages.begin("c")
    said = capsys.readouterr().out.splitlines()
    assert [re.search(r"about (.*) left", line)[1] for line in said] == ["67 min", "60 s", "80 s"]


def test_quick_and_full_hold_what_the_readme_says():
    assert demo.FULL.captions >= 48 and demo.FULL.seeds == 1 and demo.FULL.n_ddim == 10
    assert sum(map(len, app.held_out(8).values())) == 8
