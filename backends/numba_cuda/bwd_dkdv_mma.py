"""Tensor-core dk and dv: dv = p.T @ dout, dk = scale * ds.T @ q, 64 sorted keys a block.

Works on transposed scores, keys by queries, so that p and ds are left operands as they come out of
the first products: nothing goes through shared memory, no atomics, the same sums in every run.
Needs the base-2 lse and delta that `bwd_dq_mma` left, in sorted order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda, float32, int32, uint16, uint32
from scfa_core.backends.numba_cuda.compiling import LOG2_E, device, kernel
from scfa_core.backends.numba_cuda.fragments import (
    BLOCKS,
    COLUMNS,
    REGISTER_ROWS,
    multiplications,
    ordinary_offset,
    origin_of,
    padded,
    paired_offset,
    pitch_of,
    row_fetcher,
    row_gatherer,
    row_scatterer,
    warp_shape,
)
from scfa_core.backends.numba_cuda.intrinsics import (
    commit_copies,
    copy_async_4,
    exp2_fast,
    wait_copies,
)
from scfa_core.backends.numba_cuda.schedule import next_query_tile, query_span

SHAPE = warp_shape(1)


def dkdv_shared(head_dim: int, head_dim_v: int) -> int:
    """Bytes of shared memory: k and v (later dk and dv), and two stages of q and dout."""
    return 2 * (SHAPE.rows + 2 * COLUMNS) * (pitch_of(head_dim) + pitch_of(head_dim_v))


@cache
def stat_copier(threads: int) -> Any:
    """Build the copy of what a tile of queries brings beside its rows."""
    turns = -(-COLUMNS // threads)

    @device
    def copy_stats(
        spans, stats, base, key_start, key_end, lse_log2, delta, origin, m0, last, thread
    ):
        """Start copying ranges, lse and delta of sorted queries m0, ...; zeros from `last` on."""
        for turn in range(turns):
            r = turn * threads + thread
            if r < COLUMNS:
                there = m0 + r < last
                place = origin + (m0 + r) * 4
                copy_async_4(spans, base + r, key_start, place, there)
                copy_async_4(spans, base + COLUMNS + r, key_end, place, there)
                copy_async_4(stats, base + r, lse_log2, place, there)
                copy_async_4(stats, base + COLUMNS + r, delta, place, there)

    return copy_stats


@cache
def build_bwd_dkdv_mma(dtype: str, head_dim: int, head_dim_v: int) -> Any:
    """Compile-time constants in, kernel out."""
    rows, threads = SHAPE.rows, SHAPE.threads
    qk, vo = multiplications(dtype, 1, head_dim), multiplications(dtype, 1, head_dim_v)
    load_k, by_rows_k, by_rows_k_shared = qk.load_left, qk.by_rows, qk.by_rows_shared
    load_v, by_rows_v, by_rows_v_shared = vo.load_left, vo.by_rows, vo.by_rows_shared
    by_columns_q, by_columns_dout = qk.by_columns, vo.by_columns
    gather_k, gather_v = (row_gatherer(x, rows, threads) for x in (head_dim, head_dim_v))
    gather_q, gather_dout = (row_gatherer(x, COLUMNS, threads) for x in (head_dim, head_dim_v))
    q_turns, fetch_q, put_q = row_fetcher(COLUMNS, threads)
    k_turns, fetch_k, put_k = row_fetcher(rows, threads)
    copy_stats = stat_copier(threads)
    stage_dk, scatter_dk = row_scatterer(dtype, 1, head_dim, threads, rows)
    stage_dv, scatter_dv = row_scatterer(dtype, 1, head_dim_v, threads, rows)
    in_registers = max(head_dim, head_dim_v) <= REGISTER_ROWS
    qk_pitch, v_pitch = pitch_of(head_dim), pitch_of(head_dim_v)
    q_size, dout_size = COLUMNS * qk_pitch, COLUMNS * v_pitch
    v_base = rows * qk_pitch
    q_base = v_base + rows * v_pitch
    dout_base = q_base + 2 * q_size
    k_count = padded(head_dim) // 4 if in_registers else 4
    v_count = padded(head_dim_v) // 4 if in_registers else 4
    score_count = BLOCKS * 4
    dk_count, dv_count = padded(head_dim) // 2, padded(head_dim_v) // 2
    slots, stat_count = 2 * COLUMNS, 4 * COLUMNS

    @kernel(
        *["uint16:4"] * 6,
        *["float32:3"] * 2,
        *["int32:3"] * 4,
        "bool",
        "float64",
        "uint32",
        "int32:1",
        variant=(dtype, head_dim, head_dim_v),
        bounds=(threads, 2 if in_registers else 1),
    )
    def scfa_bwd_dkdv_mma(
        dout, q, k, v, dk, dv, lse_log2, delta, q_index, k_index, key_start, key_end, monotone,
        scale, flip, flags,
    ):  # fmt: skip
        tile = cuda.shared.array(0, uint16)
        words = cuda.shared.array(0, uint32)
        fetched_q = cuda.local.array(q_turns, int32)
        fetched_k = cuda.local.array(k_turns, int32)
        k_rows = cuda.shared.array(rows, int32)
        q_rows = cuda.shared.array(slots, int32)
        spans = cuda.shared.array(stat_count, int32)  # two stages of starts, then ends
        stats = cuda.shared.array(stat_count, float32)  # two stages of lse, then delta
        tainted = cuda.shared.array(1, int32)
        left_k = cuda.local.array(k_count, uint32)
        left_v = cuda.local.array(v_count, uint32)
        weights = cuda.local.array(4, uint32)
        right = cuda.local.array(4, uint32)
        scores = cuda.local.array(score_count, float32)
        acc_dp = cuda.local.array(score_count, float32)
        acc_dk = cuda.local.array(dk_count, float32)
        acc_dv = cuda.local.array(dv_count, float32)
        factors = cuda.local.array(2, float32)

        thread = cuda.threadIdx.x & (threads - 1)  # lets the compiler know that it is small
        lane = thread % 32
        warp_row = thread // 32 * 16
        group = lane // 4
        quad = lane % 4
        heads, seqlen_q = q.shape[1], q.shape[2]
        heads_kv, seqlen_k = k.shape[1], k.shape[2]
        share = heads // heads_kv
        tiles = (seqlen_k + rows - 1) // rows
        head = cuda.blockIdx.x // tiles
        n0 = cuda.blockIdx.x % tiles * rows  # the first keys are seen by most
        n1 = min(n0 + rows, seqlen_k)
        b = head // heads_kv
        g = head % heads_kv
        # Scores take the sign of the scale from k (`flip`), so that its size is enough here.
        log2_scale = float32(abs(scale) * LOG2_E)
        w0 = n0 + warp_row

        fetch_k(fetched_k, k_index, b, g, n0, n1, thread)
        put_k(k_rows, 0, fetched_k, thread)
        if thread == 0:
            tainted[0] = 0
        cuda.syncthreads()  # rows are known
        k_origin, k_step = origin_of(k, b, g), int32(k.strides[2])
        v_origin, v_step = origin_of(v, b, g), int32(v.strides[2])
        gather_k(tile, 0, k, k_origin, k_step, k_rows, 0, thread)
        gather_v(tile, v_base, v, v_origin, v_step, k_rows, 0, thread)
        commit_copies()
        for e in range(dk_count):
            acc_dk[e] = float32(0)
        for e in range(dv_count):
            acc_dv[e] = float32(0)
        k_place = warp_row * qk_pitch + ordinary_offset(lane, qk_pitch)
        v_place = v_base + warp_row * v_pitch + ordinary_offset(lane, v_pitch)
        q_place = q_base + paired_offset(lane, qk_pitch)
        q_column_place = q_base + ordinary_offset(lane, qk_pitch)
        dout_place = dout_base + paired_offset(lane, v_pitch)
        dout_column_place = dout_base + ordinary_offset(lane, v_pitch)
        wait_copies()
        cuda.syncthreads()  # k and v are there
        if in_registers:
            load_k(left_k, tile, k_place, flip)
            load_v(left_v, tile, v_place, uint32(0))

        for h in range(g * share, g * share + share):
            first, last = query_span(key_start, key_end, b, h, n0, n1, seqlen_q, monotone)
            q_origin, q_step = origin_of(q, b, h), int32(q.strides[2])
            dout_origin, dout_step = origin_of(dout, b, h), int32(dout.strides[2])
            span_origin = origin_of(key_start, b, h)
            m_now = next_query_tile(key_start, key_end, b, h, first, last, n0, n1, monotone)
            m_next = next_query_tile(
                key_start, key_end, b, h, m_now + COLUMNS, last, n0, n1, monotone
            )
            cuda.syncthreads()  # the head before is consumed
            fetch_q(fetched_q, q_index, b, h, m_now, last, thread)
            put_q(q_rows, 0, fetched_q, thread)
            fetch_q(fetched_q, q_index, b, h, m_next, last, thread)
            put_q(q_rows, COLUMNS, fetched_q, thread)
            cuda.syncthreads()  # rows are known
            gather_q(tile, q_base, q, q_origin, q_step, q_rows, 0, thread)
            gather_dout(tile, dout_base, dout, dout_origin, dout_step, q_rows, 0, thread)
            copy_stats(
                spans,
                stats,
                0,
                key_start,
                key_end,
                lse_log2,
                delta,
                span_origin,
                m_now,
                last,
                thread,
            )
            commit_copies()

            stage = 0
            while m_now < last:
                wait_copies()
                cuda.syncthreads()  # this tile is there, the one before is consumed
                other = (stage + 1) & 1
                m_later = next_query_tile(
                    key_start, key_end, b, h, m_next + COLUMNS, last, n0, n1, monotone
                )
                if m_next < last:
                    slot = other * COLUMNS
                    q_next, dout_next = q_base + other * q_size, dout_base + other * dout_size
                    gather_q(tile, q_next, q, q_origin, q_step, q_rows, slot, thread)
                    gather_dout(tile, dout_next, dout, dout_origin, dout_step, q_rows, slot, thread)
                    copy_stats(
                        spans,
                        stats,
                        other * 2 * COLUMNS,
                        key_start,
                        key_end,
                        lse_log2,
                        delta,
                        span_origin,
                        m_next,
                        last,
                        thread,
                    )
                commit_copies()
                fetch_q(fetched_q, q_index, b, h, m_later, last, thread)

                # Does any of these queries see a key of this warp, and does each see all of them?
                base = (stage & 1) * 2 * COLUMNS  # "& 1" tells the compiler that it is not negative
                there_last = min(COLUMNS, last - m_now) - 1
                is_needed = not monotone or (
                    spans[base] < w0 + 16 and spans[base + COLUMNS + there_last] > w0
                )
                is_full = (
                    monotone
                    and there_last == COLUMNS - 1
                    and spans[base + COLUMNS - 1] <= w0
                    and spans[base + COLUMNS] >= w0 + 16
                )
                if is_needed:
                    # S^T = k q^T, dP^T = v dout^T
                    q_now, dout_now = q_place + stage * q_size, dout_place + stage * dout_size
                    if in_registers:
                        by_rows_k(scores, left_k, right, tile, q_now)
                        by_rows_v(acc_dp, left_v, right, tile, dout_now)
                    else:
                        by_rows_k_shared(scores, left_k, right, tile, k_place, flip, q_now)
                        by_rows_v_shared(acc_dp, left_v, right, tile, v_place, uint32(0), dout_now)

                    # p = exp2(S - lse), ds = p * (dP - delta), 0 where not visible
                    for block in range(BLOCKS):
                        for c in range(2):
                            column = base + 2 * quad + block * 8 + c
                            column_lse = stats[column]
                            column_delta = stats[column + COLUMNS]
                            for i in range(2):
                                e = block * 4 + i * 2 + c
                                p = exp2_fast(scores[e] * log2_scale - column_lse)
                                scores[e] = p
                                acc_dp[e] = p * (acc_dp[e] - column_delta)
                    if not is_full:
                        for block in range(BLOCKS):
                            for c in range(2):
                                column = base + 2 * quad + block * 8 + c
                                start = spans[column]
                                length = uint32(spans[column + COLUMNS] - start)
                                for i in range(2):
                                    if uint32(w0 + group + i * 8 - start) >= length:
                                        scores[block * 4 + i * 2 + c] = float32(0)
                                        acc_dp[block * 4 + i * 2 + c] = float32(0)

                    # dv += p^T dout, dk += ds^T q
                    dout_now = dout_column_place + stage * dout_size
                    by_columns_dout(acc_dv, scores, weights, right, tile, dout_now)
                    q_now = q_column_place + stage * q_size
                    by_columns_q(acc_dk, acc_dp, weights, right, tile, q_now)

                put_q(q_rows, stage * COLUMNS, fetched_q, thread)
                stage = other
                m_now = m_next
                m_next = m_later

        # NaN and Inf never go away: one look tells whether a hidden pair's row has leaked in.
        check = float32(0)
        for e in range(dk_count):
            check += acc_dk[e] * float32(0)
        for e in range(dv_count):
            check += acc_dv[e] * float32(0)
        if check != float32(0):
            tainted[0] = 1
        cuda.syncthreads()  # keys and values are consumed, their places are free
        factors[0] = scale
        factors[1] = scale
        stage_dk(words, 0, acc_dk, factors, warp_row, lane)
        factors[0] = float32(1)
        factors[1] = float32(1)
        stage_dv(words, v_base, acc_dv, factors, warp_row, lane)
        cuda.syncthreads()  # the results are there, and whether they are tainted
        dk_origin, dk_step = origin_of(dk, b, g), int32(dk.strides[2])
        dv_origin, dv_step = origin_of(dv, b, g), int32(dv.strides[2])
        scatter_dk(tile, 0, dk, dk_origin, dk_step, k_rows, thread)
        scatter_dv(tile, v_base, dv, dv_origin, dv_step, k_rows, thread)
        if thread == 0:
            flags[head * tiles + n0 // rows] = tainted[0]

    return scfa_bwd_dkdv_mma
