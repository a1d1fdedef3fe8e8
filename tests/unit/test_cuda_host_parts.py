"""The planner's CUDA sources on the host: long lists in parts, each part a block's."""

import host_build
import numpy as np
import planner_host
import pytest
from planner_host import HostKernel, assert_equals_reference, one_pass_problem, plan_on_host
from scfa_core.backends.cupy_raw import planner, planner_shapes

from scfa_core.lowering import Clauses
from scfa_core.problem import Problem

pytestmark = host_build.NEEDS_COMPILER
library = planner_host.compiled


PART = 128  # rows of a part here


@pytest.fixture
def parts(monkeypatch):
    """Let two warps take parts of 128 rows, of lists of any length; names of what ran, in order."""
    monkeypatch.setattr(planner_shapes, "_LEAST_ROWS", 1)
    monkeypatch.setattr(planner_shapes, "_LEAST_PART", PART)
    monkeypatch.setattr(planner_shapes, "_PART_SHAPES", ((64, PART),))
    ran = []
    launch = HostKernel.launch

    def noted(self, *arguments):
        ran.append(self._run.__name__.removeprefix("run_"))
        launch(self, *arguments)

    monkeypatch.setattr(HostKernel, "launch", noted)
    yield ran
    assert tuple(ran[:3]) == planner.PART_KERNELS


@pytest.fixture
def parts_alone(parts, monkeypatch):
    """The same, but plan_sort and plan_ranges never run: every list is served by parts."""
    launch = HostKernel.launch

    def only_parts(self, *arguments):
        if "plan_parts" in self._run.__name__:
            launch(self, *arguments)

    monkeypatch.setattr(HostKernel, "launch", only_parts)
    return parts


@pytest.mark.parametrize("kind", ["hash", "keep", "hash and keep"])
@pytest.mark.parametrize("rows", [1, PART - 1, PART, PART + 1, 2 * PART - 1, 2 * PART + 1, 1003])
@pytest.mark.parametrize("heads_kv", [1, 2])
def test_parts(library, monkeypatch, parts_alone, kind, rows, heads_kv):
    rng = np.random.default_rng(rows)
    for order, share, hi_offset in (
        *((0, 0.5, 1), (1, 0.7, 0), (1, 1.0, 1), (2, 0.0, 1)),
        *((0, 0.7, None), (2, 1.0, None)),
    ):
        problem, clauses = one_pass_problem(
            rng, rows, kind, heads_kv, 20, share, hi_offset=hi_offset
        )
        parts_alone.clear()
        arrays = plan_on_host(library, monkeypatch, problem, clauses, order=order)
        assert_equals_reference(arrays, problem, clauses)


PART_STYLES = ("one group", "all differ", "skewed", "a group a part", "sorted", "far apart", "wide")


