"""Planner, step 2, once per group clause from the last to the first: stable sort by that clause.

A radix sort of 4-bit digits, one block per list. Thread t owns the t-th stretch of the list and
counts its own digits; the scan of the counts, digit by digit and within a digit thread by thread,
says where each thread writes. Only as many digits are sorted as the span of the values has: 16
buckets cost one pass, 256 two.
"""

from __future__ import annotations

from functools import cache

from numba import cuda, int32, int64
from scfa_core.backends.numba_cuda.compiling import SIMULATED, Kernel, kernel

THREADS = 32 if SIMULATED else 512
DIGIT_BITS = 4
DIGITS = 1 << DIGIT_BITS
COUNTS = DIGITS * THREADS


@cache
def build_plan_sort(dtype: str) -> Kernel:
    """Sort the first count[b, h] entries of index by column[b, h, entry]; `scratch` is like index.

    Shared memory: DIGITS counts per thread, a sum and two extremes of each thread.
    """

    @kernel(f"{dtype}:3", "int32:3", "int32:3", "int32:2")
    def scfa_plan_sort(column, index, scratch, count):
        counts = cuda.shared.array(COUNTS, int32)
        sums = cuda.shared.array(THREADS, int32)
        lows = cuda.shared.array(THREADS, int64)
        highs = cuda.shared.array(THREADS, int64)
        heads = index.shape[1]
        b = cuda.blockIdx.x // heads
        h = cuda.blockIdx.x % heads
        thread = cuda.threadIdx.x
        seqlen = count[b, h]
        stretch = (seqlen + THREADS - 1) // THREADS
        first = min(thread * stretch, seqlen)
        last = min(first + stretch, seqlen)

        # Which values are there? Sorted are their distances from the least, as unsigned numbers.
        least = int64(0)
        most = int64(0)
        if seqlen > 0:
            least = int64(column[b, h, index[b, h, 0]])
            most = least
            for place in range(first, last):
                key = int64(column[b, h, index[b, h, place]])
                least = min(least, key)
                most = max(most, key)
        lows[thread] = least
        highs[thread] = most
        cuda.syncthreads()  # all are there
        for t in range(THREADS):
            least = min(least, lows[t])
            most = max(most, highs[t])
        span = most - least  # negative if it needs all 64 bits

        source, target = index, scratch
        swapped = False
        for shift in range(0, 64, DIGIT_BITS):
            if span >= 0 and span >> shift == 0:
                break
            for digit in range(DIGITS):
                counts[digit * THREADS + thread] = 0
            for place in range(first, last):
                key = int64(column[b, h, source[b, h, place]]) - least
                counts[((key >> shift) & (DIGITS - 1)) * THREADS + thread] += 1
            cuda.syncthreads()  # all counts are there

            total = int32(0)
            for entry in range(thread * DIGITS, thread * DIGITS + DIGITS):
                total += counts[entry]
            sums[thread] = total
            cuda.syncthreads()  # all sums are there
            step = 1
            while step < THREADS:
                more = int32(0)
                if thread >= step:
                    more = sums[thread - step]
                cuda.syncthreads()  # read before anyone adds
                sums[thread] += more
                cuda.syncthreads()  # added before anyone reads
                step *= 2
            before = sums[thread] - total
            for entry in range(thread * DIGITS, thread * DIGITS + DIGITS):
                mine_here = counts[entry]
                counts[entry] = before
                before += mine_here
            cuda.syncthreads()  # places are there

            for place in range(first, last):
                row = source[b, h, place]
                key = int64(column[b, h, row]) - least
                slot = ((key >> shift) & (DIGITS - 1)) * THREADS + thread
                target[b, h, counts[slot]] = row
                counts[slot] += 1
            cuda.syncthreads()  # the list is written before the next pass reads it
            source, target = target, source
            swapped = not swapped

        if swapped:
            for place in range(thread, seqlen, THREADS):
                index[b, h, place] = scratch[b, h, place]

    return scfa_plan_sort
