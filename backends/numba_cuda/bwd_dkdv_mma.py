"""Tensor-core dk and dv: dv = p.T @ dout, dk = scale * ds.T @ q, some sorted keys a block.

Works on transposed scores, keys by queries, so that p and ds are left operands as they come out of
the first products: nothing goes through shared memory, no atomics, the same sums in every run.
Needs the base-2 lse and delta that `bwd_dq_mma` left, in sorted order. What belongs to a query, its
lse, delta and range, lies in the padding behind its row of q.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda, float32, int32, int64, uint16, uint32
from scfa_core.backends.numba_cuda.compiling import LOG2_E, kernel
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
    value_copier,
)
from scfa_core.backends.numba_cuda.intrinsics import (
    any_lane,
    commit_copies,
    exp2_fast,
    load_2,
    wait_copies,
)
from scfa_core.backends.numba_cuda.schedule import next_query_tile, query_span

# By the widest row, in order of preference. A step is of 32 queries: each lane looks at one.
SHAPES = {
    64: (
        TileShape(atoms=2, columns=128, step=32, in_registers=False, blocks=2),
        TileShape(atoms=2, columns=64, step=32, in_registers=False, blocks=2),
    ),
    128: (TileShape(atoms=1, columns=64, step=32, in_registers=False, blocks=1),),
}


def dkdv_shared(shape: TileShape, head_dim: int, head_dim_v: int) -> int:
    """Bytes of shared memory: k and v (later dk and dv), and two stages of q and dout."""
    return 2 * (shape.rows + 2 * shape.columns) * (pitch_of(head_dim) + pitch_of(head_dim_v))


@cache
def dkdv_shape(head_dim: int, head_dim_v: int, limit: int) -> tuple[TileShape, int]:
    """Shape for a card whose blocks may have `limit` bytes of shared memory, and its bytes."""
    width = max(head_dim, head_dim_v)
    shapes = next(shapes for widest, shapes in SHAPES.items() if width <= widest)
    sizes = tuple(dkdv_shared(shape, head_dim, head_dim_v) for shape in shapes)
    return resident_shape(shapes, sizes, limit)


@cache
def build_bwd_dkdv_mma(
    dtype: str, head_dim: int, head_dim_v: int, shape: TileShape | None = None
) -> Any:
    """Compile-time constants in, kernel out."""
    if shape is None:
        shape = dkdv_shape(head_dim, head_dim_v, 1 << 20)[0]
    atoms, rows, threads = shape.atoms, shape.rows, shape.threads
    columns, step, in_registers = shape.columns, shape.step, shape.in_registers
    qk = multiplications(dtype, atoms, head_dim, step, in_registers)
    vo = multiplications(dtype, atoms, head_dim_v, step, in_registers)
    load_k, by_rows_k, by_columns_q = qk.load_left, qk.by_rows, qk.by_columns
    load_v, by_rows_v, by_columns_dout = vo.load_left, vo.by_rows, vo.by_columns
    gather_k, gather_v = (row_gatherer(x, rows, threads) for x in (head_dim, head_dim_v))
    gather_q, gather_dout = (row_gatherer(x, columns, threads) for x in (head_dim, head_dim_v))
    fetch_k = row_fetcher(rows, threads)
    copy_values = value_copier(columns, threads)
    stage_dk, scatter_dk = row_scatterer(dtype, atoms, head_dim, threads, rows)
    stage_dv, scatter_dv = row_scatterer(dtype, atoms, head_dim_v, threads, rows)
    qk_pitch, v_pitch = pitch_of(head_dim), pitch_of(head_dim_v)
    flip_signs = sign_flipper(rows * qk_pitch // 2, threads)
    v_base = rows * qk_pitch
    queries_base = v_base + rows * v_pitch
    dout_offset = columns * qk_pitch
    stage_size = dout_offset + columns * v_pitch
    word_pitch = qk_pitch // 2
    facts_base = (queries_base + padded(head_dim)) // 2  # of lse, delta, start, end, in words
    k_count = atoms * (padded(head_dim) // 4 if in_registers else 4)
    v_count = atoms * (padded(head_dim_v) // 4 if in_registers else 4)
    p_count = atoms * 4
    blocks = step // 8
    score_count = atoms * blocks * 4
    dk_count, dv_count = atoms * padded(head_dim) // 2, atoms * padded(head_dim_v) // 2
    slots, warp_rows = 2 * columns, 16 * atoms
    factor_count = 2 * atoms

    @kernel(
        *["uint16:4"] * 6,
        *["float32:3"] * 2,
        *["int32:3"] * 4,
        "bool",
        "float64",
        "uint32",
        "int32:1",
        variant=(dtype, head_dim, head_dim_v, shape),
        bounds=(threads, shape.blocks),
    )
    def scfa_bwd_dkdv_mma(
        dout, q, k, v, dk, dv, lse_log2, delta, q_index, k_index, key_start, key_end, monotone,
        scale, flip, flags,
    ):  # fmt: skip
        tile = cuda.shared.array(0, uint16)
        words = cuda.shared.array(0, uint32)
        floats = cuda.shared.array(0, float32)
        numbers = cuda.shared.array(0, int32)
        k_rows = cuda.shared.array(rows, int32)
        q_rows = cuda.shared.array(slots, int32)
        origins = cuda.shared.array(3, int64)  # read anew for each tile, as the block's place
        places = cuda.shared.array(5, int32)
        tainted = cuda.shared.array(1, int32)
        left_k = cuda.local.array(k_count, uint32)
        left_v = cuda.local.array(v_count, uint32)
        weights = cuda.local.array(p_count, uint32)
        right = cuda.local.array(4, uint32)
        scores = cuda.local.array(score_count, float32)
        acc_dp = cuda.local.array(score_count, float32)
        acc_dk = cuda.local.array(dk_count, float32)
        acc_dv = cuda.local.array(dv_count, float32)
        facts = cuda.local.array(2, float32)
        span = cuda.local.array(2, int32)
        factors = cuda.local.array(factor_count, float32)

        thread = cuda.threadIdx.x & (threads - 1)  # lets the compiler know that it is small
        block = uint32(cuda.blockDim.x)
        lane = thread % 32
        warp_row = thread // 32 * warp_rows
        group = lane // 4
        quad = lane % 4
        heads, seqlen_q = q.shape[1], q.shape[2]
        heads_kv, seqlen_k = k.shape[1], k.shape[2]
        share = int32(heads // heads_kv)
        tiles = (seqlen_k + rows - 1) // rows
        head = cuda.blockIdx.x // tiles
        n0 = int32(cuda.blockIdx.x % tiles * rows)  # the first keys are seen by most
        n1 = int32(min(n0 + rows, seqlen_k))
        b = head // heads_kv
        g = head % heads_kv
        # Scores take the sign of the scale from k (`flip`), so that its size is enough here.
        log2_scale = float32(abs(scale) * LOG2_E)

        fetch_k(k_rows, k_index, b, g, n0, n1, thread)
        if thread == 0:
            tainted[0] = 0
            places[0] = b
            places[1] = g
            places[2] = n0
            places[3] = n1
        cuda.syncthreads()  # rows are known
        k_origin, k_step = origin_of(k, b, g), int32(k.strides[2])
        v_origin, v_step = origin_of(v, b, g), int32(v.strides[2])
        q_step, dout_step = int32(q.strides[2]), int32(dout.strides[2])
        there = int32(n1 - n0)
        gather_k(tile, 0, k, k_origin, k_step, k_rows, 0, there, thread, block)
        gather_v(tile, v_base, v, v_origin, v_step, k_rows, 0, there, thread, block)
        commit_copies()
        for e in range(dk_count):
            acc_dk[e] = float32(0)
        for e in range(dv_count):
            acc_dv[e] = float32(0)
        k_place = int32(warp_row * qk_pitch + ordinary_offset(lane, qk_pitch))
        v_place = int32(v_base + warp_row * v_pitch + ordinary_offset(lane, v_pitch))
        q_place = int32(queries_base + paired_offset(lane, qk_pitch))
        q_column_place = int32(queries_base + ordinary_offset(lane, qk_pitch))
        dout_place = int32(queries_base + dout_offset + paired_offset(lane, v_pitch))
        dout_column_place = int32(queries_base + dout_offset + ordinary_offset(lane, v_pitch))
        wait_copies()
        cuda.syncthreads()  # k and v are there
        if flip != 0:
            flip_signs(words, flip, thread)
            cuda.syncthreads()  # k has the sign of the scale
        if in_registers:
            load_k(left_k, tile, k_place)
            load_v(left_v, tile, v_place)

        for member in range(share):
            b, n0, n1 = places[0], places[2], places[3]
            h = int32(places[1] * share + member)
            first, last = query_span(key_start, key_end, b, h, n0, n1, seqlen_q, monotone)
            first, last = int32(first), int32(last)
            m_now = next_query_tile(
                key_start, key_end, b, h, first, columns, last, n0, n1, monotone
            )
            m_next = next_query_tile(
                key_start, key_end, b, h, m_now + columns, columns, last, n0, n1, monotone
            )
            list_origin = origin_of(key_start, b, h)
            q_origin, dout_origin = origin_of(q, b, h), origin_of(dout, b, h)
            cuda.syncthreads()  # the head before is consumed
            copy_values(q_rows, 0, 1, q_index, list_origin, m_now, last, thread)
            copy_values(q_rows, columns, 1, q_index, list_origin, m_next, last, thread)
            if thread == 0:
                origins[0] = q_origin
                origins[1] = dout_origin
                origins[2] = list_origin
                places[4] = last
            wait_copies()
            cuda.syncthreads()  # rows are known
            there = int32(last - m_now)
            base = queries_base
            gather_q(tile, base, q, q_origin, q_step, q_rows, 0, there, thread, block)
            base += dout_offset
            gather_dout(tile, base, dout, dout_origin, dout_step, q_rows, 0, there, thread, block)
            place = facts_base
            copy_values(floats, place, word_pitch, lse_log2, list_origin, m_now, last, thread)
            copy_values(floats, place + 1, word_pitch, delta, list_origin, m_now, last, thread)
            copy_values(numbers, place + 2, word_pitch, key_start, list_origin, m_now, last, thread)
            copy_values(numbers, place + 3, word_pitch, key_end, list_origin, m_now, last, thread)
            commit_copies()

            stage = 0
            while m_now < last:
                wait_copies()
                cuda.syncthreads()  # this tile is there, the one before is consumed
                now = int32(stage * stage_size)
                other = (stage + 1) & 1
                n0, n1, last = places[2], places[3], places[4]
                w0 = int32(n0 + warp_row)
                if not monotone:
                    b = places[0]
                    h = int32(places[1] * share + member)
                m_later = next_query_tile(
                    key_start, key_end, b, h, m_next + columns, columns, last, n0, n1, monotone
                )
                there = int32(last - m_next)
                if there > 0:
                    q_origin, dout_origin, list_origin = origins[0], origins[1], origins[2]
                    slot, base = other * columns, queries_base + other * stage_size
                    gather_q(tile, base, q, q_origin, q_step, q_rows, slot, there, thread, block)
                    base += dout_offset
                    gather_dout(
                        tile, base, dout, dout_origin, dout_step, q_rows, slot, there, thread, block
                    )
                    place = facts_base + other * (stage_size // 2)
                    copy_values(
                        floats, place, word_pitch, lse_log2, list_origin, m_next, last, thread
                    )
                    copy_values(
                        floats, place + 1, word_pitch, delta, list_origin, m_next, last, thread
                    )
                    copy_values(
                        numbers, place + 2, word_pitch, key_start, list_origin, m_next, last, thread
                    )
                    copy_values(
                        numbers, place + 3, word_pitch, key_end, list_origin, m_next, last, thread
                    )
                    slot = stage * columns
                    copy_values(q_rows, slot, 1, q_index, list_origin, m_later, last, thread)
                commit_copies()

                facts_now = int32(facts_base + stage * (stage_size // 2))
                sub = int32(0)
                end = int32(min(columns, last - m_now))
                while sub < end:
                    # Does any of these queries see a key of this warp, does each see all of them?
                    # Rows beyond the last were zeroed: they see nothing.
                    load_2(span, numbers, facts_now + (sub + lane) * word_pitch + 2)
                    sees = span[0] < span[1] and span[0] < w0 + warp_rows and span[1] > w0
                    misses = span[0] > w0 or span[1] < w0 + warp_rows
                    if any_lane(sees):
                        is_partial = any_lane(misses)
                        # S^T = k q^T, dP^T = v dout^T
                        q_now = q_place + now + sub * qk_pitch
                        dout_now = dout_place + now + sub * v_pitch
                        by_rows_k(scores, left_k, right, tile, k_place, q_now)
                        by_rows_v(acc_dp, left_v, right, tile, v_place, dout_now)

                        # p = exp2(S - lse), ds = p * (dP - delta), 0 where not visible
                        column = facts_now + (sub + 2 * quad) * word_pitch
                        for n in range(blocks):
                            for c in range(2):
                                load_2(facts, floats, column + (n * 8 + c) * word_pitch)
                                for i in range(2 * atoms):
                                    e = (i // 2 * blocks + n) * 4 + i % 2 * 2 + c
                                    p = exp2_fast(scores[e] * log2_scale - facts[0])
                                    scores[e] = p
                                    acc_dp[e] = p * (acc_dp[e] - facts[1])
                        if is_partial:
                            for n in range(blocks):
                                for c in range(2):
                                    load_2(span, numbers, column + (n * 8 + c) * word_pitch + 2)
                                    length = uint32(span[1] - span[0])
                                    offset = int32(w0 + group - span[0])
                                    for i in range(2 * atoms):
                                        e = (i // 2 * blocks + n) * 4 + i % 2 * 2 + c
                                        if uint32(offset + i // 2 * 16 + i % 2 * 8) >= length:
                                            scores[e] = float32(0)
                                            acc_dp[e] = float32(0)

                        # dv += p^T dout, dk += ds^T q
                        dout_now = dout_column_place + now + sub * v_pitch
                        by_columns_dout(acc_dv, scores, weights, right, tile, dout_now)
                        q_now = q_column_place + now + sub * qk_pitch
                        by_columns_q(acc_dk, acc_dp, weights, right, tile, q_now)
                    sub = int32(sub + step)

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
        for i in range(factor_count):
            factors[i] = scale
        stage_dk(words, 0, acc_dk, factors, warp_row, lane)
        for i in range(factor_count):
            factors[i] = float32(1)
        stage_dv(words, v_base, acc_dv, factors, warp_row, lane)
        cuda.syncthreads()  # the results are there, and whether they are tainted
        b, g, n0 = places[0], places[1], places[2]
        dk_origin, dk_step = origin_of(dk, b, g), int32(dk.strides[2])
        dv_origin, dv_step = origin_of(dv, b, g), int32(dv.strides[2])
        scatter_dk(tile, 0, dk, dk_origin, dk_step, k_rows, thread)
        scatter_dv(tile, v_base, dv, dv_origin, dv_step, k_rows, thread)
        if thread == 0:
            flags[cuda.blockIdx.x] = tainted[0]

    return scfa_bwd_dkdv_mma
