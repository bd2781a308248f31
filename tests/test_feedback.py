"""Your own feedback: votes that survive, the loss against its definition, fits that say what they do not know, a reward
that opens through every door."""
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructvideo_kit.feedback import votes as fv
from instructvideo_kit.feedback.fit import accuracy, cross_validated, fit_report, fit_votes, prior_head
from instructvideo_kit.feedback.pairs import active_pairs, candidate_pairs
from instructvideo_kit.feedback.pool import Pool, make_pool, votes_in_pool
from instructvideo_kit.feedback.portrait import portrait
from instructvideo_kit.feedback.preference import preference_loss, preference_probabilities
from instructvideo_kit.feedback.raters import SimulatedRater, darkness, motion, taste_of, warmth
from instructvideo_kit.files import KitError

N, BLOCKS = 80, [1, 1, 10, 8]


# --- the loss

@settings(deadline=None, max_examples=60)
@given(st.floats(-40, 40), st.floats(1, 30))
def test_probabilities_sum_to_one_and_are_those_of_the_loss(delta, k):
    d = torch.tensor([delta], dtype=torch.float64)
    p = preference_probabilities(d, k)[0]
    assert p.sum().item() == pytest.approx(1, abs=1e-12) and (p >= 0).all()
    for i, vote in enumerate((1, -1, 0)):
        if vote == 0 and k < 1 + 1e-9: continue
        if p[i] <= 1e-12: continue
        assert preference_loss(d, [vote], k).item() == pytest.approx(-p[i].log().item(), rel=1e-6, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.floats(-20, 20), st.floats(1.01, 20), st.sampled_from([1, -1, 0]))
def test_turning_the_pair_round_turns_the_vote_round(delta, k, vote):
    d = torch.tensor([delta], dtype=torch.float64)
    assert preference_loss(d, [vote], k).item() == pytest.approx(preference_loss(-d, [-vote], k).item(), rel=1e-12)


@pytest.mark.parametrize("vote", [1, -1, 0])
def test_gradient_is_that_of_finite_differences(vote):
    d = torch.linspace(-6, 6, 13, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(preference_loss(d, torch.full((13,), vote), 3.).sum(), d)
    h, x, votes = 1e-5, d.detach(), torch.full((13,), vote)
    slope = (preference_loss(x + h, votes, 3.) - preference_loss(x - h, votes, 3.))/(2*h)
    assert torch.allclose(gradient, slope, atol=1e-8)


def test_k_1_is_bradley_terry_and_the_limit_is_smooth():
    d = torch.linspace(-5, 5, 11)
    assert torch.allclose(preference_loss(d, torch.ones(11), 1.), torch.nn.functional.softplus(-d))
    assert torch.allclose(preference_loss(d, -torch.ones(11), 1. + 1e-6), torch.nn.functional.softplus(d), atol=1e-5)
    assert torch.isfinite(preference_loss(d.requires_grad_(), torch.ones(11), 1.).sum().backward() or d.grad).all()
    with pytest.raises(ValueError, match="ties do not occur"): preference_loss(d, torch.zeros(11), 1.)
    with pytest.raises(ValueError, match="k is 0.5"): preference_loss(d, torch.ones(11), .5)
    with pytest.raises(ValueError, match="a vote is 3"): preference_loss(d, torch.full((11,), 3), 2.)


# --- votes

def test_a_damaged_line_is_named_and_the_others_stand(tmp_path):
    for i in range(5): fv.cast_vote(tmp_path, "Ada", (f"a{i}", f"b{i}"), "first")
    path = fv.rater_file(tmp_path, "Ada")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:40], *lines[3:], '{"vote": "maybe"}']))
    with pytest.warns(UserWarning, match="line 3 is left out") as told: kept = fv.read_votes(tmp_path)
    assert len(kept) == 4 and any("line 6" in str(w.message) for w in told)
    fv.cast_vote(tmp_path, "Ada", ("x", "y"), "same") # the last line had no end
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(fv.read_votes(tmp_path)) == 5


