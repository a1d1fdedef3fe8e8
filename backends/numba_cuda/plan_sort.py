"""Planner, step 2, once per bound and group, from the last to the first: stable sort by it.

A radix sort, one block per list. Each warp counts the digits of its stretch; the scan of the
counts, digit by digit and within a digit warp by warp, says where each warp writes. Only as many
bits are sorted as the span of the values has: up to 256 buckets cost one pass.
"""

from __future__ import annotations

from functools import cache

from numba import cuda, int32, int64, uint32
from scfa_core.backends.numba_cuda.compiling import Kernel, device, kernel
from scfa_core.backends.numba_cuda.plan_warp import (
    ROUNDS,
    THREADS,
    WARPS,
    ballot,
    has_bit,
    lanes_before,
    lanes_that_agree,
    rows_of_warp,
    start_warps,
    sum_bins,
    sum_warps,
    warp_barrier,
)

DIGIT_BITS = 8
BINS = 1 << DIGIT_BITS
PITCH = BINS + 1  # of a warp's counts
COUNTS = WARPS * PITCH
UNCLIPPED = -1  # limit of a column whose values are taken as they are


@device
def sort_key(keys, row, limit, shift):
    """Entry `row`, or of a bound, which has a limit: how many steps of ``2**shift`` rows."""
    value = int64(keys[row])
    if limit == UNCLIPPED:
        return value
    return min(max(value, int64(0)), int64(limit)) >> shift


