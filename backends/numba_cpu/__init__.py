"""The embedded CPU backend: compiled by numba on first use, tiled, threaded, exact.

Importing this module imports neither numba nor a kernel; the first verb does.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scfa_core.problem import Problem

DTYPES = ("float16", "bfloat16", "float32", "float64")


class NumbaCpuBackend:
    """Host arrays of any dtype and stride; `launch` does the work, whose verbs are these."""

    name = "numba-cpu"
    memory = "host"

    def availability(self) -> str | None:
        """Return None if numba is installed and may compile."""
        if find_spec("numba") is None:
            return "numba is not installed: pip install numba"
        if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
            return "NUMBA_DISABLE_JIT is set and its kernels exist compiled only: unset it"
        return None

    def can_run(self, problem: Problem) -> str | None:
        """Return None for every dtype and size that passes the door, else the reason."""
        if problem.dtype not in DTYPES:
            return f"dtype must be one of {DTYPES}, got {problem.dtype}"
        return None

    def make_plan(self, problem: Problem, *clauses_plan_ctx: Any) -> None:
        """Fill `plan`."""
        from scfa_core.backends.numba_cpu import launch

        launch.make_plan(problem, *clauses_plan_ctx)

    def forward(self, problem: Problem, *plan_arrays_ctx: Any) -> None:
        """Write out and lse."""
        from scfa_core.backends.numba_cpu import launch

        launch.forward(problem, *plan_arrays_ctx)

    def backward(self, problem: Problem, *plan_arrays_ctx: Any) -> None:
        """Write dq, dk and dv."""
        from scfa_core.backends.numba_cpu import launch

        launch.backward(problem, *plan_arrays_ctx)


BACKEND = NumbaCpuBackend()
