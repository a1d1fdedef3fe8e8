"""The planner's CUDA sources on the host: lists that one pass serves, and those that it leaves."""

import host_build
import numpy as np
import planner_host
import pytest
from planner_host import HostKernel, assert_equals_reference, one_pass_problem, plan_on_host
from scfa_core.backends.cupy_raw import planner_shapes
from scfa_core.backends.cupy_raw.planner_shapes import choose_one_pass, one_pass_bytes

from scfa_core.lowering import Clauses
from scfa_core.problem import Problem

pytestmark = host_build.NEEDS_COMPILER
library = planner_host.compiled


@pytest.mark.parametrize("kind", ["hash", "keep", "hash and keep"])
@pytest.mark.parametrize("rows", [1, 31, 33, 130, 1100])
@pytest.mark.parametrize("heads_kv", [1, 2])
def test_one_pass(library, monkeypatch, kind, rows, heads_kv):
    """plan_causal alone: where it served every list, the others return at once."""
    rng = np.random.default_rng(rows)
    for order, share, hi_offset in (
        *((0, 0.5, 1), (0, 0.7, 0), (1, 1.0, 1), (2, 0.0, 1)),
        *((0, 0.6, None), (1, 1.0, None), (2, 0.0, None)),
    ):
        problem, clauses = one_pass_problem(
            rng, rows, kind, heads_kv, 20, share, hi_offset=hi_offset
        )
        served = []
        run = HostKernel.launch

        def launch(self, grid, block, shared, stream, params, run=run, served=served):
            name = self._run.__name__
            if name == "run_plan_causal":
                run(self, grid, block, shared, stream, params)
                served.append(name)

        with monkeypatch.context() as patch:
            patch.setattr(HostKernel, "launch", launch)
            arrays = plan_on_host(library, monkeypatch, problem, clauses, order=order)
        assert served == ["run_plan_causal"]
        assert_equals_reference(arrays, problem, clauses)


@pytest.mark.parametrize("rows", [1, 33, 130, 1100])
@pytest.mark.parametrize("shared_limit", [100_000, 6000], ids=["staged", "at once"])
@pytest.mark.parametrize("what", ["all", "heads", "rows", "keep", "other"])
def test_one_pass_of_one_column(library, monkeypatch, rows, shared_limit, what):
    """Queries and keys in the very same groups, or in almost the same."""
    rng = np.random.default_rng(rows)
    heads_kv = 1 if what == "heads" else 2
    for order, dtype, hi_offset in ((0, np.int32, 1), (1, np.int64, 0), (0, np.int32, None)):
        problem, clauses = one_pass_problem(
            rng, rows, "hash and keep", heads_kv, 7, 0.6, dtype, hi_offset
        )
        (column,) = clauses.q_groups
        other = column
        if what == "heads":  # both query heads in the groups of their key head
            other = column[:, :1]
            column = np.broadcast_to(other, (1, 2, rows))
        elif what == "rows":  # the same first row, then others
            two = np.repeat(column, 2, axis=2)
            two[..., 1::2] = rng.integers(-1, 7, (1, 2, rows))
            column, other = two[..., ::2], two[..., :rows]
        elif what == "other":
            other = column[:, ::-1]
        keeps = ((), clauses.k_keeps) if what == "keep" else ((), ())
        clauses = Clauses((column,), (other,), *keeps, None, hi_offset)
        options = {"order": order, "shared_limit": shared_limit}
        arrays = plan_on_host(library, monkeypatch, problem, clauses, **options)
        assert_equals_reference(arrays, problem, clauses)