def _cast(job):
    folder, rater, n = job
    for i in range(n): fv.cast_vote(folder, rater, (f"{os.getpid()}-{i}", "b"), "first")


def test_processes_on_one_folder_and_one_file_lose_nothing(tmp_path):
    with ProcessPoolExecutor(4) as pool: list(pool.map(_cast, [(tmp_path, "Ada", 40)]*2 + [(tmp_path, "Emmy", 40)]*2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        votes = fv.read_votes(tmp_path)
    assert sorted(v["rater"] for v in votes) == ["Ada"]*80 + ["Emmy"]*80


KILLED = """import sys
from instructvideo_kit.feedback.votes import cast_vote
for i in range(100000):
    cast_vote(sys.argv[1], "Ada", (f"a{i}", "b"), "first")
    print(i, flush=True)"""

@pytest.mark.parametrize("after", [1, 7, 40])
def test_a_kill_at_any_vote_loses_none_that_was_answered(tmp_path, after):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    said = [int(process.stdout.readline()) for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    said += [int(line) for line in process.stdout.read().split()]
    process.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {v["clips"][0] for v in fv.read_votes(tmp_path)}
    assert {f"a{i}" for i in said} <= found


def test_undo_replace_merge(tmp_path):
    here, there = tmp_path/"here", tmp_path/"there"
    fv.cast_vote(here, "Ada", ("a", "b"), "first")
    fv.cast_vote(here, "Ada", ("a", "b"), "second")
    fv.cast_vote(here, "Ada", ("c", "d"), "same")
    fv.cast_vote(there, "Emmy", ("a", "b"), "first")
    before = fv.rater_file(here, "Ada").read_text()
    fv.undo_vote(here, "Ada")
    assert fv.rater_file(here, "Ada").read_text().startswith(before) # nothing was rewritten
    assert fv.merge_votes(there, here) == 4 and fv.merge_votes(there, here) == 0
    assert [(v["rater"], v["vote"]) for v in fv.read_votes(there)] == [("Ada", "second"), ("Emmy", "first")]
    assert fv.read_votes(here, there) == fv.read_votes(there)
    fv.undo_vote(here, "Ada")
    fv.undo_vote(here, "Ada")
    with pytest.raises(KitError, match="no vote to take back"): fv.undo_vote(here, "Ada")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=4, max_size=40))
def test_agreement_by_definition(pairs):
    "Kappa and alpha against loops over pairs of answers."
    a, b = zip(*pairs)
    expected = np.mean([x == y for x in a for y in b])
    same = np.mean([x == y for x, y in pairs])
    if expected < 1: assert fv.cohen_kappa(a, b) == pytest.approx((same - expected)/(1 - expected))
    everything = [*a, *b]
    n = len(everything)
    chance = np.mean([everything[i] != everything[j] for i in range(n) for j in range(n) if i != j])
    if chance: assert fv.krippendorff_alpha([list(p) for p in pairs]) == pytest.approx(1 - (1 - same)/chance)


# --- pool

def drawn(n=N, seed=0, size=8):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 1, 3, 1, 1, generator=g)*.7 + .3*torch.rand(n, 4, 3, size, size, generator=g)).clamp(0, 1)


def test_votes_for_clips_that_are_gone_or_of_another_model(tmp_path):
    pool = make_pool(tmp_path, drawn(4), list("aabb"), model="mine")
    fv.cast_vote(tmp_path, "Ada", pool.names[:2], "first", model="mine")
    fv.cast_vote(tmp_path, "Ada", ("0"*10, pool.names[0]), "first", model="hers")
    votes = fv.read_votes(tmp_path)
    with pytest.warns(UserWarning, match="1 of 2 votes .* hers"): assert len(votes_in_pool(votes, pool)) == 1
    hers = [v for v in votes if v["model"] == "hers"]
    with pytest.raises(KitError, match="not in this pool"): votes_in_pool(hers, pool)
    (tmp_path/"clips.safetensors").write_bytes(b"x")
    with pytest.raises(KitError, match="cannot be read"): Pool.open(tmp_path)


