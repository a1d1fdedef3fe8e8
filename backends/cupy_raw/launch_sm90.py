"""The Hopper (sm_90a) kernels: what they serve, in which tile shapes, with which arguments.

`bound_sm90` launches them. Every other problem is answered "not served" and runs on the portable
kernels of `launch.py`.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from scfa_core.backends.cupy_raw.loader import Kernel, compute_capability, get_kernel
from scfa_core.backends.cupy_raw.params import LOG2_E, SMALLEST_EXPONENT_SCALE

if TYPE_CHECKING:
    from scfa_core.arrays import DeviceArray
    from scfa_core.plan import PlanArrays
    from scfa_core.problem import Problem

__all__ = ["supports_backward", "supports_forward"]

_LOG = logging.getLogger("scfa_core")
_ALIGNMENT = 16  # bytes one cp.async moves
_SHARED_SLACK = 1024  # room to align the base to the swizzle period
_MULTIPROCESSORS = 16  # cudaDevAttrMultiProcessorCount
_INT_MAX = 2**31 - 1
_PARAMS = struct.Struct("<" + 9 * "Qqqii" + "9Q2f8i6I" + "2Q2i6I4Q")  # struct Params
_MAX_GROUP = 16  # query heads of one kv head in the dk/dv kernel
_SUM_ROWS = 64  # query rows of one dq tile in the fused kernel
_SUM_BYTES = 32 << 20  # for sums of dq; they should stay in L2
_SUM_BYTES_PER_ROW = 8  # and so much more for each query row
# head_dim -> keys of a query tile from which "auto" takes the fused kernel, which is faster then
# (hopper.md); a head_dim that is not here goes the split way unless told otherwise
_LONG_KEYS = {64: 340, 128: 6144}
_PREPARE_BLOCKS = 8  # of the preparing kernels, for each multiprocessor
_CHOICE_WORDS = 8  # before those of the heads: choice_sm90.cuh
_CHOICE_COUNTERS = 2  # the first of three tile counters among them


class Sums(NamedTuple):
    """Room of the fused kernel for sums of dq: addresses, heads with room, tiles of one head."""

    dq_sum: int
    added: int
    slots: int
    query_tiles: int


_NO_SUMS = Sums(0, 0, 1, 1)


def _record_words(problem: Problem) -> int:
    """Words of a key tile's record (bwd_fused_sm90_tiles.cuh): seen keys, bounds of its heads."""
    return 4 + 2 * problem.group_size


class Shape(NamedTuple):
    """Tile shape of one kernel at one head_dim; docs/perf/hopper.md says why."""

    warpgroups: int  # multiplying ones, 64 rows each
    block_n: int  # keys (forward, dq) or queries (dk/dv) a step
    stages: int  # buffers of the streamed operands
    query_buffers: int  # buffers of the operands a tile keeps
    parts: int = 1  # warpgroups that share 64 keys, one for each gradient (dk/dv)
    gatherers: int = 1  # gathering warpgroups (dq, dk/dv)


_CHUNK = 8  # columns one cp.async moves


class _Shapes(dict[int, Shape]):
    """Shapes by columns of the shared tiles; any other head_dim has that of its tiles."""

    def width(self, head_dim: int) -> int:
        """Columns of the tiles that hold rows of `head_dim`; 0 if none are wide enough."""
        return min((width for width in self if width >= head_dim), default=0)

    def __missing__(self, head_dim: int) -> Shape:
        width = self.width(head_dim)
        if width == 0:
            raise KeyError(head_dim)
        return self[width]


_FORWARD = _Shapes(
    {
        64: Shape(3, 128, 4, 2),
        128: Shape(2, 128, 2, 2),
        192: Shape(2, 96, 2, 1),
        256: Shape(2, 80, 2, 1),
    }
)
_DQ = _Shapes(
    {
        64: Shape(2, 64, 6, 2, gatherers=2),
        128: Shape(2, 64, 3, 1),
        192: Shape(2, 64, 2, 1),
        256: Shape(2, 48, 2, 1),
    }
)
_DKDV = _Shapes(
    {
        64: Shape(2, 64, 11, 1, gatherers=2),
        128: Shape(2, 64, 3, 1),
        256: Shape(1, 48, 3, 1, parts=2),
    }
)
_FUSED = {  # stages: of q and dout together, or at 128 of either; query_buffers: of dS
    64: Shape(2, 64, 4, 3),
    128: Shape(2, 64, 5, 2),
}
_FUSED_KERNELS = {64: "bwd_fused_sm90", 128: "bwd_fused128_sm90"}
_PREPARE = {head_dim: Shape(0, 64, 0, 0) for head_dim in _FUSED}


