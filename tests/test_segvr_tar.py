"SegVR and TAR: segments, sampling statistics, weights, aggregation, bad input."
import math

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from instructvideo_kit.reward.segvr import segment_bounds, segment_frames, segmental_reward
from instructvideo_kit.reward.tar import expected_weights, tar_center, tar_weights


def given(*args): return lambda test: settings(deadline=None, max_examples=40)(hypothesis.given(*args)(test))

sizes = st.integers(1, 40).flatmap(lambda f: st.tuples(st.just(f), st.integers(1, f)))
def generator(seed=0): return torch.Generator().manual_seed(seed)

@given(sizes)
def test_segments_partition_the_frames(size):
    n_frames, n_segments = size
    bounds = segment_bounds(n_frames, n_segments)
    assert bounds[0] == 0 and bounds[-1] == n_frames and len(bounds) == n_segments + 1
    assert bounds.diff().min() >= 1 and bounds.diff().max() - bounds.diff().min() <= 1

@given(sizes, st.sampled_from(["random", "first", "middle"]), st.integers(1, 5))
def test_one_frame_of_each_segment(size, mode, batch):
    n_frames, n_segments = size
    g = segment_frames(n_frames, n_segments, batch, mode, generator())
    bounds = segment_bounds(n_frames, n_segments)
    assert g.shape == (batch, n_segments) and g.dtype == torch.long
    assert ((bounds[:-1] <= g) & (g < bounds[1:])).all()
    if n_segments > 1: assert (g.diff(dim=1) > 0).all()

@pytest.mark.parametrize("n_frames, n_segments", [(16, 4), (17, 4), (18, 4), (19, 4), (7, 3), (5, 5), (9, 1)])
def test_every_frame_is_reachable_and_equally_likely_in_its_segment(n_frames, n_segments):
    g = segment_frames(n_frames, n_segments, 4000, "random", generator())
    counts = torch.bincount(g.flatten(), minlength=n_frames) / 4000
    lengths = segment_bounds(n_frames, n_segments).diff()
    expected = torch.repeat_interleave(1 / lengths, lengths)
    assert (counts - expected).abs().max() < 0.04          # five standard errors

def test_fixed_modes_and_the_papers_grid():
    assert segment_frames(16, 4, mode="first").tolist() == [[0, 4, 8, 12]]
    assert segment_frames(16, 4, 2, mode="middle").tolist() == [[2, 6, 10, 14]] * 2
    assert segment_frames(15, 3, mode="middle").tolist() == [[2, 7, 12]]
    assert segment_frames(4, 4).tolist() == [[0, 1, 2, 3]]

def test_generator_decides():
    def draw(seed):
        return segment_frames(64, 4, 8, generator=generator(seed)).tolist()
    assert draw(1) == draw(1) != draw(2)
    before = torch.get_rng_state()
    draw(1)
    assert torch.equal(before, torch.get_rng_state())      # the global generator is left alone
    rows = segment_frames(64, 4, 8, generator=generator(1))
    assert len({tuple(row) for row in rows.tolist()}) == 8    # clips of a batch draw for themselves

@pytest.mark.parametrize("call, words", [
    (lambda: segment_frames(16, 17), "n_segments is 17.*1..16"), (lambda: segment_frames(16, 0), "n_segments is 0"),
    (lambda: segment_frames(0, 1), "n_segments is 1"),
    (lambda: segment_frames(16, 4, 0), "batch is 0"), (lambda: segment_frames(16, 4, mode="last"), "'last'"),
    (lambda: segmental_reward(torch.zeros(4)), r"\(4,\)"),
    (lambda: segmental_reward(torch.zeros(2, 4), torch.zeros(4)), r"\(4,\)"),
    (lambda: segmental_reward(torch.zeros(2, 4), torch.zeros(4, 2)), r"\(4, 2\)"),
    (lambda: tar_weights(torch.zeros(1, 4).long(), 16, lam=-1), "lam is -1"),
    (lambda: tar_weights([[0]], 16, lam=math.nan), "lam is nan"),
    (lambda: tar_weights([[0]], 16, lam=math.inf), "lam is inf"),
    (lambda: tar_weights([[0]], 16, center="middle"), "'middle'"),
    (lambda: tar_weights([[0, 16]], 16), "0..15"), (lambda: tar_weights([[-1, 3]], 16), "from -1"),
])
def test_bad_input_has_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as e: call()
    assert "\n" not in str(e.value)

