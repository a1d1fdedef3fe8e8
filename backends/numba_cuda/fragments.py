"""The tensor-core kernels' building blocks: a warp's fragments, and products of them.

A warp owns `atoms` times 16 rows of a result. Lane l = 4 * group + quad holds, of every 16 x 8
block of it, the elements (group, 2 * quad + {0, 1}) and (group + 8, 2 * quad + {0, 1}), in this
order: element e of block n of atom a is acc[(a * blocks + n) * 4 + e]. Left operands are 16 x 16
fragments of four registers; right operands come from a tile in shared memory, 16 x 16 at a time.

Tiles hold rows of 16-bit elements, 8 more than needed: the 16-byte pieces that ldmatrix reads of
eight neighbouring rows then lie in different banks.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from numba import float32, int32, int64, uint32
from scfa_core.backends.numba_cuda.compiling import SIMULATED, device
from scfa_core.backends.numba_cuda.intrinsics import (
    copy_async_4,
    copy_async_16,
    copy_row_piece,
    ldmatrix,
    ldmatrix_transposed,
    mma_bfloat16,
    mma_float16,
    pack_bfloat16,
    pack_float16,
    store_16,
)

PAD = 8
STATIC_SHARED = 4096  # bytes; more than any kernel declares beside its tiles
_RESERVED = 1024  # bytes of each block that the card keeps; a multiprocessor has one more


class TileShape(NamedTuple):
    """Tiles of a kernel, and what a warp does of them."""

    atoms: int  # a warp owns 16 times as many rows of the result
    columns: int  # rows of a streamed tile
    step: int  # of them at a time: masked keys in forward, keys in dq, queries in dk/dv
    in_registers: bool  # the owned left operands stay in registers
    blocks: int  # on a multiprocessor at once, that the compiler limits registers for
    warps: int = 1 if SIMULATED else 4

    @property
    def rows(self) -> int:
        """Rows of a block's result."""
        return 16 * self.warps * self.atoms

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps


def resident_shape(
    shapes: tuple[TileShape, ...], sizes: tuple[int, ...], limit: int
) -> tuple[TileShape, int]:
    """First shape as many blocks of which fit at once as it hopes for, else the smallest.

    `sizes` are bytes of shared memory of each, `limit` is what a block may have.
    """
    for shape, size in zip(shapes, sizes, strict=True):
        if shape.blocks * (size + STATIC_SHARED + _RESERVED) <= limit + STATIC_SHARED + _RESERVED:
            return shape, size
    return min(zip(shapes, sizes, strict=True), key=lambda pair: pair[1])


