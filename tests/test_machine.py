"The processor probe: it chooses, it can be overruled, and no code chooses bfloat16 on a processor past it."
import re
from pathlib import Path

import pytest
import torch

from instructvideo_kit import machine

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("float32, bfloat16, expected", [(68., 2.8, "no"), (100., 120., "no"), (100., 480., "bf16")])
def test_bfloat16_only_where_it_is_faster(monkeypatch, float32, bfloat16, expected):
    monkeypatch.delenv("KIT_PRECISION", raising=False)
    monkeypatch.setattr(machine, "machine", lambda: machine.Machine(2, 2, float32, bfloat16))
    assert machine.fast_precision() == expected


def test_overruled(monkeypatch):
    monkeypatch.setenv("KIT_PRECISION", "no")
    assert machine.fast_dtype() == torch.float32
    monkeypatch.setenv("KIT_PRECISION", "half")
    with pytest.raises(ValueError, match="half"): machine.fast_precision()


def test_nobody_forces_bfloat16_on_a_processor():
    asks = re.compile(r'autocast\("cpu", '
                      r'torch\.bfloat16|mixed_precision["\']?\s*[:=]\s*["\']bf16|from_pretrained\("[^)\n]*torch\.bfloat16')
    # the probe itself; presets of GPU cards; examples
    allowed = {"machine.py", "memory.py", "30_memory.ipynb", "02_machine.ipynb", "07_results.ipynb"}
    files = [*(ROOT/"instructvideo_kit").rglob("*.py"), *(ROOT/"nbs").rglob("*.ipynb"),
             *(ROOT/"tutorials").glob("*.ipynb")]
    forced = [p.name for p in files if p.name not in allowed
              and asks.search(p.read_text(encoding="utf-8").replace('\\"', '"'))]
    assert forced == []
