"Short exercises of tutorials 09, 12 and 15: right answers pass however written, wrong ones are named."
import pytest
import torch
import torch.nn.functional as F
from exercises import asked_of

from instructvideo_kit.check import algorithms as check

RIGHT = {
    "lora_layer": [
        lambda x, W, A, B, s: F.linear(x, W) + s * F.linear(F.linear(x, A), B),
        lambda x, W, A, B, s: torch.stack([(W + s * B @ A) @ row for row in x]),
    ],
    "rwr_weights": [lambda r, b: (b * (r - r.max())).exp() / (b * (r - r.max())).exp().mean()],
}
WRONG = {  # as a learner would write it, and words of the verdict
    "lora_layer": [
        (lambda x, W, A, B, s: s * F.linear(F.linear(x, A), B), "frozen layer itself"),
        (lambda x, W, A, B, s: x @ W.T + s * x @ A @ B, "it raises"),
    ],
    "rwr_weights": [
        (lambda r, b: torch.softmax(r * b, 0), "add up to 1"),
        (lambda r, b: torch.softmax(r / b, 0) * len(r), "inverse temperature"),
        (lambda r, b: torch.exp(r * b), "not normalised"),
    ],
}
TABLES = dict(
    lora_layer=check.LORA,
    rwr_weights=check.RWR_WEIGHTS,
)

globals().update(asked_of(check, RIGHT, WRONG, TABLES))

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
