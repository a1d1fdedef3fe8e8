"""Tile shapes of the Hopper (sm_90a) kernels, and the shared memory that each takes.

docs/perf/hopper.md says why they are what they are.
"""

from __future__ import annotations

from typing import NamedTuple

_SHARED_SLACK = 1024  # room to align the base to the swizzle period
MAX_GROUP = 16  # query heads of one kv head in the dk/dv kernel


class Shape(NamedTuple):
    """Tile shape of one kernel at one head_dim; docs/perf/hopper.md says why."""

    warpgroups: int  # multiplying ones, 64 rows each
    block_n: int  # keys (forward, dq) or queries (dk/dv) a step
    stages: int  # buffers of the streamed operands
    query_buffers: int  # buffers of the operands a tile keeps
    parts: int = 1  # warpgroups that share 64 keys, one for each gradient (dk/dv)
    gatherers: int = 1  # gathering warpgroups (dq, dk/dv)


CHUNK = 8  # columns one cp.async moves


class Shapes(dict[int, Shape]):
    """Shapes by columns of the shared tiles; any other head_dim has that of its tiles."""

    def width(self, head_dim: int) -> int:
        """Columns of the tiles that hold rows of `head_dim`; 0 if none are wide enough."""
        return min((width for width in self if width >= head_dim), default=0)

    def __missing__(self, head_dim: int) -> Shape:
        width = self.width(head_dim)
        if width == 0:
            raise KeyError(head_dim)
        return self[width]


FORWARD = Shapes(
    {
        64: Shape(3, 128, 4, 2),
        128: Shape(2, 128, 2, 2),
        192: Shape(2, 96, 2, 1),
        256: Shape(2, 80, 2, 1),
    }
)
DQ = Shapes(
    {
        64: Shape(2, 64, 6, 2, gatherers=2),
        128: Shape(2, 64, 3, 1),
        192: Shape(2, 64, 2, 1),
        256: Shape(2, 48, 2, 1),
    }
)
DKDV = Shapes(
    {
        64: Shape(2, 64, 11, 1, gatherers=2),
        128: Shape(2, 64, 3, 1),
        256: Shape(1, 48, 3, 1, parts=2),
    }
)
FUSED = {  # stages: of q and dout together, or at 128 of either; query_buffers: of dS
    64: Shape(2, 64, 4, 3),
    128: Shape(2, 64, 5, 2),
}
FUSED_KERNELS = {64: "bwd_fused_sm90", 128: "bwd_fused128_sm90"}
PREPARE = {head_dim: Shape(0, 64, 0, 0) for head_dim in FUSED}


def shape_of(shapes: dict[int, Shape], head_dim: int, monotone: bool) -> Shape:
    """A kernel's shape; over ranges in any order one warpgroup gathers, as two were slower."""
    shape = shapes[head_dim]
    return shape if monotone else shape._replace(gatherers=1)


def _forward_shared(head_dim: int, shape: Shape) -> int:
    """Bytes of dynamic shared memory of fwd_sm90.cu."""
    rows = 64 * shape.warpgroups
    streamed = 2 * shape.stages * shape.block_n
    tiles = 2 * FORWARD.width(head_dim) * (shape.query_buffers * rows + streamed)
    staged = int(shape.query_buffers > 1)  # one tile's rows ahead
    data = (shape.query_buffers + staged) * (12 * rows + 16)
    barriers = 8 * (2 * shape.query_buffers + 4 * shape.stages + staged)
    return tiles + data + 128 + barriers + _SHARED_SLACK


def _dq_shared(head_dim: int, shape: Shape) -> int:
    """Bytes of dynamic shared memory of bwd_dq_sm90.cu."""
    rows = 64 * shape.warpgroups
    streamed = 2 * shape.stages * shape.block_n
    kept, emptied = (3, 1) if DQ.width(head_dim) <= 128 else (2, 2)  # of q, dout, out; of k, v
    tiles = 2 * DQ.width(head_dim) * (kept * shape.query_buffers * rows + streamed)
    data = shape.query_buffers * (20 * rows + 16)
    barriers = 8 * (2 * shape.query_buffers + (1 + emptied) * shape.stages)
    return tiles + data + 64 + barriers


