"Exercises of tutorials 09 to 15: right answers pass however written, wrong ones are rejected and the mistake is named."
import pytest
import torch
import torch.nn.functional as F

from instructvideo_kit.check import algorithms as check


def dpo_by_hand(w, lo, rw, rl, beta):
    return sum(float((1 + torch.exp(beta/2*((a - c) - (b - d)))).log()) for a, b, c, d in zip(w, lo, rw, rl))/len(w)

RIGHT = {
    "reward_loss": [
        lambda r, f: -torch.einsum("bs,bs->", r, f) / r.numel(),
        lambda r, f: -sum(float((a * b).mean()) for a, b in zip(r, f)) / len(r),
    ],
    "step_cost": [lambda n, k, c: c * (n - k) + 2 * c * k, lambda n, k, c: float(c * (n + k))],
    "lora_layer": [
        lambda x, W, A, B, s: F.linear(x, W) + s * F.linear(F.linear(x, A), B),
        lambda x, W, A, B, s: torch.stack([(W + s * B @ A) @ row for row in x]),
    ],
    "clear_changes": [
        lambda low, high: low.sign() == high.sign(),
        lambda low, high: [bool(a > 0 or b < 0) for a, b in zip(low, high)],
    ],
    "guess": [lambda z, v, a: torch.tensor(a).sqrt() * z - torch.tensor(1 - a).sqrt() * v],
    "rwr_weights": [lambda r, b: (b * (r - r.max())).exp() / (b * (r - r.max())).exp().mean()],
    "ppo_loss": [
        lambda p, o, a, e: torch.stack([-a * (p - o).exp(), -a * (p - o).exp().clip(1 - e, 1 + e)]).max(0).values.mean()
    ],
    "best_and_worst": [
        lambda s: torch.stack([s.topk(1, 1).indices[:, 0], (-s).topk(1, 1).indices[:, 0]], 1),
        lambda s: s.argsort(1)[:, [-1, 0]],
    ],
    "dpo_loss": [dpo_by_hand, lambda w, lo, rw, rl, b: F.softplus(b / 2 * ((w - rw) - (lo - rl))).mean()],
    "drawing_share": [lambda n, d, c: 1 / (1 + 6 / (n * d * c))],
    "blend": [lambda e, x, lam: torch.lerp(x, e, lam)],
    "masked_lam": [lambda lam, m: torch.lerp(torch.ones_like(m), torch.full_like(m, lam), m)],
    "drag_path": [lambda a, b, n: torch.stack([torch.linspace(x, y, n) for x, y in zip(a, b)], 1)],
    "offset_noise": [lambda e, f, s: torch.add(e, f, alpha=s)],
    "lora_size": [lambda layers, r: sum(torch.zeros(r, i).numel() + torch.zeros(o, r).numel() for i, o in layers)],
}
WRONG = {  # as a learner would write it, and words of the verdict
    "reward_loss": [
        (lambda r, f: (r * f).mean(), "sign"),
        (lambda r, f: -(r * f).sum() / f.sum(), "expected|sum of the weights"),
        (lambda r, f: -(r * f).sum(dim=-1).mean(), "divides by S"),
    ],
    "step_cost": [
        (lambda n, k, c: n * c, "backward pass"),
        (lambda n, k, c: (n - k) + 2 * k, "branches"),
        (lambda n, k, c: n * c + 2 * k * c, "once too often"),
    ],
    "lora_layer": [
        (lambda x, W, A, B, s: s * F.linear(F.linear(x, A), B), "frozen layer itself"),
        (lambda x, W, A, B, s: x @ W.T + s * x @ A @ B, "it raises"),
    ],
    "clear_changes": [
        (lambda low, high: low > 0, "clearly fell"),
        (lambda low, high: (low < 0) & (high > 0), "the others"),
        (lambda low, high: (high - low) > 0, "expected"),
    ],
    "guess": [
        (lambda z, v, a: (z - (1 - a) ** 0.5 * v) / a**0.5, "epsilon"),
        (lambda z, v, a: a * z - (1 - a) * v, "square roots"),
    ],
    "rwr_weights": [
        (lambda r, b: torch.softmax(r * b, 0), "add up to 1"),
        (lambda r, b: torch.softmax(r / b, 0) * len(r), "inverse temperature"),
        (lambda r, b: torch.exp(r * b), "not normalised"),
    ],
    "ppo_loss": [
        (
            lambda p, o, a, e: -torch.maximum((p - o).exp() * a, (p - o).exp().clamp(1 - e, 1 + e) * a).mean(),
            "max, not min",
        ),
        (lambda p, o, a, e: -((p - o).exp() * a).mean(), "nothing is clipped"),
    ],
    "best_and_worst": [
        (lambda s: s.argsort(1)[:, [0, -1]], "swapped"),
        (lambda s: s.topk(2, 1).indices, "two best"),
        (lambda s: (s.argmax(1), s.argmin(1)), "other shape"),
    ],
    "dpo_loss": [
        (lambda w, lo, rw, rl, b: -F.logsigmoid(-b / 2 * (w - lo)).mean(), "reference is missing"),
        (lambda w, lo, rw, rl, b: F.softplus(-b / 2 * ((w - rw) - (lo - rl))).mean(), "sign"),
        (lambda w, lo, rw, rl, b: F.softplus(b * ((w - rw) - (lo - rl))).mean(), "beta / 2"),
    ],
    "drawing_share": [
        (lambda n, d, c: n * d / (n * d + 6), "times c"),
        (lambda n, d, c: 1 - n * d * c / (n * d * c + 6), "learning"),
        (lambda n, d, c: 0.5, "expected"),
    ],
    "blend": [
        (lambda e, x, lam: lam * x + (1 - lam) * e, "swapped"),
        (lambda e, x, lam: e + lam * x, "on top"),
        (lambda e, x, lam: e, "expected"),
    ],
    "masked_lam": [
        (lambda lam, m: lam * m, "everywhere else"),
        (lambda lam, m: lam + (1 - lam) * m, "swapped"),
        (lambda lam, m: torch.where(m >= 0.5, lam, 1.0), "soft edge"),
    ],
    "drag_path": [
        (lambda a, b, n: [[a[k] + i / n * (b[k] - a[k]) for k in (0, 1)] for i in range(n)], "n - 1"),
        (lambda a, b, n: [[i / (n - 1) * (b[k] - a[k]) for k in (0, 1)] for i in range(n)], "add the start"),
    ],
    "offset_noise": [
        (lambda e, f, s: e + f, "share does nothing"),
        (lambda e, f, s: e * (1 - s) + f * s, "does not mix"),
    ],
    "lora_size": [
        (lambda layers, r: sum(i * o for i, o in layers) * 1, "frozen"),
        (lambda layers, r: sum(2 * r * i for i, o in layers), "square"),
    ],
}
TABLES = dict(
    reward_loss=check.REWARD_LOSS,
    step_cost=check.STEP_COST,
    lora_layer=check.LORA,
    clear_changes=check.CLEAR,
    guess=check.GUESS,
    rwr_weights=check.RWR_WEIGHTS,
    ppo_loss=check.PPO,
    best_and_worst=check.PAIRS,
    dpo_loss=check.DPO,
    drawing_share=check.DRAWING,
    offset_noise=check.OFFSET,
    blend=check.BLEND,
    masked_lam=check.MASKED,
    drag_path=check.PATH,
    lora_size=check.LORA_SIZE,
)

