"Advantages of groups, and the losses of GRPO, DiffusionNFT and AWM: by hand, finite differences, properties."
import math

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from instructvideo_kit.diffusion.prediction import PREDICTION_TYPES
from instructvideo_kit.diffusion.sampling import to_x0_eps
from instructvideo_kit.diffusion.stochastic import guarded_log_ratio, log_probability, step_kl
from instructvideo_kit.files import KitError
from instructvideo_kit.tuning.advantage import best_and_worst, flat_groups, group_advantages
from instructvideo_kit.tuning.data_term import data_target, data_term
from instructvideo_kit.tuning.ddpo import ddpo_loss
from instructvideo_kit.tuning.nft_loss import (
    adaptive_weight,
    awm_loss,
    check_deviation,
    follow,
    good_probability,
    nft_loss,
    old_decay,
    reference_term,
)
from instructvideo_kit.tuning.policy_loss import policy_loss


def given(**kwargs): return lambda test: settings(deadline=None, max_examples=50)(hypothesis.given(**kwargs)(test))

def noise(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

# --- advantages ----------------------------------------------------------------------------------------------------

def in_plain_python(rewards, groups, std, eps):
    def deviation(values):
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    found = []
    for r, g in zip(rewards, groups):
        among = [x for x, h in zip(rewards, groups) if h == g]
        spread = deviation(among if std == "group" else rewards)
        found.append(0. if max(among) == min(among) else (r - sum(among) / len(among)) / (spread + eps))
    return found

@given(data=st.data(), std=st.sampled_from(["group", "all"]), eps=st.sampled_from([1e-4, 1e-8, .1]))
def test_advantages_are_those_of_plain_python(data, std, eps):
    sizes = data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=5))
    groups = data.draw(st.permutations([7 * g - 3 for g, k in enumerate(sizes) for _ in range(k)]))
    reward = st.sampled_from([.1, .1, -.25]) | st.floats(-3, 3)
    rewards = [data.draw(reward) for _ in groups]
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), std, eps)
    assert torch.allclose(got, torch.tensor(in_plain_python(rewards, groups, std, eps), dtype=torch.float64), atol=1e-6)

@given(seed=st.integers(0, 999), std=st.sampled_from(["group", "all"]), shift=st.floats(-50, 50),
       scale=st.floats(.1, 20))
def test_advantages_do_not_see_the_captions_level(seed, std, shift, scale):
    rewards, groups = noise(12, seed=seed), torch.arange(12) % 3
    A = group_advantages(rewards, groups, std, eps=0.)
    means = torch.zeros(3, dtype=torch.float64).index_add(0, groups, A)
    assert means.abs().max() < 1e-9 # nothing about captions is left
    if std == "group": # each caption may be shifted and scaled alone
        other = torch.where(groups == 1, scale * rewards + shift, rewards)
        assert torch.allclose(group_advantages(other, groups, std, eps=0.), A, atol=1e-7)
    assert torch.allclose(group_advantages(scale * rewards + shift, groups, std, eps=0.), A, atol=1e-7)
    assert A.dtype == rewards.dtype

def test_flat_groups_are_exactly_zero_and_counted():
    rewards, groups = torch.tensor([.1, .1, .1, .7, .2, .3, .3]), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    flat = flat_groups(rewards, groups)
    assert flat.tolist() == [True] * 3 + [False] * 2 + [True] * 2
    for std in ("group", "all"):
        A = group_advantages(rewards, groups, std, eps=0.)
        assert (A[flat] == 0).all() and (A[~flat] != 0).all() and A.isfinite().all()
    assert flat_groups(rewards, groups, tolerance=.6).all()

def test_deviation_has_no_correction():
    A = group_advantages(torch.tensor([0., 2.]), torch.tensor([0, 0]), eps=0.)
    assert torch.allclose(A, torch.tensor([-1., 1.]))

@pytest.mark.parametrize("rewards, groups, options, words", [
    ([1., 2., 3.], [0, 0, 1], {}, "1 of 2 groups hold one clip"), ([1.], [0], {}, "hold one clip"),
    ([], [], {}, "n above 0"), ([1., 2.], [0], {}, r"\(2,\) and \(1,\)"),
    ([[1., 2.]], [[0, 0]], {}, r"expected \(n,\)"),
    ([1., math.nan], [0, 0], {}, "reward 1 is nan"), ([1., math.inf], [0, 0], {}, "reward 1 is inf"),
    ([1., 2.], [0., 0.], {}, "whole numbers"), ([1., 2.], [0, 0], {"std": "global"}, "std is 'global'"),
    ([1., 2.], [0, 0], {"eps": -1.}, "eps is -1")])
