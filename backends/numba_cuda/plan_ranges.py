"""Planner, last step: each query's range of sorted keys, from its interval of key rows.

Within the keys of a query's group rows ascend, so the interval [lo, hi) is two binary searches.
"""

from __future__ import annotations

from functools import cache

from numba import cuda, int64
from scfa_core.backends.numba_cuda.compiling import SIMULATED, Kernel, kernel

THREADS = 32 if SIMULATED else 128


@cache
def build_plan_ranges() -> Kernel:
    """One thread per sorted query; a dropped one gets the empty range at the end of the keys.

    lo = max(row + lo_offset, lows[row] if has_limits), hi likewise, both within [0, seqlen_k];
    `has_groups` says that key_start and key_end hold the keys of the query's group.
    """

    @kernel(
        "int32:3", "int32:3", "int32:2", "int32:2", "int32:3", "int32:3", "int32:3", "int32:3",
        "int64", "int64", "bool", "bool",
    )  # fmt: skip
    def scfa_plan_ranges(
        q_index, k_index, q_count, k_count, key_start, key_end, lows, highs, lo_offset, hi_offset,
        has_limits, has_groups,
    ):  # fmt: skip
        heads, seqlen_q = q_index.shape[1], q_index.shape[2]
        seqlen_k = int64(k_index.shape[2])
        share = heads // k_index.shape[1]
        for place in range(cuda.grid(1), q_index.shape[0] * heads * seqlen_q, cuda.gridsize(1)):
            r = place % seqlen_q
            h = place // seqlen_q % heads
            b = place // (seqlen_q * heads)
            g = h // share
            kept = int64(k_count[b, g])
            if r >= q_count[b, h]:
                key_start[b, h, r] = kept
                key_end[b, h, r] = kept
            else:
                row = int64(q_index[b, h, r])
                lo = min(max(row + lo_offset, int64(0)), seqlen_k)
                hi = min(max(row + hi_offset, int64(0)), seqlen_k)
                if has_limits:
                    lo = max(lo, int64(lows[b, h, row]))
                    hi = min(hi, int64(highs[b, h, row]))
                hi = max(lo, hi)
                start = int64(0)
                end = kept
                if has_groups:
                    start = int64(key_start[b, h, r])
                    end = int64(key_end[b, h, r])

                low, high = start, end
                while low < high:
                    middle = (low + high) // 2
                    if int64(k_index[b, g, middle]) < lo:
                        low = middle + 1
                    else:
                        high = middle
                key_start[b, h, r] = low
                high = end
                while low < high:
                    middle = (low + high) // 2
                    if int64(k_index[b, g, middle]) < hi:
                        low = middle + 1
                    else:
                        high = middle
                key_end[b, h, r] = low

    return scfa_plan_ranges