# --- fit

def world(seed=0):
    "Features of which column 5 is the taste."
    return torch.randn(N, sum(BLOCKS), generator=torch.Generator().manual_seed(seed))


def said(phi, n, seed=0, k=2., noise=0., sign=1.):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, N, n)
    second = (first + rng.integers(1, N, n)) % N
    p = preference_probabilities(sign*3*(phi[first, 5] - phi[second, 5]).double(), k).numpy()*(1 - noise) + noise/3
    return first, second, np.array([rng.choice([1, -1, 0], p=row/row.sum()) for row in p])


def test_more_votes_are_better_and_the_fit_is_fast():
    phi, test = world(), said(world(), 400, 9)
    scores, began = [], time.process_time()
    for n in (20, 80, 320):
        heads = [fit_votes(phi, *said(phi, n, s), BLOCKS) for s in range(2)]
        scores.append(np.mean([accuracy(head, phi, *test)["accuracy"] for head in heads]))
    assert (time.process_time() - began)/6 < 2 # seconds for each fit
    assert scores[0] < scores[-1] and scores[-1] > .88


def test_noise_and_k_are_found():
    phi = world()
    clean, noisy = (fit_votes(phi, *said(phi, 400, 1, 2., e), BLOCKS) for e in (0., .4))
    # a weak taste and carelessness look alike: the estimate is low, but no longer a quarter of the truth
    assert clean.noise < .06 and .14 < noisy.noise < .5
    assert clean.against < .1 and noisy.against > max(.14, 2*clean.against)
    assert fit_votes(phi, *said(phi, 400, 1, 1.2), BLOCKS).k < fit_votes(phi, *said(phi, 400, 1, 6.), BLOCKS).k


def test_leaving_a_vote_out_is_what_a_second_fit_without_it_says():
    from instructvideo_kit.feedback.fit import held_out, newton
    rng = np.random.default_rng(3)
    x, vote = rng.normal(size=(40, 6)), rng.integers(-1, 2, 40)
    rest = 2., np.zeros(6), np.ones(6)
    w, hessian = newton(x, vote, np.ones(40), *rest)
    mean, variance = held_out(x, vote, np.ones(40), 2., w, hessian)
    for n in range(0, 40, 7):
        others = np.arange(40) != n
        again, bend = newton(x[others], vote[others], np.ones(39), *rest)
        assert abs(mean[n] - x[n] @ again) < .03
        assert abs(variance[n]/(x[n] @ np.linalg.solve(bend, x[n])) - 1) < .1
    assert np.abs(mean - x @ w).max() > .2 # and it matters


def test_directions_keep_to_their_block_and_a_block_that_says_nothing_is_closed():
    from instructvideo_kit.feedback.fit import block_directions, directions
    phi = world()
    groups = block_directions(directions(phi, BLOCKS)[2], BLOCKS)
    assert [len(g) for g in groups] == [1, 10, 8] and sorted(np.concatenate(groups)) == list(range(19))
    head = fit_votes(phi, *said(phi, 300, 1), BLOCKS) # the taste is feature 5, in the first of the two blocks
    spread = [head.factor.square().sum(1)[g].mean().item() for g in groups]
    assert spread[2] < spread[1]


def test_few_votes_do_not_accuse_anybody():
    phi, votes = world(), said(world(), 12, 3)
    told = fit_report(fit_votes(phi, *votes, BLOCKS), ["a", "b"], votes[2])
    assert "too few to say how many are careless" in told[0] and not any("contradict each other" in t for t in told)


