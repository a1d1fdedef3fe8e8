"""A test file run as several processes, one a rank, that have to end well."""

import os
import subprocess
import sys


def run_ranks(script, ranks, *arguments, timeout=300, **environment):
    """Run ``python script rank *arguments`` for every rank and wait for all."""
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(rank), *map(str, arguments)], env=os.environ | environment
        )
        for rank in range(ranks)
    ]
    try:
        codes = [worker.wait(timeout=timeout) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert codes == [0] * ranks
