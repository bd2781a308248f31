"""Policies that have parts from a shipped one: opened as the complete ones, refused when a part is gone, changed or
named by a path, and written only where tensors and settings are equal."""
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from tiny_policies import tiny_policy  # noqa: E402

from instructvideo_kit import app, doctor  # noqa: E402
from instructvideo_kit.files import KitError, borrowed, shipped  # noqa: E402
from instructvideo_kit.measure.results import weights_hash  # noqa: E402
from instructvideo_kit.policy import VideoPolicy  # noqa: E402
from instructvideo_kit.policy.base import missing_files, pick_kind  # noqa: E402
from instructvideo_kit.policy.difference import FILE, keep_difference  # noqa: E402
from instructvideo_kit.policy.first_frame import FirstFramePolicy, widened  # noqa: E402
from instructvideo_kit.policy.lora import add_lora, load_lora, save_lora  # noqa: E402
from instructvideo_kit.policy.shared_parts import own_parts, share_parts  # noqa: E402

THREE = ["vae", "text_encoder", "tokenizer"]
VAE = "vae/diffusion_pytorch_model.safetensors"


def first_frame(base):
    "An image-to-video policy with the parts of a text-to-video one."
    return FirstFramePolicy(widened(base.unet), base.vae, base.text_encoder, base.tokenizer, base.scheduler, base.kit)


def write_pair(shelf, kind):
    "policy/base and policy/other in a folder of weights: two networks, the other parts equal."
    tiny_policy(shelf / "policy/base", "wan" if kind == "wan" else "modelscope")
    policy = VideoPolicy.from_pretrained("base")
    if kind == "first_frame": policy = first_frame(policy)
    for p in list(policy.network.parameters())[:2]: p.data += .1
    policy.save_pretrained(shelf / "policy/other")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    "kind -> folder of weights, not to be changed."
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("modelscope", "first_frame", "wan"):
            found[kind] = tmp_path_factory.mktemp(kind)
            patch.setenv("INSTRUCTVIDEO_KIT_WEIGHTS", str(found[kind]))
            write_pair(found[kind], kind)
    return found


@pytest.fixture
def shelf(pairs, tmp_path, monkeypatch, request):
    "A copy of the pair (modelscope unless the test says another) as the shipped policies: their folder."
    kind = getattr(request, "param", "modelscope")
    shutil.copytree(pairs[kind], tmp_path / "weights")
    monkeypatch.setenv("INSTRUCTVIDEO_KIT_WEIGHTS", str(tmp_path / "weights"))
    weights_hash.cache_clear()
    yield tmp_path / "weights/policy"
    weights_hash.cache_clear()


def draw(policy):
    h, w = policy.size
    image = torch.full((1, 3, h, w), .5) if isinstance(policy, FirstFramePolicy) else None
    return policy.generate(["a red cat"], n_ddim=2, image=image)

def edit_kit(folder, **changes):
    kit = json.loads((folder / "kit.json").read_text())
    (folder / "kit.json").write_text(json.dumps(kit | changes))

def edit_tensor(file, change, name=None):
    state = load_file(file)
    name = name or next(iter(state))
    state[name] = change(state[name])
    save_file(state, file)
    return name

def refusal(call, *args):
    with pytest.raises(KitError) as error: call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- there and back

@pytest.mark.parametrize("shelf", ["modelscope", "first_frame", "wan"], indirect=True)
def test_shared_and_complete_folders_are_the_same_policy(shelf, tmp_path):
    "For every kind of policy: the same clips and the same hash, and what is saved is complete again."
    whole = VideoPolicy.from_pretrained("other")
    drawn, named = draw(whole), weights_hash("other", "policy")
    assert share_parts(shelf / "other", "base", THREE) == dict.fromkeys(THREE, "base")
    weights_hash.cache_clear()
    assert not any((shelf / "other" / part).exists() for part in THREE)
    lean = VideoPolicy.from_pretrained("other")
    assert type(lean) is type(whole) and torch.equal(draw(lean), drawn) and weights_hash("other", "policy") == named
    lean.save_pretrained(tmp_path / "copy")
    assert borrowed(tmp_path / "copy") == {} and missing_files(tmp_path / "copy", type(lean).PARTS) == []
    assert own_parts(shelf / "other") == THREE and borrowed(shelf / "other") == {}
    shutil.rmtree(shelf / "base") # neither needs it now
    for folder in (tmp_path / "copy", shelf / "other"):
        assert torch.equal(draw(VideoPolicy.from_pretrained(folder)), drawn)

