"ClipReward and its input: parity with open_clip's towers, conversion, gradients, refusals."
import json
import os
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from instructvideo_kit.files import KitError
from instructvideo_kit.reward import clip as clip_module
from instructvideo_kit.reward.base import (
    CLIP_MEAN,
    CLIP_STD,
    PREPROCESSINGS,
    augment,
    check_frames,
    clamp_frames,
    letterbox,
    preprocess,
)
from instructvideo_kit.reward.clip import (
    AestheticReward,
    ClipReward,
    aesthetic_head,
    clip_keys,
    convert_open_clip,
    load_tokenizer,
    open_clip_config,
    open_clip_keys,
    rename_open_clip,
    write_tokenizer,
)

CAPTIONS = ["a fox runs on a meadow", "two snails"]


# A small CLIP as open_clip builds it: pre-norm blocks, packed q/k/v, features read at the end token.
class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(),
                                             c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, heads, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks: x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, size, patch, width, heads, layers, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.3)
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width) * 0.3)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, layers)
        self.proj = nn.Parameter(torch.randn(width, dim) * 0.3)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self, size=32, patch=8, width=48, heads=3, layers=3, text_width=32, text_heads=2, text_layers=2,
                 dim=20, vocabulary=514):
        super().__init__()
        self.visual = Visual(size, patch, width, heads, layers, dim)
        self.transformer = Transformer(text_width, text_heads, text_layers)
        self.token_embedding = nn.Embedding(vocabulary, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(77, text_width) * 0.3)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, dim) * 0.3)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def encode_text(self, ids):
        mask = torch.full((77, 77), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, mask))
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


def make_open_clip():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = OpenClip()
        for p in model.parameters(): # norms and biases away from 1 and 0, so that a swap shows
            p.data += 0.1 * torch.randn_like(p)
    return model.eval().requires_grad_(False)


HEADS = dict(vision_heads=3, text_heads=2)


@pytest.fixture(scope="module")
def reference(): return make_open_clip()


@pytest.fixture()
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "instructvideo_kit"


@pytest.fixture()
def official(tmp_path, cache, reference):
    "A file laid out as HPSv2's, with a tokenizer beside it."
    file = tmp_path / "weights" / "HPS_v2_compressed.pt"
    file.parent.mkdir()
    torch.save({"state_dict": reference.state_dict()}, file)
    write_tokenizer(file.parent)
    return file


