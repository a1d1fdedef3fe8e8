"""Forward: one task per tile of 64 sorted queries, online softmax over the keys they see.

A lane is a query, a row of the score tile is a key: maxima, sums and masks stay in their lane.
Scores and lse are in natural units, so that lse is stored as it is and backward reads it so: a
change of base would round a large score once more, each way.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# numba infers the types of compiled functions from their arguments.

import numpy as np
from scfa_core.backends.numba_cpu.compiling import device_function, kernel
from scfa_core.backends.numba_cpu.convert import exp
from scfa_core.backends.numba_cpu.tiles import (
    BLOCK,
    FULL,
    NOTHING,
    add_unsafe_rows,
    aligned,
    head_at,
    load_lanes,
    load_ranges,
    load_rows,
    multiply,
    multiply_transposed,
    pad,
    set_aside_unsafe_rows,
    store_lanes,
    visibility,
)
from scfa_core.backends.numba_cpu.vector import atomic_next

__all__ = ["forward_tiles", "hide", "scale_scores", "softmax_update"]


@device_function
def scale_scores(scores, count, scale):
    """Multiply the first `count` rows by softmax_scale, the last rounding of a score.

    Not folded into q or k: that would round every product, in forward and dq those of q, in dk and
    dv those of k, and sharp scores would differ by more than a weight can bear. `hide` comes later:
    -inf is no number to scale.
    """
    for r in range(count):
        row = scores[r * BLOCK : (r + 1) * BLOCK]
        for lane in range(BLOCK):
            row[lane] *= scale


@device_function
def hide(scores, count, first, starts, ends, seen):
    """Set scores of hidden pairs to -inf and note which are seen; row r is sorted key first + r."""
    minus_infinity = scores.dtype.type(-np.inf)
    for r in range(count):
        key = np.int32(first + r)
        row = scores[r * BLOCK : (r + 1) * BLOCK]
        flags = seen[r * BLOCK : (r + 1) * BLOCK]
        for lane in range(BLOCK):
            visible = (starts[lane] <= key) & (key < ends[lane])
            flags[lane] = visible
            row[lane] = row[lane] if visible else minus_infinity


@device_function
def softmax_update(scores, count, row_max, row_sum, keep, base, tile_sum):
    """Turn scores into weights, move row_max and row_sum on; `keep` rescales old sums.

    `base` is the subtracted maximum, 0 in lanes that have seen nothing, so that (-inf) - (-inf)
    never happens. Weights of a tile are added up by themselves: one by one, small ones would vanish
    beside the sum of a long row.
    """
    zero = scores.dtype.type(0)
    for lane in range(BLOCK):
        base[lane] = row_max[lane]
    for r in range(count):
        row = scores[r * BLOCK : (r + 1) * BLOCK]
        for lane in range(BLOCK):
            base[lane] = row[lane] if row[lane] > base[lane] else base[lane]
    for lane in range(BLOCK):
        old = row_max[lane]
        row_max[lane] = base[lane]
        base[lane] = base[lane] if base[lane] > -np.inf else zero
        keep[lane] = exp(old - base[lane])
        row_sum[lane] *= keep[lane]
        tile_sum[lane] = zero
    for r in range(count):
        row = scores[r * BLOCK : (r + 1) * BLOCK]
        for lane in range(BLOCK):
            weight = exp(row[lane] - base[lane])
            row[lane] = weight
            tile_sum[lane] += weight
    for lane in range(BLOCK):
        row_sum[lane] += tile_sum[lane]


@kernel
def forward_tiles(
    counter,
    sizes,
    q, q_layout, k, k_layout, v, v_layout, out, out_layout, lse, lse_layout,
    q_index, k_index, key_start, key_end,
    scale,
    sample,
):  # fmt: skip
    """Write out and lse for the tiles drawn from `counter`.

    Tensors are flat arrays with (offset, batch, head, row) strides in elements. `scale` is
    softmax_scale, one element in the arithmetic type; `sample` is an empty array of it.
    """
    batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v = sizes
    blocks = (seqlen_q + BLOCK - 1) // BLOCK
    width, width_v = pad(head_dim), pad(head_dim_v)
    q_lanes = aligned(width * BLOCK, sample)
    k_rows = aligned(width * BLOCK, sample)
    v_rows = aligned(width_v * BLOCK, sample)
    spare = aligned(width_v * BLOCK, sample)
    scores = aligned(BLOCK * BLOCK, sample)
    acc_o = aligned(width_v * BLOCK, sample)
    row_max, row_sum = aligned(BLOCK, sample), aligned(BLOCK, sample)
    keep, base = aligned(BLOCK, sample), aligned(BLOCK, sample)
    tile_sum = aligned(BLOCK, sample)
    ones = aligned(BLOCK, sample)
    starts, ends = np.zeros(BLOCK, np.int32), np.zeros(BLOCK, np.int32)
    unsafe = np.zeros(BLOCK, np.int32)
    seen = np.zeros(BLOCK * BLOCK, np.uint8)
    one = sample.dtype.type(1)
    ones[:] = 1
    while True:
        task = atomic_next(counter)
        if task >= batch * heads * blocks:
            break
        head = task // blocks  # of all batches; within it the last tiles, the heaviest, come first
        m0 = (blocks - 1 - task % blocks) * BLOCK
        b, h = head // heads, head % heads
        g = h // (heads // heads_kv)
        rows = min(BLOCK, seqlen_q - m0)
        q_at = head * seqlen_q + m0
        k_at = (b * heads_kv + g) * seqlen_k
        q_base = head_at(q_layout, b, h)
        k_base = head_at(k_layout, b, g)
        v_base = head_at(v_layout, b, g)
        out_base = head_at(out_layout, b, h)
        lse_base = head_at(lse_layout, b, h)

        low, high = load_ranges(key_start, key_end, q_at, rows, starts, ends)
        row_max[:] = -np.inf
        row_sum[:] = 0
        acc_o[:] = 0
        if low < high:
            load_lanes(q, q_base, q_layout[3], q_index, q_at, rows, head_dim, one, q_lanes)
        for n0 in range(low, high, BLOCK):
            count = min(BLOCK, high - n0)
            part = visibility(starts, ends, rows, n0, n0 + count)
            if part == NOTHING:
                continue

            # s = scale * q @ k.T
            load_rows(
                k, k_base, k_layout[3], k_index, k_at + n0, count, head_dim, width, one, k_rows
            )
            multiply(k_rows, width, count, head_dim, q_lanes, rows, scores, keep)
            scale_scores(scores, count, scale[0])
            if part != FULL:
                hide(scores, count, n0, starts, ends, seen)

            # p = exp(s - row_max)
            softmax_update(scores, count, row_max, row_sum, keep, base, tile_sum)

            # out = keep * out + p @ v
            load_rows(
                v, v_base, v_layout[3], k_index, k_at + n0, count, head_dim_v, width_v, one, v_rows
            )
            found = 0
            if part != FULL:
                found = set_aside_unsafe_rows(v_rows, width_v, count, unsafe, spare)
            multiply_transposed(v_rows, width_v, count, scores, rows, acc_o, keep, ones)
            if found > 0:
                add_unsafe_rows(found, unsafe, spare, width_v, scores, seen, acc_o)

        for lane in range(rows):
            total = row_sum[lane]
            row = lse_base + lse_layout[3] * np.int64(q_index[q_at + lane])
            if total == 0:  # an empty row
                lse[row] = -np.inf
                base[lane] = 0
            else:
                lse[row] = row_max[lane] + np.log(total)
                base[lane] = 1 / total
        store_lanes(out, out_base, out_layout[3], q_index, q_at, rows, head_dim_v, base, acc_o)
