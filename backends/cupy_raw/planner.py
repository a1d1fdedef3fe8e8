"""Clauses to plan, on the device: one to five launches, no look at a value, no wait.

Mirrors cuda/plan_params.cuh field by field. Lists are sorted by plan_sort and ranges found by
plan_ranges; where there is nothing to sort, plan_identity writes both at once. plan_causal goes
first where the clauses are simple enough, and leaves the others only the lists whose ids it cannot
take in one pass, which the device alone knows. Long lists are shared by several blocks where they
are few or very long: then three plan_parts kernels take plan_causal's place.
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
FAR = 1 << 40  # an offset beyond every row
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
    """Whether plan_causal may serve lists: one group at most, as many queries as keys, causal."""
    return (
        clauses.hi_offset in (0, 1)
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


def sort_params(
    problem: Problem,
    clauses: Clauses,
    plan: PlanArrays,
    k_scratch: int,
    done: int,
    capacity: int,
    one_pass: OnePass | None,
) -> bytes:
    """Pack SortParams; query lists borrow key_start as scratch, which plan_ranges fills later."""
    one_pass = one_pass or OnePass(0, 0, 0, staged=False)
    bounds = clauses.sorted_bounds(problem.seqlen_q)
    queries = _LIST_TAIL.pack(
        plan.q_index.pointer,
        plan.q_count.pointer,
        plan.key_start.pointer,
        len(clauses.q_groups) + len(bounds),
        len(clauses.q_keeps),
        problem.heads,
        problem.seqlen_q,
        len(bounds),
        problem.seqlen_k,
    )
    keys = _LIST_TAIL.pack(
        plan.k_index.pointer,
        plan.k_count.pointer,
        k_scratch,
        len(clauses.k_groups),
        len(clauses.k_keeps),
        problem.heads_kv,
        problem.seqlen_k,
        0,
        0,
    )
    return b"".join(
        (
            _columns((*clauses.q_groups, *bounds), "group"),
            _columns(clauses.q_keeps, "keep"),
            queries,
            _columns(clauses.k_groups, "group"),
            _columns(clauses.k_keeps, "keep"),
            keys,
            _SORT_TAIL.pack(
                problem.batch * problem.heads,
                plan.key_start.pointer,
                plan.key_end.pointer,
                done,
                capacity,
                problem.group_size,
                one_pass.max_bits,
                one_pass.staged,
                clauses.hi_offset == 1,
                one_pass.part_rows,
            ),
        )
    )


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


def _one_pass(problem: Problem, clauses: Clauses, device: int) -> OnePass | None:
    """How the kernels that go first are launched; None: not at all."""
    if not fits_one_pass(problem, clauses):
        return None
    how = (
        problem.batch * problem.heads,
        problem.seqlen_q,
        multiprocessors(device),
        shared_limit(device),
    )
    return choose_parts(*how) or choose_one_pass(*how)


def _workspace(problem: Problem, clauses: Clauses, one_pass: OnePass | None) -> tuple[int, int]:
    """Words for scratch of the key lists, and for the flags after them; 0, 0: none is needed.

    What blocks of a list share lies in the scratch, which is free until plan_sort.
    """
    if not _needs_sort(problem, clauses):
        return 0, 0
    query_rows = problem.batch * problem.heads * problem.seqlen_q
    key_rows = problem.batch * problem.heads_kv * problem.seqlen_k
    if one_pass:
        lists, shared_words = problem.batch * problem.heads, 0
        if one_pass.part_rows:
            part_words = _SURVEY_WORDS + (2 << one_pass.max_bits)
            shared_words = lists * one_pass.parts(problem.seqlen_q) * part_words
        return max(key_rows, shared_words), lists
    return (key_rows, 0) if key_rows > query_rows else (0, 0)  # else key_end, filled later, serves


def _steps(
    problem: Problem,
    clauses: Clauses,
    plan: PlanArrays,
    device: int,
    one_pass: OnePass | None,
    k_scratch: int,
    done: int,
) -> list[_Step]:
    """What to launch, in order; `k_scratch` and `done` are where `_workspace` is, or 0."""
    n_query_lists = problem.batch * problem.heads
    n_key_lists = problem.batch * problem.heads_kv
    if not _needs_sort(problem, clauses):
        tiles_q, tiles_k = tiles = list_tiles(problem, IDENTITY_TILE)
        blocks = n_query_lists * tiles_q + n_key_lists * tiles_k
        params = range_params(problem, clauses, plan, 0, tiles)
        return [_Step(_kernel("plan_identity", device), (blocks, 1, 1), RANGE_THREADS, 0, params)]
    steps = []
    lengths = (problem.seqlen_q, problem.seqlen_k)
    threads = sort_threads(max(lengths))
    capacity = sort_capacity(threads, lengths, shared_limit(device))
    params = sort_params(
        problem, clauses, plan, k_scratch or plan.key_end.pointer, done, capacity, one_pass
    )
    first: dict[str, int] = {}  # what goes before the others, and its shared memory
    if one_pass and one_pass.part_rows:
        counts = count_bytes(one_pass.threads, one_pass.max_bits)
        first = dict(zip(PART_KERNELS, (0, counts, one_pass.shared_bytes), strict=True))
    elif one_pass:
        first = {"plan_causal": one_pass.shared_bytes}
    kernels = _kernels((*first, "plan_sort", "plan_ranges"), device)
    for name, shared_bytes in first.items():
        assert one_pass is not None
        blocks = n_query_lists * one_pass.parts(problem.seqlen_q)
        steps.append(_Step(kernels[name], (blocks, 1, 1), one_pass.threads, shared_bytes, params))
    grid = (n_query_lists + n_key_lists, 1, 1)
    shared_bytes = sort_shared_bytes(threads, capacity)
    steps.append(_Step(kernels["plan_sort"], grid, threads, shared_bytes, params))
    tiles = list_tiles(problem, RANGE_TILE)
    grid = (n_query_lists * tiles[0], 1, 1)
    params = range_params(problem, clauses, plan, done, tiles)
    steps.append(_Step(kernels["plan_ranges"], grid, RANGE_THREADS, 0, params))
    return steps


def _allocate(workspace: tuple[int, int], ctx: CallContext) -> tuple[int, int]:
    """Addresses of the key lists' scratch and of the flags; 0 where there is none."""
    scratch_words, flags = workspace
    if not scratch_words:
        return 0, 0
    scratch: int = ctx.empty((scratch_words + flags,), "int32").pointer
    return scratch, scratch + 4 * scratch_words if flags else 0


