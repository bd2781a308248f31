"The cost floor: merged adapters, block-wise recomputation, caches, memory computed from shapes."
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from instructvideo_kit.diffusion.sampling import denoise
from instructvideo_kit.diffusion.schedule import ddim_timesteps
from instructvideo_kit.diffusion.truncation import saved_bytes
from instructvideo_kit.files import KitError
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.lora import add_lora, disabled_lora, lora_parameters, merged_lora
from instructvideo_kit.policy.recompute import recomputed, units
from instructvideo_kit.reward.clip import ClipReward
from instructvideo_kit.tuning.algorithm import tune
from instructvideo_kit.tuning.cache import DiskCache
from instructvideo_kit.tuning.instructvideo import InstructVideo, InstructVideoConfig, edit
from instructvideo_kit.tuning.memory import (
    MEMORY_PRESETS,
    check_memory,
    measured_peak,
    step_memory,
    with_memory_preset,
)

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_pipeline, tiny_reward  # noqa: E402

CONFIG = InstructVideoConfig(n_ddim=5, tau=.6, grad_steps=1, batch=2, rank=2, steps=2, n_segments=2)
PROMPTS = ["a red cat", "a blue dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tiny_pipeline(tmp_path_factory.mktemp("cost") / "policy")


@pytest.fixture
def policy(folder):
    policy = VideoPolicy.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    for name, p in policy.network.named_parameters(): # diffusers starts these at zero
        if "temp_conv" in name and "conv4" in name: p.data = .1 * torch.randn(p.shape, generator=generator)
    return policy


def tuned(policy, rank=2):
    add_lora(policy, rank)
    generator = torch.Generator().manual_seed(1)
    for p in lora_parameters(policy): p.data = .05 * torch.randn(p.shape, generator=generator)
    return policy


def edited(policy, **options):
    g = torch.Generator().manual_seed(2)
    z, eps = (torch.randn(2, *policy.latent_shape, generator=g) for _ in range(2))
    z_0 = edit(policy, z, eps, PROMPTS, replace(CONFIG, **options))
    return z_0.detach(), torch.cat([x.flatten() for x in torch.autograd.grad(z_0.square().mean(),
        lora_parameters(policy))])


@pytest.mark.parametrize("options", [dict(merge_lora=True), dict(checkpoint_blocks=True), dict(checkpoint=True),
                                     dict(merge_lora=True, checkpoint_blocks=True, grad_steps=2)])
def test_cheaper_is_the_same(policy, options):
    tuned(policy)
    plain = edited(policy, **{"merge_lora": False, "grad_steps": options.get("grad_steps", 1)})
    cheap = edited(policy, **{"merge_lora": False, **options})
    for a, b in zip(plain, cheap): assert (a - b).norm() / a.norm() < 1e-5
    with disabled_lora(policy): base = edited_base(policy)
    assert (plain[0] - base).norm() / base.norm() > 1e-3 # the adapters do something, so forgetting them would show


def edited_base(policy):
    g = torch.Generator().manual_seed(2)
    z, eps = (torch.randn(2, *policy.latent_shape, generator=g) for _ in range(2))
    with torch.no_grad(): return edit(policy, z, eps, PROMPTS, replace(CONFIG, merge_lora=False))


def test_matrices_come_back_bit_for_bit_even_after_an_error(policy):
    tuned(policy)
    before = [p.detach().clone() for p in policy.network.parameters()]
    with pytest.raises(RuntimeError, match="on purpose"):
        with merged_lora(policy):
            assert any(not torch.equal(a, b) for a, b in zip(before, policy.network.parameters()))
            raise RuntimeError("on purpose")
    assert all(torch.equal(a, b) for a, b in zip(before, policy.network.parameters()))
    assert len(lora_parameters(policy)) > 0


def test_nothing_is_left_of_recomputation(policy):
    tuned(policy)
    with pytest.raises(RuntimeError, match="on purpose"):
        with recomputed(policy): raise RuntimeError("on purpose")
    assert units(policy.network) and not any("forward" in vars(m) for m in units(policy.network))


@pytest.mark.parametrize("grad_steps, inside", [(0, 3), (1, 2), (3, 0)])
def test_the_free_context_holds_the_steps_without_gradient_and_no_others(policy, grad_steps, inside):
    open_now, seen = [], []
    @contextmanager
    def free():
        open_now.append(1)
        yield
        open_now.pop()
    def model(z, t):
        seen.append((bool(open_now), torch.is_grad_enabled()))
        return z * .1
    denoise(model, torch.ones(1, 1, 1, 1, 1, requires_grad=True), ddim_timesteps(5, 1000, .6), policy.schedule,
            grad_steps, free=free)
    assert seen == [(True, False)] * inside + [(False, True)] * grad_steps


def test_two_levels_of_recomputation_are_refused():
    with pytest.raises(KitError, match="both on, expected one"):
        InstructVideoConfig(checkpoint=True, checkpoint_blocks=True)
    assert InstructVideo.step_cost(replace(CONFIG, checkpoint_blocks=True)) == InstructVideo.step_cost(CONFIG) + 2


def redness(frames, prompts): return (frames[:, :, 0] - frames[:, :, 1:].mean(2)).tanh().mean((-1, -2))


def test_a_resumed_run_encodes_no_clip_and_no_text_again(folder, tmp_path):
    policy = VideoPolicy.from_pretrained(folder)
    clips = [(torch.rand(policy.n_frames, 3, *policy.size, generator=torch.Generator().manual_seed(i)),
              f"a {w} cat") for i, w in enumerate(("red", "blue"))]
    tune("instructvideo", policy, redness, clips, replace(CONFIG, steps=4, save_every=2), tmp_path / "run",
         stop_after=2, progress=False)
    again = VideoPolicy.from_pretrained(folder)
    def refuse(*_): raise AssertionError("computed twice")
    again.encode, again.read_text = refuse, refuse
    done = tune("instructvideo", again, redness, clips, replace(CONFIG, steps=4, save_every=2), tmp_path / "run",
                resume=True, progress=False)
    assert done.finished and len(done.rows()) == 4


def test_a_cache_in_memory_asks_once_and_a_damaged_file_is_made_anew(tmp_path):
    calls, make = [], lambda: calls.append(1) or torch.ones(2)
    memory, disk = DiskCache(), DiskCache(tmp_path / "c")
    for cache in (memory, memory, disk, disk, DiskCache(tmp_path / "c")): cache("x", make)
    assert len(calls) == 2 and len(list((tmp_path / "c").iterdir())) == 1
    disk.path("x").write_bytes(disk.path("x").read_bytes()[:20])
    assert torch.equal(DiskCache(tmp_path / "c")("x", make), torch.ones(2)) and len(calls) == 3


# memory from shapes

def test_saved_bytes_by_hand():
    a = torch.randn(5, 7, requires_grad=True)
    assert saved_bytes(lambda: a.exp(), [a]) == 4 * 35 # its result
    assert saved_bytes(lambda: (a.exp().view(-1) * 2.).sum(), [a]) == 4 * 35 # a view is the same storage
    assert saved_bytes(lambda: a + 1, [a]) == 0


def test_shapes_and_numbers_keep_the_same(policy):
    shapes = step_memory(policy, redness, replace(CONFIG, guidance_scale=3.))["network"]
    tuned(policy)
    g = torch.Generator().manual_seed(2)
    z, eps = (torch.randn(2, *policy.latent_shape, generator=g) for _ in range(2))
    numbers = saved_bytes(lambda: edit(policy, z, eps, PROMPTS, replace(CONFIG, tau=.2, guidance_scale=3.)),
                          policy.network.parameters()) / 2 ** 20
    assert shapes == pytest.approx(numbers, rel=.15)


@pytest.mark.parametrize("options", [dict(), dict(checkpoint_blocks=True), dict(batched_cfg=False), dict(batch=8)])
def test_a_step_takes_what_was_computed(folder, tmp_path, options):
    "Every tensor of a whole step counted on the CPU, against shapes alone. A factor of 1.5 at most either way."
    policy = VideoPolicy.from_pretrained(folder)
    judge = ClipReward.from_pretrained(tiny_reward(tmp_path / "reward"))
    clips = [(torch.rand(policy.n_frames, 3, *policy.size), p) for p in PROMPTS]
    config = replace(CONFIG, **dict(batch=4, steps=1, guidance_scale=3.) | options)
    policy.embed([*PROMPTS, ""])
    computed = step_memory(policy, judge, config)
    def one(): tune("instructvideo", policy, judge, clips, config, tmp_path / "run", progress=False)
    factor = measured_peak(one) / (computed["peak"] - computed["weights"])
    print(f"{options}: measured {factor:.2f} times what was computed")
    assert 1 / 1.5 < factor < 1.5


def test_what_memory_grows_with(policy, tmp_path):
    reward = ClipReward.from_pretrained(tiny_reward(tmp_path / "reward"))
    one, two = (step_memory(policy, reward, replace(CONFIG, batch=b)) for b in (2, 4))
    assert two["network"] / one["network"] == pytest.approx(2, rel=.1) and two["weights"] == one["weights"]
    assert step_memory(policy, reward, replace(CONFIG, n_ddim=50))["network"] == one["network"] # flat in D
    assert step_memory(policy, reward, replace(CONFIG, frames_at_once=1))["judge"] < one["judge"]
    assert step_memory(policy, reward, replace(CONFIG, checkpoint_blocks=True))["network"] < one["network"]
    assert step_memory(policy, redness, CONFIG)["weights"] < one["weights"] # a plain function has none that we know of
    assert not getattr(policy.network, "peft_config", None) # the policy itself is as it was


def test_too_little_memory_is_said_before_anything_starts(policy):
    needs = step_memory(policy, redness, CONFIG)
    assert check_memory(policy, redness, CONFIG, available=1e6)["peak"] == needs["peak"]
    with pytest.raises(KitError, match=r"takes about .* GB beside the weights, .* free: no preset fits"):
        check_memory(policy, redness, CONFIG, available=0.)


def test_memory_presets_are_for_a_batch_of_8_and_unknown_ones_name_the_near():
    for name in MEMORY_PRESETS: assert 8 % with_memory_preset(InstructVideoConfig(), name).grad_accum == 0
    with pytest.raises(KitError, match="a100-40gb"): with_memory_preset(InstructVideoConfig(), "a100-4gb")


# that it computes the same takes two minutes to trace
def test_the_network_is_compiled_when_asked_for(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: asked.append(type(self).__name__))
    fresh = VideoPolicy.from_pretrained(folder)
    clips = [(torch.rand(fresh.n_frames, 3, *fresh.size), "a red cat")] * 2
    tune("instructvideo", fresh, redness, clips, replace(CONFIG, steps=1, compile=True), tmp_path / "run",
         progress=False)
    assert asked == ["UNet3DConditionModel"]


def test_texts_of_policy_and_reward_do_not_mix_though_both_have_one_name(folder, tmp_path):
    from instructvideo_kit.tuning.cache import cache_texts
    policy, reward = VideoPolicy.from_pretrained(folder), ClipReward.from_pretrained(tiny_reward(tmp_path / "reward"))
    policy.name = reward.name = "tiny"
    want = policy.embed(PROMPTS).clone(), reward.text_features(PROMPTS).clone()
    for _ in range(2): # made, then read
        again, judge = VideoPolicy.from_pretrained(folder), ClipReward.from_pretrained(tmp_path / "reward")
        again.name = judge.name = "tiny"
        cache_texts(DiskCache(tmp_path / "cache"), again, judge, PROMPTS)
        assert torch.allclose(again.embed(PROMPTS), want[0], atol=1e-6) and torch.allclose(judge.text_features(PROMPTS),
            want[1], atol=1e-6)
