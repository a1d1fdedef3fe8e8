"""Angular hashing in one kernel: rows in, buckets out, no products between them in memory.

About given centers (`run_angular_hash`) or means of the rows before (`run_past_hash`). Mirrors the
arguments of cuda/hash_angular.cu and cuda/hash_past.cu field by field. No backend verb: whoever
hashes asks `reason_against` first, and computes in its own library where there is a reason.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import TYPE_CHECKING

from scfa_core.backends.cupy_raw.loader import Kernel, get_kernel, multiprocessors, shared_limit

from scfa_core.hashing_checks import CENTER_ROWS, even_power

if TYPE_CHECKING:
    from scfa_core.arrays import DeviceArray

Constants = tuple[tuple[str, int], ...]

NAME = "scfa_hash_angular"
SOURCE = "hash_angular.cu"
PAST_NAME = "scfa_hash_past"
PAST_SOURCE = "hash_past.cu"
THREADS = 128  # of a block
MOST_DIRECTIONS = 64  # per round: what the accumulators hold
MOST_HEAD_DIM = 256
_ELEMENTS = {"float32": 0, "float16": 1, "bfloat16": 2}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_CHUNK = 32  # kChunk
_MOST_TILE, _LEAST_TILE = 1024, 128  # rows of a block
_MOST_GRID = 2**31 - 1
_PARAMS = struct.Struct("<QQQQqqq11i4x")
_PAST_PARAMS = struct.Struct("<9Qqqq10if4x")
_GROUP = 16  # kGroup: tiles


def constants(
    dtype: str, head_dim: int, n_directions: int, *, aligned: bool, threads: int = THREADS
) -> Constants:
    """What the kernel is compiled with; parts are bfloat16 (ELEMENT 2) whatever `dtype` is."""
    width = -(-head_dim // _CHUNK) * _CHUNK
    return (
        ("HEAD_DIM", width),
        ("HEAD_DIM_V", width),
        ("ELEMENT", 2),
        ("X_ELEMENT", _ELEMENTS[dtype]),
        ("BLOCKS", -(-n_directions // 8)),
        ("ALIGNED", int(aligned)),
        ("THREADS", threads),
    )


def past_constants(
    dtype: str, head_dim: int, n_directions: int, *, aligned: bool, even: bool
) -> Constants:
    """What the kernel about the past is compiled with."""
    threads = past_threads(n_directions)
    own = constants(dtype, head_dim, n_directions, aligned=aligned, threads=threads)
    return (*own, ("EVEN", int(even)))


def shared_bytes(head_dim: int, n_directions: int, rows: int) -> int:
    """Sizeof(Shared) of the kernel, and a row of products for each center of a tile of `rows`."""
    width, blocks = -(-head_dim // _CHUNK) * _CHUNK, -(-n_directions // 8)
    return 48 * width * blocks + 32 * blocks * (rows // CENTER_ROWS)


def past_tile_rows(n_directions: int) -> int:
    """Rows of a block (kTileRows)."""
    return 1024 if n_directions <= 8 else 512 if n_directions <= 16 else 256


def past_threads(n_directions: int) -> int:
    """Threads of such a block: twice as many for a long tile."""
    return 2 * THREADS if n_directions <= 8 else THREADS


def past_shared_bytes(head_dim: int, n_directions: int, *, even: bool) -> int:
    """Sizeof(Shared) of that kernel."""
    width, blocks = -(-head_dim // _CHUNK) * _CHUNK, -(-n_directions // 8)
    rows = past_tile_rows(n_directions)
    centers = rows // CENTER_ROWS
    size = 48 * width * blocks + 32 * rows * blocks
    size += centers * (4 * width + 32 * blocks + 4) + 64 * blocks * (centers + 1 if even else 1) + 8
    return -(-size // 16) * 16


def shipped_constants(*, past: bool = False) -> list[Constants]:
    """What a compile test must build: each element, alignment, one and many blocks and chunks."""
    cases = [("bfloat16", 64, 8, True), ("bfloat16", 20, 3, False), ("bfloat16", 256, 64, True)]
    cases += [("float16", 64, 8, True), ("float16", 128, 32, False), ("float32", 128, 32, True)]
    cases += [("float32", 256, 64, False), ("float32", 64, 8, True), ("bfloat16", 128, 16, True)]
    if not past:
        return [constants(*case[:3], aligned=case[3]) for case in cases]
    return [
        past_constants(*case[:3], aligned=case[3], even=even)
        for even in (False, True)
        for case in cases
    ]


def reason_against(
    dtype: str, head_dim: int, n_directions: int, device: int, *, past: bool = False
) -> str | None:
    """None if the kernel serves such rows on CUDA device `device`, otherwise why not."""
    from scfa_core.backends.cupy_raw import BACKEND, _card_reason

    if dtype not in _ELEMENTS:
        return f"it reads {', '.join(_ELEMENTS)}, got {dtype}"
    if not 1 <= head_dim <= MOST_HEAD_DIM or not 1 <= n_directions <= MOST_DIRECTIONS:
        return (
            f"it takes head_dim up to {MOST_HEAD_DIM} and {2 * MOST_DIRECTIONS} buckets, got "
            f"{head_dim} and {2 * n_directions}"
        )
    reason = BACKEND.availability() or _card_reason(device)
    least = shared_bytes(head_dim, n_directions, _LEAST_TILE)
    if past:
        least = past_shared_bytes(head_dim, n_directions, even=True)
    if reason is None and least > shared_limit(device):
        reason = "its directions do not fit the shared memory of this card"
    return reason


def is_aligned(x: DeviceArray) -> bool:
    """Whether every eight elements of a row can be read as 16 bytes."""
    size = _BYTES[x.dtype]
    steps = [s for s, n in zip(x.strides[:3], x.shape[:3], strict=True) if n > 1]
    return x.shape[3] % 8 == 0 and x.pointer % 16 == 0 and all(s * size % 16 == 0 for s in steps)


def tile_rows(lists: int, seqlen: int, processors: int) -> int:
    """Rows of a block: many, as each splits the directions anew, but blocks for the whole card."""
    rows = _MOST_TILE
    while rows > _LEAST_TILE and lists * -(-seqlen // rows) < 4 * processors:
        rows //= 2
    return rows


def pack(
    x: DeviceArray,
    directions: DeviceArray,
    center: DeviceArray | None,
    bucket: int,
    rows: int,
) -> tuple[int, bytes]:
    """Blocks of the grid, and HashParams; `bucket` is an address, `rows` those of a block."""
    batch, heads, seqlen, head_dim = x.shape
    rounds, own_heads, _, n_directions = directions.shape
    tiles = -(-seqlen // rows)
    center_heads, centers = 1, 0
    if center is not None:
        of_rows = len(center.shape) == 4
        center_heads, centers = center.shape[1:3] if of_rows else (center.shape[0], 0)
    params = _PARAMS.pack(
        x.pointer,
        directions.pointer,
        0 if center is None else center.pointer,
        bucket,
        *(stride * _BYTES[x.dtype] for stride in x.strides[:3]),
        *(batch, heads, own_heads, center_heads),
        *(seqlen, head_dim, n_directions, rounds, rows, tiles, centers),
    )
    return rounds * tiles * batch * heads, params


def past_room(
    batch: int, heads: int, seqlen: int, head_dim: int, n_directions: int, even_rounds: int
) -> int:
    """Words of 4 bytes that `run_past_hash` needs: sums of tiles and groups, flags, a ticket.

    With `even_rounds`, the rounds of which buckets are made even, their rows in each bucket too.
    """
    tiles = -(-seqlen // past_tile_rows(n_directions))
    records = batch * heads * (tiles + -(-tiles // _GROUP))
    fills = even_rounds * (2 * n_directions + 1)
    return records * (-(-head_dim // _CHUNK) * _CHUNK + 1 + fills) + 1


def pack_past(
    x: DeviceArray,
    directions: DeviceArray,
    start: DeviceArray,
    bucket: int,
    mean: int,
    room: int,
    *,
    even: bool,
) -> tuple[int, bytes]:
    """Blocks of the grid, and PastParams; `bucket`, `mean` and `room` are addresses."""
    batch, heads, seqlen, head_dim = x.shape
    rounds, own_heads, _, n_directions = directions.shape
    tiles = -(-seqlen // past_tile_rows(n_directions))
    groups = -(-tiles // _GROUP)
    records = batch * heads * (tiles + groups)
    flags = room + 4 * records * (-(-head_dim // _CHUNK) * _CHUNK)
    fills = flags + 4 * (records + 1)
    fill_flags = fills + 4 * rounds * records * 2 * n_directions
    params = _PAST_PARAMS.pack(
        *(x.pointer, directions.pointer, start.pointer, bucket, mean),
        *(room, flags, *((fills, fill_flags) if even else (0, 0))),
        *(stride * _BYTES[x.dtype] for stride in x.strides[:3]),
        *(batch, heads, own_heads, start.shape[0]),
        *(seqlen, head_dim, n_directions, rounds, tiles, groups),
        -even_power(2 * n_directions),
    )
    return tiles * batch * heads, params


@cache
def _kernel(name: str, source: str, values: Constants, device: int) -> Kernel:
    return get_kernel(name, source, values, device)


def _check_grid(x: DeviceArray, blocks: int) -> None:
    if blocks > _MOST_GRID:
        raise ValueError(f"{x.shape=} needs {blocks} blocks, at most {_MOST_GRID} can be launched")


def run_angular_hash(
    x: DeviceArray,
    directions: DeviceArray,
    center: DeviceArray | None,
    bucket: DeviceArray,
    stream: int,
) -> None:
    """Enqueue ``bucket = argmax [x @ R, -(x @ R)]`` on a raw stream; never waits.

    Parameters
    ----------
    x : DeviceArray, (batch, heads, seqlen, head_dim)
        Any strides, the last of them 1; `reason_against` said None.
    directions : DeviceArray, (rounds, heads or a divisor, head_dim, n), float32
        Contiguous, as `center` is.
    center : DeviceArray, float32, optional
        (heads or a divisor, head_dim), or (batch, heads or a divisor, ceil(seqlen / CENTER_ROWS),
        head_dim).
    bucket : DeviceArray, (rounds, batch, heads, seqlen), int32
        Contiguous; every element is written.
    stream : int
        Raw handle.
    """
    batch, heads, seqlen, head_dim = x.shape
    rounds, _, _, n_directions = directions.shape
    if batch * heads * seqlen * rounds == 0:
        return
    rows = tile_rows(batch * heads * rounds, seqlen, multiprocessors(x.device))
    while shared_bytes(head_dim, n_directions, rows) > shared_limit(x.device):
        rows //= 2
    blocks, params = pack(x, directions, center, bucket.pointer, rows)
    _check_grid(x, blocks)
    values = constants(x.dtype, head_dim, n_directions, aligned=is_aligned(x))
    kernel = _kernel(NAME, SOURCE, values, x.device)
    shared = shared_bytes(head_dim, n_directions, rows)
    kernel.launch((blocks, 1, 1), THREADS, shared, stream, params)


def run_past_hash(
    x: DeviceArray,
    directions: DeviceArray,
    start: DeviceArray,
    bucket: DeviceArray,
    mean: DeviceArray,
    room: DeviceArray,
    stream: int,
    *,
    even: bool,
) -> None:
    """Enqueue buckets about the mean of the rows before, and those means; never waits.

    Parameters
    ----------
    x, directions, bucket, stream
        As for `run_angular_hash`; `reason_against` with `past` said None.
    start : DeviceArray, (heads or a divisor, head_dim), float32
        Contiguous: what a sequence begins with.
    mean : DeviceArray, (batch, heads, ceil(seqlen / CENTER_ROWS), head_dim), float32
        Contiguous; every element is written.
    room : DeviceArray, (`past_room`,), int32
        Zeros; of no use afterwards.
    even : bool
        Give less to buckets that earlier rows filled.
    """
    batch, heads, seqlen, head_dim = x.shape
    rounds, _, _, n_directions = directions.shape
    if batch * heads * seqlen * rounds == 0:
        return
    results = bucket.pointer, mean.pointer, room.pointer
    blocks, params = pack_past(x, directions, start, *results, even=even)
    _check_grid(x, blocks)
    values = past_constants(x.dtype, head_dim, n_directions, aligned=is_aligned(x), even=even)
    kernel = _kernel(PAST_NAME, PAST_SOURCE, values, x.device)
    shared = past_shared_bytes(head_dim, n_directions, even=even)
    kernel.launch((blocks, 1, 1), past_threads(n_directions), shared, stream, params)
