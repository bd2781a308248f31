"The widgets of the course without a browser: the ladder of timesteps, the gallery of fooled judges, guidance."
import io

import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

from instructvideo_kit.diffusion.schedule import Schedule
from instructvideo_kit.policy import VideoPolicy
from instructvideo_kit.widgets.guidance import GuidanceSlider, guided
from instructvideo_kit.widgets.hacking import Attack, HackGallery, attack, hacking_note, hacking_png
from instructvideo_kit.widgets.ladder import DDIMLadder, ladder_note, ladder_numbers, ladder_png

SCHEDULE = Schedule.modelscope()
def size(png): return Image.open(io.BytesIO(png)).size

# ladder

@pytest.mark.parametrize("n_ddim, tau, k", [(20, .6, 1), (20, 1., 0), (50, .58, 29), (30, .5, 99), (2, .5, 1)])
def test_every_rung_has_one_fate(n_ddim, tau, k):
    numbers = ladder_numbers(SCHEDULE, n_ddim, tau, k)
    together = numbers["left_out"] + numbers["walked"] + numbers["opened"]
    assert together == SCHEDULE.timesteps(n_ddim).tolist()
    assert len(numbers["opened"]) == min(k, round(tau * n_ddim)) and len(numbers["left_out"]) == n_ddim - round(
        tau * n_ddim
    )
    start = (numbers["walked"] + numbers["opened"])[0]
    assert numbers["amplitude"] == pytest.approx(SCHEDULE.at(start)**.5)

def test_ladder_refuses():
    with pytest.raises(ValueError, match="at least one step"): ladder_numbers(SCHEDULE, 10, .01)
    with pytest.raises(ValueError, match="grad_steps is -1"): ladder_numbers(SCHEDULE, grad_steps=-1)

def test_ladder_picture_follows_each_slider():
    pictures = {
        ladder_png(SCHEDULE),
        ladder_png(SCHEDULE, 40),
        ladder_png(SCHEDULE, tau=0.8),
        ladder_png(SCHEDULE, grad_steps=3),
    }
    assert len(pictures) == 4 and "12 of 20 steps, 1 of them" in ladder_note(ladder_numbers(SCHEDULE))
    panel = DDIMLadder(SCHEDULE)
    first = panel.image.value
    panel.controls["grad_steps"].value = 5
    assert panel.image.value != first and "5 of them with gradient" in panel.note.value
    panel.controls["n_ddim"].value, panel.controls["tau"].value = 2, .05
    assert "at least one step" in panel.note.value

# hacking

def brightness(frames, prompts): return frames.mean(dim=(2, 3, 4))

@pytest.fixture
def frame(): return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))

def test_attack_climbs_in_small_steps_and_stays_in_range(frame):
    found = attack(brightness, frame, "any", n=4, rate=.1)
    assert found.frames.shape == (5, 3, 8, 8) and torch.equal(found.frames[0], frame)
    assert found.frames.min() >= 0 and found.frames.max() <= 1 and found.frames.diff(dim=0).abs().max() <= .1 + 1e-6
    assert all(a < b for a, b in zip(found.scores, found.scores[1:]))
    assert torch.allclose(found.frames[-1], (frame + .4).clamp(0, 1), atol=1e-6) # brightness wants every pixel lighter

def test_attack_on_disturbed_copies_depends_on_the_seed_only(frame):
    def edges(frames, prompts): return frames.diff(dim=-1).abs().mean(dim=(2, 3, 4))
    a, b, c = (attack(edges, frame, "any", n=3, shift=1, noise=.1, seed=s).frames for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)

@pytest.mark.parametrize("bad", [dict(n=0), dict(rate=0.), dict(rate=-1.)])
def test_attack_refuses(frame, bad):
    with pytest.raises(ValueError, match="expected at least one step"): attack(brightness, frame, "any", **bad)

def test_gallery_changes_with_the_list_and_the_slider(frame):
    a, b = attack(brightness, frame, "any", n=4), attack(lambda x, p: -brightness(x, p), frame, "any", n=2)
    panel = HackGallery({"lighter": a, "darker": b}, scale=2)
    seen = [panel.image.value]
    panel.controls["step"].value = 0
    seen.append(panel.image.value)
    panel.controls["which"].value = "darker"
    panel.controls["step"].value = 4 # longer than this attack: its end
    seen.append(panel.image.value)
    assert len(set(seen)) == 3 and panel.note.value == hacking_note(b, 2)
    assert size(hacking_png(a, 1, scale=2))[0] > 3*16
    with pytest.raises(ValueError, match="expected 0..4"): hacking_png(a, 5)
    with pytest.raises(ValueError, match="no attack"): HackGallery({})
    assert isinstance(a, Attack)

# guidance

@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return VideoPolicy.from_pretrained(tiny_pipeline(tmp_path_factory.mktemp("tiny"), "v_prediction", "patch"))

def test_guided_is_generate_at_each_scale(policy):
    a, b = guided(policy, "a fox", (1., 6.), n_ddim=2, seed=3)
    assert torch.equal(b.video, policy.generate(["a fox"], n_ddim=2, guidance_scale=6., seed=3)[0].float())
    assert b.contrast == pytest.approx(b.video.std().item()) and 0 <= b.burnt <= 1 and not torch.equal(a.video, b.video)
    with pytest.raises(ValueError, match="guidance scale -1"): guided(policy, "a fox", (-1.,))

def test_each_scale_is_drawn_once(policy, monkeypatch):
    asked, generate = [], policy.generate
    monkeypatch.setattr(policy, "generate", lambda *a, **k: asked.append(k["guidance_scale"]) or generate(*a, **k))
    panel = GuidanceSlider(policy, "a fox", n_ddim=1)
    first = panel.image.value
    panel.controls["w"].value = 9.
    assert panel.image.value != first and "w = 9" in panel.note.value
    panel.controls["w"].value = 4.
    assert panel.image.value == first and asked == [1., 4., 9.]
