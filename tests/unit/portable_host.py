"""The portable kernels of a case, compiled as host C++ and run on fibers as launch.py would.

Tensor-core instructions and background copies are played by ptx_on_host.hpp; all else is the
shipped source: gathers, swizzle, pipelines, masks, softmax, schedules, the exact recomputation.
"""

import host_build
import numpy as np
import pytest
from once import shared_folder
from scfa_core.backends.cupy_raw import nvrtc, params, variants

import scfa_core as scfa
from scfa_core import testing
from scfa_core.problem import Problem
from scfa_core.testing import Results

DRIVER = """
// How many threads end with copies under way that nobody waits for.
extern "C" int run(const PARAMS* p, int blocks, int passes, int threads, int shared_bytes,
                   int order) {
  int left = 0;
  std::vector<char> shared(shared_bytes + 256);
  dynamic_shared = (char*)(((size_t)shared.data() + 127) / 128 * 128);
  gridDim = {(unsigned)blocks, (unsigned)passes, 1};
  blockDim = {(unsigned)threads, 1, 1};
  for (int y = 0; y < passes; ++y)
    for (int x = 0; x < blocks; ++x) {
      std::memset(shared.data(), 0x3f, shared.size());  // finite: a NaN would be recomputed away
      host::start_copies(threads);
      blockIdx = {(unsigned)x, (unsigned)y, 0};
      host::body = [&] { KERNEL(*p); };
      host::run_block(threads, order);
      left += host::copies_under_way(threads);
    }
  return left;
}
"""


class Kernels(host_build.HostCompiler):
    """What the shipped sources are on the host."""

    def __init__(self, folder):
        played = (host_build.HERE / "ptx_on_host.hpp").read_text()
        super().__init__(folder, {**nvrtc.read_sources(), "ptx.cuh": played})

    def kernel(self, variant):
        """Promise of the function that runs a kernel."""
        headers = ("cuda_on_host.hpp", "ptx.cuh", variant.source)
        lines = [f'#include "{header}"' for header in headers]
        params = "FewParams" if variant.name.startswith("scfa_fwd_few") else "Params"
        lines += [f"#define KERNEL {variant.name}", f"#define PARAMS {params}", DRIVER]
        return self.start("\n".join(lines), variant.constants)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    kernels = Kernels(shared_folder(tmp_path_factory))
    yield kernels
    kernels.close()


class Machine:
    """Runs the kernels of one case as launch.py would."""

    def __init__(
        self,
        kernels,
        case,
        order=0,
        shared_limit=variants.SHARED_LIMITS[90],
        tf32=False,
        layout="dense",
    ):
        spec = case.spec
        self.kernels, self.case, self.order = kernels, case, order
        self.shared_limit, self.tf32, self.layout = shared_limit, tf32, layout
        self.problem = Problem(
            *(spec.batch, spec.heads, spec.heads_kv, spec.seqlen_q, spec.seqlen_k),
            *(spec.head_dim, spec.head_dim_v, spec.dtype, "cpu", case.softmax_scale),
        )
        like = [np.zeros(x.shape, np.float32) for x in (case.q, case.k)]
        self.plan = scfa.make_plan(case.pattern, *like, backend="reference")
        q, k, v, dout = (self.placed(x) for x in (case.q, case.k, case.v, case.dout))
        lse = np.full(q.shape[:3], np.nan, np.float32)
        nan = np.float32("nan") if spec.dtype == "float32" else 0x7FFF
        out, dq, dk, dv = (self.placed(np.full_like(x, nan)) for x in (dout, q, k, v))
        self.arrays = (q, k, v, out, lse, dout, dq, dk, dv)
        self.statistics = np.full((2, lse.size), np.nan, np.float32)

    def placed(self, x):
        """A copy: dense, with heads after rows ("bthd"), or with rows off their 16 bytes."""
        if self.layout == "unaligned":
            room = np.empty((*x.shape[:-1], x.shape[-1] + 1), x.dtype)
            room[..., 1:] = x
            return room[..., 1:]
        if self.layout == "bthd":
            return host_build.aligned_copy(x.swapaxes(1, 2)).swapaxes(1, 2)
        return host_build.aligned_copy(x)

    def variant(self, kernel):
        problem = self.problem
        return variants.choose(
            *(kernel, "tf32" if self.tf32 else problem.dtype),
            *(problem.head_dim, problem.head_dim_v),
            aligned=self.layout != "unaligned",
            monotone=self.plan.monotone or kernel != "bwd_dkdv",
            group_size=problem.group_size,
            shared_limit=self.shared_limit,
        )

    def packed(self):
        """Arguments of a kernel: Params of params.cuh."""
        plan = self.plan
        lists = (plan.q_index, plan.k_index, plan.k_count, plan.key_start, plan.key_end)
        self.lists = [*map(np.ascontiguousarray, lists)]
        arrays = (*self.arrays, *self.statistics, *self.lists)
        strides = [tuple(s // x.itemsize for s in x.strides) for x in self.arrays]
        packed = params.POINTERS.pack(*(x.ctypes.data for x in arrays))
        return packed + params.pack_strides(strides) + params.pack_sizes(self.problem)

    def run(self, kernel):
        problem, variant, packed = self.problem, self.variant(kernel), self.packed()
        per_list = -(-problem.seqlen_q // variant.shape.block_m) * problem.heads
        if kernel == "bwd_dkdv":
            per_list = -(-problem.seqlen_k // variant.shape.block_n) * problem.heads_kv
        left = self.kernels.kernel(variant).result()(
            *(packed, problem.batch * per_list, 1 + variant.shape.split, variant.threads),
            *(variant.shared(problem.group_size), self.order),
        )
        assert left == 0, f"{kernel}: {left} threads end with copies under way"

    def results(self):
        names = ("fwd", "bwd_dq", "bwd_dkdv")
        for kernel in names:  # all begin to compile before the first one runs
            self.kernels.kernel(self.variant(kernel))
        for kernel in names:
            self.run(kernel)
        _, _, _, out, lse, _, dq, dk, dv = self.arrays
        wide = (testing.widen(x, self.case.spec.dtype) for x in (out, dq, dk, dv))
        out, dq, dk, dv = wide
        return Results(out, lse, dq, dk, dv)


def check(kernels, spec, **how):
    case = testing.build(spec)
    got = Machine(kernels, case, **how).results()
    bad = [v for v in testing.judge(case, got, tf32=how.get("tf32", False)) if not v.ok]
    assert not bad, f"{spec}: {bad}"
