"""A script run in a Python process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def python(code, *, timeout=240, **environment):
    """What `code` printed; that it ended well is asserted. `environment` is set beside ours."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=Path(__file__).parent,  # not beside a scfa_core that has no backends in it
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout
