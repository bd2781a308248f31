"Exercises of tutorials 11 to 15 that build: right answers pass however written, wrong ones are rejected and named."
import copy

import numpy as np
import torch
import torch.nn.functional as F
from exercises import asked_of

from instructvideo_kit.check import learning as check


def written(errors=None, loss=None, empty=True):
    "A DPO update as a learner may write it, both clips in one batch."
    def update(model, reference, optimizer, chosen, rejected, words, noise, t, schedule, beta):
        a, x0 = schedule.at(t), torch.cat([chosen, rejected])
        n, both = noise.repeat(2, 1), words.repeat(2)
        z, v = a**.5*x0 + (1 - a)**.5*n, a**.5*n - (1 - a)**.5*x0
        error = F.mse_loss(model(z, t, both), v, reduction="none").mean(1)
        with torch.no_grad(): anchor = F.mse_loss(reference(z, t, both), v, reduction="none").mean(1)
        gain = anchor - error
        if loss: value = loss(error, anchor, beta)
        else: value = F.softplus(-beta/2*(gain[:len(words)] - gain[len(words):])).mean()
        if empty: optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value
    return update

def by_hand(*args):
    "The same update, pair by pair."
    model, reference, optimizer, chosen, rejected, words, noise, t, schedule, beta = args
    a, losses = schedule.at(t), []
    for w, lo, word, n in zip(chosen, rejected, words, noise):
        def error(net, x0, word=word, n=n):
            z = (a**.5*x0 + (1 - a)**.5*n)[None]
            return ((net(z, t, word[None])[0] - (a**.5*n - (1 - a)**.5*x0))**2).mean()
        gap = error(model, w) - error(reference, w).detach() - error(model, lo) + error(reference, lo).detach()
        losses.append(-torch.sigmoid(-beta/2*gap).log())
    loss = sum(losses)/len(losses)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()

def online(start=copy.deepcopy, spread="interleave", ties=False):
    "The loop, caption by caption."
    def loop(model, draw, judge_of, update, words, n, rounds, refresh_every):
        reference, rewards = start(model), []
        for k in range(rounds):
            if k > 0 and k % refresh_every == 0: reference = start(model)
            many = words.repeat_interleave(n) if spread == "interleave" else words.repeat(n)
            x = draw(model, many, k).reshape(len(words), n, 2)
            r, chosen, rejected, kept = judge_of(x), [], [], []
            for i in range(len(words)):
                if r[i].max() == r[i].min() and not ties: continue
                chosen.append(x[i, r[i].argmax()])
                rejected.append(x[i, r[i].argmin()])
                kept.append(int(words[i]))
            if kept: update(model, reference, torch.stack(chosen), torch.stack(rejected), torch.tensor(kept), k)
            rewards.append(r.mean())
        return rewards
    return loop

def interval(wide=True, both=True):
    "The interval with numpy."
    def found(d, rows, columns, student):
        d = d.numpy()
        means = [d[np.ix_(i, j)].mean() if both else d[:, j].mean() for i, j in zip(rows.numpy(), columns.numpy())]
        s, c = d.shape
        a, b = d.mean(1).var(ddof=1)/s, d.mean(0).var(ddof=1)/c
        df = (a + b)**2/(a*a/(s - 1) + b*b/(c - 1))
        factor = (a + b)**.5/np.std(means)*student(df)/1.959964 if wide else 1.
        low, high = np.quantile(means, [.025, .975]) - d.mean()
        return d.mean(), d.mean() + factor*low, d.mean() + factor*high
    return found

def numpy_equal(ca, a, cb, b):
    place = min(max(ca), max(cb))
    return np.interp(place, ca, a) - np.interp(place, cb, b)

def chain(mixed=lambda e, f, share: f + share*(e - f), share=lambda lam, m: lam*m + 1 - m):
    def blended(noise_of, z, timesteps, schedule, lam, mask, picture, edited):
        steps = [*timesteps.tolist(), -1]
        for t, t_prev in zip(steps, steps[1:]):
            a, b = schedule.at(t), schedule.at(t_prev)
            eps = mixed(noise_of(z, t, picture), noise_of(z, t, edited), share(lam, mask))
            z = b**.5*(z - (1 - a)**.5*eps)/a**.5 + (1 - b)**.5*eps
        return z
    return blended

def over_time(image, background, mask, shift, n_frames):
    times = torch.linspace(0, 1, n_frames)
    clip = background[None].repeat(n_frames, 1, 1, 1)
    for frame, time in zip(clip, times):
        x, y = (int(torch.round(time*s)) for s in shift)
        inside = mask.roll((y, x), (0, 1)).bool()
        frame[:, inside] = image.roll((y, x), (1, 2))[:, inside]
    return clip

def padded(image, background, mask, shift, n_frames):
    frames = []
    for i in range(n_frames):
        x, y = round(shift[0]*i/(n_frames - 1)), round(shift[1]*i/(n_frames - 1))
        m = torch.roll(mask, (y, x), (0, 1))
        frames.append(torch.where(m > .5, torch.roll(image, (y, x), (1, 2)), background))
    return frames

