"""Tensor-core dq: dq = scale * ds @ k with ds = p * (dout @ v.T - delta), 64 queries a block.

Runs first and leaves delta = rowsum(dout * out) and the base-2 lse of its rows, in sorted order,
for `bwd_dkdv_mma`. Scores, weights and dq stay in registers; keys and values arrive one tile ahead.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda, float32, int32, uint16, uint32
from scfa_core.backends.numba_cuda.compiling import INFINITY, LOG2_E, kernel
from scfa_core.backends.numba_cuda.convert import pair_widener
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
from scfa_core.backends.numba_cuda.intrinsics import commit_copies, exp2_fast, wait_copies
from scfa_core.backends.numba_cuda.schedule import key_core, key_span

SHAPE = warp_shape(1)


def dq_shared(head_dim: int, head_dim_v: int) -> int:
    """Bytes of shared memory: q (later dq) and dout, and two stages of keys and values."""
    return 2 * (SHAPE.rows + 2 * COLUMNS) * (pitch_of(head_dim) + pitch_of(head_dim_v))


@cache
def build_bwd_dq_mma(dtype: str, head_dim: int, head_dim_v: int) -> Any:
    """Compile-time constants in, kernel out."""
    rows, threads = SHAPE.rows, SHAPE.threads
    qk, vo = multiplications(dtype, 1, head_dim), multiplications(dtype, 1, head_dim_v)
    load_q, by_rows_q, by_rows_q_shared = qk.load_left, qk.by_rows, qk.by_rows_shared
    load_dout, by_rows_dout, by_rows_dout_shared = vo.load_left, vo.by_rows, vo.by_rows_shared
    by_columns = qk.by_columns
    gather_q, gather_dout = (row_gatherer(x, rows, threads) for x in (head_dim, head_dim_v))
    gather_k, gather_v = (row_gatherer(x, COLUMNS, threads) for x in (head_dim, head_dim_v))
    q_turns, fetch_q, put_q = row_fetcher(rows, threads)
    k_turns, fetch_k, put_k = row_fetcher(COLUMNS, threads)
    stage_rows, scatter_rows = row_scatterer(dtype, 1, head_dim, threads, rows)
    low_half, high_half = pair_widener(dtype)
    in_registers = max(head_dim, head_dim_v) <= REGISTER_ROWS
    qk_pitch, v_pitch = pitch_of(head_dim), pitch_of(head_dim_v)
    k_size, v_size = COLUMNS * qk_pitch, COLUMNS * v_pitch
    dout_base = rows * qk_pitch
    k_base = dout_base + rows * v_pitch
    v_base = k_base + 2 * k_size
    q_count = padded(head_dim) // 4 if in_registers else 4
    dout_count = padded(head_dim_v) // 4 if in_registers else 4
    score_count = BLOCKS * 4
    dq_count = padded(head_dim) // 2
    slots = 2 * COLUMNS
    part_words = head_dim_v // 4  # half a row, in words
    part_count = 2 * rows

    @kernel(
        *["uint16:4"] * 5,
        "float32:3",
        "uint16:4",
        *["float32:3"] * 2,
        *["int32:3"] * 4,
        "bool",
        "float64",
        "uint32",
        "int32:1",
        variant=(dtype, head_dim, head_dim_v),
        bounds=(threads, 3 if in_registers else 1),
    )
    def scfa_bwd_dq_mma(
        dout, q, k, v, out, lse, dq, lse_log2, delta, q_index, k_index, key_start, key_end,
        monotone, scale, flip, flags,
    ):  # fmt: skip
        tile = cuda.shared.array(0, uint16)
        words = cuda.shared.array(0, uint32)
        fetched_q = cuda.local.array(q_turns, int32)
        fetched_k = cuda.local.array(k_turns, int32)
        q_rows = cuda.shared.array(rows, int32)
        k_rows = cuda.shared.array(slots, int32)
        parts = cuda.shared.array(part_count, float32)
        tainted = cuda.shared.array(1, int32)
        left_q = cuda.local.array(q_count, uint32)
        left_dout = cuda.local.array(dout_count, uint32)
        weights = cuda.local.array(4, uint32)
        right = cuda.local.array(4, uint32)
        scores = cuda.local.array(score_count, float32)
        acc_dp = cuda.local.array(score_count, float32)
        acc_dq = cuda.local.array(dq_count, float32)
        row_lse = cuda.local.array(2, float32)
        row_delta = cuda.local.array(2, float32)
        factors = cuda.local.array(2, float32)
        start = cuda.local.array(2, int32)
        length = cuda.local.array(2, uint32)

        thread = cuda.threadIdx.x & (threads - 1)  # lets the compiler know that it is small
        lane = thread % 32
        warp_row = thread // 32 * 16
        group = lane // 4
        quad = lane % 4
        heads, seqlen_q = q.shape[1], q.shape[2]
        tiles = (seqlen_q + rows - 1) // rows
        head = cuda.blockIdx.x // tiles
        m0 = (tiles - 1 - cuda.blockIdx.x % tiles) * rows  # the last rows see most
        m1 = min(m0 + rows, seqlen_q)
        b = head // heads
        h = head % heads
        g = h // (heads // k.shape[1])
        first, last = key_span(key_start, key_end, b, h, m0, m1, monotone)
        k_origin, k_step = origin_of(k, b, g), int32(k.strides[2])
        v_origin, v_step = origin_of(v, b, g), int32(v.strides[2])
        # Scores take the sign of the scale from q (`flip`), so that its size is enough here.
        log2_scale = float32(abs(scale) * LOG2_E)

        # Which rows? Queries once; keys two tiles ahead of their use.
        fetch_q(fetched_q, q_index, b, h, m0, m1, thread)
        put_q(q_rows, 0, fetched_q, thread)
        for slot in range(2):
            fetch_k(fetched_k, k_index, b, g, first + slot * COLUMNS, last, thread)
            put_k(k_rows, slot * COLUMNS, fetched_k, thread)
        if thread == 0:
            tainted[0] = 0
        cuda.syncthreads()  # rows are known
        q_origin, q_step = origin_of(q, b, h), int32(q.strides[2])
        dout_origin, dout_step = origin_of(dout, b, h), int32(dout.strides[2])
        out_origin, out_step = origin_of(out, b, h), int32(out.strides[2])
        gather_q(tile, 0, q, q_origin, q_step, q_rows, 0, thread)
        gather_dout(tile, dout_base, dout, dout_origin, dout_step, q_rows, 0, thread)
        # out borrows the second stage of v
        gather_dout(tile, v_base + v_size, out, out_origin, out_step, q_rows, 0, thread)
        gather_k(tile, k_base, k, k_origin, k_step, k_rows, 0, thread)
        gather_v(tile, v_base, v, v_origin, v_step, k_rows, 0, thread)
        commit_copies()

        w0 = m0 + warp_row
        w1 = min(w0 + 16, m1)
        warp_first, warp_last, core_first, core_last = int32(0), int32(0), int32(0), int32(0)
        if w0 < w1:
            warp_first, warp_last = key_span(key_start, key_end, b, h, w0, w1, monotone)
            if w1 == w0 + 16:
                core_first, core_last = key_core(key_start, key_end, b, h, w0, w1, monotone)
        for e in range(dq_count):
            acc_dq[e] = float32(0)
        q_place = warp_row * qk_pitch + ordinary_offset(lane, qk_pitch)
        dout_place = dout_base + warp_row * v_pitch + ordinary_offset(lane, v_pitch)
        k_place = k_base + paired_offset(lane, qk_pitch)
        k_column_place = k_base + ordinary_offset(lane, qk_pitch)
        v_place = v_base + paired_offset(lane, v_pitch)
        wait_copies()
        cuda.syncthreads()  # q, dout and out are there
        if in_registers:
            load_q(left_q, tile, q_place, flip)
            load_dout(left_dout, tile, dout_place, uint32(0))

        # delta = rowsum(dout * out): two threads a row
        dout_word = (dout_base + thread // 2 * v_pitch) // 2 + thread % 2 * part_words
        out_word = (v_base + v_size + thread // 2 * v_pitch) // 2 + thread % 2 * part_words
        part = float32(0)
        for w in range(part_words):
            x = words[dout_word + w]
            y = words[out_word + w]
            part += low_half(x) * low_half(y) + high_half(x) * high_half(y)
        parts[thread] = part
        cuda.syncthreads()  # parts are there, out is consumed
        for i in range(2):
            r = warp_row + i * 8 + group
            row_delta[i] = parts[2 * r] + parts[2 * r + 1]
            row_lse[i] = INFINITY  # an empty row weighs nothing: exp2(s - inf) = 0
            start[i] = 0
            length[i] = 0
            if m0 + r < m1:
                value = lse[b, h, q_rows[r]]
                if value != -INFINITY:
                    row_lse[i] = value * float32(LOG2_E)
                start[i] = key_start[b, h, m0 + r]
                length[i] = key_end[b, h, m0 + r] - key_start[b, h, m0 + r]
                if quad == 0:
                    lse_log2[b, h, m0 + r] = row_lse[i]
                    delta[b, h, m0 + r] = row_delta[i]

        stage = 0
        n0 = int32(first)
        while n0 < last:
            wait_copies()
            cuda.syncthreads()  # this tile is there, the one before is consumed
            other = (stage + 1) & 1
            if n0 + COLUMNS < last:
                slot = other * COLUMNS
                k_next, v_next = k_base + other * k_size, v_base + other * v_size
                gather_k(tile, k_next, k, k_origin, k_step, k_rows, slot, thread)
                gather_v(tile, v_next, v, v_origin, v_step, k_rows, slot, thread)
            commit_copies()
            fetch_k(fetched_k, k_index, b, g, n0 + 2 * COLUMNS, last, thread)

            if n0 < warp_last and n0 + COLUMNS > warp_first:
                # S = q k^T, dP = dout v^T
                k_now, v_now = k_place + stage * k_size, v_place + stage * v_size
                if in_registers:
                    by_rows_q(scores, left_q, right, tile, k_now)
                    by_rows_dout(acc_dp, left_dout, right, tile, v_now)
                else:
                    by_rows_q_shared(scores, left_q, right, tile, q_place, flip, k_now)
                    by_rows_dout_shared(
                        acc_dp, left_dout, right, tile, dout_place, uint32(0), v_now
                    )

                # ds = exp2(S - lse) * (dP - delta), 0 where not visible
                for e in range(score_count):
                    i = e // 2 % 2
                    p = exp2_fast(scores[e] * log2_scale - row_lse[i])
                    scores[e] = p * (acc_dp[e] - row_delta[i])
                if n0 < core_first or n0 + COLUMNS > core_last:
                    for e in range(score_count):
                        i = e // 2 % 2
                        place = n0 + 2 * quad - start[i] + e // 4 * 8 + e % 2
                        if uint32(place) >= length[i]:
                            scores[e] = float32(0)

                # dq += ds k
                by_columns(acc_dq, scores, weights, right, tile, k_column_place + stage * k_size)

            put_k(k_rows, stage * COLUMNS, fetched_k, thread)
            stage = other
            n0 = int32(n0 + COLUMNS)

        # NaN and Inf never go away: one look tells whether a hidden pair's row has leaked in.
        check = float32(0)
        for e in range(dq_count):
            check += acc_dq[e] * float32(0)
        if check != float32(0):
            tainted[0] = 1
        factors[0] = scale
        factors[1] = scale
        cuda.syncthreads()  # queries are consumed, their place is free
        stage_rows(words, 0, acc_dq, factors, warp_row, lane)
        cuda.syncthreads()  # the result is there, and whether it is tainted
        dq_origin, dq_step = origin_of(dq, b, h), int32(dq.strides[2])
        scatter_rows(tile, 0, dq, dq_origin, dq_step, q_rows, thread)
        if thread == 0:
            flags[head * tiles + m0 // rows] = tainted[0]

    return scfa_bwd_dq_mma