def test_a_policy_with_shared_parts_gives_no_kit_to_another(shelf, tmp_path):
    "Its settings go into new policies (image to video, a student): whose its parts were does not."
    share_parts(shelf / "other", "base")
    child = first_frame(VideoPolicy.from_pretrained("other"))
    assert not {"parts_of", "parts_sha256"} & child.kit.keys()
    child.save_pretrained(tmp_path / "child")
    shutil.rmtree(shelf / "base")
    assert VideoPolicy.from_pretrained(tmp_path / "child").latent_shape == child.latent_shape

def test_a_lora_moves_between_the_two_forms(shelf, tmp_path):
    "What a LoRA says of its base model is read off the open policy, so it fits both."
    policy = VideoPolicy.from_pretrained("other")
    add_lora(policy, rank=2)
    save_lora(policy, tmp_path / "lora")
    share_parts(shelf / "other", "base")
    assert load_lora(VideoPolicy.from_pretrained("other"), tmp_path / "lora")

def test_all_equal_parts_are_shared_where_none_is_named(shelf):
    edit_tensor(shelf / "other/text_encoder/model.safetensors", lambda w: w + .1)
    assert set(share_parts(shelf / "other", "base")) == {"vae", "tokenizer", "scheduler"}
    assert (shelf / "other/text_encoder").is_dir() and (shelf / "other/unet").is_dir()


# ---- what is equal

def test_a_part_that_differs_is_named_and_nothing_is_removed(shelf):
    name = edit_tensor(shelf / "other" / VAE, lambda w: w + 1e-6)
    before = sorted(shelf.rglob("*"))
    says = refusal(share_parts, shelf / "other", "base", THREE)
    assert f'differs from "base" in vae {name}: only equal parts' in says and "leave vae in its folder" in says
    assert sorted(shelf.rglob("*")) == before and borrowed(shelf / "other") == {}

def test_settings_count_as_tensors_do(shelf):
    "The same weights with another scale make other latents."
    config = shelf / "other/vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": .5}))
    assert "vae config.json: scaling_factor" in refusal(share_parts, shelf / "other", "base", ["vae"])

def test_numbers_count_and_their_format_does_not(shelf):
    "Half precision of the base: equal to its own numbers in single precision, not to finer ones."
    half = VideoPolicy.from_pretrained("base", dtype=torch.float16)
    half.save_pretrained(shelf / "base")
    assert "vae" in refusal(share_parts, shelf / "other", "base", ["vae"])
    other = VideoPolicy.from_pretrained("other")
    other.vae = VideoPolicy.from_pretrained("base").vae # opened as float32
    other.save_pretrained(shelf / "other")
    drawn = draw(VideoPolicy.from_pretrained("other"))
    assert share_parts(shelf / "other", "base", ["vae"]) == {"vae": "base"}
    assert torch.equal(draw(VideoPolicy.from_pretrained("other")), drawn)

def test_a_tokenizer_that_was_used_is_the_same(shelf):
    "Being called writes the way of the call into a tokenizer's files."
    policy = VideoPolicy.from_pretrained("other")
    policy.embed(["a red cat"])
    policy.save_pretrained(shelf / "other")
    assert share_parts(shelf / "other", "base", ["tokenizer"]) == {"tokenizer": "base"}

def test_another_vocabulary_is_another_tokenizer(shelf):
    file = shelf / "other/tokenizer/tokenizer.json"
    words = json.loads(file.read_text())
    vocab = words["model"]["vocab"]
    vocab["a</w>"], vocab["cat</w>"] = vocab["cat</w>"], vocab["a</w>"]
    file.write_text(json.dumps(words))
    assert "tokenizer tokenizer.json: model" in refusal(share_parts, shelf / "other", "base", ["tokenizer"])


