"""Run a test file as a program in numba's CUDA simulator: it is chosen before numba is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path


def report_of(file):
    """What `file`, run as a program, prints last: JSON."""
    done = subprocess.run(
        [sys.executable, str(Path(file).resolve())],
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
