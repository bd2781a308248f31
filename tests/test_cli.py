"The command line on tiny random models: what each command writes, and one clear line for bad input."
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from instructvideo_kit import cli
from instructvideo_kit.files import KitError
from instructvideo_kit.video import write_video

sys.path.insert(0, str(Path(__file__).parent))
from tiny import N_FRAMES, SIZE, tiny_pipeline, tiny_preset, tiny_reward  # noqa: E402


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "policy/, reward/, preset.yaml, clips/ and a finished run."
    home = tmp_path_factory.mktemp("cli")
    tiny_pipeline(home/"policy", prediction_type="v_prediction", vae="patch")
    tiny_reward(home/"reward")
    tiny_preset(home)
    generator = torch.Generator().manual_seed(0)
    for name in "ab": write_video(home/f"clips/{name}.mp4", torch.rand(10, 3, 24, 32, generator=generator))
    (home/"clips/metadata.csv").write_text("file_name,text\na.mp4,a red cat\nb.mp4,the blue dog runs\n")
    answer = tune(home, home/"run")
    assert answer.exit_code == 0, answer.output
    (home/"said.txt").write_text(answer.output)
    return home


def call(*args): return CliRunner().invoke(cli.app, [str(a) for a in args])


def tune(home, out, *more, data="clips", preset="preset.yaml"):
    return call("tune", "--data", home/data, "--preset", home/preset, "--out", out, *more)


def refused(answer, *words):
    "Exit code 2 and one line on stderr with these words."
    assert answer.exit_code == 2, (answer.exit_code, answer.output, answer.exception)
    said = answer.stderr.splitlines()
    lines = [line for line in said if not line.startswith("instructvideo-kit: note:") and "|" not in line]
    assert len(lines) == 1 and lines[0].startswith("instructvideo-kit: "), answer.stderr
    for word in words: assert word in lines[0], lines[0]


def test_tune_says_what_it_did_and_what_next(home):
    said = (home/"said.txt").read_text()
    assert f"{N_FRAMES} frames" in said and f"{SIZE}x{SIZE}" in said and "cut" in said
    assert "instructvideo-kit evaluate" in said and (home/"run/lora/pytorch_lora_weights.safetensors").is_file()


def test_preview_shows_what_the_model_will_see_and_stops(home):
    from PIL import Image
    answer = tune(home, home/"none", "--preview", home/"sheet.png")
    assert answer.exit_code == 0 and not (home/"none").exists(), answer.output
    assert min(Image.open(home/"sheet.png").size) >= SIZE
    refused(call("tune", "--data", "menagerie", "--preset", home/"preset.yaml", "--preview", home/"no.png"),
            "--preview")


