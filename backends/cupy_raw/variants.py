"""Which tile shapes the portable kernels are compiled with, and how much shared memory that takes.

One table: for each kernel, by the wider of head_dim and head_dim_v, shapes in order of preference;
the first is taken of which the card holds as many blocks at once as the shape hopes for, otherwise
the first that fits at all. Nothing here needs a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

Constants = tuple[tuple[str, int], ...]

ELEMENTS = {"float32": 0, "float16": 1, "bfloat16": 2, "tf32": 3}  # SCFA_ELEMENT
SHARED_LIMITS = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}
SMALLEST_SHARED = min(SHARED_LIMITS.values())  # bytes a block may have
_RESERVED = 1024  # bytes of each block that the system keeps; a multiprocessor has one more
_ROW_BYTES = 128  # kRowBytes: one row of one panel
_MEMBER_BYTES = 32  # sizeof(Member) of bwd_dkdv.cu
WIDEST_TF32 = 128  # head_dim up to which float32 has kernels for tensor cores


class Shape(NamedTuple):
    """Tile shape of one kernel."""

    block_m: int  # query rows of a tile
    block_n: int  # keys of a tile
    warps: int
    sub: int = 0  # streamed rows taken at a time: queries in dkdv, keys in dq, masked keys in fwd
    stages: int = 2  # buffers of the streamed tiles
    own_in_registers: int = 0  # keep the owned operands in registers
    split: int = 0  # dkdv: dv and dk in two passes
    min_blocks: int = 2  # blocks per multiprocessor the register budget aims at


# kernel -> ((widest head, (shape, ...)), ...); docs/perf/log.md has the measurements
_SHAPES: dict[str, tuple[tuple[int, tuple[Shape, ...]], ...]] = {
    "fwd": (
        (
            64,
            (
                Shape(128, 128, 4, sub=32),
                Shape(128, 96, 4, sub=32),
                Shape(128, 32, 4, sub=32, own_in_registers=1),
            ),
        ),
        (128, (Shape(128, 48, 4, sub=48), Shape(128, 32, 4, sub=32))),
        (256, (Shape(64, 32, 4, sub=32),)),
    ),
    "bwd_dq": (
        (64, (Shape(128, 64, 4, sub=64),)),
        (128, (Shape(128, 32, 4, sub=32),)),
        (256, (Shape(64, 32, 4, sub=32, min_blocks=1), Shape(64, 16, 4, sub=16))),
    ),
    "bwd_dkdv": (
        (64, (Shape(128, 128, 4, sub=32), Shape(64, 128, 4, sub=32))),
        (128, (Shape(64, 64, 4, sub=32, own_in_registers=1), Shape(32, 64, 4, sub=32))),
        (
            256,
            (
                Shape(32, 64, 4, sub=32, split=1, min_blocks=1),
                Shape(16, 64, 4, sub=16, split=1),
            ),
        ),
    ),
    "fwd_few": (
        (64, (Shape(16, 64, 4, own_in_registers=1, min_blocks=4),)),
        (128, (Shape(16, 64, 4, own_in_registers=1, min_blocks=3),)),
        (256, (Shape(16, 64, 4), Shape(16, 32, 2))),
    ),
    "fwd_tf32": (
        (64, (Shape(128, 64, 4, sub=32), Shape(128, 32, 4, sub=32))),
        (128, (Shape(128, 16, 4, sub=16),)),
    ),
    "bwd_dq_tf32": (
        (64, (Shape(128, 32, 4, sub=32), Shape(64, 32, 4, sub=32, own_in_registers=1))),
        (128, (Shape(64, 16, 4, sub=16, own_in_registers=1),)),
    ),
    "bwd_dkdv_tf32": (
        (64, (Shape(32, 128, 4, sub=32), Shape(32, 64, 4, sub=32, own_in_registers=1))),
        (128, (Shape(16, 64, 4, sub=16, min_blocks=1), Shape(16, 32, 2, sub=16))),
    ),
    "fwd_fp32": ((128, (Shape(64, 32, 8),)), (256, (Shape(32, 32, 8),))),
    "bwd_dq_fp32": ((128, (Shape(32, 32, 8),)), (256, (Shape(16, 16, 8),))),
    "bwd_dkdv_fp32": ((128, (Shape(32, 32, 8),)), (256, (Shape(16, 16, 8),))),
}


class Variant(NamedTuple):
    """One kernel as it is compiled and launched."""

    name: str  # of the symbol
    source: str
    constants: Constants
    shape: Shape
    threads: int
    shared_bytes: int  # for one query head per kv head
    shared_per_head: int  # more for each further one

    def shared(self, group_size: int) -> int:
        """Bytes of dynamic shared memory of a block."""
        return self.shared_bytes + self.shared_per_head * (group_size - 1)


def _tile(rows: int, dim: int, itemsize: int) -> int:
    """Bytes of a swizzled tile: tile_bytes of copy.cuh."""
    return -(-dim * itemsize // _ROW_BYTES) * rows * _ROW_BYTES


def _shared_bytes(kernel: str, shape: Shape, dim: int, dim_v: int) -> int:
    """Sizeof(Shared) of the kernel, rounded up; a static_assert there compares."""
    m, n, stages = shape.block_m, shape.block_n, shape.stages
    itemsize = 4 if kernel.endswith("_tf32") else 2
    keys, queries = (_tile(rows, dim, itemsize) + _tile(rows, dim_v, itemsize) for rows in (n, m))
    own = _tile(m, max(dim, dim_v), itemsize)
    floats, floats_v = dim + 4, dim_v + 4
    size = {
        "fwd": own + stages * (keys + 4 * n) + 13 * m + 16 * shape.warps + 40,
        "fwd_few": _tile(m, dim, itemsize)
        + stages * (keys + 16 * n)
        + 24 * m
        + 8 * shape.warps * m
        + 48,
        "bwd_dq": queries + stages * (keys + 4 * n) + 21 * m + 16 * shape.warps + 40,
        "bwd_dkdv": keys + stages * (queries + 20 * m + 16) + 5 * n + 16 + _MEMBER_BYTES,
        "fwd_fp32": 4 * (m * floats + n * max(floats, floats_v) + m * (n + 1)) + 13 * m,
        "bwd_dq_fp32": 4 * ((m + n) * (floats + floats_v) + m * (n + 1) + 256) + 21 * m,
        "bwd_dkdv_fp32": 4 * ((m + n) * (floats + floats_v) + 2 * n * (m + 1) + 512) + 16 * m + n,
    }[kernel.removesuffix("_tf32")]
    return -(-size // 16) * 16


@cache
def choose(
    kernel: str,
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    *,
    aligned: bool,
    monotone: bool,
    group_size: int,
    shared_limit: int,
) -> Variant:
    """Return the variant of `kernel` ("fwd", "fwd_few", "bwd_dq", "bwd_dkdv") for one problem.

    Parameters
    ----------
    dtype : str
        Of `ELEMENTS`. "tf32" is float32 whose products may be TF32; those of heads wider than
        `WIDEST_TF32` stay exact.
    aligned : bool
        Every row of every array starts at a multiple of 16 bytes.
    monotone : bool
        Of the plan; only dkdv looks.
    shared_limit : int
        Bytes of shared memory a block may have on the card.
    """
    width = max(head_dim, head_dim_v)
    if dtype == "tf32" and width > WIDEST_TF32:
        dtype = "float32"
    kernel += {"float32": "_fp32", "tf32": "_tf32"}.get(dtype, "")
    shapes = next(shapes for widest, shapes in _SHAPES[kernel] if width <= widest)
    found = [
        _variant(kernel, shape, dtype, head_dim, head_dim_v, aligned, monotone) for shape in shapes
    ]
    fitting = [variant for variant in found if variant.shared(group_size) <= shared_limit]
    resident = [
        variant
        for variant in fitting
        if variant.shape.min_blocks * (variant.shared(group_size) + _RESERVED)
        <= shared_limit + _RESERVED
    ]
    return (resident or fitting or found)[0]


def _variant(
    kernel: str,
    shape: Shape,
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    aligned: bool,
    monotone: bool,
) -> Variant:
    """Spell out the constants of one shape."""
    shared = _shared_bytes(kernel, shape, head_dim, head_dim_v)
    tensor_cores = dtype != "float32"
    kernel = kernel.removesuffix("_tf32")  # by the source of the 16-bit kernels
    values = {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "ELEMENT": ELEMENTS[dtype],
        "ALIGNED": int(aligned),
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "SHARED_BYTES": shared,
    }
    if tensor_cores:
        values |= {
            "NUM_WARPS": shape.warps,
            "STAGES": shape.stages,
            "OWN_IN_REGISTERS": shape.own_in_registers,
            "MIN_BLOCKS": shape.min_blocks,
        }
        if shape.sub:
            values["SUB_M" if kernel == "bwd_dkdv" else "SUB_N"] = shape.sub
    if kernel.startswith("bwd_dkdv"):
        values["MONOTONE"] = int(monotone)
        if tensor_cores:
            values["SPLIT"] = shape.split
    return Variant(
        f"scfa_{kernel}",
        f"{kernel}.cu",
        tuple(values.items()),
        shape,
        32 * shape.warps,
        shared,
        _MEMBER_BYTES if kernel == "bwd_dkdv" else 0,
    )


def shipped_variants(shared_limit: int = SMALLEST_SHARED) -> list[Variant]:
    """Return what a compile test must build for a card with `shared_limit` (see `SHARED_LIMITS`).

    Every shape the card can get, every element type and every special case, each once.

    Any other head_dim differs from one of these only in loop counts.
    """
    cases = [
        (dtype, dim, dim, True, True)
        for dtype, dims in (
            ("bfloat16", (16, 40, 64, 72, 128, 136, 192, 256)),
            ("float16", (64, 128, 256)),
            ("float32", (16, 64, 128, 256)),
            ("tf32", (16, 40, 64, 72, 128)),
        )
        for dim in dims
    ]
    cases += [("tf32", 64, 64, False, True), ("tf32", 128, 24, True, False)]
    cases += [("bfloat16", 64, 64, False, True), ("float32", 64, 64, False, True)]
    cases += [("bfloat16", 64, 64, True, False), ("bfloat16", 192, 128, True, True)]
    cases += [("bfloat16", 24, 256, True, True), ("bfloat16", 128, 128, False, False)]
    return list(
        dict.fromkeys(
            choose(
                kernel,
                dtype,
                head_dim,
                head_dim_v,
                aligned=aligned,
                monotone=monotone,
                group_size=1,
                shared_limit=shared_limit,
            )
            for dtype, head_dim, head_dim_v, aligned, monotone in cases
            for kernel in ("fwd", "fwd_few", "bwd_dq", "bwd_dkdv")
            if kernel != "fwd_few" or dtype in ("float16", "bfloat16")
        )
    )
