"""Tensor-core forward: out = softmax(scale * q @ k.T) @ v over each query's range of sorted keys.

One block owns some consecutive sorted queries of one head; each warp keeps its rows' scores,
weights and result in registers. Tiles of keys arrive by asynchronous copies, one tile ahead.

Weights are measured from a reference, an earlier maximum of the row's scores. It need not be the
maximum: weights may grow to `MOST` before anything is lost. So once all rows of a warp have one,
a tile is first tried without looking for its maximum; the sums tell if a weight has outgrown.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda, float32, int32, int64, uint16, uint32
from scfa_core.backends.numba_cuda.compiling import INFINITY, LN_2, LOG2_E, device, kernel
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
    maximum,
    quad_max,
    quad_sum,
    wait_copies,
)
from scfa_core.backends.numba_cuda.schedule import key_core, key_span
from scfa_core.backends.numba_cuda.softmax import log2

MOST = 1024.0  # of the sum of a lane's weights of a row
MASKED_RISE = 5.0  # of an exponent above the reference, where that is looked at

# By the widest row, in order of preference.
SHAPES = {
    64: (
        TileShape(atoms=2, columns=96, step=32, in_registers=False, blocks=2),
        TileShape(atoms=2, columns=64, step=32, in_registers=True, blocks=2),
    ),
    128: (TileShape(atoms=2, columns=32, step=32, in_registers=False, blocks=2),),
    256: (TileShape(atoms=1, columns=64, step=32, in_registers=False, blocks=1),),
}


def forward_shared(shape: TileShape, head_dim: int, head_dim_v: int) -> int:
    """Bytes of shared memory: queries (later the result), and two stages of keys and values."""
    q_size = shape.rows * pitch_of(max(head_dim, head_dim_v))
    return 2 * (q_size + 2 * shape.columns * (pitch_of(head_dim) + pitch_of(head_dim_v)))


@cache
def forward_shape(head_dim: int, head_dim_v: int, limit: int) -> tuple[TileShape, int]:
    """Shape for a card whose blocks may have `limit` bytes of shared memory, and its bytes."""
    width = max(head_dim, head_dim_v)
    shapes = next(shapes for widest, shapes in SHAPES.items() if width <= widest)
    sizes = tuple(forward_shared(shape, head_dim, head_dim_v) for shape in shapes)
    return resident_shape(shapes, sizes, limit)


@cache
def key_visitor(
    dtype: str, shape: TileShape, head_dim: int, head_dim_v: int, keys: int, is_masked: bool
) -> Any:
    """Build what a warp does with `keys` keys of a tile."""
    atoms, in_registers = shape.atoms, shape.in_registers
    by_rows = multiplications(dtype, atoms, head_dim, keys, in_registers).by_rows
    by_columns = multiplications(dtype, atoms, head_dim_v, keys, in_registers).by_columns
    row_count, blocks, out_blocks = 2 * atoms, keys // 8, padded(head_dim_v) // 8

    @device
    def weigh(scores, sums, reference, log2_scale):
        """Turn scores into exp2(scores * log2_scale - reference); also the sums of each row."""
        for i in range(row_count):
            shift = reference[i]
            if shift == -INFINITY:
                shift = float32(0)
            e = i // 2 * blocks * 4 + i % 2 * 2
            total = float32(0)
            for block in range(blocks):
                for c in range(2):
                    p = exp2_fast(scores[e + block * 4 + c] * log2_scale - shift)
                    scores[e + block * 4 + c] = p
                    total += p
            sums[i] = total

    @device
    def highest(scores, high, log2_scale):
        """Exponents of the highest of this lane's scores of each row."""
        for i in range(row_count):
            e = i // 2 * blocks * 4 + i % 2 * 2
            most = float32(-INFINITY)
            for block in range(blocks):
                most = maximum(most, maximum(scores[e + block * 4], scores[e + block * 4 + 1]))
            high[i] = most * log2_scale

    @device
    def move_reference(high, reference, row_sum, acc_o):
        """Set m' = max(m, S), l = l exp2(m - m'), O likewise; whether all rows have one now."""
        missing = False
        for i in range(row_count):
            moved = maximum(reference[i], quad_max(high[i]))
            factor = float32(1)
            if moved == -INFINITY:
                missing = True
            else:
                factor = exp2_fast(reference[i] - moved)
            reference[i] = moved
            row_sum[i] *= factor
            for block in range(out_blocks):
                for c in range(2):
                    acc_o[(i // 2 * out_blocks + block) * 4 + i % 2 * 2 + c] *= factor
        return not any_lane(missing)

    @device
    def visit_whole(
        scores, acc_o, left, right, weights, sums, high, reference, row_sum, tile, q_place,
        k_place, v_place, log2_scale, settled,
    ):  # fmt: skip
        """Add keys that all rows see to the rows' sums; `settled`: all rows have a reference.

        Returns whether they have one now.
        """
        attempt = settled
        while True:
            # S = q k^T, P = exp2(S - m) with m as it is, if that is good enough
            by_rows(scores, left, right, tile, q_place, k_place)
            if attempt:
                weigh(scores, sums, reference, log2_scale)
                outgrown = False
                for i in range(row_count):
                    outgrown = outgrown or not sums[i] <= float32(MOST)
                attempt = False
                if any_lane(outgrown):
                    continue
                break
            highest(scores, high, log2_scale)
            settled = move_reference(high, reference, row_sum, acc_o)
            weigh(scores, sums, reference, log2_scale)
            break
        for i in range(row_count):
            row_sum[i] += sums[i]

        # O += P v
        by_columns(acc_o, scores, weights, right, tile, v_place)
        return settled

    @device
    def visit_masked(
        scores, acc_o, left, right, weights, sums, high, reference, row_sum, starts, lengths,
        own_row, tile, q_place, k_place, v_place, first, log2_scale, settled,
    ):  # fmt: skip
        """As `visit_whole` for keys that some rows see; `first` and `own_row` are this lane's."""
        # S = q k^T, -inf where a pair is not visible
        by_rows(scores, left, right, tile, q_place, k_place)
        for i in range(row_count):
            r = own_row + i // 2 * 16 + i % 2 * 8
            place = int32(first - starts[r])
            length = uint32(lengths[r])
            e = i // 2 * blocks * 4 + i % 2 * 2
            for block in range(blocks):
                for c in range(2):
                    if uint32(place + block * 8 + c) >= length:
                        scores[e + block * 4 + c] = -INFINITY

        # P = exp2(S - m), l += rowsum(P), O += P v
        highest(scores, high, log2_scale)
        outgrown = False
        for i in range(row_count):
            outgrown = outgrown or high[i] > reference[i] + float32(MASKED_RISE)
        if any_lane(outgrown):
            settled = move_reference(high, reference, row_sum, acc_o)
        weigh(scores, sums, reference, log2_scale)
        for i in range(row_count):
            row_sum[i] += sums[i]
        by_columns(acc_o, scores, weights, right, tile, v_place)
        return settled

    return visit_masked if is_masked else visit_whole


@cache
def build_fwd_mma(
    dtype: str, head_dim: int, head_dim_v: int, shape: TileShape | None = None
) -> Any:
    """Compile-time constants in, kernel out."""
    if shape is None:
        shape = forward_shape(head_dim, head_dim_v, 1 << 20)[0]
    atoms, rows, threads = shape.atoms, shape.rows, shape.threads
    columns, step, in_registers = shape.columns, shape.step, shape.in_registers
    load_left = multiplications(dtype, atoms, head_dim, columns, in_registers).load_left
    visit_all = key_visitor(dtype, shape, head_dim, head_dim_v, columns, False)
    visit_masked = key_visitor(dtype, shape, head_dim, head_dim_v, step, True)
    gather_q = row_gatherer(head_dim, rows, threads)
    gather_k = row_gatherer(head_dim, columns, threads)
    gather_v = row_gatherer(head_dim_v, columns, threads)
    fetch_q = row_fetcher(rows, threads)
    copy_rows = value_copier(columns, threads)
    stage_rows, scatter_rows = row_scatterer(dtype, atoms, head_dim_v, threads, rows)
    qk_pitch, v_pitch = pitch_of(head_dim), pitch_of(head_dim_v)
    flip_signs = sign_flipper(rows * qk_pitch // 2, threads)
    v_offset = columns * qk_pitch
    stage_size = v_offset + columns * v_pitch
    keys_base = rows * pitch_of(max(head_dim, head_dim_v))
    left_count = atoms * (padded(head_dim) // 16 if in_registers else 1) * 4
    score_count = atoms * columns // 2
    out_count = atoms * padded(head_dim_v) // 2
    row_count = atoms * 2
    p_count = atoms * 4
    warp_rows = 16 * atoms
    slots, span_count = 2 * columns, 4 * shape.warps

    @kernel(
        *["uint16:4"] * 4,
        "float32:3",
        *["int32:3"] * 4,
        "bool",
        "float64",
        "uint32",
        "int32:1",
        variant=(dtype, head_dim, head_dim_v, shape),
        bounds=(threads, shape.blocks),
    )
    def scfa_fwd_mma(
        q, k, v, out, lse, q_index, k_index, key_start, key_end, monotone, scale, flip, flags
    ):
        tile = cuda.shared.array(0, uint16)
        words = cuda.shared.array(0, uint32)
        q_rows = cuda.shared.array(rows, int32)
        k_rows = cuda.shared.array(slots, int32)
        starts = cuda.shared.array(rows, int32)
        lengths = cuda.shared.array(rows, int32)
        spans = cuda.shared.array(span_count, int32)  # read anew for each tile, as all of these
        origins = cuda.shared.array(3, int64)
        tainted = cuda.shared.array(1, int32)
        left = cuda.local.array(left_count, uint32)
        weights = cuda.local.array(p_count, uint32)
        right = cuda.local.array(4, uint32)
        scores = cuda.local.array(score_count, float32)
        acc_o = cuda.local.array(out_count, float32)
        sums = cuda.local.array(row_count, float32)
        high = cuda.local.array(row_count, float32)
        reference = cuda.local.array(row_count, float32)
        row_sum = cuda.local.array(row_count, float32)

        thread = cuda.threadIdx.x & (threads - 1)  # lets the compiler know that it is small
        block = uint32(cuda.blockDim.x)
        lane = thread % 32
        warp_span = thread // 32 * 4
        warp_row = thread // 32 * warp_rows
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
        first, last = int32(first), int32(last)
        k_step, v_step = int32(k.strides[2]), int32(v.strides[2])
        # Scores take the sign of the scale from q (`flip`), so that its size is enough here.
        log2_scale = float32(abs(scale) * LOG2_E)

        # Which rows? Queries once; keys two tiles ahead of their use.
        fetch_q(q_rows, q_index, b, h, m0, m1, thread)
        k_origin, v_origin = origin_of(k, b, g), origin_of(v, b, g)
        list_origin = origin_of(k_index, b, g)
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
        gather_q(tile, 0, q, q_origin, q_step, q_rows, 0, m1 - m0, thread, block)
        there = int32(last - first)
        gather_k(tile, keys_base, k, k_origin, k_step, k_rows, 0, there, thread, block)
        gather_v(tile, keys_base + v_offset, v, v_origin, v_step, k_rows, 0, there, thread, block)
        commit_copies()

        # What this warp's rows see at all, what all of them see, and what this lane's rows see.
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
        for r in range(thread, rows, threads):
            starts[r] = 0
            lengths[r] = 0
            if m0 + r < m1:
                starts[r] = key_start[b, h, m0 + r]
                lengths[r] = key_end[b, h, m0 + r] - key_start[b, h, m0 + r]
        for i in range(row_count):
            reference[i] = -INFINITY
            row_sum[i] = float32(0)
        for e in range(out_count):
            acc_o[e] = float32(0)

        q_place = int32(warp_row * qk_pitch + ordinary_offset(lane, qk_pitch))
        k_place = int32(keys_base + paired_offset(lane, qk_pitch))
        v_place = int32(keys_base + v_offset + ordinary_offset(lane, v_pitch))
        wait_copies()
        cuda.syncthreads()  # q is there
        if flip != 0:
            flip_signs(words, flip, thread)
            cuda.syncthreads()  # q has the sign of the scale
        if in_registers:
            load_left(left, tile, q_place)

        own_row = warp_row + group
        settled = False
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
                gather_k(tile, base, k, k_origin, k_step, k_rows, slot, there, thread, block)
                gather_v(
                    tile, base + v_offset, v, v_origin, v_step, k_rows, slot, there, thread, block
                )
                slot, ahead = stage * columns, n0 + 2 * columns
                copy_rows(k_rows, slot, 1, k_index, list_origin, ahead, last, thread)
            commit_copies()

            if n0 >= spans[warp_span + 2] and n0 + columns <= spans[warp_span + 3]:
                settled = visit_all(
                    scores, acc_o, left, right, weights, sums, high, reference, row_sum,
                    tile, q_place, k_place + now, v_place + now, log2_scale, settled,
                )  # fmt: skip
            else:
                # Some steps of the tile, masked: from the first that is seen to the last.
                sub = int32(max(spans[warp_span] - n0, 0) // step * step)
                end = int32(min(spans[warp_span + 1] - n0, columns))
                while sub < end:
                    settled = visit_masked(
                        scores, acc_o, left, right, weights, sums, high, reference, row_sum, starts,
                        lengths, own_row, tile, q_place, k_place + now + sub * qk_pitch,
                        v_place + now + sub * v_pitch, n0 + sub + 2 * quad, log2_scale, settled,
                    )  # fmt: skip
                    sub = int32(sub + step)

            stage = other
            n0 = int32(n0 + columns)

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
                    value = (reference[i] + log2(total)) * float32(LN_2)
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
