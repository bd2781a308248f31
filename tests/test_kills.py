"Twenty kills at random moments, many while a checkpoint is being written: the log is that of a run nobody touched."
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from instructvideo_kit.tuning import trainer
from instructvideo_kit.tuning.algorithm import tune
from instructvideo_kit.tuning.instructvideo import InstructVideoConfig
from instructvideo_kit.tuning.online_dpo import OnlineDPOConfig
from instructvideo_kit.tuning.rollouts import clip_judge
from instructvideo_kit.tuning.run_folder import RunFolder, complete, read_log
from instructvideo_kit.tuning.watch import held_out_evaluation

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from test_tuning import SMALL, open_policy, redness, some_clips  # noqa: E402
from tiny import tiny_pipeline  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork a process")
quick_dump = trainer.dump
KILLS, PAUSE, FOREVER = 10, .04, 10**6 # kills of each run; seconds in the middle of writing a file; steps
DRAWN = {k: v for k, v in SMALL.items() if k not in ("tau", "clamp")}
RUNS = { # dropout draws from a global generator; of online DPO the reference belongs to the state too
    "instructvideo": InstructVideoConfig(**{
        **SMALL, "steps": FOREVER, "dropout": True, "augment_noise": .05, "ema_decay": .9, "eval_every": 3,
        "sample_every": 5}),
    "onlinevpo": OnlineDPOConfig(**{
        **DRAWN, "n_ddim": 2, "steps": FOREVER, "save_every": 1, "n_candidates": 2, "ref_update_every": 2})}


def slow_dump(value, path, dump=trainer.dump):
    "`dump` with a long moment at which half of the file is there."
    dump(value, path)
    data = Path(path).read_bytes()
    with open(path, "wb") as f:
        f.write(data[:len(data)//2])
        f.flush()
        time.sleep(PAUSE)
        f.write(data[len(data)//2:])


def fork(work):
    "Do it in a copy of this process; its id."
    if pid := os.fork(): return pid
    try: work()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def whole(pid): assert os.waitpid(pid, 0)[1] == 0


def writing(run, since):
    "Whether a checkpoint is being written that was begun after a moment."
    try: return any(p.stat().st_mtime > since for p in (run/"checkpoints").glob("*.tmp"))
    except FileNotFoundError: return False


def nursery(name, folder, home):
    "Imports once; then raises copies of itself that tune, and kills them. Notes after each kill go to notes.json."
    torch.set_num_threads(1)
    config = RUNS[name]
    policy = open_policy(folder)
    data, rng, run, notes = some_clips(policy), random.Random(name), home/"killed", []
    evaluate = held_out_evaluation(["a red dog", "a blue bird"],
                                   {"reward": clip_judge(redness), "second": clip_judge(lambda f, p: -redness(f, p))},
                                   2)
    def life(path, config=config, dump=slow_dump, **options):
        trainer.dump = dump
        tune(name, policy, redness, data, config, path, resume=True, evaluate=evaluate, progress=False, **options)
    # imports what is imported late
    tune(name, open_policy(folder), redness, data, config, home/"warm", progress=False, stop_after=1)
    start = time.perf_counter()
    whole(fork(lambda: life(home/"pace", stop_after=4)))
    pace = time.perf_counter() - start
    while len(notes) < KILLS:
        born, pid = time.time(), fork(lambda: life(run))
        if len(notes) % 2: time.sleep(rng.uniform(0, 1)*pace)
        else: # while a checkpoint is being written
            while not writing(run, born): time.sleep(.002)
            time.sleep(rng.uniform(0, 1)*PAUSE)
        os.kill(pid, 9)
        killed = os.waitpid(pid, 0)[1] == 9
        there = list((run/"checkpoints").glob("*"))
        saved = max([0, *(int(p.name[5:11]) for p in there if p.suffix != ".tmp")])
        notes.append({"killed": killed, "rows": len(read_log(run)), "saved": saved,
                      "torn": any(p.suffix == ".tmp" for p in there),
                      "whole": all(complete(p) for p in there if p.suffix != ".tmp")})
    end = replace(config, steps=notes[-1]["rows"] + 3)
    whole(fork(lambda: life(run, end)))
    whole(fork(lambda: life(home/"straight", end, quick_dump)))
    (home/"notes.json").write_text(json.dumps(notes))


@pytest.fixture(scope="module", params=RUNS)
def home(request, tmp_path_factory):
    home = tmp_path_factory.mktemp(request.param)
    folder = tiny_pipeline(home/"policy", prediction_type="v_prediction", vae="patch")
    done = subprocess.run([sys.executable, str(HERE/"test_kills.py"), request.param, str(folder), str(home)],
                          env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return home


def figures(rows): return [{k: v for k, v in row.items() if k not in ("seconds", "memory_mb")} for row in rows]


def test_the_log_is_that_of_an_uninterrupted_run(home):
    killed, straight = (figures(read_log(home/name, None)) for name in ("killed", "straight"))
    assert killed == straight and len(straight) > 3
    def samples(name):
        return [(p.name, p.read_bytes()) for p in sorted((home/name).glob("samples/*"))]
    assert samples("killed") == samples("straight")
    places = [home/name/"best.json" for name in ("killed", "straight")]
    best = [json.loads(place.read_text()) for place in places if place.exists()]
    if not home.name.startswith("onlinevpo"):
        assert best[0] == best[1] and (home/"killed"/best[0]["lora"]).is_dir()
        assert len(read_log(home/"killed", "eval")) > 1
    # not bytes: the header's order is free
    one, other = (load_file(home/name/"lora/pytorch_lora_weights.safetensors") for name in ("killed", "straight"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_every_kill_was_one_and_cost_what_came_after_the_last_checkpoint(home):
    notes = json.loads((home/"notes.json").read_text())
    there = [(home/f"killed/checkpoints/step-00000{i}").exists() for i in (1, 2)]
    every = 2 if there == [False, True] else 1
    print([(n["rows"], n["saved"], n["torn"]) for n in notes])
    assert len(notes) == KILLS and all(n["killed"] for n in notes)
    assert all(0 <= n["rows"] - n["saved"] <= every for n in notes) # a row is written before its checkpoint
    saved = [n["saved"] for n in notes]
    assert saved == sorted(saved) and saved[-1] > 0


def test_half_written_checkpoints_were_left_behind_and_never_loaded(home):
    notes = json.loads((home/"notes.json").read_text())
    assert sum(n["torn"] for n in notes) >= 3 and all(n["whole"] for n in notes)
    assert all(complete(p) for p in RunFolder(home/"killed").checkpoints())
    assert not list((home/"killed/checkpoints").glob("*.tmp"))


if __name__ == "__main__": nursery(sys.argv[1], *map(Path, sys.argv[2:]))