def _shape_of(shapes: dict[int, Shape], head_dim: int, monotone: bool) -> Shape:
    """A kernel's shape; over ranges in any order one warpgroup gathers, as two were slower."""
    shape = shapes[head_dim]
    return shape if monotone else shape._replace(gatherers=1)


def _forward_shared(head_dim: int, shape: Shape) -> int:
    """Bytes of dynamic shared memory of fwd_sm90.cu."""
    rows = 64 * shape.warpgroups
    streamed = 2 * shape.stages * shape.block_n
    tiles = 2 * _FORWARD.width(head_dim) * (shape.query_buffers * rows + streamed)
    data = shape.query_buffers * (12 * rows + 16)
    barriers = 8 * (2 * shape.query_buffers + 4 * shape.stages)
    return tiles + data + 64 + barriers + _SHARED_SLACK


def _dq_shared(head_dim: int, shape: Shape) -> int:
    """Bytes of dynamic shared memory of bwd_dq_sm90.cu."""
    rows = 64 * shape.warpgroups
    streamed = 2 * shape.stages * shape.block_n
    kept, emptied = (3, 1) if _DQ.width(head_dim) <= 128 else (2, 2)  # of q, dout, out; of k, v
    tiles = 2 * _DQ.width(head_dim) * (kept * shape.query_buffers * rows + streamed)
    data = shape.query_buffers * (20 * rows + 16)
    barriers = 8 * (2 * shape.query_buffers + (1 + emptied) * shape.stages)
    return tiles + data + 64 + barriers


def _dkdv_shared(head_dim: int, shape: Shape) -> int:
    """Bytes of dynamic shared memory of bwd_dkdv_sm90.cu."""
    tiles = 4 * _DKDV.width(head_dim) * (64 * shape.warpgroups + shape.stages * shape.block_n)
    data = 16 * shape.stages * shape.block_n + 16 * _MAX_GROUP * shape.warpgroups
    handed_over = 4 * 64 * shape.block_n if shape.parts > 1 else 0
    barriers = 8 * (2 + 2 * shape.stages + (2 if shape.parts > 1 else 0))
    return tiles + data + handed_over + 16 + barriers + _SHARED_SLACK


def _fused_shared(head_dim: int, shape: Shape) -> int:
    """Bytes of dynamic shared memory of bwd_fused_sm90.cu."""
    rows, change_buffers = 64 * shape.warpgroups, shape.query_buffers
    tiles = 2 * head_dim * (2 * 2 * rows + 2 * shape.stages * shape.block_n)
    changes = change_buffers * (2 * rows * shape.block_n + 32)
    sums = 2 * (4 * shape.block_n * head_dim + 8)
    data = 16 * shape.stages * shape.block_n + 16 * _MAX_GROUP + 16
    barriers = 2 * (2 + change_buffers + 2 + shape.stages)
    return tiles + changes + sums + data + 8 * barriers + _SHARED_SLACK


def _fused128_shared(head_dim: int, shape: Shape) -> int:
    """Bytes of dynamic shared memory of bwd_fused128_sm90.cu."""
    rows, change_buffers = 64 * shape.warpgroups, shape.query_buffers
    tiles = 2 * head_dim * (2 * rows + shape.stages * shape.block_n)
    changes = change_buffers * 2 * rows * shape.block_n
    sums = 4 * shape.block_n * head_dim
    data = 3 * 16 * shape.block_n + 16 * _MAX_GROUP + 2 * 16 + 16
    barriers = 2 + 2 * change_buffers + 4 * 2 + 1 + 2 * shape.stages
    return tiles + changes + sums + data + 8 * barriers + _SHARED_SLACK


_WIDTHS = {"fwd_sm90": _FORWARD, "bwd_dq_sm90": _DQ, "bwd_dkdv_sm90": _DKDV}
_TABLES: dict[str, dict[int, Shape]] = {  # every kernel with a tile shape
    **_WIDTHS,
    **{name: {head_dim: _FUSED[head_dim]} for head_dim, name in _FUSED_KERNELS.items()},
    "bwd_prepare_sm90": _PREPARE,
}
_SHARED = {
    "fwd_sm90": _forward_shared,
    "bwd_dq_sm90": _dq_shared,
    "bwd_dkdv_sm90": _dkdv_shared,
    "bwd_fused_sm90": _fused_shared,
    "bwd_fused128_sm90": _fused128_shared,
    "bwd_prepare_sm90": lambda head_dim, shape: 0,
}  # each kernel compares it with its own layout when compiled