def test_contradictory_votes_are_told():
    phi, (first, second, vote) = world(), said(world(), 80, 2)
    both = [np.concatenate(x) for x in ((first, second), (second, first), (vote, vote))] # everything, and its opposite
    head = fit_votes(phi, *both, BLOCKS)
    told = fit_report(head, ["a", "b"], both[2], cross_validated(phi, *both, BLOCKS))
    assert any("contradict each other" in t for t in told) and "careless" in told[0]


def test_votes_on_pairs_drawn_at_random_are_counted_by_themselves():
    phi, votes = world(), said(world(), 60, 4)
    whole = cross_validated(phi, *votes, BLOCKS)
    everything = cross_validated(phi, *votes, BLOCKS, random=np.ones(60, dtype=bool))
    decided = int((np.asarray(votes[2]) != 0).sum())
    assert "random" not in whole and everything["random"]["pairs"] == decided == whole["pairs"]
    assert everything["random"]["accuracy"] == pytest.approx(whole["accuracy"])
    some = cross_validated(phi, *votes, BLOCKS, random=np.arange(60) % 5 == 0)
    told = fit_report(fit_votes(phi, *votes, BLOCKS), ["a", "b"], votes[2], some)
    assert some["random"]["pairs"] <= 12 and any("drawn at random" in t for t in told)
    told = fit_report(fit_votes(phi, *votes, BLOCKS), ["a", "b"], votes[2], whole)
    assert not any("drawn at random" in t for t in told)


def test_without_votes_it_is_the_shipped_judge_and_few_votes_do_not_turn_it_round():
    phi = world()
    shipped = phi[:, :2].sum(1)
    def like(head): return torch.corrcoef(torch.stack([head(phi.double()), shipped.double()]))[0, 1].item()
    assert like(prior_head(phi, BLOCKS)) > .99
    assert like(fit_votes(phi, [0], [1], [1], BLOCKS)) > .3


def test_bad_votes_are_refused():
    phi = world()
    with pytest.raises(KitError, match="no votes"): fit_votes(phi, [], [], [], BLOCKS)
    with pytest.raises(KitError, match='all 3 votes are "same"'):
        fit_votes(phi, [0, 1, 2], [3, 4, 5], [0, 0, 0], BLOCKS)
    told = fit_report(prior_head(phi, BLOCKS), ["one"]*4, [1, -1], None)
    assert any("one caption" in t for t in told) and any("too few" in t for t in told)


def test_active_asks_new_pairs_and_learns_at_least_as_fast():
    phi = world()
    test = said(phi, 400, 9, 1.01)
    def learn(active, seed):
        head, asked = prior_head(phi, BLOCKS), []
        for n in range(4):
            candidates = candidate_pairs([""]*N, seed=seed*10 + n, taken=[(a, b) for a, b, _ in asked])
            pairs = active_pairs(head, phi, candidates, 8) if active else candidates[:8]
            asked += [(int(a), int(b), int((phi[a, 5] - phi[b, 5]).sign())) for a, b in pairs]
            head = fit_votes(phi, *zip(*asked), BLOCKS)
        assert len({frozenset(p[:2]) for p in asked}) == 32
        return accuracy(head, phi, *test)["accuracy"]
    assert np.mean([learn(True, s) for s in range(3)]) > np.mean([learn(False, s) for s in range(3)]) - .03


# --- raters and portrait

def test_raters_are_as_careless_and_contrary_as_they_say():
    clips, words = drawn(), [""]*N
    contrary = SimulatedRater("c", taste_of("contrary", warmth)).look(clips, words)
    assert torch.allclose(contrary.utility, -SimulatedRater("w", warmth).look(clips, words).utility)
    order = darkness(clips).argsort()
    lost = SimulatedRater("l", darkness, careless=1.).look(clips, words)
    answers = [lost.answer(int(order[-1]), int(order[0])) for _ in range(600)]
    assert all(.25 < answers.count(a)/600 < .42 for a in fv.VOTES)
    with pytest.raises(KitError, match="careless is 2"): SimulatedRater("x", motion, careless=2)
    with pytest.raises(KitError, match="did you mean"): taste_of("larg")


