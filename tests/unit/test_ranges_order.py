"""Queries that name ranges are sorted by these: alike on every backend, so that tiles are small."""

import host_build
import numpy as np
import planner_host
import pytest
from planner_host import assert_equals_reference, plan_on_host
from scfa_core.reference.planner import plan_lists

import scfa_core as scfa
from scfa_core.dispatch import load_backend
from scfa_core.lowering import START_BITS, Clauses
from scfa_core.plan import PlanArrays, plan_shapes
from scfa_core.problem import Problem

library = planner_host.compiled
ROWS, KEYS = 700, 5000


def problem_of(seqlen_q=ROWS, seqlen_k=KEYS):
    return Problem(1, 2, 1, seqlen_q, seqlen_k, 16, 16, "float32", "cpu", 1.0)


def cases():
    """Clauses over 700 queries of two heads and 5000 keys."""
    rng = np.random.default_rng(0)
    shape = (1, 2, ROWS)
    start = rng.integers(-50, KEYS, shape)
    ranges = {"starts": (start,), "ends": (start + rng.integers(-9, 900, shape),)}
    group, of_keys = rng.integers(0, 3, shape), rng.integers(0, 3, (1, 1, KEYS))
    keep = (rng.random(shape) < 0.8).astype(np.uint8)
    row = np.broadcast_to(np.arange(ROWS), shape)
    least, most = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    yield "jump", Clauses(**ranges)
    yield "narrow", Clauses(**{name: (x.astype(np.int32),) for name, (x,) in ranges.items()})
    yield "in-order", Clauses(starts=(row,), ends=(row + 40,))
    yield "starts-in-order", Clauses(starts=(row * 7,), ends=ranges["ends"])
    yield "ends-in-order", Clauses(starts=ranges["starts"], ends=(row + 1,), hi_offset=1)
    yield "backwards", Clauses(starts=(row[..., ::-1] * 7,), ends=(row[..., ::-1] * 7 + 9,))
    yield "all-the-same", Clauses(starts=(row * 0,), ends=(row * 0 + 77,))
    yield "of-all-heads", Clauses(**{n: (x[:, :1].repeat(2, 1),) for n, (x,) in ranges.items()})
    far = rng.choice([least, -1, 0, 1023, 1024, KEYS, KEYS + 1, 2**40, most], (2, *shape))
    yield "beyond-the-keys", Clauses(starts=(far[0],), ends=(far[1],))
    yield "dropped", Clauses(q_keeps=(keep,), **ranges)
    yield "groups", Clauses((group,), (of_keys,), hi_offset=900, **ranges)
    yield "groups-in-order", Clauses((np.sort(group),), (of_keys,), q_keeps=(keep,), **ranges)
    more = {name: (x, x[..., ::-1] + 2000) for name, (x,) in ranges.items()}
    yield "two-ranges", Clauses((group,), (of_keys,), **more)
    yield "eight-columns", Clauses((group, row, group, row), (of_keys,) * 4, **more)
    yield "too-many-columns", Clauses((group, row, group, row, row), (of_keys,) * 5, **more)


CASES = dict(cases())


@pytest.mark.parametrize("name", CASES)
def test_numba_cpu_sorts_as_the_reference(name):
    problem = problem_of()
    arrays = [np.full(shape, -7, np.int32) for shape in plan_shapes(problem, "host")]
    backend = load_backend("numba-cpu")
    backend.make_plan(problem, CASES[name], PlanArrays.of(arrays, monotone=False), None)
    assert_equals_reference(arrays[:6], problem, CASES[name])


@host_build.NEEDS_COMPILER
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shared_limit", [100_000, 0], ids=["shared", "global"])
def test_cupy_sorts_as_the_reference(library, monkeypatch, name, shared_limit):
    problem, order = problem_of(), len(name) % 3
    arrays = plan_on_host(
        library, monkeypatch, problem, CASES[name], order=order, shared_limit=shared_limit
    )
    assert_equals_reference(arrays, problem, CASES[name])


def order_of(clauses, seqlen_q=ROWS):
    return plan_lists(clauses, 1, 2, 1, seqlen_q, KEYS)[0]


def test_groups_go_before_starts_in_steps_and_these_before_ends():
    clauses = CASES["groups"]
    columns = (clauses.q_groups[0], *(x.clip(0, KEYS) for x in clauses.starts + clauses.ends))
    for head in range(2):
        group, start, end = (x[0, head] for x in columns)
        right = np.lexsort((np.arange(ROWS), end, start >> START_BITS, group))
        np.testing.assert_array_equal(order_of(clauses)[0, head], right)


def test_in_row_order_where_nothing_is_gained():
    in_order = np.broadcast_to(np.arange(ROWS), (1, 2, ROWS))
    for name in ("in-order", "starts-in-order", "all-the-same"):
        assert (order_of(CASES[name]) == in_order).all() == (name != "starts-in-order")
    clauses = CASES["jump"]
    for rows in (1, 64, 65):
        first = clauses.with_arrays(x[..., :rows] for x in clauses.arrays)
        assert (order_of(first, rows) == in_order[..., :rows]).all() == (rows < 65)


def test_more_columns_than_eight_are_sorted_by_groups_alone():
    clauses = CASES["too-many-columns"]
    assert clauses.sorted_bounds(ROWS) == ()
    assert len(CASES["eight-columns"].sorted_bounds(ROWS)) == 4
    np.testing.assert_array_equal(order_of(clauses), order_of(clauses._replace(starts=(), ends=())))


def visited(pattern, rows):
    """Pairs in tiles of 64 queries and the keys from their first to their last, of visible ones."""
    x = np.zeros((1, 1, rows, 16), np.float32)
    plan = scfa.make_plan(pattern, x, x)
    tiles = -(-rows // 64)
    start, end = (
        np.pad(x[0, 0], (0, 64 * tiles - rows), mode="edge").reshape(tiles, 64)
        for x in (plan.key_start, plan.key_end)
    )
    return 64 * (end.max(1) - start.min(1)).sum() / (end - start).sum()


def test_tiles_of_ranges_are_small_whatever_their_order():
    rng = np.random.default_rng(0)
    rows = 4096
    row = np.arange(rows)[None, None]
    start = rng.integers(0, rows - 40, row.shape)
    assert visited(scfa.KeyRanges(start, start + 40), rows) < 3  # 100 in row order
    some = np.where(row % 64 == 0, 0, row - 64)  # 30 in row order
    assert visited(scfa.KeyRanges(some, row + 1), rows) < 5
    for pattern in (
        scfa.KeyRanges(row - 64, row + 1),
        scfa.KeyRanges(row // 300 * 300, row // 300 * 300 + 300),
        scfa.KeyRanges(row * 0, np.maximum(row + 1, 900)),
    ):
        assert visited(pattern, rows) < 2.1
