"Checks accept what is right however it is written, reject plausible wrong answers, and name the mistake."
import math

import pytest
import torch
import torch.nn.functional as F

from instructvideo_kit import check
from instructvideo_kit.check import diffusion, quiz, reward, truncation, verdict
from instructvideo_kit.check.quiz import QUIZZES
from instructvideo_kit.diffusion.sampling import guide
from instructvideo_kit.diffusion.schedule import corrupt, ddim_timesteps, noise_timestep
from instructvideo_kit.menagerie.oracle import flicker
from instructvideo_kit.reward.segvr import segment_bounds, segmental_reward
from instructvideo_kit.reward.tar import expected_weights, tar_weights

TABLES = {
    "ddim_ladder": diffusion.LADDER,
    "cfg": diffusion.CFG,
    "alpha_bar": diffusion.ALPHA_BAR,
    "corruption": diffusion.CORRUPT,
    "noise_level": diffusion.NOISE_TIMESTEP,
    "clean_clip": diffusion.CLEAN_CLIP,
    "one_step": diffusion.DDIM_STEP,
    "edit_chain": diffusion.EDIT_CHAIN,
    "edit_cost": diffusion.EDIT_COST,
    "likeness": diffusion.LIKENESS,
    "segment_mean": reward.SEGMENT_MEAN,
    "cosine_score": reward.COSINE_SCORE,
    "preference_loss": reward.PREFERENCE_LOSS,
    "climb": reward.CLIMB,
    "brightness_flicker": reward.FLICKER,
    "segments": reward.SEGMENTS,
    "choose_frames": reward.CHOOSE,
    "attenuation": reward.TAR_WEIGHTS,
    "weighted_reward": reward.WEIGHTED_REWARD,
    "segment_shares": reward.SHARES,
    "lever": truncation.LEVER,
    "truncated_chain": truncation.TRUNCATED,
    "chain_cost": truncation.COST,
}

def step_by_v(z, v, a, p):
    x0, eps = a**.5*z - (1 - a)**.5*v, a**.5*v + (1 - a)**.5*z
    return p**.5*x0 + (1 - p)**.5*eps

def edited(z, eps, step, timesteps, alpha_bar):
    z = corrupt(z, eps, alpha_bar[timesteps[0]])
    while timesteps: z, timesteps = step(z, timesteps[0], timesteps[1] if len(timesteps) > 1 else -1), timesteps[1:]
    return z

def correlation(a, b):
    return torch.stack([torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1] for x, y in zip(a, b)])

def last_k(step, z, n, k):
    for i in range(n):
        if i == n - k: z = z.detach()
        z = step(z, i) if i >= n - k else step(z, i).detach()
    return z

