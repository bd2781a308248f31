"""Scores of small random towers by hpsv2's own code, written to hpsv2_towers.json beside this file.

hpsv2 cannot live in the kit's environment (it pins protobuf<4 and pytest==7.2.0, and wants torchvision), so make one
to throw away:

    pip install torch torchvision numpy pillow ftfy regex clint tqdm transformers huggingface_hub
    pip install --no-deps hpsv2==1.2.0
    cp .../open_clip/bpe_simple_vocab_16e6.txt.gz .../hpsv2/src/open_clip/    # from open_clip_torch; hpsv2 lacks it
    python tests/golden/make_hpsv2_towers.py

The recorded file was made with the versions it names; torchvision's compiled operators (boxes, which nobody calls
here) were left out. Weights and pictures come from numpy's RandomState, whose numbers are frozen, so nothing but
scores has to be kept.
"""
import gzip
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).with_name("hpsv2_towers.json")
SEED, SIZE, WIDTH, DIM, LAYERS = 7, 32, 128, 20, dict(visual=3, text=2)
MERGES = ["t h", "th e</w>", "f o", "fo x</w>", "r u", "ru n", "run s</w>", "s n", "a i", "sn ai", "snai l",
          "snail s</w>", "o n</w>", "m e",
          "a d", "me ad", "o w</w>", "mead ow</w>"]
VOCABULARY = 512 + len(MERGES) + 2
CONFIG = dict(embed_dim=DIM, vision_cfg=dict(image_size=SIZE, layers=LAYERS["visual"], width=WIDTH, head_width=64,
                                             patch_size=8),
              text_cfg=dict(context_length=77, vocab_size=VOCABULARY, width=WIDTH, heads=2, layers=LAYERS["text"]))
# the last one is cut at 77 tokens
CAPTIONS = ["a fox runs on the meadow", "Two snails, 3 Foxes!", "", "the snails " * 40]
SHAPES = [(32, 32), (64, 64), (24, 40), (50, 20), (90, 160), (161, 97)] # height, width


def shapes():
    "Every key of an open_clip CLIP of this size, and its shape."
    w = WIDTH
    found = {"logit_scale": (), "positional_embedding": (77, w), "text_projection": (w, DIM),
             "token_embedding.weight": (VOCABULARY, w),
             "visual.class_embedding": (w,), "visual.positional_embedding": ((SIZE//8)**2 + 1, w),
             "visual.proj": (w, DIM),
             "visual.conv1.weight": (w, 3, 8, 8)}
    block = {"attn.in_proj_weight": (3*w, w), "attn.in_proj_bias": (3*w,), "attn.out_proj.weight": (w, w),
             "attn.out_proj.bias": (w,),
             "mlp.c_fc.weight": (4*w, w), "mlp.c_fc.bias": (4*w,), "mlp.c_proj.weight": (w, 4*w),
             "mlp.c_proj.bias": (w,),
             **{f"ln_{i}.{p}": (w,) for i in (1, 2) for p in ("weight", "bias")}}
    for prefix, n in (("visual.", LAYERS["visual"]), ("", LAYERS["text"])):
        found |= {f"{prefix}transformer.resblocks.{i}.{k}": s for i in range(n) for k, s in block.items()}
    return found | {f"{norm}.{p}": (w,) for norm in ("ln_final", "visual.ln_pre", "visual.ln_post")
                    for p in ("weight", "bias")}


def weights(seed=SEED):
    "name -> tensor; nothing is 0 or 1, so that a swap shows."
    rng, state = np.random.RandomState(seed), {}
    for name, shape in sorted(shapes().items()):
        x = rng.standard_normal(shape)
        if ".ln_" in f".{name}" and name.endswith("weight"): x = 1 + 0.2*x
        elif name in ("visual.proj", "text_projection"): x = 1.5*x/np.sqrt(shape[0]) # (in, out), the others (out, in)
        elif len(shape) > 1 and "embedding" not in name: x = 1.5*x/np.sqrt(np.prod(shape[1:]))
        else: x = 0.4*x
        state[name] = torch.from_numpy(np.asarray(x, dtype=np.float32).copy())
    return state


def fingerprint(state): return hashlib.sha256(b"".join(state[k].numpy().tobytes() for k in sorted(state))).hexdigest()


def pictures(seed=SEED):
    "One 8-bit RGB picture (h, w, 3) per shape: blotches, so that shrinking does not leave plain grey."
    rng = np.random.RandomState(seed + 1)
    def blotches(h, w):
        return np.kron(rng.randint(256, size=(h//4 + 1, w//4 + 1, 3)), np.ones((4, 4, 1), int))[:h, :w]
    return [(0.7*blotches(h, w) + 0.3*rng.randint(256, size=(h, w, 3))).astype(np.uint8) for h, w in SHAPES]


def hpsv2_scores():
    """[caption][picture] under 'hpsv2' (score() as published), 'crop' (open_clip's other preprocessing),
    'end_padded' (text padded with the end token)."""
    from hpsv2 import img_score
    from hpsv2.src.open_clip import factory, tokenizer
    from PIL import Image
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder/"small-hps.json").write_text(json.dumps(CONFIG))
        factory.add_model_config(folder/"small-hps.json")
        with gzip.open(folder/"merges.txt.gz", "wt", encoding="utf-8") as f: f.write("\n".join(["#version", *MERGES]))
        full, tokenizer._tokenizer = tokenizer._tokenizer, tokenizer.SimpleTokenizer(str(folder/"merges.txt.gz"))
        try:
            torch.save({"state_dict": weights()}, folder/"HPS_v2_compressed.pt") # the official layout
            options = dict(precision="amp", device="cpu", aug_cfg={}, output_dict=True)
            def create(light):
                return factory.create_model_and_transforms("small-hps", light_augmentation=light, **options)
            model, _, letterbox = create(True)
            crop = create(False)[2]
            model.load_state_dict(weights()) # strict: every key, every shape
            img_score.model_dict.clear(), img_score.model_dict.update(model=model, preprocess_val=letterbox)
            img_score.device, images = "cpu", [Image.fromarray(x) for x in pictures()]
            def score(image, caption):
                return float(img_score.score(image, caption, cp=str(folder/"HPS_v2_compressed.pt"))[0])
            published = [[score(image, caption) for image in images] for caption in CAPTIONS]
            ids = tokenizer.tokenize(CAPTIONS)
            padded = torch.where(torch.arange(77) > ids.argmax(1, keepdim=True), VOCABULARY - 1, ids)
            with torch.no_grad():
                def see(look):
                    return model.encode_image(torch.stack([look(image) for image in images]), normalize=True)
                def towers(text, look):
                    return (model.eval().encode_text(text, normalize=True) @ see(look).T).tolist()
                return {"hpsv2": published, "crop": towers(ids, crop), "end_padded": towers(padded, letterbox)}
        finally: tokenizer._tokenizer = full


if __name__ == "__main__":
    from importlib.metadata import version

    import hpsv2  # noqa: F401 (what the record was made with imports, or nothing is recorded)
    import torchvision  # noqa: F401
    made_with = {name: version(name) for name in ("hpsv2", "torch", "torchvision", "numpy", "pillow")}
    record = dict(made_with=made_with, seed=SEED, weights_sha256=fingerprint(weights()), captions=CAPTIONS,
                  shapes=SHAPES, scores=hpsv2_scores())
    GOLDEN.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes")
