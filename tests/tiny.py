"Pipeline directories small enough for tests: the classes of ModelScope's text-to-video pipeline with random weights."
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = "a an the cat dog horse fish bird red blue runs swims flies left right in on sea field night".split()
SIZE, N_FRAMES, MAX_TOKENS = 16, 8, 12 # pixels, frames, tokens with start and end


def byte_characters():
    "CLIP's printable stand-in for each of the 256 bytes."
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in own] + [chr(256 + i) for i in range(256 - len(own))]


def tiny_tokenizer(folder, words=WORDS, max_tokens=MAX_TOKENS):
    "CLIPTokenizer in `folder`: each of `words` is one token, everything else falls back to single characters."
    vocab, merges = [c + end for end in ("", "</w>") for c in byte_characters()], []
    for word in words:
        left = word[0]
        for i, c in enumerate(word[1:], 1):
            right = c + "</w>" * (i == len(word) - 1)
            if (left, right) not in merges: merges.append((left, right))
            left += right
            if left not in vocab: vocab.append(left)
    vocab = {token: i for i, token in enumerate([*vocab, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)
    tokenizer.save_pretrained(folder)
    return len(vocab)


def tiny_vae(kind, patch=4, channels=4):
    "AutoencoderKL or PatchAutoencoder with the same latent shape, 4 x 4 x 4 for 16 x 16 pixels."
    if kind == "patch":
        from instructvideo_kit.policy.patch_autoencoder import PatchAutoencoder
        return PatchAutoencoder.fit(torch.rand(64, 3, SIZE, SIZE), patch, channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(4, 8, 8),
        layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=SIZE)


def tiny_pipeline(folder, prediction_type="epsilon", vae="kl", n_frames=N_FRAMES, seed=0):
    "Write a pipeline with random weights: 8 frames of 16x16, latents 4x8x4x4, 12 tokens, guidance 3. Its path."
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet3DConditionModel(
            sample_size=SIZE // 4, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4, cross_attention_dim=16, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"))
        n_vocab = tiny_tokenizer(folder / "tokenizer")
        text_encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=n_vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS, bos_token_id=n_vocab - 2, eos_token_id=n_vocab - 1,
            pad_token_id=n_vocab - 1))
        autoencoder = tiny_vae(vae)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type)
    parts = {"unet": unet, "vae": autoencoder, "text_encoder": text_encoder, "scheduler": scheduler}
    for name, part in parts.items(): part.save_pretrained(folder / name)
    index = {"_class_name": "TextToVideoSDPipeline", "_diffusers_version": "0.35.0",
             "tokenizer": ["transformers", "CLIPTokenizer"]}
    for name, part in parts.items():
        module = type(part).__module__
        index[name] = [module if module.startswith("instructvideo_kit") else module.split(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "kit.json").write_text(json.dumps({"name": "tiny", "n_frames": n_frames, "guidance_scale": 3.0}))
    return folder


def tiny_reward(folder, seed=0):
    "Write a CLIPModel directory with random weights: 12 x 12 pixels, 12 text tokens. Returns its path."
    from transformers import CLIPConfig, CLIPModel
    n_vocab = tiny_tokenizer(folder)
    common = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=n_vocab, max_position_embeddings=MAX_TOKENS, bos_token_id=n_vocab - 2,
                eos_token_id=n_vocab - 1, pad_token_id=n_vocab - 1, **common)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=dict(image_size=12, patch_size=6, **common),
                                     projection_dim=8))
    model.save_pretrained(folder)
    return Path(folder)


def tiny_preset(home, batch=1):
    "Write home/preset.yaml: two steps with home/policy and home/reward. Returns its path."
    lines = [f"policy: {home}/policy", f"reward: {home}/reward", "steps: 2 # few", f"batch: {batch}", "n_ddim: 5",
             "tau: 0.6 # Fig. 5b",
             "guidance_scale: 3.0", "rank: 2", "lr: 1e-2", "save_every: 1", "clamp: straight"]
    (Path(home)/"preset.yaml").write_text("\n".join(lines) + "\n")
    return Path(home)/"preset.yaml"
