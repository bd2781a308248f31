"Widgets without a browser: setting `.value` calls the observer that a mouse would; the bytes of the picture tell."
import base64
import io

import pytest
import torch
from PIL import Image
from tiny import N_FRAMES, SIZE, tiny_pipeline

from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.tuning.instructvideo import InstructVideoConfig
from instructvideo_kit.widgets.players import Panel, choice, png_bytes, side_by_side, slider, still_png
from instructvideo_kit.widgets.segments import SegmentStrip, segment_numbers, segment_strip
from instructvideo_kit.widgets.tau import TauSlider, tau_edit
from instructvideo_kit.widgets.truncation import TruncationSlider, gradient_profile, truncated


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return VideoPolicy.from_pretrained(tiny_pipeline(tmp_path_factory.mktemp("tiny"), "v_prediction", "patch"))

@pytest.fixture(scope="module")
def clip(): return torch.rand(N_FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

def picture(panel): return Image.open(io.BytesIO(panel.image.value))
def brightness(frames, prompts): return frames.mean(dim=(2, 3, 4))

# players

def test_png_keeps_pixels_sharp(clip):
    image = Image.open(io.BytesIO(png_bytes(clip[0], scale=3)))
    assert image.size == (3 * SIZE, 3 * SIZE) and image.getpixel((0, 0)) == image.getpixel((2, 2)) == tuple(
        (clip[0, :, 0, 0] * 255).round().int().tolist()
    )

def test_panel_tells_a_refusal_and_keeps_the_picture():
    def draw(n):
        if n == 3: raise ValueError("three is too many")
        return png_bytes(torch.full((3, 4, 4), n/10)), f"n is {n}"
    panel = Panel(draw, {"n": slider("n", 1, 0, 5, 1)})
    first = panel.image.value
    panel.controls["n"].value = 3
    assert "three is too many" in panel.note.value and panel.image.value == first
    panel.controls["n"].value = 2
    assert panel.note.value == "n is 2" and panel.image.value != first

def test_panel_does_not_hide_a_bug():
    panel = Panel(lambda n: (png_bytes(torch.zeros(3, 4, 4)), f"{1/n}"), {"n": slider("n", 1, 0, 5, 1)})
    with pytest.raises(ZeroDivisionError): panel.controls["n"].value = 0

def test_panel_shows_a_still_where_nothing_is_alive(policy, clip):
    for panel in (SegmentStrip(clip), TauSlider(policy, clip, "a cat runs", n_ddim=2)):
        data, _ = panel._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in data
        assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).size == picture(panel).size

def test_still_of_an_animation_is_its_middle(clip):
    frames = [Image.new("RGB", (4, 4), (i*20, 0, 0)) for i in range(8)]
    frames[0].save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(still_png(buffer.getvalue()))).getpixel((0, 0))[0] == 80

def test_sliders_speak_in_their_own_numbers():
    assert isinstance(slider("S", 4, 1, 8, 1).value, int) and isinstance(slider("tau", 0.5, 0., 1., 0.1).value, float)
    assert choice("mode", ("first", "random")).value == "first"

def test_side_by_side_refuses_other_shapes(clip):
    with pytest.raises(ValueError, match="all of one shape"): side_by_side([clip, clip[1:]])
    with pytest.raises(ValueError, match="at least one"): side_by_side([])

# tau

def test_tau_edit_takes_tau_d_steps_and_shares_its_noise(policy, clip):
    low, high = tau_edit(policy, clip, "a cat runs", taus=(0.25, 1.0), n_ddim=4)
    assert low.timesteps == [1] and high.timesteps == [751, 501, 251, 1]
    assert low.alpha_bar > high.alpha_bar
    assert (
        [v.shape for v in (low.corrupted, high.edited)] == [clip.shape] * 2
        and high.edited.min() >= 0
        and high.edited.max() <= 1
    )
    again, = tau_edit(policy, clip, "a cat runs", taus=(1.0,), n_ddim=4)
    assert torch.equal(again.edited, high.edited)

def test_tau_one_forgets_more_than_a_little_tau(policy, clip):
    low, high = tau_edit(policy, clip, "a cat runs", taus=(0.25, 1.0), n_ddim=4)
    decoded = policy.decode(policy.encode(clip[None]))[0].clamp(0, 1) # the autoencoder's own loss apart
    assert (low.corrupted - decoded).abs().mean() < 0.1*(high.corrupted - decoded).abs().mean()

@pytest.mark.parametrize("tau", [0., -0.1, 1.1, 0.1])
def test_tau_out_of_range(policy, clip, tau):
    with pytest.raises(ValueError, match="tau"): tau_edit(policy, clip, "a cat runs", taus=(tau,), n_ddim=4)