# ---- refusals when it is opened

def test_a_missing_shared_file_is_named_with_its_folder(shelf):
    share_parts(shelf / "other", "base")
    (shelf / "base" / VAE).unlink()
    says = refusal(VideoPolicy.from_pretrained, "other")
    assert says.startswith(f"vae/diffusion_pytorch_model.safetensors is missing in {shelf / 'base'}")
    assert "has its vae from there" in says and "get a full copy" in says

def test_a_shipped_policy_that_is_gone_is_named(shelf):
    share_parts(shelf / "other", "base")
    shutil.rmtree(shelf / "base")
    says = refusal(VideoPolicy.from_pretrained, "other")
    assert 'from "base" (parts_of); expected the name of a shipped policy' in says

def test_a_base_that_was_trained_again_is_noticed(shelf):
    "Without a word every clip would change."
    share_parts(shelf / "other", "base")
    edit_tensor(shelf / "base" / VAE, lambda w: w + .1)
    for call in (VideoPolicy.from_pretrained, own_parts):
        assert f"{shelf / 'base/vae'} has changed since" in refusal(call, shelf / "other")
    check = doctor._weights("policy")
    assert not check.ok and "has changed since" in check.message

def test_doctor_is_content_with_shared_parts(shelf):
    for folder in shelf.iterdir(): # tiny files look like pointers of git-lfs
        for file in folder.rglob("*.safetensors"): assert file.stat().st_size > 1024, file
    share_parts(shelf / "other", "base")
    assert doctor._weights("policy").ok

@pytest.mark.parametrize("parts_of, says", [
    ({"vae": "../base"}, "expected the name of a shipped policy"), ({"vae": "/tmp"}, "expected the name of a shipped"),
    ({"vae": "someone/model"}, "expected the name of a shipped policy"), ({"vae": "other"}, "which is itself"),
    ({"vea": "base"}, 'did you mean "vae"'), ({"../base/vae": "base"}, "expected text by part"),
    (["vae"], "expected text by part"), ({"vae": ["base"]}, "expected text by part")])
def test_anything_but_a_shipped_name_is_refused(shelf, parts_of, says):
    edit_kit(shelf / "other", parts_of=parts_of)
    assert says in refusal(VideoPolicy.from_pretrained, "other")

def test_a_shared_part_is_not_borrowed_on(shelf):
    "The policy that is named holds the part itself."
    shutil.copytree(shelf / "other", shelf / "third")
    share_parts(shelf / "other", "base", ["vae"])
    assert "holds no vae of its own" in refusal(share_parts, shelf / "third", "other", ["vae"])
    edit_kit(shelf / "third", parts_of={"vae": "other"})
    assert f"vae/config.json is missing in {shelf / 'other'}" in refusal(VideoPolicy.from_pretrained, "third")

@pytest.mark.parametrize("text, says", [('{"parts_of": ', "is not valid JSON"), ("[]", "expected settings by name")])
def test_a_damaged_kit_json_is_named(shelf, text, says):
    share_parts(shelf / "other", "base")
    (shelf / "other/kit.json").write_text(text)
    found = refusal(VideoPolicy.from_pretrained, "other")
    assert says in found and str(shelf / "other/kit.json") in found


# ---- shipping

def test_shipping_shares_and_a_new_base_leaves_the_old_parts_to_those_who_have_them(shelf, tmp_path):
    for name in ("base", "other"): shutil.move(shelf / name, tmp_path / name)
    base, other = shelf / "menagerie", shelf / "menagerie-i2v"
    app.ship_policy(tmp_path / "base", base)
    app.ship_policy(tmp_path / "other", other)
    assert set(borrowed(other)) == {*THREE, "scheduler"} and borrowed(base) == {}
    assert (tmp_path / "other/vae").is_dir(), "a run folder stays complete"
    drawn = draw(VideoPolicy.from_pretrained("menagerie-i2v"))
    edit_tensor(tmp_path / "base" / VAE, lambda w: w + .1)
    app.ship_policy(tmp_path / "base", base)
    assert set(borrowed(other)) == {"text_encoder", "tokenizer", "scheduler"}
    assert (draw(VideoPolicy.from_pretrained("menagerie-i2v")) - drawn).abs().max() < 1e-3 # a difference is rounded

