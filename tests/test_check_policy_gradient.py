"Exercises of the tutorial on policy gradients: right answers pass however written, wrong ones are rejected and named."
import math

import torch
from exercises import asked_of

from instructvideo_kit.check import policy_gradient as check
from instructvideo_kit.diffusion.stochastic import ddim_gaussian


def normal(mean, sigma): return torch.distributions.Normal(mean, sigma)

def clipped(logp, old, A, clip):
    ratio = (logp - old).exp()
    return torch.maximum(-A*ratio, -A*ratio.clamp(1 - clip, 1 + clip))

def within(rewards, groups):
    A = torch.zeros_like(rewards)
    for g in groups.unique():
        mine = rewards[groups == g]
        A[groups == g] = (mine - mine.mean())/(mine.std(correction=0) + 1e-4)
    return A

def written(advantage=within, term=clipped, empty=True, old=lambda record, i, logp: record["logp"][i]):
    "A GRPO update as a learner may write it, with parts to replace."
    def update(model, base, optimizer, record, rewards, groups, schedule, clip, beta):
        A, losses = advantage(rewards, groups), []
        for i, (t, t_prev) in enumerate(zip(record["t"].tolist(), record["t_prev"].tolist())):
            z = record["z_t"][i]
            mean, sigma = ddim_gaussian(z, model(z, t), t, t_prev, schedule)
            anchor = ddim_gaussian(z, base(z, t).detach(), t, t_prev, schedule)[0]
            logp = normal(mean, sigma).log_prob(record["z_next"][i]).mean(1)
            kl = (mean - anchor).pow(2).mean(1)/(2*sigma**2)
            losses.append((term(logp, old(record, i, logp), A, clip) + beta*kl).mean())
        loss = torch.stack(losses).mean()
        if empty: optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss
    return update

def by_gain(logp, old, A, clip): # the smaller of the two gains is the larger of the two losses
    ratio = (logp - old).exp()
    return -torch.minimum(A*ratio, A*torch.clamp(ratio, 1 - clip, 1 + clip))

def by_gradient(ratio, A, c):
    ratio = ratio.clone().requires_grad_()
    torch.maximum(-A*ratio, -A*ratio.clamp(1 - c, 1 + c)).sum().backward()
    return ratio.grad != 0

def standard(r, eps, dim=1): return (r - r.mean(dim, keepdim=True))/(r.std(dim, keepdim=True, correction=0) + eps)

def shift(m, n): return ((m - n)**2).flatten(1).mean(1)

RIGHT = {
    "step_probability": [
        lambda z, m, s: normal(m, s).log_prob(z).flatten(1).mean(1),
        lambda z, m, s: [-float(((a - b)**2).mean())/(2*s**2) - math.log(s*math.sqrt(2*math.pi)) for a, b in zip(z, m)],
    ],
    "relative_advantages": [
        standard,
        lambda r, e: torch.stack([(row - row.mean())/(row.var(correction=0).sqrt() + e) for row in r]),
    ],
    "unclipped": [by_gradient, lambda r, A, c: torch.where(A > 0, r <= 1 + c, r >= 1 - c)],
    "guarded_ratio": [
        lambda p, o, m, n, s: s*(p - o) + shift(m, n)/(2*s),
        lambda p, o, m, n, s: (p - o + 0.5*shift(m/s, n/s))*s,
    ],
    "grpo_update": [written(), written(term=by_gain)],
}
WRONG = {  # as a learner would write it, and words of the verdict
    "step_probability": [
        (lambda z, m, s: normal(m, s).log_prob(z).flatten(1).sum(1), "their mean"),
        (lambda z, m, s: normal(m, s**.5).log_prob(z).flatten(1).mean(1), "for the variance"),
        (lambda z, m, s: (-(z - m)**2/(2*s**2)).flatten(1).mean(1), "square alone"),
    ],
    "relative_advantages": [
        (lambda r, e: (r - r.mean())/(r.std(correction=0) + e), "its own caption"),
        (lambda r, e: (r - r.mean(1, keepdim=True))/(r.std(1, keepdim=True) + e), "K - 1"),
        (lambda r, e: standard(r, e, 0), "rows are captions"),
    ],
    "unclipped": [
        (lambda r, A, c: ((r > 1 - c) & (r < 1 + c)), "both sides"),
        (lambda r, A, c: torch.where(A > 0, r >= 1 - c, r <= 1 + c), "sides are swapped"),
    ],
    "guarded_ratio": [
        (lambda p, o, m, n, s: s*(p - o), "not centred"),
        (lambda p, o, m, n, s: p - o + shift(m, n)/(2*s**2), "not scaled"),
        (lambda p, o, m, n, s: s*(p - o - shift(m, n)/(2*s**2)), "added back"),
    ],
    "grpo_update": [
        (written(empty=False), "zero_grad"),
        (written(lambda r, g: (r - r.mean())/(r.std(correction=0) + 1e-4)), "each group has its own"),
        (written(term=lambda p, o, A, c: -A*(p - o).exp()), "nothing is clipped"),
        (written(old=lambda record, i, logp: logp.detach()), "always 1"),
        (lambda *given: written()(*given) and None, "return the loss"),
    ],
}
TABLES = dict(step_probability=check.LOG_PROBABILITY, relative_advantages=check.ADVANTAGES, unclipped=check.UNCLIPPED,
              guarded_ratio=check.GUARD, grpo_update=check.GRPO_UPDATE)

globals().update(asked_of(check, RIGHT, WRONG, TABLES))
