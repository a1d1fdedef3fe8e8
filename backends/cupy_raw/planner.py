"""Clauses to plan, on the device: one to six launches, no look at a value, no wait.

Mirrors cuda/plan_params.cuh field by field. Lists are sorted by plan_sort and ranges found by
plan_ranges; where there is nothing to sort, plan_identity writes both at once. plan_causal goes
first where the clauses are simple enough, and leaves the others only the lists whose ids it cannot
take in one pass, which the device alone knows. Long lists are shared by several blocks where they
are few or very long: then three plan_parts kernels take plan_causal's place. Where the clauses are
not so simple they do so for the lists of keys alone, as plan_sort gives a list to one block; and
plan_causal does where keys outnumber queries, as its one pass is the faster one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

from scfa_core.backends.cupy_raw.loader import (
    Kernel,
    get_kernel,
    multiprocessors,
    shared_limit,
    side_by_side,
)
from scfa_core.backends.cupy_raw.planner_shapes import (
    OnePass,
    choose_one_pass,
    choose_parts,
    count_bytes,
    sort_capacity,
    sort_shared_bytes,
    sort_threads,
)
from scfa_core.backends.cupy_raw.prepared import Template, marks

from scfa_core.arrays import CallContext, DeviceArray
from scfa_core.dispatch import Bound
from scfa_core.errors import PatternError
from scfa_core.lowering import Clauses
from scfa_core.plan import PlanAddresses, PlanArrays
from scfa_core.problem import Problem

PART_KERNELS = ("plan_parts_survey", "plan_parts_count", "plan_parts_place")
KERNEL_NAMES = ("plan_causal", *PART_KERNELS, "plan_sort", "plan_ranges", "plan_identity")
MAX_COLUMNS = 8  # kMaxColumns
RANGE_TILE = 4096  # kTile of plan_ranges
IDENTITY_TILE = 1024  # kTile of plan_identity
RANGE_THREADS = 256
RANGE_STRETCH = 512  # kStretch of plan_ranges: queries of one warp
FAR = 1 << 40  # an offset beyond every row
_SEES = {0: 0, 1: 1, None: 2}  # hi_offset -> kSeesBefore, kSeesItself, kSeesAll
_SURVEY_WORDS = 10  # PartSurvey

_COLUMN = struct.Struct("<Qqqqq")
_LIST_TAIL = struct.Struct("<QQQiiiiii")
_SORT_TAIL = struct.Struct("<qQQQiiiiii")
_RANGE_TAIL = struct.Struct("<qqQQQQQQQiiiiiiiiiiii")
_NO_COLUMN = bytes(_COLUMN.size)
_PLAN_SLOTS = 6  # arrays of a plan that are filled here: all but `work`


def _columns(arrays: tuple[DeviceArray, ...], what: str) -> bytes:
    """Pack up to 8 (batch, heads, rows) arrays."""
    if len(arrays) > MAX_COLUMNS:
        raise PatternError(
            f"the cupy backend takes at most {MAX_COLUMNS} {what} clauses in one intersection, got "
            f"{len(arrays)}: merge some into one array"
        )
    packed = [_COLUMN.pack(x.pointer, *x.strides, x.dtype == "int64") for x in arrays]
    return b"".join(packed) + _NO_COLUMN * (MAX_COLUMNS - len(arrays))


def _offset(value: int | None, default: int) -> int:
    return default if value is None else max(-FAR, min(FAR, value))


def fits_one_pass(problem: Problem, clauses: Clauses) -> bool:
    """Whether plan_causal may serve lists: one group at most, as many queries as keys.

    A query sees the keys of its group before it, those up to its own row, or all.
    """
    return (
        clauses.hi_offset in (None, 0, 1)
        and clauses.lo_offset is None
        and not clauses.starts
        and problem.seqlen_q == problem.seqlen_k > 0
        and len(clauses.q_groups) <= 1
        and all(q.dtype == k.dtype for q, k in zip(clauses.q_groups, clauses.k_groups, strict=True))
    )


@cache
def _kernel(name: str, device: int) -> Kernel:
    return get_kernel(f"scfa_{name}", f"{name}.cu", (), device)


def _kernels(names: tuple[str, ...], device: int) -> dict[str, Kernel]:
    """Those of one plan by name."""
    side_by_side((names, device), [partial(_kernel, name, device) for name in names])
    return {name: _kernel(name, device) for name in names}


def _list_set(
    groups: tuple[DeviceArray, ...],
    bounds: tuple[DeviceArray, ...],
    keeps: tuple[DeviceArray, ...],
    pointers: tuple[int, int, int],
    sizes: tuple[int, int],
    seqlen_k: int = 0,
) -> bytes:
    """Pack ListSet; `pointers` are index, count, scratch, `sizes` heads and rows of a list."""
    columns = _columns((*groups, *bounds), "group") + _columns(keeps, "keep")
    counts = (len(groups) + len(bounds), len(keeps), *sizes, len(bounds), seqlen_k)
    return columns + _LIST_TAIL.pack(*pointers, *counts)


def sort_params(
    problem: Problem,
    clauses: Clauses,
    plan: PlanArrays,
    k_scratch: int,
    done: int,
    capacity: int,
    one_pass: OnePass | None,
    *,
    keys_alone: bool = False,
) -> bytes:
    """Pack SortParams; query lists borrow key_start as scratch, which plan_ranges fills later.

    With `keys_alone` the lists of keys stand in both places, and there are no ranges.
    """
    one_pass = one_pass or OnePass(0, 0, 0, staged=False)
    lists, group_size = problem.batch * problem.heads, problem.group_size
    ranges = (plan.key_start.pointer, plan.key_end.pointer)
    pointers = (plan.k_index.pointer, plan.k_count.pointer, k_scratch)
    sizes = (problem.heads_kv, problem.seqlen_k)
    queries = keys = _list_set(clauses.k_groups, (), clauses.k_keeps, pointers, sizes)
    if keys_alone:
        lists, group_size, ranges = problem.batch * problem.heads_kv, 1, (0, 0)
    else:
        bounds = clauses.sorted_bounds(problem.seqlen_q)
        pointers = (plan.q_index.pointer, plan.q_count.pointer, plan.key_start.pointer)
        sizes = (problem.heads, problem.seqlen_q)
        queries = _list_set(
            clauses.q_groups, bounds, clauses.q_keeps, pointers, sizes, problem.seqlen_k
        )
    tail = (
        *(lists, *ranges, done, capacity, group_size, one_pass.max_bits, one_pass.staged),
        *(_SEES[None] if keys_alone else _SEES.get(clauses.hi_offset, 0), one_pass.part_rows),
    )
    return queries + keys + _SORT_TAIL.pack(*tail)


def range_params(
    problem: Problem, clauses: Clauses, plan: PlanArrays, done: int, tiles: tuple[int, int]
) -> bytes:
    """Pack RangeParams."""
    tail = _RANGE_TAIL.pack(
        _offset(clauses.lo_offset, -FAR),
        _offset(clauses.hi_offset, FAR),
        plan.q_index.pointer,
        plan.q_count.pointer,
        plan.k_index.pointer,
        plan.k_count.pointer,
        plan.key_start.pointer,
        plan.key_end.pointer,
        done,
        len(clauses.q_groups),
        len(clauses.starts),
        clauses.monotone,
        problem.heads,
        problem.heads_kv,
        problem.group_size,
        problem.seqlen_q,
        problem.seqlen_k,
        problem.batch,
        *tiles,
        0,
    )
    return b"".join(
        (
            _columns(clauses.q_groups, "group"),
            _columns(clauses.k_groups, "group"),
            _columns(clauses.starts, "key range"),
            _columns(clauses.ends, "key range"),
            tail,
        )
    )


def list_tiles(problem: Problem, tile: int) -> tuple[int, int]:
    """Tiles of a query list and of a key list; an empty list has one, which writes its count."""
    return max(-(-problem.seqlen_q // tile), 1), max(-(-problem.seqlen_k // tile), 1)


class _Step(NamedTuple):
    """One launch with its packed arguments."""

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    params: bytes


def _needs_sort(problem: Problem, clauses: Clauses) -> bool:
    by_bounds = clauses.sorted_bounds(problem.seqlen_q)
    return bool(clauses.q_groups or clauses.q_keeps or clauses.k_keeps or by_bounds)


class _First(NamedTuple):
    """What goes before plan_sort, and the workspace of all."""

    one_pass: OnePass | None = None  # plan_causal, or the plan_parts kernels
    keys_alone: bool = False  # for lists of keys
    scratch_words: int = 0  # of the key lists; what blocks of a list share lies there before
    flags: int = 0  # whether a list is done; after the scratch


def _first(problem: Problem, clauses: Clauses, device: int) -> _First:
    """Choose what goes first; words and flags are 0 where none are needed."""
    if not _needs_sort(problem, clauses):
        return _First()
    card = (multiprocessors(device), shared_limit(device))
    lists, rows = problem.batch * problem.heads, problem.seqlen_q
    key_lists, key_rows = problem.batch * problem.heads_kv, problem.seqlen_k
    words = key_lists * key_rows
    if fits_one_pass(problem, clauses):
        one_pass = choose_parts(lists, rows, *card) or choose_one_pass(lists, rows, *card)
        return _First(one_pass, False, max(words, _shared_words(one_pass, lists, rows)), lists)
    if (clauses.k_groups or clauses.k_keeps) and len(clauses.k_groups) <= 1:
        alone = choose_parts(key_lists, key_rows, *card)
        if not alone and words > lists * rows:
            alone = choose_one_pass(key_lists, key_rows, *card)
        if alone:
            words = max(words, _shared_words(alone, key_lists, key_rows))
            return _First(alone, True, words, key_lists)
    # Where the queries have as many rows key_end, filled later, serves as scratch.
    return _First(scratch_words=words if words > lists * rows else 0)


def _shared_words(one_pass: OnePass, lists: int, rows: int) -> int:
    """Words that blocks of a list share, of all lists."""
    if not one_pass.part_rows:
        return 0
    return lists * one_pass.parts(rows) * (_SURVEY_WORDS + (2 << one_pass.max_bits))


def _steps(
    problem: Problem,
    clauses: Clauses,
    plan: PlanArrays,
    device: int,
    first: _First,
    k_scratch: int,
    done: int,
) -> list[_Step]:
    """What to launch, in order; `k_scratch` and `done` are where that workspace is, or 0."""
    lists, key_lists = problem.batch * problem.heads, problem.batch * problem.heads_kv
    rows, key_rows = problem.seqlen_q, problem.seqlen_k
    if not _needs_sort(problem, clauses):
        tiles_q, tiles_k = tiles = list_tiles(problem, IDENTITY_TILE)
        blocks = lists * tiles_q + key_lists * tiles_k
        params = range_params(problem, clauses, plan, 0, tiles)
        return [_Step(_kernel("plan_identity", device), (blocks, 1, 1), RANGE_THREADS, 0, params)]

    before: dict[str, int] = {}  # what goes first, and its shared memory
    if first.one_pass and first.one_pass.part_rows:
        counts = count_bytes(first.one_pass.threads, first.one_pass.max_bits)
        before = dict(zip(PART_KERNELS, (0, counts, first.one_pass.shared_bytes), strict=True))
    elif first.one_pass:
        before = {"plan_causal": first.one_pass.shared_bytes}
    kernels = _kernels((*before, "plan_sort", "plan_ranges"), device)
    steps = []

    def sort(lists: int, lengths: tuple[int, int], one_pass: OnePass | None, done: int) -> None:
        """Sort so many lists, after what goes first where there is a `one_pass`."""
        threads = sort_threads(max(lengths))
        capacity = sort_capacity(threads, lengths, shared_limit(device))
        scratch = k_scratch or plan.key_end.pointer
        keys_alone = first.keys_alone and one_pass is not None
        arguments = (problem, clauses, plan, scratch, done, capacity, one_pass)
        params = sort_params(*arguments, keys_alone=keys_alone)
        if one_pass:
            blocks = key_lists if keys_alone else problem.batch * problem.heads
            grid = (blocks * one_pass.parts(lengths[0]), 1, 1)
            for name, size in before.items():
                steps.append(_Step(kernels[name], grid, one_pass.threads, size, params))
        size = sort_shared_bytes(threads, capacity)
        steps.append(_Step(kernels["plan_sort"], (lists, 1, 1), threads, size, params))

    if first.keys_alone:
        sort(key_lists, (key_rows, key_rows), first.one_pass, done)
        sort(lists, (rows, rows), None, 0)
        done = 0
    else:
        sort(lists + key_lists, (rows, key_rows), first.one_pass, done)
    tiles = list_tiles(problem, RANGE_TILE)
    params = range_params(problem, clauses, plan, done, tiles)
    grid = (lists * tiles[0], 1, 1)
    threads = RANGE_THREADS if rows > RANGE_STRETCH else 32  # warps without queries take room
    steps.append(_Step(kernels["plan_ranges"], grid, threads, 0, params))
    return steps


def _allocate(first: _First, ctx: CallContext) -> tuple[int, int]:
    """Addresses of the key lists' scratch and of the flags; 0 where there is none."""
    if not first.scratch_words:
        return 0, 0
    scratch: int = ctx.empty((first.scratch_words + first.flags,), "int32").pointer
    return scratch, scratch + 4 * first.scratch_words if first.flags else 0


