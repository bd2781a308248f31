"Exercises that build: right answers pass however written, wrong ones are rejected and named."
import pytest
import torch

from instructvideo_kit.check import building as check
from instructvideo_kit.check.building import Mistake
from instructvideo_kit.diffusion.schedule import corrupt


def levels(steps, alpha_bar): return [(alpha_bar[t], alpha_bar[u]) for t, u in zip(steps, [*steps[1:], 0])]

def draw(guess, z, caption, steps, alpha_bar, w):
    for t, (a, b) in zip(steps, levels(steps, alpha_bar)):
        x0 = guess(z, t, "") + w*(guess(z, t, caption) - guess(z, t, ""))
        z = b**.5*x0 + (1 - b)**.5*(z - a**.5*x0)/(1 - a)**.5
    return z

def draw_by_noise(guess, z, caption, steps, alpha_bar, w): # the same step, without naming the noise
    steps = list(steps)
    while steps:
        t, after = steps.pop(0), steps[0] if steps else 0
        clean = torch.lerp(guess(z, t, ""), guess(z, t, caption), w)
        ratio = ((1 - alpha_bar[after])/(1 - alpha_bar[t])).sqrt()
        z = ratio*z + (alpha_bar[after].sqrt() - ratio*alpha_bar[t].sqrt())*clean
    return z