@cache
def build_plan_sort(dtype: str) -> Kernel:
    """Sort the first count[b, h] entries of index by column[b, h, entry], as `sort_key` takes it.

    `from_rows`: index is yet to be written; all rows are kept, and count says so afterwards.
    Lists that are done are left alone, if any `may_be_done`: done has an entry for every query
    head, and a key list is written along with the first of its heads'. Scratch has room for a list
    where one head, or the first query head of it, is. Shared memory: counts of each warp and bin,
    a sum of each bin, two extremes of each thread: 26 KB.
    """

    @kernel(
        f"{dtype}:3", "int32:3", "int32:3", "int32:2", "int32:2", "bool", "bool",
        "int32", "int32",
        bounds=(THREADS, 2),
    )  # fmt: skip
    def scfa_plan_sort(column, index, scratch, count, done, from_rows, may_be_done, limit, shift):
        counts = cuda.shared.array(COUNTS, int32)
        sums = cuda.shared.array(BINS, int32)
        lows = cuda.shared.array(THREADS, int64)
        highs = cuda.shared.array(THREADS, int64)
        rows = cuda.local.array(ROUNDS, int32)
        digits = cuda.local.array(ROUNDS, int32)
        heads = index.shape[1]
        b = uint32(cuda.blockIdx.x // heads)
        h = uint32(cuda.blockIdx.x % heads)
        if may_be_done and done[b, uint32(h * (done.shape[1] // heads))] != 0:
            return
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = int32(thread % 32), int32(thread // 32), int32(threads // 32)
        keys, mine = column[b, h], index[b, h]
        other = scratch[b, uint32(h * (scratch.shape[1] // heads))]
        if from_rows and thread == 0:
            count[b, h] = index.shape[2]
        seqlen = int32(index.shape[2]) if from_rows else count[b, h]
        if seqlen == 0:
            return
        stretch = rows_of_warp(seqlen, warps)
        first = uint32(min(warp * stretch, seqlen))
        end = uint32(min(first + stretch, seqlen))
        last = uint32(seqlen - 1)

        # Which values are there? Sorted are their distances from the least, as unsigned numbers.
        least = sort_key(keys, 0 if from_rows else mine[0], limit, shift)
        most = least
        place = uint32(thread)
        while place < uint32(seqlen):
            row = uint32(place if from_rows else mine[uint32(place)])
            key = sort_key(keys, row, limit, shift)
            least = min(least, key)
            most = max(most, key)
            place = uint32(place + threads)
        lows[thread] = least
        highs[thread] = most
        step = threads // 2
        while step > 0:
            cuda.syncthreads()  # what the step before wrote is there
            if thread < step:
                lows[thread] = min(lows[thread], lows[thread + step])
                highs[thread] = max(highs[thread], highs[thread + step])
            step //= 2
        cuda.syncthreads()  # the extremes are there
        least = lows[0]
        span = highs[0] - least  # negative if it needs all 64 bits
        bits = int32(64 if span < 0 else 0)
        while bits < 64 and span >> bits != 0:
            bits += int32(1)
        passes = int32((bits + DIGIT_BITS - 1) // DIGIT_BITS)
        if passes == 0:
            if from_rows:
                place = uint32(thread)
                while place < uint32(seqlen):
                    mine[uint32(place)] = place
                    place = uint32(place + threads)
            return
        digit_bits = int32((bits + passes - 1) // passes)
        bins = uint32(1 << digit_bits)

        before = lanes_before(lane)
        my_counts = int32(warp * PITCH)
        ones = int32(bins - 1)
        for done_passes in range(passes):
            digit_shift = int32(done_passes * digit_bits)
            in_order = from_rows and done_passes == 0  # entry i is row i
            # The first pass reads row numbers or index; with the former the last one writes index.
            left = passes - done_passes if from_rows else done_passes
            source, target = mine, other
            if left % 2 == 1:
                source, target = other, mine

            # count: entries of each digit in this warp's stretch
            entry = thread
            while entry < warps * PITCH:
                counts[entry] = 0
                entry = int32(entry + threads)
            cuda.syncthreads()  # all counts are zero
            start = first
            while start < end:
                for u in range(ROUNDS):
                    place = min(uint32(start + 32 * u + lane), last)
                    row = uint32(place if in_order else source[place])
                    digits[u] = int32(
                        sort_key(keys, row, limit, shift) - least >> digit_shift & ones
                    )
                for u in range(ROUNDS):
                    if uint32(start + 32 * u + lane) < end:
                        cuda.atomic.add(counts, uint32(my_counts + digits[u]), 1)
                start = uint32(start + 32 * ROUNDS)
            cuda.syncthreads()  # every warp's counts are there

            # scan: over the digits, and within a digit over the warps
            digit = thread
            while digit < bins:
                sums[digit] = sum_warps(counts, digit, PITCH, warps)
                digit = int32(digit + threads)
            cuda.syncthreads()  # all sums are there
            digit = thread
            while digit < bins:
                start_warps(counts, digit, PITCH, warps, sum_bins(sums, 0, digit))
                digit = int32(digit + threads)
            cuda.syncthreads()  # counts say where each warp's next entry of a digit goes

            # place: entries of a digit in their order
            start = first
            while start < end:
                for u in range(ROUNDS):
                    place = min(uint32(start + 32 * u + lane), last)
                    row = uint32(place if in_order else source[place])
                    rows[u] = row
                    digits[u] = int32(
                        sort_key(keys, row, limit, shift) - least >> digit_shift & ones
                    )
                for u in range(ROUNDS):
                    now = uint32(start + 32 * u)
                    if now < end:  # the same for all lanes
                        digit = uint32(digits[u])
                        same = lanes_before(end - now)
                        bit = uint32(1)
                        while bit < bins:
                            is_one = has_bit(digit, bit)
                            same = lanes_that_agree(same, ballot(is_one), is_one)
                            bit = uint32(bit << uint32(1))
                        rank = int32(cuda.popc(uint32(same & before)))
                        entry = uint32(my_counts + digit)
                        place = uint32(counts[entry] + rank)
                        warp_barrier()  # all lanes have read what the first of each digit changes
                        if uint32(now + lane) < end:
                            target[place] = rows[u]
                            if rank == 0:
                                counts[entry] += cuda.popc(same)
                        warp_barrier()  # the next round reads the new counts
                start = uint32(start + 32 * ROUNDS)
            cuda.syncthreads()  # the list is written before the next pass reads it

        if not from_rows and passes % 2 == 1:
            place = uint32(thread)
            while place < uint32(seqlen):
                mine[uint32(place)] = other[uint32(place)]

                place = uint32(place + threads)

    return scfa_plan_sort
