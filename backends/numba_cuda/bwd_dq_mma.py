"""Tensor-core dq: dq = scale * ds @ k with ds = p * (dout @ v.T - delta), some queries a block.

Runs first and leaves delta = rowsum(dout * out) and the base-2 lse of its rows, in sorted order,
for `bwd_dkdv_mma`. Scores, weights and dq stay in registers; keys and values arrive one tile ahead.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda, float32, int32, int64, uint16, uint32
from scfa_core.backends.numba_cuda.compiling import INFINITY, LOG2_E, device, kernel
from scfa_core.backends.numba_cuda.convert import pair_widener
from scfa_core.backends.numba_cuda.fragments import (
    TileShape,
    multiplications,
    ordinary_offset,
    origin_of,
    padded,
    paired_offset,
    pitch_of,
    resident_shape,
    row_fetcher,
    row_gatherer,
    row_scatterer,
    sign_flipper,
    twin_gatherer,
    value_copier,
)
from scfa_core.backends.numba_cuda.intrinsics import (
    commit_copies,
    exp2_fast,
    load_4,
    wait_copies,
)
from scfa_core.backends.numba_cuda.schedule import key_core, key_span

# By the widest row, in order of preference. Steps of 32 keys leave registers for q and dout.
SHAPES = {
    64: (TileShape(atoms=2, columns=64, step=32, in_registers=True, blocks=2),),
    128: (TileShape(atoms=1, columns=64, step=64, in_registers=False, blocks=1),),
}


def _out_base(shape: TileShape, head_dim: int, head_dim_v: int) -> int:
    """Where rows of out are put at first: from the second stage of keys and values on."""
    return (shape.rows + shape.columns) * (pitch_of(head_dim) + pitch_of(head_dim_v))


def dq_shared(shape: TileShape, head_dim: int, head_dim_v: int) -> int:
    """Bytes of shared memory: q (later dq) and dout, and two stages of keys and values."""
    borrowed = _out_base(shape, head_dim, head_dim_v) + shape.rows * pitch_of(head_dim_v)
    places = (shape.rows + 2 * shape.columns) * (pitch_of(head_dim) + pitch_of(head_dim_v))
    return 2 * max(places, borrowed)


@cache
def dq_shape(head_dim: int, head_dim_v: int, limit: int) -> tuple[TileShape, int]:
    """Shape for a card whose blocks may have `limit` bytes of shared memory, and its bytes."""
    width = max(head_dim, head_dim_v)
    shapes = next(shapes for widest, shapes in SHAPES.items() if width <= widest)
    sizes = tuple(dq_shared(shape, head_dim, head_dim_v) for shape in shapes)
    return resident_shape(shapes, sizes, limit)


@cache
def row_multiplier(dtype: str, head_dim_v: int) -> Any:
    """Build the product of two rows in shared memory, 16 bytes at a time."""
    low_half, high_half = pair_widener(dtype)
    quarters = head_dim_v // 8

    @device
    def multiply_rows(x, y, words, x_word, y_word):
        """Sum of the products of two rows of 16-bit floats; x and y take four words each."""
        total = float32(0)
        for quarter in range(quarters):
            load_4(x, words, x_word + quarter * 4)
            load_4(y, words, y_word + quarter * 4)
            for w in range(4):
                total += low_half(x[w]) * low_half(y[w]) + high_half(x[w]) * high_half(y[w])
        return total

    return multiply_rows


@cache
def build_bwd_dq_mma(
    dtype: str, head_dim: int, head_dim_v: int, shape: TileShape | None = None
) -> Any:
    """Compile-time constants in, kernel out."""
    if shape is None:
        shape = dq_shape(head_dim, head_dim_v, 1 << 20)[0]
    atoms, rows, threads = shape.atoms, shape.rows, shape.threads
    columns, step, in_registers = shape.columns, shape.step, shape.in_registers
    qk = multiplications(dtype, atoms, head_dim, step, in_registers)
    vo = multiplications(dtype, atoms, head_dim_v, step, in_registers)
    load_q, by_rows_q, by_columns = qk.load_left, qk.by_rows, qk.by_columns
    load_dout, add_rows_dout = vo.load_left, vo.add_rows
    gather_q, gather_dout = (row_gatherer(x, rows, threads) for x in (head_dim, head_dim_v))
    gather_keys, rounds = twin_gatherer(head_dim, head_dim_v, columns, threads)
    fetch_q = row_fetcher(rows, threads)
    copy_rows = value_copier(columns, threads)
    stage_rows, scatter_rows = row_scatterer(dtype, atoms, head_dim, threads, rows)
    multiply_rows = row_multiplier(dtype, head_dim_v)
    qk_pitch, v_pitch = pitch_of(head_dim), pitch_of(head_dim_v)
    flip_signs = sign_flipper(rows * qk_pitch // 2, threads)
    dout_base = rows * qk_pitch
    keys_base = dout_base + rows * v_pitch
    v_offset = columns * qk_pitch
    stage_size = v_offset + columns * v_pitch
    out_base = _out_base(shape, head_dim, head_dim_v)
    q_count = atoms * (padded(head_dim) // 4 if in_registers else 4)
    dout_count = atoms * (padded(head_dim_v) // 4 if in_registers else 4)
    p_count = atoms * 4
    blocks = step // 8
    score_count = atoms * blocks * 4
    dq_count = atoms * padded(head_dim) // 2
    row_count, warp_rows = 2 * atoms, 16 * atoms
    slots, span_count = 2 * columns, 4 * shape.warps

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
        variant=(dtype, head_dim, head_dim_v, shape),
        bounds=(threads, shape.blocks),
    )
    def scfa_bwd_dq_mma(
        dout, q, k, v, out, lse, dq, lse_log2, delta, q_index, k_index, key_start, key_end,
        monotone, scale, flip, flags,
    ):  # fmt: skip
        tile = cuda.shared.array(0, uint16)
        words = cuda.shared.array(0, uint32)
        q_rows = cuda.shared.array(rows, int32)
        k_rows = cuda.shared.array(slots, int32)
        starts = cuda.shared.array(rows, int32)
        lengths = cuda.shared.array(rows, int32)
        row_lse = cuda.shared.array(rows, float32)
        row_delta = cuda.shared.array(rows, float32)
        spans = cuda.shared.array(span_count, int32)  # read anew for each tile, as all of these
        origins = cuda.shared.array(3, int64)
        tainted = cuda.shared.array(1, int32)
        left_q = cuda.local.array(q_count, uint32)
        left_dout = cuda.local.array(dout_count, uint32)
        weights = cuda.local.array(p_count, uint32)
        right = cuda.local.array(4, uint32)
        other_words = cuda.local.array(4, uint32)
        scores = cuda.local.array(score_count, float32)
        acc_dp = cuda.local.array(score_count, float32)
        acc_dq = cuda.local.array(dq_count, float32)
        factors = cuda.local.array(row_count, float32)
        ahead = cuda.local.array(rounds, int32)

        thread = cuda.threadIdx.x & (threads - 1)  # lets the compiler know that it is small
        block = uint32(cuda.blockDim.x)
        lane = thread % 32
        warp_span = thread // 32 * 4
        warp_row = thread // 32 * warp_rows
        group = lane // 4
        quad = lane % 4
        heads, seqlen_q = q.shape[1], q.shape[2]
        tiles = int32((seqlen_q + rows - 1) // rows)
        head = int32(cuda.blockIdx.x // tiles)
        m0 = int32((tiles - 1 - cuda.blockIdx.x % tiles) * rows)  # the last rows see most
        m1 = int32(min(m0 + rows, seqlen_q))
        b = int32(head // heads)
        h = int32(head % heads)
        g = int32(h // (heads // k.shape[1]))
        first, last = key_span(key_start, key_end, b, h, m0, m1, monotone)
        first, last = int32(first), int32(last)
        k_step, v_step = int32(k.strides[2]), int32(v.strides[2])
        # Scores take the sign of the scale from q (`flip`), so that its size is enough here.
        log2_scale = float32(abs(scale) * LOG2_E)

        # Which rows? Queries once; keys two tiles ahead of their use.
        k_origin, v_origin = origin_of(k, b, g), origin_of(v, b, g)
        list_origin = origin_of(k_index, b, g)
        fetch_q(q_rows, q_index, b, h, m0, m1, thread)
        copy_rows(k_rows, 0, 1, k_index, list_origin, first, last, thread)
        copy_rows(k_rows, columns, 1, k_index, list_origin, first + columns, last, thread)
        if thread == 0:
            tainted[0] = 0
            origins[0] = k_origin
            origins[1] = v_origin
            origins[2] = list_origin
        wait_copies()
        cuda.syncthreads()  # rows are known
        q_origin, q_step = origin_of(q, b, h), int32(q.strides[2])
        dout_origin, dout_step = origin_of(dout, b, h), int32(dout.strides[2])
        out_origin, out_step = origin_of(out, b, h), int32(out.strides[2])
        there = int32(m1 - m0)
        gather_q(tile, 0, q, q_origin, q_step, q_rows, 0, there, thread, block)
        gather_dout(tile, dout_base, dout, dout_origin, dout_step, q_rows, 0, there, thread, block)
        gather_dout(tile, out_base, out, out_origin, out_step, q_rows, 0, there, thread, block)
        there = int32(last - first)
        gather_keys(
            tile, keys_base, keys_base + v_offset, k, v, k_origin, v_origin, k_step, v_step,
            k_rows, ahead, 0, there, thread, block,
        )  # fmt: skip
        commit_copies()

        w0 = m0 + warp_row
        w1 = min(w0 + warp_rows, m1)
        warp_first, warp_last, core_first, core_last = int32(0), int32(0), int32(0), int32(0)
        if w0 < w1:
            warp_first, warp_last = key_span(key_start, key_end, b, h, w0, w1, monotone)
            if w1 == w0 + warp_rows:
                core_first, core_last = key_core(key_start, key_end, b, h, w0, w1, monotone)
        spans[warp_span] = warp_first
        spans[warp_span + 1] = warp_last
        spans[warp_span + 2] = core_first
        spans[warp_span + 3] = core_last
        for e in range(dq_count):
            acc_dq[e] = float32(0)
        q_place = int32(warp_row * qk_pitch + ordinary_offset(lane, qk_pitch))
        dout_place = int32(dout_base + warp_row * v_pitch + ordinary_offset(lane, v_pitch))
        k_place = int32(keys_base + paired_offset(lane, qk_pitch))
        k_column_place = int32(keys_base + ordinary_offset(lane, qk_pitch))
        v_place = int32(keys_base + v_offset + paired_offset(lane, v_pitch))
        wait_copies()
        cuda.syncthreads()  # q, dout and out are there
        if flip != 0:
            flip_signs(words, flip, thread)

        # delta = rowsum(dout * out); base-2 lse; ranges
        for r in range(thread, rows, threads):
            total = multiply_rows(
                right, other_words, words, (dout_base + r * v_pitch) // 2,
                (out_base + r * v_pitch) // 2,
            )  # fmt: skip
            value = float32(INFINITY)  # an empty row weighs nothing: exp2(s - inf) = 0
            starts[r] = 0
            lengths[r] = 0
            if m0 + r < m1:
                natural = lse[b, h, q_rows[r]]
                if natural != -INFINITY:
                    value = natural * float32(LOG2_E)
                starts[r] = key_start[b, h, m0 + r]
                lengths[r] = key_end[b, h, m0 + r] - key_start[b, h, m0 + r]
                lse_log2[b, h, m0 + r] = value
                delta[b, h, m0 + r] = total
            row_lse[r] = value
            row_delta[r] = total
        cuda.syncthreads()  # what is known of rows is there, out is consumed
        if in_registers:
            load_q(left_q, tile, q_place)
            load_dout(left_dout, tile, dout_place)

        own_row = warp_row + group
        stage = 0
        n0 = int32(first)
        while n0 < last:
            wait_copies()
            cuda.syncthreads()  # this tile is there, the one before is consumed
            now = int32(stage * stage_size)
            other = (stage + 1) & 1
            there = int32(last - n0 - columns)
            if there > 0:
                k_origin, v_origin, list_origin = origins[0], origins[1], origins[2]
                base, slot = keys_base + other * stage_size, other * columns
                gather_keys(
                    tile, base, base + v_offset, k, v, k_origin, v_origin, k_step, v_step,
                    k_rows, ahead, slot, there, thread, block,
                )  # fmt: skip
                slot, later = stage * columns, n0 + 2 * columns
                copy_rows(k_rows, slot, 1, k_index, list_origin, later, last, thread)
            commit_copies()

            sub = int32(0)
            while sub < columns:
                key = int32(n0 + sub)
                if key < spans[warp_span + 1] and int32(key + step) > spans[warp_span]:
                    # S = q k^T, dP - delta = dout v^T - delta
                    k_now, v_now = k_place + now + sub * qk_pitch, v_place + now + sub * v_pitch
                    by_rows_q(scores, left_q, right, tile, q_place, k_now)
                    for i in range(row_count):
                        begin = -row_delta[own_row + i // 2 * 16 + i % 2 * 8]
                        for n in range(blocks):
                            for c in range(2):
                                acc_dp[(i // 2 * blocks + n) * 4 + i % 2 * 2 + c] = begin
                    add_rows_dout(acc_dp, left_dout, right, tile, dout_place, v_now)

                    # ds = exp2(S - lse) * (dP - delta), 0 where not visible. The product comes
                    # last, so that exponentials need not wait for dP.
                    for i in range(row_count):
                        row_shift = row_lse[own_row + i // 2 * 16 + i % 2 * 8]
                        for n in range(blocks):
                            for c in range(2):
                                e = (i // 2 * blocks + n) * 4 + i % 2 * 2 + c
                                scores[e] = exp2_fast(scores[e] * log2_scale - row_shift)
                    if key < spans[warp_span + 2] or int32(key + step) > spans[warp_span + 3]:
                        # Both factors are 0: a hidden pair's dP may be NaN.
                        for i in range(row_count):
                            r = own_row + i // 2 * 16 + i % 2 * 8
                            place = int32(key + 2 * quad - starts[r])
                            length = uint32(lengths[r])
                            for n in range(blocks):
                                for c in range(2):
                                    e = (i // 2 * blocks + n) * 4 + i % 2 * 2 + c
                                    if uint32(place + n * 8 + c) >= length:
                                        scores[e] = float32(0)
                                        acc_dp[e] = float32(0)
                    for e in range(score_count):
                        scores[e] *= acc_dp[e]

                    # dq += ds k
                    column_now = k_column_place + now + sub * qk_pitch
                    by_columns(acc_dq, scores, weights, right, tile, column_now)
                sub = int32(sub + step)

            stage = other
            n0 = int32(n0 + columns)

        # NaN and Inf never go away: one look tells whether a hidden pair's row has leaked in.
        check = float32(0)
        for e in range(dq_count):
            check += acc_dq[e] * float32(0)
        if check != float32(0):
            tainted[0] = 1
        for i in range(row_count):
            factors[i] = scale
        cuda.syncthreads()  # queries are consumed, their place is free
        stage_rows(words, 0, acc_dq, factors, warp_row, lane)
        cuda.syncthreads()  # the result is there, and whether it is tainted
        dq_origin, dq_step = origin_of(dq, b, h), int32(dq.strides[2])
        scatter_rows(tile, 0, dq, dq_origin, dq_step, q_rows, thread)
        if thread == 0:
            flags[(b * q.shape[1] + h) * tiles + m0 // rows] = tainted[0]

    return scfa_bwd_dq_mma
