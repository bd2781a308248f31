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

def standard(r, eps, dim=1): return (r - r.mean(dim, keepdim=True))/(r.std(dim, keepdim=True, correction=0) + eps)

def whole_table(r, eps): return (r - r.mean())/(r.std(correction=0) + eps)

def unbiased(r, eps): return (r - r.mean(1, keepdim=True))/(r.std(1, keepdim=True) + eps)

def slope(advantage=standard, power=2):
    "The slope of a group as a learner may write it."
    def fn(samples, mu, sigma, rewards, eps):
        push = (samples - mu.unsqueeze(1))/sigma**power
        return (advantage(rewards, eps).unsqueeze(-1)*push).sum(1)/samples.shape[1]
    return fn

def by_autograd(samples, mu, sigma, rewards, eps): # the gradient of mean(A log pi), asked of torch
    mu = mu.clone().requires_grad_()
    logp = normal(mu[:, None], sigma).log_prob(samples).sum(2)
    return torch.autograd.grad((standard(rewards, eps)*logp).mean(1).sum(), mu)[0]

def by_einsum(samples, mu, sigma, rewards, eps):
    A = torch.stack([(row - row.mean())/(row.var(correction=0).sqrt() + eps) for row in rewards])
    return torch.einsum("ck,ckd->cd", A, samples - mu[:, None])/(rewards.shape[1]*sigma*sigma)

def steps(of, arrived="z_next"):
    "Log-probabilities of a chain as a learner may write them."
    def fn(model, record, schedule):
        rows = []
        for i, (t, t_prev) in enumerate(zip(record["t"].tolist(), record["t_prev"].tolist())):
            mean, sigma = ddim_gaussian(record["z_t"][i], model(record["z_t"][i], t), t, t_prev, schedule)
            rows.append(of(record[arrived][i], mean, sigma))
        return torch.stack(rows)
    return fn

def log_density(z, m, s): return normal(m, s).log_prob(z).mean(1)

def by_hand(z, m, s): return -((z - m)**2).mean(1)/(2*s**2) - math.log(s*math.sqrt(2*math.pi))

def shift(m, n): return ((m - n)**2).flatten(1).mean(1)

def ppo(log_ratio, A, c): return clipped(log_ratio, torch.zeros_like(log_ratio), A, c)

def by_sign(p, o, m, n, s, A, c):
    ratio = torch.exp(s*(p - o) + shift(m, n)/(2*s))
    return -A*torch.where(A > 0, ratio.clamp(max=1 + c), ratio.clamp(min=1 - c))

RIGHT = {
    "group_slope": [slope(), by_autograd, by_einsum],
    "chain_probability": [steps(log_density), steps(by_hand)],
    "guarded_loss": [
        lambda p, o, m, n, s, A, c: ppo((p - o + 0.5*shift(m/s, n/s))*s, A, c),
        by_sign,
        lambda p, o, m, n, s, A, c: by_gain(s*(p - o) + shift(m, n)/(2*s), torch.zeros_like(p), A, c),
    ],
    "grpo_update": [written(), written(term=by_gain)],
}
WRONG = {  # as a learner would write it, and words of the verdict
    "group_slope": [
        (slope(whole_table), "its own caption"),
        (slope(unbiased), "K - 1"),
        (slope(lambda r, e: standard(r, e, 0)), "rows are captions"),
        (slope(power=1), "over the variance"),
        (lambda x, mu, s, r, e: (standard(r, e)[..., None]*(mu[:, None] - x)/s**2).mean(1), "the sign"),
    ],
    "chain_probability": [
        (steps(lambda z, m, s: normal(m, s).log_prob(z).sum(1)), "their mean"),
        (steps(lambda z, m, s: normal(m, s**.5).log_prob(z).mean(1)), "for the variance"),
        (steps(lambda z, m, s: (-(z - m)**2/(2*s**2)).mean(1)), "square alone"),
        (steps(log_density, "z_t"), "where the step began"),
        (lambda model, record, schedule: steps(log_density)(model, record, schedule).sum(0), "sum over the steps"),
    ],
    "guarded_loss": [
        (lambda p, o, m, n, s, A, c: ppo(s*(p - o), A, c), "not centred"),
        (lambda p, o, m, n, s, A, c: ppo(p - o + shift(m, n)/(2*s**2), A, c), "not scaled"),
        (lambda p, o, m, n, s, A, c: ppo(s*(p - o - shift(m, n)/(2*s**2)), A, c), "added back"),
        (lambda p, o, m, n, s, A, c: -A*(s*(p - o) + shift(m, n)/(2*s)).exp(), "nothing is clipped"),
    ],
    "grpo_update": [
        (written(empty=False), "zero_grad"),
        (written(lambda r, g: (r - r.mean())/(r.std(correction=0) + 1e-4)), "each group has its own"),
        (written(term=lambda p, o, A, c: -A*(p - o).exp()), "nothing is clipped"),
        (written(old=lambda record, i, logp: logp.detach()), "always 1"),
        (lambda *given: written()(*given) and None, "return the loss"),
    ],
}
TABLES = dict(group_slope=check.GROUP_SLOPE, chain_probability=check.CHAIN_PROBABILITY, guarded_loss=check.GUARDED_LOSS,
              grpo_update=check.GRPO_UPDATE)

globals().update(asked_of(check, RIGHT, WRONG, TABLES))
