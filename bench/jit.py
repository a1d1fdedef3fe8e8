"""What compiling costs a user: first use in a new process, with an empty and with a filled cache.

`python -m bench.jit CASE METHOD` is the child: it uses the method twice (plan, forward, backward)
and prints both times. First minus second is compiling, or loading what was compiled before. A
product of two matrices goes before, so that starting the device is not counted.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.cases import select

MODES = ("jit-cold", "jit-cached")
CACHES = (
    "SCFA_CACHE_DIR",
    "NUMBA_CACHE_DIR",
    "CUPY_CACHE_DIR",
    "CUDA_CACHE_PATH",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
)


def rows(case: str, method: str, timeout: float | None) -> Iterator[dict[str, Any]]:
    """Yield the row of a cold start and of a start from the cache that it left."""
    with tempfile.TemporaryDirectory() as folder:
        where = {name: str(Path(folder) / name.lower()) for name in CACHES}
        for mode in MODES:
            found = child(case, method, os.environ | where, timeout)
            if "reason" in found:
                yield {"case": case, "method": method, "mode": "-", **found}
                return
            ms = round(max(found["first_ms"] - found["second_ms"], 0.0), 1)
            yield {
                "case": case,
                "method": method,
                "mode": mode,
                "ms": ms,
                "low": ms,
                "high": ms,
                "calls": 1,
                **found,
                "tflops": 0.0,
                "error": None,
                "load": round(os.getloadavg()[0], 2),
            }


def child(
    case: str, method: str, environment: dict[str, str], timeout: float | None
) -> dict[str, Any]:
    """Use a method twice in a new process: both times, or a reason why there are none."""
    command = [sys.executable, "-m", "bench.jit", case, method]
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"compiling took longer than the limit of {timeout:g} s"}
    if done.returncode:
        return {"reason": (done.stderr.strip().splitlines() or ["the child died"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: list[str]) -> None:
    """Use one method twice and print the two times as JSON."""
    import torch

    from bench.inputs import make_inputs
    from bench.methods import METHODS, CannotRun

    case, method = argv
    inputs = make_inputs(select([case])[0])
    inputs.q[0, 0, :64] @ inputs.k[0, 0, :64].T
    if inputs.case.device == "cuda":
        torch.cuda.synchronize()
    clock = [time.perf_counter()]
    try:
        timed = METHODS[method](inputs)
    except CannotRun as reason:
        print(json.dumps({"reason": str(reason)}))
        return
    for again in (False, True):
        if again:  # what preparing did: a plan, and a forward with it
            if timed.plan:
                timed.plan()
            (timed.planned or timed.forward)()
        timed.forward()
        if timed.backward:
            timed.backward()
        if inputs.case.device == "cuda":
            torch.cuda.synchronize()
        clock.append(time.perf_counter())
    first, second = (1e3 * (end - start) for start, end in itertools.pairwise(clock))
    print(json.dumps({"first_ms": round(first, 1), "second_ms": round(second, 1)}))


if __name__ == "__main__":
    main(sys.argv[1:])
