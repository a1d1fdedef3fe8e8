"""The one argument of the portable kernels: struct Params of cuda/params.cuh, field by field.

Pointers change from call to call; the rest depends on shapes and strides alone and is packed once.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scfa_core.problem import Problem

LOG2_E = 1.4426950408889634
SMALLEST_EXPONENT_SCALE = 1e-30  # keeps -inf * scale at -inf where the scale is 0

# q k v out lse dout dq dk dv row_lse delta q_index k_index k_count key_start key_end
POINTERS = struct.Struct("<16Q")
_STRIDES = struct.Struct("<3q")
_TAIL = struct.Struct("<6i3fi")
_NO_STRIDES = bytes(_STRIDES.size)


def pack_strides(arrays: Sequence[tuple[int, ...] | None]) -> bytes:
    """Strides in elements of q k v out lse dout dq dk dv; None where the kernel does not look."""
    return b"".join(_NO_STRIDES if x is None else _STRIDES.pack(*x[:3]) for x in arrays)


def pack_sizes(problem: Problem) -> bytes:
    """Sizes and scales."""
    scale_log2 = problem.softmax_scale * LOG2_E
    return _TAIL.pack(
        problem.batch,
        problem.heads,
        problem.heads_kv,
        problem.group_size,
        problem.seqlen_q,
        problem.seqlen_k,
        problem.softmax_scale,
        scale_log2,
        max(abs(scale_log2), SMALLEST_EXPONENT_SCALE),
        int(problem.softmax_scale < 0),
    )