RIGHT = {
    "ddim_ladder": [
        ddim_timesteps,
        lambda D, T, tau: [i * (T // D) + 1 for i in range(round(tau * D))][::-1],
        lambda D, T, tau: torch.arange(round(tau * D)).flip(0) * (T // D) + 1,
    ],
    "cfg": [guide, lambda c, u, w: w * c + (1 - w) * u, lambda c, u, w: torch.lerp(u, c, w)],
    "alpha_bar": [
        lambda b: (1 - b).cumprod(0),
        lambda b: torch.exp(torch.cumsum(torch.log1p(-b), 0)),
        lambda b: [float((1 - b[: i + 1]).prod()) for i in range(len(b))],
    ],
    "corruption": [corrupt, lambda z, e, a: math.sqrt(a) * z + math.sqrt(1 - a) * e],
    "noise_level": [noise_timestep, lambda tau, D, T: list(range(1, T + 1, T // D))[round(tau * D) - 1]],
    "clean_clip": [lambda e, z, a: (z - (1 - a) ** 0.5 * e) / a**0.5],
    "one_step": [
        step_by_v,
        lambda z, v, a, p: ((p * a) ** 0.5 + ((1 - p) * (1 - a)) ** 0.5) * z
        + (((1 - p) * a) ** 0.5 - (p * (1 - a)) ** 0.5) * v,
    ],
    "edit_chain": [edited],
    "edit_cost": [lambda tau, D, w: round(tau * D) * (1 if w == 1 else 2)],
    "likeness": [correlation],
    "segment_mean": [
        reward._segment_mean,
        lambda r, S: r[:, [i * r.shape[1] // S for i in range(S)]].mean(1),
        lambda r, S: [sum(float(row[i * len(row) // S]) for i in range(S)) / S for row in r],
    ],
    "cosine_score": [
        lambda x, y: F.cosine_similarity(x, y[:, None], dim=-1),
        lambda x, y: (x * y[:, None]).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1, keepdim=True)),
    ],
    "preference_loss": [lambda b, w, s: torch.log1p(torch.exp(s * (w - b))).mean()],
    "climb": [lambda x, d, r: torch.clamp(x + r * torch.sign(d), min=0, max=1)],
    "brightness_flicker": [flicker],
    "segments": [segment_bounds, lambda F, S: [i * F // S for i in range(S)] + [F]],
    "choose_frames": [
        lambda F, S, u: [i * F // S + int(float(u[i]) * ((i + 1) * F // S - i * F // S)) for i in range(S)]
    ],
    "attenuation": [tar_weights, lambda g, F, lam: torch.exp(-lam * abs(g - F / 2))],
    "weighted_reward": [
        segmental_reward,
        lambda r, w: torch.stack([sum(a * b for a, b in zip(x, y)) / len(x) for x, y in zip(r, w)]),
    ],
    "segment_shares": [lambda F, S, lam: F_share(expected_weights(F, S, lam))],
    "lever": [lambda a, p: math.sin(math.acos(p**0.5) - math.acos(a**0.5))],
    "truncated_chain": [last_k],
    "chain_cost": [lambda n, k, c: sum(c * (2 if i >= n - k else 1) for i in range(n))],
}
def F_share(w): return w/w.sum()

WRONG = {  # exercise -> (an answer as a learner would write it, words of the verdict)
    "ddim_ladder": [
        (lambda D, T, tau: [i * (T // D) + 1 for i in range(round(tau * D))], "upwards"),
        (lambda D, T, tau: list(range(0, T // D * D, T // D))[: round(tau * D)][::-1], "one too small"),
        (lambda D, T, tau: [i * (T // D) for i in range(round(tau * D), 0, -1)], "ends at T // D"),
        (lambda D, T, tau: [i * (T // D) + 1 for i in range(D)][::-1], "tau changes nothing"),
        (lambda D, T, tau: [i * (T // D) + 1 for i in range(D)][::-1][: round(tau * D)], "first tau * D steps"),
        (lambda D, T, tau: [int(i * T / D) + 1 for i in range(round(tau * D))][::-1], "rounds it down first"),
        (lambda D, T, tau: [i * (T // D) + 1 for i in range(int(tau * D))][::-1], "cut instead of rounded"),
        (lambda D, T, tau: torch.linspace(T - 1, 0, round(tau * D)).long(), "expected"),
    ],
    "cfg": [
        (lambda c, u, w: c + w * (u - c), "swapped"),
        (lambda c, u, w: (1 + w) * c - w * u, "start from the one without"),
        (lambda c, u, w: w * (c - u), "starting point is missing"),
        (lambda c, u, w: (c + u) / 2, "expected"),
        (lambda c, u, w: guide(c, u, w)[:1, :1], "it raises|expected"),
    ],
    "alpha_bar": [
        (lambda b: 1 - b.cumsum(0), "added the betas up"),
        (lambda b: [float(b[: i + 1].prod()) for i in range(len(b))], "multiplied the betas"),
        (lambda b: (1 - b).prod(), "one number"),
        (lambda b: (1 - b).cumprod(0) ** 0.5, "amplitude"),
    ],
    "corruption": [
        (lambda z, e, a: a * z + (1 - a) * e, "square root of both"),
        (lambda z, e, a: z * math.sqrt(1 - a) + e * math.sqrt(a), "swapped"),
        (lambda z, e, a: z + e * (1 - a) ** 0.5, "does not shrink"),
        (lambda z, e, a: z + e, "expected"),
    ],
    "noise_level": [
        (lambda tau, D, T: int(tau * T), "tau * T"),
        (lambda tau, D, T: (int(tau * D) - 1) * (T // D) + 1, "hair below 29"),
        (lambda tau, D, T: round(tau * D) * (T // D) + 1, "one rung too high"),
        (lambda tau, D, T: (round(tau * D) - 1) * T / D + 1, "expected"),
    ],
    "clean_clip": [
        (lambda e, z, a: z - e * math.sqrt(1 - a), "still shrunk"),
        (lambda e, z, a: (z - (1 - a) * e) / a, "square root of both"),
        (lambda e, z, a: (z - e) / a**0.5, "as much noise as was added"),
    ],
    "one_step": [
        (lambda z, v, a, p: a**0.5 * z - (1 - a) ** 0.5 * v, "clean clip at once"),
        (lambda z, v, a, p: p**0.5 * (z - (1 - a) ** 0.5 * v) / a**0.5 + (1 - p) ** 0.5 * v, "as if it were the noise"),
        (lambda z, v, a, p: step_by_v(z, v, p, p), "one level for both"),
        (lambda z, v, a, p: z - v, "expected"),
    ],
    "edit_chain": [
        (lambda z, e, f, ts, a: edited(e, e * 0, f, ts, a * 0 + 1), "pure noise"),
        (lambda z, e, f, ts, a: edited(z, e, f, ts[::-1], a), "expected"),
        (lambda z, e, f, ts, a: diffusion._edit(z, e, f, ts[:-1], a, last=ts[-1]), "last step is missing"),
        (lambda z, e, f, ts, a: edited(z, z * 0, f, ts, a * 0 + 1), "clean clip"),
    ],
    "edit_cost": [
        (lambda tau, D, w: round(tau * D), "asks the network twice"),
        (lambda tau, D, w: 2 * round(tau * D), "w = 1"),
        (lambda tau, D, w: 2 * D, "expected"),
    ],
    "likeness": [
        (lambda a, b: F.cosine_similarity(a.flatten(1), b.flatten(1)), "means are still inside"),
        (lambda a, b: torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1], "over all clips"),
        (lambda a, b: (a - b).square().mean((1, 2, 3, 4)), "distance"),
    ],
    "segment_mean": [
        (lambda r, S: r.mean(1), "all frames"),
        (lambda r, S: r[:, :S].mean(1), "first S frames"),
        (lambda r, S: r[:, :: r.shape[1] // S].mean(1), "too many frames"),
        (lambda r, S: r[:, :: r.shape[1] // S][:, :S].mean(1), "drifts"),
        (lambda r, S: reward._segment_mean(r, S).mean(), "one number per clip"),
        (
            lambda r, S: torch.stack(
                [part.mean(1) for part in r.tensor_split([i * r.shape[1] // S for i in range(1, S)], 1)]
            ).mean(0),
            "averaged each segment",
        ),
        (lambda r, S: r.max(1).values, "expected"),
    ],
    "cosine_score": [
        (lambda x, y: (x @ y[:, :, None])[..., 0], "dot product"),
        (lambda x, y: F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T, "every caption|it raises"),
        (lambda x, y: F.cosine_similarity(x, y[:, None], dim=-1).mean(1), "one score per frame"),
        (lambda x, y: x @ y, "it raises"),
    ],
    "preference_loss": [
        (lambda b, w, s: torch.sigmoid(s * (b - w)).mean(), "probability"),
        (lambda b, w, s: -F.logsigmoid(s * (w - b)).mean(), "swapped"),
        (lambda b, w, s: F.softplus(w - b).mean(), "scale changes nothing"),
        (lambda b, w, s: (w - b).mean(), "expected"),
    ],
    "climb": [
        (lambda x, d, r: x + r * d, "expected"),
        (lambda x, d, r: (x + r * d).clamp(0, 1), "sign only"),
        (lambda x, d, r: x + r * d.sign(), "clamp the result"),
        (lambda x, d, r: (x - r * d.sign()).clamp(0, 1), "downhill"),
    ],
    "brightness_flicker": [
        (lambda v: (v[:, 1:] - v[:, :-1]).abs().mean((1, 2, 3, 4)), "whatever walks"),
        (lambda v: v.mean((2, 3, 4)).std(1), "sunset"),
        (lambda v: flicker(v).mean(), "one number per clip"),
        (lambda v: v.mean((2, 3, 4)).mean(1), "expected"),
    ],
    "segments": [
        (lambda F, S: [i * F // S for i in range(S)], "the end is missing"),
        (lambda F, S: torch.linspace(0, F, S + 1), "whole"),
        (lambda F, S: [i * (F // S) for i in range(S + 1)], "leaves the last frames out"),
        (lambda F, S: list(range(0, F, S)), "expected"),
    ],
    "choose_frames": [
        (lambda F, S, u: (u * F).long(), "anywhere"),
        (lambda F, S, u: [i * F // S + int(float(x) * (F // S)) for i, x in enumerate(u)], "released code"),
        (lambda F, S, u: [i * F // S for i in range(S)], "first frames"),
        (lambda F, S, u: (u * F).sort().values.long(), "expected"),
    ],
    "attenuation": [
        (lambda g, F, lam: torch.exp(-lam * (g - (F - 1) / 2).abs()), "true middle"),
        (lambda g, F, lam: torch.exp(-lam * (g - F / 2) ** 2), "bell"),
        (lambda g, F, lam: torch.softmax(-lam * (g - F / 2).abs(), dim=1), "normalised"),
        (lambda g, F, lam: torch.exp(-lam * (g - F).abs()), "end of the clip"),
    ],
    "weighted_reward": [
        (lambda r, w: (r * w).sum(1) / w.sum(1), "divided by the sum"),
        (lambda r, w: (r * w).sum(1), "divides by S"),
        (lambda r, w: (r * w).mean(), "one number per clip"),
        (lambda r, w: r.max(1).values, "expected"),
    ],
    "segment_shares": [
        (lambda F, S, lam: expected_weights(F, S, lam), "divide by their sum"),
        (lambda F, S, lam: torch.ones(S) / S, "lam = 0"),
        (
            lambda F, S, lam: F_share(tar_weights(torch.tensor([i * F // S for i in range(S)]), F, lam)),
            "first frame of each",
        ),
    ],
    "lever": [
        (lambda a, p: math.acos(p**0.5) - math.acos(a**0.5), "angle itself"),
        (lambda a, p: math.sin(math.acos(a**0.5) - math.acos(p**0.5)), "a sign"),
        (lambda a, p: p**0.5 - a**0.5, "expected"),
    ],
    "truncated_chain": [
        (lambda step, z, n, k: last_k(step, z, n, n), "all n steps"),
        (lambda step, z, n, k: last_k(step, z, n, 0), "no gradient at all"),
        (lambda step, z, n, k: last_k(step, z, n, max(0, k - 1)), "one step too few"),
        (lambda step, z, n, k: step(z, 0), "expected"),
    ],
    "chain_cost": [
        (lambda n, k, c: c * n, "backward pass is missing"),
        (lambda n, k, c: n + k, "c times"),
        (lambda n, k, c: 2 * (n + k), "expected"),
    ],
}
def pairs(table):
    return [
    pytest.param(name, *(x if isinstance(x, tuple) else (x,)), id=f"{name}-{i}")
    for name, xs in table.items()
    for i, x in enumerate(xs)
]

@pytest.mark.parametrize("name, answer", pairs(RIGHT))
def test_right_answers_pass(name, answer, capsys):
    assert getattr(check, name)(answer) is True, capsys.readouterr().out
    assert capsys.readouterr().out.startswith("right")

@pytest.mark.parametrize("name, answer, words", pairs(WRONG))
def test_wrong_answers_are_named(name, answer, words, capsys):
    assert getattr(check, name)(answer) is False
    said = capsys.readouterr().out
    assert said.startswith("not yet: ") and any(w in said for w in words.split("|")), said

def test_every_check_has_answers_of_both_kinds():
    checks = {n for module in (diffusion, reward, truncation) for n in module.__all__ if n.islower()}
    assert checks == set(TABLES) == set(RIGHT) == set(WRONG) and all(len(w) >= 2 for w in WRONG.values())
    assert checks < set(dir(check))

@pytest.mark.parametrize("name", TABLES)
def test_every_listed_mistake_is_wrong_and_has_its_own_message(name, capsys):
    for mistake in TABLES[name]:
        # the mistakes of a loop are kept as what the check sees of them: value and gradient
        says = (
            verdict.judge(mistake.answer, *loop_case(), TABLES[name])
            if name == "truncated_chain"
            else getattr(check, name)(mistake.answer)
        )
        assert says is False, mistake.message
        assert mistake.message in capsys.readouterr().out

def loop_case():
    return truncation._watched(truncation._opened(lambda i, n, k: i >= n - k)), [(6, 2), (6, 1), (6, 6), (5, 3), (4, 0)]

@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("stub", [lambda *args: ..., lambda *args: None, None, ...])
def test_an_open_exercise_is_no_error(name, stub, capsys):
    assert getattr(check, name)(stub) is None
    assert capsys.readouterr().out == "not answered yet\n"

@pytest.mark.parametrize("name", RIGHT)
def test_an_answer_that_breaks_is_told_not_raised(name, capsys):
    def broken(*args): raise KeyError("oh")
    assert getattr(check, name)(broken) is False and "KeyError" in capsys.readouterr().out
    assert getattr(check, name)(lambda: 1) is False and "TypeError" in capsys.readouterr().out
    assert getattr(check, name)("text") is False and "expected a function" in capsys.readouterr().out

def test_none_on_one_way_only_is_not_open(capsys):
    assert check.cfg(lambda c, u, w: guide(c, u, w) if w == 4 else None) is False
    assert "returns None" in capsys.readouterr().out

def test_working_in_place_does_not_fool_the_check(): assert check.cfg(lambda c, u, w: c.sub_(u).mul_(w).add_(u)) is True

def test_a_large_wrong_answer_is_shown_at_its_first_wrong_place(capsys):
    check.corruption(
        lambda z, e, a: (
            corrupt(z, e, a) + torch.nn.functional.pad(torch.ones(1, 1, 1, 1, 1), (0, 2, 0, 2, 0, 1, 0, 3))
            if z.ndim == 5
            else corrupt(z, e, a)
        )
    )
    assert "at [0, 0, 0, 0, 0], expected" in capsys.readouterr().out

def test_unknown_check_is_named():
    with pytest.raises(AttributeError, match="no check 'tarr'"): _ = check.tarr

@pytest.mark.parametrize("tutorial", QUIZZES)
def test_quiz(tutorial, capsys):
    questions = QUIZZES[tutorial]
    assert quiz(tutorial, *(q.right for q in questions)) == 3 and capsys.readouterr().out.count("right: ") == 3
    assert (
        quiz(tutorial, *(next(said for said in q.said if said != q.right) for q in questions)) == 0
        and capsys.readouterr().out.count("no: ") == 3
    )
    assert (
        quiz(tutorial, None, ..., "D") == 0
        and "not answered yet\n2. not answered yet\n3. 'D' is not among" in capsys.readouterr().out
    )

def test_right_letters_are_not_all_alike():
    assert {q.right for questions in QUIZZES.values() for q in questions} == {"a", "b", "c"}
