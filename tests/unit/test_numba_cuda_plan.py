"""numba-cuda's planner in numba's simulator: every plan equals the reference's, entry by entry.

As in test_numba_cuda_sim.py, this file runs itself in a process that chooses the simulator.
"""

import json

import numpy as np
import pytest
from once import made_once
from simulated import by_turns, report_of

from scfa_core.arrays import HostContext
from scfa_core.lowering import Clauses
from scfa_core.plan import PlanArrays, plan_shapes
from scfa_core.problem import Problem

NAMES = PlanArrays._fields[:6]
RNG = np.random.default_rng(0)


def ids(sizes, make, dtypes=(np.int32, np.int32)):
    """Ids of queries and keys by make(shape)."""
    batch, heads, heads_kv, seqlen_q, seqlen_k = sizes
    shapes = (batch, heads, seqlen_q), (batch, heads_kv, seqlen_k)
    return [make(shape).astype(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def below(top, least=0):
    return lambda shape: RNG.integers(least, top, shape)


def causal(groups, sees_itself=True, **others):
    return Clauses((groups[0],), (groups[1],), hi_offset=int(sees_itself), **others)


def one_of(*values):
    return lambda shape: RNG.choice(values, shape)


def skewed(shape):
    return np.minimum(RNG.geometric(0.6, shape) - 1, 9)


def distinct(shape):
    rows = np.arange(np.prod(shape)).reshape(shape) % shape[-1]
    return RNG.permuted(rows, axis=-1)


def with_entry(x, place, value):
    x = x.copy()
    x[place] = value
    return x


def one_pass_cases():
    """Sizes, clauses, and which query lists plan_causal serves."""
    for rows in (1, 63, 64, 65, 127, 129, 131, 311):  # beyond 256 a warp loads more than once
        sizes = (1, 1, 1, rows, rows)
        yield f"length-{rows}", sizes, causal(ids(sizes, below(5))), [[1]]
    sizes = (1, 2, 1, 70, 70)
    all_served = [[1, 1]]
    yield "hidden-from-itself", sizes, causal(ids(sizes, below(3)), sees_itself=False), all_served
    yield "skewed", sizes, causal(ids(sizes, skewed)), all_served
    yield "one-bucket", sizes, causal(ids(sizes, one_of(6))), all_served
    yield "bucket-0", sizes, causal(ids(sizes, one_of(0))), all_served
    yield "all-distinct", sizes, causal(ids(sizes, distinct)), all_served
    yield "first-and-last-bin", sizes, causal(ids(sizes, one_of(0, 255))), all_served
    wide = (np.int64, np.int64)
    yield "from-minus-1", sizes, causal(ids(sizes, below(4, -1))), all_served
    yield "far-from-0", sizes, causal(ids(sizes, one_of(10**9, 10**9 + 255))), all_served
    queries, keys = ids(sizes, below(3))
    yield "least-is-a-key", sizes, causal((queries, keys - 1)), all_served
    least, most = -(2**63), 2**63 - 1
    yield "least-int64", sizes, causal(ids(sizes, one_of(least, least + 9), wide)), all_served
    yield "most-int64", sizes, causal(ids(sizes, one_of(most - 70, most), wide)), all_served
    yield "int64", sizes, causal(ids(sizes, below(17), wide)), all_served
    yield "two-dtypes", sizes, causal(ids(sizes, below(4), (np.int32, np.int64))), all_served
    queries, keys = ids(sizes, below(4))
    shared = [np.broadcast_to(x[:, :1], x.shape) for x in (queries, keys)]
    yield "ids-of-all-heads", sizes, causal(shared), all_served
    across = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (queries, keys)]
    yield "ids-lie-transposed", sizes, causal(across), all_served
    for seqlen_q, seqlen_k in ((67, 20), (20, 67), (1, 65), (65, 1), (129, 128)):
        sizes = (1, 2, 2, seqlen_q, seqlen_k)
        yield f"{seqlen_q}-on-{seqlen_k}", sizes, causal(ids(sizes, below(3))), all_served
    sizes = (2, 4, 2, 33, 33)
    queries, keys = ids(sizes, below(5))
    yield "heads-share-keys", sizes, causal((queries, keys)), [[1] * 4] * 2
    served = [[1, 1, 0, 1], [1, 1, 1, 1]]  # another head of the key head is served all the same
    yield "query-above", sizes, causal((with_entry(queries, (0, 2, 9), 256), keys)), served
    served = [[1] * 4, [1, 0, 1, 1]]
    yield "query-negative", sizes, causal((with_entry(queries, (1, 1, 32), -252), keys)), served
    served = [[0, 0, 1, 1], [1] * 4]
    yield "key-above", sizes, causal((queries, with_entry(keys, (0, 0, 31), 300))), served
    served = [[1] * 4, [1, 1, 0, 0]]
    yield "key-negative", sizes, causal((queries, with_entry(keys, (1, 1, 0), -70000))), served
    sizes = (1, 2, 1, 40, 66)
    yield "none-served", sizes, causal(ids(sizes, below(1000))), [[0, 0]]
    high = ids(sizes, one_of(5, 5 + 2**32, 2**40), wide)
    yield "wide-ids", sizes, causal(high), [[0, 0]]
    extreme = ids(sizes, one_of(least, 0, most), wide)
    yield "extreme-ids", sizes, causal(extreme), [[0, 0]]


def other_cases():
    """Sizes, clauses; None: plan_causal is not even asked."""
    sizes = (1, 2, 1, 70, 70)
    q_keep, k_keep = ids(sizes, below(2), (np.uint8, np.uint8))
    keeps = {"q_keeps": (q_keep,), "k_keeps": (k_keep,)}
    few, many = ids(sizes, below(3)), ids(sizes, below(2000, -2000))
    deep = ids(sizes, below(2**62, -(2**62)), (np.int64, np.int64))
    yield "keep", sizes, Clauses(hi_offset=1, **keeps), None
    yield "keep-one-pass", sizes, causal(few, **keeps), None
    yield "keep-two-passes", sizes, causal(many, **keeps), None
    long = (1, 1, 1, 301, 289)
    keeps_of_long = ids(long, one_of(0, 1, 1), (np.uint8, np.uint8))
    long_keeps = {f"{side}_keeps": (x,) for side, x in zip("qk", keeps_of_long, strict=True)}
    yield "keep-long", long, causal(ids(long, below(500)), **long_keeps), None
    yield "keep-eight-passes", sizes, causal(deep, **keeps), None
    none = {name: (np.zeros_like(x[0]),) for name, x in keeps.items()}
    yield "keep-nothing", sizes, causal(few, **none), None
    groups = [(few[i], many[i], deep[i]) for i in range(2)]
    yield "three-groups", sizes, Clauses(*groups, hi_offset=1), None
    yield "three-groups-keep", sizes, Clauses(*groups, hi_offset=1, **keeps), None
    yield "not-causal", sizes, Clauses((few[0],), (few[1],)), None
    yield "window", sizes, causal(few, lo_offset=-9), None
    yield "shifted", sizes, Clauses((few[0],), (few[1],), hi_offset=4), None
    ends = (RNG.integers(-3, 80, few[0].shape),)
    starts = (np.zeros_like(few[0]),)
    yield "ranges", sizes, causal(few, starts=starts, ends=ends), None
    sizes = (1, 2, 1, 70, 2100)
    groups = ids(sizes, below(3))
    starts, ends = (ids(sizes, below(2300, -99))[0] for _ in range(2))
    of_groups = Clauses((groups[0],), (groups[1],), starts=(starts,), ends=(ends,))
    yield "sorted-ranges", sizes, Clauses(starts=(starts,), ends=(ends,)), None
    yield "sorted-ranges-of-groups", sizes, of_groups, None
    wide_ends = (ids(sizes, one_of(-(2**63), 5, 1024, 2100, 2**63 - 1), (np.int64,) * 2)[0],)
    q_keep = (ids(sizes, below(2), (np.uint8,) * 2)[0],)
    dropped = Clauses(q_keeps=q_keep, starts=(starts,), ends=wide_ends)
    yield "sorted-ranges-dropped", sizes, dropped, None
    sizes = (1, 2, 1, 70, 70)
    yield "causal-alone", sizes, Clauses(hi_offset=1), None
    yield "no-queries", (1, 2, 1, 0, 9), causal(ids((1, 2, 1, 0, 9), below(3))), None
    yield "no-keys", (1, 2, 1, 9, 0), causal(ids((1, 2, 1, 9, 0), below(3))), None


CASES = {name: case for name, *case in (*one_pass_cases(), *other_cases())}


class Context(HostContext):
    """Keeps what is asked for by shape."""

    def __init__(self):
        self.given = {}

    def empty(self, shape, dtype):
        x = np.full(shape, -7, dtype)
        self.given[shape] = x
        return x


def run_case(sizes, clauses):
    """Fields of the plan that differ from the reference's; the flags of lists that were served."""
    from scfa_core.backends.numba_cuda import BACKEND
    from scfa_core.reference.planner import plan_lists

    problem = Problem(*sizes, 16, 16, "float32", "cpu", 1.0)
    arrays = [np.full(shape, -7, np.int32) for shape in plan_shapes(problem, "host")]
    context = Context()
    BACKEND.make_plan(problem, clauses, PlanArrays.of(arrays, clauses.monotone), context)
    right = plan_lists(clauses, *sizes)
    fields = zip(NAMES, arrays, right, strict=False)
    done = context.given.get(sizes[:2])
    return {
        "differing": [name for name, x, y in fields if not np.array_equal(x, y)],
        "served": done if done is None else done.tolist(),
    }


def touch_lists_that_are_done():
    """Names of the kernels that write where every list is done."""
    from scfa_core.backends.numba_cuda import plan_ranges, plan_sort
    from scfa_core.backends.numba_cuda.compiling import Queue
    from scfa_core.backends.numba_cuda.views import view

    shape = (1, 2, 33)
    group = RNG.integers(0, 9, shape, np.int32)
    index, start, end = (np.zeros(shape, np.int32) for _ in range(3))
    count = np.full((1, 2), 33, np.int32)
    done = np.ones((1, 2), np.int32)
    arrays = [view(x) for x in (index, index, count, count, start, end)]
    group, index, count, done = (view(x) for x in (group, index, count, done))
    kernels = {
        plan_sort.build_plan_sort("int32"): (
            group,
            index,
            view(start),
            count,
            done,
            True,
            True,
            -1,
            0,
        ),
        plan_ranges.build_plan_ranges("int32", "int32"): (
            *(group, group, *arrays, index, index, done, 0, 1),
            *(True, False, True, True),
        ),
    }
    touched = []
    for kernel, arguments in kernels.items():
        kernel.launch(2, 32, Queue(-1, 0), arguments)
        if any(x.any() for x in (start, end)) or np.any(arrays[0].copy_to_host()):
            touched.append(kernel.function.__name__)
    return touched


def main():
    import warnings

    warnings.filterwarnings("ignore", category=RuntimeWarning)  # distances that need all 64 bits
    by_turns()
    report = {}
    for name, (sizes, clauses, _) in CASES.items():
        report[name] = run_case(sizes, clauses)
    report["touched"] = touch_lists_that_are_done()
    print(json.dumps(report))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return made_once(tmp_path_factory, "numba_cuda_plan", lambda _: report_of(__file__))


@pytest.mark.parametrize("name", CASES)
def test_plan_equals_reference(report, name):
    assert report[name]["differing"] == []


@pytest.mark.parametrize("name", CASES)
def test_one_pass_serves_what_it_can(report, name):
    assert report[name]["served"] == CASES[name][2]


def test_lists_that_are_done_are_left_alone(report):
    assert report["touched"] == []


if __name__ == "__main__":
    main()
