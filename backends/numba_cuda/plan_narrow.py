"""Planner, step 3, once per group clause from the first to the last but one: keys that agree in it.

Sorted keys that agree in the clauses before lie together and are sorted by this clause; two binary
searches narrow each query's range to those that agree in this one too.
"""

from __future__ import annotations

from functools import cache

from numba import cuda, int64
from scfa_core.backends.numba_cuda.compiling import SIMULATED, Kernel, kernel

THREADS = 32 if SIMULATED else 128
TILE = 8 * THREADS  # queries of a block


@cache
def build_plan_narrow(q_dtype: str, k_dtype: str) -> Kernel:
    """One block per tile of sorted queries; reads key_start and key_end unless `is_first`."""

    @kernel(
        f"{q_dtype}:3", f"{k_dtype}:3", "int32:3", "int32:3", "int32:2", "int32:2",
        "int32:3", "int32:3", "bool",
    )  # fmt: skip
    def scfa_plan_narrow(
        q_group, k_group, q_index, k_index, q_count, k_count, key_start, key_end, is_first
    ):
        heads = q_index.shape[1]
        tiles = (q_index.shape[2] + TILE - 1) // TILE
        id = cuda.blockIdx.x // tiles
        b = id // heads
        h = id % heads
        g = h // (heads // k_index.shape[1])
        queries, keys = q_group[b, h], k_group[b, g]
        q_rows, k_rows = q_index[b, h], k_index[b, g]
        starts, ends = key_start[b, h], key_end[b, h]
        first = cuda.blockIdx.x % tiles * TILE
        for r in range(first + cuda.threadIdx.x, min(first + TILE, q_count[b, h]), THREADS):
            start = int64(0)
            end = int64(k_count[b, g])
            if not is_first:
                start = int64(starts[r])
                end = int64(ends[r])
            wanted = int64(queries[q_rows[r]])

            low, high = start, end
            while low < high:
                middle = (low + high) // 2
                if int64(keys[k_rows[middle]]) < wanted:
                    low = middle + 1
                else:
                    high = middle
            starts[r] = low
            high = end
            while low < high:
                middle = (low + high) // 2
                if int64(keys[k_rows[middle]]) <= wanted:
                    low = middle + 1
                else:
                    high = middle
            ends[r] = low

    return scfa_plan_narrow
