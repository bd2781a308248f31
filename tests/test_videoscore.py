"""VideoScoreReward: the release's text, frames, pictures and weights; scores that no neighbour moves; gradients;
refusals."""
import hashlib
import json
import os
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from instructvideo_kit.files import KitError
from instructvideo_kit.reward import videoscore as module
from instructvideo_kit.reward.videoscore import (
    CHAT,
    DIMENSIONS,
    PROMPT,
    VIDEO,
    VideoScoreModel,
    VideoScoreQwenModel,
    VideoScoreQwenReward,
    VideoScoreReward,
    idefics_pictures,
    pick_dimension,
    picture_size,
    qwen_patches,
    qwen_size,
    videoscore_config,
    videoscore_frames,
    videoscore_qwen_config,
    videoscore_text,
    write_small_videoscore,
)

CAPTIONS = ["a fox runs on the meadow under the moon", "a snail sleeps"]


def clips(b=2, f=4, h=18, w=26, seed=0): return torch.rand(b, f, 3, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_videoscore(tmp_path_factory.mktemp("videoscore"), words=" ".join(CAPTIONS))


@pytest.fixture(scope="module")
def reward(folder): return VideoScoreReward.from_pretrained(folder)


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    return write_small_videoscore(tmp_path_factory.mktemp("qwen"), words=" ".join(CAPTIONS), family="qwen2_vl")


@pytest.fixture(scope="module")
def qwen(qwen_folder): return VideoScoreReward.from_pretrained(qwen_folder)


@pytest.fixture(params=["idefics2", "qwen2_vl"])
def either(request, reward, qwen): return {"idefics2": reward, "qwen2_vl": qwen}[request.param]


@pytest.fixture()
def copy(folder, tmp_path): # a folder to spoil
    for f in folder.iterdir(): (tmp_path / f.name).write_bytes(f.read_bytes())
    return tmp_path


def released_keys(vision_layers=27, resampler_layers=3, text_layers=32):
    "Names in the release's checkpoint, from the attribute names of its published class; the order does not matter."
    def both(*names):
        return [f"{n}.{p}" for n in names for p in ("weight", "bias")]
    attention = [f"self_attn.{p}_proj" for p in ("q", "k", "v")]
    mlp = [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    bare = [f"{a}.weight" for a in (*attention, "self_attn.o_proj")] + mlp + ["post_attention_layernorm.weight"]
    vision = both("layer_norm1", "layer_norm2", *attention, "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    parts = {
        "model.vision_model.": both("embeddings.patch_embedding", "post_layernorm")
        + ["embeddings.position_embedding.weight"],
        "model.connector.": [k.replace("mlp", "modality_projection") for k in mlp]
        + ["perceiver_resampler.latents", "perceiver_resampler.norm.weight"],
        "model.text_model.": ["embed_tokens.weight", "norm.weight"],
        "score.": ["weight", "bias"],
        **{f"model.vision_model.encoder.layers.{i}.": vision for i in range(vision_layers)},
        **{f"model.connector.perceiver_resampler.layers.{i}.": bare
           + ["input_latents_norm.weight", "input_context_norm.weight"] for i in range(resampler_layers)},
        **{f"model.text_model.layers.{i}.": bare + ["input_layernorm.weight"] for i in range(text_layers)},
    }
    return {stem + name for stem, names in parts.items() for name in names}


def released_qwen_keys(vision_layers=32, text_layers=28):
    """Names in VideoScore-Qwen2-VL's checkpoint: those of transformers 4.45, where visual, model and score stood
    side by side."""
    def both(*names):
        return [f"{n}.{p}" for n in names for p in ("weight", "bias")]
    parts = {"visual.": ["patch_embed.proj.weight", *both("merger.ln_q", "merger.mlp.0", "merger.mlp.2")],
             "model.": ["embed_tokens.weight", "norm.weight"], "": both("score"),
             **{f"visual.blocks.{i}.": both("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
                for i in range(vision_layers)},
             **{f"model.layers.{i}.": both(*(f"self_attn.{p}_proj" for p in "qkv"))
                + [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
                + ["self_attn.o_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"]
                for i in range(text_layers)}}
    return {stem + name for stem, names in parts.items() for name in names}


def test_full_size_qwen_has_the_released_names_and_sizes():
    with torch.device("meta"): model = VideoScoreQwenModel(videoscore_qwen_config())
    renamed = set()
    for key in released_qwen_keys():
        for old, new in module.QWEN_KEYS.items(): key = re.sub(old, new, key)
        renamed.add(key)
    ours = set(model.state_dict())
    assert (sorted(renamed - ours), sorted(ours - renamed)) == ([], [])
    assert len(released_qwen_keys()) == len(renamed) == len(ours) == 731
    count = sum(p.numel() for p in model.parameters())
    assert count == 7_746_396_165 and abs(count * 2 / 1e9 - (4.97 + 4.99 + 4.93 + 0.602)) < 0.02


def test_full_size_has_the_released_names_and_sizes():
    with torch.device("meta"): model = VideoScoreModel(videoscore_config())
    ours = set(model.state_dict())
    assert (sorted(released_keys() - ours), sorted(ours - released_keys())) == ([], [])
    assert len(ours) == 764
    count = sum(p.numel() for p in model.parameters())
    assert count == 8_271_704_309
    # the release's four bf16 files; a word predictor more would be 0.26 off
    assert abs(count * 2 / 1e9 - (4.97 + 4.92 + 5.00 + 1.66)) < 0.02
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes["score.weight"] == (5, 4096) and shapes["model.connector.perceiver_resampler.latents"] == (64, 4096)
    assert shapes["model.vision_model.embeddings.position_embedding.weight"] == (70 * 70, 1152)
    assert shapes["model.text_model.embed_tokens.weight"] == (32003, 4096)


def test_released_files_go_in_and_out(folder, reward, tmp_path):
    weights = load_file(folder / "model.safetensors")
    assert set(weights) == released_keys(2, 1, 2)
    reward.model.save_pretrained(tmp_path, max_shard_size="40KB") # the release is cut in four files with an index
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for f in ("tokenizer.json", "preprocessor_config.json"): (tmp_path / f).write_bytes((folder / f).read_bytes())
    assert torch.equal(VideoScoreReward.from_pretrained(str(tmp_path))(clips(), CAPTIONS), reward(clips(), CAPTIONS))


def test_epsilon_of_older_configurations(copy):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-3
    (copy / "config.json").write_text(json.dumps(config))
    def epsilon():
        return VideoScoreReward.from_pretrained(copy).model.model.connector.perceiver_resampler.norm.variance_epsilon
    assert epsilon() == config["perceiver_config"].pop("rms_norm_eps") != 1e-3 # what the file says
    (copy / "config.json").write_text(json.dumps(config))
    assert epsilon() == 1e-3 # as the release's class, which has only one


def test_pickled_weights_load_without_running_code(copy, reward, monkeypatch):
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin")
    torch.testing.assert_close(VideoScoreReward.from_pretrained(copy)(clips(), CAPTIONS), reward(clips(), CAPTIONS))
    class Boom:
        def __reduce__(self): return os.mkdir, ("code-ran",)
    monkeypatch.chdir(copy)
    torch.save({**state, "score.bias": Boom()}, copy / "pytorch_model.bin")
    with pytest.raises(KitError, match="holds code .*mkdir.*refused"): VideoScoreReward.from_pretrained(copy)
    assert not (copy / "code-ran").exists()


def test_the_question_is_the_releases():
    # of the text in its scripts
    assert (hashlib.sha256(PROMPT.encode()).hexdigest()
            == "49b386d9ea3003760c983cc258cf4211faf858d58191f95fcfacdf68a8fed2c0")
    text = videoscore_text('a {strange} "fox"', 3, 2)
    pictures = "<fake_token_around_image><image><image><fake_token_around_image> " * 3
    assert text == PROMPT.format(text_prompt='a {strange} "fox"') + pictures
    for token in ("<image>", "<fake_token_around_image>"):
        with pytest.raises(ValueError, match=f"{token}.*take it out"): videoscore_text(f"a fox {token}", 1)


def test_places_and_pictures_as_transformers_own_processor_and_model(reward):
    from transformers import PreTrainedTokenizerFast
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(reward.tokenizer.to_str()),
                                        unk_token="<unk>", pad_token="</s>")
    pictures = Idefics2ImageProcessorPil(size=dict(shortest_edge=16, longest_edge=40), image_mean=[0.5] * 3,
                                         image_std=[0.5] * 3)
    levels = torch.randint(256, (3, 3, 18, 26), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processed = pictures([list(levels.numpy())], return_tensors="pt")
    text = PROMPT.format(text_prompt=CAPTIONS[0])
    text += "<image> " * 3 # the release's way
    fake = "<fake_token_around_image>"
    tokens = tokenizer(text.replace("<image>", fake + "<image>" * 3 + fake), return_tensors="pt")
    ids, mask = reward.tokens(CAPTIONS[:1], 3, 3)
    assert torch.equal(ids, tokens.input_ids) and mask.all()
    hidden = reward.model.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                                **processed).last_hidden_state
    expected = reward.model.score(hidden[:, -1])
    exact = idefics_pictures(levels / 255, 16, 40)
    assert ((exact - processed.pixel_values[0]).abs().max() * 255 / 2) <= 1.01
    got = reward(levels[None] / 255, CAPTIONS[:1])
    assert (got - expected).abs().max() < 0.05 * expected.abs().max() # same but for PIL's rounding
    expected = reward.model.score(reward.model.model(input_ids=tokens.input_ids,
                                                     pixel_values=exact[None]).last_hidden_state[:, -1])
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("h, w", [(18, 26), (16, 16), (90, 30), (10, 70), (41, 40)])
def test_pictures_against_the_image_library(h, w):
    x = clips(1, 1, h, w)[0]
    size = picture_size(h, w, 16, 40)
    expected = np.stack([np.asarray(Image.fromarray(c.numpy()).resize(size[::-1], Image.BILINEAR)) for c in x[0]])
    assert np.abs(idefics_pictures(x, 16, 40)[0].numpy() - (expected - 0.5) / 0.5).max() < 1e-5


@pytest.mark.parametrize("shape, size", [((256, 256), (378, 378)), ((256, 512), (378, 512)), ((320, 576), (378, 576)),
                                         ((1080, 1920), (551, 980)),
                                         ((1920, 1080), (980, 551)), ((100, 2000), (378, 980)),
                                         ((980, 980), (980, 980))])
def test_size_rule(shape, size):
    from transformers.image_utils import SizeDict
    from transformers.models.idefics2.image_processing_pil_idefics2 import get_resize_output_image_size
    assert picture_size(*shape) == size == get_resize_output_image_size(np.zeros((3, *shape), bool),
                                                                        SizeDict(shortest_edge=378, longest_edge=980))


@pytest.mark.parametrize("n, m", [(1, 16), (16, 16), (17, 16), (100, 16), (49, 48), (333, 48)])
def test_frames_are_those_of_the_releases_scripts(n, m):
    example = np.arange(0, n, n / m).astype(int) if n > m else np.arange(n)
    assert videoscore_frames(n, m).tolist() == example.tolist()
    assert videoscore_frames(n, m, "benchmark").tolist() == np.linspace(0, n - 1, num=m).astype(int).tolist()


def test_sampling_decides_what_is_seen(folder):
    video = clips(1, 6)
    kinds = {how: VideoScoreReward.from_pretrained(folder, sampling=how, max_frames=4)
             for how in ("example", "benchmark")}
    for how, judge in kinds.items():
        leaf = video.clone().requires_grad_()
        (g,) = torch.autograd.grad(judge(leaf, CAPTIONS[:1]).sum(), leaf)
        seen = (g.abs().amax(dim=(0, 2, 3, 4)) > 0).nonzero().flatten().tolist()
        assert seen == {"example": [0, 1, 3, 4], "benchmark": [0, 1, 3, 5]}[how]


def test_padding_and_neighbours_do_not_move_a_score(either):
    reward = either
    captions, video = [*CAPTIONS, "", CAPTIONS[0]], clips(4)
    together = reward(video, captions)
    alone = torch.cat([reward(video[i:i + 1], captions[i:i + 1]) for i in range(4)])
    turned = reward(video.flip(0), captions[::-1]).flip(0)
    assert (together - alone).abs().max() < 1e-5 and (together - turned).abs().max() < 1e-5
    assert together.std(0).min() > 1e-3 # clips differ, so agreement says something
    # the caption is read (the outer two keep theirs)
    assert (reward(video, captions[::-1]) - together).abs().amax(1)[1:3].min() > 1e-4


def test_grey_frame_is_a_frame(either):
    reward, video = either, clips()
    video[0, 1] = 0.5
    video.requires_grad_()
    scores = reward(video, CAPTIONS)
    assert scores.isfinite().all()
    without = reward(video[:1, [0, 2, 3]], CAPTIONS[:1])
    assert (scores[0] - without).abs().max() > 1e-4 # it was not dropped: the score is not that of the other three
    (g,) = torch.autograd.grad(scores.sum(), video)
    assert g[0, 1].abs().sum() > 0
    flat = reward(torch.full((1, 4, 3, 18, 26), 0.5), CAPTIONS[:1])
    near = reward(torch.full((1, 4, 3, 18, 26), 0.5 + 1e-6), CAPTIONS[:1]) # not exactly zero after normalisation
    assert (flat - near).abs().max() < 1e-3


@pytest.mark.parametrize("family", ["idefics2", "qwen2_vl"])
def test_gradient_against_finite_differences(folder, qwen_folder, family, monkeypatch):
    from transformers.models.idefics2 import modeling_idefics2
    from transformers.models.mistral import modeling_mistral
    from transformers.models.qwen2_vl import modeling_qwen2_vl
    def norm(self, x): return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    for kind in (modeling_idefics2.Idefics2RMSNorm, modeling_mistral.MistralRMSNorm, modeling_qwen2_vl.Qwen2VLRMSNorm):
        # theirs rounds to 32 bits, too coarse for this
        monkeypatch.setattr(kind, "forward", norm)
    def turn(q, k, cos, sin): # so does this one
        cos, sin, half = cos.unsqueeze(-2).double(), sin.unsqueeze(-2).double(), modeling_qwen2_vl.rotate_half
        return q * cos + half(q) * sin, k * cos + half(k) * sin
    monkeypatch.setattr(modeling_qwen2_vl, "apply_rotary_pos_emb_vision", turn)
    exact = VideoScoreReward.from_pretrained(folder if family == "idefics2" else qwen_folder, dtype=torch.float64)
    # away from 0 and 1: where bicubic overshoots, the gradient passes straight through
    video = (0.35 + 0.3 * clips(1, 2)).double().requires_grad_()
    for dim in (*DIMENSIONS, "mean"):
        def f(x, dim=dim):
            return exact.score(x, CAPTIONS[:1], dim).sum()
        (g,) = torch.autograd.grad(f(video), video)
        d, delta = torch.randn(video.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1e-5
        with torch.no_grad(): numeric = (f(video + delta * d) - f(video - delta * d)) / (2 * delta)
        assert abs(numeric - (g * d).sum()) < 1e-6 * (1 + abs(numeric)) and g.abs().sum() > 1e-3


def test_chunks_change_neither_scores_nor_gradients(either):
    reward, video = either, clips().requires_grad_()
    whole = reward(video, CAPTIONS)
    (g,) = torch.autograd.grad(whole.sum(), video)
    part = reward(video, CAPTIONS, chunk=3)
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(part.sum(), video)[0], g, rtol=1e-3, atol=1e-5 * g.abs().max())
    with pytest.raises(ValueError, match="chunk is 0"): reward(video, CAPTIONS, chunk=0)


def test_dimensions_by_name(folder, reward):
    assert reward.dims == ("visual_quality", "temporal_consistency", "dynamic_degree", "text_to_video_alignment",
                           "factual_consistency")
    scores = reward(clips(), CAPTIONS)
    assert scores.shape == (2, 5)
    torch.testing.assert_close(reward.score(clips(), CAPTIONS), scores[:, 1]) # OnlineVPO's choice
    for i, dim in enumerate(reward.dims): torch.testing.assert_close(pick_dimension(scores, dim), scores[:, i])
    torch.testing.assert_close(reward.score(clips(), CAPTIONS, "mean"), scores.mean(1))
    other = VideoScoreReward.from_pretrained(folder, dim="dynamic_degree")
    torch.testing.assert_close(other.per_frame(clips(), CAPTIONS), scores[:, 2:3].expand(2, 4))
    with pytest.raises(ValueError, match='dim is "temporal".*temporal_consistency'):
        reward.score(clips(), CAPTIONS, "temporal")


def test_raw_numbers_frozen_weights_no_training_mode(folder, reward):
    reward.train()
    assert not reward.training and not reward.model.training
    video = clips().requires_grad_()
    scores = reward(video, CAPTIONS)
    assert scores.max() > 4 or scores.min() < 1 # not clamped to the scale of the ratings
    scores.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in reward.parameters())
    half = VideoScoreReward.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16 and half(clips(), CAPTIONS).dtype == torch.float32
    assert (half(clips(), CAPTIONS) - scores).abs().max() < 0.15 * scores.abs().max()


def test_long_caption_is_cut_and_said(folder):
    room = len(VideoScoreReward.from_pretrained(folder).tokenizer.encode(videoscore_text("a fox runs", 4, 3)).ids)
    short = VideoScoreReward.from_pretrained(folder, max_tokens=room)
    with pytest.warns(UserWarning,
        match=f'reads {room} tokens; of "a fox runs on the meadow.*does not see: "on the meadow under the moon"'):
        cut = short(clips(1), CAPTIONS[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(cut, short(clips(1), ["a fox runs"]))
    with pytest.raises(ValueError, match="the frames and the question take .* give fewer frames"):
        VideoScoreReward.from_pretrained(folder, max_tokens=room - 3)(clips(1, 5), [""])


@pytest.mark.parametrize("video, prompts, says", [
    (clips()[0], CAPTIONS, r"expected frames \(b, s, 3, h, w\).*\(4, 3, 18, 26\)"),
    (clips() * 255, CAPTIONS, r"in \[0, 1\]; got values from"),
    (clips() * 2 - 1, CAPTIONS, "values from -"),
    ((clips() * 255).byte(), CAPTIONS, "uint8"),
    (clips()[:, :0], CAPTIONS, r"\(2, 0, 3"),
    (clips(), [], "empty"),
    (clips(), CAPTIONS[:1], "1 prompts for 2 clips"),
    (clips(), "a fox", "single text"),
])
def test_bad_input_is_one_clear_line(reward, video, prompts, says):
    with pytest.raises(ValueError, match=says) as error: reward(video, prompts)
    assert "\n" not in str(error.value)


def spoil_config(d, **change):
    (d / "config.json").write_text(json.dumps({**json.loads((d / "config.json").read_text()), **change}))


def spoil_weights(d, change):
    weights = load_file(d / "model.safetensors")
    change(weights)
    save_file(weights, d / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("spoil, says", [
    (lambda d: [f.unlink() for f in d.iterdir()], "no config.json.*holds nothing"),
    (lambda d: (d / "config.json").unlink(), "no config.json.*holds .*model.safetensors"),
    (lambda d: (d / "config.json").write_text("{"), "not JSON"),
    (lambda d: spoil_config(d, model_type="clip"), 'holds a "clip" model'),
    (lambda d: spoil_config(d, id2label={"0": "a", "1": "b"}), "the head gives 2 numbers|size mismatch|does not load"),
    (lambda d: spoil_config(d, image_token_id=0), '"<image>" at 4, the model at 0'),
    (lambda d: spoil_config(d, score_type="special_token"), "five special tokens"),
    (lambda d: spoil_weights(d, lambda w: w.pop("score.weight")), "lacks weights: score.weight"),
    (lambda d: spoil_weights(d, lambda w: w.update({"score.weight": torch.zeros(5, 7)})),
     "does not load|lacks weights"),
    (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-5000]), "does not load"),
    (lambda d: (d / "model.safetensors").unlink(), "does not load.*model.safetensors"),
    (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
    (lambda d: (d / "tokenizer.json").write_text("{}"), "not a tokenizer"),
])
def test_folders_that_are_no_video_judge(copy, spoil, says):
    spoil(copy)
    with pytest.raises(KitError, match=says) as error: VideoScoreReward.from_pretrained(copy)
    assert "\n" not in str(error.value)


def test_missing_weights_say_how_to_fetch(monkeypatch, tmp_path):
    def nowhere(name, kind): raise KitError(f'reward "{name}" is not here')
    monkeypatch.setattr(module, "locate", nowhere)
    with pytest.raises(KitError,
                       match="hf download TIGER-Lab/VideoScore-v1.1 --local-dir VideoScore-v1.1.*another "
                             "machine.*give its path in place of .videoscore-v1.1"):
        VideoScoreReward.from_pretrained("videoscore-v1.1")
    with pytest.raises(KitError, match="not here; video judges are videoscore, videoscore-v1.1"):
        VideoScoreReward.from_pretrained("videoscor")
    monkeypatch.undo()
    (tmp_path / "file").write_text("x")
    with pytest.raises(KitError, match="is a file; expected the folder"):
        VideoScoreReward.from_pretrained(tmp_path / "file")


def test_a_copied_folder_keeps_what_its_name_says(tmp_path):
    judge = VideoScoreReward.from_pretrained(write_small_videoscore(tmp_path / "VideoScore-v1.1"))
    assert (judge.name, judge.max_frames) == ("videoscore-v1.1", 48)
    assert VideoScoreReward.from_pretrained(tmp_path / "VideoScore-v1.1", max_frames=16).max_frames == 16
    for wrong in (dict(dim="beauty"), dict(sampling="middle")):
        with pytest.raises(ValueError, match="beauty|middle"):
            VideoScoreReward.from_pretrained(tmp_path / "VideoScore-v1.1", **wrong)


def test_qwen_reads_what_transformers_reads(qwen):
    video = clips(1, 4, 40, 60)
    h, w = qwen_size(40, 60, 4, 8)
    pictures = torch.nn.functional.interpolate(video[0], (h, w), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (module.CLIP_MEAN, module.CLIP_STD))
    patches = qwen_patches(((pictures - mean) / std).view(2, 2, 3, h, w), 4, 2)
    grid = torch.tensor([[2, h // 4, w // 4]])
    text = CHAT.format(places=VIDEO * (len(patches) // 4), question=PROMPT.format(text_prompt=CAPTIONS[0]))
    ids = torch.tensor([qwen.tokenizer.encode(text).ids])
    counted = torch.arange(ids.shape[1]).expand(3, 1, -1) # what the release's class leaves it to
    hidden = qwen.model.model(input_ids=ids, pixel_values_videos=patches, video_grid_thw=grid,
                              position_ids=counted).last_hidden_state
    assert (qwen(video, CAPTIONS[:1]) - qwen.model.score(hidden[:, -1])).abs().max() < 1e-4


def test_qwen_patches_are_in_transformers_order():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    levels = torch.randint(256, (3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # a still is a pair of the same frame
    theirs = Qwen2VLImageProcessorPil(do_resize=False, do_normalize=False)(levels.numpy(), return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert (qwen_patches((levels / 255).expand(1, 2, -1, -1, -1)) - theirs["pixel_values"]).abs().max() < 1e-6


@settings(max_examples=60, deadline=None)
@given(h=st.integers(20, 2000), w=st.integers(20, 2000), n=st.integers(2, 768))
def test_qwen_sizes_are_those_of_its_utilities(h, w, n):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    most = max(min(768 * 784, 24576 * 784 / n * 2), int(128 * 784 * 1.05))
    assert qwen_size(h, w, n) == smart_resize(h, w, 28, 128 * 784, most)


def test_odd_clips_repeat_their_last_frame(qwen):
    video = clips(1, 3)
    torch.testing.assert_close(qwen(video, CAPTIONS[:1]), qwen(video[:, [0, 1, 2, 2]], CAPTIONS[:1]))
    assert isinstance(qwen, VideoScoreQwenReward)
    with pytest.raises(ValueError, match=r"<\|im_end\|>.*take it out"): qwen(video, ["a fox <|im_end|>"])


def test_qwen_weights_arrive_under_their_new_names(qwen_folder, qwen):
    weights = load_file(qwen_folder / "model.safetensors")
    assert set(weights) == released_qwen_keys(1, 2) # the file has the old names
    state = qwen.model.state_dict()
    for old, new in (("visual.patch_embed.proj.weight", "model.visual.patch_embed.proj.weight"),
                     ("score.bias", "score.bias"),
                     ("model.layers.1.self_attn.q_proj.bias", "model.language_model.layers.1.self_attn.q_proj.bias")):
        assert torch.equal(state[new], weights[old])
