"What every test gets: no network, few threads, and the folder of shared data where there is one."
import importlib.util, os
from pathlib import Path
os.environ.setdefault("OMP_NUM_THREADS", "2") # before torch is imported: two cores, one process
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
import pytest

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ROOT/"tools/offline"

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
