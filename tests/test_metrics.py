"Metrics and evaluation: published formulas on fixed numbers, coverage of the bootstrap, pairing, bad input."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructvideo_kit.files import KitError
from instructvideo_kit.measure import metrics
from instructvideo_kit.measure.curves import (
    Curve,
    best_checkpoint,
    difference_at_equal,
    gain_at_equal,
    read_at,
)
from instructvideo_kit.measure.evaluate import Evaluation, compare, evaluate, judge_videos, prompt_groups, prompt_noise
from instructvideo_kit.measure.metrics import (
    frechet_distance,
    paired_bootstrap,
    rank_metrics,
    seed_bootstrap,
    temporal_flicker,
)


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
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=30), rng.normal(size=30)
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)
    mean, low, high = paired_bootstrap(a, b)
    back = paired_bootstrap(b, a)
    assert back == pytest.approx((-mean, -high, -low), abs=1e-12)


@pytest.mark.parametrize("before, after, says", [
    ([1., 2.], [1.], "pair the same"), ([1., np.nan], [1., 1.], "nan"), ([], [], "shape")])
def test_bootstrap_refuses(before, after, says):
    with pytest.raises(ValueError, match=says): paired_bootstrap(before, after)


# Five tuning seeds and captions of known variance: (seed, caption, rest) standard deviations. The third is what the
# scoreboard's runs show; the last has captions as skewed as an exponential.
STUDIES = [(.05, .07, .10, False), (.01, .20, .10, False), (.03, .07, .07, False), (.03, .10, .05, True)]

def studies(of_seed, of_caption, rest, skewed, n=500, seeds=5, captions=32, truth=.1):
    rng = np.random.default_rng(11)
    caption = rng.exponential(1, (n, 1, captions)) - 1 if skewed else rng.normal(size=(n, 1, captions))
    noise = of_seed*rng.normal(size=(n, seeds, 1)) + rest*rng.normal(size=(n, seeds, captions))
    return truth + noise + of_caption*caption


def share_that_holds(interval, made, truth=.1):
    ends = [interval(difference) for difference in made]
    return np.mean([low <= truth <= high for _, low, high in ends])


@pytest.mark.parametrize("case", STUDIES)
def test_seed_bootstrap_covers_what_it_says_at_five_seeds(case):
    share = share_that_holds(lambda d: seed_bootstrap(d, n=300), studies(*case))
    assert .92 <= share <= .97, share


def test_seed_bootstrap_is_safe_where_there_is_noise_alone():
    assert share_that_holds(lambda d: seed_bootstrap(d, n=300), studies(0., 0., .1, False, n=300)) >= .92


def test_captions_alone_do_not_cover_another_tuning_seed():
    "What the scoreboard did before: right about the checkpoint, wrong about the method."
    share = share_that_holds(lambda d: paired_bootstrap(0*d.mean(0), d.mean(0), 300), studies(*STUDIES[0]))
    assert share < .8, share


def test_seed_bootstrap_is_repeatable_and_does_not_mind_the_order():
    d = studies(*STUDIES[2], n=1)[0]
    mean, low, high = seed_bootstrap(d)
    assert seed_bootstrap(d) == (mean, low, high) and mean == pytest.approx(d.mean()) and low < mean < high
    shuffled = seed_bootstrap(d[::-1, ::-1])
    assert shuffled == pytest.approx((mean, low, high), abs=.1*(high - low))
    wide = seed_bootstrap(d, level=.99)
    assert wide[1] < low and high < wide[2]


@pytest.mark.parametrize("shape", [(1, 8), (5, 1), (5,), (2, 2, 2)])
def test_seed_bootstrap_refuses_what_has_no_spread(shape):
    with pytest.raises(ValueError, match="at least 2 of each"):
        seed_bootstrap(np.zeros(shape))


def test_seed_bootstrap_refuses_nan():
    with pytest.raises(ValueError, match="nan"):
        seed_bootstrap(np.full((3, 4), np.nan))


@pytest.mark.parametrize("df, tabled", [(1, 12.7062), (2, 4.30265), (4.5, 2.6585), (10, 2.22814), (1000, 1.96234)])
def test_students_quantile_as_tabled(df, tabled):
    assert metrics.t_quantile(.975, df) == pytest.approx(tabled, rel=2e-3)


def curve(compute, reward, values, pace=1.):
    compute = np.array(compute, dtype=float)
    of_captions = np.array(values, dtype=float)[:, None].repeat(3, 1)
    return Curve(compute, compute*pace, np.array(reward, dtype=float), of_captions)


