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

from numba import float32, int64, uint32
from scfa_core.backends.numba_cuda.compiling import SIMULATED, device
from scfa_core.backends.numba_cuda.intrinsics import (
    copy_async_16,
    ldmatrix,
    ldmatrix_transposed,
    mma_bfloat16,
    mma_float16,
    pack_bfloat16,
    pack_float16,
    store_16,
)

COLUMNS = 64  # rows of a streamed tile
BLOCKS = COLUMNS // 8
PAD = 8
REGISTER_ROWS = 64  # length of rows up to which a warp keeps its left operand in registers


class WarpShape(NamedTuple):
    """How many warps a block has, and how many times 16 rows each owns."""

    warps: int
    atoms: int

    @property
    def rows(self) -> int:
        """Rows of a block's result."""
        return 16 * self.warps * self.atoms

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps


def warp_shape(atoms: int) -> WarpShape:
    """Four warps; in the simulator one."""
    return WarpShape(1 if SIMULATED else 4, atoms)


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
    by_rows: Any
    by_rows_shared: Any
    by_columns: Any


@cache
def multiplications(dtype: str, atoms: int, width: int) -> Multiplications:
    """Build the products of a warp; `width` is the length of the rows in shared memory."""
    mma, pack = {
        "bfloat16": (mma_bfloat16, pack_bfloat16),
        "float16": (mma_float16, pack_float16),
    }[dtype]
    pitch = pitch_of(width)
    steps = padded(width) // 16
    out_blocks = padded(width) // 8
    row_pairs, key_steps = COLUMNS // 16, COLUMNS // 16

    @device
    def load_left(fragment, tile, place, flip):
        """Read the warp's rows as left operand: fragment[(atom * steps + step) * 4 + i].

        `place` is the lane's place in the tile; `flip` is xor-ed in, to change signs.
        """
        for atom in range(atoms):
            for step in range(steps):
                ldmatrix(
                    fragment, (atom * steps + step) * 4, tile, place + atom * 16 * pitch + step * 16
                )
        for i in range(atoms * steps * 4):
            fragment[i] = uint32(fragment[i] ^ flip)

    @device
    def by_rows(acc, left, right, tile, place):
        """acc[row, n] = sum_c left[row, c] * tile[n, c] for the 64 rows n of a tile."""
        for e in range(atoms * BLOCKS * 4):
            acc[e] = float32(0)
        for step in range(steps):
            for pair in range(row_pairs):
                ldmatrix(right, 0, tile, place + pair * 16 * pitch + step * 16)
                for atom in range(atoms):
                    a = (atom * steps + step) * 4
                    mma(acc, (atom * BLOCKS + 2 * pair) * 4, left, a, right, 0)
                    mma(acc, (atom * BLOCKS + 2 * pair + 1) * 4, left, a, right, 2)

    @device
    def by_rows_shared(acc, left, right, tile, left_place, flip, place):
        """As `by_rows`, the left operand read step by step: for rows too long for registers."""
        for e in range(atoms * BLOCKS * 4):
            acc[e] = float32(0)
        for step in range(steps):
            for atom in range(atoms):
                ldmatrix(left, atom * 4, tile, left_place + atom * 16 * pitch + step * 16)
            for i in range(atoms * 4):
                left[i] = uint32(left[i] ^ flip)
            for pair in range(row_pairs):
                ldmatrix(right, 0, tile, place + pair * 16 * pitch + step * 16)
                for atom in range(atoms):
                    mma(acc, (atom * BLOCKS + 2 * pair) * 4, left, atom * 4, right, 0)
                    mma(acc, (atom * BLOCKS + 2 * pair + 1) * 4, left, atom * 4, right, 2)

    @device
    def by_columns(acc, weights, left, right, tile, place):
        """acc[row, c] += sum_n weights[row, n] * tile[n, c], weights rounded to 16 bits."""
        for step in range(key_steps):
            for atom in range(atoms):
                w = (atom * BLOCKS + 2 * step) * 4
                for i in range(4):
                    left[atom * 4 + i] = pack(weights[w + 2 * i], weights[w + 2 * i + 1])
            for pair in range(steps):
                ldmatrix_transposed(right, 0, tile, place + step * 16 * pitch + pair * 16)
                for atom in range(atoms):
                    mma(acc, (atom * out_blocks + 2 * pair) * 4, left, atom * 4, right, 0)
                    mma(acc, (atom * out_blocks + 2 * pair + 1) * 4, left, atom * 4, right, 2)

    return Multiplications(load_left, by_rows, by_rows_shared, by_columns)


@cache
def row_fetcher(count: int, threads: int) -> tuple[int, Any, Any]:
    """Build the way of `count` row numbers from a plan's list to shared memory, in two halves.

    Also returns the length of the local array between the halves: the load has the time of a tile's
    products to arrive.
    """
    turns = -(-count // threads)

    @device
    def fetch_rows(fetched, index, b, h, first, last, thread):
        """Load index[b, h, first:first + count]; -1 from `last` on."""
        for turn in range(turns):
            r = turn * threads + thread
            fetched[turn] = -1
            if r < count and first + r < last:
                fetched[turn] = index[b, h, first + r]

    @device
    def put_rows(rows, slot, fetched, thread):
        """rows[slot:slot + count] = what was fetched."""
        for turn in range(turns):
            r = turn * threads + thread
            if r < count:
                rows[slot + r] = fetched[turn]

    return turns, fetch_rows, put_rows


@cache
def row_gatherer(width: int, count: int, threads: int) -> Any:
    """Build the copy of `count` gathered rows of `width` elements into a tile."""
    pitch, pieces = pitch_of(width), padded(width) // 8
    total = count * pieces
    rounds = -(-total // threads)
    last_piece = width // 8 - 1
    is_padded = padded(width) != width

    @device
    def gather_rows(tile, base, x, origin, row_stride, rows, slot, thread):
        """Start copying x's rows rows[slot:slot + count] to tile[base:]; row -1 is all zeros.

        `origin` and `row_stride` are bytes. The caller commits, waits and synchronises.
        """
        for turn in range(rounds):
            place = turn * threads + thread
            if place < total:
                r = place // pieces
                piece = place % pieces
                row = rows[slot + r]
                is_there = row >= 0
                offset = origin + row * row_stride + piece * 16
                if is_padded and piece > last_piece:
                    is_there = False
                copy_async_16(tile, base + r * pitch + piece * 8, x, offset, is_there)

    return gather_rows


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
        """Store the staged rows to x's rows rows[:count]; row -1 is none."""
        for turn in range(rounds):
            place = turn * threads + thread
            if place < total:
                r = place // pieces
                piece = place % pieces
                row = rows[r]
                if row >= 0:
                    store_16(
                        x,
                        origin + row * row_stride + piece * 16,
                        tile,
                        base + r * pitch + piece * 8,
                    )

    return stage_rows, scatter_rows