@pytest.mark.parametrize("top", [1, 2, 300, 5000, 2**40])
@pytest.mark.parametrize("shared_limit", [100_000, 9000, 0], ids=["roomy", "tight", "none"])
def test_one_pass_or_several(library, monkeypatch, top, shared_limit):
    """Some lists are served at once, some need several passes, also of one key head."""
    rng = np.random.default_rng(7)
    dtype = np.int64 if top > 2**31 else np.int32
    problem, clauses = one_pass_problem(rng, 400, "hash and keep", 1, top, 0.8, dtype)
    clauses.q_groups[0][0, 1] %= 7  # the second head alone would fit
    for order in range(3):
        options = {"order": order, "shared_limit": shared_limit}
        arrays = plan_on_host(library, monkeypatch, problem, clauses, **options)
        assert_equals_reference(arrays, problem, clauses)


def test_one_pass_takes_what_a_multiprocessor_holds():
    for rows in (1, 1000, 8192, 16384, 32768, 65535, 65536, 10**6):
        for lists in (1, 24, 192, 4000):
            for limit in (100 * 1024, 164 * 1024, 227 * 1024):
                chosen = choose_one_pass(lists, rows, 132, limit)
                assert chosen.shared_bytes <= limit - 2048
                assert chosen.max_bits >= 4
                staged_rows = rows if chosen.staged else 0
                assert chosen.shared_bytes == one_pass_bytes(
                    chosen.threads, chosen.max_bits, staged_rows
                )
    wide = choose_one_pass(192, 16384, 132, 227 * 1024)
    assert wide.staged
    assert wide.max_bits == 7
    assert 2 * (wide.shared_bytes + 2048) <= 227 * 1024


@pytest.mark.parametrize("spread", ["one group", "few"])
def test_one_pass_counts_as_many_rows_as_16_bits_hold(library, monkeypatch, spread):
    """A list of 65535 rows ordered in shared memory: more than any card has, all in one group."""
    rng = np.random.default_rng(2)
    monkeypatch.setattr(planner_shapes, "_LEAST_ROWS", 1 << 20)
    problem, clauses = one_pass_problem(rng, 65535, "hash", 1, 0 if spread == "one group" else 3, 1)
    arrays = plan_on_host(library, monkeypatch, problem, clauses, shared_limit=500_000)
    assert_equals_reference(arrays, problem, clauses)


@pytest.mark.parametrize("kind", ["hash", "keep", "hash and keep"])
@pytest.mark.parametrize("shared_limit", [100_000, 6000], ids=["staged", "at once"])
@pytest.mark.parametrize(("rows", "key_rows"), [(1, 3), (1, 700), (5, 130), (64, 1100)])
def test_keys_alone(library, monkeypatch, kind, rows, key_rows, shared_limit):
    """More keys than queries: plan_causal takes the lists of keys, plan_sort those of queries."""
    rng = np.random.default_rng(rows + key_rows)
    problem = Problem(2, 4, 2, rows, key_rows, 16, 16, "float32", "cpu", 1.0)
    shapes = (2, 4, rows), (2, 2, key_rows)
    ran = []
    run = HostKernel.launch

    def launch(self, grid, *arguments):
        ran.append((self._run.__name__.removeprefix("run_"), grid[0]))
        run(self, grid, *arguments)

    monkeypatch.setattr(HostKernel, "launch", launch)
    for order, top, dtype in ((0, 20, np.int32), (1, 2**40, np.int64), (2, 5, np.int64)):
        groups = [
            (rng.integers(-1, top, x).astype(dtype),) if "hash" in kind else () for x in shapes
        ]
        if groups[1]:
            groups[1][0][:, 0] %= 7  # the first key head alone may be served
        keeps = [
            ((rng.random(x) < 0.7).astype(np.uint8),) if "keep" in kind else () for x in shapes
        ]
        clauses = Clauses(*groups, *keeps, None, key_rows - rows + 1)
        ran.clear()
        options = {"order": order, "shared_limit": shared_limit}
        arrays = plan_on_host(library, monkeypatch, problem, clauses, **options)
        assert_equals_reference(arrays, problem, clauses)
        sorts = [("plan_sort", 4), ("plan_sort", 8)]
        assert ran == [("plan_causal", 4), *sorts, ("plan_ranges", 8)]
