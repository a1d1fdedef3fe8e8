"""Forward and backward: which kernels serve a problem, their grids, arguments and workspace."""

from __future__ import annotations

from typing import Any

from scfa_core.backends.numba_cuda.bwd_dkdv import build_bwd_dkdv
from scfa_core.backends.numba_cuda.bwd_dq import build_bwd_dq
from scfa_core.backends.numba_cuda.convert import ELEMENTS
from scfa_core.backends.numba_cuda.fwd import build_fwd
from scfa_core.backends.numba_cuda.tiles import Shape, choose_shape
from scfa_core.backends.numba_cuda.views import device_of, stream_of, view

from scfa_core.arrays import CallContext
from scfa_core.plan import PlanArrays
from scfa_core.problem import Problem

MAX_GRID = 1 << 20  # blocks stride over the tiles beyond


def forward_shape(problem: Problem) -> Shape:
    """Threads and tile of the portable forward."""
    return choose_shape(
        problem.dtype, (problem.head_dim, max(problem.head_dim, problem.head_dim_v))
    )


def backward_shape(problem: Problem) -> Shape:
    """Threads and tile of the portable backward kernels."""
    widths = (problem.head_dim, problem.head_dim_v) * 2
    return choose_shape(problem.dtype, widths)


def _grid(heads: int, seqlen: int, shape: Shape) -> int:
    return min(heads * -(-seqlen // shape.rows), MAX_GRID)


def _ranges(plan: PlanArrays) -> tuple[Any, ...]:
    lists = (plan.q_index, plan.k_index, plan.key_start, plan.key_end)
    return (*(view(x) for x in lists), plan.monotone)


def run_forward(
    problem: Problem, plan: PlanArrays, q: Any, k: Any, v: Any, out: Any, lse: Any, ctx: CallContext
) -> None:
    """Write out and lse."""
    shape = forward_shape(problem)
    with device_of(ctx):
        kernel = build_fwd(problem.dtype, problem.head_dim, problem.head_dim_v, shape)
        no_flags = view(ctx.empty((1,), "int32"))
        kernel.launch(
            _grid(problem.batch * problem.heads, problem.seqlen_q, shape),
            shape.threads,
            stream_of(ctx),
            (
                *(view(x) for x in (q, k, v, out, lse)),
                *_ranges(plan),
                problem.softmax_scale,
                no_flags,
                0,
            ),
        )


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
    """Write dq, dk and dv. Workspace: lse and delta of the sorted queries, 8 bytes per row."""
    shape = backward_shape(problem)
    sizes = (problem.dtype, problem.head_dim, problem.head_dim_v, shape)
    row_shape = (problem.batch, problem.heads, problem.seqlen_q)
    with device_of(ctx):
        stream = stream_of(ctx)
        acc_name = ELEMENTS[problem.dtype].acc_name
        sums = [view(ctx.empty(row_shape, acc_name)) for _ in range(2)]
        rest = (*_ranges(plan), problem.softmax_scale, view(ctx.empty((1,), "int32")), 0)
        build_bwd_dq(*sizes).launch(
            _grid(problem.batch * problem.heads, problem.seqlen_q, shape),
            shape.threads,
            stream,
            (*(view(x) for x in (dout, q, k, v, out, lse, dq)), *sums, *rest),
        )
        build_bwd_dkdv(*sizes).launch(
            _grid(problem.batch * problem.heads_kv, problem.seqlen_k, shape),
            shape.threads,
            stream,
            (*(view(x) for x in (dout, q, k, v, dk, dv)), *sums, *rest),
        )
