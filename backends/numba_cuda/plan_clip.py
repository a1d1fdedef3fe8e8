"""Planner, only for KeyRanges: the tightest bound on key rows, clipped to the keys there are."""

from __future__ import annotations

from functools import cache

from numba import cuda, int64
from scfa_core.backends.numba_cuda.compiling import SIMULATED, Kernel, kernel

THREADS = 32 if SIMULATED else 256


@cache
def build_plan_clip(dtype: str) -> Kernel:
    """One thread per query row: limit = bound, or the tighter of the two unless `is_first`."""

    @kernel(f"{dtype}:3", "int32:3", "int64", "bool", "bool")
    def scfa_plan_clip(bound, limit, seqlen_k, is_end, is_first):
        heads, seqlen = limit.shape[1], limit.shape[2]
        for place in range(cuda.grid(1), limit.shape[0] * heads * seqlen, cuda.gridsize(1)):
            row = place % seqlen
            h = place // seqlen % heads
            b = place // (seqlen * heads)
            value = min(max(int64(bound[b, h, row]), int64(0)), int64(seqlen_k))
            if not is_first:
                before = int64(limit[b, h, row])
                value = min(before, value) if is_end else max(before, value)
            limit[b, h, row] = value

    return scfa_plan_clip
