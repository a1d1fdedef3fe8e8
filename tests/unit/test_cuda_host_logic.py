"""The planner's CUDA sources, compiled as host C++ and run on fibers, against the reference."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scfa_core.backends.cupy_raw import nvrtc, planner, planner_shapes
from scfa_core.reference.planner import plan_lists

from scfa_core import testing
from scfa_core.arrays import DeviceArray, HostContext
from scfa_core.lowering import Clauses, lower
from scfa_core.plan import PlanArrays, plan_shapes
from scfa_core.problem import Problem

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
KERNELS = {
    "plan_causal": "SortParams",
    "plan_parts_survey": "SortParams",
    "plan_parts_count": "SortParams",
    "plan_parts_place": "SortParams",
    "plan_sort": "SortParams",
    "plan_ranges": "RangeParams",
    "plan_identity": "RangeParams",
}
MATH_DRIVER = """
extern "C" int digits_of(const u64* keys, const unsigned char* dropped, int n_columns, int rows,
                         int limit, u32* digits, int* bits) {
  DigitCursor cursor = {};
  cursor.n_columns = n_columns;
  for (int r = 0; r < rows; ++r) cursor.has_dropped |= dropped[r];
  for (int c = 0; c < n_columns; ++c) {
    u64 any_one = 0, all_one = ~0ull;
    for (int r = 0; r < rows; ++r) {
      if (!dropped[r]) any_one |= keys[c * rows + r], all_one &= keys[c * rows + r];
    }
    cursor.varying[c] = any_one & ~all_one;
  }
  int left = cursor.total_bits(), passes = ceil_div(left, limit);
  for (int pass = 0; pass < passes; ++pass) {
    Digit digit;
    bits[pass] = ceil_div(left, passes - pass);
    left -= bits[pass];
    cursor.next(bits[pass], digit);
    for (int r = 0; r < rows; ++r) {
      u32 value = dropped[r] ? digit.dropped : 0;
      for (int s = 0; s < digit.n_segments && !dropped[r]; ++s) {
        value |= segment_value(digit.segments[s], keys[digit.segments[s].column * rows + r], 0);
      }
      digits[pass * rows + r] = value;
    }
  }
  return passes;
}

extern "C" int wide_search(int length, int answer) {
  WideSearch search = {0, length};
  int steps = 0;
  while (!search.done()) {
    int below = 0;
    for (int lane = 0; lane < 32; ++lane) {
      int position = search.position(lane);
      if (position < search.high && position < answer) ++below;
    }
    search.narrow(below);
    if (++steps > 8) return -1;
  }
  return search.low;
}

