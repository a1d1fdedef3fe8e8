"""From a call's arrays to kernel arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scfa_core.backends.numba_cpu.backward import dkdv_tiles, dq_tiles
from scfa_core.backends.numba_cpu.flat import flat
from scfa_core.backends.numba_cpu.forward import forward_tiles
from scfa_core.backends.numba_cpu.plan import UNBOUNDED, key_ranges, sort_lists, table
from scfa_core.backends.numba_cpu.threads import run_tiles
from scfa_core.backends.numba_cpu.tiles import BLOCK

from scfa_core.lowering import START_BITS

if TYPE_CHECKING:
    from scfa_core.arrays import CallContext
    from scfa_core.lowering import Clauses
    from scfa_core.plan import PlanArrays
    from scfa_core.problem import Problem

__all__ = ["backward", "forward", "make_plan"]

SMALL = 2**21  # multiply-adds below which waking other threads costs more than it saves
SMALL_ROWS = 2**13


def _plan_rows(*arrays: np.ndarray) -> list[np.ndarray]:
    """Contiguous int32 arrays of a plan as flat ones."""
    return [flat(x[None] if x.ndim == 2 else x, "int32")[0] for x in arrays]


def _offset(value: int | None, default: int) -> int:
    """An offset that an int64 can add to any row."""
    return default if value is None else max(-UNBOUNDED, min(UNBOUNDED, value))


def make_plan(problem: Problem, clauses: Clauses, plan: PlanArrays, ctx: CallContext) -> None:
    """Sort keys, sort queries, then find ranges."""
    q_index, q_count, k_index, k_count, key_start, key_end = _plan_rows(*plan[:6])
    batch, heads, heads_kv = problem.batch, problem.heads, problem.heads_kv
    seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
    q_groups, k_groups = table(clauses.q_groups), table(clauses.k_groups)
    no_bounds, bounds = table(()), table(clauses.sorted_bounds(seqlen_q))
    for count, seqlen, columns, keeps, index, counts in (
        (heads_kv, seqlen_k, (k_groups, no_bounds), table(clauses.k_keeps), k_index, k_count),
        (heads, seqlen_q, (q_groups, bounds), table(clauses.q_keeps), q_index, q_count),
    ):
        lists = batch * count
        run_tiles(
            sort_lists, lists, lists, count, seqlen, *columns, seqlen_k, START_BITS, keeps,
            index, counts, helpers=lists * seqlen > SMALL_ROWS,
        )  # fmt: skip
    run_tiles(
        key_ranges, batch * heads, batch, heads, heads_kv, seqlen_q, seqlen_k,
        q_groups, k_groups, table(clauses.starts), table(clauses.ends),
        _offset(clauses.lo_offset, -UNBOUNDED), _offset(clauses.hi_offset, UNBOUNDED),
        q_index, q_count, k_index, k_count, key_start, key_end,
        helpers=batch * heads * seqlen_q > SMALL_ROWS,
    )  # fmt: skip


def _sizes(problem: Problem) -> tuple[int, ...]:
    return (
        problem.batch,
        problem.heads,
        problem.heads_kv,
        problem.seqlen_q,
        problem.seqlen_k,
        problem.head_dim,
        problem.head_dim_v,
    )


def _arithmetic(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """softmax_scale as an array of one element, and an empty array, in the arithmetic type."""
    real = np.float64 if problem.dtype == "float64" else np.float32
    return np.array([problem.softmax_scale], real), np.empty(0, real)


def _worth_helpers(problem: Problem) -> bool:
    rows = problem.batch * problem.heads * problem.seqlen_q
    return bool(rows * problem.seqlen_k * problem.head_dim > SMALL)


def forward(
    problem: Problem,
    plan: PlanArrays,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    ctx: CallContext,
) -> None:
    """Write out and lse."""
    group = problem.group_size
    if group > 1 and 0 < group * problem.seqlen_q <= BLOCK:
        _forward_of_packs(problem, plan, q, k, v, out, lse, ctx)
        return
    scale, sample = _arithmetic(problem)
    tensors = [part for x in (q, k, v, out) for part in flat(x, problem.dtype)]
    q_index, _, k_index, _, key_start, key_end = _plan_rows(*plan[:6])
    tiles = problem.batch * problem.heads * -(-problem.seqlen_q // BLOCK)
    run_tiles(
        forward_tiles, tiles, _sizes(problem), *tensors, *flat(lse, "float32"),
        q_index, k_index, key_start, key_end, scale, sample,
        helpers=_worth_helpers(problem),
    )  # fmt: skip


def _forward_of_packs(
    problem: Problem,
    plan: PlanArrays,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    ctx: CallContext,
) -> None:
    """Forward where all query heads that share a key head fit one tile: its keys are read once.

    They are taken for rows of one head. A plan's lists of them are neighbours already.
    """
    rows, heads_kv = problem.group_size * problem.seqlen_q, problem.heads_kv

    def packed(x: np.ndarray) -> np.ndarray:  # a copy where heads and rows are no one axis
        return x.reshape(problem.batch, heads_kv, rows, *x.shape[3:])

    first = np.arange(problem.heads, dtype=np.int32) % problem.group_size * problem.seqlen_q
    own = plan._replace(
        q_index=packed(plan.q_index + first[:, None]),
        key_start=packed(plan.key_start),
        key_end=packed(plan.key_end),
    )
    ours = replace(problem, heads=heads_kv, seqlen_q=rows)
    results = packed(out), packed(lse)
    forward(ours, own, packed(q), k, v, *results, ctx)
    for result, target in zip(results, (out, lse), strict=True):
        if not np.shares_memory(result, target):
            target[...] = result.reshape(target.shape)


def backward(
    problem: Problem,
    plan: PlanArrays,
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    dq: np.ndarray,
    dk: np.ndarray,
    dv: np.ndarray,
    ctx: CallContext,
) -> None:
    """Write dq, then dk and dv."""
    scale, sample = _arithmetic(problem)
    sizes, helpers = _sizes(problem), _worth_helpers(problem)
    inputs = [part for x in (dout, q, k, v) for part in flat(x, problem.dtype)]
    q_index, _, k_index, _, key_start, key_end = _plan_rows(*plan[:6])
    ranges = (q_index, k_index, key_start, key_end)
    blocks_q = -(-problem.seqlen_q // BLOCK)
    lists = problem.batch * problem.heads
    arithmetic = "float64" if problem.dtype == "float64" else "float32"
    workspace = [
        ctx.empty((lists * size,), dtype)
        for size, dtype in (
            (problem.seqlen_q, arithmetic),  # lse
            (problem.seqlen_q, arithmetic),  # delta
            (blocks_q, "int32"),  # smallest key_start of each query tile
            (blocks_q, "int32"),  # largest key_end
        )
    ]
    run_tiles(
        dq_tiles, lists * blocks_q, sizes, *inputs, *flat(out, problem.dtype),
        *flat(lse, "float32"), *flat(dq, problem.dtype), *ranges, *workspace,
        scale, plan.monotone, problem.dtype == "float64", sample, helpers=helpers,
    )  # fmt: skip
    tiles_k = problem.batch * problem.heads_kv * -(-problem.seqlen_k // BLOCK)
    run_tiles(
        dkdv_tiles, tiles_k, sizes, *inputs, *flat(dk, problem.dtype), *flat(dv, problem.dtype),
        *ranges, *workspace, scale, plan.monotone, sample, helpers=helpers,
    )  # fmt: skip
