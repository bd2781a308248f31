"Metrics and evaluation: published formulas on fixed numbers, coverage of the bootstrap, pairing, bad input."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from instructvideo_kit.files import KitError
from instructvideo_kit.measure.evaluate import Evaluation, compare, evaluate, judge_videos, prompt_groups, prompt_noise
from instructvideo_kit.measure import metrics
from instructvideo_kit.measure.metrics import frechet_distance, paired_bootstrap, rank_metrics, temporal_flicker


def test_flicker_on_hand_made_numbers():
    clip = torch.tensor([0., .2, .6]).view(1, 3, 1, 1, 1).expand(1, 3, 3, 2, 2) # differences .2 and .4
    assert temporal_flicker(clip).item() == pytest.approx(1 - .3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_flicker_equals_the_8_bit_formula_and_ignores_order_of_time(seed, n_frames):
    frames = np.random.default_rng(seed).integers(0, 256, (n_frames, 5, 4, 3), dtype=np.uint8)
    published = (255 - np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(frames, frames[1:])])) / 255
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2)[None] / 255
    assert temporal_flicker(clip).item() == pytest.approx(published, abs=1e-6)
    assert temporal_flicker(clip.flip(1)).item() == pytest.approx(published, abs=1e-6)
    assert 0 <= temporal_flicker(clip).item() <= 1


def test_flicker_keeps_videos_apart():
    clips = torch.rand(3, 4, 3, 2, 2)
    assert torch.allclose(temporal_flicker(clips), torch.cat([temporal_flicker(c[None]) for c in clips]))


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (1, 1, 3, 2, 2)])
def test_flicker_refuses(shape):
    with pytest.raises(ValueError): temporal_flicker(torch.rand(shape))


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(3), 0
    for _ in range(200):
        before = rng.normal(0, 5, (40, 2)) # prompts differ a lot: pairing has to take that away
        after = before + .2 + rng.normal(0, .5, (40, 1))
        _, low, high = paired_bootstrap(before, after, n=500)
        hits += low <= .2 <= high
    assert .88 <= hits / 200 <= .99


def test_bootstrap_averages_seeds_within_a_prompt():
    gain = np.array([[1., 1.], [0., 0.], [0., 0.], [0., 0.]])
    assert paired_bootstrap(np.zeros((4, 2)), gain) == paired_bootstrap(np.zeros(4), gain.mean(1))


def test_bootstrap_is_repeatable_and_odd():
    rng = np.random.default_rng(0); a, b = rng.normal(size=30), rng.normal(size=30)
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)
    mean, low, high = paired_bootstrap(a, b); back = paired_bootstrap(b, a)
    assert back[0] == pytest.approx(-mean) and back[1] == pytest.approx(-high, abs=1e-12) and back[2] == pytest.approx(-low, abs=1e-12)


@pytest.mark.parametrize("before, after, says", [([1., 2.], [1.], "pair the same"), ([1., np.nan], [1., 1.], "nan"), ([], [], "shape")])
def test_bootstrap_refuses(before, after, says):
    with pytest.raises(ValueError, match=says): paired_bootstrap(before, after)