@pytest.fixture(scope="module")
def judge(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    torch.save(reference.state_dict(), folder / "small.pt")
    write_tokenizer(folder)
    return ClipReward.from_pretrained(convert_open_clip(folder / "small.pt", folder / "converted", **HEADS))


def frames_of(b=2, s=3, h=32, w=32, seed=0):
    return torch.rand(b, s, 3, h, w, generator=torch.Generator().manual_seed(seed))


def package_picture(x, size=32):
    "HPSv2's picture written a second way: resize, paste on black, normalise."
    h, w = x.shape[-2:]
    scale = size / float(max(h, w))
    new = (round(h * scale), round(w * scale))
    if scale != 1: x = F.interpolate(x, new, mode="bicubic", antialias=True)
    canvas = torch.zeros(*x.shape[:-2], size, size)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    canvas[..., top:top + new[0], left:left + new[1]] = x
    return (canvas - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


@pytest.mark.parametrize("h, w", [(32, 32), (64, 64), (24, 40), (50, 20), (32, 17)])
def test_same_scores_as_open_clip_towers(reference, judge, h, w):
    frames = frames_of(h=h, w=w)
    # open_clip pads with 0, transformers with the end token: neither may matter
    ids = torch.zeros(2, 77, dtype=torch.long)
    for row, caption in zip(ids, CAPTIONS):
        tokens = judge.tokenizer(caption).input_ids
        row[:len(tokens)] = torch.tensor(tokens)
    image = F.normalize(reference.visual(package_picture(frames.flatten(0, 1))), dim=-1).view(2, 3, -1)
    text = F.normalize(reference.encode_text(ids), dim=-1)
    expected = torch.einsum("bsd,bd->bs", image, text)
    assert expected.std() > 1e-3 # frames differ, so agreement says something
    assert (judge(frames, CAPTIONS) - expected).abs().max() < 1e-5


def test_full_size_hpsv2_is_covered():
    width = {"visual.": 1280, "": 1024}
    def shape(key):
        tower = "visual." if key.startswith("visual.") else ""
        w, rest = width[tower], key.rpartition("resblocks.")[2]
        if "resblocks" in key:
            if "in_proj" in rest: return (3 * w, w) if rest.endswith("weight") else (3 * w,)
            if rest.endswith("weight") and "ln_" not in rest:
                return {"c_fc": (4 * w, w), "c_proj": (w, 4 * w)}.get(rest.split(".")[-2], (w, w))
            return (4 * w,) if "c_fc" in rest else (w,)
        plain = {"visual.positional_embedding": (257, 1280), "visual.conv1.weight": (1280, 3, 14, 14),
                 "visual.proj": (1280, 1024), "logit_scale": (),
                 "token_embedding.weight": (49408, 1024), "positional_embedding": (77, 1024),
                 "text_projection": (1024, 1024)}
        return plain.get(key, (w,))
    state = {k: torch.empty(shape(k), device="meta") for k in open_clip_keys()}
    config = open_clip_config(state)
    with torch.device("meta"): model = clip_module.CLIPModel(config)
    ours, theirs = rename_open_clip(state), model.state_dict()
    assert set(ours) == set(theirs)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert sum(p.numel() for p in model.parameters()) == 986_109_441
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.num_attention_heads, text.num_attention_heads, vision.hidden_act,
            text.eos_token_id) == (224, 16, 16, "gelu", 49407)


def test_key_list_is_the_reference_towers(reference):
    assert sorted(open_clip_keys(3, 2)) == sorted(reference.state_dict())
    with pytest.raises(KeyError): clip_keys("visual.transformer.resblocks.0.ls_1.gamma")


def test_official_layout_is_converted_once(official, cache):
    first = ClipReward.from_pretrained(official)
    (folder,) = cache.iterdir() # nothing half-written beside it
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    again = ClipReward.from_pretrained(str(official))
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert (first.name, first.preprocess, first.scale) == ("hpsv2", "hpsv2", 1.0)
    torch.testing.assert_close(first(frames_of(), CAPTIONS), again(frames_of(), CAPTIONS), rtol=0, atol=0)
    os.utime(official, (1, 1)) # another file under the same name is another conversion
    ClipReward.from_pretrained(official)
    assert len(list(cache.iterdir())) == 2


def test_prefix_and_half_precision_checkpoint(official, reference):
    torch.save({"state_dict": {f"module.{k}": v.half() for k, v in reference.state_dict().items()}, "epoch": 3},
               official)
    reward = ClipReward.from_pretrained(official)
    assert reward.model.dtype == torch.float32 and reward(frames_of(), CAPTIONS).isfinite().all()


def test_failed_conversion_leaves_nothing(official, cache, monkeypatch):
    monkeypatch.setattr(clip_module, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"): ClipReward.from_pretrained(official)
    assert not cache.exists() or not list(cache.iterdir())


class Boom:
    def __reduce__(self): return os.mkdir, ("code-ran",)


@pytest.mark.parametrize("content, says", [
    ({"state_dict": Boom()}, "holds code .*mkdir.*refused"),
    ({"state_dict": {"conv.weight": torch.zeros(2)}}, "not expected 1 .conv.weight"),
    ([torch.zeros(2)], "holds a list"),
    (b"plain text", "not a torch checkpoint"),
    (b"", "not a torch checkpoint"),
])
def test_other_files_are_refused(tmp_path, cache, monkeypatch, content, says):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "HPS_v2.1_compressed.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(KitError, match=says) as error: ClipReward.from_pretrained(file)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "code-ran").exists() and not cache.exists()


def test_cut_off_file_is_refused(official):
    official.write_bytes(official.read_bytes()[:-5000])
    with pytest.raises(KitError, match="not a torch checkpoint"): ClipReward.from_pretrained(official)


def test_missing_weights_say_how_to_fetch(monkeypatch):
    def nowhere(name, kind): raise KitError(f'reward "{name}" is not here')
    monkeypatch.setattr(clip_module, "locate", nowhere)
    with pytest.raises(KitError, match=r"huggingface.co/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt.*give its path"):
        ClipReward.from_pretrained("hpsv2.1")
    with pytest.raises(KitError, match="did you mean .pickscore"): ClipReward.from_pretrained("pickscor")


def test_folders_that_are_no_judge(judge, tmp_path):
    with pytest.raises(KitError, match="no config.json.*it holds nothing"): ClipReward.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(KitError, match='holds a "bert" model'): ClipReward.from_pretrained(tmp_path)
    judge.model.save_pretrained(tmp_path)
    weights = clip_module.load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    clip_module.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KitError, match="lacks weights: visual_projection.weight"): ClipReward.from_pretrained(tmp_path)


def test_native_folder_with_kit_json(judge, tmp_path):
    judge.model.save_pretrained(tmp_path)
    judge.tokenizer.save_pretrained(tmp_path)
    plain = ClipReward.from_pretrained(tmp_path)
    assert (plain.preprocess, plain.scale, plain.name) == ("clip", 1.0, tmp_path.name)
    (tmp_path / "kit.json").write_text(
        json.dumps(dict(name="mine", preprocess="squash", scale="logit_scale", mean=[0, 0, 0], std=[1, 1, 1])))
    mine = ClipReward.from_pretrained(str(tmp_path))
    assert (mine.name, mine.preprocess, mine.mean) == ("mine", "squash", (0, 0, 0))
    assert mine.scale == pytest.approx(judge.model.logit_scale.exp().item())
    assert ClipReward.from_pretrained(tmp_path, preprocess="hpsv2", scale=100).scale == 100
    (tmp_path / "kit.json").write_text("{")
    with pytest.raises(KitError, match="not JSON"): ClipReward.from_pretrained(tmp_path)


def test_tokenizer_must_fit_the_text_tower(judge, tmp_path):
    write_tokenizer(tmp_path, ["a b"]) # one merge more: the end token moves
    with pytest.raises(KitError, match="token 513, but the tokenizer ends captions with 514"):
        ClipReward(judge.model, load_tokenizer(tmp_path))


@pytest.mark.parametrize("how", PREPROCESSINGS)
def test_gradient_against_finite_differences(reference, judge, how):
    exact = ClipReward(clip_module.CLIPModel(judge.model.config).double(), judge.tokenizer, how)
    exact.model.load_state_dict(judge.model.state_dict())
    frames = 0.1 + 0.8 * frames_of(1, 2, 40, 40 if how == "released" else 28).double()
    frames.requires_grad_()
    weights = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    def f(x):
        return (exact(x, CAPTIONS[:1]) * weights).sum()
    (gradient,) = torch.autograd.grad(f(frames), frames)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        d, delta = torch.randn(frames.shape, generator=generator, dtype=torch.float64), 1e-5
        with torch.no_grad(): numeric = (f(frames + delta * d) - f(frames - delta * d)) / (2 * delta)
        assert abs(numeric - (gradient * d).sum()) < 1e-6 * (1 + abs(numeric))
    assert gradient.abs().sum() > 0.01


def test_weights_without_a_tokenizer_take_clips_own(tmp_path, cache, monkeypatch):
    merges = [f"{a} {b}" for a in "abcdefgh" for b in "ijkl"]
    monkeypatch.setattr(clip_module, "_clip_merges", lambda beside: merges)
    assert load_tokenizer(tmp_path)("a").input_ids == [512 + 32, 320, 513 + 32]
    assert (cache / "clip_tokenizer/vocab.json").exists()
    monkeypatch.setattr(clip_module, "_clip_merges", lambda beside: None)
    def nowhere(name, kind): raise KitError("not here")
    monkeypatch.setattr(clip_module, "locate", nowhere)
    with pytest.raises(KitError, match="has no tokenizer: put vocab.json"): load_tokenizer(tmp_path)


def test_chunks_change_neither_scores_nor_gradients(judge):
    frames = frames_of().requires_grad_()
    whole = judge(frames, CAPTIONS)
    (g,) = torch.autograd.grad(whole.sum(), frames)
    for chunk in (1, 4, 100):
        part = judge(frames, CAPTIONS, chunk=chunk)
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(part.sum(), frames)[0], g, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="chunk is 0"): judge(frames, CAPTIONS, chunk=0)