extern "C" int binary_search(int length, int answer) {
  return lower_bound(0, length, [&](int position) { return position < answer; });
}
"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++ or clang++) here")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("cuda_on_host")
    parts = ['#include "cuda_on_host.hpp"']
    for name, text in nvrtc.read_sources().items():
        if name.startswith("plan_") or name == "sort.cuh":
            (folder / name).write_text(text)
    for kernel, params in KERNELS.items():
        text = nvrtc.read_sources()[f"{kernel}.cu"]
        text = re.sub(
            r"extern __shared__ .*? char shared\[\];", "char* shared = dynamic_shared;", text
        )
        parts.append(f"namespace {kernel} {{\n{text}\n}}")
        parts.append(
            f'extern "C" void run_{kernel}(const void* params, unsigned grid, int threads,'
            " int bytes, int order) {\n"
            f"  host::launch([](const {params}& p) {{ {kernel}::scfa_{kernel}(p); }},"
            f" *(const {params}*)params, grid, threads, bytes, order);\n}}"
        )
    # Includes go first and outside of the namespaces that keep the kernels' constants apart.
    source = "\n".join((*parts, MATH_DRIVER))
    includes = sorted(set(re.findall(r'#include "(?:plan_|sort)[^"]*"', source)))
    for line in includes:
        source = source.replace(line, "")
    source = source.replace(parts[0], "\n".join((parts[0], *includes)), 1)
    (folder / "driver.cpp").write_text(source)
    command = [
        COMPILER,
        "-std=c++17",
        "-O1",
        "-g",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wno-unknown-pragmas",
    ]
    command += [f"-I{HERE}", f"-I{folder}", "driver.cpp", "-o", "driver.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return ctypes.CDLL(str(folder / "driver.so"))


class HostKernel:
    """Stands in for a loaded kernel: same call, run by fibers."""

    def __init__(self, library: ctypes.CDLL, name: str, order: int) -> None:
        self._run = getattr(library, f"run_{name}")
        self._order = order

    def launch(self, grid, block, shared_bytes, stream, params):
        assert grid[1:] == (1, 1)
        assert block % 32 == 0
        self._run(params, ctypes.c_uint(grid[0]), block, shared_bytes, self._order)


class DeviceLikeContext(HostContext):
    """Workspace that looks like device memory."""

    def __init__(self):
        self.kept = []

    def empty(self, shape, dtype):
        self.kept.append(np.full(shape, -77, dtype))
        return as_device(self.kept[-1])


def as_device(x: np.ndarray) -> DeviceArray:
    strides = tuple(step // x.itemsize for step in x.strides)
    return DeviceArray(x.ctypes.data if x.size else 0, x.shape, strides, x.dtype.name, 0)


def plan_on_host(library, monkeypatch, problem, clauses, *, order=0, shared_limit=100_000):
    """Run the product's make_plan with its kernels on the host; returns the six arrays."""
    monkeypatch.setattr(planner, "_kernel", lambda name, device: HostKernel(library, name, order))
    monkeypatch.setattr(planner, "shared_limit", lambda device: shared_limit)
    monkeypatch.setattr(planner, "multiprocessors", lambda device: 132)
    arrays = [np.full(shape, -55, np.int32) for shape in plan_shapes(problem, "cuda")]
    native = clauses._replace(
        **{
            name: tuple(as_device(x) for x in getattr(clauses, name))
            for name in ("q_groups", "k_groups", "q_keeps", "k_keeps", "starts", "ends")
        }
    )
    plan = PlanArrays(*map(as_device, arrays), clauses.monotone)
    planner.run_make_plan(problem, native, plan, DeviceLikeContext())
    return arrays[:6]


def problem_of(spec: testing.Spec) -> Problem:
    return Problem(
        spec.batch,
        spec.heads,
        spec.heads_kv,
        spec.seqlen_q,
        spec.seqlen_k,
        16,
        16,
        "float32",
        "cpu",
        1.0,
    )


def assert_equals_reference(arrays, problem, clauses):
    sizes = (problem.batch, problem.heads, problem.heads_kv, problem.seqlen_q, problem.seqlen_k)
    names = PlanArrays._fields[:6]
    for name, got, want in zip(names, arrays, plan_lists(clauses, *sizes), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)


def check_spec(library, monkeypatch, spec, **options):
    from scfa_core.array_kinds import framework_of

    case = testing.build(spec)
    problem = problem_of(spec)
    clauses = lower(case.pattern, problem, framework_of("q", case.q))
    arrays = plan_on_host(library, monkeypatch, problem, clauses, **options)
    assert_equals_reference(arrays, problem, clauses)


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


def one_pass_problem(rng, rows, kind, heads_kv, top, share, dtype=np.int32, hi_offset=1):
    """Causal problem with up to one group column and up to one keep column a side."""
    problem = Problem(1, 2, heads_kv, rows, rows, 16, 16, "float32", "cpu", 1.0)
    shapes = (1, 2, rows), (1, heads_kv, rows)
    groups = [(rng.integers(-1, top, shape).astype(dtype),) for shape in shapes]
    keeps = [((rng.random(shape) < share).astype(np.uint8),) for shape in shapes]
    none = [(), ()]
    columns = (groups if "hash" in kind else none, keeps if "keep" in kind else none)
    return problem, Clauses(*columns[0], *columns[1], None, hi_offset)


@pytest.mark.parametrize("kind", ["hash", "keep", "hash and keep"])
@pytest.mark.parametrize("rows", [1, 31, 33, 130, 1100])
@pytest.mark.parametrize("heads_kv", [1, 2])
def test_one_pass(library, monkeypatch, kind, rows, heads_kv):
    """plan_causal alone: where it served every list, the others return at once."""
    rng = np.random.default_rng(rows)
    for order, share, hi_offset in ((0, 0.5, 1), (0, 0.7, 0), (1, 1.0, 1), (2, 0.0, 1)):
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
    from scfa_core.backends.cupy_raw.planner_shapes import choose_one_pass, one_pass_bytes

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


PART = 128  # rows of a part in the tests below


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
    for order, share, hi_offset in ((0, 0.5, 1), (1, 0.7, 0), (1, 1.0, 1), (2, 0.0, 1)):
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