def test_portrait_tells_the_taste_and_admits_what_it_cannot_know():
    clips, phi = drawn(), world()
    phi[:, 5] = (warmth(clips) - warmth(clips).mean())/warmth(clips).std()
    known = portrait(fit_votes(phi, *said(phi, 200, 1), BLOCKS), phi, clips, [""]*N)
    warm, = [t for t in known.traits if t.name == "warm colours"]
    assert warm.low > 0 and known.traits[0].name == "warm colours"
    dice = np.random.default_rng(0).integers(-1, 2, 20)
    nothing = portrait(fit_votes(phi, *said(phi, 20, 1)[:2], dice, BLOCKS), phi, clips, [""]*N)
    assert sum(t.told for t in nothing.traits) <= 1 and "cannot" in str(nothing)
    other = portrait(fit_votes(phi, *said(phi, 200, 1, sign=-1.), BLOCKS), phi, clips, [""]*N)
    assert [t for t in other.traits if t.name == "warm colours"][0].high < 0


# --- reward

@pytest.fixture(scope="module")
def session(tmp_path_factory):
    from instructvideo_kit.feedback.session import VoteSession
    folder = tmp_path_factory.mktemp("feedback")/"pool"
    words = [f"a fox walking to the left in the {p}" for p in ("meadow", "snow")]*10
    make_pool(folder, drawn(20, size=24), words, model="drawn")
    session = VoteSession(folder, "Ada", votes=16)
    ada = SimulatedRater("Ada", warmth).look(session.pool.pixels(), session.pool.captions)
    while (pair := session.pair()) is not None: session.vote(ada.answer(*pair))
    return session


def test_reward_opens_through_every_door_and_has_a_gradient(session, tmp_path):
    from instructvideo_kit.reward.clip import ClipReward
    from instructvideo_kit.reward.videoscore import VideoScoreReward
    reward = session.reward(session.fit())
    reward.save_pretrained(tmp_path/"mine")
    clips = session.pool.pixels([0, 1])*.8 + .1 # away from 0 and 1, where clamping would bend the slope
    words = session.pool.captions[:2]
    for door in (ClipReward, VideoScoreReward):
        again = door.from_pretrained(tmp_path/"mine")
        assert torch.allclose(again(clips, words), reward(clips, words), atol=1e-5)
        assert again(clips, words).shape == (2, 4)
    x = clips.clone().requires_grad_()
    reward(x, words).sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad.abs().amax((2, 3, 4)) > 0).all()
    exact = ClipReward.from_pretrained(tmp_path/"mine", dtype=torch.float64)
    x = clips.double().requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = 2e-5 # small: features that change have kinks
    slope = (torch.autograd.grad(exact.score(x, words).sum(), x)[0]*direction).sum().item()
    def step(h): return exact.score(x.detach() + h*direction, words).sum().item()
    assert (step(h) - step(-h))/(2*h) == pytest.approx(slope, rel=.03, abs=.03)
    with torch.no_grad(): liked = reward.score(session.pool.pixels(), session.pool.captions)
    assert np.corrcoef(liked, warmth(session.pool.pixels()))[0, 1] > .7 # of clips like those voted on, no others


def test_a_reward_of_other_judges_is_refused(session, tmp_path):
    from instructvideo_kit.feedback.reward import VoteReward
    reward = session.reward(session.fit())
    reward.save_pretrained(tmp_path)
    about = json.loads((tmp_path/"kit.json").read_text())
    (tmp_path/"kit.json").write_text(json.dumps(about | {"stamp": "0"*12}))
    with pytest.raises(KitError, match="fit it anew"): VoteReward.from_pretrained(tmp_path)
    (tmp_path/"kit.json").write_text(json.dumps(about | {"class": ["os", "system"]}))
    from instructvideo_kit.reward.clip import ClipReward
    with pytest.raises(KitError, match="expected one of instructvideo_kit"): ClipReward.from_pretrained(tmp_path)
    (tmp_path/"kit.json").write_text(json.dumps({k: v for k, v in about.items() if k != "judges"}))
    with pytest.raises(KitError, match='has no "judges"'): VoteReward.from_pretrained(tmp_path)