def test_bad_groups_are_refused(rewards, groups, options, words):
    with pytest.raises(ValueError, match=words) as e:
        group_advantages(torch.tensor(rewards), torch.tensor(groups), **options)
    assert "\n" not in str(e.value)

@given(seed=st.integers(0, 99), best=st.integers(0, 3), worst=st.integers(0, 3))
def test_best_and_worst(seed, best, worst):
    groups = torch.tensor([0, 1, 2] * 4)
    rewards = noise(12, seed=seed).mul(2).round() # with ties
    if not 1 <= best + worst <= 4:
        with pytest.raises(ValueError, match="smallest group has 4"): best_and_worst(rewards, groups, best, worst)
        return
    chosen = best_and_worst(rewards, groups, best, worst)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    for g in range(3):
        of_group = [int(i) for i in chosen if groups[i] == g]
        everyone = sorted(rewards[groups == g].tolist())
        expected = everyone[:worst] + everyone[4 - best:]
        assert sorted(rewards[of_group].tolist()) == sorted(expected)

# --- DiffusionNFT ---------------------------------------------------------------------------------------------------

def published(xs, olds, x0s, A, beta, adv_max):
    "The loss as the published code has it, clip by clip, in plain loops."
    rows = []
    for x, old, x0, a in zip(xs, olds, x0s, A):
        q = min(max(float(a) / adv_max / 2 + .5, 0.), 1.)
        plus, minus = beta * x + (1 - beta) * old, (1 + beta) * old - beta * x
        loss = [((p - x0) ** 2 / max(float((p - x0).abs().mean()), 1e-5)).mean() for p in (plus, minus)]
        rows.append(q * loss[0] / beta + (1 - q) * loss[1] / beta)
    return sum(rows) / len(rows) * adv_max

@given(seed=st.integers(0, 99), beta=st.floats(.05, 3.), adv_max=st.floats(.5, 8.))
def test_nft_loss_is_the_published_one(seed, beta, adv_max):
    x, old, x0 = noise(3, 4, 2, 5, seed=seed)
    A = 4 * noise(4, seed=seed + 1)
    loss, info = nft_loss(x, old, x0, A, beta, adv_max)
    assert torch.allclose(loss, published(x, old, x0, A, beta, adv_max))
    assert torch.allclose(info["deviation"], (x - old).square().mean())

@given(seed=st.integers(0, 99), beta=st.floats(.05, 3.))
def test_at_the_old_policy_the_value_is_blind_and_the_gradient_is_awm(seed, beta):
    old, x0 = noise(2, 4, 2, 5, seed=seed)
    A, other = 3 * noise(2, 4, seed=seed + 1)
    x = old.clone().requires_grad_()
    loss, info = nft_loss(x, old, x0, A, beta)
    assert torch.allclose(loss, nft_loss(x, old, x0, other, beta)[0]) and info["deviation"] == 0
    gradient, = torch.autograd.grad(loss, x)
    awm, = torch.autograd.grad(awm_loss(x, x0, A), x)
    error = ((x - x0).square().flatten(1).mean(1) / adaptive_weight(x, x0) * A.clamp(-5, 5)).mean()
    assert torch.allclose(gradient, awm, atol=1e-12)
    assert torch.allclose(gradient, torch.autograd.grad(error, x)[0], atol=1e-12)
    assert not torch.allclose(gradient, torch.autograd.grad(nft_loss(x, old, x0, other, beta)[0], x)[0], atol=1e-6)

def test_away_from_the_old_policy_the_two_differ():
    x, old, x0 = noise(3, 4, 2, 5)
    A = noise(4, seed=1)
    x.requires_grad_()
    gradient, = torch.autograd.grad(nft_loss(x, old, x0, A)[0], x)
    assert not torch.allclose(gradient, torch.autograd.grad(awm_loss(x, x0, A), x)[0], atol=1e-4)

@pytest.mark.parametrize("beta", [.1, 1.])
def test_nft_gradient_by_finite_differences_with_the_weights_held(beta):
    x, old, x0 = noise(3, 3, 2, 4)
    A = torch.tensor([-2., .5, 6.], dtype=torch.float64)
    x.requires_grad_()
    gradient, = torch.autograd.grad(nft_loss(x, old, x0, A, beta)[0], x)
    def mixes(x): return beta * x + (1 - beta) * old, (1 + beta) * old - beta * x
    weights = [(m - x0).abs().mean((1, 2)).detach() for m in mixes(x)]
    q = (A / 10 + .5).clamp(0, 1)
    def held(x):
        plus, minus = ((m - x0).square().mean((1, 2)) / w for m, w in zip(mixes(x), weights))
        return 5 * ((q * plus + (1 - q) * minus) / beta).mean()
    for i in ((0, 0, 1), (1, 1, 3), (2, 0, 0)):
        step = torch.zeros_like(x)
        step[i] = 1e-6
        slope = (held(x.detach() + step) - held(x.detach() - step)) / 2e-6
        assert math.isclose(slope, gradient[i], rel_tol=1e-5, abs_tol=1e-9)