def run_make_plan(problem: Problem, clauses: Clauses, plan: PlanArrays, ctx: CallContext) -> None:
    """Fill `plan` on the stream of `ctx`.

    Workspace: 4 bytes per key row where plan_causal goes first or the keys outnumber the query
    rows, and 4 bytes per list. Where several blocks share a list, 2 KB for each of them if that is
    more than the key rows take.
    """
    one_pass = _one_pass(problem, clauses, ctx.device)
    k_scratch, done = _allocate(_workspace(problem, clauses, one_pass), ctx)
    for kernel, grid, threads, shared_bytes, params in _steps(
        problem, clauses, plan, ctx.device, one_pass, k_scratch, done
    ):
        kernel.launch(grid, threads, shared_bytes, ctx.stream, params)


def bind_make_plan(problem: Problem, clauses: Clauses, device: int) -> Bound:
    """Settle all of `run_make_plan` but addresses; those in `clauses` do not matter."""
    one_pass = _one_pass(problem, clauses, device)
    workspace = _workspace(problem, clauses, one_pass)
    slots = marks(_PLAN_SLOTS + 2 + len(clauses.arrays))
    clauses = clauses.with_arrays(
        x._replace(pointer=mark)
        for x, mark in zip(clauses.arrays, slots[_PLAN_SLOTS + 2 :], strict=True)
    )
    lists = [DeviceArray(at, (), (), "int32", device) for at in slots[:_PLAN_SLOTS]]
    plan = PlanArrays.of([*lists, None], clauses.monotone)
    k_scratch = slots[_PLAN_SLOTS] if workspace[0] else 0
    done = slots[_PLAN_SLOTS + 1] if workspace[1] else 0
    launches: dict[bytes, list[Callable[[int, bytes], None]]] = {}  # by their common argument
    for step in _steps(problem, clauses, plan, device, one_pass, k_scratch, done):
        enqueue = step.kernel.bind(step.grid, step.threads, step.shared_bytes)
        launches.setdefault(step.params, []).append(enqueue)
    groups = [(Template(params, len(slots)).fill, group) for params, group in launches.items()]

    def bound(plan: PlanAddresses, arrays: tuple[int, ...], ctx: CallContext) -> None:
        addresses = (*plan[:_PLAN_SLOTS], *_allocate(workspace, ctx), *arrays)
        stream = ctx.stream
        for fill, enqueues in groups:
            params = fill(addresses)
            for enqueue in enqueues:
                enqueue(stream, params)

    return bound
