"""CUDA kernels in Python: any card of compute capability 7.0 and up, or numba's simulator.

Importing this module imports neither numba nor a kernel; the first verb does. With
NUMBA_ENABLE_CUDASIM=1 the kernels run as plain Python on NumPy arrays, to step through.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scfa_core.arrays import CallContext
    from scfa_core.lowering import Clauses
    from scfa_core.plan import PlanArrays
    from scfa_core.problem import Problem

DTYPES = ("float16", "bfloat16", "float32", "float64")
LEAST_CAPABILITY = (7, 0)
_INSTALL = "pip install 'scfa-core[cuda13]' (or cuda12)"


def is_simulated() -> bool:
    """Whether numba's CUDA simulator was asked for."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


@cache
def _find_reason() -> str | None:
    """Why kernels cannot run here, with the cure, or None."""
    if find_spec("numba") is None:
        return "numba is not installed: pip install numba"
    if is_simulated():
        return None
    if find_spec("numba_cuda") is None:
        return f"numba-cuda is not installed: {_INSTALL}"
    try:
        if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
            return f"cuda-bindings is not installed: {_INSTALL}"
        from numba import cuda

        if not cuda.is_available():
            return f"numba-cuda finds no usable CUDA device or driver: {_driver_message()}"
        weakest = min(gpu.compute_capability for gpu in cuda.gpus)
        from numba.cuda import cudaimpl  # noqa: F401  numba-cuda 0.30 cannot with numpy 2.5
    except Exception as error:
        return f"numba-cuda fails: {type(error).__name__}: {error} ({_versions()})"
    if tuple(weakest) < LEAST_CAPABILITY:
        return (
            f"it needs compute capability {LEAST_CAPABILITY} or higher, got {tuple(weakest)}; "
            "hide the older card with CUDA_VISIBLE_DEVICES"
        )
    return None


def _versions() -> str:
    found = (f"{name} {version(name)}" for name in ("numba-cuda", "numba", "numpy"))
    return f"{', '.join(found)}: are they made for each other?"


def _driver_message() -> str:
    from numba.cuda.cudadrv.driver import driver

    error = driver.initialization_error
    first_line = str(error).strip().splitlines()[0] if error else "no device is visible"
    return f"{first_line} (install the NVIDIA driver, or use backend='numba-cpu')"


class NumbaCudaBackend:
    """CUDA arrays, or host arrays in the simulator; see `planner` and `launch` for the work."""

    name = "numba-cuda"

    @property
    def memory(self) -> str:
        """Where arrays live: "cuda", or "host" in the simulator."""
        return "host" if is_simulated() else "cuda"

    def availability(self) -> str | None:
        """Return None if kernels can run here, else the reason and the cure."""
        return _find_reason()

    def can_run(self, problem: Problem) -> str | None:
        """Return None for every dtype and size that passes the door, else the reason."""
        if problem.dtype not in DTYPES:
            return f"dtype must be one of {DTYPES}, got {problem.dtype}"
        return None

    def kernel_family(self, dtype: str, head_dim: int, head_dim_v: int) -> tuple[str, int, int]:
        """Problems of one family are served by the same kernels."""
        from scfa_core.backends.numba_cuda.tiles import tile_width

        return dtype, tile_width(head_dim), tile_width(head_dim_v)

    def make_plan(
        self, problem: Problem, clauses: Clauses, plan: PlanArrays, ctx: CallContext
    ) -> None:
        """Fill `plan`."""
        from scfa_core.backends.numba_cuda.planner import run_make_plan

        run_make_plan(problem, clauses, plan, ctx)

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
        from scfa_core.backends.numba_cuda.launch import run_forward

        run_forward(problem, plan, q, k, v, out, lse, ctx)

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
        from scfa_core.backends.numba_cuda.launch import run_backward

        run_backward(problem, plan, dout, q, k, v, out, lse, dq, dk, dv, ctx)


BACKEND = NumbaCudaBackend()