def test_nothing_but_the_policy_gets_a_gradient_and_info_holds_none():
    x, old, x0 = (t.requires_grad_() for t in noise(3, 3, 2, 4))
    A = noise(3).requires_grad_()
    loss, info = nft_loss(x, old, x0, A)
    assert torch.autograd.grad(loss, [old, x0, A], retain_graph=True, allow_unused=True) == (None, None, None)
    assert torch.autograd.grad(loss, x)[0].abs().sum() > 0
    assert not any(v.requires_grad for v in info.values())

def test_a_perfect_guess_divides_by_the_floor_and_half_precision_works():
    x0 = noise(2, 3, 4)
    assert adaptive_weight(x0, x0).tolist() == [1e-5, 1e-5]
    loss, _ = nft_loss(x0.clone().requires_grad_(), x0, x0, torch.ones(2))
    assert loss == 0 and loss.requires_grad
    half = [t.bfloat16() for t in noise(3, 2, 3, 4)]
    loss, _ = nft_loss(half[0].requires_grad_(), half[1], half[2], torch.tensor([1., -1.]))
    exact, _ = nft_loss(*(t.detach().double() for t in half), torch.tensor([1., -1.]))
    assert loss.dtype == torch.float64 and torch.allclose(loss, exact)

@pytest.mark.parametrize("change, words", [
    ({"x0_hat_old": torch.zeros(2, 4)}, "x0_hat_old has shape"), ({"x0": torch.zeros(3)}, "x0 has shape"),
    ({"advantage": torch.zeros(2)}, "one per clip"), ({"advantage": torch.full((3,), math.nan)}, "not finite"),
    ({"beta": 0.}, "beta is 0"), ({"beta": math.nan}, "beta is nan"), ({"adv_max": 0.}, "adv_max is 0")])
def test_bad_nft_input_is_refused(change, words):
    given = dict(x0_hat=torch.zeros(3, 4), x0_hat_old=torch.zeros(3, 4), x0=torch.zeros(3, 4), advantage=torch.zeros(3))
    with pytest.raises(ValueError, match=words): nft_loss(**given | change)

@given(a=st.floats(-20, 20), adv_max=st.floats(.1, 10))
def test_good_probability(a, adv_max):
    q = good_probability(torch.tensor([a, -a, 0.], dtype=torch.float64), adv_max)
    assert ((0 <= q) & (q <= 1)).all() and math.isclose(q[0] + q[1], 1, abs_tol=1e-12) and q[2] == .5
    assert math.isclose(adv_max * (2 * q[0] - 1), max(-adv_max, min(adv_max, a)), abs_tol=1e-9)

def test_the_old_policys_decay_and_the_deviation_guard():
    assert [old_decay(s) for s in (0, 10, 500, 9999)] == [0., .01, .5, .5]
    assert [round(old_decay(s, "late"), 4) for s in (0, 75, 76, 300)] == [0., 0., .0075, .999]
    for bad in (dict(step=-1), dict(step=0, kind="fast")):
        with pytest.raises(ValueError): old_decay(**bad)
    old, new = [torch.zeros(3)], [torch.ones(3)]
    follow(old, new, .9)
    follow(old, new, .9)
    assert torch.allclose(old[0], torch.full((3,), .19))
    for bad in (dict(old=old, new=[], decay=.5), dict(old=old, new=new, decay=1.5)):
        with pytest.raises(ValueError): follow(**bad)
    check_deviation(torch.tensor(0.), 0)
    check_deviation(torch.tensor(1e-30), 9)
    with pytest.raises(KitError, match="after 3 updates"): check_deviation(torch.tensor(0.), 3)

def test_the_reference_term_alone_has_a_gradient():
    p, ref = noise(2, 3, 4)
    p.requires_grad_()
    ref.requires_grad_()
    gradient, of_ref = torch.autograd.grad(reference_term(p, ref), [p, ref], allow_unused=True)
    assert torch.allclose(gradient, 2 * (p - ref).detach() / p.numel()) and of_ref is None

# --- GRPO -----------------------------------------------------------------------------------------------------------

