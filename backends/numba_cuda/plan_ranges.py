"""Planner, last step: each query's range of sorted keys, from its interval of key rows.

Sorted keys that agree with a query in all clauses but the last are sorted by the last and by row:
the keys of its group in rows [lo, hi) lie between two binary searches.
"""

from __future__ import annotations

from functools import cache

from numba import cuda, int32, int64, uint32
from scfa_core.backends.numba_cuda.compiling import SIMULATED, Kernel, device, kernel

THREADS = 32 if SIMULATED else 128
TILE = 8 * THREADS  # queries of a block


@device
def first_from(keys, rows, low, high, has_groups, wanted, row):
    """Place in rows[low:high] of the first key of group `wanted` in `row` or later, or beyond."""
    while low < high:
        middle = uint32(uint32(low + high) >> uint32(1))
        place = rows[middle]
        key = int64(keys[uint32(place)]) if has_groups else wanted
        if key < wanted or (key == wanted and place < row):
            low = uint32(middle + 1)
        else:
            high = middle
    return low


@cache
def build_plan_ranges(q_dtype: str, k_dtype: str) -> Kernel:
    """One block per tile of sorted queries, lists with done[b, h] left out if there `may_be_done`.

    lo = max(row + lo_offset, lows[row] if has_limits), hi likewise, both within [0, seqlen_k].
    q_group and k_group are the last clause's, if it `has_groups`; unless it `is_first`, key_start
    and key_end hold the keys that agree in the others. A dropped query gets the empty range at the
    end of the keys.
    """

    @kernel(
        f"{q_dtype}:3", f"{k_dtype}:3", "int32:3", "int32:3", "int32:2", "int32:2", "int32:3",
        "int32:3", "int32:3", "int32:3", "int32:2", "int64", "int64", "bool", "bool", "bool",
        "bool",
    )  # fmt: skip
    def scfa_plan_ranges(
        q_group, k_group, q_index, k_index, q_count, k_count, key_start, key_end, lows, highs, done,
        lo_offset, hi_offset, may_be_done, has_limits, has_groups, is_first,
    ):  # fmt: skip
        heads, seqlen_q = q_index.shape[1], q_index.shape[2]
        tiles = (seqlen_q + TILE - 1) // TILE
        id = cuda.blockIdx.x // tiles
        b = uint32(id // heads)
        h = uint32(id % heads)
        if may_be_done and done[b, h] != 0:
            return
        g = uint32(h // (heads // k_index.shape[1]))
        queries, keys = q_group[b, h], k_group[b, g]
        q_rows, k_rows = q_index[b, h], k_index[b, g]
        starts, ends = key_start[b, h], key_end[b, h]
        seqlen_k = int64(k_index.shape[2])
        kept_queries, kept_keys = q_count[b, h], uint32(k_count[b, g])
        first = cuda.blockIdx.x % tiles * TILE
        for place in range(first + cuda.threadIdx.x, min(first + TILE, seqlen_q), THREADS):
            r = uint32(place)
            if place >= kept_queries:
                starts[r] = kept_keys
                ends[r] = kept_keys
            else:
                row = int64(q_rows[r])
                lo = min(max(row + lo_offset, int64(0)), seqlen_k)
                hi = min(max(row + hi_offset, int64(0)), seqlen_k)
                if has_limits:
                    lo = max(lo, int64(lows[b, h, uint32(row)]))
                    hi = min(hi, int64(highs[b, h, uint32(row)]))
                hi = max(lo, hi)
                wanted = int64(queries[uint32(row)]) if has_groups else int64(0)
                low = uint32(0) if is_first else uint32(starts[r])
                high = kept_keys if is_first else uint32(ends[r])
                low = first_from(keys, k_rows, low, high, has_groups, wanted, int32(lo))
                starts[r] = low
                ends[r] = first_from(keys, k_rows, low, high, has_groups, wanted, int32(hi))

    return scfa_plan_ranges
