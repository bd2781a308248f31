"""The policy that draws from a caption and a first frame: what it starts as, what it refuses, and that files,
batches and LoRA treat it as any other."""
import pytest
import torch
from tiny import SIZE, tiny_pipeline

from instructvideo_kit.menagerie import image_to_video
from instructvideo_kit.menagerie.models import new_unet, open_parts
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.policy.first_frame import FirstFramePolicy, FirstFrameUNet3DModel, widened
from instructvideo_kit.policy.lora import add_lora, merge_lora

PROMPTS = ["a cat runs", "a dog swims"]

@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    return VideoPolicy.from_pretrained(tiny_pipeline(tmp_path_factory.mktemp("t2v"), "v_prediction", "patch"))

@pytest.fixture(scope="module")
def fresh(t2v):
    return FirstFramePolicy(widened(t2v.unet), t2v.vae, t2v.text_encoder, t2v.tokenizer, t2v.scheduler, t2v.kit)

@pytest.fixture(scope="module")
def looking(t2v):
    "With weights for the picture, so that it makes a difference."
    unet = widened(t2v.unet)
    with torch.no_grad():
        unet.conv_in.weight[:, t2v.unet.config.in_channels:] = torch.randn(unet.conv_in.weight.shape,
            generator=torch.Generator().manual_seed(1))[:, 4:] * .3
    return FirstFramePolicy(unet, t2v.vae, t2v.text_encoder, t2v.tokenizer, t2v.scheduler, t2v.kit)

def pictures(n=2, seed=0): return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))

def test_widened_draws_the_same_clips(t2v, fresh):
    noise = t2v.noise(range(2))
    torch.testing.assert_close(fresh.generate(PROMPTS, 3, noise=noise, image=pictures()),
                               t2v.generate(PROMPTS, 3, noise=noise), atol=1e-5, rtol=1e-4)

def test_widening_leaves_the_dropout(t2v):
    t2v.unet.mid_block.resnets[0].dropout.p = .25
    try: assert widened(t2v.unet).mid_block.resnets[0].dropout.p == .25
    finally: t2v.unet.mid_block.resnets[0].dropout.p = 0.

def rates(network):
    "The dropout rates of a network, without repetition."
    return {m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)}

def test_networks_are_trained_on_without_dropout_when_they_are_opened_again(tmp_path, monkeypatch):
    "diffusers writes .1 into the temporal layers whatever was saved; two calls in training must still agree."
    folder = tiny_pipeline(tmp_path / "start", "v_prediction", "patch")
    assert .1 in rates(VideoPolicy.from_pretrained(folder).unet), "diffusers has changed: the helper may go"
    opened = open_parts(folder)[0]["unet"]
    handed = {}
    monkeypatch.setattr(image_to_video, "train_phase", lambda phase, out, modules, *args: handed.update(modules))
    image_to_video.train_image_to_video(tmp_path / "i2v", start=folder)
    fresh = new_unet(4, (8, 16), 16)
    assert rates(opened) == rates(handed["unet"]) == rates(fresh) == {0.}
    z, text = torch.randn(1, 4, 8, 4, 4), torch.randn(1, 3, 16)
    assert opened.training and torch.equal(opened(z, 500, text).sample, opened(z, 500, text).sample)

def test_the_picture_makes_a_difference(looking):
    def draw(image):
        return looking.generate(PROMPTS, 3, seed=2, image=image)
    assert (draw(pictures()) - draw(pictures(seed=1))).abs().max() > 1e-3

def test_a_clip_does_not_depend_on_its_batch(looking):
    together = looking.generate(PROMPTS, 3, seed=2, image=pictures())
    apart = looking.generate(PROMPTS, 3, seed=2, image=pictures(), batch=1)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)

def test_guidance_is_over_the_caption_alone(looking):
    z_t = looking.noise([0])
    guided = [looking.denoiser(["a cat runs"], w, image=pictures(1))(z_t, 500) for w in (1., 3.)]
    unguided = looking.denoiser([""], 1., image=pictures(1))(z_t, 500)
    torch.testing.assert_close(guided[1], unguided + 3*(guided[0] - unguided), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(looking.denoiser(["a cat runs"], 3., batched=False, image=pictures(1))(z_t, 500),
                               guided[1], atol=1e-5, rtol=1e-4)

def test_through_files(looking, tmp_path):
    looking.save_pretrained(tmp_path/"p")
    again = VideoPolicy.from_pretrained(tmp_path/"p")
    assert isinstance(again, FirstFramePolicy) and isinstance(again.unet, FirstFrameUNet3DModel)
    assert torch.equal(again.generate(PROMPTS, 3, image=pictures()), looking.generate(PROMPTS, 3, image=pictures()))

def test_takes_a_lora(looking, tmp_path):
    looking.save_pretrained(tmp_path/"p")
    policy = VideoPolicy.from_pretrained(tmp_path/"p")
    add_lora(policy, rank=2)
    with torch.no_grad():
        for name, p in policy.network.named_parameters():
            if "lora_B" in name: p.fill_(.05)
    adapted = policy.generate(PROMPTS, 3, image=pictures())
    merge_lora(policy)
    torch.testing.assert_close(policy.generate(PROMPTS, 3, image=pictures()), adapted, atol=1e-4, rtol=1e-3)
    assert (adapted - looking.generate(PROMPTS, 3, image=pictures())).abs().max() > 1e-4

@pytest.mark.parametrize("prompts, image, message", [
    (PROMPTS, None, "image is None"),
    (PROMPTS, pictures(1), "2 prompts and 1 pictures"),
    (PROMPTS, torch.rand(2, 4, SIZE, SIZE), r"\(b, 3, 16, 16\)"),
    (PROMPTS, torch.rand(2, 3, 8, 8), r"\(b, 3, 16, 16\)"),
    (PROMPTS, pictures() * 255, "expected float in"),
    (PROMPTS, (pictures() * 255).to(torch.uint8), "expected float in"),
])
def test_what_it_refuses(fresh, prompts, image, message):
    with pytest.raises(ValueError, match=message): fresh.generate(prompts, 2, image=image)

def test_the_shipped_one_keeps_its_picture():
    "Its first frame is nearer to its own picture than to another."
    from instructvideo_kit.menagerie.captions import scenes
    from instructvideo_kit.menagerie.defects import render
    policy, chosen = VideoPolicy.from_pretrained("menagerie-i2v"), scenes("evaluation", 4, 3)
    image = render(chosen, torch.zeros(4, 1, dtype=torch.long), size=policy.size[0])[:, 0]
    first = policy.generate([s.caption for s in chosen], 5, image=image)[:, 0]
    def apart(other):
        return (first - other).abs().mean((1, 2, 3))
    own, other = apart(image), apart(image.roll(1, 0))
    assert (own < other).all() and own.mean() < .7*other.mean(), (own, other)
