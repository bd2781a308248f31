"A judge that reads latents: nothing is decoded for it, it is taught by an image judge, and it refuses strangers."
import sys
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from instructvideo_kit.files import KitError
from instructvideo_kit.reward.base import judges_clips
from instructvideo_kit.reward.clip import ClipReward
from instructvideo_kit.reward.latent import LatentReward, agreement, distil, latent_frames, make_lesson, reads_latents
from instructvideo_kit.tuning.algorithm import tune
from instructvideo_kit.tuning.draft import DraftConfig
from instructvideo_kit.tuning.gradient import score, shown
from instructvideo_kit.tuning.online_dpo import OnlineDPOConfig
from instructvideo_kit.tuning.refl import ReflConfig

sys.path.insert(0, str(Path(__file__).parent))
from test_algorithms import open_policy  # noqa: E402
from tiny import tiny_pipeline, tiny_reward  # noqa: E402

PROMPTS = ["a red cat", "a blue fish", "a dog runs"]
DRAWN = dict(n_ddim=3, guidance_scale=1., batch=2, rank=2, lr=1e-2, steps=2, save_every=2)
REFL = ReflConfig(**DRAWN, clamp="straight", grad_accum=1, stop_from=1, stop_to=2)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("latent")
    tiny_pipeline(home/"policy", prediction_type="v_prediction", vae="patch")
    tiny_reward(home/"reward")
    return home


@pytest.fixture(scope="module")
def judge(home): return ClipReward.from_pretrained(home/"reward")


@pytest.fixture
def policy(home): return open_policy(home/"policy")


def student_of(judge, channels=4, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LatentReward(judge, channels, 8)


def clips(policy, n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *policy.latent_shape, generator=generator), [PROMPTS[i % 3] for i in range(n)]


def test_it_agrees_on_clips_it_was_not_taught(policy, judge):
    taught, unseen = (make_lesson(policy, judge, *clips(policy, n, seed)) for n, seed in ((48, 0), (24, 1)))
    student = student_of(judge)
    before = agreement(student, unseen)["frames"]
    losses = distil(student, taught, 150, lr=5e-3)
    after = agreement(student, unseen)["frames"]
    print(f"correlation on held-out frames: {before:.2f} before, {after:.2f} after")
    assert sum(losses[-10:]) < .7*sum(losses[:10]) and after > max(before, .3)
    assert not any(p.requires_grad for p in student.parameters()) and not student.training


def test_two_lessons_with_one_seed_are_the_same(policy, judge):
    lesson = make_lesson(policy, judge, *clips(policy, 6, 0))
    assert distil(student_of(judge), lesson, 5) == distil(student_of(judge), lesson, 5)


def test_the_lesson_is_what_the_judge_says_of_decoded_frames(policy, judge):
    z, words = clips(policy, 3, 2)
    lesson = make_lesson(policy, judge, z, words, batch=2)
    with torch.no_grad(): whole = judge(policy.decode(z).clamp(0, 1), words)
    assert torch.allclose(lesson["scores"], whole, atol=1e-5) # as many latent frames as frames
    assert torch.equal(lesson["latents"][1, 2], z[1, :, 2])
    with pytest.raises(ValueError, match="2 captions for 3 clips"): make_lesson(policy, judge, z, words[:2])


def decodes(policy, config, algorithm, reward, where):
    "How many frames a run decodes."
    count, decode = [], policy.vae.decode
    def counting(z, *args, **kwargs):
        count.append(len(z))
        return decode(z, *args, **kwargs)
    policy.vae.decode = counting
    result = tune(algorithm, policy, reward, PROMPTS, config, where, progress=False)
    return sum(count), result.rows()


@pytest.mark.parametrize("algorithm, config", [
    ("refl", REFL), ("draft", DraftConfig(**DRAWN, clamp="straight")),
    ("vader", DraftConfig(**DRAWN, clamp="straight", truncation="random", n_segments=2)),
], ids=["refl", "draft", "vader"])
def test_gradient_methods_decode_nothing(home, judge, tmp_path, algorithm, config):
    pixels, _ = decodes(open_policy(home/"policy"), config, algorithm, judge, tmp_path/"pixels")
    latent, rows = decodes(open_policy(home/"policy"), config, algorithm, student_of(judge), tmp_path/"latent")
    assert pixels == config.batch*config.steps*config.n_segments and latent == 0
    assert all(r["grad_norm"] > 0 for r in rows)


def test_sampled_methods_can_ask_it_too(home, judge, tmp_path):
    config = OnlineDPOConfig(**DRAWN, n_candidates=2)
    found, rows = decodes(open_policy(home/"policy"), config, "onlinevpo", student_of(judge), tmp_path/"run")
    assert found == 0 and all(r["reward_std"] > 0 for r in rows)


def test_its_gradient_is_that_of_finite_differences(policy, judge):
    student, g = student_of(deepcopy(judge)).double(), torch.tensor([[0, 5]])
    z = torch.randn(1, *policy.latent_shape, dtype=torch.float64, requires_grad=True)
    def value(z): return score(policy, student, z, g, PROMPTS[:1], REFL).sum()
    slope = torch.autograd.grad(value(z), z)[0]
    direction = torch.randn_like(z)
    h = 1e-5
    measured = (value(z + h*direction) - value(z - h*direction))/(2*h)
    assert (slope*direction).sum().item() == pytest.approx(measured.item(), rel=1e-4)
    assert slope[:, :, [0, 5]].abs().sum() > 0 and slope[:, :, 1:5].abs().sum() == 0


def test_saved_and_opened_it_says_the_same(judge, home, tmp_path):
    student = LatentReward(judge, 4, 8, source=str(home/"reward"))
    student.save_pretrained(tmp_path/"student")
    again = ClipReward.from_pretrained(tmp_path/"student")
    x = torch.randn(2, 3, 4, 4, 4)
    assert type(again) is LatentReward
    assert torch.allclose(again(x, PROMPTS[:2]), student(x, PROMPTS[:2]), atol=1e-6)
    assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(KitError, match="holds no latent judge"): LatentReward.from_pretrained(tmp_path)


def test_it_refuses_another_autoencoder_and_judges_without_features(judge):
    with pytest.raises(ValueError, match="another autoencoder"): student_of(judge)(torch.randn(1, 2, 3, 4, 4), ["a"])
    with pytest.raises(ValueError, match="no image_features"): LatentReward(lambda f, p: f, 4)
    with pytest.raises(ValueError, match="0..7"): latent_frames(torch.randn(1, 4, 8, 4, 4), torch.tensor([[8]]), 8)


def test_video_judges_see_one_shift_per_clip_and_image_judges_one_per_frame(policy, judge):
    class Motion:
        dims = ("motion",)
        def per_frame(self, frames, prompts): return frames.mean((2, 3, 4))
    config = replace(REFL, augment_shift=2)
    still = torch.randn(2, *policy.latent_shape)[:, :, :1].expand(-1, -1, policy.n_frames, -1, -1)
    g = torch.arange(policy.n_frames).expand(2, -1)
    def see(reward):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        with warnings.catch_warnings(): return shown(policy, reward, still, g, config, generators)
    calm, jittery = see(Motion().per_frame), see(judge)
    assert judges_clips(Motion().per_frame) and not judges_clips(judge) and not reads_latents(judge)
    assert torch.equal(calm, calm[:, :1].expand_as(calm)) # what stood still stands still
    assert not torch.equal(jittery, jittery[:, :1].expand_as(jittery))
