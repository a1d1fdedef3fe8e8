"""Portable forward: out = softmax(scale * q @ k.T) @ v over each query's range of sorted keys.

One block owns `rows` consecutive sorted queries of one head and streams the union of their key
ranges past them, tile by tile, with the online softmax.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda, int32, uint8
from scfa_core.backends.numba_cuda.compiling import INFINITY, kernel
from scfa_core.backends.numba_cuda.convert import ELEMENTS
from scfa_core.backends.numba_cuda.schedule import any_is_wanted, key_span, tile_is_wanted
from scfa_core.backends.numba_cuda.softmax import softmax_functions
from scfa_core.backends.numba_cuda.tiles import Shape, loss_count, tile_functions


@cache
def build_fwd(dtype: str, head_dim: int, head_dim_v: int, shape: Shape) -> Any:
    """Compile-time constants in, kernel out.

    Shared memory: the query tile, one tile for keys and then values, the weights and who is seen.
    """
    element = ELEMENTS[dtype]
    acc, narrow, exp = element.acc, element.narrow, element.exp
    times, log_unit = element.times, element.log_unit
    shift_of, rescale_factor, log_of = softmax_functions(dtype)
    load_rows, multiply, accumulate, add_with_loss = tile_functions(dtype, shape)
    ty_count, tx_count, rows, columns = shape
    per_row, per_column = rows // ty_count, columns // tx_count
    per_width = -(-head_dim_v // tx_count)
    score_count, out_count = per_row * per_column, per_row * per_width
    lost_count, lost_rows = loss_count(dtype, out_count), loss_count(dtype, per_row)
    loses = dtype != "float64"
    # One column more than needed: threads of a warp then read different banks.
    q_shape = (rows, head_dim + 1)
    kv_shape = (columns, max(head_dim, head_dim_v) + 1)
    weight_shape = (rows, columns + 1)

    rows_type = f"{element.storage}:4"

    @kernel(
        *[rows_type] * 4,
        "float32:3",
        *["int32:3"] * 4,
        "bool",
        "float64",
        "int32:1",
        "int32",
        variant=(dtype, head_dim, head_dim_v, shape),
    )
    def scfa_fwd(
        q, k, v, out, lse, q_index, k_index, key_start, key_end, monotone, scale, flags, flag_rows
    ):
        q_tile = cuda.shared.array(q_shape, acc)
        kv_tile = cuda.shared.array(kv_shape, acc)
        weights = cuda.shared.array(weight_shape, acc)
        seen = cuda.shared.array(weight_shape, uint8)
        scores = cuda.local.array(score_count, acc)
        acc_o = cuda.local.array(out_count, acc)
        lost_o = cuda.local.array(lost_count, acc)
        tile_o = cuda.local.array(lost_count, acc)
        row_max = cuda.local.array(per_row, acc)
        row_sum = cuda.local.array(per_row, acc)
        row_lost = cuda.local.array(lost_rows, acc)
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
            for i in range(per_row):
                row_max[i] = -INFINITY
                row_sum[i] = acc(0)
            for e in range(out_count):
                acc_o[e] = acc(0)
            for e in range(lost_count):
                lost_o[e] = acc(0)
            for i in range(lost_rows):
                row_lost[i] = acc(0)

            for n0 in range(first, last, columns):
                cuda.syncthreads()  # the tile before is consumed
                load_rows(kv_tile, columns, k, b, g, k_index, g, n0, last, head_dim, thread)
                cuda.syncthreads()  # q and k are there

                # S = q k^T, and who sees whom
                multiply(scores, q_tile, kv_tile, head_dim, ty, tx)
                for i in range(per_row):
                    r = ty + ty_count * i
                    start = int32(0)
                    end = int32(0)
                    if m0 + r < m1:
                        start = key_start[b, h, m0 + r]
                        end = key_end[b, h, m0 + r]
                    for j in range(per_column):
                        c = tx + tx_count * j
                        visible = start <= n0 + c and n0 + c < end
                        seen[r, c] = uint8(visible)
                        weights[r, c] = acc(-INFINITY)
                        if visible:
                            weights[r, c] = times(scores[i * per_column + j], score_scale)
                cuda.syncthreads()  # scores are there, keys are consumed

                # m' = max(m, S), O *= exp(m - m'): every thread of a row does it for itself
                load_rows(kv_tile, columns, v, b, g, k_index, g, n0, last, head_dim_v, thread)
                for i in range(per_row):
                    r = ty + ty_count * i
                    old = row_max[i]
                    new = old
                    for c in range(columns):
                        new = max(new, weights[r, c])
                    row_max[i] = new
                    factor = rescale_factor(old, new)
                    row_sum[i] *= factor
                    for c in range(per_width):
                        acc_o[i * per_width + c] *= factor
                    if loses:
                        row_lost[i] *= factor
                        for c in range(per_width):
                            lost_o[i * per_width + c] *= factor
                cuda.syncthreads()  # maxima are read before weights take the scores' place

                # P = exp(S - m')
                for i in range(per_row):
                    r = ty + ty_count * i
                    shift = shift_of(row_max[i])
                    for j in range(per_column):
                        c = tx + tx_count * j
                        weights[r, c] = exp(weights[r, c] - shift)
                cuda.syncthreads()  # weights and values are there

                # O += P v, l += rowsum(P)
                for i in range(per_row):
                    r = ty + ty_count * i
                    tile_sum = acc(0)
                    for c in range(columns):
                        tile_sum += weights[r, c]
                    add_with_loss(row_sum, row_lost, i, tile_sum)
                accumulate(
                    acc_o, lost_o, tile_o, per_width, weights, seen, kv_tile, head_dim_v, ty, tx
                )
            cuda.syncthreads()  # the last tile is consumed before the next loads q

            for i in range(per_row):
                r = ty + ty_count * i
                if m0 + r < m1:
                    row = q_index[b, h, m0 + r]
                    total = row_sum[i]
                    empty = total == acc(0)
                    divisor = acc(1) if empty else total
                    for c in range(per_width):
                        column = tx + tx_count * c
                        if column < out.shape[3]:
                            out[b, h, row, column] = narrow(acc_o[i * per_width + c] / divisor)
                    if tx == 0:
                        if empty:
                            lse[b, h, row] = -INFINITY
                        else:
                            lse[b, h, row] = (shift_of(row_max[i]) + log_of(total)) / acc(log_unit)

    return scfa_fwd
