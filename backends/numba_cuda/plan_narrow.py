"""Planner, step 3, once per group clause from the first to the last: keys whose group is equal.

Sorted keys that agree in the clauses before lie together and are sorted by this clause; two binary
searches narrow each query's range to those that agree in this one too.
"""

from __future__ import annotations

from functools import cache

from numba import cuda, int64
from scfa_core.backends.numba_cuda.compiling import SIMULATED, Kernel, kernel

THREADS = 32 if SIMULATED else 128


@cache
def build_plan_narrow(q_dtype: str, k_dtype: str) -> Kernel:
    """One thread per sorted kept query; reads key_start and key_end unless `is_first`."""

    @kernel(
        f"{q_dtype}:3", f"{k_dtype}:3", "int32:3", "int32:3", "int32:2", "int32:2",
        "int32:3", "int32:3", "bool",
    )  # fmt: skip
    def scfa_plan_narrow(
        q_group, k_group, q_index, k_index, q_count, k_count, key_start, key_end, is_first
    ):
        heads, seqlen_q = q_index.shape[1], q_index.shape[2]
        share = heads // k_index.shape[1]
        for place in range(cuda.grid(1), q_index.shape[0] * heads * seqlen_q, cuda.gridsize(1)):
            r = place % seqlen_q
            h = place // seqlen_q % heads
            b = place // (seqlen_q * heads)
            g = h // share
            if r < q_count[b, h]:
                start = int64(0)
                end = int64(k_count[b, g])
                if not is_first:
                    start = int64(key_start[b, h, r])
                    end = int64(key_end[b, h, r])
                wanted = int64(q_group[b, h, q_index[b, h, r]])

                low, high = start, end
                while low < high:
                    middle = (low + high) // 2
                    if int64(k_group[b, g, k_index[b, g, middle]]) < wanted:
                        low = middle + 1
                    else:
                        high = middle
                key_start[b, h, r] = low
                high = end
                while low < high:
                    middle = (low + high) // 2
                    if int64(k_group[b, g, k_index[b, g, middle]]) <= wanted:
                        low = middle + 1
                    else:
                        high = middle
                key_end[b, h, r] = low

    return scfa_plan_narrow