def test_each_caption_is_read_once(judge, monkeypatch):
    judge._texts.clear()
    seen, real = [], judge.model.get_text_features
    monkeypatch.setattr(judge.model, "get_text_features", lambda input_ids, **k: seen.append(len(input_ids))
                        or real(input_ids=input_ids, **k))
    with torch.inference_mode(): first = judge(frames_of(3), ["a", "b", "a"])
    assert seen == [2] # the repeated caption went through once
    judge(frames_of(3), ["b", "c", "a"])
    assert seen == [2, 1]
    frames = frames_of(3).requires_grad_() # what was read in inference mode still serves a gradient
    scores = judge(frames, ["a", "b", "a"])
    scores.sum().backward()
    torch.testing.assert_close(scores.detach(), first.clone())
    assert frames.grad.abs().sum() > 0 and seen == [2, 1]


def test_a_caption_reads_alike_under_autocast(judge):
    judge._texts.clear()
    with torch.autocast("cpu", torch.bfloat16): mixed = judge.text_features(CAPTIONS)
    judge._texts.clear()
    assert torch.equal(mixed, judge.text_features(CAPTIONS))


def test_older_transformers_give_plain_tensors(judge, monkeypatch):
    expected = judge(frames_of(), CAPTIONS)
    image, text = judge.model.get_image_features, judge.model.get_text_features
    monkeypatch.setattr(judge.model, "get_image_features", lambda **k: clip_module._projected(image(**k)))
    monkeypatch.setattr(judge.model, "get_text_features", lambda **k: clip_module._projected(text(**k)))
    judge._texts.clear()
    torch.testing.assert_close(judge(frames_of(), CAPTIONS), expected)