@pytest.mark.parametrize("name", list(shipped("policy")))
def test_every_policy_of_the_package_has_all_its_parts(name):
    "Its own or those of another; the base has its own, as diffusers opens it without the kit."
    folder = shipped("policy")[name]
    kind, _ = pick_kind(VideoPolicy, folder)
    assert missing_files(folder, kind.PARTS) == []
    if name == "menagerie": assert borrowed(folder) == {}


# ---- a network kept as its difference to the shipped one

def network_of(folder): return next(p.name for p in folder.iterdir() if p.name in ("unet", "transformer"))


@pytest.mark.parametrize("shelf", ["modelscope", "first_frame", "wan"], indirect=True)
def test_a_difference_opens_as_the_network_it_was_made_of(shelf):
    "All weights within a thousandth of the largest change; those the base has not, or in another shape, to the digit."
    before = VideoPolicy.from_pretrained("other").network.state_dict()
    base = VideoPolicy.from_pretrained("base").network.state_dict()
    part = network_of(shelf / "other")
    file = keep_difference(shelf / "other", part, "base")
    assert [p.name for p in file.parent.glob("*.safetensors")] == [FILE]
    after = VideoPolicy.from_pretrained("other").network.state_dict()
    for name, x in before.items():
        if name in base and base[name].shape == x.shape:
            assert (after[name] - x).abs().max() <= (x - base[name]).abs().max()/14, name
        else:
            assert torch.equal(after[name], x), name
    assert torch.equal(draw(VideoPolicy.from_pretrained("other")), draw(VideoPolicy.from_pretrained("other")))
    assert weights_hash("other", "policy") != weights_hash("base", "policy")


def test_a_difference_to_what_has_changed_is_refused(shelf):
    keep_difference(shelf / "other", "unet", "base")
    place = next((shelf / "base/unet").glob("*.safetensors"))
    save_file({k: v + 1 for k, v in load_file(place).items()}, place)
    with pytest.raises(KitError, match="has changed since .*difference.safetensors was saved"):
        VideoPolicy.from_pretrained("other")


def test_a_difference_to_nothing_and_a_damaged_one_say_so(shelf):
    file = keep_difference(shelf / "other", "unet", "base")
    whole = file.read_bytes()
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(KitError, match="does not say what it is"): VideoPolicy.from_pretrained("other")
    file.write_bytes(whole[:200])
    with pytest.raises(KitError, match="damaged"): VideoPolicy.from_pretrained("other")
    file.unlink()
    with pytest.raises(KitError, match="missing"): VideoPolicy.from_pretrained("other")


def test_a_save_of_it_is_whole(shelf, tmp_path):
    "save_pretrained writes all weights again, for diffusers and for everybody else."
    keep_difference(shelf / "other", "unet", "base")
    policy = VideoPolicy.from_pretrained("other")
    policy.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/unet" / FILE).exists()
    assert torch.equal(draw(VideoPolicy.from_pretrained(tmp_path / "saved")), draw(policy))


def test_shipping_keeps_a_near_network_as_a_difference_and_a_new_base_makes_it_whole(shelf, tmp_path):
    policy = VideoPolicy.from_pretrained("base")
    for p in policy.network.parameters(): p.data *= 1.01
    policy.save_pretrained(tmp_path / "new")
    shutil.rmtree(shelf / "other")
    app.ship_policy(tmp_path / "new", shelf / "other", "base")
    assert (shelf / "other/unet" / FILE).exists() and "vae" in borrowed(shelf / "other")
    before = draw(VideoPolicy.from_pretrained("other"))
    for p in policy.network.parameters(): p.data.normal_()
    policy.save_pretrained(tmp_path / "another base")
    app.ship_policy(tmp_path / "another base", shelf / "base", "base")
    assert not (shelf / "other/unet" / FILE).exists()
    assert (draw(VideoPolicy.from_pretrained("other")) - before).abs().max() < .02
