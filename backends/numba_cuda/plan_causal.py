"""Planner, all steps at once: one group clause of neighbouring ids, causal, nothing dropped.

One counting pass over queries and keys of a (batch, head) together. Key row i is placed in the same
round as query row i, so the number of keys of its group placed so far is the end of the query's
range: nothing is searched. Ids are taken to lie in [0, BINS); where they do not, their least one is
looked for, and counting begins anew from there. A list whose ids lie further apart is left to the
other kernels, and `done` says so; only the device knows.
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

BINS = 256
PITCH = BINS + 1  # of a warp's counts, with those of ids that have no bin
SIDES = 2  # queries, keys
COUNTS = SIDES * WARPS * PITCH
TOTALS = SIDES * BINS
MOST = (1 << 63) - 1


@device
def bin_of(value, least):
    """An id's bin; BINS, which nobody looks into, for all that have none."""
    distance = int64(value) - least
    return int32(distance if 0 <= distance < BINS else BINS)


@cache
def build_plan_causal(q_dtype: str, k_dtype: str) -> Kernel:
    """One block per query list; the first head of each key head writes the key list.

    Query row i sees the keys of its group in rows before i, and row i itself if `sees_itself`.
    done[b, h] = whether the list was served. Lists are not empty. Shared memory: counts of each
    warp, side and bin; sum and first place of each side and bin: 37 KB.
    """

    @kernel(
        f"{q_dtype}:3", f"{k_dtype}:3", "int32:3", "int32:3", "int32:2", "int32:2",
        "int32:3", "int32:3", "int32:2", "bool", bounds=(THREADS, 2),
    )  # fmt: skip
    def scfa_plan_causal(
        q_group, k_group, q_index, k_index, q_count, k_count, key_start, key_end, done, sees_itself
    ):
        counts = cuda.shared.array(COUNTS, int32)
        sums = cuda.shared.array(TOTALS, int32)
        firsts = cuda.shared.array(TOTALS, int32)
        seen = cuda.shared.array(1, int32)
        extremes = cuda.shared.array(2, int64)
        q_ids = cuda.local.array(ROUNDS, int32)
        k_ids = cuda.local.array(ROUNDS, int32)
        heads, heads_kv = q_index.shape[1], k_index.shape[1]
        b = uint32(cuda.blockIdx.x // heads)
        h = uint32(cuda.blockIdx.x % heads)
        share = uint32(heads // heads_kv)
        g = uint32(h // share)
        writes_keys = h % share == 0
        queries, keys = q_group[b, h], k_group[b, g]
        q_rows, k_rows = q_index[b, h], k_index[b, g]
        stops = key_end[b, h]
        seqlen_q, seqlen_k = int32(q_index.shape[2]), int32(k_index.shape[2])
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = int32(thread % 32), int32(thread // 32), int32(threads // 32)
        # Of 64 bits: where both sides were cut to 32 first, ptxas (12.9, 13.0, for sm_80 to sm_90)
        # copies but the low half of the larger one.
        longer = max(q_index.shape[2], k_index.shape[2])
        stretch = rows_of_warp(longer, warps)
        first = int32(min(warp * stretch, longer))
        end = int32(min(first + stretch, longer))
        q_end, k_end = min(end, seqlen_q), min(end, seqlen_k)
        q_last, k_last = int32(seqlen_q - 1), int32(seqlen_k - 1)
        my_queries = int32(warp * PITCH)
        my_keys = int32((warps + warp) * PITCH)

        if thread == 0:
            extremes[0] = MOST
            extremes[1] = -MOST
        least = int64(0)
        all_bits = int32(BINS)
        for tries in range(2):
            if tries == 1:
                # survey: the ids may be few, but not begin at 0
                low, high = int64(MOST), int64(-MOST)
                row = thread
                while row < longer:
                    of_query = int64(queries[uint32(min(row, q_last))])
                    of_key = int64(keys[uint32(min(row, k_last))])
                    low = min(low, min(of_query, of_key))
                    high = max(high, max(of_query, of_key))
                    row = int32(row + threads)
                cuda.atomic.min(extremes, 0, low)
                cuda.atomic.max(extremes, 1, high)
                cuda.syncthreads()  # the extremes are there, and all have read `seen`
                least = extremes[0]
                if not 0 <= extremes[1] - least < BINS:
                    break
            entry = thread
            while entry < SIDES * warps * PITCH:
                counts[entry] = 0
                entry = int32(entry + threads)
            if thread == 0:
                seen[0] = 0
            cuda.syncthreads()  # all counts are zero

            # count: rows of each bin in this warp's stretch, and the bits of all bins
            bits_seen = int32(0)
            start = first
            while start < end:
                for u in range(ROUNDS):
                    row = int32(start + 32 * u + lane)
                    q_ids[u] = bin_of(queries[uint32(min(row, q_last))], least)
                    k_ids[u] = bin_of(keys[uint32(min(row, k_last))], least)
                for u in range(ROUNDS):
                    row = int32(start + 32 * u + lane)
                    bits_seen = int32(bits_seen | q_ids[u] | k_ids[u])
                    if row < q_end:
                        cuda.atomic.add(counts, uint32(my_queries + q_ids[u]), 1)
                    if row < k_end:
                        cuda.atomic.add(counts, uint32(my_keys + k_ids[u]), 1)
                start = int32(start + 32 * ROUNDS)
            cuda.atomic.or_(seen, 0, bits_seen)
            cuda.syncthreads()  # every warp's counts are there
            all_bits = seen[0]
            if all_bits < BINS:
                break
        if thread == 0:
            done[b, h] = all_bits < BINS
        if all_bits >= BINS:
            return
        bits = int32(0)
        while all_bits >> bits != 0:
            bits += int32(1)
        bins = uint32(1 << bits)
        if thread == 0:
            q_count[b, h] = seqlen_q
            if writes_keys:
                k_count[b, g] = seqlen_k

        # scan: over the bins, and within a bin over the warps
        entry = thread
        while entry < SIDES * bins:
            side, digit = entry >> bits, entry & (bins - 1)
            at = side * warps * PITCH + digit
            sums[side * BINS + digit] = sum_warps(counts, at, PITCH, warps)
            entry = int32(entry + threads)
        cuda.syncthreads()  # all sums are there
        entry = thread
        while entry < SIDES * bins:
            side, digit = entry >> bits, entry & (bins - 1)
            at = side * warps * PITCH + digit
            place = sum_bins(sums, side * BINS, side * BINS + digit)
            firsts[side * BINS + digit] = place
            start_warps(counts, at, PITCH, warps, place)
            entry = int32(entry + threads)
        cuda.syncthreads()  # counts say where each warp's next row of a bin goes

        # place: rows of a bin in their order
        before = lanes_before(lane)
        visible = lanes_before(lane + 1) if sees_itself else before
        start = first
        while start < end:
            for u in range(ROUNDS):
                row = int32(start + 32 * u + lane)
                q_ids[u] = int64(queries[uint32(min(row, q_last))]) - least
                k_ids[u] = int64(keys[uint32(min(row, k_last))]) - least
            for u in range(ROUNDS):
                now = int32(start + 32 * u)
                if now < end:  # the same for all lanes
                    row = int32(now + lane)
                    of_query, of_key = uint32(q_ids[u]), uint32(k_ids[u])
                    same_queries = lanes_before(q_end - now)
                    same_keys = lanes_before(k_end - now)
                    group_keys = same_keys  # lanes whose key is in this lane's query's group
                    bit = uint32(1)
                    while bit < bins:
                        query_bit, key_bit = has_bit(of_query, bit), has_bit(of_key, bit)
                        query_votes, key_votes = ballot(query_bit), ballot(key_bit)
                        same_queries = lanes_that_agree(same_queries, query_votes, query_bit)
                        same_keys = lanes_that_agree(same_keys, key_votes, key_bit)
                        group_keys = lanes_that_agree(group_keys, key_votes, query_bit)
                        bit = uint32(bit << uint32(1))
                    query_rank = int32(cuda.popc(uint32(same_queries & before)))
                    key_rank = int32(cuda.popc(uint32(same_keys & before)))
                    seen_keys = int32(cuda.popc(uint32(group_keys & visible)))
                    q_entry = uint32(my_queries + of_query)
                    k_entry = uint32(my_keys + of_key)
                    query_place = uint32(counts[q_entry] + query_rank)
                    key_place = uint32(counts[k_entry] + key_rank)
                    stop = int32(counts[uint32(my_keys + of_query)] + seen_keys)
                    warp_barrier()  # all lanes have read what the first of each group changes
                    if row < q_end:
                        q_rows[query_place] = row
                        stops[query_place] = stop
                        if query_rank == 0:
                            counts[q_entry] += cuda.popc(same_queries)
                    if row < k_end:
                        if writes_keys:
                            k_rows[key_place] = row
                        if key_rank == 0:
                            counts[k_entry] += cuda.popc(same_keys)
                    warp_barrier()  # the next round reads the new counts
            start = int32(start + 32 * ROUNDS)

        # key_start: where each group's keys begin
        starts = key_start[b, h]
        for digit in range(warp, bins, warps):
            place = firsts[digit]
            start = firsts[BINS + digit]
            for r in range(place + lane, place + sums[digit], 32):
                starts[uint32(r)] = start

    return scfa_plan_causal
