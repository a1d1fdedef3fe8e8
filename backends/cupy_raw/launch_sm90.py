"""Launch the Hopper (sm_90a) kernels: what they serve, in which tile shapes, with which arguments.

Every other problem is answered "not served" and runs on the portable kernels of `launch.py`.
"""

from __future__ import annotations

import logging
import os
import struct
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from scfa_core.backends.cupy_raw.loader import Kernel, compute_capability, get_kernel
from scfa_core.backends.cupy_raw.params import LOG2_E, SMALLEST_EXPONENT_SCALE

if TYPE_CHECKING:
    from scfa_core.arrays import CallContext, DeviceArray
    from scfa_core.plan import PlanArrays
    from scfa_core.problem import Problem

__all__ = ["run_backward", "run_forward", "supports_backward", "supports_forward"]

_LOG = logging.getLogger("scfa_core")
_ALIGNMENT = 16  # bytes one cp.async moves
_SHARED_SLACK = 1024  # room to align the base to the swizzle period
_MULTIPROCESSORS = 16  # cudaDevAttrMultiProcessorCount
_INT_MAX = 2**31 - 1
_PARAMS = struct.Struct("<" + 9 * "Qqqii" + "9Q2f8i6I" + "2Q2i6I")  # struct Params
_MAX_GROUP = 16  # query heads of one kv head in the dk/dv kernel
_SUM_ROWS = 64  # query rows of one dq tile in the fused kernel
_SUM_BYTES = 32 << 20  # for sums of dq; they should stay in L2
_SUM_BYTES_PER_ROW = 8  # and so much more for each query row
_BACKWARDS = ("auto", "fused", "split")  # $SCFA_CUPY_BACKWARD; auto is split


class Sums(NamedTuple):
    """Room of the fused kernel for sums of dq: addresses, heads with room, tiles of one head."""

    dq_sum: int
    added: int
    slots: int
    query_tiles: int


_NO_SUMS = Sums(0, 0, 1, 1)


class Shape(NamedTuple):
    """Tile shape of one kernel at one head_dim; docs/perf/hopper.md says why."""

    warpgroups: int  # multiplying ones, 64 rows each
    block_n: int  # keys (forward, dq) or queries (dk/dv) a step
    stages: int  # buffers of the streamed operands
    query_buffers: int  # buffers of the operands a tile keeps


_PANEL = 64  # columns of one panel of a shared tile
_CHUNK = 8  # columns one cp.async moves