@given(seed=st.integers(0, 99), clip=st.sampled_from([1e-4, .05, .3]), adv_max=st.sampled_from([.5, 5.]))
def test_policy_loss_agrees_with_ddpos(seed, clip, adv_max):
    logp, logp_old, A = noise(3, 4, 6, seed=seed)
    logp_old = logp + .1 * logp_old
    grads = []
    def ours(x): return policy_loss(x, logp_old, 2 * A, clip, adv_max)[0]
    for loss in (ours, lambda x: ddpo_loss(x, logp_old, 2 * A, clip, adv_max)):
        x = logp.clone().requires_grad_()
        grads.append((loss(x), torch.autograd.grad(loss(x), x)[0]))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])

@pytest.mark.parametrize("ratio, A, loss, clipped", [
    (1.2, 2., -2.2, 1), (1.2, -1., 1.2, 0), (.8, -1., .9, 1), (.8, 2., -1.6, 0), (1., 9., -5., 0)])
def test_policy_loss_by_hand(ratio, A, loss, clipped):
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    got, info = policy_loss(logp, torch.zeros(1).double(), torch.tensor([A]).double(), .1)
    assert math.isclose(got.item(), loss, rel_tol=1e-9) and info["clipped"] == clipped
    assert (torch.autograd.grad(got, logp)[0] == 0) == bool(clipped)
    assert math.isclose(info["ratio"], ratio) and math.isclose(info["ratio_off"], abs(ratio - 1), abs_tol=1e-12)
    assert math.isclose(info["kl_old"], ratio - 1 - math.log(ratio), abs_tol=1e-12) and not info["kl_old"].requires_grad

def step(shift, A, beta=0., guard=False, clip=.9):
    "A step with mean `shift` away from that of the old policy, and its loss."
    old, ref, n = noise(3, 5, 7, seed=3)
    drawn, mean = old + .4 * n, old + shift
    logp, logp_old = log_probability(drawn, mean, .4), log_probability(drawn, old, .4)
    log_ratio = guarded_log_ratio(logp, logp_old, mean, old, .4) if guard else None
    return policy_loss(logp, logp_old, A, clip, kl=step_kl(mean, ref, .4), beta=beta, log_ratio=log_ratio)

@pytest.mark.parametrize("options", [
    dict(A=torch.zeros(5), beta=.04), dict(A=noise(5)), dict(A=noise(5), guard=True),
    dict(A=noise(5), beta=.04, guard=True)])
def test_each_term_alone_has_the_right_gradient(options):
    shift = torch.tensor(.03, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(step(shift, **options)[0], shift)
    slope = (step(.03 + 1e-6, **options)[0] - step(.03 - 1e-6, **options)[0]) / 2e-6
    assert math.isclose(gradient, slope, rel_tol=1e-5) and abs(gradient) > 1e-5

def test_the_pull_to_the_reference_adds_beta_kl():
    A = noise(5)
    (plain, _), (pulled, info) = step(.03, A), step(.03, A, beta=.5)
    assert math.isclose(pulled - plain, .5 * info["kl"], rel_tol=1e-9) and info["kl"] > 0

@pytest.mark.parametrize("change, words", [
    (dict(clip=0.), "clip is 0"), (dict(clip=1.), "clip is 1"), (dict(adv_max=0.), "adv_max is 0"),
    (dict(beta=-1.), "beta is -1"), (dict(beta=.1), "kl missing"), (dict(kl=torch.zeros(2)), "kl has shape"),
    (dict(advantage=torch.zeros(2)), "advantage has shape"),
    (dict(log_ratio=torch.zeros(2)), "log_ratio has shape")])
def test_bad_policy_input_is_refused(change, words):
    given = dict(logp=torch.zeros(3), logp_old=torch.zeros(3), advantage=torch.zeros(3))
    with pytest.raises(ValueError, match=words): policy_loss(**given | change)

# --- the data term --------------------------------------------------------------------------------------------------

@given(kind=st.sampled_from(PREDICTION_TYPES), alpha_bar=st.floats(.02, .98), seed=st.integers(0, 99))
def test_data_term_has_its_minimum_and_gradient_at_the_true_answer(kind, alpha_bar, seed):
    x0, eps, off = noise(3, 2, 3, 4, seed=seed)
    z_t, target = data_target(x0, eps, alpha_bar, kind)
    for got, true in zip(to_x0_eps(target, z_t, alpha_bar, kind), (x0, eps)):
        assert torch.allclose(got, true, atol=1e-9)
    answer = (target + off).requires_grad_()
    term = data_term(answer, target)
    assert torch.allclose(term, off.square().mean((1, 2)))
    assert torch.allclose(torch.autograd.grad(term.sum(), answer)[0], 2 * off / 12)
