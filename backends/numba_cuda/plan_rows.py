"""Planner, only where a side has neither keeps nor groups: all rows in their order."""

from __future__ import annotations

from functools import cache

from numba import cuda
from scfa_core.backends.numba_cuda.compiling import SIMULATED, Kernel, kernel

THREADS = 32 if SIMULATED else 256
TILE = 16 * THREADS  # rows of a block


def tiles_of(rows: int) -> int:
    """Blocks of a list; an empty one has one, which writes its count."""
    return max(1, -(-rows // TILE))


@cache
def build_plan_rows() -> Kernel:
    """One block per tile of a list: index[b, h, row] = row."""

    @kernel("int32:3", "int32:2", "int64")
    def scfa_plan_rows(index, count, tiles):
        heads, seqlen = index.shape[1], index.shape[2]
        id = cuda.blockIdx.x // tiles
        b = id // heads
        h = id % heads
        first = cuda.blockIdx.x % tiles * TILE
        for row in range(first + cuda.threadIdx.x, min(first + TILE, seqlen), THREADS):
            index[b, h, row] = row
        if first + cuda.threadIdx.x == 0:
            count[b, h] = seqlen

    return scfa_plan_rows
