"""From a problem to kernels on a stream: which variant, which grid, which arguments.

What depends on shapes and strides alone is prepared once and remembered, so that a call packs its
pointers and launches. Hopper cards have kernels of their own in `launch_sm90`, asked first.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from scfa_core.backends.cupy_raw import launch_sm90
from scfa_core.backends.cupy_raw.loader import Kernel, compute_capability, get_kernel, shared_limit
from scfa_core.backends.cupy_raw.params import POINTERS, pack_sizes, pack_strides
from scfa_core.backends.cupy_raw.variants import Variant, choose

from scfa_core.arrays import ITEMSIZE
from scfa_core.errors import BackendUnavailable

if TYPE_CHECKING:
    from scfa_core.arrays import CallContext, DeviceArray
    from scfa_core.plan import PlanArrays
    from scfa_core.problem import Problem

__all__ = ["run_backward", "run_forward"]

_ALIGNMENT = 16  # bytes one copy moves
_ROW_REACH = 1 << 32  # bytes from row to row that one 32-bit multiply can span
_MOST_PREPARED = 4096  # launches remembered; dropped all at once, as shapes rarely vary more
_KERNELS = {  # $SCFA_CUPY_KERNELS -> whether the Hopper kernels are asked
    "auto": True,
    "sm90": True,
    "sm80": False,
}


class _Launch(NamedTuple):
    """One kernel, ready but for its pointers."""

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    tail: bytes  # Params after the pointers

    def __call__(self, stream: int, pointers: bytes) -> None:
        self.kernel.launch(self.grid, self.threads, self.shared_bytes, stream, pointers + self.tail)


_prepared: dict[tuple[object, ...], tuple[_Launch, ...]] = {}


def _hopper(device: int) -> bool:
    """Whether the Hopper kernels are to be asked, by $SCFA_CUPY_KERNELS and the card."""
    name = os.environ.get("SCFA_CUPY_KERNELS", "auto")
    if name not in _KERNELS:
        raise ValueError(f"$SCFA_CUPY_KERNELS must be one of {list(_KERNELS)}, got {name!r}")
    found = compute_capability(device)
    if name == "sm90" and found != (9, 0):
        raise BackendUnavailable(
            f"$SCFA_CUPY_KERNELS=sm90 asks for the Hopper kernels, cuda:{device} has compute "
            f"capability {found[0]}.{found[1]}: unset it"
        )
    return _KERNELS[name] and found == (9, 0)


def _aligned(arrays: tuple[DeviceArray, ...]) -> bool:
    """Whether every row of every array starts at a multiple of 16 bytes, less than 4 GiB apart."""
    itemsize = ITEMSIZE[arrays[0].dtype]
    for array in arrays:
        if array.pointer % _ALIGNMENT:
            return False
        for size, stride in zip(array.shape[:3], array.strides[:3], strict=True):
            if size > 1 and stride * itemsize % _ALIGNMENT:
                return False
        if not 0 <= array.strides[2] * itemsize < _ROW_REACH:
            return False
    return True


def _prepare(
    kernel: str, problem: Problem, device: int, aligned: bool, monotone: bool, strides: bytes
) -> _Launch:
    """Choose and load the variant of one kernel."""
    variant: Variant = choose(
        kernel,
        problem.dtype,
        problem.head_dim,
        problem.head_dim_v,
        aligned=aligned,
        monotone=monotone or kernel != "bwd_dkdv",
        group_size=problem.group_size,
        shared_limit=shared_limit(device),
    )
    if kernel == "bwd_dkdv":
        tiles = problem.batch * problem.heads_kv * -(-problem.seqlen_k // variant.shape.block_n)
    else:
        tiles = problem.batch * problem.heads * -(-problem.seqlen_q // variant.shape.block_m)
    return _Launch(
        get_kernel(variant.name, variant.source, variant.constants, device),
        (tiles, 1 + variant.shape.split, 1),
        variant.threads,
        variant.shared(problem.group_size),
        strides + pack_sizes(problem),
    )


def _remember(key: tuple[object, ...], launches: tuple[_Launch, ...]) -> tuple[_Launch, ...]:
    if len(_prepared) >= _MOST_PREPARED:
        _prepared.clear()
    _prepared[key] = launches
    return launches


def run_forward(
    problem: Problem,
    plan: PlanArrays,
    q: DeviceArray,
    k: DeviceArray,
    v: DeviceArray,
    out: DeviceArray,
    lse: DeviceArray,
    ctx: CallContext,
) -> None:
    """Enqueue the forward kernel: every element of `out` and `lse` is written."""
    if _hopper(q.device) and launch_sm90.supports_forward(problem, q, k, v, plan):
        launch_sm90.run_forward(problem, plan, q, k, v, out, lse, ctx)
        return
    aligned = _aligned((q, k, v, out))
    strides = (q.strides, k.strides, v.strides, out.strides, lse.strides)
    key = (problem, q.device, aligned, strides)
    launches = _prepared.get(key)
    if launches is None:
        packed = pack_strides((*strides, None, None, None, None))
        launches = _remember(key, (_prepare("fwd", problem, q.device, aligned, True, packed),))
    pointers = POINTERS.pack(
        *(q.pointer, k.pointer, v.pointer, out.pointer, lse.pointer),
        *(0, 0, 0, 0, 0, 0),
        *_plan_pointers(plan),
    )
    launches[0](ctx.stream, pointers)


def run_backward(
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
    """Enqueue the dq, then the dk/dv kernel: every element is written, deterministic bit for bit.

    Notes
    -----
    Workspace: 8 bytes a query row (lse in base 2 and delta, in sorted order).
    """
    if _hopper(q.device) and launch_sm90.supports_backward(problem, dout, q, k, v, out, plan):
        launch_sm90.run_backward(problem, plan, dout, q, k, v, out, lse, dq, dk, dv, ctx)
        return
    aligned = _aligned((q, k, v, out, dout, dq, dk, dv))
    arrays = (q, k, v, out, lse, dout, dq, dk, dv)
    strides = tuple(array.strides for array in arrays)
    key = (problem, q.device, aligned, plan.monotone, strides)
    launches = _prepared.get(key)
    if launches is None:
        packed = pack_strides(strides)
        launches = _remember(
            key,
            tuple(
                _prepare(kernel, problem, q.device, aligned, plan.monotone, packed)
                for kernel in ("bwd_dq", "bwd_dkdv")
            ),
        )
    rows = problem.batch * problem.heads * problem.seqlen_q
    statistics = ctx.empty((2, rows), "float32").pointer
    pointers = POINTERS.pack(
        *(array.pointer for array in arrays),
        *(statistics, statistics + 4 * rows),
        *_plan_pointers(plan),
    )
    for launch in launches:
        launch(ctx.stream, pointers)


def _plan_pointers(plan: PlanArrays) -> tuple[int, int, int, int, int]:
    """Addresses in the order of Params."""
    return (
        plan.q_index.pointer,
        plan.k_index.pointer,
        plan.k_count.pointer,
        plan.key_start.pointer,
        plan.key_end.pointer,
    )