def test_frechet_between_diagonal_gaussians():
    "Exact moments by construction: orthogonal columns of plus and minus one have covariance n/(n-1) times the identity."
    had = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=float)
    a, b = had * [1, 2, 3], had * [2, 2, 1] + [0, 0, 5]
    scale = np.sqrt(4/3)
    expected = 25 + ((scale * (np.array([1, 2, 3]) - [2, 2, 1]))**2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_is_symmetric_and_survives_singular_covariances():
    rng = np.random.default_rng(0); a, b = rng.normal(size=(6, 40)), rng.normal(size=(9, 40)) * 3
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(frechet_distance(np.zeros((4, 5)), np.ones((4, 5)))) and frechet_distance(np.zeros((4, 5)), np.ones((4, 5))) == pytest.approx(5)


def test_ranks_with_ties():
    scores = torch.tensor([[3., 2., 1., 0.], [1., 1., 1., 1.], [0., 5., 5., 1.]])
    found = rank_metrics(scores, torch.tensor([0, 2, 3]), ks=(1, 2, 4)) # ranks 1, 2.5, 3
    assert found["mrr"] == pytest.approx((1 + 1/2.5 + 1/3) / 3)
    assert (found["recall@1"], found["recall@2"], found["recall@4"]) == pytest.approx((1/3, 1/3, 1.))


def test_mrr_lies_where_its_recalls_allow():
    scores = torch.rand(500, 8, generator=torch.Generator().manual_seed(0)); best = torch.zeros(500, dtype=torch.long)
    m = rank_metrics(scores, best, ks=range(1, 9)); steps = [m[f"recall@{k}"] for k in range(1, 9)]
    assert m["mrr"] == pytest.approx(sum((b - a)/k for k, (a, b) in enumerate(zip([0, *steps], steps), 1)))


class Painter:
    "A policy that paints the mean of its noise: fast, and different for each prompt and seed."
    latent_shape = (2, 8, 2, 2)
    def generate(self, prompts, n_ddim, guidance_scale=None, noise=None, batch=8):
        return noise.mean((1, 3, 4))[:, :, None, None, None].sigmoid().expand(-1, -1, 3, 4, 4)


brightness = lambda frames, prompts: frames.mean((-1, -2, -3))
PROMPTS = {"in": ["a cat", "a dog", "a fish"], "new": ["a snail"]}


def test_videos_depend_on_prompt_and_seed_alone():
    whole = evaluate(Painter(), brightness, PROMPTS, seeds=(0, 1), progress=False, batch=3)
    turned = evaluate(Painter(), brightness, {"new": ["a snail"], "in": ["a fish", "a cat", "a dog"]}, seeds=(1, 0), progress=False, batch=8)
    assert whole.values("reward") == pytest.approx(turned.values("reward"), abs=1e-6) and len(set(whole.values("reward").values())) == 8
    assert not torch.equal(prompt_noise("a cat", 0, (1, 2)), prompt_noise("a cat", 1, (1, 2)))


def test_reward_is_taken_on_first_frames_of_segments():
    videos = torch.zeros(1, 8, 3, 2, 2); videos[:, [0, 2, 4, 6]] = 1
    assert judge_videos(videos, ["a cat"], brightness, n_segments=4)["reward"] == [1.]
    assert judge_videos(videos.flip(1), ["a cat"], brightness, n_segments=4)["reward"] == [0.]


def test_comparison_by_hand_and_missing_figures():
    make = lambda gain: Evaluation([dict(prompt=p, group=g, seed=s, reward=i + gain*(s + 1), place=None if p == "d" else 1.)
                                    for i, (p, g) in enumerate(zip("abcd", ("x", "x", "y", "y"))) for s in (0, 1)])
    table = compare(make(0.), make(.2))
    assert table.row("reward")["difference"] == pytest.approx(.3) and table.row("reward")["prompts"] == 4
    assert table.row("reward", "y")["before"] == pytest.approx(2.5)
    assert table.row("place")["prompts"] == 3 and table.row("place", "y")["prompts"] == 1
    assert str(table).splitlines()[0].split()[:2] == ["figure", "group"] and "one prompt" in str(table)


def test_evaluation_survives_a_file(tmp_path):
    found = evaluate(Painter(), brightness, PROMPTS, progress=False, oracle=lambda v, p: {"nothing": torch.full((len(v),), torch.nan)}, label="x")
    found.save(tmp_path/"e.json"); again = Evaluation.load(tmp_path/"e.json")
    assert again.rows == found.rows and again.label == "x" and found.rows[0]["nothing"] is None and "nothing" not in found.means()
    found.save(tmp_path/"e.csv"); assert (tmp_path/"e.csv").read_text().splitlines()[0] == "prompt,group,seed,reward,temporal_flicker,nothing"
    assert compare(again, found).row("reward")["difference"] == 0


@pytest.mark.parametrize("prompts, says", [([], "no prompts"), ("a cat", "single text"), ([""], "expected text"), ({"a": ["x"], "b": ["x"]}, "two groups")])
def test_prompts_refused(prompts, says):
    with pytest.raises(KitError, match=says): prompt_groups(prompts)


def test_bad_files_and_oracles_are_refused(tmp_path):
    (tmp_path/"e.json").write_text("{")
    with pytest.raises(KitError, match="not an evaluation"): Evaluation.load(tmp_path/"e.json")
    with pytest.raises(KitError, match="ends in .json or .csv"): Evaluation([]).save(tmp_path/"e.txt")
    with pytest.raises(KitError, match="2 numbers for 1 videos"):
        judge_videos(torch.zeros(1, 8, 3, 2, 2), ["a"], brightness, oracle=lambda v, p: {"x": [1., 2.]})


def published_consistency(features): # VBench's loop, one clip, written out
    unit, total = [f / np.linalg.norm(f) for f in features], 0
    for i in range(1, len(unit)): total += (max(0, unit[i - 1] @ unit[i]) + max(0, unit[0] @ unit[i])) / 2
    return total / (len(unit) - 1)

def published_dynamic(magnitude, n_frames): # VBench's loop, one clip
    count, (h, w) = 0, magnitude.shape[1:]
    for pair in magnitude: count += np.sort(pair.flatten())[::-1][:int(h * w * .05)].mean() > 6 * min(h, w) / 256
    return float(count >= round(4 * n_frames / 16))

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9))
def test_vbench_reductions_equal_the_published_loops(seed, n_frames):
    rng = np.random.default_rng(seed)
    features, magnitude = rng.normal(size=(2, n_frames, 6)), rng.exponential(.3, (2, n_frames - 1, 32, 32)) * rng.random((2, n_frames - 1, 1, 1)) * 2
    got = metrics.consistency(torch.tensor(features))
    assert got.tolist() == pytest.approx([published_consistency(f) for f in features], abs=1e-5)
    assert metrics.dynamic_degree(torch.tensor(magnitude)).tolist() == [published_dynamic(m, n_frames) for m in magnitude]