def padded(width: int) -> int:
    """Columns of a fragment product: the next multiple of 16."""
    return -(-width // 16) * 16


def pitch_of(width: int) -> int:
    """Elements from one row of a tile to the next."""
    return padded(width) + PAD


@device
def ordinary_offset(lane, pitch):
    """Where a lane's row starts for a left operand (rows x columns), or a transposed right one."""
    return (lane % 16) * pitch + lane // 16 * 8


@device
def origin_of(x, b, h):
    """Bytes from the start of x to row 0 of one (batch, head)."""
    return int64(b) * x.strides[0] + int64(h) * x.strides[1]


@device
def paired_offset(lane, pitch):
    """Where a lane's row starts for a right operand that is stored row by row of its columns."""
    return (lane // 16 * 8 + lane % 8) * pitch + lane // 8 % 2 * 8


class Multiplications(NamedTuple):
    """Device functions for one dtype, one number of atoms and one width of rows."""

    load_left: Any
    add_rows: Any
    by_rows: Any
    by_columns: Any


def in_order(functions: list[Any]) -> Any:
    """One device function that calls all, each with the same six arguments.

    A loop around so much code stays a loop in some versions of LLVM, and its arrays stay in memory.
    """
    first, *others = functions
    if not others:
        return first
    rest = in_order(others)

    @device
    def call_both(a, b, c, d, e, f):
        """Call the first, then the rest."""
        first(a, b, c, d, e, f)
        rest(a, b, c, d, e, f)

    return call_both


@cache
def multiplications(
    dtype: str, atoms: int, width: int, columns: int, in_registers: bool
) -> Multiplications:
    """Build the products of a warp's rows with `columns` rows of a tile.

    `width` is the length of the rows in shared memory. Left operands come from `load_left` if
    they are kept in registers, else `by_rows` reads them 16 columns at a time.
    """
    mma, pack = {
        "bfloat16": (mma_bfloat16, pack_bfloat16),
        "float16": (mma_float16, pack_float16),
    }[dtype]
    pitch = pitch_of(width)
    steps = padded(width) // 16
    out_blocks = padded(width) // 8
    blocks, pairs = columns // 8, columns // 16

    @device
    def load_left(fragment, tile, place):
        """Read the warp's rows as left operand: fragment[(atom * steps + step) * 4 + i].

        `place` is the lane's place in the tile.
        """
        for atom in range(atoms):
            for step in range(steps):
                ldmatrix(
                    fragment, (atom * steps + step) * 4, tile, place + atom * 16 * pitch + step * 16
                )

    def rows_step(step: int) -> Any:
        @device
        def multiply(acc, left, right, tile, left_place, place):
            """Add what 16 columns of all rows give."""
            if not in_registers:
                for atom in range(atoms):
                    ldmatrix(left, atom * 4, tile, left_place + atom * 16 * pitch + step * 16)
            for pair in range(pairs):
                ldmatrix(right, 0, tile, place + pair * 16 * pitch + step * 16)
                for atom in range(atoms):
                    a = (atom * steps + step) * 4 if in_registers else atom * 4
                    mma(acc, (atom * blocks + 2 * pair) * 4, left, a, right, 0)
                    mma(acc, (atom * blocks + 2 * pair + 1) * 4, left, a, right, 2)

        return multiply

    # acc[row, n] += sum_c left[row, c] * tile[n, c] for rows n of a tile
    add_rows = in_order([rows_step(step) for step in range(steps)])

    @device
    def by_rows(acc, left, right, tile, left_place, place):
        """As `add_rows`, from zero."""
        for e in range(atoms * blocks * 4):
            acc[e] = float32(0)
        add_rows(acc, left, right, tile, left_place, place)

    def columns_step(step: int) -> Any:
        @device
        def accumulate(acc, weights, left, right, tile, place):
            """Add what 16 rows of the tile give."""
            for atom in range(atoms):
                w = (atom * blocks + 2 * step) * 4
                for i in range(4):
                    left[atom * 4 + i] = pack(weights[w + 2 * i], weights[w + 2 * i + 1])
            for pair in range(steps):
                ldmatrix_transposed(right, 0, tile, place + step * 16 * pitch + pair * 16)
                for atom in range(atoms):
                    mma(acc, (atom * out_blocks + 2 * pair) * 4, left, atom * 4, right, 0)
                    mma(acc, (atom * out_blocks + 2 * pair + 1) * 4, left, atom * 4, right, 2)

        return accumulate

    # acc[row, c] += sum_n weights[row, n] * tile[n, c], weights rounded to 16 bits
    by_columns = in_order([columns_step(step) for step in range(pairs)])

    return Multiplications(load_left, add_rows, by_rows, by_columns)


@cache
def sign_flipper(words_count: int, threads: int) -> Any:
    """Build the change of signs of a tile of `words_count` pairs of 16-bit floats."""

    @device
    def flip_signs(words, flip, thread):
        """words[:words_count] ^= flip; barriers before and after are the caller's."""
        for place in range(thread, words_count, threads):
            words[place] = uint32(words[place] ^ flip)

    return flip_signs


@cache
def row_fetcher(count: int, threads: int) -> Any:
    """Build the way of `count` row numbers from a plan's list to shared memory."""
    turns = -(-count // threads)

    @device
    def fetch_rows(rows, index, b, h, first, last, thread):
        """rows[:count] = index[b, h, first:first + count]; -1 from `last` on."""
        for turn in range(turns):
            r = turn * threads + thread
            if r < count:
                row = int32(-1)
                if first + r < last:
                    row = index[b, h, first + r]
                rows[r] = row

    return fetch_rows


@cache
def value_copier(count: int, threads: int) -> Any:
    """Build the copy of `count` 32-bit values, `spacing` places apart, to shared memory."""
    turns = -(-count // threads)

    @device
    def copy_values(target, place, spacing, x, origin, first, last, thread):
        """Start copying x's values first, first + 1, ... of one head; zeros from `last` on."""
        for turn in range(turns):
            r = turn * threads + thread
            if r < count:
                there = first + r < last
                copy_async_4(target, place + r * spacing, x, origin + (first + r) * 4, there)

    return copy_values


@cache
def row_gatherer(width: int, count: int, threads: int) -> Any:
    """Build the copy of `count` gathered rows of `width` elements into a tile."""
    pitch, pieces = pitch_of(width), padded(width) // 8
    total = count * pieces
    rounds = total // threads
    is_even = padded(width) == width and total % threads == 0 and threads % pieces == 0
    per_round = threads // pieces

    @device
    def gather_rows(tile, base, x, origin, row_stride, rows, slot, there, thread, block):
        """Start copying x's rows rows[slot:slot + count] to tile[base:]; zeros from `there` on.

        x's rows may be shorter than those of the tile, which then end in zeros. `origin` and
        `row_stride` are bytes. `block` is the number of threads, as the card tells: the loop over
        an incomplete tile is not unrolled then. The caller commits and waits.
        """
        if is_even and there >= count and x.shape[3] == width:
            r = thread // pieces
            piece = thread % pieces
            start = origin + piece * 16
            target = base + r * pitch + piece * 8
            for turn in range(rounds):
                row = rows[slot + r + turn * per_round]
                place = target + turn * per_round * pitch
                copy_async_16(tile, place, x, start + row * row_stride, True)
        else:
            last_piece = int32(x.shape[3] // 8 - 1)
            place = uint32(thread)
            while place < uint32(total):
                r = int32(place // pieces)
                piece = int32(place % pieces)
                is_there = r < there and piece <= last_piece
                row = int32(0)
                if is_there:
                    row = rows[slot + r]
                offset = origin + row * row_stride + piece * 16
                copy_async_16(tile, base + r * pitch + piece * 8, x, offset, is_there)
                place = uint32(place + block)

    return gather_rows


@cache
def twin_gatherer(width_x: int, width_y: int, count: int, threads: int) -> Any:
    """Build the copy of the same `count` gathered rows of two arrays, each into a tile of its own.

    Complete tiles of rows of one width read each row number once, all of them before the first
    copy: a copy may touch any memory as far as the compiler knows, so that the next number would
    be read after it, and waited for.
    """
    gather_x, gather_y = (row_gatherer(width, count, threads) for width in (width_x, width_y))
    pitch, pieces = pitch_of(width_x), width_x // 8
    is_even = (
        width_x == width_y
        and padded(width_x) == width_x
        and count * pieces % threads == 0
        and threads % pieces == 0
    )
    rounds = count * pieces // threads if is_even else 1
    per_round = threads // pieces

    @device
    def gather_twins(
        tile, x_base, y_base, x, y, x_origin, y_origin, x_stride, y_stride, rows, ahead, slot,
        there, thread, block,
    ):  # fmt: skip
        """As `gather_rows` for x's and for y's rows; `ahead` holds a number for each round."""
        if is_even and there >= count and x.shape[3] == width_x and y.shape[3] == width_y:
            r = int32(thread // pieces)
            piece = int32(thread % pieces)
            target = int32(r * pitch + piece * 8)
            x_start, y_start = x_origin + piece * 16, y_origin + piece * 16
            for turn in range(rounds):
                ahead[turn] = rows[slot + r + turn * per_round]
            for turn in range(rounds):
                place = int32(x_base + target + turn * per_round * pitch)
                copy_row_piece(tile, place, x, x_start, ahead[turn], x_stride)
            for turn in range(rounds):
                place = int32(y_base + target + turn * per_round * pitch)
                copy_row_piece(tile, place, y, y_start, ahead[turn], y_stride)
        else:
            gather_x(tile, x_base, x, x_origin, x_stride, rows, slot, there, thread, block)
            gather_y(tile, y_base, y, y_origin, y_stride, rows, slot, there, thread, block)

    return gather_twins, rounds


@cache
def row_scatterer(dtype: str, atoms: int, width: int, threads: int, count: int) -> Any:
    """Build the way of a result from registers through a tile to gathered rows."""
    pack = {"bfloat16": pack_bfloat16, "float16": pack_float16}[dtype]
    pitch, pieces, blocks = pitch_of(width), width // 8, padded(width) // 8
    total = count * pieces
    rounds = -(-total // threads)

    @device
    def stage_rows(words, base, acc, factors, warp_row, lane):
        """Round acc[row] * factors[row] into the warp's rows of a tile, seen as 32-bit words."""
        for atom in range(atoms):
            for half in range(2):
                row = warp_row + atom * 16 + half * 8 + lane // 4
                place = (base + row * pitch) // 2 + lane % 4
                factor = factors[atom * 2 + half]
                for block in range(blocks):
                    e = (atom * blocks + block) * 4 + half * 2
                    words[place + block * 4] = pack(acc[e] * factor, acc[e + 1] * factor)

    @device
    def scatter_rows(tile, base, x, origin, row_stride, rows, thread):
        """Store the staged rows to x's rows rows[:count]; row -1 is none.

        x's rows may be shorter than those of the tile.
        """
        for turn in range(rounds):
            place = turn * threads + thread
            if place < total:
                r = place // pieces
                piece = place % pieces
                row = rows[r]
                if row >= 0 and piece < x.shape[3] // 8:
                    store_16(
                        x,
                        origin + row * row_stride + piece * 16,
                        tile,
                        base + r * pitch + piece * 8,
                    )

    return stage_rows, scatter_rows