def test_at_equal_compute_time_and_reward_the_same_two_runs_compare_otherwise():
    "One gains twice as fast and is steadier for its reward; in wall time it is the slower one."
    fast = curve([0, 10, 20], [0, .2, .4], [1., .9, .8], pace=4.)
    slow = curve([0, 10, 20], [0, .1, .2], [1., .93, .86])
    assert difference_at_equal([fast], [slow], "compute")[0] == pytest.approx([-.06]*3)  # .80 and .86 at 20
    assert difference_at_equal([fast], [slow], "reward")[0] == pytest.approx([.04]*3)    # .90 and .86 at .2
    assert difference_at_equal([fast], [slow], "seconds")[0] == pytest.approx([.09]*3)   # .95 and .86 at 20 seconds
    assert gain_at_equal([fast], [slow], "reward")[0] == pytest.approx([-.1]*3)


def test_each_seed_is_read_at_its_own_place():
    early, late = curve([0, 10], [0, .2], [0., 1.]), curve([0, 10], [0, .4], [0., 1.])
    rival = curve([0, 10], [0, .1], [0., 0.])
    rows = difference_at_equal([early, late], [rival, rival], "reward")
    assert rows.shape == (2, 3) and rows[:, 0] == pytest.approx([.5, .25])


def test_a_run_that_never_rises_is_read_where_it_began():
    flat, rising = curve([0, 10], [0., -.1], [1., .5]), curve([0, 10], [0., .2], [1., .9])
    assert difference_at_equal([rising], [flat], "reward")[0] == pytest.approx([0.]*3)


def test_a_reward_that_falls_again_is_read_at_the_first_crossing():
    collapsed = curve([0, 10, 20], [0, .4, 0.], [1., .8, .1])
    assert read_at(collapsed, "reward", .2) == pytest.approx([.9]*3)


def test_the_best_checkpoint_is_chosen_by_tuning_captions():
    assert best_checkpoint({10: .1, 20: .5, 40: .4}) == 20


def test_frechet_between_diagonal_gaussians():
    "Exact moments by construction: orthogonal columns of plus and minus one have covariance n/(n-1) times identity."
    had = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=float)
    a, b = had * [1, 2, 3], had * [2, 2, 1] + [0, 0, 5]
    scale = np.sqrt(4/3)
    expected = 25 + ((scale * (np.array([1, 2, 3]) - [2, 2, 1]))**2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_is_symmetric_and_survives_singular_covariances():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(6, 40)), rng.normal(size=(9, 40)) * 3
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(np.zeros((4, 5)), np.ones((4, 5))) == pytest.approx(5)


def test_ranks_with_ties():
    scores = torch.tensor([[3., 2., 1., 0.], [1., 1., 1., 1.], [0., 5., 5., 1.]])
    found = rank_metrics(scores, torch.tensor([0, 2, 3]), ks=(1, 2, 4)) # ranks 1, 2.5, 3
    assert found["mrr"] == pytest.approx((1 + 1/2.5 + 1/3) / 3)
    assert (found["recall@1"], found["recall@2"], found["recall@4"]) == pytest.approx((1/3, 1/3, 1.))


def test_mrr_lies_where_its_recalls_allow():
    scores = torch.rand(500, 8, generator=torch.Generator().manual_seed(0))
    best = torch.zeros(500, dtype=torch.long)
    m = rank_metrics(scores, best, ks=range(1, 9))
    steps = [m[f"recall@{k}"] for k in range(1, 9)]
    assert m["mrr"] == pytest.approx(sum((b - a)/k for k, (a, b) in enumerate(zip([0, *steps], steps), 1)))


class Painter:
    "A policy that paints the mean of its noise: fast, and different for each prompt and seed."
    latent_shape = (2, 8, 2, 2)
    def generate(self, prompts, n_ddim, guidance_scale=None, noise=None, batch=8, solver="ddim"):
        return noise.mean((1, 3, 4))[:, :, None, None, None].sigmoid().expand(-1, -1, 3, 4, 4)


def brightness(frames, prompts): return frames.mean((-1, -2, -3))


PROMPTS = {"in": ["a cat", "a dog", "a fish"], "new": ["a snail"]}


def test_videos_depend_on_prompt_and_seed_alone():
    whole = evaluate(Painter(), brightness, PROMPTS, seeds=(0, 1), progress=False, batch=3)
    turned_round = {"new": ["a snail"], "in": ["a fish", "a cat", "a dog"]}
    turned = evaluate(Painter(), brightness, turned_round, seeds=(1, 0), progress=False, batch=8)
    assert whole.values("reward") == pytest.approx(turned.values("reward"), abs=1e-6)
    assert len(set(whole.values("reward").values())) == 8
    assert not torch.equal(prompt_noise("a cat", 0, (1, 2)), prompt_noise("a cat", 1, (1, 2)))


