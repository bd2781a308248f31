"Judges in order: batches, repeated calls, shuffled captions, and input that a judge was not trained on."
import json
import warnings

import pytest
import torch
from tiny import tiny_reward
from torch import nn

from instructvideo_kit.menagerie.captions import scenes
from instructvideo_kit.menagerie.defects import render
from instructvideo_kit.menagerie.judge import frame_size
from instructvideo_kit.menagerie.oracle import Oracle
from instructvideo_kit.reward.base import check_trained
from instructvideo_kit.reward.clip import AestheticReward, ClipReward
from instructvideo_kit.reward.compose import WeightedReward, per_clip
from instructvideo_kit.reward.videoscore import VideoScoreReward, write_small_videoscore

JUDGES = ["image", "video", "aesthetic", "sum"]
ALIGNMENT = {"image": None, "video": "text_to_video_alignment"} # judge -> which of its numbers reads the caption


@pytest.fixture(scope="module")
def judges():
    "The shipped judges, a head on the image judge, and a sum of both."
    image, video = ClipReward.from_pretrained("menagerie"), VideoScoreReward.from_pretrained("menagerie")
    torch.manual_seed(0)
    aesthetic = AestheticReward(image, nn.Sequential(nn.Linear(image.model.config.projection_dim, 1)))
    both = WeightedReward({"image": per_clip(image), "video": video.score}, {"video": .1})
    return {"image": image, "video": video, "aesthetic": aesthetic, "sum": both}

def size_of(judge):
    "A size that the judge knows."
    known = getattr(judge, "trained", {}).get("size")
    return int(known[-1]) if known else Oracle.from_pretrained().size # which reads the clips they were trained on

def clips_of(judge, n, seed):
    drawn = scenes("evaluation", n, seed=seed, clean=True)
    return render(drawn, size=size_of(judge)), [s.caption for s in drawn]

@pytest.mark.parametrize("name", JUDGES)
def test_a_batch_is_its_clips_one_by_one(judges, name):
    judge = judges[name]
    clips, captions = clips_of(judge, 4, 1)
    with torch.no_grad():
        together, again = judge(clips, captions), judge(clips, captions)
        alone = torch.cat([judge(clips[i:i + 1], captions[i:i + 1]) for i in range(4)])
        turned = judge(clips.flip(0), captions[::-1]).flip(0)
    assert torch.equal(together, again), "two calls must agree"
    assert together.std() > 0
    assert max((together - alone).abs().max(), (together - turned).abs().max()) < 1e-4

@pytest.mark.parametrize("name", ALIGNMENT)
def test_shuffled_captions_cost_points(judges, name, capsys):
    "Mean over clips of (own caption - mean of three others), in standard errors."
    judge, dim = judges[name], ALIGNMENT[name]
    clips, captions = clips_of(judge, 24, 3)
    def score(words):
        with torch.no_grad(): return judge(clips, words).mean(1) if dim is None else judge.score(clips, words, dim)
    others = torch.stack([score(captions[k:] + captions[:k]) for k in (5, 11, 17)]).mean(0)
    gain = score(captions) - others
    z = (gain.mean() / (gain.std() / len(gain) ** .5)).item()
    with capsys.disabled(): print(f"\n{name}: own caption {gain.mean():+.4f} above others, {z:.1f} standard errors")
    assert gain.mean() > 0 and z > 3

@pytest.mark.parametrize("name", ALIGNMENT)
def test_an_empty_caption_gets_another_score(judges, name):
    judge, dim = judges[name], ALIGNMENT[name]
    clips, captions = clips_of(judge, 8, 5)
    with torch.no_grad(): own, empty = judge(clips, captions), judge(clips, [""] * 8)
    if dim: own, empty = (x[:, judge.dims.index(dim)] for x in (own, empty))
    assert (own - empty).abs().amin() > 0 and (own - empty).abs().mean() > .01


# ---- outside the training

def caught_by(call, times=2):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times): call()
    return [str(w.message) for w in caught if "was trained on" in str(w.message)]

def test_an_image_judge_says_once_that_a_size_is_foreign(tmp_path):
    folder = tiny_reward(tmp_path)
    (folder / "kit.json").write_text(json.dumps({"name": "tiny", "trained": {"size": [12, 16]}}))
    judge = ClipReward.from_pretrained(folder)
    def frames(side):
        return torch.rand(1, 2, 3, side, side + 4)
    assert caught_by(lambda: judge(frames(12), ["a cat"])) == []
    assert caught_by(lambda: judge(frames(32), ["a cat"])) == ["tiny was trained on size 12 to 16, this clip has 32: "
                                                               "its scores are guesses here"]
    assert len(caught_by(lambda: judge(frames(64), ["a cat"]))) == 1, "another size is another warning"

def test_a_video_judge_says_sizes_frames_and_rate(tmp_path):
    folder = write_small_videoscore(tmp_path, words="a cat")
    (folder / "kit.json").write_text(json.dumps({"name": "small",
                                                 "trained": {"size": [20, 20], "frames": [4, 6], "fps": [8, 8]}}))
    judge = VideoScoreReward.from_pretrained(folder)
    clip = torch.rand(1, 5, 3, 20, 24)
    assert caught_by(lambda: judge(clip, ["a cat"], fps=8)) == caught_by(lambda: judge(clip, ["a cat"])) == []
    said = caught_by(lambda: judge(clip[:, :2], ["a cat"], fps=30))
    assert [line.split(",")[0] for line in said] == ["small was trained on frames 4 to 6", "small was trained on fps 8"]

@pytest.mark.parametrize("name, known", [("image", {"size"}), ("video", {"size", "frames", "fps"})])
def test_the_shipped_judges_say_what_they_were_trained_on(judges, name, known):
    judge = judges[name]
    clip, captions = clips_of(judge, 1, 1)
    side = frame_size(judge.model.config)
    assert judge.trained.keys() == known and judge.trained["size"] == [side, side]
    twice = clip.repeat_interleave(2, -1).repeat_interleave(2, -2)
    with torch.no_grad():
        assert caught_by(lambda: judge(clip, captions)) == []
        assert caught_by(lambda: judge(twice, captions)) == [f"menagerie was trained on size {side}, this clip has "
                                                            f"{2 * side}: its scores are guesses here"]

def test_a_judge_without_a_range_says_nothing(tmp_path):
    judge = ClipReward.from_pretrained(tiny_reward(tmp_path))
    assert judge.trained == {} and caught_by(lambda: judge(torch.rand(1, 1, 3, 200, 200), ["a cat"])) == []

def test_a_range_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"size \[64, 32\]: expected \[low, high\]"):
        check_trained({"size": [64, 32]}, "j", set(), size=40)
