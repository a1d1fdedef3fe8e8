"""Backward in two deterministic passes: dq by query tile, then dk and dv by key tile.

s = scale * q @ k.T;  p = exp(s - lse);  dp = dout @ v.T
ds = p * (dp - delta), delta = rowsum(dout * out)
dq = scale * ds @ k;  dk = scale * ds.T @ q;  dv = p.T @ dout

Both passes find the bits of s that forward found: an element of a product is summed over head_dim
in the same order whichever side is in lanes, then scaled. A row of one key has lse == s, p == 1.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# numba infers the types of compiled functions from their arguments.

import numba
import numpy as np
from scfa_core.backends.numba_cpu.compiling import device_function, kernel
from scfa_core.backends.numba_cpu.convert import exp, widen
from scfa_core.backends.numba_cpu.forward import hide, scale_scores, softmax_update
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

__all__ = ["dkdv_tiles", "dq_tiles"]

LSE_ROUNDING = 2.0**-23  # of the given lse: sums in another order may round to its neighbour


@numba.njit(nogil=True, fastmath={"contract", "reassoc"})
def row_product(x, y):
    """Sum of x * y, in the order that is fastest (the same one every time)."""
    total = widen(x[0]) * widen(y[0])
    for d in range(1, x.size):
        total += widen(x[d]) * widen(y[d])
    return total


@numba.njit(nogil=True)
def refined_lse(own, given):
    """`own`, this softmax's lse in float64, if `given` is its float32 rounding.

    Otherwise `given`: that of another softmax, as where several patterns were merged.
    """
    rounded = np.float32(own)
    near = abs(rounded - given) <= LSE_ROUNDING * abs(given)
    if rounded == given or (np.isfinite(given) and near):
        return own
    return given


@device_function
def score_gradients(scores, dp, count, first, starts, ends, seen, lse, delta, part):
    """Turn dp into ds; lanes are queries, row r is sorted key first + r. Hidden pairs get 0."""
    zero = scores.dtype.type(0)
    for r in range(count):
        row, grad = scores[r * BLOCK : (r + 1) * BLOCK], dp[r * BLOCK : (r + 1) * BLOCK]
        for lane in range(BLOCK):
            grad[lane] = exp(row[lane] - lse[lane]) * (grad[lane] - delta[lane])
        if part != FULL:
            key = np.int32(first + r)
            flags = seen[r * BLOCK : (r + 1) * BLOCK]
            for lane in range(BLOCK):
                visible = (starts[lane] <= key) & (key < ends[lane])
                flags[lane] = visible
                grad[lane] = grad[lane] if visible else zero


@kernel
def dq_tiles(
    counter,
    sizes,
    dout, dout_layout, q, q_layout, k, k_layout, v, v_layout, out, out_layout,
    lse, lse_layout, dq, dq_layout,
    q_index, k_index, key_start, key_end,
    row_lse, row_delta, tile_low, tile_high,
    scale,
    monotone, exact_lse,
    sample,
):  # fmt: skip
    """Write dq, and what the second pass needs: lse and delta of every sorted query, and the
    smallest key_start and largest key_end of every query tile.

    With `exact_lse` (float64) lse is computed anew, because the float32 one has too few digits;
    another softmax's is taken as it is.
    """
    batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v = sizes
    blocks = (seqlen_q + BLOCK - 1) // BLOCK
    width, width_v = pad(head_dim), pad(head_dim_v)
    q_lanes = aligned(width * BLOCK, sample)
    dout_lanes = aligned(width_v * BLOCK, sample)
    k_rows = aligned(width * BLOCK, sample)
    v_rows = aligned(width_v * BLOCK, sample)
    spare = aligned(width * BLOCK, sample)
    scores, dp = aligned(BLOCK * BLOCK, sample), aligned(BLOCK * BLOCK, sample)
    acc_dq = aligned(width * BLOCK, sample)
    row_max, row_sum = aligned(BLOCK, sample), aligned(BLOCK, sample)
    keep, base = aligned(BLOCK, sample), aligned(BLOCK, sample)
    tile_sum = aligned(BLOCK, sample)
    tile_lse, delta = aligned(BLOCK, sample), aligned(BLOCK, sample)
    ones, factor = aligned(BLOCK, sample), aligned(BLOCK, sample)
    starts, ends = np.zeros(BLOCK, np.int32), np.zeros(BLOCK, np.int32)
    unsafe = np.zeros(BLOCK, np.int32)
    seen = np.zeros(BLOCK * BLOCK, np.uint8)
    ones[:] = 1
    factor[:] = scale[0]
    one = sample.dtype.type(1)
    while True:
        task = atomic_next(counter)
        if task >= batch * heads * blocks:
            break
        head = task // blocks
        m_block = blocks - 1 - task % blocks
        m0 = m_block * BLOCK
        b, h = head // heads, head % heads
        g = h // (heads // heads_kv)
        rows = min(BLOCK, seqlen_q - m0)
        q_at = head * seqlen_q + m0
        k_at = (b * heads_kv + g) * seqlen_k
        dout_base = head_at(dout_layout, b, h)
        q_base = head_at(q_layout, b, h)
        k_base = head_at(k_layout, b, g)
        v_base = head_at(v_layout, b, g)
        out_base = head_at(out_layout, b, h)
        lse_base = head_at(lse_layout, b, h)
        dq_base = head_at(dq_layout, b, h)

        low, high = load_ranges(key_start, key_end, q_at, rows, starts, ends)
        if monotone:  # as they stand, empty rows included: nondecreasing from tile to tile
            tile_low[head * blocks + m_block] = key_start[q_at]
            tile_high[head * blocks + m_block] = key_end[q_at + rows - 1]
        else:
            tile_low[head * blocks + m_block] = np.int32(min(low, seqlen_k))
            tile_high[head * blocks + m_block] = np.int32(high)
        acc_dq[:] = 0
        if low < high:
            load_lanes(q, q_base, q_layout[3], q_index, q_at, rows, head_dim, one, q_lanes)
            load_lanes(
                dout, dout_base, dout_layout[3], q_index, q_at, rows, head_dim_v, one, dout_lanes
            )
        if exact_lse:
            row_max[:] = -np.inf
            row_sum[:] = 0
            for n0 in range(low, high, BLOCK):
                count = min(BLOCK, high - n0)
                part = visibility(starts, ends, rows, n0, n0 + count)
                if part != NOTHING:
                    load_rows(
                        k, k_base, k_layout[3], k_index, k_at + n0, count, head_dim, width, one,
                        k_rows,
                    )  # fmt: skip
                    multiply(k_rows, width, count, head_dim, q_lanes, rows, scores, keep)
                    scale_scores(scores, count, scale[0])
                    if part != FULL:
                        hide(scores, count, n0, starts, ends, seen)
                    softmax_update(scores, count, row_max, row_sum, keep, base, tile_sum)
        for lane in range(rows):
            row = np.int64(q_index[q_at + lane])
            if exact_lse:
                own = row_max[lane] + np.log(row_sum[lane])
                tile_lse[lane] = refined_lse(own, lse[lse_base + lse_layout[3] * row])
            else:
                tile_lse[lane] = lse[lse_base + lse_layout[3] * row]
            if tile_lse[lane] == -np.inf:  # no weight at all: exp(s - inf) is 0
                tile_lse[lane] = np.inf
            dout_at = dout_base + dout_layout[3] * row
            out_at = out_base + out_layout[3] * row
            delta[lane] = row_product(
                dout[dout_at : dout_at + head_dim_v], out[out_at : out_at + head_dim_v]
            )
            row_lse[q_at + lane] = tile_lse[lane]
            row_delta[q_at + lane] = delta[lane]

        for n0 in range(low, high, BLOCK):
            count = min(BLOCK, high - n0)
            part = visibility(starts, ends, rows, n0, n0 + count)
            if part == NOTHING:
                continue

            # s = scale * q @ k.T; dp = dout @ v.T
            load_rows(
                k, k_base, k_layout[3], k_index, k_at + n0, count, head_dim, width, one, k_rows
            )
            load_rows(
                v, v_base, v_layout[3], k_index, k_at + n0, count, head_dim_v, width_v, one, v_rows
            )
            multiply(k_rows, width, count, head_dim, q_lanes, rows, scores, ones)
            scale_scores(scores, count, scale[0])
            multiply(v_rows, width_v, count, head_dim_v, dout_lanes, rows, dp, ones)

            # ds = p * (dp - delta)
            score_gradients(scores, dp, count, n0, starts, ends, seen, tile_lse, delta, part)

            # dq = dq + ds @ k
            found = 0
            if part != FULL:
                found = set_aside_unsafe_rows(k_rows, width, count, unsafe, spare)
            multiply_transposed(k_rows, width, count, dp, rows, acc_dq, ones, ones)
            if found > 0:
                add_unsafe_rows(found, unsafe, spare, width, dp, seen, acc_dq)

        store_lanes(dq, dq_base, dq_layout[3], q_index, q_at, rows, head_dim, factor, acc_dq)


@device_function
def key_weights(scores, dp, count, starts, ends, first, seen, lse, delta, at, part):
    """Scores become p and dp becomes ds; lanes are sorted keys from `first`, row r is a query."""
    zero = scores.dtype.type(0)
    for r in range(count):
        row, grad = scores[r * BLOCK : (r + 1) * BLOCK], dp[r * BLOCK : (r + 1) * BLOCK]
        row_lse, row_delta = lse[at + r], delta[at + r]
        for lane in range(BLOCK):
            weight = exp(row[lane] - row_lse)
            row[lane] = weight
            grad[lane] = weight * (grad[lane] - row_delta)
        if part != FULL:
            start, end = starts[r] - np.int32(first), ends[r] - np.int32(first)
            flags = seen[r * BLOCK : (r + 1) * BLOCK]
            for lane in range(BLOCK):
                visible = (start <= np.int32(lane)) & (np.int32(lane) < end)
                flags[lane] = visible
                row[lane] = row[lane] if visible else zero
                grad[lane] = grad[lane] if visible else zero


@kernel
def dkdv_tiles(
    counter,
    sizes,
    dout, dout_layout, q, q_layout, k, k_layout, v, v_layout, dk, dk_layout, dv, dv_layout,
    q_index, k_index, key_start, key_end,
    row_lse, row_delta, tile_low, tile_high,
    scale,
    monotone,
    sample,
):  # fmt: skip
    """Write dk and dv, summed over the heads of a group and their query tiles, both in order."""
    batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v = sizes
    blocks_q = (seqlen_q + BLOCK - 1) // BLOCK
    blocks = (seqlen_k + BLOCK - 1) // BLOCK
    group_size = heads // heads_kv
    width, width_v = pad(head_dim), pad(head_dim_v)
    k_lanes = aligned(width * BLOCK, sample)
    v_lanes = aligned(width_v * BLOCK, sample)
    q_rows = aligned(width * BLOCK, sample)
    dout_rows = aligned(width_v * BLOCK, sample)
    spare = aligned(max(width, width_v) * BLOCK, sample)
    scores, dp = aligned(BLOCK * BLOCK, sample), aligned(BLOCK * BLOCK, sample)
    acc_dk, acc_dv = aligned(width * BLOCK, sample), aligned(width_v * BLOCK, sample)
    ones, factor = aligned(BLOCK, sample), aligned(BLOCK, sample)
    starts, ends = np.zeros(BLOCK, np.int32), np.zeros(BLOCK, np.int32)
    unsafe = np.zeros(BLOCK, np.int32)
    seen = np.zeros(BLOCK * BLOCK, np.uint8)
    ones[:] = 1
    factor[:] = scale[0]
    one = sample.dtype.type(1)
    while True:
        task = atomic_next(counter)
        if task >= batch * heads_kv * blocks:
            break
        b, g = task // blocks // heads_kv, task // blocks % heads_kv
        n0 = task % blocks * BLOCK  # the first tiles, seen by the most queries, come first
        keys = min(BLOCK, seqlen_k - n0)
        k_at = (b * heads_kv + g) * seqlen_k + n0
        k_base = head_at(k_layout, b, g)
        v_base = head_at(v_layout, b, g)
        dk_base = head_at(dk_layout, b, g)
        dv_base = head_at(dv_layout, b, g)
        load_lanes(k, k_base, k_layout[3], k_index, k_at, keys, head_dim, one, k_lanes)
        load_lanes(v, v_base, v_layout[3], k_index, k_at, keys, head_dim_v, one, v_lanes)
        acc_dk[:] = 0
        acc_dv[:] = 0
        for h in range(g * group_size, (g + 1) * group_size):
            head = b * heads + h
            q_base = head_at(q_layout, b, h)
            dout_base = head_at(dout_layout, b, h)
            first_block = 0
            if monotone:
                first_block = first_query_tile(tile_high, head * blocks_q, blocks_q, n0)
            for m_block in range(first_block, blocks_q):
                low, high = (
                    tile_low[head * blocks_q + m_block],
                    tile_high[head * blocks_q + m_block],
                )
                if low >= n0 + keys:
                    if monotone:
                        break
                    continue
                if high <= n0:
                    continue
                m0 = m_block * BLOCK
                q_at = head * seqlen_q + m0
                rows = min(BLOCK, seqlen_q - m0)
                load_ranges(key_start, key_end, q_at, rows, starts, ends)
                part = visibility(starts, ends, rows, n0, n0 + keys)
                if part == NOTHING:
                    continue

                # s = scale * q @ k.T; dp = dout @ v.T
                load_rows(q, q_base, q_layout[3], q_index, q_at, rows, head_dim, width, one, q_rows)
                load_rows(
                    dout, dout_base, dout_layout[3], q_index, q_at, rows, head_dim_v, width_v,
                    one, dout_rows,
                )  # fmt: skip
                multiply(q_rows, width, rows, head_dim, k_lanes, keys, scores, ones)
                scale_scores(scores, rows, scale[0])
                multiply(dout_rows, width_v, rows, head_dim_v, v_lanes, keys, dp, ones)

                # p = exp(s - lse); ds = p * (dp - delta)
                key_weights(
                    scores, dp, rows, starts, ends, n0, seen, row_lse, row_delta, q_at, part
                )

                # dv = dv + p.T @ dout
                found = 0
                if part != FULL:
                    found = set_aside_unsafe_rows(dout_rows, width_v, rows, unsafe, spare)
                multiply_transposed(dout_rows, width_v, rows, scores, keys, acc_dv, ones, ones)
                if found > 0:
                    add_unsafe_rows(found, unsafe, spare, width_v, scores, seen, acc_dv)

                # dk = dk + ds.T @ q
                found = 0
                if part != FULL:
                    found = set_aside_unsafe_rows(q_rows, width, rows, unsafe, spare)
                multiply_transposed(q_rows, width, rows, dp, keys, acc_dk, ones, ones)
                if found > 0:
                    add_unsafe_rows(found, unsafe, spare, width, dp, seen, acc_dk)

        store_lanes(dk, dk_base, dk_layout[3], k_index, k_at, keys, head_dim, factor, acc_dk)
        store_lanes(dv, dv_base, dv_layout[3], k_index, k_at, keys, head_dim_v, ones, acc_dv)


@device_function
def first_query_tile(tile_high, at, count, n0):
    """First tile whose largest key_end is beyond n0, where ranges are nondecreasing."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if tile_high[at + middle] > n0:
            high = middle
        else:
            low = middle + 1
    return low
