"""Examples say how they are started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the example trains with torch")
if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "examples").exists():
    pytest.skip("the tests run outside a source tree", allow_module_level=True)

NAMES = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("named", [(), NAMES[:1]])  # some schedulers name the first alone
def test_without_torchrun_the_example_of_many_processes_says_how(named):
    environment = {key: value for key, value in os.environ.items() if key not in NAMES}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "train_many.py"],
        env=environment | dict.fromkeys(named, "1") | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "start it by torchrun" in done.stderr
    assert "torchrun --nproc-per-node 2" in done.stderr
    assert "Traceback" not in done.stderr