def audit(empty=True):
    def rows(loss_of, parameters, changes):
        def gradient(**change):
            if empty:
                for p in parameters: p.grad = None
            loss_of(**change).backward()
            return torch.cat([p.grad.flatten() for p in parameters])
        plain = gradient().clone()
        found = [gradient(**change).clone() for change in changes]
        return torch.stack([torch.stack([g @ plain/(g.norm()*plain.norm()), g.norm()/plain.norm()]) for g in found])
    return rows

def by_autograd(loss_of, parameters, changes):
    def flat(**change): return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_of(**change), parameters)])
    plain = flat()
    both = [(F.cosine_similarity(flat(**c), plain, dim=0), flat(**c).norm()/plain.norm()) for c in changes]
    return [torch.tensor(pair) for pair in both]

RIGHT = {
    "best_policy": [lambda p, r, b: F.normalize(p*(r/b).exp(), p=1, dim=0),
                    lambda p, r, b: (p.log() + r/b - torch.logsumexp(p.log() + r/b, 0)).exp()],
    "dpo_update": [written(), by_hand],
    "online_dpo": [online(), lambda *args: torch.stack(online()(*args))],
    "equal_compute": [numpy_equal, lambda ca, a, cb, b: -numpy_equal(cb, b, ca, a)],
    "two_way_interval": [interval(), lambda *args: torch.tensor(interval()(*args))],
    "claim_verdict": [lambda i, m, s, n: (s >= n)*(-1 if min(b for _, b in i) < m else int(min(a for a, _ in i) > m)),
                lambda i, m, s, n: torch.tensor(0 if s < n else -1 if any(m > b for _, b in i)
                                                else int(all(m < a for a, _ in i)))],
    "blended_chain": [chain(), chain(mixed=lambda e, f, share: torch.lerp(f, e, share.expand_as(e)))],
    "align": [lambda v, x, conv: conv(F.silu(F.group_norm(v - x[None], 1))),
              lambda v, x, conv: torch.cat([conv(F.silu(F.layer_norm(f - x, f.shape)[None])) for f in v])],
    "crude_clip": [over_time, padded],
    "gradient_audit": [audit(), by_autograd],
}
WRONG = {  # as a learner would write it, and words of the verdict
    "best_policy": [(lambda p, r, b: (r/b).softmax(0), "reference is missing"),
                    (lambda p, r, b: (p.log() + r*b).softmax(0), "divide the reward")],
    "dpo_update": [(written(empty=False), "zero_grad"),
                   (written(loss=lambda e, r, b: F.softplus(b/2*(e[:4] - e[4:])).mean()), "reference does nothing"),
                   (written(loss=lambda e, r, b: F.softplus(b*((e - r)[:4] - (e - r)[4:])).mean()), "beta / 2")],
    "online_dpo": [(online(start=lambda model: model), "deepcopy"), (online(spread="all"), "repeat_interleave"),
                   (online(ties=True), "no pairs")],
    "equal_compute": [(lambda ca, a, cb, b: a[-1] - b[-1], "two ends"),
                      (lambda ca, a, cb, b: numpy_equal(cb, b, ca, a), "other way round")],
    "two_way_interval": [(interval(wide=False), "not widened"), (interval(both=False), "only captions")],
    "claim_verdict": [(lambda i, m, s, n: 1 if all(a > m for a, _ in i) else -(min(b for _, b in i) < m), "few"),
                      (lambda i, m, s, n: 0 if s < n else 1 if all(a > m for a, _ in i) else -1, "cannot tell")],
    "blended_chain": [(chain(mixed=lambda e, f, share: e + share*(f - e)), "lambda = 1 leaves"),
                      (chain(share=lambda lam, m: lam*m), "1 there, not 0")],
    "align": [(lambda v, x, conv: v + conv(F.silu(F.group_norm(v - x, 1))), "adds the frame back"),
              (lambda v, x, conv: conv(F.relu(F.group_norm(v - x, 1))), "ReLU")],
    "crude_clip": [(lambda im, bg, m, s, n: padded(im, im, m, s, n), "old place"),
                   (lambda im, bg, m, s, n: padded(im, bg, m, s[::-1], n), "swapped")],
    "gradient_audit": [(audit(empty=False), "add up"),
                       (lambda f, p, c: audit()(f, p, c)*torch.tensor([1., 0]) + torch.cat(
                           [torch.zeros(len(c), 1), 1/audit()(f, p, c)[:, 1:]], 1), "upside down")],
}

LISTED = [check.BEST_POLICY, check.DPO_UPDATE, check.ONLINE_DPO, check.EQUAL_COMPUTE, check.SEED_INTERVAL,
          check.VERDICT, check.BLENDED_CHAIN, check.ALIGN, check.CRUDE_CLIP, check.AUDIT] # in the order of RIGHT

TABLES = dict(zip(RIGHT, LISTED))
globals().update(asked_of(check, RIGHT, WRONG, TABLES, stubs=(lambda *args: ..., ...)))


def test_no_two_rooms_have_a_check_of_the_same_name():
    "Checks are found by name alone, so a second one of a name would never be reached."
    import ast
    from pathlib import Path
    found = []
    for path in (Path(__file__).parents[1]/"instructvideo_kit/check").glob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        found += [node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert sorted(found) == sorted(set(found))
