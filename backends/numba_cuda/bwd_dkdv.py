"""Portable dk and dv: dv = p.T @ dout, dk = scale * ds.T @ q, one tile of sorted keys per block.

A block streams the queries of every head that shares its keys, in a fixed order: sums are the same
bit for bit in every run. Needs the lse and delta that `bwd_dq` left, in sorted order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda, int32, uint8
from scfa_core.backends.numba_cuda.compiling import kernel
from scfa_core.backends.numba_cuda.convert import ELEMENTS
from scfa_core.backends.numba_cuda.schedule import (
    any_is_wanted,
    key_span,
    query_span,
    tile_is_wanted,
)
from scfa_core.backends.numba_cuda.tiles import Shape, loss_count, tile_functions


@cache
def build_bwd_dkdv(dtype: str, head_dim: int, head_dim_v: int, shape: Shape) -> Any:
    """Compile-time constants in, kernel out.

    Shared memory: tiles of k, v, q and dout, the weights (keys x queries) and who is seen.
    """
    element = ELEMENTS[dtype]
    acc, narrow, exp = element.acc, element.narrow, element.exp
    times, log_unit = element.times, element.log_unit
    load_rows, multiply, accumulate, _ = tile_functions(dtype, shape)
    ty_count, tx_count, rows, columns = shape
    per_row, per_column = rows // ty_count, columns // tx_count
    per_dk, per_dv = -(-head_dim // tx_count), -(-head_dim_v // tx_count)
    score_count, dk_count, dv_count = per_row * per_column, per_row * per_dk, per_row * per_dv
    lost_dk_count, lost_dv_count = loss_count(dtype, dk_count), loss_count(dtype, dv_count)
    tile_count = max(lost_dk_count, lost_dv_count)
    k_shape, v_shape = (rows, head_dim + 1), (rows, head_dim_v + 1)
    q_shape, dout_shape = (columns, head_dim + 1), (columns, head_dim_v + 1)
    weight_shape = (rows, columns + 1)

    rows_type, sums_type = f"{element.storage}:4", f"{element.acc_name}:3"

    @kernel(
        *[rows_type] * 6,
        *[sums_type] * 2,
        *["int32:3"] * 4,
        "bool",
        "float64",
        "int32:1",
        "int32",
        variant=(dtype, head_dim, head_dim_v, shape),
    )
    def scfa_bwd_dkdv(
        dout, q, k, v, dk, dv, lse_scaled, delta, q_index, k_index, key_start, key_end, monotone,
        scale, flags, flag_rows,
    ):  # fmt: skip
        k_tile = cuda.shared.array(k_shape, acc)
        v_tile = cuda.shared.array(v_shape, acc)
        q_tile = cuda.shared.array(q_shape, acc)
        dout_tile = cuda.shared.array(dout_shape, acc)
        weights_p = cuda.shared.array(weight_shape, acc)
        weights_ds = cuda.shared.array(weight_shape, acc)
        seen = cuda.shared.array(weight_shape, uint8)
        scores = cuda.local.array(score_count, acc)
        acc_dp = cuda.local.array(score_count, acc)
        acc_dk = cuda.local.array(dk_count, acc)
        acc_dv = cuda.local.array(dv_count, acc)
        lost_dk = cuda.local.array(lost_dk_count, acc)
        lost_dv = cuda.local.array(lost_dv_count, acc)
        tile_sums = cuda.local.array(tile_count, acc)
        thread = cuda.threadIdx.x
        ty = thread // tx_count
        tx = thread % tx_count
        heads, seqlen_q = q.shape[1], q.shape[2]
        heads_kv, seqlen_k = k.shape[1], k.shape[2]
        group = heads // heads_kv
        tiles = (seqlen_k + rows - 1) // rows
        score_scale = acc(scale) * acc(log_unit)

        every = q.shape[0] * heads_kv * tiles
        first_tile = cuda.blockIdx.x + thread * cuda.gridDim.x
        wanted = any_is_wanted(
            flags, flag_rows, rows, tiles, first_tile, every, cuda.blockDim.x * cuda.gridDim.x,
            False, seqlen_k,
        )  # fmt: skip
        if cuda.syncthreads_or(wanted) == 0:
            return

        for tile in range(cuda.blockIdx.x, every, cuda.gridDim.x):
            head = tile // tiles
            n0 = tile % tiles * rows  # the first keys are seen by most: heaviest first
            if not tile_is_wanted(flags, flag_rows, head, n0, seqlen_k):
                continue
            b = head // heads_kv
            g = head % heads_kv
            n1 = min(n0 + rows, seqlen_k)
            load_rows(k_tile, rows, k, b, g, k_index, g, n0, n1, head_dim, thread)
            load_rows(v_tile, rows, v, b, g, k_index, g, n0, n1, head_dim_v, thread)
            for e in range(dk_count):
                acc_dk[e] = acc(0)
            for e in range(dv_count):
                acc_dv[e] = acc(0)
            for e in range(lost_dk_count):
                lost_dk[e] = acc(0)
            for e in range(lost_dv_count):
                lost_dv[e] = acc(0)

            for h in range(g * group, g * group + group):
                first, last = query_span(key_start, key_end, b, h, n0, n1, seqlen_q, monotone)
                for m0 in range(first, last, columns):
                    m1 = min(m0 + columns, last)
                    low, high = key_span(key_start, key_end, b, h, m0, m1, monotone)
                    if low >= n1 or high <= n0:
                        continue  # only ranges in any order come here
                    cuda.syncthreads()  # the tile before is consumed
                    load_rows(q_tile, columns, q, b, h, q_index, h, m0, m1, head_dim, thread)
                    load_rows(
                        dout_tile, columns, dout, b, h, q_index, h, m0, m1, head_dim_v, thread
                    )
                    cuda.syncthreads()  # all tiles are there

                    # S^T = k q^T, dP^T = v dout^T; p = exp(S - lse), ds = p * (dP - delta)
                    multiply(scores, k_tile, q_tile, head_dim, ty, tx)
                    multiply(acc_dp, v_tile, dout_tile, head_dim_v, ty, tx)
                    for j in range(per_column):
                        c = tx + tx_count * j
                        start = int32(0)
                        end = int32(0)
                        column_lse = acc(0)
                        column_delta = acc(0)
                        if m0 + c < m1:
                            start = key_start[b, h, m0 + c]
                            end = key_end[b, h, m0 + c]
                            column_lse = lse_scaled[b, h, m0 + c]
                            column_delta = delta[b, h, m0 + c]
                        for i in range(per_row):
                            r = ty + ty_count * i
                            e = i * per_column + j
                            p = exp(times(scores[e], score_scale) - column_lse)
                            weights_p[r, c] = p
                            weights_ds[r, c] = p * (acc_dp[e] - column_delta)
                            seen[r, c] = uint8(start <= n0 + r and n0 + r < end)
                    cuda.syncthreads()  # weights are there

                    # dv += p^T dout, dk += ds^T q
                    accumulate(
                        acc_dv, lost_dv, tile_sums, per_dv,
                        weights_p, seen, dout_tile, head_dim_v, ty, tx,
                    )  # fmt: skip
                    accumulate(
                        acc_dk, lost_dk, tile_sums, per_dk,
                        weights_ds, seen, q_tile, head_dim, ty, tx,
                    )  # fmt: skip
            cuda.syncthreads()  # the last tile is consumed before the next loads k

            for i in range(per_row):
                r = ty + ty_count * i
                if n0 + r < n1:
                    row = k_index[b, g, n0 + r]
                    for c in range(per_dk):
                        column = tx + tx_count * c
                        if column < dk.shape[3]:
                            dk[b, g, row, column] = narrow(acc_dk[i * per_dk + c] * acc(scale))
                    for c in range(per_dv):
                        column = tx + tx_count * c
                        if column < dv.shape[3]:
                            dv[b, g, row, column] = narrow(acc_dv[i * per_dv + c])

    return scfa_bwd_dkdv