def _width(head_dim: int) -> int:
    """Columns of the shared tiles that hold rows of `head_dim`: whole panels."""
    return -(-head_dim // _PANEL) * _PANEL


class _Shapes(dict[int, Shape]):
    """Shapes by width of the shared tiles; any other head_dim has that of its tiles."""

    def __missing__(self, head_dim: int) -> Shape:
        width = _width(head_dim)
        if width == head_dim:
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
_DQ = _Shapes({64: Shape(2, 64, 6, 2), 128: Shape(2, 64, 3, 1)})
_DKDV = _Shapes({64: Shape(2, 64, 11, 1), 128: Shape(2, 64, 3, 1)})
_FUSED = {64: Shape(2, 64, 5, 2), 128: Shape(2, 64, 2, 1)}  # query_buffers: of one dq tile
_PREPARE = {head_dim: Shape(0, 64, 0, 0) for head_dim in _FUSED}


def _forward_shared(head_dim: int, shape: Shape) -> int:
    """Bytes of dynamic shared memory of fwd_sm90.cu."""
    rows = 64 * shape.warpgroups
    tiles = 2 * _width(head_dim) * (shape.query_buffers * rows + 2 * shape.stages * shape.block_n)
    data = shape.query_buffers * (12 * rows + 16)
    barriers = 8 * (2 * shape.query_buffers + 4 * shape.stages)
    return tiles + data + 64 + barriers + _SHARED_SLACK


def _dq_shared(head_dim: int, shape: Shape) -> int:
    """Bytes of dynamic shared memory of bwd_dq_sm90.cu."""
    rows = 64 * shape.warpgroups
    streamed = 2 * shape.stages * shape.block_n
    tiles = 2 * _width(head_dim) * (3 * shape.query_buffers * rows + streamed)
    data = shape.query_buffers * (20 * rows + 16)
    barriers = 8 * (2 * shape.query_buffers + 2 * shape.stages)
    return tiles + data + 64 + barriers + _SHARED_SLACK


def _dkdv_shared(head_dim: int, shape: Shape) -> int:
    """Bytes of dynamic shared memory of bwd_dkdv_sm90.cu."""
    tiles = 4 * _width(head_dim) * (64 * shape.warpgroups + shape.stages * shape.block_n)
    data = 16 * shape.stages * shape.block_n + 16 * _MAX_GROUP * shape.warpgroups
    barriers = 8 * (2 + 2 * shape.stages)
    return tiles + data + 16 + barriers + _SHARED_SLACK


def _fused_shared(head_dim: int, shape: Shape) -> int:
    """Bytes of dynamic shared memory of bwd_fused_sm90.cu."""
    rows, key_buffers, change_buffers = 64 * shape.warpgroups, 2 if head_dim == 64 else 1, 2
    tiles = 2 * head_dim * (2 * key_buffers * rows + 2 * shape.stages * shape.block_n)
    changes = 2 * change_buffers * rows * shape.block_n
    sums = 4 * shape.query_buffers * shape.block_n * head_dim
    data = 16 * shape.stages * shape.block_n + 32 * _MAX_GROUP + 64 + 16
    barriers = 2 * (key_buffers + shape.query_buffers + shape.stages) + change_buffers
    return tiles + changes + sums + data + 8 * barriers + _SHARED_SLACK


_SHARED = {
    "fwd_sm90": _forward_shared,
    "bwd_dq_sm90": _dq_shared,
    "bwd_dkdv_sm90": _dkdv_shared,
    "bwd_fused_sm90": _fused_shared,
    "bwd_prepare_sm90": lambda head_dim, shape: 0,
}  # each kernel compares it with its own layout when compiled


def _unserved(shapes: _Shapes, problem: Problem, *arrays: DeviceArray) -> str | None:
    """Why the kernels with these shapes do not serve the call, or None."""
    if compute_capability(arrays[0].device) != (9, 0):
        return "not a Hopper card"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"dtype {problem.dtype}"
    served = _width(problem.head_dim) in shapes and problem.head_dim % _CHUNK == 0
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
    """Tell whether `run_forward` serves this call.

    >>> if supports_forward(problem, q, k, v, plan):
    ...     run_forward(problem, plan, q, k, v, out, lse, ctx)
    """
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
    """Tell whether `run_backward` serves this call."""
    if not plan.monotone or problem.group_size > _MAX_GROUP:
        _LOG.debug("backward: portable kernels (ranges in any order, or a large head group)")
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
) -> bytes:
    """Pack struct Params of params_sm90.cuh.

    `arrays` are q, k, v, out, dout, dq, dk, dv; `heads` are those the tiles belong to.
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
        *(*tiles, plan.monotone),
        *(*_divisor(per_head), *_divisor(heads), *_divisor(problem.group_size)),
        *sums,
        *(*_divisor(sums.query_tiles), *_divisor(problem.heads), *_divisor(sums.slots)),
    )


@cache
def _multiprocessors(device: int) -> int:
    from cupy.cuda import runtime

    return int(runtime.deviceGetAttribute(_MULTIPROCESSORS, device))


def _zero(pointer: int, size: int, stream: int, device: int) -> None:
    """Enqueue a memset on a stream of `device`, whichever device the caller's thread is on."""
    import cupy

    runtime = cupy.cuda.runtime
    if runtime.getDevice() == device:
        runtime.memsetAsync(pointer, 0, size, stream)
        return
    with cupy.cuda.Device(device):
        runtime.memsetAsync(pointer, 0, size, stream)


@cache
def _kernel(name: str, device: int, dtype: str, head_dim: int, shape: Shape) -> Kernel:
    """The compiled variant of one kernel."""
    constants = (
        ("BFLOAT16", int(dtype == "bfloat16")),
        ("HEAD_DIM", _width(head_dim)),
        ("COLUMNS", head_dim),
        ("BLOCK_N", shape.block_n),
        ("WARPGROUPS", shape.warpgroups),
        ("STAGES", shape.stages),
        ("QUERY_BUFFERS", shape.query_buffers),
        ("SHARED_BYTES", _SHARED[name](head_dim, shape)),
    )
    return get_kernel(f"scfa_{name}", f"{name}.cu", constants, device, arch_suffix="a")