def test_resume_goes_on(home):
    assert tune(home, home/"more").exit_code == 0
    answer = tune(home, home/"more", "--resume", "--steps", 3)
    assert answer.exit_code == 0, answer.output
    rows = [json.loads(line) for line in (home/"more/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3]


def test_interrupt_says_how_to_go_on(home, monkeypatch):
    from instructvideo_kit import app
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr(app, "tune", interrupted)
    answer = tune(home, home/"stopped")
    assert answer.exit_code == 130 and "--resume" in answer.stderr


def test_sample(home):
    answer = call("sample", "a red cat", "the blue bird", "--policy", home/"policy", "--lora", home/"run", "--out",
                  home/"drawn", "--steps", 2, "--n", 2)
    assert answer.exit_code == 0, answer.output
    assert len(list((home/"drawn").glob("*.mp4"))) == 4
    assert (home/"drawn/strip.png").is_file()
    assert (home/"drawn/01-a-red-cat-seed1.mp4").is_file()


def test_the_module_is_the_command():
    "`python -m instructvideo_kit.cli` where the script is not on the path; it used to do nothing, without a word."
    done = subprocess.run([sys.executable, "-m", "instructvideo_kit.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "Usage: instructvideo-kit" in done.stdout and "evaluate" in done.stdout


def test_evaluate(home):
    (home/"captions.txt").write_text("a red cat\n\nthe bird flies\n")
    answer = call("evaluate", home/"run", "--prompts", home/"captions.txt", "--steps", 2, "--seeds", 1)
    assert answer.exit_code == 0, answer.output
    assert "reward" in answer.output and "no oracle" in answer.stderr
    found = json.loads((home/"run/evaluation-d2/comparison.json").read_text())
    assert found["rows"][0]["metric"] == "reward"
    assert found["rows"][0]["prompts"] == 2
    assert found["rows"][0]["difference"] != 0
    assert "| reward |" in (home/"run/evaluation-d2/comparison.md").read_text()


def test_evaluate_without_guidance_has_a_folder_of_its_own(home):
    "A model that wins with guidance may lose without; the figures must not overwrite one another."
    (home/"one.txt").write_bytes("\ufeffa red cat\r\n".encode())
    answer = call("evaluate", home/"run", "--prompts", home/"one.txt", "--steps", 2, "--seeds", 1, "--guidance", 1)
    assert answer.exit_code == 0, answer.output
    kept = [json.loads(p.read_text()) for p in (home/"run/evaluation-d2-w1").glob("*.json")]
    assert any(k.get("settings", {}).get("guidance_scale") == 1 for k in kept)


def test_evaluate_without_captions_or_lora(home):
    refused(call("evaluate", home/"run"), "--prompts")
    refused(call("evaluate", home/"nowhere"), "there is no folder", "nowhere")
    refused(call("evaluate", home/"clips", "--prompts", home/"said.txt"), "no LoRA in", "clips")
    refused(call("evaluate", home/"run", "--prompts", home/"nothing.txt"), "nothing.txt", "No such file")


@pytest.mark.parametrize("field, words", [
    ("tau=1.5", ["tau", "1.5"]), ("tau=0", ["tau"]), ("tau=0.01", ["tau * n_ddim is 0.05", "raise tau"]),
    ("n_segments=99", ["n_segments is 99", f"{N_FRAMES} frames"]),
    ("lamtar=1", ['no field "lamtar"', '"lam_tar"']), ("lr=fast", ["lr is 'fast'"]), ("tau", ["field=value"]),
    ("tau=", ["no value"]), ("frames=rand", ['"random"'])])
def test_bad_field(home, tmp_path, field, words):
    refused(tune(home, tmp_path/"out", "--set", field), *words)
    assert not (tmp_path/"out").exists()


def test_bad_preset(home, tmp_path):
    refused(call("tune", "--data", home/"clips", "--preset", "menagerei", "--out", tmp_path/"out"),
            'did you mean "menagerie')
    (home/"odd.yaml").write_text("taus: 0.5\n")
    refused(tune(home, tmp_path/"out", preset="odd.yaml"), 'no field "taus"', '"tau"')
    (home/"torn.yaml").write_text("tau: [0.5\n")
    refused(tune(home, tmp_path/"out", preset="torn.yaml"), "torn.yaml is not YAML")
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_unknown_model(home, tmp_path, kind):
    refused(tune(home, tmp_path/"out", f"--{kind}", "nonesuch"), f'no {kind} "nonesuch"')


def test_bad_data(home, tmp_path):
    refused(tune(home, tmp_path/"out", data="nowhere"), 'nowhere": there is no such folder or file')
    (home/"bare").mkdir()
    (home/"bare/a.mp4").write_bytes((home/"clips/a.mp4").read_bytes())
    refused(tune(home, tmp_path/"out", data="bare"), "no captions", "metadata.csv")
    (home/"broken").mkdir()
    (home/"broken/x.mp4").write_text("not a video")
    (home/"broken/metadata.csv").write_text("file_name,text\nx.mp4,a cat\n")
    refused(tune(home, tmp_path/"out", data="broken"), "none of the 1 clips", "x.mp4")
    assert not (tmp_path/"out").exists()


def test_unreadable_clips_are_skipped_with_a_count_and_long_captions_told(home):
    (home/"mixed").mkdir()
    for name in "ab": (home/f"mixed/{name}.mp4").write_bytes((home/f"clips/{name}.mp4").read_bytes())
    (home/"mixed/c.mp4").write_text("not a video")
    long = "a.mp4|||a cat runs left in the field on the sea at night red blue"
    (home/"mixed/list.txt").write_text(f"{long}\nb.mp4|||a dog|||1\nc.mp4|||a cat\n")
    answer = tune(home, home/"from_list", "--steps", 2, data="mixed/list.txt")
    assert answer.exit_code == 0, answer.output
    assert "1 of 3 left out" in answer.output
    assert "c.mp4" in answer.output
    assert "lose the rest" in answer.output
    assert "note:" in answer.stderr


def test_folder_of_another_run(home):
    before = (home/"run/config.yaml").read_text()
    refused(tune(home, home/"run"), "holds a run already")
    refused(tune(home, home/"run", "--resume", "--set", "lr=0.5"), "lr was 0.01, is 0.5")
    refused(tune(home, home/"clips"), "holds no run")
    assert (home/"run/config.yaml").read_text() == before and not (home/"clips/config.yaml").exists()


def test_usage_errors_are_typers_own():
    answer = call("tune")
    assert answer.exit_code == 2 and "Usage" in answer.stderr


def test_debug_shows_the_traceback(home):
    answer = call("--debug", "tune", "--data", home/"nowhere", "--preset", home/"preset.yaml", "--out", home/"x")
    assert isinstance(answer.exception, KitError)


def test_a_bug_is_not_dressed_up():
    try: int("x")
    except ValueError as error: assert not cli.mendable(error)


def test_menagerie_train(tmp_path, monkeypatch):
    from instructvideo_kit.menagerie import oracle
    asked = {}
    def train_oracle(folder, **options):
        asked.update(options)
        return oracle.OracleNet()
    monkeypatch.setattr(oracle, "train_oracle", train_oracle)
    (tmp_path/"package/weights").mkdir(parents=True)
    monkeypatch.setenv("INSTRUCTVIDEO_KIT_WEIGHTS", str(tmp_path/"package/weights")) # not the package's own
    answer = call("menagerie", "train", "--part", "oracle", "--out", tmp_path/"o", "--steps", 3, "--ship")
    assert answer.exit_code == 0, answer.output
    assert asked == {"seed": 0, "steps": 3}
    files = ["kit.json", "oracle.safetensors"]
    assert sorted(p.name for p in (tmp_path/"package/weights/oracle/menagerie").iterdir()) == files
    # a second time, over the first
    assert call("menagerie", "train", "--part", "oracle", "--out", tmp_path/"o", "--ship").exit_code == 0
    refused(call("menagerie", "train", "--part", "judges", "--out", tmp_path/"o"), '"judge"')


def test_menagerie_train_flow(tmp_path, monkeypatch):
    from instructvideo_kit.menagerie import flow
    refused(call("menagerie", "train", "--part", "flow", "--out", tmp_path/"f"), "--vae FOLDER")
    refused(call("menagerie", "train", "--part", "flow", "--out", tmp_path/"f", "--vae", tmp_path), "no config.json")
    asked = {}
    monkeypatch.setattr(flow, "train_flow", lambda folder, vae, **options: asked.update(options, vae=vae) or folder)
    answer = call("menagerie", "train", "--part", "flow", "--out", tmp_path/"f", "--vae", tmp_path, "--steps", 3,
                  "--picture-steps", 0)
    assert answer.exit_code == 0, answer.output
    assert asked == {"seed": 0, "clip_steps": 3, "picture_steps": 0, "vae": tmp_path}


def test_menagerie_export_and_show(tmp_path):
    answer = call("menagerie", "export", tmp_path/"clips", "--n", 2, "--size", 32)
    assert answer.exit_code == 0, answer.output
    assert sorted(p.name for p in (tmp_path/"clips").iterdir()) == ["00000.mp4", "00001.mp4", "metadata.csv"]
    refused(call("menagerie", "export", tmp_path/"other", "--split", "test", "--n", 1), "no split 'test'")
    refused(call("menagerie", "export", tmp_path/"clips", "--n", 1, "--size", 32), "already holds metadata.csv")
    assert call("menagerie", "show", tmp_path/"sheet.png", "--n", 4, "--size",
                32).exit_code == 0 and (tmp_path/"sheet.png").stat().st_size > 500


def test_doctor(monkeypatch):
    from instructvideo_kit import doctor
    monkeypatch.setattr(doctor, "check", lambda: [("Python", True, "3.11")])
    assert call("doctor").exit_code == 0
    monkeypatch.setattr(doctor, "check", lambda: [("Python", True, "3.11"), ("ffmpeg", False, "not found")])
    answer = call("doctor")
    assert answer.exit_code == 1 and "MEND" in answer.output


@pytest.mark.parametrize("algorithm, says", [("drift", "draft"), ("draft", "is for instructvideo")])
def test_unknown_algorithms_and_cards_for_others_are_refused(tmp_path, algorithm, says):
    card = ["--memory", "h200"] if algorithm == "draft" else []
    refused(call("tune", "--algorithm", algorithm, "--data", "menagerie", "--out", tmp_path/"run", *card), says)
    assert not (tmp_path/"run").exists()


def test_eval_every_holds_captions_out_and_keeps_the_best(home):
    assert tune(home, home/"watched", "--set", "eval_every=1", "--set", "sample_every=2").exit_code == 0
    rows = [json.loads(line) for line in (home/"watched/log.jsonl").read_text().splitlines()]
    evaluations = [r for r in rows if r["kind"] == "eval"]
    assert [r["step"] for r in evaluations] == [0, 1, 2]
    assert all({"reward", "flicker", "spread"} <= set(r) for r in evaluations)
    assert all(len(r["clips"]["reward"]) == 1 for r in evaluations)
    # one of two captions is held out
    assert json.loads((home/"watched/inputs.json").read_text())["clips"].startswith("1:")
    assert (home/"watched"/json.loads((home/"watched/best.json").read_text())["lora"]).is_dir()
    assert len(list((home/"watched/samples").iterdir())) == 2
    (home/"alike").mkdir(exist_ok=True)
    (home/"alike/list.txt").write_text(f"{home}/clips/a.mp4|||a red cat\n{home}/clips/b.mp4|||a red cat\n")
    refused(tune(home, home/"no", "--set", "eval_every=1", data="alike/list.txt"), "1 different captions",
            "eval_every 0")
