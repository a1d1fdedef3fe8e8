"""Planner, step 1: kept rows first, then the dropped ones, each in ascending order, and how many.

One block per list. Thread t owns the t-th stretch of rows, so the order is stable by construction.
"""

from __future__ import annotations

from functools import cache

from numba import cuda, int32
from scfa_core.backends.numba_cuda.compiling import SIMULATED, Kernel, kernel

THREADS = 32 if SIMULATED else 256


@cache
def build_plan_keep() -> Kernel:
    """Shared memory: one count per thread."""

    @kernel("uint8:3", "bool", "int32:3", "int32:2")
    def scfa_plan_keep(keep, all_kept, index, count):
        sums = cuda.shared.array(THREADS, int32)
        heads, seqlen = index.shape[1], index.shape[2]
        b = cuda.blockIdx.x // heads
        h = cuda.blockIdx.x % heads
        thread = cuda.threadIdx.x
        if all_kept:
            for row in range(thread, seqlen, THREADS):
                index[b, h, row] = row
            if thread == 0:
                count[b, h] = seqlen
            return
        stretch = (seqlen + THREADS - 1) // THREADS
        first = min(thread * stretch, seqlen)
        last = min(first + stretch, seqlen)

        mine = 0
        for row in range(first, last):
            if keep[b, h, row] != 0:
                mine += 1
        sums[thread] = mine
        cuda.syncthreads()  # all counts are there
        step = 1
        while step < THREADS:
            more = int32(0)
            if thread >= step:
                more = sums[thread - step]
            cuda.syncthreads()  # read before anyone adds
            sums[thread] += more
            cuda.syncthreads()  # added before anyone reads
            step *= 2
        total = sums[THREADS - 1]

        kept = sums[thread] - mine
        dropped = total + first - kept
        for row in range(first, last):
            if keep[b, h, row] != 0:
                index[b, h, kept] = row
                kept += 1
            else:
                index[b, h, dropped] = row
                dropped += 1
        if thread == 0:
            count[b, h] = total

    return scfa_plan_keep
