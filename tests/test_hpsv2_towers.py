"ClipReward against hpsv2's own scores of small random towers: recorded, and live wherever hpsv2 imports."
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from instructvideo_kit.reward.clip import ClipReward, open_clip_keys, write_tokenizer

SCRIPT = Path(__file__).with_name("golden")/"make_hpsv2_towers.py"
spec = importlib.util.spec_from_file_location("make_hpsv2_towers", SCRIPT)
spec.loader.exec_module(towers := importlib.util.module_from_spec(spec))


@pytest.fixture(scope="module")
def golden(): return json.loads(towers.GOLDEN.read_text())


@pytest.fixture()
def official(tmp_path, monkeypatch):
    "The recorded towers as the official checkpoint lies on disk, its tokenizer beside it."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    torch.save({"state_dict": towers.weights()}, tmp_path/"HPS_v2_compressed.pt")
    write_tokenizer(tmp_path, towers.MERGES)
    return tmp_path/"HPS_v2_compressed.pt"


def ours(checkpoint, preprocess=None):
    "Scores [caption, picture] through the public door."
    reward = ClipReward.from_pretrained(checkpoint, preprocess=preprocess)
    frames = [torch.from_numpy(x).movedim(-1, 0)[None, None]/255 for x in towers.pictures()]
    return torch.cat([reward(x.expand(len(towers.CAPTIONS), -1, -1, -1, -1), towers.CAPTIONS) for x in frames], 1)


def worst(scores, expected): return (scores - torch.tensor(expected)).abs().max().item()


def test_golden_is_small_and_of_these_weights(golden):
    assert towers.GOLDEN.stat().st_size < 300_000 and golden["made_with"]["hpsv2"] == "1.2.0"
    assert towers.fingerprint(towers.weights()) == golden["weights_sha256"]
    assert set(towers.shapes()) == set(open_clip_keys(towers.LAYERS["visual"], towers.LAYERS["text"]))
    scores = torch.tensor(golden["scores"]["hpsv2"])
    assert scores.shape == (len(golden["captions"]), len(golden["shapes"]))
    assert scores.std(1).min() > 0.01 and scores.std(0).min() > 0.01


@pytest.mark.filterwarnings("ignore:.*reads 77 tokens") # one caption is longer on purpose
def test_same_scores_as_hpsv2_recorded(official, golden):
    recorded = golden["scores"]
    scores = ours(official)
    assert worst(scores, recorded["hpsv2"]) < 1e-5 # hpsv2.score: letterbox; text padded with 0
    assert worst(scores, recorded["end_padded"]) < 1e-5 # the padding of the text does not matter
    cropped = ours(official, "clip")
    assert worst(cropped, recorded["crop"]) < 1e-5
    tall = [i for i, (h, w) in enumerate(golden["shapes"]) if h != w]
    # the two preprocessings differ on each picture that is not square
    assert (scores - cropped)[:, tall].abs().amax(0).min() > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_same_scores_as_hpsv2_live(official, golden):
    try: importlib.import_module("hpsv2.src.open_clip")
    except Exception as e:
        pytest.skip(f"hpsv2 does not import here ({type(e).__name__}: {str(e)[:80]}); the recorded scores stand in")
    live = towers.hpsv2_scores()
    for how, scores in live.items(): assert worst(torch.tensor(scores), golden["scores"][how]) < 1e-5
    assert worst(ours(official), live["hpsv2"]) < 1e-5
