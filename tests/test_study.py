"""The user study: blinding, sides, votes that survive, counts with intervals, agreement by published numbers, the page
without a browser."""
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from instructvideo_kit.files import KitError
from instructvideo_kit.widgets import study as st

CAPTIONS = [f"caption {i}" for i in range(5)]


@pytest.fixture()
def folder(tmp_path):
    clips = torch.rand(5, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return st.make_study(tmp_path/"study", {"ours": clips, "base": clips*.5}, CAPTIONS)


def answer_all(folder, rater, choose):
    "Vote on every pair: choose(pair, key) -> name of a system or 'tie'."
    key = json.loads((folder/"key.json").read_text())["pairs"]
    for pair, swapped in st.order_for(st.open_study(folder), rater):
        won = choose(pair, key)
        side = "same" if won == "tie" else ("left" if (key[pair["pair"]][0] == won) != swapped else "right")
        st.vote(folder, rater, pair, swapped, {"quality": side, "alignment": "same"})


def test_files_that_raters_see_are_blind(folder):
    plan = (folder/"study.json").read_text()
    assert "ours" not in plan and "base" not in plan
    assert not any(n in p.name for p in (folder/"clips").iterdir() for n in ("ours", "base"))
    firsts = {first for first, _ in json.loads((folder/"key.json").read_text())["pairs"].values()}
    assert firsts == {"ours", "base"} # nor does the order within a pair tell


def test_sides_and_order_differ_between_raters_and_stay_for_one(folder):
    study = st.open_study(folder)
    orders = [[(p["pair"], s) for p, s in st.order_for(study, name)] for name in "abcdefgh"]
    assert len({tuple(o) for o in orders}) > 5 and orders[0] == [(p["pair"], s) for p, s in st.order_for(study, "A")]
    left = np.mean([s for o in orders for _, s in o])
    assert .25 < left < .75


@pytest.mark.parametrize("favourite, lead", [("ours", 1.), ("base", -1.), ("tie", 0.)])
def test_counts_follow_the_votes_whatever_side_a_clip_was_on(folder, favourite, lead):
    for rater in ("Ada", "Emmy"): answer_all(folder, rater, lambda pair, key: favourite)
    key = json.loads((folder/"key.json").read_text())["pairs"]
    t = st.tally(st.read_votes(folder), key, "quality", "ours", "base")
    assert t["lead"] == (lead, lead, lead) and (t["votes"], t["pairs"]) == (10, 5)
    assert st.tally(st.read_votes(folder), key, "quality", "base", "ours")["lead"][0] == -lead


def test_intervals_are_over_pairs_not_votes(folder):
    "Ten raters who all say the same of each pair are no more than five pairs."
    def choose(pair, key): return "ours" if pair["caption"] in CAPTIONS[:3] else "base"
    for n in range(10): answer_all(folder, f"rater {n}", choose)
    key = json.loads((folder/"key.json").read_text())["pairs"]
    _, low, high = st.tally(st.read_votes(folder), key, "quality", "ours", "base")["win"]
    assert high - low > .5
    assert st.agreement(st.read_votes(folder), "quality") > .2
    assert np.isnan(st.agreement(st.read_votes(folder), "alignment")) # all ties: nothing to disagree on


def test_alpha_of_krippendorffs_own_example():
    """Four observers, twelve units, missing values: .743 for nominal data (Krippendorff 2011, Computing Krippendorff's
    Alpha-Reliability)."""
    seen = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."]
    items = [[v for v in unit if v != "."] for unit in zip(*(s.split() for s in seen))]
    assert st.krippendorff_alpha(items) == pytest.approx(.743, abs=5e-4)


def test_votes_of_many_raters_at_once_are_all_there(folder):
    def one(n): answer_all(folder, f"rater {n}", lambda pair, key: "tie")
    with ThreadPoolExecutor(8) as pool: list(pool.map(one, range(8)))
    votes = st.read_votes(folder)
    assert len(votes) == 80 and len({(v["rater"], v["pair"], v["question"]) for v in votes}) == 80


def press(page, kind, side=None):
    page.voting.receive({"kind": kind, "side": side, "number": page.voting.pair["number"]})


def test_a_page_goes_on_where_it_was_closed(folder):
    page = st.StudyPage(folder, "Ada")
    first = page.ballot.current
    press(page, "vote", "same")
    assert page.ballot.current[0]["pair"] == first[0]["pair"]
    assert page.ballot.current[2] != first[2] # its second question
    press(page, "vote", "left")
    again = st.StudyPage(folder)
    assert again.voting is None and "type your name" in again.note.value
    again.rater.value = "ada"
    assert again.ballot.current == page.ballot.current and again.voting.pair["done"] == 2
    press(again, "undo")
    press(again, "undo")
    assert again.ballot.current == first
    while again.ballot.current: press(again, "vote", "left")
    assert "done" in again.voting.pair["question"] and again.voting.pair["clips"] == []


def test_captions_and_names_in_any_script_go_through_the_study(tmp_path):
    said = ["一只红色的猫", "🦊 in the snow", "قطة حمراء تمشي"]
    clips = torch.rand(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    folder = st.make_study(tmp_path/"猫 study", {"ours": clips, "base": clips*.5}, said)
    answer_all(folder, "أمل 🐈", lambda pair, key: "ours")
    assert sorted(pair["caption"] for pair, _ in st.order_for(st.open_study(folder), "أمل 🐈")) == sorted(said)
    votes = st.read_votes(folder)
    assert len(votes) == 6 and {v["caption"] if "caption" in v else v["captions"][0] for v in votes} == set(said)


def test_the_page_shows_the_clips_on_the_sides_that_are_counted(folder):
    page = st.StudyPage(folder, "Emmy")
    key = json.loads((folder/"key.json").read_text())["pairs"]
    pair, swapped, _ = page.ballot.current
    left = page.ballot.show()["clips"][0]
    darker = left.mean() < page.ballot.show()["clips"][1].mean() # the base's clips are half as bright
    assert darker == (key[pair["pair"]][1 if swapped else 0] == "base")


def test_bad_input(folder, tmp_path):
    with pytest.raises(KitError, match="no study"): st.open_study(tmp_path)
    with pytest.raises(KitError, match="nobody has voted"): st.outcome(folder)
    answer_all(folder, "Ada", lambda pair, key: "ours")
    path = st.rater_file(folder, "Ada")
    path.write_text(path.read_text() + '{"pair": "x')
    with pytest.warns(UserWarning, match="line 11 is left out"): assert len(st.read_votes(folder)) == 10
    next((folder/"clips").iterdir()).unlink()
    gone = st.StudyBallot(folder, "Mary")
    with pytest.raises(KitError, match="is gone"): [(gone.show(), gone.vote("same")) for _ in range(10)]
    (folder/"study.json").write_text("{") 
    with pytest.raises(KitError, match="damaged"): st.StudyPage(folder)
    (folder/"study.json").write_text('{"version": 2}')
    with pytest.raises(KitError, match="version 2"): st.open_study(folder)
    with pytest.raises(KitError, match="at least two"):
        st.make_study(tmp_path/"one", {"a": torch.rand(1, 3, 3, 8, 8)}, ["x"])
