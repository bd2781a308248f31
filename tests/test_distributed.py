"Two processes are one: the same gradient, disjoint data, and a lost process that torchrun starts again. Gloo on the loopback, no GPU."
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from instructvideo_kit.tuning import rwr
from instructvideo_kit.tuning.instructvideo import InstructVideo, InstructVideoConfig, tune
from instructvideo_kit.tuning.trainer import RunFolder, read_log

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from test_tuning import SMALL, open_policy, redness, some_clips  # noqa: E402
from tiny import tiny_pipeline  # noqa: E402

CONFIG = InstructVideoConfig(**{**SMALL, "batch": 8, "guidance_scale": 3., "augment_shift": 1, "augment_noise": .1, "offset_noise": .1, "save_every": 1})
DRAWN = rwr.RWRConfig(n_ddim=2, guidance_scale=1., batch=8, rank=2, lr=1e-2, steps=2, save_every=2, n_samples=8, epochs=2, inverse_temperature=5.)


def record(tune, Algorithm, data, config, folder, run, reward=redness, **options):
    "Tune in double precision; the gradients before each optimiser step and the positions this process saw."
    seen, gradients, call = [], [], Algorithm.__call__
    def watched(self, positions): seen.extend(positions); return call(self, positions)
    def keep(optimizer, args, kwargs): gradients.append(torch.cat([p.grad.flatten().clone() for g in optimizer.param_groups for p in g["params"]]))
    hook, Algorithm.__call__ = register_optimizer_step_pre_hook(keep), watched
    try: tune(open_policy(folder).to(torch.float64), reward, data, config, run, progress=False, **options)
    finally: hook.remove(); Algorithm.__call__ = call
    return {"seen": seen, "gradients": gradients}


def worker(folder, out):
    "What each of the two processes does. In the first life of rank 1 its third step is its last."
    torch.set_num_threads(1)
    rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    clips = some_clips(open_policy(folder))
    if life == 0: torch.save(record(rwr.tune, rwr.RWR, [p for _, p in clips], DRAWN, folder, out/"rwr"), out/f"rwr-{rank}.pt")
    def judge(frames, prompts):
        if (rank, life) == (1, 0) and len(read_log(out/"run")) == 2: os.kill(os.getpid(), signal.SIGKILL)
        return redness(frames, prompts)
    judge.__name__ = "redness" # a run goes on with the judge it began with
    torch.save(record(tune, InstructVideo, clips, CONFIG, folder, out/"run", judge, resume=True), out/f"run-{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "One launch of two processes, with one restart allowed."
    home = tmp_path_factory.mktemp("two")
    folder = tiny_pipeline(home/"policy", prediction_type="v_prediction", vae="patch")
    with socket.create_server(("127.0.0.1", 0)) as s: port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "1", "--master_addr", "127.0.0.1",
               "--master_port", str(port), str(HERE/"test_distributed.py"), str(folder), str(home)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, home


def close(parts, whole, bound=1e-5):
    "Relative difference of the gradients of the first step, printed (pytest -rP)."
    difference = ((parts[0] - whole).norm()/whole.norm()).item()
    print(f"relative difference: {difference:.1e}")
    return whole.norm() > 0 and all(torch.equal(p, parts[0]) for p in parts) and difference < bound


@pytest.mark.parametrize("name", ["run", "rwr"])
def test_two_processes_of_4_clips_give_the_gradient_of_8(two, tmp_path, name):
    folder, home = two
    clips = some_clips(open_policy(folder))
    args = (rwr.tune, rwr.RWR, [p for _, p in clips], DRAWN) if name == "rwr" else (tune, InstructVideo, clips, CONFIG)
    alone, ranks = record(*args, folder, tmp_path/"alone"), [torch.load(home/f"{name}-{r}.pt", weights_only=True) for r in (0, 1)]
    last = [r["gradients"][-1] for r in ranks]
    assert close(last, alone["gradients"][-1]) # of the last step: everything before it has gone into the weights
    first = len(alone["gradients"]) - len(ranks[0]["gradients"]) # a restarted run goes on at its last checkpoint
    assert close([r["gradients"][0] for r in ranks], alone["gradients"][first])
    assert not set(ranks[0]["seen"]) & set(ranks[1]["seen"]) and sorted(ranks[0]["seen"] + ranks[1]["seen"]) == alone["seen"][8*first:]
    a, b = ([r["loss"] for r in read_log(path)] for path in (home/name, tmp_path/"alone"))
    assert a == pytest.approx(b, rel=1e-4) and len(a) == args[3].steps


def test_a_lost_process_costs_what_came_after_the_last_checkpoint(two):
    _, home = two
    again = torch.load(home/"run-1.pt", weights_only=True)
    assert again["seen"][0] == 2*8 + 4 # the second life of rank 1 began with step 3, the one it died in
    assert [r["step"] for r in read_log(home/"run")] == [1, 2, 3, 4] and len(RunFolder(home/"run").checkpoints()) == 4


if __name__ == "__main__": worker(*map(Path, sys.argv[1:]))
