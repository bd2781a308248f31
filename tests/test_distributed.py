"Two processes are one: the same gradient, disjoint data, split weights, a run that loses a process. No GPU."
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from instructvideo_kit.files import KitError, shipped
from instructvideo_kit.tuning import algorithm as start
from instructvideo_kit.tuning.algorithm import find, tune
from instructvideo_kit.tuning.instructvideo import InstructVideoConfig
from instructvideo_kit.tuning.run_folder import RunFolder, read_log
from instructvideo_kit.tuning.rwr import RWRConfig

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from test_tuning import SMALL, open_policy, redness, some_clips  # noqa: E402
from tiny import tiny_pipeline  # noqa: E402

CONFIG = InstructVideoConfig(**{**SMALL, "batch": 8, "guidance_scale": 3., "augment_shift": 1, "augment_noise": .1,
                                "offset_noise": .1, "save_every": 1})
SPLIT = replace(CONFIG, steps=2, merge_lora=False, checkpoint_blocks=True)
BEGUN = {"grown": replace(CONFIG, steps=2), "odd": replace(CONFIG, steps=2, batch=3),
         "dropout": replace(CONFIG, steps=2, dropout=True)}
DRAWN = RWRConfig(n_ddim=2, guidance_scale=1., batch=8, rank=2, lr=1e-2, steps=2, save_every=2, n_samples=8, epochs=2,
                  inverse_temperature=5.)


def record(name, data, config, folder, run, reward=redness, **options):
    "Tune in double precision; the gradients before each optimiser step and the positions this process saw."
    seen, gradients, Algorithm = [], [], find(name)
    call = Algorithm.step
    def watched(self, positions):
        seen.extend(positions)
        return call(self, positions)
    def keep(optimizer, args, kwargs):
        gradients.append(torch.cat([p.grad.flatten().clone() for g in optimizer.param_groups for p in g["params"]]))
    hook, Algorithm.step = register_optimizer_step_pre_hook(keep), watched
    try: tune(name, open_policy(folder).to(torch.float64), reward, data, config, run, progress=False, **options)
    finally:
        hook.remove()
        if name == "instructvideo": Algorithm.step = call
        else: del Algorithm.step # it has the base class's
    return {"seen": seen, "gradients": gradients}


def split_and_count(policy, accelerator, out, split=start.split_frozen):
    "split_frozen, and a note of the share of weights that is left in this process."
    before = sum(p.numel() for p in policy.network.parameters())
    split(policy, accelerator)
    kept = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in policy.network.parameters())
    (out/f"kept-{accelerator.process_index}.txt").write_text(f"{kept/before}")


def begin(home, name, folder):
    "One process makes the first step of a run that two are to go on with."
    clips = some_clips(open_policy(folder))
    record("instructvideo", clips, BEGUN[name], folder, home/name, stop_after=1)


def go_on(name, clips, folder, out, rank):
    "Two processes go on with what one began; what they are told goes into a file."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try: record("instructvideo", clips, BEGUN[name], folder, out/name, resume=True)
        except KitError as error: told = [str(error)]
        else: told = [str(w.message) for w in caught]
    (out/f"{name}-{rank}.json").write_text(json.dumps(told))


def worker(folder, out):
    "What each of the two processes does. Rank 1 does not survive the third step of the last run."
    torch.set_num_threads(1)
    rank, clips = int(os.environ["RANK"]), some_clips(open_policy(folder))
    def keep(name, *args): torch.save(record(*args, folder, out/name), out/f"{name}-{rank}.pt")
    keep("rwr", "rwr", [p for _, p in clips], DRAWN)
    keep("run", "instructvideo", clips, CONFIG)
    start.wants_split, start.split_frozen = lambda accelerator: True, partial(split_and_count, out=out)
    keep("split", "instructvideo", clips, SPLIT)
    start.wants_split = lambda accelerator: False
    for name in ("grown", "odd", "dropout"): go_on(name, clips, folder, out, rank)
    def judge(frames, prompts):
        if rank == 1 and len(read_log(out/"lost")) == 2: os.kill(os.getpid(), signal.SIGKILL)
        return redness(frames, prompts)
    judge.__name__ = "redness" # a run goes on with the judge it began with
    record("instructvideo", clips, CONFIG, folder, out/"lost", judge)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "One launch of two processes, of which one is lost in the end."
    home = tmp_path_factory.mktemp("two")
    folder = tiny_pipeline(home/"policy", prediction_type="v_prediction", vae="patch")
    with socket.create_server(("127.0.0.1", 0)) as s: port = s.getsockname()[1]
    for name in BEGUN: begin(home, name, folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
               "--master_port", str(port), str(HERE/"test_distributed.py"), str(folder), str(home)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
           "CUDA_VISIBLE_DEVICES": ""} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1 and "SIGKILL" in done.stderr and (home/"split-1.pt").exists(), done.stderr[-3000:]
    return folder, home


