"""Gather rows into contiguous tiles, multiply tiles, scatter rows back.

A tile is a flat array in the arithmetic type. "Row tiles" hold one row of a tensor after the other;
"lane tiles" hold BLOCK rows transposed, element (d, lane) at ``d * BLOCK + lane``, so that one
vector instruction works on many rows and every row of a softmax stays in its own lane.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# numba infers the types of compiled functions from their arguments.

import numpy as np
from scfa_core.backends.numba_cpu.compiling import device_function
from scfa_core.backends.numba_cpu.convert import narrow, widen
from scfa_core.backends.numba_cpu.vector import (
    REGISTER_BYTES,
    REGISTER_COLUMNS,
    ROWS,
    address_of,
    multiply_block,
    multiply_column,
)

__all__ = [
    "BLOCK",
    "add_unsafe_rows",
    "aligned",
    "head_at",
    "load_lanes",
    "load_ranges",
    "load_rows",
    "multiply",
    "multiply_transposed",
    "pad",
    "set_aside_unsafe_rows",
    "store_lanes",
    "visibility",
]

BLOCK = 64  # rows of a tile, of queries and of keys
NOTHING, PARTIAL, FULL = 0, 1, 2


@device_function
def pad(size):
    """Round up to whole register blocks."""
    return (size + ROWS - 1) // ROWS * ROWS


@device_function
def aligned(size, sample):
    """Zeroed array of `size` elements of the type of `sample`, starting on a cache line."""
    spare = 64 // sample.itemsize
    storage = np.zeros(size + spare, sample.dtype)
    first = (-address_of(storage) % 64) // sample.itemsize
    return storage[first : first + size]


@device_function
def head_at(layout, b, h):
    """Where the first row of one (batch, head) is in the flat view of a tensor (`flat.Layout`)."""
    return layout[0] + b * layout[1] + h * layout[2]


@device_function
def load_rows(x, base, stride, index, index_at, count, dim, width, one, tile):
    """Copy rows ``index[index_at : index_at + count]`` into a row tile with `width` elements a row.

    `one` is 1: with the product this is a vector loop, without it a call of memcpy per row, which
    takes three times as long.
    """
    for r in range(count):
        at = base + stride * np.int64(index[index_at + r])
        source = x[at : at + dim]
        target = tile[r * width : r * width + dim]
        for d in range(dim):
            target[d] = widen(source[d]) * one


@device_function
def row_of(x, base, stride, row, dim):
    """View of one row of a tensor."""
    at = base + stride * np.int64(row)
    return x[at : at + dim]


@device_function
def load_lanes(x, base, stride, index, index_at, count, dim, factor, tile):
    """Copy rows times `factor` into a lane tile, four at a time; unused lanes become 0."""
    whole = count // 4 * 4
    for r in range(0, whole, 4):
        first = row_of(x, base, stride, index[index_at + r], dim)
        second = row_of(x, base, stride, index[index_at + r + 1], dim)
        third = row_of(x, base, stride, index[index_at + r + 2], dim)
        fourth = row_of(x, base, stride, index[index_at + r + 3], dim)
        for d in range(dim):
            lanes = tile[d * BLOCK + r : d * BLOCK + r + 4]
            lanes[0] = widen(first[d]) * factor
            lanes[1] = widen(second[d]) * factor
            lanes[2] = widen(third[d]) * factor
            lanes[3] = widen(fourth[d]) * factor
    for r in range(whole, count):
        row = row_of(x, base, stride, index[index_at + r], dim)
        for d in range(dim):
            tile[d * BLOCK + r] = widen(row[d]) * factor
    if count < BLOCK:
        for d in range(dim):
            tile[d * BLOCK + count : (d + 1) * BLOCK] = 0


@device_function
def store_lanes(x, base, stride, index, index_at, count, dim, factor, tile):
    """Scatter a lane tile: lane r, times ``factor[r]``, becomes row ``index[index_at + r]``."""
    for r in range(count):
        target = row_of(x, base, stride, index[index_at + r], dim)
        for d in range(dim):
            target[d] = narrow(tile[d * BLOCK + r] * factor[r], target[d])


@device_function
def multiply(rows, width, count, depth, lanes, used, result, ones):
    """result[r, lane] = sum_d rows[r, d] * lanes[d, lane], for the first `used` lanes at least."""
    vector = REGISTER_BYTES // rows.itemsize
    lane = 0
    while lane < used:
        if used - lane > vector:
            for r in range(0, count, ROWS):
                multiply_block(
                    rows, r * width, width, 1, lanes, lane, BLOCK,
                    result, r * BLOCK + lane, BLOCK, ones, -1, depth,
                )  # fmt: skip
            lane += vector * REGISTER_COLUMNS
        else:
            for r in range(0, count, ROWS):
                multiply_column(
                    rows, r * width, width, 1, lanes, lane, BLOCK,
                    result, r * BLOCK + lane, BLOCK, ones, -1, depth,
                )  # fmt: skip
            lane += vector


@device_function
def multiply_transposed(rows, width, count, weights, used, result, keep, ones):
    """result[d, lane] = keep[lane] * result[d, lane] + sum_r rows[r, d] * weights[r, lane].

    Sums of a tile are added up by themselves and then to the result, which keeps roundings few; in
    float64, where nothing coarser hides them, in shorter runs.
    """
    vector = REGISTER_BYTES // rows.itemsize
    run = 16 if rows.itemsize == 8 else BLOCK
    for first in range(0, count, run):
        depth = min(run, count - first)
        factor = keep if first == 0 else ones
        lane = 0
        while lane < used:
            if used - lane > vector:
                for d in range(0, width, ROWS):
                    multiply_block(
                        rows, first * width + d, 1, width, weights, first * BLOCK + lane, BLOCK,
                        result, d * BLOCK + lane, BLOCK, factor, lane, depth,
                    )  # fmt: skip
                lane += vector * REGISTER_COLUMNS
            else:
                for d in range(0, width, ROWS):
                    multiply_column(
                        rows, first * width + d, 1, width, weights, first * BLOCK + lane, BLOCK,
                        result, d * BLOCK + lane, BLOCK, factor, lane, depth,
                    )  # fmt: skip
                lane += vector


@device_function
def load_ranges(key_start, key_end, at, count, starts, ends):
    """Copy the key ranges of `count` queries (unused lanes see nothing) and return their union."""
    low, high = np.int64(2**31), np.int64(0)
    for r in range(count):
        start, end = key_start[at + r], key_end[at + r]
        starts[r], ends[r] = start, end
        if start < end:
            low, high = min(low, np.int64(start)), max(high, np.int64(end))
    for r in range(count, BLOCK):
        starts[r] = ends[r] = 0
    return low, high


@device_function
def visibility(starts, ends, count, first, last):
    """Whether `count` queries see nothing, part, or all of sorted keys [first, last)."""
    touched, covered = np.int32(0), np.int32(0)
    for r in range(count):
        touched += np.int32((starts[r] < last) & (ends[r] > first) & (starts[r] < ends[r]))
        covered += np.int32((starts[r] <= first) & (ends[r] >= last))
    if covered == count:
        return FULL
    return PARTIAL if touched > 0 else NOTHING


@device_function
def set_aside_unsafe_rows(tile, width, count, unsafe, spare):
    """Move rows that hold NaN or infinity from a row tile to `spare`, leave zeros, return how many.

    A weight of 0 does not silence such a row (0 * NaN), so it must not enter the product of a tile
    in which some pairs are hidden.
    """
    found = 0
    for r in range(count):
        row = tile[r * width : (r + 1) * width]
        bad = np.int32(0)
        for d in range(width):
            bad += np.int32(row[d] - row[d] != 0)
        if bad > 0:
            kept = spare[found * width : (found + 1) * width]
            for d in range(width):
                kept[d] = row[d]
                row[d] = 0
            unsafe[found] = r
            found += 1
    return found


@device_function
def add_unsafe_rows(found, unsafe, spare, width, weights, seen, result):
    """Add ``spare[n, d] * weights[r, lane]`` to result[d, lane] for the lanes that see row r."""
    for n in range(found):
        r = np.int64(unsafe[n])
        for lane in range(BLOCK):
            if seen[r * BLOCK + lane]:
                for d in range(width):
                    result[d * BLOCK + lane] += spare[n * width + d] * weights[r * BLOCK + lane]