def test_reward_is_taken_on_first_frames_of_segments():
    videos = torch.zeros(1, 8, 3, 2, 2)
    videos[:, [0, 2, 4, 6]] = 1
    assert judge_videos(videos, ["a cat"], brightness, n_segments=4)["reward"] == [1.]
    assert judge_videos(videos.flip(1), ["a cat"], brightness, n_segments=4)["reward"] == [0.]


def test_comparison_by_hand_and_missing_figures():
    def make(gain):
        rows = []
        for i, (p, g) in enumerate(zip("abcd", "xxyy")):
            place = None if p == "d" else 1.
            rows += [dict(prompt=p, group=g, seed=s, reward=i + gain*(s + 1), place=place) for s in (0, 1)]
        return Evaluation(rows)

    table = compare(make(0.), make(.2))
    assert table.row("reward")["difference"] == pytest.approx(.3) and table.row("reward")["prompts"] == 4
    assert table.row("reward", "y")["before"] == pytest.approx(2.5)
    assert table.row("place")["prompts"] == 3 and table.row("place", "y")["prompts"] == 1
    assert str(table).splitlines()[0].split()[:2] == ["figure", "group"] and "one prompt" in str(table)


def test_evaluation_survives_a_file(tmp_path):
    def nothing(videos, prompts): return {"nothing": torch.full((len(videos),), torch.nan)}
    found = evaluate(Painter(), brightness, PROMPTS, progress=False, oracle=nothing, label="x")
    found.save(tmp_path/"e.json")
    again = Evaluation.load(tmp_path/"e.json")
    assert again.rows == found.rows and again.label == "x"
    assert found.rows[0]["nothing"] is None and "nothing" not in found.means()
    found.save(tmp_path/"e.csv")
    assert (tmp_path/"e.csv").read_text().splitlines()[0] == "prompt,group,seed,reward,temporal_flicker,nothing"
    assert compare(again, found).row("reward")["difference"] == 0


@pytest.mark.parametrize("prompts, says", [
    ([], "no prompts"), ("a cat", "single text"), ([""], "expected text"), ({"a": ["x"], "b": ["x"]}, "two groups")])
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
    features = rng.normal(size=(2, n_frames, 6))
    magnitude = rng.exponential(.3, (2, n_frames - 1, 32, 32)) * rng.random((2, n_frames - 1, 1, 1)) * 2
    got = metrics.consistency(torch.tensor(features))
    assert got.tolist() == pytest.approx([published_consistency(f) for f in features], abs=1e-5)
    found = metrics.dynamic_degree(torch.tensor(magnitude)).tolist()
    assert found == [published_dynamic(m, n_frames) for m in magnitude]


def test_smoothness_uses_the_interpolator_it_is_given_and_drops_an_odd_last_frame():
    clip, seen = torch.rand(1, 6, 3, 4, 4), []
    def guess(a, b):
        seen.append((a, b))
        return a
    expected = 1 - ((clip[0, [0, 2]] - clip[0, [1, 3]]).abs().mean()) # frames 1 and 3; frame 5 has no right neighbour
    assert metrics.motion_smoothness(clip, guess).item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.equal(seen[0][1], clip[0, [2, 4]])


def test_flow_finds_a_known_shift_in_each_direction():
    picture = torch.nn.functional.avg_pool2d(torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(1)), 3, 1)
    for y, x in ((0, 2), (3, 0), (-1, -2)):
        pair = torch.stack([picture[:, 3:35, 3:35], picture[:, 3 + y:35 + y, 3 + x:35 + x]])[None]
        inner = metrics.flow_magnitude(pair)[..., 5:-5, 5:-5]
        assert inner.median().item() == pytest.approx((y * y + x * x) ** .5, abs=1e-6)


def test_frechet_equals_the_product_formula():
    "Tr sqrt(S_r S_f) from the eigenvalues of the plain, unsymmetric product."
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)) + .3
    s, f = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(s @ f).astype(complex)).real.sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(f) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_alignment_by_hand_and_its_bad_input():
    features = torch.tensor([[[3., 4.], [4., 3.]]])
    found = metrics.alignment(features, torch.tensor([[1., 0.]]), 250)
    assert found.item() == pytest.approx(250 * (.6 + .8) / 2, rel=1e-6)
    calls = [(metrics.alignment, (features, torch.rand(2, 2))), (metrics.consistency, (torch.rand(1, 1, 4),)),
             (metrics.motion_smoothness, (torch.rand(1, 2, 3, 4, 4),)), (metrics.dynamic_degree, (torch.rand(2, 3),))]
    for function, arguments in calls:
        with pytest.raises(ValueError): function(*arguments)
