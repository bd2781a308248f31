"Small pipelines with random weights, of the classes of ModelScopeT2V, CogVideoX, Wan 2.1, Stable Video Diffusion."
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from tiny import WORDS, tiny_pipeline
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

CLIP_PIXELS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
               "image_processor_type": "CLIPImageProcessor"}
COGVIDEOX_SCHEDULER = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                           prediction_type="v_prediction", clip_sample=False,
                           rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing")
WAN_SCHEDULER = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
FIRST_ORDER = dict(solver_order=1, disable_corrector=list(range(1000))) # makes UniPC the plain chain
SVD_SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
                     use_karras_sigmas=True, sigma_min=0.002,
                     sigma_max=700.0, timestep_type="continuous", timestep_spacing="leading", steps_offset=1)


def t5_tokenizer():
    "A T5Tokenizer with one token per word; other words fall back to letters."
    letters = [(c, -8.0) for c in "abcdefghijklmnopqrstuvwxyz"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0),
             *[("\u2581" + word, -1.0) for word in WORDS], *letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0), len(vocab)


def cogvideox_parts(rotary=False):
    tokenizer, n_vocab = t5_tokenizer()
    return {
        "transformer": CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
            text_embed_dim=16, num_layers=2, sample_width=4,
            sample_height=4, sample_frames=17, max_text_seq_length=12, use_rotary_positional_embeddings=rotary),
        "vae": AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3),
        "text_encoder": T5EncoderModel(T5Config(vocab_size=n_vocab, d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                                num_heads=2)),
        "tokenizer": tokenizer, "scheduler": CogVideoXDDIMScheduler(**COGVIDEOX_SCHEDULER)}


def wan_parts(euler=False):
    tokenizer, n_vocab = t5_tokenizer()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if euler else UniPCMultistepScheduler(**WAN_SCHEDULER)
    return {
        "transformer": WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=8,
            ffn_dim=16, num_layers=2, rope_max_seq_len=32),
        "vae": AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[.1, -.2, .3, 0.],
            latents_std=[2., 1.5, 1., .5]),
        "text_encoder": UMT5EncoderModel(UMT5Config(vocab_size=n_vocab, d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                                    num_heads=2)),
        "tokenizer": tokenizer, "scheduler": scheduler}


class PixelsFile:
    "Writes preprocessor_config.json, all that CLIPImageProcessor would write that matters here."
    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(CLIP_PIXELS))


def svd_parts():
    return {
        "unet": UNetSpatioTemporalConditionModel(
            in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, num_attention_heads=(2, 4),
            cross_attention_dim=16,
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, num_frames=5, sample_size=8,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")),
        "vae": AutoencoderKLTemporalDecoder(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                                            latent_channels=4, layers_per_block=1),
        "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224,
            patch_size=56, projection_dim=16)),
        "feature_extractor": PixelsFile(), "scheduler": EulerDiscreteScheduler(**SVD_SCHEDULER)}


PIPELINES = { # kind -> (diffusers' pipeline, parts, kit.json)
    "cogvideox": ("CogVideoXPipeline", cogvideox_parts, {"guidance_scale": 3.0}),
    "cogvideox-rotary": ("CogVideoXPipeline", lambda: cogvideox_parts(rotary=True), {"guidance_scale": 3.0}),
    "wan": ("WanPipeline", wan_parts, {"guidance_scale": 3.0, "n_frames": 9, "size": [32, 32], "max_tokens": 12}),
    "wan-euler": ("WanPipeline", lambda: wan_parts(euler=True),
                  {"guidance_scale": 3.0, "n_frames": 9, "size": [32, 32], "max_tokens": 12}),
    "svd": ("StableVideoDiffusionPipeline", svd_parts, {"guidance_scale": 3.0, "size": [16, 16]}),
}


def wake(module, seed):
    "Random numbers where a fresh network has zeros (last layers, gates), so that every layer has a say."
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if not p.any(): p.data = .1 * torch.randn(p.shape, generator=generator)


def tiny_policy(folder, kind, seed=0):
    "Write a pipeline directory of one of the PIPELINES, or of ModelScopeT2V (\"modelscope\"). Returns its path."
    if kind == "modelscope": return tiny_pipeline(folder, "epsilon", "kl", seed=seed)
    folder, (pipeline, make, kit) = Path(folder), PIPELINES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = make()
    wake(next(iter(parts.values())), seed)
    for name, part in parts.items(): part.save_pretrained(folder / name)
    index = {"_class_name": pipeline, "_diffusers_version": "0.35.0"}
    for name, part in parts.items():
        known = type(part).__module__.split(".")[0], type(part).__name__
        index[name] = ["transformers", "CLIPImageProcessor"] if name == "feature_extractor" else list(known)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "kit.json").write_text(json.dumps({"name": f"tiny {kind}", **kit}))
    return folder