def test_frozen_and_without_a_training_mode(judge):
    judge.train()
    assert not judge.training and not judge.model.training
    frames = frames_of().requires_grad_()
    judge(frames, CAPTIONS).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in judge.parameters())
    assert frames.grad.abs().amax(dim=(2, 3, 4)).min() > 0 # every frame of every clip hears something


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_frames_have_finite_scores_and_gradients(judge, value):
    frames = torch.full((1, 1, 3, 32, 32), value, requires_grad=True)
    score = judge(frames, ["nothing"])
    score.sum().backward()
    assert score.isfinite().all() and frames.grad.isfinite().all()


def test_half_precision_towers_give_32_bit_scores(judge):
    half = ClipReward(clip_module.CLIPModel(judge.model.config), judge.tokenizer, "hpsv2")
    half.model.load_state_dict(judge.model.state_dict())
    half.to(torch.bfloat16)
    frames = frames_of().requires_grad_()
    scores = half(frames, CAPTIONS)
    scores.sum().backward()
    assert scores.dtype == torch.float32 and frames.grad.isfinite().all()
    assert (scores - judge(frames, CAPTIONS)).abs().max() < 0.05


def test_long_caption_is_cut_and_said(judge):
    with pytest.warns(UserWarning, match=r'reads 77 tokens.*does not see: ".*zebra'):
        judge.text_features(["x" * 80 + " zebra"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge.text_features(["a short one"])


@pytest.mark.parametrize("frames, prompts, says", [
    (frames_of()[0], CAPTIONS, r"expected frames \(b, s, 3, h, w\).*\(3, 3, 32, 32\)"),
    (frames_of().movedim(2, -1), CAPTIONS, "32 channels in third place"),
    (frames_of() * 2 - 1, CAPTIONS, r"values from -"),
    (frames_of() * 255, CAPTIONS, r"in \[0, 1\]; got values from"),
    (frames_of() * float("nan"), CAPTIONS, "nan"),
    ((frames_of() * 255).byte(), CAPTIONS, "uint8"),
    (frames_of()[:, :0], CAPTIONS, r"\(2, 0, 3"),
    (np.zeros((2, 3, 3, 8, 8)), CAPTIONS, "ndarray"),
    (frames_of(), [], "empty"),
    (frames_of(), CAPTIONS[:1], "1 prompts for 2 clips"),
    (frames_of(), "a cat", "single text"),
])
def test_bad_input_is_one_clear_line(judge, frames, prompts, says):
    with pytest.raises(ValueError, match=says) as error: judge(frames, prompts)
    assert "\n" not in str(error.value)


def test_unknown_choices_are_refused(judge):
    with pytest.raises(ValueError, match='"hps".*did you mean "hpsv2"'): ClipReward(judge.model, judge.tokenizer, "hps")
    with pytest.raises(ValueError, match="straight"): clamp_frames(frames_of(), "soft")
    with pytest.raises(ValueError, match="square frames only, got 32x20"): preprocess(frames_of(w=20), 16, "released")
    with pytest.raises(ValueError, match="must not be negative"): augment(frames_of(), shift=-1)


def test_overshoot_is_clamped_and_its_gradient_is_a_choice(judge):
    frames = frames_of()
    frames[..., 0] = 1.1
    torch.testing.assert_close(judge(frames, CAPTIONS), judge(frames.clamp(0, 1), CAPTIONS))
    for choice, passes in (("straight", True), ("zero", False)):
        reward = ClipReward(judge.model, judge.tokenizer, "hpsv2", clamp=choice)
        leaf = frames.clone().requires_grad_()
        (g,) = torch.autograd.grad(reward(leaf, CAPTIONS).sum(), leaf)
        assert (g[..., 0].abs().sum() > 0) == passes and g[..., 1:].abs().sum() > 0


@pytest.mark.parametrize("h, w", [(90, 160), (61, 40)])
def test_smoothed_bicubic_is_the_image_librarys(h, w):
    x = frames_of(1, 1, h, w)[0]
    scale = 32 / max(h, w)
    new = (round(h * scale), round(w * scale))
    expected = np.stack([np.asarray(Image.fromarray(c.numpy()).resize(new[::-1], Image.BICUBIC)) for c in x[0]])
    top, left = (32 - new[0]) // 2, (32 - new[1]) // 2
    got = letterbox(x, 32)[0, :, top:top + new[0], left:left + new[1]].numpy()
    assert np.abs(got - expected).max() < 1e-5


@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 70), w=st.integers(1, 70), how=st.sampled_from(PREPROCESSINGS))
def test_every_shape_becomes_the_judges_square(h, w, how):
    if how == "released": w = h
    x = preprocess(torch.full((1, 2, 3, h, w), 0.5), 16, how, mean=(0,) * 3, std=(1,) * 3)
    assert x.shape == (2, 3, 16, 16)
    bars = (x == 0).all(dim=1)
    # a flat picture stays flat between its bars
    assert torch.allclose(x[~bars.unsqueeze(1).expand_as(x)], torch.tensor(0.5), atol=1e-4)
    if how != "hpsv2" or h == w: assert not bars.any()