def _dkdv_shared(head_dim: int, shape: Shape) -> int:
    """Bytes of dynamic shared memory of bwd_dkdv_sm90.cu."""
    tiles = 4 * DKDV.width(head_dim) * (64 * shape.warpgroups + shape.stages * shape.block_n)
    data = 16 * shape.stages * shape.block_n + 16 * MAX_GROUP * shape.warpgroups
    handed_over = 4 * 64 * shape.block_n if shape.parts > 1 else 0
    barriers = 8 * (2 + 2 * shape.stages + (2 if shape.parts > 1 else 0))
    return tiles + data + handed_over + 16 + barriers + _SHARED_SLACK


def _fused_shared(head_dim: int, shape: Shape) -> int:
    """Bytes of dynamic shared memory of bwd_fused_sm90.cu."""
    rows, change_buffers = 64 * shape.warpgroups, shape.query_buffers
    tiles = 2 * head_dim * (2 * 2 * rows + 2 * shape.stages * shape.block_n)
    changes = change_buffers * (2 * rows * shape.block_n + 32)
    sums = 2 * (4 * shape.block_n * head_dim + 8)
    data = 16 * shape.stages * shape.block_n + 32 * MAX_GROUP + 16
    barriers = 2 * (2 + change_buffers + 2 + shape.stages) + 2
    return tiles + changes + sums + data + 8 * barriers + _SHARED_SLACK


def _fused128_shared(head_dim: int, shape: Shape) -> int:
    """Bytes of dynamic shared memory of bwd_fused128_sm90.cu."""
    rows, change_buffers = 64 * shape.warpgroups, shape.query_buffers
    tiles = 2 * head_dim * (2 * rows + shape.stages * shape.block_n)
    changes = change_buffers * 2 * rows * shape.block_n
    sums = 4 * shape.block_n * head_dim
    data = 3 * 16 * shape.block_n + 32 * MAX_GROUP + 2 * 16 + 16
    barriers = 2 + 2 * change_buffers + 4 * 2 + 1 + 2 * shape.stages
    return tiles + changes + sums + data + 8 * barriers + _SHARED_SLACK


WIDTHS = {"fwd_sm90": FORWARD, "bwd_dq_sm90": DQ, "bwd_dkdv_sm90": DKDV}
TABLES: dict[str, dict[int, Shape]] = {  # every kernel with a tile shape
    **WIDTHS,
    **{name: {head_dim: FUSED[head_dim]} for head_dim, name in FUSED_KERNELS.items()},
    "bwd_prepare_sm90": PREPARE,
}
SHARED = {
    "fwd_sm90": _forward_shared,
    "bwd_dq_sm90": _dq_shared,
    "bwd_dkdv_sm90": _dkdv_shared,
    "bwd_fused_sm90": _fused_shared,
    "bwd_fused128_sm90": _fused128_shared,
    "bwd_prepare_sm90": lambda head_dim, shape: 0,
}  # each kernel compares it with its own layout when compiled


def tiles_of(rows: int, per_tile: int, heads: int) -> tuple[int, int]:
    """Tiles of one head, and of all."""
    per_head = -(-rows // per_tile)
    return per_head, per_head * heads


def threads_of(name: str, shape: Shape) -> int:
    """Threads of a block of a kernel with multiplying warpgroups."""
    others = 2 if name == "bwd_fused_sm90" else shape.gatherers  # that do not multiply keys
    return 128 * (shape.warpgroups * shape.parts + others)


def may_run(name: str, shape: Shape) -> bool:
    """Whether a kernel fetches runs of rows by tensor maps (runs_sm90.cuh): 32 rows a warp."""
    return name in FUSED_KERNELS.values() or (name == "fwd_sm90" and shape.block_n == 128)
