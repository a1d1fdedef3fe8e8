"""Planner, step 1 where there are keeps: kept rows first, then the dropped ones, and how many.

One block per list. Each warp counts the kept rows of its stretch; where they go follows from the
counts of the warps before, and a row's place among them from the lanes below.
"""

from __future__ import annotations

from functools import cache

from numba import cuda, int32, int64, uint32
from scfa_core.backends.numba_cuda.compiling import Kernel, kernel
from scfa_core.backends.numba_cuda.plan_warp import (
    ROUNDS,
    THREADS,
    WARPS,
    ballot,
    lanes_before,
    rows_of_warp,
    sum_bins,
)


@cache
def build_plan_keep() -> Kernel:
    """Rows of either kind ascend. Shared memory: one count per warp."""

    @kernel("uint8:3", "int32:3", "int32:2", bounds=(THREADS, 2))
    def scfa_plan_keep(keep, index, count):
        sums = cuda.shared.array(WARPS, int32)
        flags = cuda.local.array(ROUNDS, int32)
        heads = index.shape[1]
        b = uint32(cuda.blockIdx.x // heads)
        h = uint32(cuda.blockIdx.x % heads)
        kept, rows = keep[b, h], index[b, h]
        seqlen = int32(index.shape[2])
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = int32(thread % 32), int32(thread // 32), int32(threads // 32)
        stretch = rows_of_warp(seqlen, warps)
        first = uint32(min(warp * stretch, seqlen))
        end = uint32(min(first + stretch, seqlen))
        last = uint32(max(seqlen - 1, 0))

        mine = int32(0)
        start = first
        while start < end:
            for u in range(ROUNDS):
                flags[u] = kept[min(uint32(start + 32 * u + lane), last)]
            for u in range(ROUNDS):
                there = lanes_before(int64(end) - int64(start) - 32 * u)
                mine += int32(cuda.popc(uint32(ballot(flags[u] != 0) & there)))
            start = uint32(start + 32 * ROUNDS)
        if lane == 0:
            sums[warp] = mine
        cuda.syncthreads()  # all counts are there
        total = sum_bins(sums, 0, warps)
        kept_place = int32(sum_bins(sums, 0, warp))
        dropped_place = int32(total + first - kept_place)
        if thread == 0:
            count[b, h] = total

        before = lanes_before(lane)
        start = first
        while start < end:
            for u in range(ROUNDS):
                flags[u] = kept[min(uint32(start + 32 * u + lane), last)]
            for u in range(ROUNDS):
                there = lanes_before(int64(end) - int64(start) - 32 * u)
                keepers = uint32(ballot(flags[u] != 0) & there)
                row = uint32(start + 32 * u + lane)
                if row < end:
                    kept_below = int32(cuda.popc(uint32(keepers & before)))
                    if flags[u] != 0:
                        rows[uint32(kept_place + kept_below)] = row
                    else:
                        rows[uint32(dropped_place + lane - kept_below)] = row
                kept_here = int32(cuda.popc(keepers))
                kept_place += kept_here
                dropped_place += int32(cuda.popc(there)) - kept_here
            start = uint32(start + 32 * ROUNDS)

    return scfa_plan_keep