def _unserved(shapes: _Shapes, problem: Problem, *arrays: DeviceArray) -> str | None:
    """Why the kernels with these shapes do not serve the call, or None."""
    if compute_capability(arrays[0].device) != (9, 0):
        return "not a Hopper card"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"dtype {problem.dtype}"
    served = shapes.width(problem.head_dim) and problem.head_dim % _CHUNK == 0
    if not served or problem.head_dim_v != problem.head_dim:
        return f"head_dim {problem.head_dim}, head_dim_v {problem.head_dim_v}"
    if not problem.softmax_scale >= SMALLEST_EXPONENT_SCALE:
        return "softmax_scale not positive, or too small for -inf times it"
    for array in arrays:
        steps = [2 * stride for stride in array.strides[:-1]]
        if array.pointer % _ALIGNMENT or any(step % _ALIGNMENT for step in steps):
            return "rows not 16-byte aligned"
        if not 0 <= steps[-1] <= _INT_MAX:
            return "row stride of 2 GiB or more"
    return None


def _serves(what: str, shapes: _Shapes, problem: Problem, *arrays: DeviceArray) -> bool:
    reason = _unserved(shapes, problem, *arrays)
    if reason is not None:
        _LOG.debug("%s: portable kernels (%s)", what, reason)
    return reason is None


def supports_forward(
    problem: Problem, q: DeviceArray, k: DeviceArray, v: DeviceArray, plan: PlanArrays
) -> bool:
    """Tell whether the kernel of `bound_sm90.bind_forward` serves this call."""
    return _serves("forward", _FORWARD, problem, q, k, v)


def supports_backward(
    problem: Problem,
    dout: DeviceArray,
    q: DeviceArray,
    k: DeviceArray,
    v: DeviceArray,
    out: DeviceArray,
    plan: PlanArrays,
) -> bool:
    """Tell whether the kernels of `bound_sm90.bind_backward` serve this call."""
    if problem.group_size > _MAX_GROUP:
        _LOG.debug("backward: portable kernels (%d heads to a key head)", problem.group_size)
        return False
    return _serves("backward", _DQ, problem, dout, q, k, v, out)


def _array(array: DeviceArray | None, itemsize: int) -> tuple[int, int, int, int, int]:
    """Fields of struct Array: address, byte strides, padding; absent arrays are null."""
    if array is None:
        return (0, 0, 0, 0, 0)
    batch, head, row = (stride * itemsize for stride in array.strides[:3])
    return (array.pointer, batch, head, row, 0)


