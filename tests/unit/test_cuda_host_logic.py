"""The planner's CUDA sources on the host against the reference: sorting, ranges and digits."""

import ctypes

import host_build
import numpy as np
import planner_host
import pytest
from planner_host import assert_equals_reference, check_spec, plan_on_host

from scfa_core import testing
from scfa_core.lowering import Clauses
from scfa_core.problem import Problem

pytestmark = host_build.NEEDS_COMPILER
library = planner_host.compiled


@pytest.mark.parametrize("seed", range(24))
def test_random_problems(library, monkeypatch, seed):
    spec = testing.random_spec(seed, most_rows=300)
    check_spec(library, monkeypatch, spec, order=seed % 3)


@pytest.mark.parametrize("style", testing.GROUP_STYLES)
@pytest.mark.parametrize("shared_limit", [100_000, 0], ids=["shared", "global"])
def test_every_style_of_ids(library, monkeypatch, style, shared_limit):
    parts = (testing.Part("hash", style, 16), testing.Part("keep", "uniform", 50))
    spec = testing.Spec(heads=2, seqlen_q=150, seqlen_k=230, parts=parts, seed=3)
    check_spec(library, monkeypatch, spec, shared_limit=shared_limit)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_more_threads_than_one_stretch(library, monkeypatch, order):
    """1300 rows: 256 threads, several rounds a warp, and a second tile of ranges."""
    parts = (testing.Part("hash", "uniform", 700), testing.Part("documents", "uniform", 3))
    spec = testing.Spec(seqlen_q=1300, seqlen_k=1100, parts=parts, seed=5)
    check_spec(library, monkeypatch, spec, order=order)


def test_many_keys_between_neighbouring_queries(library, monkeypatch):
    """Few kept queries, all keys: a round of 32 queries passes far more than 64 keys."""
    rng = np.random.default_rng(9)
    problem = Problem(1, 2, 1, 1500, 1500, 16, 16, "float32", "cpu", 1.0)
    q_keep = (rng.random((1, 2, 1500)) < 0.1).astype(np.uint8)
    q_group = rng.integers(0, 2, (1, 2, 1500), np.int32)
    k_group = np.zeros((1, 1, 1500), np.int32)
    for offsets in ((None, 1), (-400, 1), (-3, 900), (5, -5)):
        clauses = Clauses((q_group,), (k_group,), (q_keep,), (), *offsets)
        arrays = plan_on_host(library, monkeypatch, problem, clauses)
        assert_equals_reference(arrays, problem, clauses)


def test_largest_block(library, monkeypatch):
    spec = testing.Spec(
        seqlen_q=4200, seqlen_k=90, head_dim=16, parts=(testing.Part("hash", "zipf", 16),), seed=1
    )
    check_spec(library, monkeypatch, spec)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (5, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("grouped", [False, True])
def test_empty_and_single_rows(library, monkeypatch, seqlen_q, seqlen_k, grouped):
    problem = Problem(2, 2, 1, seqlen_q, seqlen_k, 16, 16, "float32", "cpu", 1.0)
    groups = {}
    if grouped:
        groups = {
            "q_groups": (np.zeros((2, 2, seqlen_q), np.int32),),
            "k_groups": (np.zeros((2, 1, seqlen_k), np.int64),),
        }
    clauses = Clauses(hi_offset=1, **groups)
    assert_equals_reference(plan_on_host(library, monkeypatch, problem, clauses), problem, clauses)


def test_eight_wide_columns_and_eight_keeps(library, monkeypatch):
    rng = np.random.default_rng(0)
    problem = Problem(1, 1, 1, 70, 40, 16, 16, "float32", "cpu", 1.0)
    pool = np.array([np.iinfo(np.int64).min, 5 << 40, 0, np.iinfo(np.int64).max ^ 7])

    def columns(shape, dtype):
        wide = [rng.choice(pool, shape).astype(dtype) for _ in range(3)]
        return (*wide, *(rng.integers(-1, 2, shape).astype(dtype) for _ in range(5)))

    def flags(shape):
        return tuple((rng.random(shape) < 0.9).astype(np.uint8) for _ in range(8))

    clauses = Clauses(
        q_groups=columns((1, 1, 70), np.int64),
        k_groups=columns((1, 1, 40), np.int64),
        q_keeps=flags((1, 1, 70)),
        k_keeps=flags((1, 1, 40)),
        lo_offset=-30,
    )
    assert_equals_reference(plan_on_host(library, monkeypatch, problem, clauses), problem, clauses)


def test_too_many_clauses_are_refused(library, monkeypatch):
    problem = Problem(1, 1, 1, 4, 4, 16, 16, "float32", "cpu", 1.0)
    clauses = Clauses(q_keeps=(np.ones((1, 1, 4), np.uint8),) * 9)
    with pytest.raises(ValueError, match="at most 8 keep clauses"):
        plan_on_host(library, monkeypatch, problem, clauses)


def test_digits_order_rows_as_their_keys_do(library):
    """For random keys, sorting by the digits of all passes is sorting by (dropped, keys)."""
    rng = np.random.default_rng(1)
    for trial in range(300):
        n_columns, rows = int(rng.integers(0, 9)), int(rng.integers(1, 12))
        mask = rng.integers(0, 2**64, (n_columns, 1), dtype=np.uint64)
        for _ in range(trial % 5):
            mask &= rng.integers(0, 2**64, (n_columns, 1), dtype=np.uint64)
        keys = rng.integers(0, 2**64, (n_columns, rows), dtype=np.uint64) & mask
        dropped = (rng.random(rows) < 0.2).astype(np.uint8)
        limit = int(rng.integers(1, 9))
        digits, bits = np.zeros((600, rows), np.uint32), np.zeros(600, np.int32)
        passes = library.digits_of(
            keys.ctypes.data_as(ctypes.c_void_p),
            dropped.ctypes.data_as(ctypes.c_void_p),
            n_columns,
            rows,
            limit,
            digits.ctypes.data_as(ctypes.c_void_p),
            bits.ctypes.data_as(ctypes.c_void_p),
        )
        assert (bits[:passes] <= limit).all()
        assert (digits[:passes] < (1 << bits[:passes, None])).all()
        order = np.arange(rows)
        for digit in digits[:passes]:
            order = order[np.argsort(digit[order], kind="stable")]
        want = sorted(
            range(rows),
            key=lambda r: (dropped[r], *(() if dropped[r] else keys[:, r].tolist()), r),
        )
        assert order.tolist() == want


def test_searches_find_every_answer(library):
    lengths = [*range(0, 70), 1023, 1024, 1025, 1056, 1057, 33 * 32, 4097]
    for length in lengths:
        step = max(length // 300, 1)
        for answer in {*range(0, length + 1, step), length}:
            assert library.wide_search(length, answer) == answer
            assert library.binary_search(length, answer) == answer
    for length in (2**31 - 1, 2**31 - 33):
        for answer in (0, 1, length // 2, length - 1, length):
            assert library.wide_search(length, answer) == answer
            assert library.binary_search(length, answer) == answer