def relative(parts, whole):
    "Difference of the processes' gradient, which must be one, from the whole batch's; printed (pytest -rP)."
    assert whole.norm() > 0 and all(torch.equal(p, parts[0]) for p in parts)
    difference = ((parts[0] - whole).norm()/whole.norm()).item()
    print(f"relative difference: {difference:.1e}")
    return difference


@pytest.mark.parametrize("name", ["run", "rwr", "split"])
def test_two_processes_of_4_clips_give_the_gradient_of_8(two, tmp_path, name):
    folder, home = two
    clips = some_clips(open_policy(folder))
    drawn = name == "rwr"
    args = ("rwr", [p for _, p in clips], DRAWN) if drawn else ("instructvideo", clips,
        {"run": CONFIG, "split": SPLIT}[name])
    alone, ranks = record(*args, folder, tmp_path/"alone"), [torch.load(home/f"{name}-{r}.pt",
        weights_only=True) for r in (0, 1)]
    for step in (0, -1): # before the last one everything has gone into the weights once
        assert relative([r["gradients"][step] for r in ranks], alone["gradients"][step]) < 1e-5
    assert not set(ranks[0]["seen"]) & set(ranks[1]["seen"])
    assert sorted(ranks[0]["seen"] + ranks[1]["seen"]) == alone["seen"]
    a, b = ([r["loss"] for r in read_log(path)] for path in (home/name, tmp_path/"alone"))
    assert a == pytest.approx(b, rel=1e-4) and len(a) == args[2].steps


def test_a_run_that_lost_a_process_goes_on_with_one(two):
    "It costs what came after the last checkpoint, and the numbers are those of the run that lost nobody."
    folder, home = two
    assert [p.name for p in RunFolder(home/"lost").checkpoints()] == ["step-000001",
        "step-000002"] and len(read_log(home/"lost")) == 2
    with pytest.warns(UserWarning, match="made by 2 processes, now there is 1: same clips, same noise, the same steps"):
        rest = record("instructvideo", some_clips(open_policy(folder)), CONFIG, folder, home/"lost", resume=True)
    assert rest["seen"] == list(range(2*8, 4*8)) # from step 3, the one it was lost in
    assert [r["loss"] for r in read_log(home/"lost")] == pytest.approx([r["loss"] for r in read_log(home/"run")],
        rel=1e-4)


def told(home, name):
    "What both processes were told, together."
    return [line for rank in (0, 1) for line in json.loads((home/f"{name}-{rank}.json").read_text())]


def test_two_processes_go_on_exactly_with_what_one_began_and_say_so(two):
    _, home = two
    assert [line for line in told(home, "grown") if "the same steps up to rounding" in line] == [
        f"{home/'grown'/'checkpoints'/'step-000001'} was made by 1 process, now there are 2: same clips, same noise, "
        "the same steps up to rounding"] # the first process says it, once
    want = [r["loss"] for r in read_log(home/"run")[:2]]
    assert [r["loss"] for r in read_log(home/"grown")] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name, says", [("odd", "batch is 3, expected a multiple of 2 processes x 1 micro-batches"),
                                        ("dropout", "with dropout the steps would be others; start 1 again")])
def test_what_another_number_of_processes_would_change_is_refused(two, name, says):
    _, home = two
    lines = told(home, name)
    assert len(lines) == 2 and all(says in line for line in lines)
    assert len(read_log(home/name)) == 1 # what was there is still there


def test_each_process_keeps_half_of_the_frozen_weights(two):
    _, home = two
    assert all(.5 <= float((home/f"kept-{r}.txt").read_text()) < .55 for r in (0, 1)) # and all of the LoRA


def test_what_split_weights_cannot_do_is_said_before_a_folder_is_made(tmp_path, monkeypatch, two):
    monkeypatch.setattr(start, "wants_split", lambda accelerator: True)
    policy = open_policy(two[0])
    for options, says in ((dict(merge_lora=True), "merge_lora=false"),
                          (dict(merge_lora=False, compile=True), "compile is on")):
        config = replace(CONFIG, **options)
        with pytest.raises(KitError, match=says):
            tune("instructvideo", policy, redness, some_clips(policy), config, tmp_path/"no", progress=False)
    assert not (tmp_path/"no").exists()


@pytest.mark.parametrize("name, kind", [("ddp_4xa100", "MULTI_GPU"), ("fsdp_4xa100", "FSDP")])
def test_accelerate_reads_the_shipped_files_and_they_are_no_presets(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file
    presets = shipped("preset")
    config = load_config_from_file(str(presets["instructvideo"].parent/"accelerate"/f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.num_processes == 4
    assert name not in presets
    assert "accelerate" not in presets


if __name__ == "__main__": worker(*map(Path, sys.argv[1:]))
