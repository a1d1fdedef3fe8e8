"""Planner, only where several keep clauses meet: flags[...] = first[...] and second[...]."""

from __future__ import annotations

from functools import cache

from numba import cuda, uint8
from scfa_core.backends.numba_cuda.compiling import SIMULATED, Kernel, kernel

THREADS = 32 if SIMULATED else 256


@cache
def build_plan_and() -> Kernel:
    """One thread per row; `flags` may be `first`."""

    @kernel("uint8:3", "uint8:3", "uint8:3")
    def scfa_plan_and(first, second, flags):
        heads, seqlen = flags.shape[1], flags.shape[2]
        for place in range(cuda.grid(1), flags.shape[0] * heads * seqlen, cuda.gridsize(1)):
            row = place % seqlen
            h = place // seqlen % heads
            b = place // (seqlen * heads)
            flags[b, h, row] = uint8(first[b, h, row] != 0 and second[b, h, row] != 0)

    return scfa_plan_and