# --- TAR --------------------------------------------------------------------------------------------------------------

@given(st.integers(1, 64), st.floats(0, 5), st.sampled_from(["paper", "midpoint"]))
def test_weights_lie_in_0_1_and_fall_away_from_the_centre(n_frames, lam, center):
    f = tar_weights(torch.arange(n_frames), n_frames, lam, center)
    assert f.is_floating_point() and (f >= 0).all() and (f <= 1).all()
    if lam * n_frames < 80: assert (f > 0).all()
    distance = (torch.arange(n_frames) - tar_center(n_frames, center)).abs()
    assert (f[distance.argsort()].diff() <= 1e-7).all()
    if center == "midpoint": assert torch.allclose(f, f.flip(0))
    if lam == 0: assert torch.equal(f, torch.ones(n_frames))

def test_eq_7_by_hand():
    g = torch.tensor([[1, 7, 8, 15]])
    assert torch.allclose(tar_weights(g, 16), torch.tensor([[-7., -1., 0., -7.]]).exp())
    assert torch.allclose(tar_weights(g, 16, lam=0.5, center="midpoint"),
                          torch.tensor([[-3.25, -0.25, -0.25, -3.75]]).exp())
    assert tar_weights([[3, 4]], 9, center="paper").argmax() == 1 and tar_weights(g, 16).dtype == torch.float32
    assert tar_weights(g.tolist(), 16).shape == (1, 4)

def test_shares_of_the_released_code():
    e = expected_weights()
    assert torch.allclose(e, torch.tensor([0.0026, 0.1428, 0.3883, 0.0071]), atol=5e-5)
    assert math.isclose(e.mean(), 0.1352, abs_tol=5e-5)
    assert [round(100 * s, 1) for s in (e / e.sum()).tolist()] == [0.5, 26.4, 71.8, 1.3]
    middle = expected_weights(center="midpoint")
    assert [round(100 * s, 1) for s in (middle / middle.sum()).tolist()] == [0.9, 49.1, 49.1, 0.9]

@pytest.mark.parametrize("n_frames, n_segments, center", [(16, 4, "paper"), (17, 4, "midpoint"), (10, 3, "paper")])
def test_expected_weights_is_the_mean_over_draws(n_frames, n_segments, center):
    g = segment_frames(n_frames, n_segments, 20000, generator=generator())
    assert torch.allclose(tar_weights(g, n_frames, 0.5, center).mean(0),
                          expected_weights(n_frames, n_segments, 0.5, center), atol=0.01)

# --- Eq. 6 and 8 ------------------------------------------------------------------------------------------------------

@given(st.integers(1, 6), st.integers(1, 8))
def test_reward_identities(b, s):
    scores = torch.rand(b, s, generator=generator(), dtype=torch.float64)
    assert torch.equal(segmental_reward(scores), scores.mean(1))
    assert torch.allclose(segmental_reward(scores, torch.ones(b, s)), scores.mean(1))
    f = torch.rand(b, s, generator=generator(1), dtype=torch.float64)
    assert torch.allclose(segmental_reward(scores, f), sum(f[:, i] * scores[:, i] for i in range(s)) / s)

def test_gradient_is_the_weight_over_s():
    scores = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    f = tar_weights(segment_frames(16, 4, 2, generator=generator()), 16).double()
    assert torch.autograd.gradcheck(lambda x: segmental_reward(x, f), scores)
    assert torch.allclose(torch.autograd.grad(segmental_reward(scores, f).sum(), scores)[0], f / 4)

@pytest.mark.parametrize("n_frames, unbiased", [(16, True), (20, True), (17, False)])
def test_segvr_estimates_the_dense_mean(n_frames, unbiased):
    ramp = torch.linspace(0, 1, n_frames, dtype=torch.float64) ** 2
    estimate = segmental_reward(ramp[segment_frames(n_frames, 4, 20000, generator=generator())])
    standard_error = estimate.std() / 20000 ** 0.5
    assert ((estimate.mean() - ramp.mean()).abs() < 4 * standard_error) == unbiased
