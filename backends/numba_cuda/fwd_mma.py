"""Tensor-core forward: out = softmax(scale * q @ k.T) @ v over each query's range of sorted keys.

One block owns 64 or 128 consecutive sorted queries of one head; each warp keeps its rows' scores,
weights and result in registers. Tiles of 64 keys arrive by asynchronous copies, one tile ahead.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda, float32, int32, uint16, uint32
from scfa_core.backends.numba_cuda.compiling import INFINITY, LN_2, LOG2_E, kernel
from scfa_core.backends.numba_cuda.fragments import (
    BLOCKS,
    COLUMNS,
    REGISTER_ROWS,
    WarpShape,
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
    exp2_fast,
    maximum,
    quad_max,
    quad_sum,
    wait_copies,
)
from scfa_core.backends.numba_cuda.schedule import key_core, key_span
from scfa_core.backends.numba_cuda.softmax import log2


def forward_warps(head_dim: int, head_dim_v: int) -> WarpShape:
    """Thirty-two rows a warp where the result fits in registers beside the scores, else sixteen."""
    return warp_shape(2 if max(head_dim, head_dim_v) <= 128 else 1)


def forward_shared(head_dim: int, head_dim_v: int) -> int:
    """Bytes of shared memory: queries (later the result), and two stages of keys and values."""
    rows = forward_warps(head_dim, head_dim_v).rows
    q_size = rows * pitch_of(max(head_dim, head_dim_v))
    return 2 * (q_size + 2 * COLUMNS * (pitch_of(head_dim) + pitch_of(head_dim_v)))


@cache
def build_fwd_mma(dtype: str, head_dim: int, head_dim_v: int) -> Any:
    """Compile-time constants in, kernel out."""
    shape = forward_warps(head_dim, head_dim_v)
    atoms, rows, threads = shape.atoms, shape.rows, shape.threads
    load_left, by_rows, by_rows_shared, _ = multiplications(dtype, atoms, head_dim)
    by_columns = multiplications(dtype, atoms, head_dim_v).by_columns
    gather_q = row_gatherer(head_dim, rows, threads)
    gather_k = row_gatherer(head_dim, COLUMNS, threads)
    gather_v = row_gatherer(head_dim_v, COLUMNS, threads)
    q_turns, fetch_q, put_q = row_fetcher(rows, threads)
    k_turns, fetch_k, put_k = row_fetcher(COLUMNS, threads)
    stage_rows, scatter_rows = row_scatterer(dtype, atoms, head_dim_v, threads, rows)
    in_registers = head_dim <= REGISTER_ROWS
    qk_pitch, v_pitch = pitch_of(head_dim), pitch_of(head_dim_v)
    k_size, v_size = COLUMNS * qk_pitch, COLUMNS * v_pitch
    k_base = rows * pitch_of(max(head_dim, head_dim_v))
    v_base = k_base + 2 * k_size
    left_count = atoms * (padded(head_dim) // 16 if in_registers else 1) * 4
    score_count = atoms * BLOCKS * 4
    out_count = atoms * padded(head_dim_v) // 2
    row_count = atoms * 2
    padded_v = padded(head_dim_v)
    p_count = atoms * 4
    slots = 2 * COLUMNS

    @kernel(
        *["uint16:4"] * 4,
        "float32:3",
        *["int32:3"] * 4,
        "bool",
        "float64",
        "uint32",
        "int32:1",
        variant=(dtype, head_dim, head_dim_v),
        bounds=(threads, 2 if in_registers else 1),
    )
    def scfa_fwd_mma(
        q, k, v, out, lse, q_index, k_index, key_start, key_end, monotone, scale, flip, flags
    ):
        tile = cuda.shared.array(0, uint16)
        words = cuda.shared.array(0, uint32)
        fetched_q = cuda.local.array(q_turns, int32)
        fetched_k = cuda.local.array(k_turns, int32)
        q_rows = cuda.shared.array(rows, int32)
        k_rows = cuda.shared.array(slots, int32)
        tainted = cuda.shared.array(1, int32)
        left = cuda.local.array(left_count, uint32)
        weights = cuda.local.array(p_count, uint32)
        right = cuda.local.array(4, uint32)
        scores = cuda.local.array(score_count, float32)
        acc_o = cuda.local.array(out_count, float32)
        row_max = cuda.local.array(row_count, float32)
        row_sum = cuda.local.array(row_count, float32)
        start = cuda.local.array(row_count, int32)
        length = cuda.local.array(row_count, uint32)

        thread = cuda.threadIdx.x & (threads - 1)  # lets the compiler know that it is small
        lane = thread % 32
        warp_row = thread // 32 * (16 * atoms)
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
        gather_q(tile, 0, q, q_origin, q_step, q_rows, 0, thread)
        gather_k(tile, k_base, k, k_origin, k_step, k_rows, 0, thread)
        gather_v(tile, v_base, v, v_origin, v_step, k_rows, 0, thread)
        commit_copies()

        # What this warp's rows see at all, what all of them see, and what this lane's rows see.
        w0 = m0 + warp_row
        w1 = min(w0 + 16 * atoms, m1)
        warp_first, warp_last, core_first, core_last = int32(0), int32(0), int32(0), int32(0)
        if w0 < w1:
            warp_first, warp_last = key_span(key_start, key_end, b, h, w0, w1, monotone)
            if w1 == w0 + 16 * atoms:
                core_first, core_last = key_core(key_start, key_end, b, h, w0, w1, monotone)
        for i in range(row_count):
            r = w0 + i // 2 * 16 + i % 2 * 8 + group
            start[i] = 0
            length[i] = 0
            if r < m1:
                start[i] = key_start[b, h, r]
                length[i] = key_end[b, h, r] - key_start[b, h, r]
            row_max[i] = -INFINITY
            row_sum[i] = float32(0)
        for e in range(out_count):
            acc_o[e] = float32(0)

        q_place = warp_row * qk_pitch + ordinary_offset(lane, qk_pitch)
        k_place = k_base + paired_offset(lane, qk_pitch)
        v_place = v_base + ordinary_offset(lane, v_pitch)
        wait_copies()
        cuda.syncthreads()  # q is there
        if in_registers:
            load_left(left, tile, q_place, flip)

        stage = 0
        n0 = int32(first)
        while n0 < last:
            wait_copies()
            cuda.syncthreads()  # this tile is there, the one before is consumed
            other = (stage + 1) & 1
            if n0 + COLUMNS < last:
                slot = other * COLUMNS
                gather_k(tile, k_base + other * k_size, k, k_origin, k_step, k_rows, slot, thread)
                gather_v(tile, v_base + other * v_size, v, v_origin, v_step, k_rows, slot, thread)
            commit_copies()
            fetch_k(fetched_k, k_index, b, g, n0 + 2 * COLUMNS, last, thread)

            if n0 < warp_last and n0 + COLUMNS > warp_first:
                # S = q k^T
                if in_registers:
                    by_rows(scores, left, right, tile, k_place + stage * k_size)
                else:
                    by_rows_shared(
                        scores, left, right, tile, q_place, flip, k_place + stage * k_size
                    )

                # Pairs that are not visible
                if n0 < core_first or n0 + COLUMNS > core_last:
                    for i in range(row_count):
                        place = n0 + 2 * quad - start[i]
                        for block in range(BLOCKS):
                            for c in range(2):
                                if uint32(place + block * 8 + c) >= length[i]:
                                    scores[
                                        (i // 2 * BLOCKS + block) * 4 + i % 2 * 2 + c
                                    ] = -INFINITY

                # m' = max(m, S), P = exp2(S - m'), l = l exp2(m - m') + rowsum(P)
                for i in range(row_count):
                    e = i // 2 * BLOCKS * 4 + i % 2 * 2
                    new = row_max[i]
                    for block in range(BLOCKS):
                        new = maximum(
                            new, maximum(scores[e + block * 4], scores[e + block * 4 + 1])
                        )
                    new = quad_max(new)
                    shift = new * log2_scale
                    if new == -INFINITY:
                        shift = float32(0)
                    factor = exp2_fast(row_max[i] * log2_scale - shift)
                    row_max[i] = new
                    total = row_sum[i] * factor
                    for block in range(BLOCKS):
                        for c in range(2):
                            p = exp2_fast(scores[e + block * 4 + c] * log2_scale - shift)
                            scores[e + block * 4 + c] = p
                            total += p
                    row_sum[i] = total
                    for block in range(padded_v // 8):
                        for c in range(2):
                            acc_o[(i // 2 * (padded_v // 8) + block) * 4 + i % 2 * 2 + c] *= factor

                # O += P v
                by_columns(acc_o, scores, weights, right, tile, v_place + stage * v_size)

            put_k(k_rows, stage * COLUMNS, fetched_k, thread)
            stage = other
            n0 = int32(n0 + COLUMNS)

        # NaN and Inf never go away: one look tells whether a hidden pair's row has leaked in.
        check = float32(0)
        for e in range(out_count):
            check += acc_o[e] * float32(0)
        if check != float32(0):
            tainted[0] = 1
        for i in range(row_count):
            total = quad_sum(row_sum[i])
            r = warp_row + i // 2 * 16 + i % 2 * 8 + group
            is_empty = total == float32(0)
            if quad == 0 and m0 + r < m1:
                value = float32(-INFINITY)
                if not is_empty:
                    value = row_max[i] * log2_scale * float32(LN_2) + log2(total) * float32(LN_2)
                lse[b, h, q_rows[r]] = value
            row_sum[i] = float32(0) if is_empty else float32(1) / total
        cuda.syncthreads()  # queries are consumed, their place is free
        stage_rows(words, 0, acc_o, row_sum, warp_row, lane)
        cuda.syncthreads()  # the result is there, and whether it is tainted
        out_origin, out_step = origin_of(out, b, h), int32(out.strides[2])
        scatter_rows(tile, 0, out, out_origin, out_step, q_rows, thread)
        if thread == 0:
            flags[head * tiles + m0 // rows] = tainted[0]

    return scfa_fwd_mma
