"The long exercises of tutorials 07 to 09: right answers pass however written, wrong ones are rejected and named."
import torch
from exercises import asked_of

from instructvideo_kit.check import tuning as check
from instructvideo_kit.diffusion.sampling import denoise
from instructvideo_kit.diffusion.schedule import corrupt
from instructvideo_kit.tuning.gradient import objective
from instructvideo_kit.tuning.instructvideo import InstructVideoConfig


def frame_by_frame(judge, clips, captions, n_segments, lam, draws, centre=lambda n: n//2):
    "One frame at a time, without a graph over the clip."
    b, n = clips.shape[:2]
    R, pull = torch.zeros(b), torch.zeros(b, n)
    for u in draws:
        for k in range(b):
            for i in range(n_segments):
                first, after = i*n//n_segments, (i + 1)*n//n_segments
                at = first + int(u[k, i]*(after - first))
                frame = clips[k:k + 1, at:at + 1].clone().requires_grad_()
                weight = 2.718281828**(-lam*abs(at - centre(n)))/n_segments/len(draws)
                said = weight*judge(frame, captions[k:k + 1]).sum()
                R[k] += said.detach()
                pull[k, at] += torch.autograd.grad(said, frame)[0].abs().mean()
    return R, pull

def one_draw_after_another(judge, clips, captions, n_segments, lam, draws):
    rewards, pulls = [], []
    for u in draws:
        R, pull = check._pull()(judge, clips, captions, n_segments, lam, u[None])
        rewards.append(R)
        pulls.append(pull)
    return torch.stack(rewards).mean(0), torch.stack(pulls).mean(0)

def with_kept_states(a, b, W, starts, target, grad_steps, rate):
    n = len(a)
    for z in starts:
        kept = []
        for i in range(n):
            if i >= n - grad_steps: kept.append(z)
            z = a[i]*z + b[i]*torch.einsum("oi,bi->bo", W, z)
        back, total = (z - target)/len(z), 0.
        for i in range(n - 1, n - grad_steps - 1, -1):
            total = total + b[i]*torch.einsum("bo,bi->oi", back, kept.pop())
            back = back @ (a[i]*torch.eye(len(W)) + b[i]*W)
        W = W - rate*total/total.square().sum().sqrt()
    return W

def with_the_kit(policy, judge, clips, captions, eps, g, optimizer, config):
    steps = policy.schedule.timesteps(config.n_ddim, config.tau)
    z = corrupt(policy.encode(clips).detach(), eps, policy.schedule.at(steps[0]))
    model = policy.denoiser(captions, config.guidance_scale)
    z_0 = denoise(model, z, steps, policy.schedule, grad_steps=config.grad_steps)
    scores = judge(policy.decode(z_0, g).clamp(0, 1), captions)
    loss, R = objective(scores, g, policy.n_frames, InstructVideoConfig(lam_tar=config.lam_tar))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return R.mean().item()

def one_minus_r(*given): return check._step(loss_of=lambda R: 1 - R.mean())(*given) # the released code's loss

def by_lists(before, after):
    change = [float((y - x).mean()) for x, y in zip(before, after)]
    n, mean = len(change), sum(change)/len(change)
    error = (sum((c - mean)**2 for c in change)/(n - 1)/n)**.5
    return mean, mean - 1.96*error, mean + 1.96*error

def of_means(before, after):
    change = after.mean(1) - before.mean(1)
    half = 1.96*(change.var()/len(change)).sqrt()
    return [change.mean(), change.mean() - half, change.mean() + half]

RIGHT = {
    "frame_pull": [frame_by_frame, one_draw_after_another],
    "linear_tuning": [with_kept_states, check._by_hand()],
    "instructvideo_step": [with_the_kit, one_minus_r],
    "paired_interval": [by_lists, of_means],
}
def forgetful(policy, judge, clips, captions, eps, g, optimizer, config):
    optimizer.zero_grad = lambda: None
    return with_the_kit(policy, judge, clips, captions, eps, g, optimizer, config)

WRONG = { # as a learner would write it, and words of the verdict
    "frame_pull": [
        (lambda *given: frame_by_frame(*given, centre=lambda n: (n - 1)/2), "true middle"),
        (lambda j, x, c, S, lam, u: one_draw_after_another(j, x, c, S, 0., u), "weights do nothing"),
        (lambda *given: check._pull(size=lambda d, n: d.abs().mean((2, 3, 4)))(*given), "sum over the draws"),
    ],
    "linear_tuning": [
        (lambda a, b, W, s, t, k, rate: with_kept_states(a, b, W, s, t, len(a), rate), "all n steps"),
        (lambda a, b, W, s, t, k, rate: with_kept_states(a, b, W, s, t, k, -rate), "a sign"),
        (lambda a, b, W, s, t, k, rate: W, "expected"),
    ],
    "instructvideo_step": [
        (forgetful, "zero_grad"),
        (lambda *given: -with_the_kit(*given), "returns the loss"),
        (lambda *given: check._step(noisy=lambda z, e, a: e)(*given), "DRaFT"),
    ],
    "paired_interval": [
        (lambda x, y: of_means(y, x), "a sign"),
        (lambda x, y: of_means(x.flatten()[:, None], y.flatten()[:, None]), "average each caption first"),
        (lambda x, y: ((y - x).mean(), 0., 1.), "expected"),
    ],
}
TABLES = dict(frame_pull=check.FRAME_PULL, linear_tuning=check.LINEAR_TUNING,
              instructvideo_step=check.INSTRUCTVIDEO_STEP, paired_interval=check.PAIRED_INTERVAL)

globals().update(asked_of(check, RIGHT, WRONG, TABLES, stubs=(lambda *args: ..., lambda *args: None, None)))
