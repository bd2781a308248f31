"Exercises of the tutorial on denoising: right answers pass however written, wrong ones are rejected and named."
import torch
import torch.nn.functional as F
from exercises import asked_of

from instructvideo_kit.check import denoising as check


def a_and_s(alpha_bar, t): return alpha_bar[t].sqrt()[:, None], (1 - alpha_bar[t]).sqrt()[:, None]

def step(model, optimizer, x0, t, eps, alpha_bar):
    a, s = a_and_s(alpha_bar, t)
    loss = F.mse_loss(model(a*x0 + s*eps, t), a*eps - s*x0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss

def step_by_hand(model, optimizer, x0, t, eps, alpha_bar):
    a, s = a_and_s(alpha_bar, t)
    for p in model.parameters(): p.grad = None
    error = model(a*x0 + s*eps, t) - (a*eps - s*x0)
    loss = (error*error).sum()/error.numel()
    loss.backward()
    optimizer.step()
    return float(loss.detach())

def step_of(target, loss=F.mse_loss, empty=True):
    def wrong(model, optimizer, x0, t, eps, alpha_bar):
        a, s = a_and_s(alpha_bar, t)
        value = loss(model(a*x0 + s*eps, t), target(a, s, x0, eps))
        if empty: optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value
    return wrong

def draw(model, x, timesteps, alpha_bar):
    ladder = [*timesteps.tolist(), 0]
    for t, after in zip(ladder, ladder[1:]):
        a, s, b, r = alpha_bar[t]**.5, (1 - alpha_bar[t])**.5, alpha_bar[after]**.5, (1 - alpha_bar[after])**.5
        v = model(x, t)
        x = b*(a*x - s*v) + r*(s*x + a*v)
    return x

def draw_by_angle(model, x, timesteps, alpha_bar): # a DDIM step turns (x, v) by the angle between two levels
    for t, after in zip(timesteps, [*timesteps[1:], 0]):
        turn = torch.acos(alpha_bar[t].sqrt()) - torch.acos(alpha_bar[after].sqrt())
        x = turn.cos()*x - turn.sin()*model(x, t).detach()
    return x

def no_last_step(model, x, timesteps, alpha_bar):
    for t, after in zip(timesteps, timesteps[1:]):
        a, s, b, r = alpha_bar[t]**.5, (1 - alpha_bar[t])**.5, alpha_bar[after]**.5, (1 - alpha_bar[after])**.5
        v = model(x, t)
        x = b*(a*x - s*v) + r*(s*x + a*v)
    return x

def weights_of(x, p, a): return (-torch.cdist(x, a**.5*p)**2/(2*(1 - a))).softmax(1)

def V(a, s, x0, e): return a*e - s*x0

RIGHT = {
    "conditional_mean": [
        lambda x, p, a: torch.einsum("bn,nd->bd", weights_of(x, p, a), p),
        lambda x, p, a: torch.stack([(weights_of(one[None], p, a).T*p).sum(0) for one in x]),
    ],
    "three_names": [
        lambda x0, x, a: ((x - a**.5*x0)/(1 - a)**.5, (a**.5*x - x0)/(1 - a)**.5),
        lambda x0, x, a: [(e := (x - a**.5*x0)*(1 - a)**-.5), a**.5*e - (1 - a)**.5*x0],
    ],
    "loss_weights": [lambda a: (a/(1 - a), a/(1 - a) + 1), lambda a: torch.stack([1/(1 - a) - 1, 1/(1 - a)])],
    "training_step": [step, step_by_hand],
    "sampler": [draw, draw_by_angle],
}
WRONG = {  # as a learner would write it, and words of the verdict
    "conditional_mean": [
        (lambda x, p, a: p[torch.cdist(x, a**.5*p).argmin(1)], "likeliest single point"),
        (lambda x, p, a: (-torch.cdist(x, p)**2/(2*(1 - a))).softmax(1) @ p, "do not shrink"),
        (lambda x, p, a: (-torch.cdist(x, a**.5*p)**2).softmax(1) @ p, "not divided"),
    ],
    "three_names": [
        (lambda x0, x, a: ((x - a*x0)/(1 - a), a*(x - a*x0)/(1 - a) - (1 - a)*x0), "throughout"),
        (lambda x0, x, a: ((e := (x - a**.5*x0)/(1 - a)**.5), (1 - a)**.5*x0 - a**.5*e), "opposite sign"),
        (lambda x0, x, a: ((e := (x - a**.5*x0)/(1 - a)**.5), e - x0), "flow"),
    ],
    "loss_weights": [
        (lambda a: ((a/(1 - a))**.5, (1/(1 - a))**.5), "square them"),
        (lambda a: ((1 - a)/a, 1 - a), "upside down"),
        (lambda a: (1/(1 - a), a/(1 - a)), "order"),
    ],
    "training_step": [
        (step_of(V, empty=False), "zero_grad"),
        (step_of(lambda a, s, x0, e: e), "target is the noise"),
        (step_of(V, lambda x, y: F.mse_loss(x, y, reduction="sum")), "sum over the batch"),
        (lambda model, *rest: step(model, *rest) and None, "return the loss"),
    ],
    "sampler": [
        (no_last_step, "last step is missing"),
        (lambda m, x, t, b: draw(m, x, t.flip(0), b), "runs upwards"),
        (lambda m, x, t, b: draw(m, x, t, b**2), "square roots"),
    ],
}
TABLES = dict(conditional_mean=check.CONDITIONAL_MEAN, three_names=check.NAMES, loss_weights=check.LOSS_WEIGHTS,
              training_step=check.TRAINING_STEP, sampler=check.SAMPLER)

globals().update(asked_of(check, RIGHT, WRONG, TABLES))

def test_the_model_of_points_is_judged_in_both_parts(capsys):
    assert check.plane_model(step, draw) is True
    assert check.plane_model(None, None) is None
    assert check.plane_model(step, None) is False
    assert check.plane_model(step, no_last_step) is False
    said = capsys.readouterr().out
    assert said.count("training step: ") == said.count("sampler: ") == 4 and "last step is missing" in said
