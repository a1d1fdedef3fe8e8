"""Planner, last step: each query's range of sorted keys, from its interval of key rows.

Within the keys of a query's group rows ascend, so the interval [lo, hi) is two binary searches.
"""

from __future__ import annotations

from functools import cache

from numba import cuda, int64
from scfa_core.backends.numba_cuda.compiling import SIMULATED, Kernel, kernel

THREADS = 32 if SIMULATED else 128
TILE = 8 * THREADS  # queries of a block


@cache
def build_plan_ranges() -> Kernel:
    """One block per tile of sorted queries, lists with done[b, h] left out if there `may_be_done`.

    lo = max(row + lo_offset, lows[row] if has_limits), hi likewise, both within [0, seqlen_k];
    `has_groups` says that key_start and key_end hold the keys of the query's group. A dropped query
    gets the empty range at the end of the keys.
    """

    @kernel(
        "int32:3", "int32:3", "int32:2", "int32:2", "int32:3", "int32:3", "int32:3", "int32:3",
        "int32:2", "int64", "int64", "bool", "bool", "bool",
    )  # fmt: skip
    def scfa_plan_ranges(
        q_index, k_index, q_count, k_count, key_start, key_end, lows, highs, done, lo_offset,
        hi_offset, may_be_done, has_limits, has_groups,
    ):  # fmt: skip
        heads, seqlen_q = q_index.shape[1], q_index.shape[2]
        tiles = (seqlen_q + TILE - 1) // TILE
        id = cuda.blockIdx.x // tiles
        b = id // heads
        h = id % heads
        if may_be_done and done[b, h] != 0:
            return
        g = h // (heads // k_index.shape[1])
        q_rows, k_rows = q_index[b, h], k_index[b, g]
        starts, ends = key_start[b, h], key_end[b, h]
        seqlen_k = int64(k_index.shape[2])
        kept_queries, kept_keys = int64(q_count[b, h]), int64(k_count[b, g])
        first = cuda.blockIdx.x % tiles * TILE
        for r in range(first + cuda.threadIdx.x, min(first + TILE, seqlen_q), THREADS):
            if r >= kept_queries:
                starts[r] = kept_keys
                ends[r] = kept_keys
            else:
                row = int64(q_rows[r])
                lo = min(max(row + lo_offset, int64(0)), seqlen_k)
                hi = min(max(row + hi_offset, int64(0)), seqlen_k)
                if has_limits:
                    lo = max(lo, int64(lows[b, h, row]))
                    hi = min(hi, int64(highs[b, h, row]))
                hi = max(lo, hi)
                start = int64(0)
                end = kept_keys
                if has_groups:
                    start = int64(starts[r])
                    end = int64(ends[r])

                low, high = start, end
                while low < high:
                    middle = (low + high) // 2
                    if int64(k_rows[middle]) < lo:
                        low = middle + 1
                    else:
                        high = middle
                starts[r] = low
                high = end
                while low < high:
                    middle = (low + high) // 2
                    if int64(k_rows[middle]) < hi:
                        low = middle + 1
                    else:
                        high = middle
                ends[r] = low

    return scfa_plan_ranges
