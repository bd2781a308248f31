"What every test gets: no network, few threads, its tier, and the folder of shared data where there is one."
import importlib.util
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2") # before torch is imported: two cores, one process
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ROOT/"tools/offline"

# Tiers by file, so that they can be read in one place; a single test says it itself: @pytest.mark.slow.
# Slow are files that take over half a minute on two cores; `make check` leaves them out, `make test` runs everything.
TIERS = {
    "browser": ("test_browser_canvas", "test_browser_tutorials"),
    "slow": (
        "test_algorithms", "test_check", "test_check_algorithms", "test_claims", "test_cli", "test_cost", "test_demo",
        "test_distributed", "test_interactive", "test_kills", "test_new_algorithm", "test_policies",
        "test_policy_files", "test_reward_clip", "test_scoreboard", "test_sixtyfour", "test_training_widgets",
        "test_tuning", "test_tutorials_other_policy", "test_watch")}


def pytest_collection_modifyitems(items):
    "Give each test the marks of its file."
    for item in items:
        for mark, files in TIERS.items():
            if item.path.stem in files: item.add_marker(getattr(pytest.mark, mark))
        if item.get_closest_marker("gpu") and not cuda(): item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def cuda():
    "Is there a card that torch can use? Asked only where a test wants one."
    import torch
    return torch.cuda.is_available()


def _load_block():
    "The same block that the notebooks run under; through PYTHONPATH the processes that tests start inherit it."
    spec = importlib.util.spec_from_file_location("kit_offline", OFFLINE/"sitecustomize.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec)) # its last line closes the network
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(OFFLINE) not in paths: os.environ["PYTHONPATH"] = os.pathsep.join([str(OFFLINE), *filter(None, paths)])
    return module.block


_block = _load_block()


@pytest.fixture(autouse=True)
def no_network():
    "Loopback and unix sockets work, everything else is refused."
    _block()


@pytest.fixture(scope="session")
def shared():
    "The folder of papers and real clips that may lie beside the repository."
    folder = ROOT.parent/"shared"
    if not folder.is_dir(): pytest.skip(f"there is no {folder.name}/ folder beside the repository")
    return folder