def run_make_plan(problem: Problem, clauses: Clauses, plan: PlanArrays, ctx: CallContext) -> None:
    """Fill `plan` on the stream of `ctx`.

    Workspace: 4 bytes per key row where another kernel goes before plan_sort or the keys outnumber
    the query rows, and 4 bytes per list. Where several blocks share a list, 2 KB for each of them
    if that is more than the key rows take.
    """
    first = _first(problem, clauses, ctx.device)
    k_scratch, done = _allocate(first, ctx)
    for kernel, grid, threads, shared_bytes, params in _steps(
        problem, clauses, plan, ctx.device, first, k_scratch, done
    ):
        kernel.launch(grid, threads, shared_bytes, ctx.stream, params)


def bind_make_plan(problem: Problem, clauses: Clauses, device: int) -> Bound:
    """Settle all of `run_make_plan` but addresses; those in `clauses` do not matter."""
    first = _first(problem, clauses, device)
    slots = marks(_PLAN_SLOTS + 2 + len(clauses.arrays))
    clauses = clauses.with_arrays(
        x._replace(pointer=mark)
        for x, mark in zip(clauses.arrays, slots[_PLAN_SLOTS + 2 :], strict=True)
    )
    lists = [DeviceArray(at, (), (), "int32", device) for at in slots[:_PLAN_SLOTS]]
    plan = PlanArrays.of([*lists, None], clauses.monotone)
    k_scratch = slots[_PLAN_SLOTS] if first.scratch_words else 0
    done = slots[_PLAN_SLOTS + 1] if first.flags else 0
    launches: dict[bytes, list[Callable[[int, bytes], None]]] = {}  # by their common argument
    for step in _steps(problem, clauses, plan, device, first, k_scratch, done):
        enqueue = step.kernel.bind(step.grid, step.threads, step.shared_bytes)
        launches.setdefault(step.params, []).append(enqueue)
    groups = [(Template(params, len(slots)).fill, group) for params, group in launches.items()]

    def bound(plan: PlanAddresses, arrays: tuple[int, ...], ctx: CallContext) -> None:
        addresses = (*plan[:_PLAN_SLOTS], *_allocate(first, ctx), *arrays)
        stream = ctx.stream
        for fill, enqueues in groups:
            params = fill(addresses)
            for enqueue in enqueues:
                enqueue(stream, params)

    return bound
