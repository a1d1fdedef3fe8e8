"""The backend ``cupy``: CUDA C++ kernels compiled at run time, for every NVIDIA card from sm_80 on.

This file answers whether it can serve; `planner` and `launch` do the work. CuPy is imported only
when asked, for its NVRTC and driver bindings: arrays may come from any library.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING

from scfa_core.arrays import cuda_ordinal

if TYPE_CHECKING:
    from scfa_core.arrays import CallContext, DeviceArray
    from scfa_core.dispatch import Bound
    from scfa_core.lowering import Clauses
    from scfa_core.plan import PlanArrays
    from scfa_core.problem import Problem

DTYPES = ("float16", "bfloat16", "float32")
MIN_COMPUTE_CAPABILITY = (8, 0)
_INSTALL = (
    "pip install 'scfa-core[cuda13]' (driver 580 or newer) or 'scfa-core[cuda12]' (525 or newer)"
)
_INSUFFICIENT_DRIVER, _NO_DEVICE = 35, 100  # cudaError_t


@cache
def _availability() -> str | None:
    """None if some card here can run the kernels, otherwise the reason and the cure."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy warns of an incomplete install; below says more
            import cupy
    except ImportError as error:
        missing = getattr(error, "name", None) == "cupy"
        state = "CuPy is not installed" if missing else f"CuPy cannot be imported ({error})"
        return f"{state}: {_INSTALL}"
    runtime = cupy.cuda.runtime
    try:
        devices = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return _driver_reason(runtime, error)
    if devices == 0:
        return "no CUDA device is visible: check nvidia-smi and $CUDA_VISIBLE_DEVICES"
    reasons = [_card_reason(device) for device in range(devices)]
    if None not in reasons:
        return "; ".join(reason for reason in reasons if reason)
    return _compiler_reason()


def _driver_reason(runtime: object, error: Exception) -> str:
    """Say what `error` of the first call into the CUDA runtime means."""
    status = getattr(error, "status", None)
    if status == _NO_DEVICE:
        return "no CUDA device is visible: check nvidia-smi and $CUDA_VISIBLE_DEVICES"
    if status == _INSUFFICIENT_DRIVER:
        if runtime.driverGetVersion() == 0:  # type: ignore[attr-defined]
            return (
                "there is no NVIDIA driver (libcuda.so.1): install one, or use a machine with a GPU"
            )
        return f"the NVIDIA driver is too old for this CuPy: update it, or {_INSTALL}"
    return f"the CUDA runtime cannot start ({error}): check the driver with nvidia-smi"


def _card_reason(device: int) -> str | None:
    """None if card `device` can run the kernels, otherwise why not."""
    from scfa_core.backends.cupy_raw.loader import compute_capability

    found = compute_capability(device)
    if found >= MIN_COMPUTE_CAPABILITY:
        return None
    return (
        f"cuda:{device} has compute capability {found[0]}.{found[1]}, the kernels need "
        f"{MIN_COMPUTE_CAPABILITY[0]}.{MIN_COMPUTE_CAPABILITY[1]} (Ampere) or newer"
    )


def _compiler_reason() -> str | None:
    """None if CuPy finds NVRTC, otherwise the cure."""
    from scfa_core.backends.cupy_raw.nvrtc import cupy_compiler

    try:
        cupy_compiler()
    except (ImportError, OSError, RuntimeError) as error:
        return (
            f"CuPy finds no NVRTC, the run-time compiler ({error}): "
            "pip install 'cupy-cuda13x[ctk]' or 'cupy-cuda12x[ctk]'"
        )
    return None


class CupyBackend:
    """The five verbs, for CUDA arrays; never synchronises and never looks at a value."""

    name = "cupy"
    memory = "cuda"

    def availability(self) -> str | None:
        """None if some card here can run the kernels, otherwise the reason and the cure."""
        try:
            return _availability()
        except Exception as error:  # a broken driver must not break the other backends
            return f"CuPy fails here ({type(error).__name__}: {error})"

    def can_run(self, problem: Problem) -> str | None:
        """None if the kernels serve `problem`, otherwise the reason."""
        if problem.dtype not in DTYPES:
            return f"it computes in {', '.join(DTYPES)}, got {problem.dtype}"
        for name in ("head_dim", "head_dim_v"):
            size = getattr(problem, name)
            if not 16 <= size <= 256 or size % 8:
                return f"{name} must be a multiple of 8 from 16 to 256, got {size}"
        return _card_reason(cuda_ordinal(problem.device))

    def multiplies_tf32(self, dtype: str, head_dim: int, head_dim_v: int) -> bool:
        """Whether products of such arrays are TF32: $SCFA_CUPY_FP32, and no wide heads."""
        from scfa_core.backends.cupy_raw.launch import multiplies_tf32

        return multiplies_tf32(dtype, head_dim, head_dim_v)

    def make_plan(
        self, problem: Problem, clauses: Clauses, plan: PlanArrays, ctx: CallContext
    ) -> None:
        """Fill the arrays of `plan` on the stream of `ctx`."""
        from scfa_core.backends.cupy_raw.planner import run_make_plan

        run_make_plan(problem, clauses, plan, ctx)

    def forward(
        self,
        problem: Problem,
        plan: PlanArrays,
        q: DeviceArray,
        k: DeviceArray,
        v: DeviceArray,
        out: DeviceArray,
        lse: DeviceArray,
        ctx: CallContext,
    ) -> None:
        """Write every element of `out` and `lse`."""
        from scfa_core.backends.cupy_raw.launch import run_forward

        run_forward(problem, plan, q, k, v, out, lse, ctx)

    def backward(
        self,
        problem: Problem,
        plan: PlanArrays,
        dout: DeviceArray,
        q: DeviceArray,
        k: DeviceArray,
        v: DeviceArray,
        out: DeviceArray,
        lse: DeviceArray,
        dq: DeviceArray,
        dk: DeviceArray,
        dv: DeviceArray,
        ctx: CallContext,
    ) -> None:
        """Write every element of `dq`, `dk` and `dv`."""
        from scfa_core.backends.cupy_raw.launch import run_backward

        run_backward(problem, plan, dout, q, k, v, out, lse, dq, dk, dv, ctx)

    def bind_make_plan(self, problem: Problem, clauses: Clauses, device: int) -> Bound:
        """Settle all of `make_plan` but addresses."""
        from scfa_core.backends.cupy_raw.planner import bind_make_plan

        return bind_make_plan(problem, clauses, device)

    def bind_forward(self, problem: Problem, *arrays: DeviceArray) -> Bound:
        """Settle all of `forward` but addresses."""
        from scfa_core.backends.cupy_raw.launch import bind_forward

        return bind_forward(problem, *arrays)

    def bind_backward(self, problem: Problem, *arrays: DeviceArray) -> Bound:
        """Settle all of `backward` but addresses."""
        from scfa_core.backends.cupy_raw.launch import bind_backward

        return bind_backward(problem, *arrays)


BACKEND = CupyBackend()