def _tiles(rows: int, per_tile: int, heads: int) -> tuple[int, int]:
    """Tiles of one head, and of all."""
    per_head = -(-rows // per_tile)
    return per_head, per_head * heads


def _launch(
    kernel: Kernel, device: int, shape: Shape, shared: int, tiles: int, stream: int, params: bytes
) -> None:
    """One persistent block per multiprocessor, or fewer if there are fewer tiles."""
    blocks = min(tiles, _multiprocessors(device))
    others = 2 if kernel.name == "scfa_bwd_fused_sm90" else 1  # warpgroups that do not multiply
    kernel.launch((blocks, 1, 1), 128 * (shape.warpgroups + others), shared, stream, params)


def run_forward(
    problem: Problem,
    plan: PlanArrays,
    q: DeviceArray,
    k: DeviceArray,
    v: DeviceArray,
    out: DeviceArray,
    lse: DeviceArray,
    ctx: CallContext,
) -> None:
    """Enqueue the forward kernel: every element of `out` and `lse` is written."""
    head_dim, device = problem.head_dim, q.device
    shape = _FORWARD[head_dim]
    counter = ctx.empty((1,), "int32")
    _zero(counter.pointer, 4, ctx.stream, device)
    tiles = _tiles(problem.seqlen_q, 64 * shape.warpgroups, problem.batch * problem.heads)
    arrays = (q, k, v, out, None, None, None, None)
    params = _params(problem, plan, arrays, lse, (0, 0), counter.pointer, tiles, problem.heads)
    kernel = _kernel("fwd_sm90", device, problem.dtype, head_dim, shape)
    shared = _forward_shared(head_dim, shape)
    _launch(kernel, device, shape, shared, tiles[1], ctx.stream, params)


def run_backward(
    problem: Problem,
    plan: PlanArrays,
    dout: DeviceArray,
    q: DeviceArray,
    k: DeviceArray,
    v: DeviceArray,
    out: DeviceArray,
    lse: DeviceArray,
    dq: DeviceArray,
    dk: DeviceArray,
    dv: DeviceArray,
    ctx: CallContext,
) -> None:
    """Enqueue the dq kernel, then the dk/dv kernel: every element is written, in a fixed order.

    Notes
    -----
    Bitwise deterministic. Workspace: 8 bytes a query row (lse in base 2 and delta, in sorted
    order). Ranges must be monotone. $SCFA_CUPY_BACKWARD=fused: `_run_fused` where it serves.
    """
    backward = os.environ.get("SCFA_CUPY_BACKWARD", "auto")
    if backward not in _BACKWARDS:
        raise ValueError(f"$SCFA_CUPY_BACKWARD must be one of {_BACKWARDS}, got {backward!r}")
    if backward == "fused" and _sum_slots(problem) >= problem.group_size:
        _run_fused(problem, plan, (q, k, v, out, dout, dq, dk, dv), lse, ctx)
        return
    head_dim, device, stream = problem.head_dim, q.device, ctx.stream
    rows = problem.batch * problem.heads * problem.seqlen_q
    stats = ctx.empty((2 * rows + 1,), "float32")  # the first element is that of absent rows
    row_stats = (stats.pointer + 4, stats.pointer + 4 + 4 * rows)
    counters = ctx.empty((2,), "int32")
    _zero(counters.pointer, 8, stream, device)
    arrays = (q, k, v, out, dout, dq, dk, dv)

    shape = _DQ[head_dim]
    tiles = _tiles(problem.seqlen_q, 64 * shape.warpgroups, problem.batch * problem.heads)
    params = _params(problem, plan, arrays, lse, row_stats, counters.pointer, tiles, problem.heads)
    kernel = _kernel("bwd_dq_sm90", device, problem.dtype, head_dim, shape)
    _launch(kernel, device, shape, _dq_shared(head_dim, shape), tiles[1], stream, params)

    shape = _DKDV[head_dim]
    tiles = _tiles(problem.seqlen_k, 64 * shape.warpgroups, problem.batch * problem.heads_kv)
    params = _params(
        problem, plan, arrays, lse, row_stats, counters.pointer + 4, tiles, problem.heads_kv
    )
    kernel = _kernel("bwd_dkdv_sm90", device, problem.dtype, head_dim, shape)
    _launch(kernel, device, shape, _dkdv_shared(head_dim, shape), tiles[1], stream, params)


def _sum_slots(problem: Problem) -> int:
    """How many query heads can have sums of dq at a time in the room allowed.

    A block may wait for any earlier key head, so one key head's query heads are the least.
    """
    heads = problem.batch * problem.heads
    tiles = -(-problem.seqlen_q // _SUM_ROWS)
    room = _SUM_BYTES + _SUM_BYTES_PER_ROW * heads * problem.seqlen_q
    return min(heads, room // (4 * tiles * _SUM_ROWS * problem.head_dim))


def _run_fused(
    problem: Problem,
    plan: PlanArrays,
    arrays: tuple[DeviceArray, ...],
    lse: DeviceArray,
    ctx: CallContext,
) -> None:
    """Enqueue the preparing kernel, then the one that makes dq, dk and dv together.

    Workspace: 8 bytes a query row and a word for 64 of them, and the sums of dq (`_sum_slots`).
    """
    head_dim, device, stream = problem.head_dim, arrays[0].device, ctx.stream
    heads = problem.batch * problem.heads
    rows = heads * problem.seqlen_q
    query_tiles, jobs = _tiles(problem.seqlen_q, _SUM_ROWS, heads)
    slots = _sum_slots(problem)
    stats = ctx.empty((2 * rows + 1,), "float32")  # the first element is that of absent rows
    row_stats = (stats.pointer + 4, stats.pointer + 4 + 4 * rows)
    words = ctx.empty((1 + jobs,), "int32")
    sums = ctx.empty((slots * query_tiles * _SUM_ROWS * head_dim,), "float32")
    _zero(words.pointer, 4, stream, device)
    shape = _FUSED[head_dim]
    tiles = _tiles(problem.seqlen_k, 64 * shape.warpgroups, problem.batch * problem.heads_kv)
    room = Sums(sums.pointer, words.pointer + 4, slots, query_tiles)
    params = _params(
        problem, plan, arrays, lse, row_stats, words.pointer, tiles, problem.heads_kv, room
    )
    prepare = _kernel("bwd_prepare_sm90", device, problem.dtype, head_dim, _PREPARE[head_dim])
    prepare.launch((jobs, 1, 1), 256, 0, stream, params)
    kernel = _kernel("bwd_fused_sm90", device, problem.dtype, head_dim, shape)
    _launch(kernel, device, shape, _fused_shared(head_dim, shape), tiles[1], stream, params)