def test_tau_slider_changes_the_picture_and_remembers(policy, clip, monkeypatch):
    panel = TauSlider(policy, clip, "a cat runs", tau=0.5, n_ddim=4)
    first = panel.image.value
    assert picture(panel).n_frames == N_FRAMES and "2 of 4 steps" in panel.note.value
    panel.controls["tau"].value = 1.0
    assert panel.image.value != first and "4 of 4 steps" in panel.note.value
    monkeypatch.setattr(policy.unet, "forward", lambda *a, **k: pytest.fail("computed again"))
    panel.controls["tau"].value = 0.5
    assert panel.image.value == first

# segments

def test_lam_zero_gives_equal_bars(clip):
    numbers = segment_strip(clip, 4, lam=0.)[1]
    assert numbers["weights"] == [1.]*4 and numbers["shares"] == pytest.approx([.25]*4)

@pytest.mark.parametrize("mode", ["first", "random", "middle"])
def test_as_many_segments_as_frames_takes_every_frame(clip, mode):
    assert segment_strip(clip, N_FRAMES, mode=mode)[1]["frames"] == list(range(N_FRAMES))

def test_strip_refuses(clip):
    with pytest.raises(ValueError, match=f"1..{N_FRAMES}"): segment_strip(clip, N_FRAMES + 1)
    with pytest.raises(ValueError, match="lam"): segment_strip(clip, 2, lam=-1.)

def test_seed_moves_random_frames_only(clip):
    def frames(mode, seed):
        return segment_numbers(64, 4, mode=mode, seed=seed)["frames"]
    assert (
        frames("random", 0) != frames("random", 1)
        and frames("random", 1) == frames("random", 1)
        and frames("first", 0) == frames("first", 1)
    )

def test_strip_frames_exactly_the_chosen(clip):
    "The frame colour stands left of each chosen frame and of no other."
    from instructvideo_kit.widgets.segments import CHOSEN, frame_lefts
    image, numbers = segment_strip(clip, 3, mode="middle")
    marked = [
        f
        for f, left in enumerate(frame_lefts(numbers["bounds"], SIZE * 2))
        if image.getpixel((left + SIZE, 1)) == CHOSEN
    ]
    assert marked == numbers["frames"] == [1, 3, 6]

def test_segment_sliders_change_the_picture(clip):
    panel = SegmentStrip(clip)
    for name, value in (
        ("n_segments", 2),
        ("lam", 0.0),
        ("mode", "random"),
        ("seed", 5),
        ("lam", 0.5),
        ("center", "midpoint"),
    ):
        before = panel.image.value
        panel.controls[name].value = value
        assert panel.image.value != before, name

# truncation

@pytest.fixture(scope="module")
def profile(policy, clip):
    config = InstructVideoConfig(n_ddim=4, tau=0.75, n_segments=2, frames="first")
    return gradient_profile(policy, brightness, clip, "a cat runs", config)

def test_last_step_hears_the_loss_through_one_step(policy, clip, profile):
    "At the last step the norm is |dz/dv| times dL/dz_0, which no network is part of."
    from instructvideo_kit.diffusion.truncation import step_sensitivity
    from instructvideo_kit.reward.tar import tar_weights
    z_0 = torch.zeros(1, *policy.latent_shape, requires_grad=True)
    g = torch.tensor([[0, 4]])
    loss = -(tar_weights(g, N_FRAMES)*policy.decode(z_0 + policy.encode(clip[None]), g).mean(dim=(2, 3, 4))).mean()
    bound = torch.autograd.grad(loss, z_0)[0].norm() * step_sensitivity(profile.timesteps, policy.schedule)[-1].abs()
    assert 0 < profile.norms[-1] <= bound*1.001 # a pixel outside [0, 1] passes nothing, so it may be less

def test_truncated_cuts_and_prices(profile):
    assert profile.timesteps == [501, 251, 1] and profile.step_bytes > 0 and profile.branches == 2
    assert truncated(profile, 0) == dict(norms=[], cost=6, full_cost=12, bytes=0)
    assert truncated(profile, 1)["cost"] == 8 and truncated(profile, 3)["cost"] == 12
    assert (
        truncated(profile, 2)["norms"] == profile.norms[-2:].tolist()
        and truncated(profile, 2)["bytes"] == 2 * profile.step_bytes
    )
    for K in (-1, 4):
        with pytest.raises(ValueError, match="0..3"): truncated(profile, K)

def test_truncation_slider(profile):
    panel = TruncationSlider(profile)
    pictures = {panel.image.value}
    for K in (0, 2, 3):
        panel.controls["grad_steps"].value = K
        pictures.add(panel.image.value)
        assert f"K = {K}:" in panel.note.value and ("nothing is learnt" in panel.note.value) == (K == 0)
    assert len(pictures) == 4
