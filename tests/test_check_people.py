"Exercises of Teach a judge and Your taste: right answers pass however written, wrong ones are rejected and named."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from instructvideo_kit import check as door
from instructvideo_kit.check import people as check
from instructvideo_kit.feedback.preference import k_from_share, preference_loss

ENDS = torch.tensor([.025, .975], dtype=torch.float64)

def by_probabilities(d, v, k):
    a, b = torch.sigmoid(d - math.log(k)), torch.sigmoid(-d - math.log(k))
    return -torch.stack([b, 1 - a - b, a], 1)[range(len(d)), v + 1].log()

def vote_by_vote(d, v, k):
    def one(x, y):
        a, b = 1/(1 + k*math.exp(-x)), 1/(1 + k*math.exp(x))
        return -math.log({1: a, -1: b, 0: (k*k - 1)*a*b}[y])
    return [one(x, y) for x, y in zip(d.tolist(), v.tolist())]

def with_an_optimiser(x, vote, w0, width, steps, rate):
    w, k = w0.clone().requires_grad_(), k_from_share((vote == 0).double().mean().item())
    optimiser = torch.optim.SGD([w], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        (preference_loss(x @ w, vote, k).sum() + ((w - w0)**2).sum()/(2*width**2)).backward()
        optimiser.step()
    return w

def by_derivative(x, vote, w0, width, steps, rate):
    k, w = k_from_share(float((vote == 0).sum())/len(vote)), w0.clone()
    for _ in range(steps):
        a, b = torch.sigmoid(x @ w - math.log(k)), torch.sigmoid(-(x @ w) - math.log(k))
        slope = torch.where(vote > 0, a - 1, torch.where(vote < 0, 1 - b, a - b))
        w = w - rate*(x.T @ slope + (w - w0)/width**2)
    return w.numpy()

def best_by_loop(learned, true):
    n, best = learned.shape[1], [int(row.argmax()) for row in learned]
    chosen = list(zip(range(len(best)), best))
    return sum(learned[c] for c in chosen)/len(best), sum(true[c] for c in chosen)/len(best), math.log(n) - 1 + 1/n

def best_by_sorting(learned, true):
    order = learned.argsort(1, descending=True)[:, 0]
    rows = torch.arange(len(learned))
    return [learned[rows, order].mean().item(), true[rows, order].mean().item(),
            np.log(learned.shape[1]) - 1 + 1/learned.shape[1]]

def wilson_roots(p, n, z=1.959964): # the two shares whose own error reaches p
    return sorted(np.roots([1 + z*z/n, -(2*p + z*z/n), p*p]).real)

def win_by_roots(said, tuned, other, tuned_other):
    def share(said, tuned): return sum(.5*(s == "same") + (s == t) for s, t in zip(said, tuned))/len(said)
    p, q = share(said, tuned), share(other, tuned_other)
    (a, b), (c, d) = wilson_roots(p, len(said)), wilson_roots(q, len(other))
    return [p, a, b, p - q, p - q - math.hypot(p - a, d - q), p - q + math.hypot(b - p, q - c)]

def win_by_counting(said, tuned, other, tuned_other, z=1.96):
    def interval(said, tuned):
        points = {"same": .5}
        p, n = sum(points.get(s, float(s == t)) for s, t in zip(said, tuned))/len(said), len(said)
        middle, reach = (p + z*z/2/n)/(1 + z*z/n), z/(1 + z*z/n)*math.sqrt(p*(1 - p)/n + z*z/4/n/n)
        return p, middle - reach, middle + reach
    (p, a, b), (q, c, d) = interval(said, tuned), interval(other, tuned_other)
    return torch.tensor([p, a, b, p - q, p - q - math.hypot(p - a, d - q), p - q + math.hypot(b - p, q - c)])

RIGHT = {
    "tie_k": [lambda s: 2/(1 - s) - 1, lambda s: torch.tensor((1 + s)/(1 - s))],
    "vote_loss": [by_probabilities, vote_by_vote],
    "reward_model": [with_an_optimiser, by_derivative],
    "best_of_n": [best_by_loop, best_by_sorting],
    "trait_interval": [
        lambda d, v: np.quantile([np.corrcoef(row, v)[0, 1] for row in d], ENDS),
        lambda d, v: torch.corrcoef(torch.cat([v[None], d]))[0, 1:].quantile(ENDS),
    ],
    "win_verdict": [win_by_roots, win_by_counting],
    "seed_interval": [
        lambda x, s, c: torch.stack([x[i][:, j].mean() for i, j in zip(s, c)]).quantile(ENDS),
        lambda x, s, c: np.quantile([x.numpy()[np.ix_(i, j)].mean() for i, j in zip(s.numpy(), c.numpy())], ENDS),
    ],
}
WRONG = {  # as a learner would write it, and words of the verdict
    "tie_k": [(lambda s: (1 - s)/(1 + s), "upside down"), (lambda s: 1/(1 - s), "numerator")],
    "vote_loss": [
        (lambda d, v, k: preference_loss(-d, v, k), "swapped"),
        (lambda d, v, k: F.softplus(-v*d), "without ties"),
        (lambda d, v, k: preference_loss(d, v, k).mean(), "one number per pair"),
    ],
    "reward_model": [
        (lambda x, v, w0, s, n, r: with_an_optimiser(x, v, w0, 1e9, n, r), "prior is missing"),
        (lambda x, v, w0, s, n, r: with_an_optimiser(x, -v, w0, s, n, r), "sides are swapped"),
        (lambda x, v, w0, s, n, r: by_derivative(x, v, w0, s, n, -r), "uphill"),
    ],
    "best_of_n": [
        (lambda a, b: [a.max(1)[0].mean(), b.max(1)[0].mean(), best_by_loop(a, b)[2]], "best clip there was"),
        (lambda a, b: (*best_by_loop(a, b)[:2], math.log(a.shape[1])), "upper bound"),
        (lambda a, b: best_by_loop(-a, b)[:2], "expected"),
    ],
    "trait_interval": [
        (lambda d, v: [torch.corrcoef(torch.stack([d.mean(0), v]))[0, 1]]*2, "mean reward"),
        (lambda d, v: np.quantile([np.corrcoef(row, v)[0, 1] for row in d], [0, 1]), "grow apart"),
    ],
    "win_verdict": [
        (lambda s, t, o, u: win_by_roots(["lost" if x == "same" else x for x in s], t,
                                         ["lost" if x == "same" else x for x in o], u), "counted as lost"),
        (lambda s, t, o, u: win_by_roots(s, ["first"]*len(s), o, ["first"]*len(o)), "how often the first"),
    ],
    "seed_interval": [
        (lambda x, s, c: np.quantile([x[:, j].mean().item() for j in c], ENDS), "another seed"),
        (lambda x, s, c: x.flatten().quantile(ENDS), "single captions"),
    ],
}
TABLES = dict(tie_k=check.TIE_K, vote_loss=check.VOTE_LOSS, reward_model=check.REWARD_MODEL, best_of_n=check.BEST_OF_N,
              trait_interval=check.TRAIT, win_verdict=check.WIN, seed_interval=check.SEEDS)


def test_every_check_has_answers_of_both_kinds():
    checks = {n for n in check.__all__ if n.islower()}
    assert checks == set(TABLES) == set(RIGHT) == set(WRONG) and checks < set(dir(door))
    assert all(len(r) >= 2 for r in RIGHT.values()) and all(len(w) >= 2 for w in WRONG.values())


@pytest.mark.parametrize("name, answer", [(n, a) for n, answers in RIGHT.items() for a in answers])
def test_right_answers_pass(name, answer, capsys):
    assert getattr(check, name)(answer) is True, capsys.readouterr().out


@pytest.mark.parametrize("name, wrong", [(n, w) for n, answers in WRONG.items() for w in answers])
def test_wrong_answers_are_named(name, wrong, capsys):
    answer, words = wrong
    assert getattr(check, name)(answer) is False
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("name, mistake", [(n, m) for n, table in TABLES.items() for m in table])
def test_every_listed_mistake_is_wrong_and_has_its_own_message(name, mistake, capsys):
    assert getattr(check, name)(mistake.answer) is False, mistake.message
    assert mistake.message in capsys.readouterr().out


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("stub", [lambda *args: ..., lambda *args: None, None, ...])
def test_an_open_exercise_is_no_error(name, stub, capsys):
    assert getattr(check, name)(stub) is None and capsys.readouterr().out == "not answered yet\n"
