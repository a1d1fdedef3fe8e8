"""Clauses to plan, on the device: a few launches, no look at a value, no wait.

Columns are sorted and searched one launch each, so any number of int32 and int64 clauses mix.
plan_causal goes first where the clauses are simple enough, and leaves the others only the lists
whose ids it cannot take in one pass, which the device alone knows.
"""

from __future__ import annotations

from typing import Any

from scfa_core.backends.numba_cuda import (
    plan_and,
    plan_causal,
    plan_clip,
    plan_keep,
    plan_narrow,
    plan_ranges,
    plan_rows,
    plan_sort,
)
from scfa_core.backends.numba_cuda.plan_warp import threads_of
from scfa_core.backends.numba_cuda.views import device_of, multiprocessors, queue_of, view

from scfa_core.arrays import CallContext
from scfa_core.lowering import START_BITS, Clauses
from scfa_core.plan import PlanArrays
from scfa_core.problem import Problem

FAR = 1 << 40  # an offset beyond every row
MOST_ROWS = 1 << 30  # of plan_causal, whose 32-bit numbers of rows run a little beyond a list


def _offset(value: int | None, default: int) -> int:
    return default if value is None else max(-FAR, min(FAR, value))


def _grid(items: int, threads: int, device: int) -> int:
    """Blocks of a kernel whose threads stride over `items`."""
    return max(1, min(-(-items // threads), 16 * multiprocessors(device)))


def _type_name(x: Any) -> str:
    return x.dtype if isinstance(x.dtype, str) else x.dtype.name


def fits_one_pass(problem: Problem, clauses: Clauses) -> bool:
    """Whether plan_causal may serve lists: one group, causal, nothing dropped."""
    return (
        len(clauses.q_groups) == 1
        and not (clauses.q_keeps or clauses.k_keeps or clauses.starts)
        and clauses.lo_offset is None
        and clauses.hi_offset in (0, 1)
        and 0 < problem.seqlen_q <= MOST_ROWS
        and 0 < problem.seqlen_k <= MOST_ROWS
    )


class _Lists:
    """One side of a plan: its rows sorted by keeps, groups and bounds."""

    def __init__(self, index: Any, count: Any, ctx: CallContext) -> None:
        self.shape, self.ctx = index.shape, ctx
        self.index, self.count = view(index), view(count)
        self.lists = self.shape[0] * self.shape[1]
        self.threads = threads_of(self.shape[2])
        self.queue = queue_of(ctx)

    def keep(self, keeps: tuple[Any, ...]) -> None:
        """Write index and count by keeps alone."""
        flags = keeps[0]
        for more in keeps[1:]:
            both = self.ctx.empty(self.shape, "uint8")
            plan_and.build_plan_and().launch(
                _grid(self.lists * self.shape[2], plan_and.THREADS, self.ctx.device),
                plan_and.THREADS,
                self.queue,
                (view(flags), view(more), view(both)),
            )
            flags = both
        plan_keep.build_plan_keep().launch(
            self.lists, self.threads, self.queue, (view(flags), self.index, self.count)
        )

    def write_rows(self) -> None:
        """Write index and count where nothing is dropped or sorted."""
        tiles = plan_rows.tiles_of(self.shape[2])
        plan_rows.build_plan_rows().launch(
            self.lists * tiles, plan_rows.THREADS, self.queue, (self.index, self.count, tiles)
        )

    def sort(
        self,
        keeps: tuple[Any, ...],
        columns: tuple[tuple[Any, int, int], ...],
        scratch: Any,
        done: Any,
        may_be_done: bool,
    ) -> None:
        """Write index and count; leave out lists that are done. Columns: array, limit, shift."""
        if keeps:
            self.keep(keeps)
        elif not columns:
            self.write_rows()
        for place, (column, limit, shift) in enumerate(reversed(columns)):
            plan_sort.build_plan_sort(_type_name(column)).launch(
                self.lists,
                self.threads,
                self.queue,
                (
                    view(column),
                    self.index,
                    scratch,
                    self.count,
                    done,
                    not keeps and place == 0,
                    may_be_done,
                    limit,
                    shift,
                ),
            )


def _groups(arrays: tuple[Any, ...]) -> tuple[tuple[Any, int, int], ...]:
    """Columns whose values are taken as they are."""
    return tuple((x, plan_sort.UNCLIPPED, 0) for x in arrays)


def _bounds(problem: Problem, clauses: Clauses) -> tuple[tuple[Any, int, int], ...]:
    """Columns of starts and ends by which queries are sorted after their groups."""
    bounds = clauses.sorted_bounds(problem.seqlen_q)
    shifts = (START_BITS,) * (len(bounds) // 2) + (0,) * (len(bounds) // 2)
    return tuple((x, problem.seqlen_k, shift) for x, shift in zip(bounds, shifts, strict=True))


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

    Workspace: 4 bytes per list for plan_causal, 4 per key row where keys are sorted that outnumber
    the queries, 8 per query row for KeyRanges, 1 per row where keeps meet. Sorting borrows
    key_start and key_end, which are filled later.
    """
    with device_of(ctx):
        queries = _Lists(plan.q_index, plan.q_count, ctx)
        keys = _Lists(plan.k_index, plan.k_count, ctx)
        key_start, key_end = view(plan.key_start), view(plan.key_end)
        arrays = (queries.index, keys.index, queries.count, keys.count, key_start, key_end)
        done, may_be_done = queries.count, fits_one_pass(problem, clauses)
        if may_be_done:
            done = view(ctx.empty(plan.q_count.shape, "int32"))
            (q_group,), (k_group,) = clauses.q_groups, clauses.k_groups
            plan_causal.build_plan_causal(_type_name(q_group), _type_name(k_group)).launch(
                queries.lists,
                threads_of(max(problem.seqlen_q, problem.seqlen_k)),
                queries.queue,
                (view(q_group), view(k_group), *arrays, done, clauses.hi_offset == 1),
            )
        k_scratch = key_end
        if clauses.k_groups and problem.seqlen_k > problem.seqlen_q:
            k_scratch = view(ctx.empty(plan.k_index.shape, "int32"))
        columns = (*_groups(clauses.q_groups), *_bounds(problem, clauses))
        queries.sort(clauses.q_keeps, columns, key_start, done, may_be_done)
        keys.sort(clauses.k_keeps, _groups(clauses.k_groups), k_scratch, done, may_be_done)
        if problem.seqlen_q == 0:
            return
        *before_last, last = (*zip(clauses.q_groups, clauses.k_groups, strict=True),) or (None,)
        for place, (q_group, k_group) in enumerate(before_last):
            plan_narrow.build_plan_narrow(_type_name(q_group), _type_name(k_group)).launch(
                queries.lists * -(-problem.seqlen_q // plan_narrow.TILE),
                plan_narrow.THREADS,
                queries.queue,
                (view(q_group), view(k_group), *arrays, place == 0),
            )
        limits = _limits(problem, clauses, plan.q_index.shape, ctx)
        q_group, k_group = last or (plan.q_index, plan.k_index)
        plan_ranges.build_plan_ranges(_type_name(q_group), _type_name(k_group)).launch(
            queries.lists * -(-problem.seqlen_q // plan_ranges.TILE),
            plan_ranges.THREADS,
            queries.queue,
            (
                view(q_group),
                view(k_group),
                *arrays,
                *(limits or (queries.index, queries.index)),
                done,
                _offset(clauses.lo_offset, -FAR),
                _offset(clauses.hi_offset, FAR),
                may_be_done,
                limits is not None,
                last is not None,
                not before_last,
            ),
        )
