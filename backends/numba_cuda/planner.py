"""Clauses to plan, on the device: a few launches, no look at a value, no wait.

Columns are sorted and searched one launch each, so any number of int32 and int64 clauses mix.
"""

from __future__ import annotations

from typing import Any

from scfa_core.backends.numba_cuda import (
    plan_and,
    plan_clip,
    plan_keep,
    plan_narrow,
    plan_ranges,
    plan_sort,
)
from scfa_core.backends.numba_cuda.views import device_of, multiprocessors, queue_of, view

from scfa_core.arrays import CallContext
from scfa_core.lowering import Clauses
from scfa_core.plan import PlanArrays
from scfa_core.problem import Problem

FAR = 1 << 40  # an offset beyond every row


def _offset(value: int | None, default: int) -> int:
    return default if value is None else max(-FAR, min(FAR, value))


def _grid(items: int, threads: int, device: int) -> int:
    """Blocks of a kernel whose threads stride over `items`."""
    return max(1, min(-(-items // threads), 16 * multiprocessors(device)))


def _type_name(x: Any) -> str:
    return x.dtype if isinstance(x.dtype, str) else x.dtype.name


class _Lists:
    """One side of a plan: its rows sorted by keeps and groups."""

    def __init__(self, index: Any, count: Any, ctx: CallContext) -> None:
        self.native_index, self.ctx = index, ctx
        self.index, self.count = view(index), view(count)
        self.lists = index.shape[0] * index.shape[1]
        self.rows = self.lists * index.shape[2]
        self.queue = queue_of(ctx)

    def sort(self, keeps: tuple[Any, ...], groups: tuple[Any, ...]) -> None:
        """Write index and count."""
        shape = self.native_index.shape
        flags = keeps[0] if keeps else self.ctx.empty((1, 1, 1), "uint8")
        for more in keeps[1:]:
            both = self.ctx.empty(shape, "uint8")
            plan_and.build_plan_and().launch(
                _grid(self.rows, plan_and.THREADS, self.ctx.device),
                plan_and.THREADS,
                self.queue,
                (view(flags), view(more), view(both)),
            )
            flags = both
        plan_keep.build_plan_keep().launch(
            self.lists,
            plan_keep.THREADS,
            self.queue,
            (view(flags), not keeps, self.index, self.count),
        )
        if groups:
            scratch = view(self.ctx.empty(shape, "int32"))
        for group in reversed(groups):
            plan_sort.build_plan_sort(_type_name(group)).launch(
                self.lists,
                plan_sort.THREADS,
                self.queue,
                (view(group), self.index, scratch, self.count),
            )


def _limits(problem: Problem, clauses: Clauses, q_shape: tuple[int, ...], ctx: CallContext) -> Any:
    """Bounds on key rows from KeyRanges, per query row: (lows, highs), or None without any."""
    if not clauses.starts:
        return None
    limits = []
    for bounds, is_end in ((clauses.starts, False), (clauses.ends, True)):
        limit = view(ctx.empty(q_shape, "int32"))
        for place, bound in enumerate(bounds):
            rows = problem.batch * problem.heads * problem.seqlen_q
            plan_clip.build_plan_clip(_type_name(bound)).launch(
                _grid(rows, plan_clip.THREADS, ctx.device),
                plan_clip.THREADS,
                queue_of(ctx),
                (view(bound), limit, problem.seqlen_k, is_end, place == 0),
            )
        limits.append(limit)
    return tuple(limits)


def run_make_plan(problem: Problem, clauses: Clauses, plan: PlanArrays, ctx: CallContext) -> None:
    """Fill `plan` on the stream of `ctx`.

    Workspace: 4 bytes per row of either side where there are groups, 8 per query row for KeyRanges.
    """
    with device_of(ctx):
        queries = _Lists(plan.q_index, plan.q_count, ctx)
        keys = _Lists(plan.k_index, plan.k_count, ctx)
        queries.sort(clauses.q_keeps, clauses.q_groups)
        keys.sort(clauses.k_keeps, clauses.k_groups)
        key_start, key_end = view(plan.key_start), view(plan.key_end)
        pairs = zip(clauses.q_groups, clauses.k_groups, strict=True)
        for place, (q_group, k_group) in enumerate(pairs):
            plan_narrow.build_plan_narrow(_type_name(q_group), _type_name(k_group)).launch(
                _grid(queries.rows, plan_narrow.THREADS, ctx.device),
                plan_narrow.THREADS,
                queries.queue,
                (
                    view(q_group),
                    view(k_group),
                    queries.index,
                    keys.index,
                    queries.count,
                    keys.count,
                    key_start,
                    key_end,
                    place == 0,
                ),
            )
        limits = _limits(problem, clauses, plan.q_index.shape, ctx)
        lows, highs = limits or (queries.index, queries.index)
        plan_ranges.build_plan_ranges().launch(
            _grid(queries.rows, plan_ranges.THREADS, ctx.device),
            plan_ranges.THREADS,
            queries.queue,
            (
                queries.index,
                keys.index,
                queries.count,
                keys.count,
                key_start,
                key_end,
                lows,
                highs,
                _offset(clauses.lo_offset, -FAR),
                _offset(clauses.hi_offset, FAR),
                limits is not None,
                bool(clauses.q_groups),
            ),
        )