def part_ids(rng, style, shape):
    """Ids of 7 bits at most, or within 128 of each other, so that a dropped row needs an eighth."""
    rows = shape[-1]
    if style == "one group":
        return np.full(shape, -3)
    if style == "all differ":
        return rng.permuted(np.broadcast_to(np.arange(rows) - 7, shape), axis=-1)
    if style == "skewed":
        return np.where(rng.random(shape) < 0.97, 5, rng.integers(0, 100, shape))
    if style == "a group a part":
        return np.broadcast_to(np.arange(rows) // PART - 1, shape)
    if style == "sorted":
        return np.sort(rng.integers(0, 128, shape), axis=-1)
    if style == "far apart":
        return rng.choice(np.array([0, 1 << 40, 5 << 40, (1 << 62) + 3]), shape)
    return rng.integers(-1, 16, shape) + (1 << 33)  # across a power of two and beyond 32 bits


@pytest.mark.parametrize("style", PART_STYLES)
@pytest.mark.parametrize("dropping", [False, True])
def test_parts_of_every_style(library, monkeypatch, parts_alone, style, dropping):
    """Two sequences, two query heads on one key head."""
    rng = np.random.default_rng(4)
    rows = 420
    if style == "all differ":
        rows = 128 if dropping else 256  # as many as a digit tells apart
    dtype = np.int64 if style in ("far apart", "wide") else np.int32
    problem = Problem(2, 2, 1, rows, rows, 16, 16, "float32", "cpu", 1.0)
    shapes = (2, 2, rows), (2, 1, rows)
    groups = [(np.ascontiguousarray(part_ids(rng, style, x), dtype),) for x in shapes]
    keeps = [((rng.random(x) < 0.6).astype(np.uint8),) if dropping else () for x in shapes]
    clauses = Clauses(*groups, *keeps, None, 1)
    order = PART_STYLES.index(style) % 3
    arrays = plan_on_host(library, monkeypatch, problem, clauses, order=order)
    assert_equals_reference(arrays, problem, clauses)


@pytest.mark.parametrize("top", [1, 2, 300, 5000, 2**40])
@pytest.mark.parametrize("heads_kv", [1, 2])
def test_parts_leave_what_needs_several_passes(library, monkeypatch, parts, top, heads_kv):
    rng = np.random.default_rng(7)
    dtype = np.int64 if top > 2**31 else np.int32
    problem, clauses = one_pass_problem(rng, 300, "hash and keep", heads_kv, top, 0.8, dtype)
    clauses.q_groups[0][0, 1] %= 7  # with a key head of its own the second head is served
    clauses.k_groups[0][0, 1:] %= 7
    for order in range(3):
        parts.clear()
        arrays = plan_on_host(library, monkeypatch, problem, clauses, order=order)
        assert_equals_reference(arrays, problem, clauses)
        assert parts[3:] == ["plan_sort", "plan_ranges"]


def test_parts_of_several_keeps_and_of_views(library, monkeypatch, parts_alone):
    """Three keep columns a side, ids of one head for all and every second row of an array."""
    rng = np.random.default_rng(8)
    problem = Problem(2, 3, 3, 500, 500, 16, 16, "float32", "cpu", 1.0)
    q_group = np.broadcast_to(rng.integers(0, 30, (2, 1, 500), np.int32), (2, 3, 500))
    k_group = rng.integers(0, 30, (2, 3, 1000), np.int32)[..., ::2]
    keeps = [
        tuple((rng.random((2, 3, 500)) < 0.9).astype(np.uint8) for _ in range(3)) for _ in "qk"
    ]
    clauses = Clauses((q_group,), (k_group,), *keeps, None, 1)
    arrays = plan_on_host(library, monkeypatch, problem, clauses)
    assert_equals_reference(arrays, problem, clauses)


@pytest.mark.parametrize("kind", ["hash", "keep", "hash and keep"])
@pytest.mark.parametrize(
    ("rows", "key_rows"), [(1, 300), (3, PART), (200, 2 * PART + 1), (900, 130)]
)
@pytest.mark.parametrize("bounds", ["below", "window", "ranges"])
def test_keys_alone(library, monkeypatch, parts, kind, rows, key_rows, bounds):
    """Other numbers of queries and keys: key lists are shared by blocks, the queries' are not."""
    rng = np.random.default_rng(rows + key_rows)
    problem = Problem(2, 4, 2, rows, key_rows, 16, 16, "float32", "cpu", 1.0)
    shapes = (2, 4, rows), (2, 2, key_rows)
    groups = [(rng.integers(-1, 20, x, np.int32),) if "hash" in kind else () for x in shapes]
    keeps = [((rng.random(x) < 0.7).astype(np.uint8),) if "keep" in kind else () for x in shapes]
    limits = {"below": (None, key_rows - rows + 1), "window": (key_rows - rows - 50, None)}
    starts = np.sort(rng.integers(-3, key_rows + 3, (2, *shapes[0]), np.int32), axis=0)
    ranges = ((starts[0],), (starts[1],)) if bounds == "ranges" else ()
    clauses = Clauses(*groups, *keeps, *limits.get(bounds, (None, None)), *ranges)
    for order in range(3):
        parts.clear()
        arrays = plan_on_host(library, monkeypatch, problem, clauses, order=order)
        assert_equals_reference(arrays, problem, clauses)
        assert parts[3:] == ["plan_sort", "plan_sort", "plan_ranges"]


@pytest.mark.parametrize("top", [1, 300, 2**40])
def test_keys_alone_that_need_several_passes(library, monkeypatch, parts, top):
    """Lists that parts leave are sorted by one block each, as if there were none."""
    rng = np.random.default_rng(11)
    dtype = np.int64 if top > 2**31 else np.int32
    problem = Problem(1, 2, 2, 7, 500, 16, 16, "float32", "cpu", 1.0)
    groups = [(rng.integers(0, top, (1, 2, rows)).astype(dtype),) for rows in (7, 500)]
    groups[1][0][0, 1] %= 5
    clauses = Clauses(*groups, (), ((rng.random((1, 2, 500)) < 0.8).astype(np.uint8),))
    arrays = plan_on_host(library, monkeypatch, problem, clauses)
    assert_equals_reference(arrays, problem, clauses)
    assert parts[3:] == ["plan_sort", "plan_sort", "plan_ranges"]


def test_more_parts_than_threads(library, monkeypatch, parts_alone):
    """71 parts of 64 rows, 64 threads: only the first part has the lowest id and a dropped key."""
    monkeypatch.setattr(planner_shapes, "_LEAST_PART", 64)
    monkeypatch.setattr(planner_shapes, "_PART_SHAPES", ((64, 64),))
    rng = np.random.default_rng(10)
    problem, clauses = one_pass_problem(rng, 4500, "hash and keep", 1, 6, 1.0)
    clauses.q_groups[0][...] = np.maximum(clauses.q_groups[0], 0)
    clauses.k_groups[0][...] = np.maximum(clauses.k_groups[0], 0)
    clauses.q_groups[0][..., 3] = -1
    clauses.k_keeps[0][..., 5] = 0
    arrays = plan_on_host(library, monkeypatch, problem, clauses, order=2)
    assert_equals_reference(arrays, problem, clauses)


def test_parts_as_they_are_launched(library, monkeypatch):
    """17000 rows as an H100 would take them: 17 blocks of 512 threads, the last one ragged."""
    rng = np.random.default_rng(9)
    problem, clauses = one_pass_problem(rng, 17000, "hash", 1, 31, 1.0)
    ran = {}
    launch = HostKernel.launch

    def noted(self, grid, block, *arguments):
        ran[self._run.__name__] = (grid[0], block)
        launch(self, grid, block, *arguments)

    monkeypatch.setattr(HostKernel, "launch", noted)
    arrays = plan_on_host(library, monkeypatch, problem, clauses, shared_limit=227 * 1024)
    assert_equals_reference(arrays, problem, clauses)
    assert {ran[f"run_{name}"] for name in planner.PART_KERNELS} == {(2 * 17, 512)}


def test_parts_fill_the_card_and_fit_it():
    for limit in (99 * 1024, 163 * 1024, 227 * 1024):
        for lists in (1, 2, 12, 66, 67, 132, 265, 5000):
            for rows in (16384, 65535, 65536, 65537, 10**6):
                found = planner_shapes.choose_parts(lists, rows, 132, limit)
                if lists > 66 and rows < 65536:
                    assert found is None
                    continue
                size = planner_shapes.part_bytes(found.threads, found.max_bits, found.part_rows)
                assert found.shared_bytes == size <= limit - 2048
                assert found.part_rows % found.threads == 0
                assert found.part_rows <= 1 << 16
                assert lists * found.parts(rows) >= 66 or found.part_rows == 1024
    for rows, parts in ((65536, 22), (131072, 22), (262144, 43)):  # of 264 blocks, or twice 264
        assert planner_shapes.choose_parts(12, rows, 132, 227 * 1024).parts(rows) == parts
    for lists, part_rows in ((67, 7680), (132, 8192), (264, 8192), (5000, 8192)):
        assert planner_shapes.choose_parts(lists, 65536, 132, 227 * 1024).part_rows == part_rows
    for lists, rows, limit in ((67, 65535, 227 * 1024), (12, 16383, 227 * 1024), (1, 65536, 9000)):
        assert planner_shapes.choose_parts(lists, rows, 132, limit) is None
