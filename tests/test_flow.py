"""The flow policy of the menagerie: it learns, every algorithm tunes it, and both doors open its directory. The
networks are tiny and untrained; what they draw is noise."""
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline

from instructvideo_kit.app import choose_run
from instructvideo_kit.diffusion.prediction import to_rectified
from instructvideo_kit.menagerie.flow import (
    as_flow_policy,
    closed_start,
    flow_loss,
    flow_tokenizer,
    new_flow_reader,
    new_transformer,
    new_wan_autoencoder,
    read_captions,
    save_flow_policy,
)
from instructvideo_kit.menagerie.tokens import token_ids
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.lora import add_lora, lora_parameters
from instructvideo_kit.policy.wan import WanPolicy, looks_back
from instructvideo_kit.tuning.algorithm import find, tune
from instructvideo_kit.tuning.config import algorithms
from instructvideo_kit.tuning.process import make_accelerator
from instructvideo_kit.tuning.stream import positions_of

PROMPTS = ["a fox at night", "a lion in the snow", "a fish swimming to the left"]
FRAMES, SIDE = 4, 32


def redness(frames, prompts): return (frames[:, :, 0] - frames[:, :, 1:].mean(2)).tanh().mean((-1, -2))


def tiny_parts():
    "Transformer (with random numbers where it starts closed) and reader."
    tokenizer = flow_tokenizer()
    transformer = new_transformer(width=16, layers=1, head=8, text_width=16)
    for p in transformer.parameters(): p.data += .1*torch.randn_like(p)
    return dict(transformer=transformer, text_encoder=new_flow_reader(tokenizer, width=16, layers=1)), tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A pipeline directory named menagerie-flow: 4 frames of 32 x 32."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules, tokenizer = tiny_parts()
        vae = new_wan_autoencoder(base=4, mult=(1, 1, 1, 1))
    policy = as_flow_policy(modules, vae, tokenizer, n_frames=FRAMES, size=SIDE)
    return save_flow_policy(policy, tmp_path_factory.mktemp("flow")/"menagerie-flow")


