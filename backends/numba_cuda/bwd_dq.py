"""Portable dq: dq = scale * ds @ k with ds = p * (dout @ v.T - delta), delta = rowsum(dout * out).

Runs first and leaves delta and lse (in the base of the scores) of its rows for `bwd_dkdv`, sorted.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda, int32, uint8
from scfa_core.backends.numba_cuda.compiling import INFINITY, kernel
from scfa_core.backends.numba_cuda.convert import ELEMENTS
from scfa_core.backends.numba_cuda.schedule import any_is_wanted, key_span, tile_is_wanted
from scfa_core.backends.numba_cuda.softmax import refined_lse, softmax_functions
from scfa_core.backends.numba_cuda.tiles import Shape, loss_count, tile_functions


@cache
def build_bwd_dq(dtype: str, head_dim: int, head_dim_v: int, shape: Shape) -> Any:
    """Compile-time constants in, kernel out.

    Shared memory: tiles of q, dout, k and v, the weights ds and who is seen. One block owns `rows`
    consecutive sorted queries of one head.
    """
    element = ELEMENTS[dtype]
    acc, widen, narrow, exp = element.acc, element.widen, element.narrow, element.exp
    times, log_unit = element.times, element.log_unit
    load_rows, multiply, accumulate, _ = tile_functions(dtype, shape)
    shift_of, rescale_factor, log_of = softmax_functions(dtype)
    exact_lse = dtype == "float64"  # lse comes rounded to float32, too coarse for float64
    ty_count, tx_count, rows, columns = shape
    per_row, per_column = rows // ty_count, columns // tx_count
    per_width = -(-head_dim // tx_count)
    score_count, out_count = per_row * per_column, per_row * per_width
    lost_count = loss_count(dtype, out_count)
    qk_shape = (max(rows, columns), head_dim + 1)
    v_shape = (max(rows, columns), head_dim_v + 1)
    weight_shape = (rows, max(columns, tx_count) + 1)

    rows_type, sums_type = f"{element.storage}:4", f"{element.acc_name}:3"

    @kernel(
        *[rows_type] * 5,
        "float32:3",
        rows_type,
        *[sums_type] * 2,
        *["int32:3"] * 4,
        "bool",
        "float64",
        "int32:1",
        "int32",
        variant=(dtype, head_dim, head_dim_v, shape),
    )
    def scfa_bwd_dq(
        dout, q, k, v, out, lse, dq, lse_scaled, delta, q_index, k_index, key_start, key_end,
        monotone, scale, flags, flag_rows,
    ):  # fmt: skip
        q_tile = cuda.shared.array(qk_shape, acc)
        dout_tile = cuda.shared.array(v_shape, acc)
        k_tile = cuda.shared.array(qk_shape, acc)
        v_tile = cuda.shared.array(v_shape, acc)
        weights = cuda.shared.array(weight_shape, acc)
        seen = cuda.shared.array(weight_shape, uint8)
        scores = cuda.local.array(score_count, acc)
        acc_dp = cuda.local.array(score_count, acc)
        acc_dq = cuda.local.array(out_count, acc)
        lost_dq = cuda.local.array(lost_count, acc)
        tile_dq = cuda.local.array(lost_count, acc)
        row_lse = cuda.local.array(per_row, acc)
        row_delta = cuda.local.array(per_row, acc)
        row_sum = cuda.local.array(per_row, acc)
        thread = cuda.threadIdx.x
        ty = thread // tx_count
        tx = thread % tx_count
        heads, seqlen_q = q.shape[1], q.shape[2]
        tiles = (seqlen_q + rows - 1) // rows
        score_scale = acc(scale) * acc(log_unit)

        every = q.shape[0] * heads * tiles
        first_tile = cuda.blockIdx.x + thread * cuda.gridDim.x
        wanted = any_is_wanted(
            flags, flag_rows, rows, tiles, first_tile, every, cuda.blockDim.x * cuda.gridDim.x,
            True, seqlen_q,
        )  # fmt: skip
        if cuda.syncthreads_or(wanted) == 0:
            return

        for tile in range(cuda.blockIdx.x, every, cuda.gridDim.x):
            head = tile // tiles
            m0 = (tiles - 1 - tile % tiles) * rows  # the last rows see most: heaviest first
            if not tile_is_wanted(flags, flag_rows, head, m0, seqlen_q):
                continue
            b = head // heads
            h = head % heads
            g = h // (heads // k.shape[1])
            m1 = min(m0 + rows, seqlen_q)
            first, last = key_span(key_start, key_end, b, h, m0, m1, monotone)
            load_rows(q_tile, rows, q, b, h, q_index, h, m0, m1, head_dim, thread)
            load_rows(dout_tile, rows, dout, b, h, q_index, h, m0, m1, head_dim_v, thread)
            for e in range(out_count):
                acc_dq[e] = acc(0)
            for e in range(lost_count):
                lost_dq[e] = acc(0)
            cuda.syncthreads()  # dout is there

            # delta = rowsum(dout * out): each thread a part, then all parts
            for i in range(per_row):
                r = ty + ty_count * i
                part = acc(0)
                if m0 + r < m1:
                    row = q_index[b, h, m0 + r]
                    for c in range(tx, out.shape[3], tx_count):
                        part += dout_tile[r, c] * widen(out[b, h, row, c])
                weights[r, tx] = part
            cuda.syncthreads()  # all parts are there
            for i in range(per_row):
                r = ty + ty_count * i
                row_delta[i] = acc(0)
                for c in range(tx_count):
                    row_delta[i] += weights[r, c]
                row_lse[i] = acc(INFINITY)
                row_sum[i] = acc(0)
                if m0 + r < m1 and not exact_lse:
                    row_lse[i] = acc(lse[b, h, q_index[b, h, m0 + r]]) * acc(log_unit)

            if exact_lse:
                for i in range(per_row):
                    row_lse[i] = acc(-INFINITY)  # the maximum, until the sum joins it
                for n0 in range(first, last, columns):
                    cuda.syncthreads()  # the tile before is consumed
                    load_rows(k_tile, columns, k, b, g, k_index, g, n0, last, head_dim, thread)
                    cuda.syncthreads()  # keys are there
                    multiply(scores, q_tile, k_tile, head_dim, ty, tx)
                    for i in range(per_row):
                        r = ty + ty_count * i
                        for j in range(per_column):
                            c = tx + tx_count * j
                            visible = m0 + r < m1
                            if visible:
                                visible = (
                                    key_start[b, h, m0 + r] <= n0 + c
                                    and n0 + c < key_end[b, h, m0 + r]
                                )
                            weights[r, c] = acc(-INFINITY)
                            if visible:
                                weights[r, c] = times(scores[i * per_column + j], score_scale)
                    cuda.syncthreads()  # scores are there
                    for i in range(per_row):
                        r = ty + ty_count * i
                        old = row_lse[i]
                        new = old
                        for c in range(columns):
                            new = max(new, weights[r, c])
                        row_lse[i] = new
                        row_sum[i] *= rescale_factor(old, new)
                        tile_sum = acc(0)  # small weights would vanish one by one
                        for c in range(columns):
                            tile_sum += exp(weights[r, c] - shift_of(new))
                        row_sum[i] += tile_sum
                for i in range(per_row):
                    r = ty + ty_count * i
                    row_lse[i] = shift_of(row_lse[i]) + log_of(row_sum[i])
                    if m0 + r < m1:
                        row_lse[i] = refined_lse(row_lse[i], lse[b, h, q_index[b, h, m0 + r]])

            # An empty row weighs nothing: exp(s - inf) = 0.
            for i in range(per_row):
                r = ty + ty_count * i
                if row_lse[i] == -INFINITY:
                    row_lse[i] = acc(INFINITY)
                if tx == 0 and m0 + r < m1:
                    lse_scaled[b, h, m0 + r] = row_lse[i]
                    delta[b, h, m0 + r] = row_delta[i]

            for n0 in range(first, last, columns):
                cuda.syncthreads()  # the tile before is consumed
                load_rows(k_tile, columns, k, b, g, k_index, g, n0, last, head_dim, thread)
                load_rows(v_tile, columns, v, b, g, k_index, g, n0, last, head_dim_v, thread)
                cuda.syncthreads()  # all tiles are there

                # S = q k^T, dP = dout v^T, ds = exp(S - lse) * (dP - delta)
                multiply(scores, q_tile, k_tile, head_dim, ty, tx)
                multiply(acc_dp, dout_tile, v_tile, head_dim_v, ty, tx)
                for i in range(per_row):
                    r = ty + ty_count * i
                    start = int32(0)
                    end = int32(0)
                    if m0 + r < m1:
                        start = key_start[b, h, m0 + r]
                        end = key_end[b, h, m0 + r]
                    for j in range(per_column):
                        c = tx + tx_count * j
                        e = i * per_column + j
                        p = exp(times(scores[e], score_scale) - row_lse[i])
                        weights[r, c] = p * (acc_dp[e] - row_delta[i])
                        seen[r, c] = uint8(start <= n0 + c and n0 + c < end)
                cuda.syncthreads()  # weights are there

                # dq += ds k
                accumulate(
                    acc_dq, lost_dq, tile_dq, per_width, weights, seen, k_tile, head_dim, ty, tx
                )
            cuda.syncthreads()  # the last tile is consumed before the next loads q

            for i in range(per_row):
                r = ty + ty_count * i
                if m0 + r < m1:
                    row = q_index[b, h, m0 + r]
                    for c in range(per_width):
                        column = tx + tx_count * c
                        if column < dq.shape[3]:
                            dq[b, h, row, column] = narrow(acc_dq[i * per_width + c] * acc(scale))

    return scfa_bwd_dq
