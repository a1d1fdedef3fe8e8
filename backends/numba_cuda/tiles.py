"""The portable kernels' building blocks: tiles of rows in shared memory, products in registers.

A block of TY x TX threads works on tiles. Thread (ty, tx) owns rows ty, ty + TY, ... of the result
and columns tx, tx + TX, ... of it. Sizes are compile-time constants, fixed when `tile_functions`
builds the device functions; a fresh set is compiled for each (dtype, head_dim, head_dim_v), both
rounded up (`tile_width`): the columns beyond are zeros.

Float32 sums over many rows are made tile by tile, and a tile's sum joins with what the additions
before it lost: one by one, the terms of a long row would vanish beside their sum.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from scfa_core.backends.numba_cuda.compiling import SHARED_LIMIT, SIMULATED, device
from scfa_core.backends.numba_cuda.convert import ELEMENTS


class Shape(NamedTuple):
    """Threads and tile of a portable kernel: rows of the result, rows streamed past them."""

    ty: int
    tx: int
    rows: int
    columns: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.ty * self.tx


_WIDTH_STEP = 32
# From the fastest to what fits float64 rows of 256; the simulator runs one small block.
_SHAPES = (
    Shape(8, 16, 32, 32),
    Shape(8, 16, 16, 16),
    Shape(8, 8, 8, 8),
    Shape(4, 4, 4, 4),
)
_SIMULATED = (Shape(8, 4, 16, 8),)


def shared_bytes(shape: Shape, widths: tuple[int, ...], itemsize: int) -> int:
    """Bytes of the tiles: `widths` alternate resident (rows) and streamed (columns) tiles."""
    per_row = sum(width + 1 for width in widths) * itemsize
    rows = max(shape.rows, shape.columns)
    return rows * per_row + rows * rows * 2 * (itemsize + 1) + 4 * rows * (itemsize + 4)


@cache
def choose_shape(dtype: str, widths: tuple[int, ...]) -> Shape:
    """Return the largest shape whose tiles of `widths` columns fit in shared memory."""
    itemsize = 8 if dtype == "float64" else 4
    shapes = _SIMULATED if SIMULATED else _SHAPES
    fitting = [s for s in shapes if shared_bytes(s, widths, itemsize) <= SHARED_LIMIT]
    return (fitting or [shapes[-1]])[0]


def tile_width(head_dim: int) -> int:
    """Columns of the tiles that hold rows of head_dim: kernels are compiled for multiples of 32.

    A kernel takes seconds to compile, and the widths that models use are such multiples.
    """
    return -(-head_dim // _WIDTH_STEP) * _WIDTH_STEP


class TileFunctions(NamedTuple):
    """Device functions for one dtype and shape."""

    load_rows: Any
    multiply: Any
    accumulate: Any
    add_with_loss: Any


def loss_count(dtype: str, sums: int) -> int:
    """Places for what `sums` sums have lost: none are needed in float64, but an array has one."""
    return 1 if dtype == "float64" else sums


@cache
def tile_functions(dtype: str, shape: Shape) -> TileFunctions:
    """Build the device functions of the portable kernels."""
    element = ELEMENTS[dtype]
    acc, widen = element.acc, element.widen
    ty_count, tx_count, rows, columns = shape
    per_row, per_column = rows // ty_count, columns // tx_count
    threads = shape.threads

    @device
    def load_rows(tile, count, x, b, h, index, index_head, first, limit, width, thread):
        """tile[r, :] = x[b, h, index[first + r], :], 0 from row `limit` on; `count` rows.

        Columns that x does not have are 0.
        """
        there = x.shape[3]
        for place in range(thread, count * width, threads):
            r = place // width
            c = place % width
            if first + r < limit and c < there:
                tile[r, c] = widen(x[b, h, index[b, index_head, first + r], c])
            else:
                tile[r, c] = acc(0)

    @device
    def multiply(out, left, right, width, ty, tx):
        """out[i, j] = sum_c left[row i, c] * right[row j, c]: one register tile of a product."""
        for e in range(per_row * per_column):
            out[e] = acc(0)
        for c in range(width):
            for i in range(per_row):
                x = left[ty + ty_count * i, c]
                for j in range(per_column):
                    out[i * per_column + j] += x * right[tx + tx_count * j, c]

    @device
    def accumulate(out, per_width, weights, seen, values, width, ty, tx):
        """out[i, c] += sum_n weights[row i, n] * values[n, c] over the pairs that are seen.

        A pair that is not seen is skipped, not multiplied by 0: values may hold NaN.
        """
        for n in range(columns):
            for i in range(per_row):
                r = ty + ty_count * i
                if seen[r, n] != 0:
                    weight = weights[r, n]
                    for c in range(per_width):
                        column = tx + tx_count * c
                        if column < width:
                            out[i * per_width + c] += weight * values[n, column]

    @device
    def accumulate_double(out, lost, tile, per_width, weights, seen, values, width, ty, tx):
        """`accumulate` in float64, where nothing vanishes."""
        accumulate(out, per_width, weights, seen, values, width, ty, tx)

    @device
    def add_double(sums, lost, place, term):
        """`add_with_loss` in float64, where nothing vanishes."""
        sums[place] += term

    @device
    def add_with_loss(sums, lost, place, term):
        """sums[place] += term; `lost` is what roundings have added so far (Kahan's summation)."""
        corrected = term - lost[place]
        moved = sums[place] + corrected
        excess = (moved - sums[place]) - corrected
        lost[place] = excess if excess - excess == acc(0) else acc(0)  # infinite sums stay so
        sums[place] = moved

    @device
    def accumulate_with_loss(out, lost, tile, per_width, weights, seen, values, width, ty, tx):
        """`accumulate`, the sums of one tile by themselves first."""
        for e in range(per_row * per_width):
            tile[e] = acc(0)
        accumulate(tile, per_width, weights, seen, values, width, ty, tx)
        for e in range(per_row * per_width):
            add_with_loss(out, lost, e, tile[e])

    if dtype == "float64":
        return TileFunctions(load_rows, multiply, accumulate_double, add_double)
    return TileFunctions(load_rows, multiply, accumulate_with_loss, add_with_loss)
