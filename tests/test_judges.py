"Composed rewards, the menagerie's video judge, how good a judge is, and the judge dashboard."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructvideo_kit.measure.judges import agreement, chance, judge_table, mrr_bounds, pairwise_accuracy, table_text
from instructvideo_kit.measure.metrics import rank_metrics
from instructvideo_kit.menagerie.judge import PICTURE, frame_size
from instructvideo_kit.menagerie.video_judge import (
    DIMENSIONS,
    borrow_eyes,
    candidates,
    marks,
    naming_loss,
    new_video_judge,
    random_faults,
    spoil,
)
from instructvideo_kit.menagerie.world import Scene
from instructvideo_kit.reward.clip import ClipReward
from instructvideo_kit.reward.compose import WeightedReward, measure_scales, per_clip, vader_mixed
from instructvideo_kit.reward.videoscore import VideoScoreReward
from instructvideo_kit.widgets.judges import JudgeDashboard, judge_board, judge_order, pairs_in_common

FOX = Scene("fox", "right", "meadow", 3)


def redness(frames, prompts):
    r, g, b = frames.unbind(2)
    return (r - (g + b) / 2).mean((-1, -2))


def brightness(frames, prompts): return frames.square().mean((2, 3, 4))


@pytest.fixture(scope="module")
def video_judge(): return VideoScoreReward.from_pretrained("menagerie")


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(.1, 5), st.floats(-2, 2))
@settings(max_examples=25, deadline=None)
def test_a_weighted_reward_is_linear_in_its_weights_and_indifferent_to_its_means(w1, w2, d, m):
    x = torch.rand(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    both = WeightedReward({"a": redness, "b": brightness}, {"a": w1, "b": w2}, {"b": (m, d)})
    want = w1 * redness(x, None) + w2 * (brightness(x, None) - m) / d
    assert torch.allclose(both(x, None), want, atol=1e-5)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    moved = WeightedReward({"a": redness, "b": brightness}, {"a": w1, "b": w2}, {"b": (m + 1, d)})
    for y, reward in ((a, both), (b, moved)): reward(y, None).sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_composed_gradient_against_finite_differences():
    x = torch.rand(1, 2, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mixed = WeightedReward({"a": redness, "b": brightness}, {"a": .7, "b": -2.}, {"a": (0., .3)})
    assert torch.autograd.gradcheck(lambda y: mixed(y, None), (x,), eps=1e-6, atol=1e-8)


def test_the_small_clip_judge_against_finite_differences():
    judge = ClipReward.from_pretrained("menagerie", dtype=torch.float64)
    x = .2 + .6 * torch.rand(1, 1, 3, 36, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = x.clone().requires_grad_()
    way = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gradient, = torch.autograd.grad(judge(y, [FOX.caption]).sum(), y)
    slope = sum(s * judge(x + s * 1e-5 * way, [FOX.caption]).item() for s in (1, -1)) / 2e-5
    assert slope == pytest.approx((gradient * way).sum().item(), rel=1e-5)


def test_the_video_judge_against_finite_differences():
    judge = VideoScoreReward.from_pretrained("menagerie", dtype=torch.float64)
    x = .2 + .6 * torch.rand(1, 8, 3, 36, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = x.clone().requires_grad_()
    way = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gradient, = torch.autograd.grad(judge(y, [FOX.caption]).sum(), y)
    slope = sum(s * judge(x + s * 1e-4 * way, [FOX.caption]).sum().item() for s in (1, -1)) / 2e-4
    # RMSNorm and rotary positions round to float32
    assert slope == pytest.approx((gradient * way).sum().item(), rel=1e-2)


def test_what_cannot_be_composed_is_refused():
    x = torch.rand(2, 2, 3, 4, 4)
    with pytest.raises(ValueError, match="no reward"): WeightedReward({})
    with pytest.raises(ValueError, match="'c'.*a, b"): WeightedReward({"a": redness, "b": redness}, {"c": 1.})
    with pytest.raises(ValueError, match="per_clip"):
        WeightedReward({"a": redness, "b": per_clip(redness)})(x, ["", ""])
    with pytest.raises(ValueError, match="no scale"):
        measure_scales(WeightedReward({"a": redness}), torch.zeros(2, 2, 3, 4, 4), ["", ""])


def test_vader_mixed_is_vaders_loss():
    aes, hps = torch.tensor([[6.1]]), torch.tensor([[.31]])
    loss = (1.5 * .1 * (aes - 10).abs() + (1 - hps).abs()) / 2
    mixed = vader_mixed(lambda f, p: aes, lambda f, p: hps)(None, None)
    assert (loss + mixed).item() == pytest.approx((1.5 + 1) / 2) # a constant


def test_rewards_with_and_without_gradient_add_up():
    x = torch.rand(1, 2, 3, 32, 32, requires_grad=True)
    judge = ClipReward.from_pretrained("menagerie")
    both = WeightedReward({"judge": judge, "count": lambda f, p: torch.ones(f.shape[:2])})
    both(x, [FOX.caption]).sum().backward()
    assert x.grad.abs().sum() > 0


# the video judge

@given(st.integers(0, 2 ** 31))
@settings(max_examples=50, deadline=None)
def test_marks_lie_between_1_and_4_and_fall_with_strength(seed):
    rng = np.random.default_rng(seed)
    faults, asked = random_faults(rng), Scene("fox", str(rng.choice(["left", "right", "rest"])), "meadow")
    now = marks(FOX, asked, faults)
    worse = marks(FOX, asked, {k: min(1., v + .1) for k, v in faults.items()})
    assert all(1 <= m <= 4 for m in now) and all(b <= a + 1e-9 for a, b in zip(now, worse))
    assert set(faults) <= {"blur", "noise", "dull", "watermark", "flicker", "jitter", "freeze", "morph"}


def test_spoiling_freezes_and_splices_where_it_should():
    a, b, frames = torch.rand(16, 3, 32, 32), torch.rand(16, 3, 32, 32), torch.arange(16)
    frozen = spoil(a, b, FOX, {"freeze": .4}, frames)
    assert torch.equal(frozen[:10], a[:10]) and all(torch.equal(x, frozen[9]) for x in frozen[10:])
    other = spoil(a, b, FOX, {"morph": 1.}, frames)
    assert torch.equal(other[:8], a[:8]) and torch.equal(other[8:], b[8:])
    assert torch.equal(spoil(a, b, FOX, {}, frames), a)


def test_candidates_are_one_caption_with_strengths_from_0_to_1():
    clips, captions, strengths = candidates(3, 4, ("flicker",), seed=1, size=32)
    assert clips.shape == (3, 4, 16, 3, 32, 32) and len(set(captions)) <= 3
    assert torch.allclose(strengths.sort(1).values, torch.tensor([0, 1 / 3, 2 / 3, 1]).expand(3, -1))
    jumps = clips.mean((3, 4, 5)).diff(dim=2).abs().mean(2)
    assert torch.equal(jumps.argsort(1), strengths.argsort(1)) # flicker is what was asked for


def test_eyes_are_borrowed_faithfully():
    clip = ClipReward.from_pretrained("menagerie")
    reward, _ = new_video_judge(size=frame_size(clip.model.config))
    side, patch = PICTURE[frame_size(clip.model.config)]
    frames = torch.rand(12, 3, side, side, generator=torch.Generator().manual_seed(0))
    ours, theirs = reward.model.model.vision_model, clip.model.vision_model
    with torch.no_grad():
        borrow_eyes(ours, theirs, 2 * frames - 1)
        a = ours(pixel_values=2 * frames - 1,
                 patch_attention_mask=torch.ones(12, side // patch, side // patch, dtype=torch.bool)).last_hidden_state
        from instructvideo_kit.reward.base import preprocess
        b = theirs.post_layernorm(theirs(preprocess(frames, side, "squash")).last_hidden_state[:, 1:])
    same = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()
    others = torch.nn.functional.cosine_similarity(a, b.roll(1, 0), dim=-1).mean()
    assert same > .8 and same > others + .1


def test_naming_loss_is_least_for_the_right_words():
    words = torch.eye(6, 8)
    seen = torch.stack([words[1] + words[2], words[4]])[:, None]
    right, wrong = naming_loss(seen, words, [[1, 2], [4]]), naming_loss(seen, words, [[0, 3], [5]])
    assert right < 1 < wrong


def test_a_clip_asked_about_twice_scores_as_if_asked_alone():
    from instructvideo_kit.menagerie.video_judge import asked_twice
    reward, _ = new_video_judge(3)
    clips, wrong = torch.rand(2, 8, 3, 64, 64), Scene("wolf", "closer", "night").caption
    with torch.no_grad():
        both, seen, last = asked_twice(reward, clips, [FOX.caption] * 2, [wrong] * 2)
        alone = torch.cat([reward(clips, [FOX.caption] * 2), reward(clips, [wrong] * 2)])
    assert (both - alone).abs().max() < 1e-4 and len(seen) == 16 and len(last) == 4
    assert (both[:2] - both[2:]).abs().min() > 0, "the caption reaches the scores"


def test_each_frame_is_named_by_what_it_shows():
    from instructvideo_kit.menagerie.video_judge import WORDS, batch_of, examples, random_faults
    clean, twin, chosen, others = examples("train", 6, 3, 32)
    for seed in range(20):
        made = batch_of(clean, twin, chosen, others, np.arange(6), np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        for i, faults in enumerate([random_faults(rng) for _ in range(6)]):
            names = [WORDS[made["named"][i * 8 + f][0]] for f in range(8)]
            late = round(4 * faults.get("morph", 0.))
            assert names == [chosen[i].species] * (8 - late) + [others[i].species] * late
        assert all((a.species, a.place, a.motion) != (s.species, s.place, s.motion)
                   for a, s in zip(made["wrong"], chosen))


def test_the_ranking_loss_pulls_the_marks_of_two_captions_apart():
    from instructvideo_kit.menagerie.video_judge import HalfWay, asked_twice, batch_of, examples, video_judge_loss
    reward, tokenizer = new_video_judge(1, 32)
    half_way, (clean, twin, chosen, others) = HalfWay(reward.model, tokenizer), examples("train", 4, 3, 32)
    made = batch_of(clean, twin, chosen, others, np.arange(4), np.random.default_rng(0))
    right, wrong = ([s.caption for s in side] for side in (chosen, made["wrong"]))
    def apart():
        with torch.no_grad(): above, below = asked_twice(reward, made["clips"], right, wrong)[0][:, 3].chunk(2)
        return (above - below).mean().item()
    before, optimiser = apart(), torch.optim.AdamW(reward.model.parameters(), lr=1e-3)
    for _ in range(12):
        optimiser.zero_grad()
        video_judge_loss(reward, half_way, made, chosen).backward()
        optimiser.step()
    assert apart() > before + .3
    half_way.hook.remove()


def test_the_shipped_video_judge_knows_a_steady_clip(video_judge):
    assert video_judge.dims == DIMENSIONS and video_judge.name == "menagerie"
    clips, captions, strengths = candidates(6, 2, ("flicker", "jitter"), seed=21,
                                               size=frame_size(video_judge.model.config))
    with torch.no_grad(): scores = torch.stack([video_judge(c, [p] * 2)[:, 1] for c, p in zip(clips, captions)])
    assert ((scores[:, 0] > scores[:, 1]) == (strengths[:, 0] < strengths[:, 1])).float().mean() >= 5 / 6


def test_the_shipped_video_judge_does_not_mind_its_neighbours(video_judge):
    clips, captions, _ = candidates(2, 2, seed=22, size=frame_size(video_judge.model.config))
    flat, said = clips.flatten(0, 1), [p for p in captions for _ in range(2)]
    with torch.no_grad():
        together, alone = video_judge(flat, said), torch.cat([video_judge(x[None], [p]) for x, p in zip(flat, said)])
    assert (together - alone).abs().max() < 1e-4


def test_the_video_judge_is_trained_and_goes_on_where_it_stopped(tmp_path):
    from instructvideo_kit.menagerie.video_judge import save_video_judge, train_video_judge
    whole, tokenizer = train_video_judge(tmp_path / "a", steps=2, n_clips=8, batch=2)
    rows = (tmp_path / "a/log.jsonl").read_text()
    assert math.isfinite(float(__import__("json").loads(rows.splitlines()[-1])["loss"]))
    save_video_judge(whole, tokenizer, tmp_path / "out")
    again = VideoScoreReward.from_pretrained(tmp_path / "out")
    x = torch.rand(1, 16, 3, 32, 32)
    with torch.no_grad():
        assert (again(x, [FOX.caption]) - whole.to(torch.float32)(x, [FOX.caption])).abs().max() < .02 # half precision


# judging the judges

@given(st.integers(2, 10), st.integers(1, 30), st.integers(0, 10 ** 6))
@settings(max_examples=60, deadline=None)
def test_mrr_lies_within_the_bounds_of_its_recalls(n, prompts, seed):
    scores = torch.rand(prompts, n, generator=torch.Generator().manual_seed(seed))
    ks = tuple(k for k in (1, 2, 4) if k < n)
    found = rank_metrics(scores, torch.zeros(prompts, dtype=torch.long), ks)
    low, high = mrr_bounds({k: found[f"recall@{k}"] for k in ks}, n)
    assert low - 1e-6 <= found["mrr"] <= high + 1e-6


def test_bounds_by_hand():
    low, high = mrr_bounds({1: .5, 2: .75}, 4) # rest: rank 3 or 4
    assert (low, high) == pytest.approx((.5 + .25 / 2 + .25 / 4, .5 + .25 / 2 + .25 / 3))
    with pytest.raises(ValueError, match="1 <= k < 4"): mrr_bounds({4: 1.}, 4)


def test_chance_by_hand():
    assert chance(2, (1,)) == {"mrr": .75, "recall@1": .5}
    with pytest.raises(ValueError, match="at least 2"): chance(1)


def test_pairwise_accuracy_counts_ties_of_the_judge_half_and_leaves_out_those_of_the_truth():
    # pairs (0, 1) tied, (0, 2) right, (1, 2) does not count
    assert pairwise_accuracy([[1., 1., 0.]], [[3., 2., 2.]]) == .75
    with pytest.raises(ValueError, match="nothing to judge"): pairwise_accuracy([[1., 2.]], [[1., 1.]])
    with pytest.raises(ValueError, match="same shape"): pairwise_accuracy([[1., 2.]], [[1., 2., 3.]])
    with pytest.raises(ValueError, match="nan"): pairwise_accuracy([[1., float("nan")]], [[1., 2.]])


@given(st.integers(0, 10 ** 6))
@settings(max_examples=30, deadline=None)
def test_agreement_is_symmetric_and_turns_with_the_sign(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, 5, (3, 5), generator=g).double() for _ in range(2))
    assert agreement(a, b) == agreement(b, a)
    assert agreement(a, -b)["kendall"] == pytest.approx(-agreement(a, b)["kendall"])


def test_the_table_scores_every_judge_on_the_same_clips():
    clips, quality = torch.rand(5, 4, 3, 3, 8, 8), torch.rand(5, 4)
    rows = judge_table({"bright": lambda c, p: c.mean((1, 2, 3, 4)), "dark": lambda c, p: -c.mean((1, 2, 3, 4))}, clips,
                       ["x"] * 5, quality)
    assert rows["bright"]["pairs"] == pytest.approx(1 - rows["dark"]["pairs"]) and rows["chance"]["recall@2"] == .5
    assert table_text(rows).count("\n") == 4


# the dashboard

def test_the_dashboard_hides_the_judge_until_asked():
    clips, scores = torch.rand(3, 8, 3, 16, 16), torch.tensor([[1., 4.], [2., 3.], [3., 2.]])
    panel = JudgeDashboard(clips, scores, ("a", "b"))
    hidden = panel.image.value
    panel.controls["A"].value, panel.controls["B"].value, panel.controls["C"].value = 3, 2, 1
    panel.controls["mark"].value = "a"
    assert "reveal" in panel.note.value
    panel.controls["reveal"].value = "reveal"
    assert "3 of 3" in panel.note.value and panel.image.value != hidden
    panel.controls["mark"].value = "b"
    assert "0 of 3" in panel.note.value


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_orders_are_permutations(column):
    order = judge_order([[float(x)] for x in column], 0)
    assert sorted(order) == list(range(1, len(column) + 1))
    same, both = pairs_in_common(order, order)
    assert same == both == len(column) * (len(column) - 1) // 2


def test_boards_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="as many of each"):
        judge_board(torch.rand(2, 4, 3, 8, 8), [[1.]], ["a"], [1, 2])
    with pytest.raises(ValueError, match="one per candidate"): pairs_in_common([1], [1, 2])
    with pytest.raises(ValueError, match="marks"): judge_order([1., 2.])
