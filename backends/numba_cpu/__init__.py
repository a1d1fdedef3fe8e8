"""The embedded CPU backend: compiled by numba on first use, tiled, threaded, exact.

Importing this module imports neither numba nor a kernel; the first verb does.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scfa_core.arrays import CallContext
    from scfa_core.lowering import Clauses
    from scfa_core.plan import PlanArrays
    from scfa_core.problem import Problem

DTYPES = ("float16", "bfloat16", "float32", "float64")


class NumbaCpuBackend:
    """Host arrays of any dtype and stride; see `launch` for the work."""

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

    def make_plan(
        self, problem: Problem, clauses: Clauses, plan: PlanArrays, ctx: CallContext
    ) -> None:
        """Fill `plan`."""
        from scfa_core.backends.numba_cpu import launch

        launch.make_plan(problem, clauses, plan)

    def forward(
        self,
        problem: Problem,
        plan: PlanArrays,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        ctx: CallContext,
    ) -> None:
        """Write out and lse."""
        from scfa_core.backends.numba_cpu import launch

        launch.forward(problem, plan, q, k, v, out, lse)

    def backward(
        self,
        problem: Problem,
        plan: PlanArrays,
        dout: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        dq: Any,
        dk: Any,
        dv: Any,
        ctx: CallContext,
    ) -> None:
        """Write dq, dk and dv."""
        from scfa_core.backends.numba_cpu import launch

        launch.backward(problem, plan, dout, q, k, v, out, lse, dq, dk, dv, ctx)


BACKEND = NumbaCpuBackend()
