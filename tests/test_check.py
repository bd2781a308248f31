"Checks accept what is right however it is written, reject plausible wrong answers, and name the mistake."
import pytest, torch
from instructvideo_kit import check
from instructvideo_kit.diffusion.sampling import guide
from instructvideo_kit.diffusion.schedule import ddim_timesteps

RIGHT = {
    "ddim_ladder": [ddim_timesteps, lambda D, T, tau: [i*(T//D) + 1 for i in range(round(tau*D))][::-1],
                    lambda D, T, tau: torch.arange(round(tau*D)).flip(0)*(T//D) + 1],
    "cfg": [guide, lambda c, u, w: w*c + (1 - w)*u, lambda c, u, w: torch.lerp(u, c, w)],
    "segment_mean": [check._segment_mean, lambda r, S: r[:, [i*r.shape[1]//S for i in range(S)]].mean(1),
                     lambda r, S: [sum(float(row[i*len(row)//S]) for i in range(S))/S for row in r]],
}
WRONG = { # exercise -> (an answer as a learner would write it, words of the verdict)
    "ddim_ladder": [
        (lambda D, T, tau: [i*(T//D) + 1 for i in range(round(tau*D))], "upwards"),
        (lambda D, T, tau: list(range(0, T//D*D, T//D))[:round(tau*D)][::-1], "one too small"),
        (lambda D, T, tau: [i*(T//D) for i in range(round(tau*D), 0, -1)], "ends at T // D"),
        (lambda D, T, tau: [i*(T//D) + 1 for i in range(D)][::-1], "tau changes nothing"),
        (lambda D, T, tau: [i*(T//D) + 1 for i in range(D)][::-1][:round(tau*D)], "first tau * D steps"),
        (lambda D, T, tau: [int(i*T/D) + 1 for i in range(round(tau*D))][::-1], "rounds it down first"),
        (lambda D, T, tau: [i*(T//D) + 1 for i in range(int(tau*D))][::-1], "cut instead of rounded"),
        (lambda D, T, tau: torch.linspace(T - 1, 0, round(tau*D)).long(), "expected"),
    ],
    "cfg": [
        (lambda c, u, w: c + w*(u - c), "swapped"),
        (lambda c, u, w: (1 + w)*c - w*u, "start from the one without"),
        (lambda c, u, w: w*(c - u), "starting point is missing"),
        (lambda c, u, w: (c + u)/2, "expected"),
        (lambda c, u, w: guide(c, u, w)[:1, :1], "it raises|expected"),
    ],
    "segment_mean": [
        (lambda r, S: r.mean(1), "all frames"),
        (lambda r, S: r[:, :S].mean(1), "first S frames"),
        (lambda r, S: r[:, ::r.shape[1]//S].mean(1), "too many frames"),
        (lambda r, S: r[:, ::r.shape[1]//S][:, :S].mean(1), "drifts"),
        (lambda r, S: check._segment_mean(r, S).mean(), "one number per clip"),
        (lambda r, S: torch.stack([part.mean(1) for part in r.tensor_split([i*r.shape[1]//S for i in range(1, S)], 1)]).mean(0), "averaged each segment"),
        (lambda r, S: r.max(1).values, "expected"),
    ],
}
pairs = lambda table: [pytest.param(name, *(x if isinstance(x, tuple) else (x,)), id=f"{name}-{i}") for name, xs in table.items() for i, x in enumerate(xs)]

@pytest.mark.parametrize("name, answer", pairs(RIGHT))
def test_right_answers_pass(name, answer, capsys):
    assert getattr(check, name)(answer) is True
    assert capsys.readouterr().out.startswith("right")

@pytest.mark.parametrize("name, answer, words", pairs(WRONG))
def test_wrong_answers_are_named(name, answer, words, capsys):
    assert getattr(check, name)(answer) is False
    said = capsys.readouterr().out
    assert said.startswith("not yet: ") and any(w in said for w in words.split("|")), said

@pytest.mark.parametrize("name, table", [("ddim_ladder", check.LADDER), ("cfg", check.CFG), ("segment_mean", check.SEGMENT_MEAN)])
def test_every_listed_mistake_is_wrong_and_has_its_own_message(name, table, capsys):
    for mistake in table:
        assert getattr(check, name)(mistake.answer) is False, mistake.message
        assert mistake.message in capsys.readouterr().out

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
