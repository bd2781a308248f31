"A fast student: what it learns from, where its steps end, how it goes on and opens; and a decoder on own latents."
import json

import pytest
import torch
from tiny import tiny_pipeline
from typer.testing import CliRunner

from instructvideo_kit import cli
from instructvideo_kit.diffusion.sampling import ddim_step, to_x0_eps
from instructvideo_kit.diffusion.schedule import Schedule
from instructvideo_kit.files import KitError
from instructvideo_kit.menagerie import decoder, fast
from instructvideo_kit.menagerie.autoencoder import Frames, new_autoencoder, picture_loss, pixel_weight
from instructvideo_kit.menagerie.defects import stamps
from instructvideo_kit.menagerie.models import as_policy, new_text_encoder, new_unet
from instructvideo_kit.menagerie.tokens import menagerie_tokenizer
from instructvideo_kit.menagerie.world import Scene
from instructvideo_kit.policy import VideoPolicy

ASKED = ["a fox walking to the left in the meadow", ""]
SMALL = dict(batch=2, pool=4, first=2, fresh=1, peak=1e-3, ema=.9)


def world_policy(prediction):
    "The 64 x 64 world's classes with few random weights; the temporal layers are no identities."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer, unet = menagerie_tokenizer(), new_unet(4, (8, 16), 16)
        for p in unet.parameters(): p.data += .02 * torch.randn(p.shape)
        parts = dict(unet=unet, text_encoder=new_text_encoder(tokenizer, 16))
        return as_policy(parts, new_autoencoder(4, (8, 8, 8, 8)), tokenizer, prediction=prediction)


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    "Identities are checked without bfloat16's rounding; pools are small."
    monkeypatch.setenv("KIT_PRECISION", "no")
    monkeypatch.setattr(fast, "FAST", SMALL)
    monkeypatch.setattr(decoder.OwnFrames.__init__, "__defaults__", (40, 1, .5, 0))


@pytest.fixture(scope="module", params=["v_prediction", "sample"])
def teacher(request): return world_policy(request.param)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fast")/"teacher"
    world_policy("v_prediction").save_pretrained(folder)
    return folder