def open_policy(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return VideoPolicy.from_pretrained(folder)


# ---- learning ------------------------------------------------------------------------------------------------------

def test_a_small_network_learns_one_picture():
    torch.manual_seed(0)
    tokenizer = flow_tokenizer()
    modules = dict(transformer=new_transformer(width=32, layers=1, head=16, text_width=16),
                   text_encoder=new_flow_reader(tokenizer, width=16, layers=1))
    z = torch.randn(1, 8, 1, 4, 4).expand(8, -1, -1, -1, -1)
    ids = token_ids(tokenizer, ["a fox at night"]*8)
    optimiser = torch.optim.Adam([p for m in modules.values() for p in m.parameters()], lr=5e-3)
    losses = []
    for step in range(150):
        text = read_captions(modules["text_encoder"], ids)
        loss = flow_loss(modules["transformer"], text, z, torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    start, end = sum(losses[:5])/5, sum(losses[-20:])/20
    assert 1.5 < start < 2.5 # the network begins with nothing to say: noise and picture count one each
    assert end < .5*start


def test_the_reader_learns_too():
    "The caption reaches the flow, and the loss reaches the reader's weights."
    torch.manual_seed(0)
    modules, tokenizer = tiny_parts()
    z, ids = torch.randn(2, 8, 1, 4, 4), token_ids(tokenizer, ["a fox at night", "a lion in the snow"])
    flow_loss(modules["transformer"], read_captions(modules["text_encoder"], ids), z,
              torch.Generator().manual_seed(0)).backward()
    rows = modules["text_encoder"].shared.weight.grad.abs().sum(1)
    assert rows[ids.unique()[1:]].min() > 0 # every word of the captions (0 is padding)
    assert rows[tokenizer.convert_tokens_to_ids("\u2581zebra")] == 0 # no other word


def test_a_closed_network_says_nothing_and_has_a_gradient():
    net = closed_start(new_transformer(width=16, layers=2, head=8, text_width=16))
    z, text = torch.randn(2, 8, 2, 4, 4), torch.randn(2, 5, 16)
    out = net(z, torch.tensor([1., 999.]), text).sample
    assert not out.any()
    (out - z).square().mean().backward()
    assert net.proj_out.weight.grad.norm() > 0


# ---- the policy ----------------------------------------------------------------------------------------------------

def test_the_directory_opens_as_what_it_is(folder):
    policy = open_policy(folder)
    assert type(policy) is WanPolicy and policy.name == "menagerie-flow" and policy.dtype == torch.float32
    assert policy.latent_shape == (8, FRAMES, SIDE//8, SIDE//8) and not looks_back(policy.vae)
    assert policy.schedule.prediction_type == "flow_prediction"


def test_diffusers_own_pipeline_draws_the_same(folder):
    policy, pipe = open_policy(folder), DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__name__ == "WanPipeline"
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, solver_order=1,
                                                      disable_corrector=list(range(1000)))
    noise = policy.noise(range(3), seed=5)
    start = to_rectified(noise, policy.schedule.at(policy.schedule.timesteps(4)[0]))
    # num_frames: the pipeline rounds to 4 k + 1, see the notebook
    theirs = pipe(PROMPTS, num_frames=FRAMES - 1, latents=start, height=SIDE, width=SIDE, num_inference_steps=4,
                  guidance_scale=3., max_sequence_length=16, output_type="pt").frames
    mine = policy.generate(PROMPTS, n_ddim=4, noise=noise, guidance_scale=3.)
    torch.testing.assert_close(theirs, mine, atol=2e-3, rtol=0)


def test_chosen_frames_alone_are_decoded_with_the_gradient_of_the_whole(folder):
    policy = open_policy(folder)
    frames = torch.tensor([[3, 1], [0, 2]])
    z = policy.noise([0, 1]).requires_grad_()
    seen = []
    hook = policy.vae.decoder.register_forward_pre_hook(lambda m, given: seen.append(given[0].shape))
    few = policy.decode(z, frames)
    hook.remove()
    assert [tuple(shape[:3]) for shape in seen] == [(4, 8, 1)] # two frames of two clips, at once
    few.square().sum().backward()
    alone, z.grad = z.grad, None
    whole = (policy.vae.decode(policy.unscaled(z)).sample + 1)/2 # in a row, as diffusers decodes
    picked = torch.stack([whole[b][:, frames[b]].transpose(0, 1) for b in range(2)])
    torch.testing.assert_close(few, picked, atol=1e-5, rtol=0)
    picked.square().sum().backward()
    torch.testing.assert_close(alone, z.grad, atol=1e-4, rtol=1e-3)


def test_clips_are_encoded_frame_by_frame_and_drawn_from_captions(folder):
    policy = open_policy(folder)
    video = policy.generate(PROMPTS, n_ddim=2, guidance_scale=3.)
    assert video.shape == (3, FRAMES, 3, SIDE, SIDE) and video.isfinite().all() and video.std() > 0
    z = policy.encode(video)
    other = video.clone()
    other[:, 0] = 0.
    assert torch.equal(policy.encode(other)[:, :, 1:], z[:, :, 1:]) # the first frame changes no other


# ---- tuning --------------------------------------------------------------------------------------------------------

SMALL = dict(steps=1, batch=2, n_ddim=3, rank=2, grad_accum=1, save_every=1, samples_at_once=4)
# what makes each preset small enough; all else is as shipped for the menagerie
OWN = {"nft": dict(group_size=2, captions_per_round=1, timesteps_per_update=1), "ddpo": dict(min_count=2),
       "grpo": dict(group_size=2, window=1), "refl": dict(stop_from=1, stop_to=2), "rwr": dict(n_samples=2),
       "draft": dict(grad_steps=1), "vader": dict(grad_steps=1), "dpo": dict(n_candidates=2),
       "onlinevpo": dict(n_candidates=2), "instructvideo": dict()}


def small(name, **more):
    "The class of an algorithm and its preset for the menagerie, made small."
    preset = "menagerie" if name == "instructvideo" else f"{name}_menagerie"
    _, config = choose_run(None, preset, {"policy": "menagerie-flow"})
    wanted = {**SMALL, **OWN[name], **more}
    return find(name), replace(config, **{k: v for k, v in wanted.items() if hasattr(config, k)})


def one_step(policy, name, **more):
    "Row of the log and gradient after one step of an algorithm."
    Algorithm, config = small(name, **more)
    add_lora(policy, config.rank)
    for i, p in enumerate(lora_parameters(policy)): # a LoRA that does something
        p.data = .1*torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    clips = Algorithm.wants(config) == "clips"
    data = list(zip(policy.generate(PROMPTS, n_ddim=1), PROMPTS)) if clips else PROMPTS
    made = Algorithm(policy, redness, data, config, make_accelerator(config, "cpu"))
    row = made.step(positions_of(0, 0, 0, 1, config))
    return row, torch.cat([p.grad.flatten() for p in lora_parameters(policy)])


def test_every_algorithm_of_a_menagerie_preset_is_tried(): assert set(OWN) == set(algorithms())


@pytest.mark.parametrize("name", OWN)
def test_the_presets_of_the_menagerie_tune_it(folder, name):
    row, gradient = one_step(open_policy(folder), name)
    assert gradient.isfinite().all() and gradient.norm() > 0


@pytest.mark.parametrize("sde", ["flow_grpo", "dance_grpo", "cps"])
def test_grpo_takes_each_step_made_for_flows(folder, sde):
    row, gradient = one_step(open_policy(folder), "grpo", sde=sde)
    assert gradient.isfinite().all() and gradient.norm() > 0
    assert row["ratio_off"] < 1e-4 # drawn and judged with the same density


def test_a_run_through_the_door(folder, tmp_path):
    _, config = small("onlinevpo")
    result = tune("onlinevpo", open_policy(folder), redness, PROMPTS, config, tmp_path, progress=False)
    assert len(result.rows()) == 1 and (result.lora/"pytorch_lora_weights.safetensors").exists()