def test_smoothness_uses_the_interpolator_it_is_given_and_drops_an_odd_last_frame():
    clip, seen = torch.rand(1, 6, 3, 4, 4), []
    def guess(a, b): seen.append((a, b)); return a
    expected = 1 - ((clip[0, [0, 2]] - clip[0, [1, 3]]).abs().mean()) # frames 1 and 3; frame 5 has no right neighbour
    assert metrics.motion_smoothness(clip, guess).item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.equal(seen[0][1], clip[0, [2, 4]])


def test_flow_finds_a_known_shift_in_each_direction():
    picture = torch.nn.functional.avg_pool2d(torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(1)), 3, 1)
    for y, x in ((0, 2), (3, 0), (-1, -2)):
        pair = torch.stack([picture[:, 3:35, 3:35], picture[:, 3 + y:35 + y, 3 + x:35 + x]])[None]
        assert metrics.flow_magnitude(pair)[..., 5:-5, 5:-5].median().item() == pytest.approx((y * y + x * x) ** .5, abs=1e-6)


def test_frechet_equals_the_product_formula():
    "Tr sqrt(S_r S_f) from the eigenvalues of the plain, unsymmetric product."
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)) + .3
    s, f = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(f) - 2 * np.sqrt(np.linalg.eigvals(s @ f).astype(complex)).real.sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_alignment_by_hand_and_its_bad_input():
    features = torch.tensor([[[3., 4.], [4., 3.]]])
    assert metrics.alignment(features, torch.tensor([[1., 0.]]), 250).item() == pytest.approx(250 * (.6 + .8) / 2, rel=1e-6)
    for call in (lambda: metrics.alignment(features, torch.rand(2, 2)), lambda: metrics.consistency(torch.rand(1, 1, 4)),
                 lambda: metrics.motion_smoothness(torch.rand(1, 2, 3, 4, 4)), lambda: metrics.dynamic_degree(torch.rand(2, 3))):
        with pytest.raises(ValueError): call()
