"Checks accept what is right however it is written, reject plausible wrong answers, and name the mistake."
import ast
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from instructvideo_kit import check
from instructvideo_kit.check import diffusion, quiz, reward, truncation, verdict
from instructvideo_kit.check.quiz import QUIZZES
from instructvideo_kit.menagerie.oracle import flicker
from instructvideo_kit.reward.tar import expected_weights, tar_weights

TABLES = {
    "alpha_bar": diffusion.ALPHA_BAR,
    "one_step": diffusion.DDIM_STEP,
    "segment_mean": reward.SEGMENT_MEAN,
    "cosine_score": reward.COSINE_SCORE,
    "brightness_flicker": reward.FLICKER,
    "choose_frames": reward.CHOOSE,
    "attenuation": reward.TAR_WEIGHTS,
    "segment_shares": reward.SHARES,
    "lever": truncation.LEVER,
    "truncated_chain": truncation.TRUNCATED,
}

def step_by_v(z, v, a, p):
    x0, eps = a**.5*z - (1 - a)**.5*v, a**.5*v + (1 - a)**.5*z
    return p**.5*x0 + (1 - p)**.5*eps

def last_k(step, z, n, k):
    for i in range(n):
        if i == n - k: z = z.detach()
        z = step(z, i) if i >= n - k else step(z, i).detach()
    return z

RIGHT = {
    "alpha_bar": [
        lambda b: (1 - b).cumprod(0),
        lambda b: torch.exp(torch.cumsum(torch.log1p(-b), 0)),
        lambda b: [float((1 - b[: i + 1]).prod()) for i in range(len(b))],
    ],
    "one_step": [
        step_by_v,
        lambda z, v, a, p: ((p * a) ** 0.5 + ((1 - p) * (1 - a)) ** 0.5) * z
        + (((1 - p) * a) ** 0.5 - (p * (1 - a)) ** 0.5) * v,
    ],
    "segment_mean": [
        reward._segment_mean,
        lambda r, S: r[:, [i * r.shape[1] // S for i in range(S)]].mean(1),
        lambda r, S: [sum(float(row[i * len(row) // S]) for i in range(S)) / S for row in r],
    ],
    "cosine_score": [
        lambda x, y: F.cosine_similarity(x, y[:, None], dim=-1),
        lambda x, y: (x * y[:, None]).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1, keepdim=True)),
    ],
    "brightness_flicker": [flicker],
    "choose_frames": [
        lambda F, S, u: [i * F // S + int(float(u[i]) * ((i + 1) * F // S - i * F // S)) for i in range(S)]
    ],
    "attenuation": [tar_weights, lambda g, F, lam: torch.exp(-lam * abs(g - F / 2))],
    "segment_shares": [lambda F, S, lam: F_share(expected_weights(F, S, lam))],
    "lever": [lambda a, p: math.sin(math.acos(p**0.5) - math.acos(a**0.5))],
    "truncated_chain": [last_k],
}
def F_share(w): return w/w.sum()

WRONG = {  # exercise -> (an answer as a learner would write it, words of the verdict)
    "alpha_bar": [
        (lambda b: 1 - b.cumsum(0), "added the betas up"),
        (lambda b: [float(b[: i + 1].prod()) for i in range(len(b))], "multiplied the betas"),
        (lambda b: (1 - b).prod(), "one number"),
        (lambda b: (1 - b).cumprod(0) ** 0.5, "amplitude"),
    ],
    "one_step": [
        (lambda z, v, a, p: a**0.5 * z - (1 - a) ** 0.5 * v, "clean clip at once"),
        (lambda z, v, a, p: p**0.5 * (z - (1 - a) ** 0.5 * v) / a**0.5 + (1 - p) ** 0.5 * v, "as if it were the noise"),
        (lambda z, v, a, p: step_by_v(z, v, p, p), "one level for both"),
        (lambda z, v, a, p: z - v, "expected"),
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
    "brightness_flicker": [
        (lambda v: (v[:, 1:] - v[:, :-1]).abs().mean((1, 2, 3, 4)), "whatever walks"),
        (lambda v: v.mean((2, 3, 4)).std(1), "sunset"),
        (lambda v: flicker(v).mean(), "one number per clip"),
        (lambda v: v.mean((2, 3, 4)).mean(1), "expected"),
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

def called_by_checks():
    "Names of the functions that each check calls in its own code: {check: names}."
    found = {}
    for path in Path(check.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                found[node.name] = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return found

def unused(checks, text, called):
    "Checks that no tutorial asks, neither by name nor through another check."
    asked = set(re.findall(r"check\.(\w+)\(", text))
    through = set().union(*(called.get(name, set()) for name in asked))
    return set(checks) - asked - through

def test_every_check_is_asked_by_some_tutorial():
    masters = (Path(__file__).parent.parent/"tutorials").glob("*.ipynb")
    text = "\n".join(path.read_text(encoding="utf-8") for path in masters)
    no_exercise = {"judge", "Mistake"} # what all checks are made of
    assert unused(set(dir(check)) - no_exercise, text, called_by_checks()) == set()

def test_a_check_that_nobody_asks_is_noticed():
    assert unused({"a", "b", "c"}, "right = check.a(mine)", {"a": {"b", "judge"}}) == {"c"}

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
    assert check.one_step(lambda z, v, a, p: step_by_v(z, v, a, p) if a < .5 else None) is False
    assert "returns None" in capsys.readouterr().out

def test_working_in_place_does_not_fool_the_check():
    def in_place(z, v, a, p):
        x0 = a**.5*z - (1 - a)**.5*v
        return z.mul_((1 - a)**.5).add_(a**.5*v).mul_((1 - p)**.5).add_(p**.5*x0)
    assert check.one_step(in_place) is True

def test_a_large_wrong_answer_is_shown_at_its_first_wrong_place(capsys):
    def wrong_in_one_place(z, v, a, p):
        answer = step_by_v(z, v, a, p)
        answer[0, 0, 1, 0, 2] += 1
        return answer
    check.one_step(wrong_in_one_place)
    assert "at [0, 0, 1, 0, 2], expected" in capsys.readouterr().out

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