def test_a_session_goes_on_where_it_was_closed(session):
    from instructvideo_kit.feedback.session import VoteSession
    again = VoteSession(session.folder, "ADA", votes=17)
    assert len(again.mine()) == 16 and again.pair() is not None
    assert VoteSession(session.folder, "Emmy", votes=2).mine() == []


def test_a_plan_has_an_end_and_no_more_pairs(session, tmp_path):
    from instructvideo_kit.feedback.blind import blind_pairs
    from instructvideo_kit.feedback.session import VoteSession, next_step, write_plan
    from instructvideo_kit.widgets.voting import PoolBallot, Voting
    clips, words = drawn(6, size=24), [f"a fox in the {p}" for p in ("sea", "sky", "snow")]
    _, plan = blind_pairs(tmp_path/"blind", clips[:3], clips[3:], words, 3, 0)
    write_plan(tmp_path/"blind", plan)
    page = Voting(PoolBallot(VoteSession(tmp_path/"blind", "me")))
    for _ in plan: page.receive(dict(kind="vote", side="left", number=page.pair["number"]))
    assert page.pair["done"] == 3 and not page.pair["more"] and not page.pair["clips"]
    assert page.pair["question"].endswith(next_step(tmp_path/"blind", "me"))
    page.receive(dict(kind="more", number=page.pair["number"])) # from a page that is older than the plan
    assert page.pair["clips"] == [] and not page.notice
    assert next_step(session.folder, "Ada").endswith("--rater Ada") and "--rater" not in next_step(session.folder, "me")


def test_pairs_that_look_alike_do_not_hide_who_won():
    from instructvideo_kit.feedback.blind import WinRate, wilson
    def told(wins, same, losses):
        n = wins + same + losses
        return str(WinRate((wins + same/2)/n, *wilson(wins + same/2, n), wins, same, losses))
    assert "of the 8 decided 100 % (68 .. 100): preferred" in told(8, 12, 0)
    assert "disliked" in told(0, 12, 8) and "no difference can be told" in told(1, 19, 0)
    assert "all pairs look alike" in told(0, 20, 0)


def test_tuning_takes_the_only_reward_there_is_and_names_those_it_could_take(session, tmp_path):
    from instructvideo_kit.feedback.commands import tune_reward
    with pytest.raises(KitError, match="feedback train makes one"): tune_reward(tmp_path, None, [])
    for name in ("ada", "grace"): session.reward(session.fit()).save_pretrained(tmp_path/"reward"/name)
    with pytest.raises(KitError, match="those of ada, grace: give --rater"): tune_reward(tmp_path, None, [])
    with pytest.raises(KitError, match='no reward "emmy"'): tune_reward(tmp_path, None, [], "emmy")


# --- the page without a browser

def test_voting_page_drops_answers_to_a_pair_that_is_gone(session):
    from instructvideo_kit.feedback.session import VoteSession
    from instructvideo_kit.widgets.voting import PoolBallot, Voting
    page = Voting(PoolBallot(VoteSession(session.folder, "Grace", votes=3)))
    first = page.pair["number"]
    for _ in range(5): page.receive(dict(kind="vote", side="right", number=first))
    assert page.pair["done"] == 1
    page.receive(dict(kind="vote", side="up", number=page.pair["number"]))
    assert 'the side is "up"' in page.notice and page.pair["done"] == 1
    page.receive(dict(kind="undo", number=page.pair["number"]))
    assert page.pair["done"] == 0 and not page.notice and "image/png" in page._repr_mimebundle_()[0]