def pairs(table):
    return [pytest.param(name, x, id=f"{name}-{i}") for name, xs in table.items() for i, x in enumerate(xs)]

@pytest.mark.parametrize("name, answer", pairs(RIGHT))
def test_right_answers_pass(name, answer, capsys):
    assert getattr(check, name)(answer) is True
    assert capsys.readouterr().out.startswith("right")

@pytest.mark.parametrize("name, wrong", pairs(WRONG))
def test_wrong_answers_are_named(name, wrong, capsys):
    assert getattr(check, name)(wrong[0]) is False
    said = capsys.readouterr().out
    assert any(words in said for words in wrong[1].split("|")), said

@pytest.mark.parametrize("name, mistake", pairs(TABLES))
def test_every_listed_mistake_is_wrong_and_has_its_own_message(name, mistake, capsys):
    assert getattr(check, name)(mistake.answer) is False, mistake.message
    assert mistake.message in capsys.readouterr().out

@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("stub", [lambda *args: ..., None])
def test_an_open_exercise_is_no_error(name, stub, capsys):
    assert getattr(check, name)(stub) is None and capsys.readouterr().out == "not answered yet\n"

torch.manual_seed(0)
BRIGHT, DARK, WORDS = torch.rand(4, 2, 3, 8, 8)/2 + .5, torch.rand(4, 2, 3, 8, 8)/2, ["a"]*4

def mean(frames): return frames.mean((2, 3, 4))

@pytest.mark.parametrize(
    "reward, words",
    [
        (lambda x, p: mean(x).mean(1), "one score per frame"),
        (lambda x, p: float(x.mean()), "one score per frame"),
        (lambda x, p: mean(x) / 0 * 0, "not finite"),
        (lambda x, p: mean(x) - mean(x).mean(), "alone in the batch"),
        (lambda x, p: mean(x.detach()), "no gradient"),
        (lambda x, p: (x > 0.5).float().mean((2, 3, 4)), "no gradient"),
        (lambda x, p: mean(x.round()), "zero everywhere"),
        (lambda x, p: mean(x) + mean((x - x).pow(2)).sqrt(), "not finite"),
        (lambda x, p: -mean(x), "prefers the better clip in 0 %"),
        (lambda x, p: x.oh(), "AttributeError"),
        (3, "expected a function"),
    ],
)
def test_rewards_unfit_for_tuning_are_named(reward, words, capsys):
    assert check.own_reward(reward, BRIGHT, DARK, WORDS) is False
    assert words in capsys.readouterr().out

@pytest.mark.parametrize(
    "reward", [lambda x, p: mean(x), lambda x, p: x.amax((2, 3, 4)), lambda x, p: (mean(x) - 1).square().neg()]
)
def test_rewards_fit_for_tuning_pass(reward): assert check.own_reward(reward, BRIGHT, DARK, WORDS) is True

def test_a_reward_not_written_yet_is_open(): assert check.own_reward(lambda x, p: ..., BRIGHT, DARK, WORDS) is None