def schedule_of(policy): return Schedule.from_scheduler(fast.fast_scheduler(policy.scheduler))
def noise(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
def close(a, b, share=1e-4): return (a - b).abs().max() < share * b.abs().max()


@torch.no_grad()
def test_a_student_that_says_the_target_is_where_two_teacher_steps_end(teacher):
    schedule, z = schedule_of(teacher), noise(1, *teacher.latent_shape)
    fine, model = [*schedule.timesteps(16).tolist(), -1], teacher.denoiser(ASKED[:1], 1.)
    assert fine[::2] == [*schedule.timesteps(8).tolist(), -1]
    for k in (0, 7): # the first step of the chain and its last
        t, middle, end = fine[2 * k:2 * k + 3]
        half = ddim_step(z, model(z, t), t, middle, schedule)
        there = ddim_step(half, model(half, middle), middle, end, schedule)
        times = tuple(torch.tensor([x]) for x in (t, middle, end))
        x0 = fast.two_steps_x0(teacher.unet, z, times, teacher.embed(ASKED[:1]), schedule)
        now, then = fast.level(schedule, times[0]), fast.level(schedule, times[2])
        assert close(fast.step_to(z, x0, now, then), there)
        one = fast.read_x0(teacher.unet, z, times[0], teacher.embed(ASKED[:1]), schedule)
        assert not close(fast.step_to(z, one, now, then), there) # the teacher's own single step ends elsewhere


@torch.no_grad()
def test_guidance_target_is_the_sampler_and_at_one_the_teacher_itself(teacher):
    schedule, z, t = schedule_of(teacher), noise(2, *teacher.latent_shape), torch.tensor([624, 624])
    text, blank = teacher.embed(ASKED), teacher.embed([""])
    plain = fast.read_x0(teacher.unet, z, t, text, schedule)
    def guided(w): return fast.guided_x0(teacher.unet, z, t, text, blank, w, schedule)
    assert torch.equal(guided(1.), plain)
    sampler = teacher.denoiser(ASKED, 4.)(z, 624)
    assert close(guided(4.), to_x0_eps(sampler, z, schedule.at(624), schedule.prediction_type)[0])
    assert close(guided(4.)[1], plain[1]) and not close(guided(4.)[0], plain[0], 1e-3) # the empty caption stays


@torch.no_grad()
def test_lessons_stay_on_their_grid_and_start_from_noise(teacher):
    schedule, z = schedule_of(teacher), 9 + noise(8, *teacher.latent_shape)
    text, grid = teacher.embed(ASKED * 4), schedule.timesteps(8)
    for own in (0., 1.):
        g = torch.Generator().manual_seed(1)
        z_t, t, x0 = fast.halving_lesson(teacher.unet, teacher.unet, z, text, g, schedule, 8, own)
        assert set(t.tolist()) <= set(grid.tolist()) and (own == 0. or len(set(t.tolist())) == 1)
        if own == 0.: # clips around 9 show, but for the samples that start a chain
            middle = z_t.mean((1, 2, 3, 4)) / schedule.at(t) ** .5
            assert (t == grid[0]).any() and (middle[t == grid[0]].abs() < 3).all()
            assert (middle[t < grid[0]] > 7).all()


def test_training_goes_on_and_the_student_draws_in_one_branch(home, tmp_path):
    teacher = VideoPolicy.from_pretrained(home)
    def steps_done(name):
        return [json.loads(line)["step"] for line in (tmp_path/name/"log.jsonl").read_text().splitlines()]
    name, n, lesson = fast.stages(teacher, 8, .5)[0]
    assert (name, n) == ("guidance", 32)
    fast.distil(tmp_path/name, teacher, teacher.unet, lesson, n, 1)
    out = fast.train_fast(tmp_path, home, steps=2, own=.5)
    assert steps_done("guidance") == [1, 2] # went on from the first step
    assert steps_done("steps-16") == steps_done("steps-8") == [2]
    student = VideoPolicy.from_pretrained(out)
    assert json.loads((out/"kit.json").read_text())["n_ddim"] == 8
    assert (student.name, student.guidance_scale, student.n_ddim) == ("menagerie-fast", 1., 8)
    told = []
    student.unet.register_forward_hook(lambda m, given, out: told.append((len(out.sample), given[1])))
    assert student.generate(ASKED[:1]).shape == (1, 16, 3, 64, 64)
    assert told == [(1, t) for t in (999, 874, 749, 624, 499, 374, 249, 124)] # eight calls, one clip each
    moved = [not torch.equal(a, b) for a, b in zip(student.unet.parameters(), teacher.unet.parameters())]
    same = [torch.equal(a, b) for a, b in zip(student.text_encoder.parameters(), teacher.text_encoder.parameters())]
    assert any(moved) and all(same)
    assert [s[0] for s in fast.stages(student, 4, 0.)] == ["steps-4"] # a fast teacher: no guidance, from its own grid


def test_the_default_number_of_steps_is_the_policys(tmp_path):
    tiny_pipeline(tmp_path/"p")
    policy = VideoPolicy.from_pretrained(tmp_path/"p")
    assert policy.n_ddim == 20
    calls, policy.n_ddim = [], 3
    policy.unet.register_forward_hook(lambda *_: calls.append(1))
    policy.generate(["a cat"])
    policy.generate(["a cat"], n_ddim=2)
    assert len(calls) == 3 + 2


def test_decoder_learns_from_own_latents(home, tmp_path):
    before = VideoPolicy.from_pretrained(home)
    after = VideoPolicy.from_pretrained(decoder.train_decoder(tmp_path, home, steps=2, batch=2))
    now, old = after.vae.state_dict(), before.vae.state_dict()
    assert {k.split(".")[0] for k in now if not torch.equal(now[k], old[k])} == {"decoder", "post_quant_conv"}
    assert after.kit["name"] == before.kit["name"] and after.guidance_scale == before.guidance_scale


def test_letters_count_seven_times():
    marked = Scene("fox", "left", "meadow", 3, (("watermark", .5),))
    corner = stamps([marked, Scene("fox", "left", "meadow", 3)], 64)
    assert (corner[0] >= 0).all() and corner[1].tolist() == [-1, -1]
    weight = pixel_weight(torch.tensor([[-9., -9., .1]] * 2), corner)
    assert (weight[0] == 7).sum() == 10 * 38 and (weight[1] == 1).all()
    top, left = corner[0].tolist()
    x, wrong = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    wrong[..., top + 4, left + 4] = 1
    ratio = picture_loss(wrong, x, weight[:1]) / picture_loss(wrong, x, weight[1:])
    assert ratio == pytest.approx(7, rel=1e-5)
    frames = Frames(8, 8)
    assert (frames.corner[frames.corner[:, 0] >= 0] > 0).all() and frames.batch(3, 0)[2].shape == (3, 2)


def test_bad_input(home, tmp_path):
    for train in (fast.train_fast, decoder.train_decoder):
        with pytest.raises(KitError, match="model_index.json is missing"): train(tmp_path/"out", tmp_path)
        with pytest.raises(ValueError, match="steps is 0"): train(tmp_path/"out", home, steps=0)
    for n in (0, 2000):
        with pytest.raises(ValueError, match=f"n_ddim is {n}; expected 1 to 250"):
            fast.train_fast(tmp_path/"out", home, n_ddim=n)
    with pytest.raises(ValueError, match="tau is 0"): decoder.OwnFrames(None, tau=0)
    tiny_pipeline(tmp_path/"small")
    with pytest.raises(KitError, match="draws 8 frames of 16 x 16 pixels"):
        fast.train_fast(tmp_path/"out", tmp_path/"small")


def test_command(home, tmp_path, monkeypatch):
    def call(*args): return CliRunner().invoke(cli.app, ["menagerie", "train", *map(str, args), "--out", str(tmp_path)])
    for part in ("fast", "decoder"):
        answer = call("--part", part)
        assert answer.exit_code == 2 and "give --start" in answer.output
        answer = call("--part", part, "--start", tmp_path)
        assert answer.exit_code == 2 and "model_index.json is missing" in answer.output
    asked = []
    monkeypatch.setattr(fast, "train_fast", lambda *args, **options: asked.append((args, options)) or tmp_path)
    assert call("--part", "fast", "--start", home, "--steps", 5, "--n-ddim", 4).exit_code == 0
    assert asked == [((tmp_path, str(home)), dict(seed=0, steps=5, n_ddim=4))]
    assert call("--part", "fast", "--start", home, "--steps", 0).exit_code == 2