@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 9), w=st.integers(1, 9), shift=st.integers(0, 4), noise=st.sampled_from([0.0, 0.2]),
       seed=st.integers(0, 99))
def test_augment_stays_in_range_and_repeats_with_its_seed(h, w, shift, noise, seed):
    frames = frames_of(2, 2, h, w, seed)
    one, two = (augment(frames, shift, noise, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert one.shape == frames.shape and torch.equal(one, two)
    assert one.min() >= 0 and one.max() <= 1
    if not shift and not noise: assert one is frames
    if not noise:
        assert set(one.flatten().tolist()) <= set(frames.flatten().tolist()) # a shift moves pixels, it makes none


def test_shift_moves_each_frame_by_its_own_offset():
    ramp = torch.arange(20.0).view(1, 1, 1, 20, 1) / 40 + torch.arange(20.0).view(1, 1, 1, 1, 20) / 800
    moved = augment(ramp.expand(1, 64, 3, 20, 20), shift=2, generator=torch.Generator().manual_seed(0))
    near = (moved[0, :, 0, 10, 10, None] - ramp[0, 0, 0, 8:13, 8:13].flatten()).abs() < 1e-6 # (frame, offset)
    assert (near.sum(1) == 1).all() and near.any(0).sum() > 15 # each frame within reach, most of the 25 offsets met


def test_augment_passes_the_gradient():
    frames = frames_of().requires_grad_()
    augment(frames, 2, 0.05, torch.Generator().manual_seed(0)).sum().backward()
    # replicate padding hands every output pixel to one input pixel
    assert frames.grad.sum().item() == pytest.approx(frames.numel(), rel=1e-5)


def test_aesthetic_head_is_checked(judge, tmp_path):
    torch.manual_seed(0)
    one = nn.Linear(20, 1)
    torch.save(one.state_dict(), tmp_path / "linear.pth")
    reward = AestheticReward(judge, aesthetic_head(tmp_path / "linear.pth"))
    torch.testing.assert_close(reward(frames_of(), CAPTIONS),
                               one(judge.image_features(frames_of())).squeeze(-1).detach())
    torch.save(nn.Linear(768, 1).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(KitError, match="width 768.*ViT-L/14"):
        AestheticReward(judge, aesthetic_head(tmp_path / "wide.pth"))
    torch.save({"a.weight": torch.zeros(3, 5)}, tmp_path / "bad.pth")
    with pytest.raises(KitError, match="not an aesthetic head"): aesthetic_head(tmp_path / "bad.pth")


def test_check_frames_lets_a_decoder_overshoot_a_little():
    check_frames(frames_of() * 1.2 - 0.1, CAPTIONS)
