"""Forward and backward: which kernels serve a problem, their grids, arguments and workspace.

Tensor cores where they can serve. Their kernels mark tiles whose result is not finite, and the
portable kernels then do those anew from visible pairs alone: 0 * NaN of a hidden pair never stays.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from scfa_core.backends.numba_cuda.bwd_dkdv import build_bwd_dkdv
from scfa_core.backends.numba_cuda.bwd_dq import build_bwd_dq
from scfa_core.backends.numba_cuda.compiling import SIMULATED, Kernel, Queue
from scfa_core.backends.numba_cuda.convert import ELEMENTS
from scfa_core.backends.numba_cuda.fwd import build_fwd
from scfa_core.backends.numba_cuda.tiles import Shape, choose_shape, tile_width
from scfa_core.backends.numba_cuda.views import (
    compute_capability,
    device_of,
    multiprocessors,
    queue_of,
    shared_limit,
    view,
)

from scfa_core.arrays import CallContext
from scfa_core.plan import PlanArrays
from scfa_core.problem import Problem

logger = logging.getLogger("scfa_core")

MAX_GRID = 1 << 20  # blocks of the portable kernels stride over the tiles beyond
REDO_BLOCKS = 4  # per multiprocessor, that look for marked tiles
TENSOR_DTYPES = ("float16", "bfloat16")
TENSOR_CAPABILITY = (8, 0)
MAX_BACKWARD_DIM = 128  # two results of a warp fit in registers up to here
SIGN_BITS = 0x80008000  # of two 16-bit floats


def _widths(problem: Problem) -> tuple[int, int]:
    """Columns that kernels are compiled for."""
    return tile_width(problem.head_dim), tile_width(problem.head_dim_v)


def forward_shape(problem: Problem) -> Shape:
    """Threads and tile of the portable forward."""
    head_dim, head_dim_v = _widths(problem)
    return choose_shape(problem.dtype, (head_dim, max(head_dim, head_dim_v)))


def backward_shape(problem: Problem) -> Shape:
    """Threads and tile of the portable backward kernels."""
    return choose_shape(problem.dtype, _widths(problem) * 2)


def _is_aligned(x: Any) -> bool:
    """Whether every row starts at a multiple of 16 bytes, at most 2 GiB from the next."""
    if SIMULATED:
        pointer, strides = x.__array_interface__["data"][0], [s // x.itemsize for s in x.strides]
    else:
        pointer, strides = x.pointer, x.strides
    rows_meet = all(stride % 8 == 0 for stride in strides[:3])
    return bool(pointer % 16 == 0 and rows_meet and abs(strides[2]) < 1 << 30)


@cache
def _log_once(message: str) -> None:
    logger.warning("numba-cuda: %s", message)


def _reason_against_tensor_cores(
    problem: Problem, arrays: tuple[Any, ...], shared: int, most: int, device: int
) -> str | None:
    if problem.dtype not in TENSOR_DTYPES:
        return f"tensor cores take {TENSOR_DTYPES}, got {problem.dtype}"
    if compute_capability(device) < TENSOR_CAPABILITY:
        return f"tensor cores need compute capability {TENSOR_CAPABILITY}"
    if problem.softmax_scale == 0.0:
        return "softmax_scale is 0"
    if max(problem.head_dim, problem.head_dim_v) > most:
        return f"head_dim is above {most}"
    if shared > shared_limit(device):
        return f"tiles take {shared} bytes of shared memory, the card has {shared_limit(device)}"
    if not all(_is_aligned(x) for x in arrays):
        return "rows do not start at multiples of 16 bytes"
    return None


def _use_tensor_cores(
    problem: Problem, arrays: tuple[Any, ...], shared: int, most: int, device: int, what: str
) -> bool:
    """Whether the fast kernels serve; says once why where one would expect them and they do not."""
    reason = _reason_against_tensor_cores(problem, arrays, shared, most, device)
    if reason is None:
        return True
    if problem.dtype in TENSOR_DTYPES and compute_capability(device) >= TENSOR_CAPABILITY:
        _log_once(f"the portable {what} serves, slowly: {reason}")
    return False


def _ranges(plan: PlanArrays) -> tuple[Any, ...]:
    lists = (plan.q_index, plan.k_index, plan.key_start, plan.key_end)
    return (*(view(x) for x in lists), plan.monotone)


def _flip(problem: Problem) -> int:
    return SIGN_BITS if problem.softmax_scale < 0 else 0


class _Flags:
    """One mark per tile of a fast kernel; none if the portable kernels do everything."""

    def __init__(self, heads: int, seqlen: int, rows: int, ctx: CallContext) -> None:
        self.rows = rows
        self.heads, self.seqlen = heads, seqlen
        self.tiles = heads * -(-seqlen // rows) if rows else 0
        self.array = view(ctx.empty((max(self.tiles, 1),), "int32"))

    def launch_portable(
        self, kernel: Kernel, shape: Shape, queue: Queue, arguments: tuple[Any, ...]
    ) -> None:
        """Launch a portable kernel over all tiles, or over the marked ones."""
        most = REDO_BLOCKS * multiprocessors(queue.device) if self.rows else MAX_GRID
        grid = min(self.heads * -(-self.seqlen // shape.rows), most)
        kernel.launch(grid, shape.threads, queue, (*arguments, self.array, self.rows))


def run_forward(
    problem: Problem, plan: PlanArrays, q: Any, k: Any, v: Any, out: Any, lse: Any, ctx: CallContext
) -> None:
    """Write out and lse. Workspace: 4 bytes per tile of 64 or 128 rows."""
    sizes = (problem.dtype, *_widths(problem))
    heads = problem.batch * problem.heads
    with device_of(ctx):
        queue = queue_of(ctx)
        arguments = (*(view(x) for x in (q, k, v, out, lse)), *_ranges(plan), problem.softmax_scale)
        shared, rows = 0, 0
        if problem.dtype in TENSOR_DTYPES:
            from scfa_core.backends.numba_cuda import fwd_mma

            tiles, shared = fwd_mma.forward_shape(*sizes[1:], shared_limit(ctx.device))
            if _use_tensor_cores(problem, (q, k, v, out), shared, 256, ctx.device, "forward"):
                rows = tiles.rows
        flags = _Flags(heads, problem.seqlen_q, rows, ctx)
        if rows:
            fwd_mma.build_fwd_mma(*sizes, tiles).launch(
                flags.tiles,
                tiles.threads,
                queue,
                (*arguments, _flip(problem), flags.array),
                shared,
            )
        shape = forward_shape(problem)
        flags.launch_portable(build_fwd(*sizes, shape), shape, queue, arguments)


def run_backward(
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
    """Write dq, dk and dv.

    Workspace: lse and delta of the sorted queries, 8 bytes per row (16 for float64), and 4 bytes
    per tile of 64 or 128 rows.
    """
    shape = backward_shape(problem)
    sizes = (problem.dtype, *_widths(problem))
    row_shape = (problem.batch, problem.heads, problem.seqlen_q)
    with device_of(ctx):
        queue = queue_of(ctx)
        acc_name = ELEMENTS[problem.dtype].acc_name
        sums = [view(ctx.empty(row_shape, acc_name)) for _ in range(2)]
        arrays = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "dq": dq, "dk": dk, "dv": dv}
        views = {name: view(x) for name, x in arrays.items()}
        common = (*_ranges(plan), problem.softmax_scale)
        inputs = tuple(views[name] for name in ("dout", "q", "k", "v"))
        dq_arguments = (*inputs, views["out"], view(lse), views["dq"], *sums, *common)
        dkdv_arguments = (*inputs, views["dk"], views["dv"], *sums, *common)
        rows_q = rows_k = 0
        if problem.dtype in TENSOR_DTYPES:
            from scfa_core.backends.numba_cuda import bwd_dkdv_mma, bwd_dq_mma

            shared = 0
            if max(sizes[1:]) <= MAX_BACKWARD_DIM:
                limit = shared_limit(ctx.device)
                dq_tiles, dq_shared = bwd_dq_mma.dq_shape(*sizes[1:], limit)
                dkdv_tiles, dkdv_shared = bwd_dkdv_mma.dkdv_shape(*sizes[1:], limit)
                shared = max(dq_shared, dkdv_shared)
            everything = tuple(arrays.values())
            if _use_tensor_cores(
                problem, everything, shared, MAX_BACKWARD_DIM, ctx.device, "backward"
            ):
                rows_q, rows_k = dq_tiles.rows, dkdv_tiles.rows
        q_flags = _Flags(problem.batch * problem.heads, problem.seqlen_q, rows_q, ctx)
        k_flags = _Flags(problem.batch * problem.heads_kv, problem.seqlen_k, rows_k, ctx)
        flip = _flip(problem)
        if rows_q:
            bwd_dq_mma.build_bwd_dq_mma(*sizes, dq_tiles).launch(
                q_flags.tiles,
                dq_tiles.threads,
                queue,
                (*dq_arguments, flip, q_flags.array),
                dq_shared,
            )
        q_flags.launch_portable(build_bwd_dq(*sizes, shape), shape, queue, dq_arguments)
        if rows_k:
            bwd_dkdv_mma.build_bwd_dkdv_mma(*sizes, dkdv_tiles).launch(
                k_flags.tiles,
                dkdv_tiles.threads,
                queue,
                (*dkdv_arguments, flip, k_flags.array),
                dkdv_shared,
            )
        k_flags.launch_portable(build_bwd_dkdv(*sizes, shape), shape, queue, dkdv_arguments)