@cache
def _divisor(number: int) -> tuple[int, int]:
    """Multiplier and shift with n // number == n * multiplier >> shift for all 0 <= n < 2**31."""
    shift = 31 + (number - 1).bit_length()
    return -(-(1 << shift) // number), shift


def _params(
    problem: Problem,
    plan: PlanArrays,
    arrays: tuple[DeviceArray | None, ...],
    lse: DeviceArray,
    row_stats: tuple[int, int],
    counter: int,
    tiles: tuple[int, int],
    heads: int,
    sums: Sums = _NO_SUMS,
    choice: int = 0,
    envelopes: tuple[int, int] = (0, 0),
    key_tiles: int = 0,
) -> bytes:
    """Pack struct Params of params_sm90.cuh.

    `arrays` are q, k, v, out, dout, dq, dk, dv; `heads` are those the tiles belong to; `choice`
    is the address of the words of choice_sm90.cuh, 0 where there is no choice; `envelopes` are
    those of starts and of ends, where ranges lie in any order; `key_tiles` is that of the fused
    kernels' records of key tiles.
    """
    lists = (plan.q_index, plan.q_count, plan.k_index, plan.k_count, plan.key_start, plan.key_end)
    scale, per_head = problem.softmax_scale, tiles[0]
    return _PARAMS.pack(
        *(field for array in arrays for field in _array(array, 2)),
        *_array(lse, 4),
        *(array.pointer for array in lists),
        *(*row_stats, counter),
        *(scale, scale * LOG2_E),
        *(problem.heads, problem.heads_kv, problem.group_size),
        *(problem.seqlen_q, problem.seqlen_k),
        *(*tiles, 0),
        *(*_divisor(per_head), *_divisor(heads), *_divisor(problem.group_size)),
        *sums,
        *(*_divisor(sums.query_tiles), *_divisor(problem.heads), *_divisor(sums.slots)),
        choice,
        *envelopes,
        key_tiles,
    )


@cache
def _multiprocessors(device: int) -> int:
    from cupy.cuda import runtime

    return int(runtime.deviceGetAttribute(_MULTIPROCESSORS, device))


@cache
def _runtime() -> Any:
    import cupy

    return cupy.cuda.runtime


def _zero(pointer: int, size: int, stream: int, device: int) -> None:
    """Enqueue a memset on a stream of `device`, whichever device the caller's thread is on."""
    runtime = _runtime()
    if runtime.getDevice() == device:
        runtime.memsetAsync(pointer, 0, size, stream)
        return
    import cupy

    with cupy.cuda.Device(device):
        runtime.memsetAsync(pointer, 0, size, stream)


@cache
def _kernel(
    name: str, device: int, dtype: str, head_dim: int, shape: Shape, monotone: bool = True
) -> Kernel:
    """The compiled variant of one kernel; of ranges in any order unless they are `monotone`."""
    constants = (
        ("BFLOAT16", int(dtype == "bfloat16")),
        ("HEAD_DIM", _WIDTHS[name].width(head_dim) if name in _WIDTHS else head_dim),
        ("COLUMNS", head_dim),
        ("BLOCK_N", shape.block_n),
        ("WARPGROUPS", shape.warpgroups),
        ("STAGES", shape.stages),
        ("QUERY_BUFFERS", shape.query_buffers),
        ("PARTS", shape.parts),
        ("GATHERERS", shape.gatherers),
        ("MONOTONE", int(monotone)),
        ("CHOICE", int(monotone and head_dim in _LONG_KEYS)),
        ("SHARED_BYTES", _SHARED[name](head_dim, shape)),
    )
    return get_kernel(f"scfa_{name}", f"{name}.cu", constants, device, arch_suffix="a")


@cache
def _envelope_kernel(device: int) -> Kernel:
    """The kernel that makes envelopes of ranges in any order."""
    return get_kernel("scfa_bwd_envelope_sm90", "bwd_envelope_sm90.cu", (), device, arch_suffix="a")


@cache
def _key_tiles_kernel(device: int) -> Kernel:
    """The kernel that finds out what the fused ones need to know of key tiles."""
    return get_kernel(
        "scfa_bwd_key_tiles_sm90", "bwd_key_tiles_sm90.cu", (), device, arch_suffix="a"
    )


@cache
def _choose_kernel(device: int, head_dim: int) -> Kernel:
    """The kernel that chooses between the two ways of the backward."""
    constants = (("LONG_KEYS", _LONG_KEYS[head_dim]),)
    return get_kernel(
        "scfa_bwd_choose_sm90", "bwd_choose_sm90.cu", constants, device, arch_suffix="a"
    )


def _tiles(rows: int, per_tile: int, heads: int) -> tuple[int, int]:
    """Tiles of one head, and of all."""
    per_head = -(-rows // per_tile)
    return per_head, per_head * heads


def _threads(name: str, shape: Shape) -> int:
    """Threads of a block of a kernel with multiplying warpgroups."""
    others = 2 if name == "bwd_fused_sm90" else shape.gatherers  # that do not multiply keys
    return 128 * (shape.warpgroups * shape.parts + others)


def _persistent(
    kernel: Kernel, device: int, shape: Shape, shared: int, tiles: int
) -> Callable[[int, bytes], None]:
    """One persistent block per multiprocessor, or fewer if there are fewer tiles."""
    blocks = min(tiles, _multiprocessors(device))
    threads = _threads(kernel.name.removeprefix("scfa_"), shape)
    return kernel.bind((blocks, 1, 1), threads, shared)


def _sums_fit(problem: Problem) -> bool:
    """Whether sums of dq of one key head's query heads fit into the room their own rows give.

    A block may wait for any earlier key head, so these are the least. Neither batch nor the number
    of key heads counts: which kernels run must not depend on what else is in the call.
    """
    rows = problem.group_size * problem.seqlen_q
    tiles = problem.group_size * -(-problem.seqlen_q // _SUM_ROWS)
    room = _SUM_BYTES + _SUM_BYTES_PER_ROW * rows
    return 4 * tiles * _SUM_ROWS * problem.head_dim <= room


def _sum_slots(problem: Problem) -> int:
    """How many query heads can have sums of dq at a time in the room allowed."""
    heads = problem.batch * problem.heads
    tiles = -(-problem.seqlen_q // _SUM_ROWS)
    room = _SUM_BYTES + _SUM_BYTES_PER_ROW * heads * problem.seqlen_q
    return min(heads, room // (4 * tiles * _SUM_ROWS * problem.head_dim))
