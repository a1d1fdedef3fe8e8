"""The planner's CUDA sources, compiled as host C++ and run on fibers as the product runs them."""

import ctypes
import re
import subprocess
from functools import cache
from pathlib import Path

import host_build
import numpy as np
import pytest
from once import locked, shared_folder
from scfa_core.backends.cupy_raw import nvrtc, planner
from scfa_core.reference.planner import plan_lists

from scfa_core import testing
from scfa_core.array_kinds import framework_of
from scfa_core.arrays import DeviceArray, HostContext
from scfa_core.lowering import Clauses, lower
from scfa_core.plan import PlanArrays, plan_shapes
from scfa_core.problem import Problem

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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All of the planner's kernels, compiled once for every file of tests that takes them."""
    return _load(shared_folder(tmp_path_factory) / "planner_on_host")


@cache
def _load(folder: Path) -> ctypes.CDLL:
    library = folder / "driver.so"
    with locked(folder):
        if not library.exists():
            folder.mkdir(exist_ok=True)
            _compile(folder)
    return ctypes.CDLL(str(library))


def _compile(folder: Path) -> None:
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
        host_build.COMPILER,
        "-std=c++17",
        "-O1",
        "-g",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wno-unknown-pragmas",
    ]
    command += [f"-I{host_build.HERE}", f"-I{folder}", "driver.cpp", "-o", "driver.part"]
    command.append(str(host_build.played(folder.parent)))
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    (folder / "driver.part").replace(folder / "driver.so")


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
    native = clauses.with_arrays(map(as_device, clauses.arrays))
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
    case = testing.build(spec)
    problem = problem_of(spec)
    clauses = lower(case.pattern, problem, framework_of("q", case.q))
    arrays = plan_on_host(library, monkeypatch, problem, clauses, **options)
    assert_equals_reference(arrays, problem, clauses)


def one_pass_problem(rng, rows, kind, heads_kv, top, share, dtype=np.int32, hi_offset=1):
    """Causal problem with up to one group column and up to one keep column a side."""
    problem = Problem(1, 2, heads_kv, rows, rows, 16, 16, "float32", "cpu", 1.0)
    shapes = (1, 2, rows), (1, heads_kv, rows)
    groups = [(rng.integers(-1, top, shape).astype(dtype),) for shape in shapes]
    keeps = [((rng.random(shape) < share).astype(np.uint8),) for shape in shapes]
    none = [(), ()]
    columns = (groups if "hash" in kind else none, keeps if "keep" in kind else none)
    return problem, Clauses(*columns[0], *columns[1], None, hi_offset)