def firsts(clip, S): return clip[[i*len(clip)//S for i in range(S)]][None]

def compare(before, after, reward, captions, seeds, S):
    d = torch.tensor([[(reward(firsts(after(c, s), S), [c]) - reward(firsts(before(c, s), S), [c])).mean().item()
                       for s in seeds] for c in captions]).mean(1)
    return d.mean(), d.std()/len(d)**.5, (d > 0).double().mean()

def compare_in_plain_python(before, after, reward, captions, seeds, S):
    def mark(of, c): return sum(float(reward(firsts(of(c, s), S), [c]).mean()) for s in seeds)/len(seeds)
    d = [mark(after, c) - mark(before, c) for c in captions]
    mean = sum(d)/len(d)
    variance = sum((x - mean)**2 for x in d)/(len(d) - 1)
    return mean, (variance/len(d))**.5, sum(x > 1e-9 for x in d)/len(d)

def walk(betas, noises):
    z, left = noises[0]*0, 1.
    for beta, eps in zip(betas, noises):
        z, left = (1 - beta)**.5*z + beta**.5*eps, left*(1 - beta)
    return z/(1 - left)**.5

def walk_by_jump(betas, noises): # walk from any start, then solve the jump for its noise
    start = torch.full_like(noises[0], 3.)
    z = start
    for beta, eps in zip(betas, noises): z = (1 - beta).sqrt()*z + beta.sqrt()*eps
    left = (1 - betas).prod()
    return (z - left.sqrt()*start)/(1 - left).sqrt()

def schedule(betas):
    kept = torch.cumprod(1 - betas, 0)
    def mix(z, eps, t): return corrupt(z, eps, kept[t].item())
    def clean(z_t, eps, t): return (z_t - (1 - kept[t])**.5*eps)/kept[t]**.5
    def chain(D, tau): return [(i - 1)*(len(betas)//D) + 1 for i in range(round(tau*D), 0, -1)]
    return mix, clean, chain

def schedule_by_loop(betas):
    kept = []
    for beta in betas: kept.append((kept[-1] if kept else 1.)*(1 - float(beta)))
    def chain(D, tau): return torch.arange(1, len(betas), len(betas)//D)[:round(tau*D)].flip(0)
    return [lambda z, eps, t: kept[t]**.5*z + (1 - kept[t])**.5*eps,
            lambda z_t, eps, t: z_t/kept[t]**.5 - (1/kept[t] - 1)**.5*eps, chain]

def edit(network, z, eps, caption, alpha_bar, tau, D, w):
    steps = schedule(torch.zeros(len(alpha_bar)))[2](D, tau)
    z = corrupt(z, eps, alpha_bar[steps[0]].item())
    for t, (a, b) in zip(steps, levels(steps, alpha_bar)):
        v = network(z, t, caption)
        if w != 1: v = network(z, t, "") + w*(v - network(z, t, ""))
        x0, e = a**.5*z - (1 - a)**.5*v, a**.5*v + (1 - a)**.5*z
        z = b**.5*x0 + (1 - b)**.5*e
    return z

def edit_by_angle(network, z, eps, caption, alpha_bar, tau, D, w):
    steps = schedule(torch.zeros(len(alpha_bar)))[2](D, tau)
    phi = torch.acos(alpha_bar.sqrt())
    z = phi[steps[0]].cos()*z + phi[steps[0]].sin()*eps
    for t, after in zip(steps, [*steps[1:], 0]):
        v, turn = (1 - w)*network(z, t, "") + w*network(z, t, caption), phi[t] - phi[after]
        z = turn.cos()*z - turn.sin()*v
    return z

def alike(x, y): return torch.stack([torch.corrcoef(torch.stack([p.flatten(), q.flatten()]))[0, 1]
                                     for p, q in zip(x, y)])

def alike_by_z(x, y): # the mean product of standard scores
    x, y = x.flatten(1), y.flatten(1)
    scores = [(v - v.mean(1, keepdim=True))/v.std(1, keepdim=True, correction=0) for v in (x, y)]
    return (scores[0]*scores[1]).mean(1)

def attack(reward, frame, caption, n, rate):
    scores = []
    for i in range(n + 1):
        x = frame.clone().requires_grad_()
        score = reward(x[None, None], [caption]).sum()
        scores.append(score.item())
        if i < n: frame = (frame + rate*torch.autograd.grad(score, x)[0].sign()).clamp(0, 1)
    return frame, scores

def attack_backward(reward, frame, caption, n, rate):
    x, scores = frame.clone().requires_grad_(), []
    for _ in range(n):
        score = reward(x[None, None], [caption])[0, 0]
        score.backward()
        scores.append(score.detach())
        with torch.no_grad(): x = (x + rate*torch.sign(x.grad)).clamp_(0, 1)
        x.requires_grad_()
    return x, torch.stack([*scores, reward(x[None, None], [caption])[0, 0].detach()])

def word(low, high): return "better" if low > 0 else "worse" if high < 0 else "cannot tell"

def report(before, after, better, draws):
    words = {}
    for name in before:
        means = ((after[name] - before[name])*better[name])[draws].mean(1)
        words[name] = word(*means.quantile(torch.tensor([.025, .975])))
    return words, words["reward"] == "better" and "worse" in words.values()

def report_with_numpy(before, after, better, draws):
    import numpy as np
    words = {}
    for name in better:
        means = [float((after[name][d] - before[name][d]).mean())*better[name] for d in draws]
        words[name] = word(*np.percentile(means, [2.5, 97.5]))
    return words, words["reward"] == "better" and "worse" in [words[name] for name in words if name != "reward"]

def fair(calls, batch, D, w, taus):
    once = 1 if w == 1 else 2
    return [calls//((round(tau*D)*once + once)*batch) for tau in taus]

RIGHT = {
    "guided_draw": [draw, draw_by_noise],
    "comparison": [compare, compare_in_plain_python],
    "one_noise": [walk, walk_by_jump],
    "schedule": [schedule, schedule_by_loop],
    "edit": [edit, edit_by_angle],
    "kept": [lambda a, b, large: [alike(large(a), large(b)), alike(a - large(a), b - large(b))],
             lambda a, b, large: (alike_by_z(large(a), large(b)), alike_by_z(a - large(a), b - large(b)))],
    "budget": [fair, lambda c, b, D, w, taus: torch.tensor([c//(b*(1 + (w != 1))*(round(t*D) + 1)) for t in taus])],
    "attack": [attack, attack_backward],
    "report": [report, report_with_numpy],
}

def other_part(i, part):
    def answer(betas):
        parts = list(schedule(betas))
        parts[i] = part
        return parts
    return answer

WRONG = { # exercise -> (an answer as a learner would write it, words of the verdict)
    "guided_draw": [
        (lambda f, z, c, ts, ab, w: draw(f, z, c, ts, ab, 1.), "w changes nothing"),
        (lambda f, z, c, ts, ab, w: draw(f, z, c, ts, ab, 1 - w), "swapped"),
        (lambda f, z, c, ts, ab, w: draw(f, z, c, ts, ab, 1 + w), "start from the answer with"),
        (lambda f, z, c, ts, ab, w: draw(f, z, c, ts, ab.square(), w), "take square roots"),
    ],
    "comparison": [
        (lambda b, a, *x: compare(a, b, *x), "after minus before"),
        (lambda b, a, *x: compare(b, lambda c, s: a(c, s + 1), *x), "same seed"),
        (lambda *x: (*compare(*x)[:1], compare(*x)[1]*len(x[3])**.5, compare(*x)[2]), "spread among captions"),
        (lambda b, a, r, c, s, S: compare(b, a, r, c, s, len(b(c[0], 0))), "all frames"),
    ],
    "one_noise": [
        (lambda b, e: e.sum(0)/len(b)**.5, "weigh the same"),
        (lambda b, e: walk(b, e)*(1 - (1 - b).prod())**.5, "noise part of z_t"),
        (lambda b, e: walk(b, e.flip(0)), "expected"),
    ],
    "schedule": [
        (other_part(0, lambda z, eps, t: z + eps), "corrupt: not yet"),
        (other_part(2, lambda D, tau: schedule(torch.zeros(1000))[2](D, 1.)), "tau changes nothing"),
        (other_part(2, lambda D, tau: schedule(torch.zeros(1000))[2](D, tau)[::-1]), "upwards"),
        (lambda betas: schedule(betas)[:2], "three functions"),
    ],
    "edit": [
        (lambda f, z, e, *x: edit(f, z*0, e, *x), "expected"),
        (lambda f, z, e, c, ab, tau, D, w: edit(f, z, e, c, ab, 1., D, w), "tau changes nothing"),
        (lambda f, z, e, c, ab, tau, D, w: edit(f, z, e, c, ab, tau, D, 1.), "w changes nothing"),
        (lambda f, z, e, c, ab, tau, D, w: edit(f, z, e, c, ab, (int(tau*D) + .1)/D, D, w), "cut instead of rounded"),
    ],
    "kept": [
        (lambda a, b, large: (alike(a, b), alike(a, b)), "expected"),
        (lambda a, b, large: (alike(large(a), large(b)), alike(a, b)), "taken away"),
        (lambda a, b, large: [(x - y).square().mean((1, 2, 3, 4)) for x, y in (
            (large(a), large(b)), (a - large(a), b - large(b)))], "distance"),
    ],
    "budget": [
        (lambda c, b, D, w, taus: [c//(b*round(t*D)*(1 if w == 1 else 2)) for t in taus], "backward pass"),
        (lambda c, b, D, w, taus: fair(c, 1, D, w, taus), "batch"),
        (lambda c, b, D, w, taus: fair(c, b, D, 1., taus), "asks the network twice"),
    ],
    "attack": [
        (lambda r, x, c, n, rate: attack(r, x, c, n, -rate), "downhill"),
        (lambda r, x, c, n, rate: (attack(r, x, c, n, rate)[0], attack(r, x, c, n, rate)[1][:n]), "n + 1 scores"),
        (lambda r, x, c, n, rate: attack(r, x, c, 1, rate), "expected"),
    ],
    "report": [
        (lambda b, a, better, d: report(b, a, dict.fromkeys(better, 1), d), "turn their change round"),
        (lambda *x: (report(*x)[0], report(*x)[0]["reward"] == "better"), "what everybody wants"),
        (lambda *x: (report(*x)[0], "worse" in report(*x)[0].values()), "simply failed|expected"),
    ],
}
TABLES = {"guided_draw": check.GUIDED_DRAW, "comparison": check.COMPARISON, "one_noise": check.ONE_NOISE,
          "edit": check.EDIT, "kept": check.KEPT, "budget": check.BUDGET, "attack": check.ATTACK,
          "report": check.REPORT}
PARTS = [(i, m) for i, table in enumerate((check.SCHEDULE_CORRUPT, check.SCHEDULE_CLEAN, check.SCHEDULE_CHAIN))
         for m in table]

def pairs(table):
    return [pytest.param(name, *(x if isinstance(x, tuple) else (x,)), id=f"{name}-{i}")
            for name, xs in table.items() for i, x in enumerate(xs)]

def test_every_exercise_has_answers_of_both_kinds():
    checks = {name for name in check.__all__ if name.islower()}
    assert checks == set(RIGHT) == set(WRONG) == set(TABLES) | {"schedule"}
    assert all(len(x) >= 2 for x in (*RIGHT.values(), *WRONG.values()))

@pytest.mark.parametrize("name, answer", pairs(RIGHT))
def test_right_answers_pass(name, answer, capsys):
    assert getattr(check, name)(answer) is True, capsys.readouterr().out

@pytest.mark.parametrize("name, answer, words", pairs(WRONG))
def test_wrong_answers_are_named(name, answer, words, capsys):
    assert getattr(check, name)(answer) is False
    said = capsys.readouterr().out
    assert "not yet: " in said and any(w in said for w in words.split("|")), said

@pytest.mark.parametrize("name, mistake", pairs({k: [(m,) for m in v] for k, v in TABLES.items()}))
def test_every_listed_mistake_is_wrong_and_has_its_own_message(name, mistake: Mistake, capsys):
    assert getattr(check, name)(mistake.answer) is False, mistake.message
    assert mistake.message in capsys.readouterr().out

@pytest.mark.parametrize("i, mistake", PARTS)
def test_mistakes_of_a_schedule_are_named(i, mistake, capsys):
    def answer(betas):
        parts = list(schedule(betas))
        parts[i] = lambda *given: mistake.answer(betas, *given)
        return parts
    assert check.schedule(answer) is False and mistake.message in capsys.readouterr().out

@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("stub", [lambda *args: ..., lambda *args: None, None, ...])
def test_an_open_exercise_is_no_error(name, stub, capsys):
    assert getattr(check, name)(stub) is None
    assert "not answered yet\n" in capsys.readouterr().out

@pytest.mark.parametrize("name", RIGHT)
def test_an_answer_that_breaks_is_told_not_raised(name, capsys):
    def broken(*args): raise KeyError("oh")
    assert getattr(check, name)(broken) is False and "KeyError" in capsys.readouterr().out
