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

from scfa_core.backends.cupy_raw.loader import (
    Kernel,
    compute_capability,
    get_kernel,
    multiprocessors,
)
from scfa_core.backends.cupy_raw.params import LOG2_E, SMALLEST_EXPONENT_SCALE
from scfa_core.backends.cupy_raw.shapes_sm90 import (
    CHUNK,
    DQ,
    FORWARD,
    FUSED,
    FUSED_KERNELS,
    MAX_GROUP,
    SHARED,
    WIDTHS,
    Shape,
    Shapes,
    may_run,
    threads_of,
)
from scfa_core.backends.cupy_raw.tensor_maps import NO_MAPS

if TYPE_CHECKING:
    from scfa_core.arrays import DeviceArray
    from scfa_core.plan import PlanArrays
    from scfa_core.problem import Problem

__all__ = ["supports_backward", "supports_forward"]

_LOG = logging.getLogger("scfa_core")
_ALIGNMENT = 16  # bytes one cp.async moves
_INT_MAX = 2**31 - 1
_PARAMS = struct.Struct(
    "<" + 9 * "Qqqii" + "9Q2f8i6I" + "2Q2i6I4Q8x"
)  # struct Params up to its maps
_SUM_ROWS = 64  # query rows of one dq tile in the fused kernel
# Query rows with room for sums of dq. What is in use should stay in L2; but where few keys are
# kept, key tiles of many heads are under way, each head with room for all its rows.
_SUM_ROOM = 1 << 17
_SUM_BYTES_PER_ROW = 8  # and so many more for each query row
# head_dim -> no more keys than this in all, and "auto" takes the split kernels
_FEW_KEYS = {64: 960, 128: 660}
# head_dim -> keys of an average pair's query tile from which it takes the fused kernel
# (bwd_choose_sm90.cu; hopper.md); one that is not here does so whatever the ranges
_LONG_KEYS = {128: 440}
_FUSED_IN_TURN = 16  # heads at most whose tiles are handed out in turn (bwd_fused_sm90_tiles.cuh)
_HEADS_IN_TURN = 4  # at most, at the end of a forward (tiles_sm90.cuh)
# Blocks a multiprocessor of the kernel that prepares rows and key tiles: as many as have registers.
_PREPARE_BLOCKS = {64: 5, 128: 3}
_PREPARE_WARPS = 8  # of each, one for a key tile
_CHOICE_WORDS = 8  # before those of the key heads, then two of each query head: choice_sm90.cuh
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
    return 4 + 4 * problem.group_size


def _unserved(shapes: Shapes, problem: Problem, *arrays: DeviceArray) -> str | None:
    """Why the kernels with these shapes do not serve the call, or None."""
    if compute_capability(arrays[0].device) != (9, 0):
        return "not a Hopper card"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"dtype {problem.dtype}"
    served = shapes.width(problem.head_dim) and problem.head_dim % CHUNK == 0
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


def _serves(what: str, shapes: Shapes, problem: Problem, *arrays: DeviceArray) -> bool:
    reason = _unserved(shapes, problem, *arrays)
    if reason is not None:
        _LOG.debug("%s: portable kernels (%s)", what, reason)
    return reason is None


def supports_forward(
    problem: Problem, q: DeviceArray, k: DeviceArray, v: DeviceArray, plan: PlanArrays
) -> bool:
    """Tell whether the kernel of `bound_sm90.bind_forward` serves this call."""
    return _serves("forward", FORWARD, problem, q, k, v)


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
    if problem.group_size > MAX_GROUP:
        _LOG.debug("backward: portable kernels (%d heads to a key head)", problem.group_size)
        return False
    return _serves("backward", DQ, problem, dout, q, k, v, out)


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
    maps: bytes = NO_MAPS,
    in_turn: int = 0,
) -> bytes:
    """Pack struct Params of params_sm90.cuh.

    `arrays` are q, k, v, out, dout, dq, dk, dv; `heads` are those the tiles belong to; `choice`
    is the address of the words of choice_sm90.cuh, 0 where there is no choice; `envelopes` are
    those of starts and of ends, where ranges lie in any order; `key_tiles` is that of the fused
    kernels' records of key tiles; `maps` are those of `tensor_maps`; `in_turn` is what `_in_turn`
    or `_fused_in_turn` says.
    """
    lists = (plan.q_index, plan.q_count, plan.k_index, plan.k_count, plan.key_start, plan.key_end)
    scale, per_head = problem.softmax_scale, tiles[0]
    packed = _PARAMS.pack(
        *(field for array in arrays for field in _array(array, 2)),
        *_array(lse, 4),
        *(array.pointer for array in lists),
        *(*row_stats, counter),
        *(scale, scale * LOG2_E),
        *(problem.heads, problem.heads_kv, problem.group_size),
        *(problem.seqlen_q, problem.seqlen_k),
        *(*tiles, in_turn),
        *(*_divisor(per_head), *_divisor(heads), *_divisor(problem.group_size)),
        *sums,
        *(*_divisor(sums.query_tiles), *_divisor(problem.heads), *_divisor(sums.slots)),
        choice,
        *envelopes,
        key_tiles,
    )
    return packed + maps


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


def _chooses(name: str, head_dim: int, monotone: bool) -> bool:
    """Whether a kernel is compiled for key heads that may go two ways (choice_sm90.cuh)."""
    return head_dim in _LONG_KEYS if monotone else name != "fwd_sm90" and head_dim in FUSED


@cache
def _kernel(
    name: str,
    device: int,
    dtype: str,
    head_dim: int,
    shape: Shape,
    monotone: bool = True,
    mapped: bool = True,
) -> Kernel:
    """The compiled variant of one kernel.

    Of ranges in any order unless they are `monotone`, or it is one of the fused way, which is
    given what lies in order of them; `mapped`: it is given tensor maps.
    """
    in_order = monotone or name in ("bwd_prepare_sm90", *FUSED_KERNELS.values())
    constants = (
        ("BFLOAT16", int(dtype == "bfloat16")),
        ("HEAD_DIM", WIDTHS[name].width(head_dim) if name in WIDTHS else head_dim),
        ("COLUMNS", head_dim),
        ("BLOCK_N", shape.block_n),
        ("WARPGROUPS", shape.warpgroups),
        ("STAGES", shape.stages),
        ("QUERY_BUFFERS", shape.query_buffers),
        ("PARTS", shape.parts),
        ("GATHERERS", shape.gatherers),
        ("MONOTONE", int(in_order)),
        ("CHOICE", int(_chooses(name, head_dim, monotone))),
        ("SHARED_BYTES", SHARED[name](head_dim, shape)),
        ("RUNS", int(mapped and in_order and may_run(name, shape))),
    )
    return get_kernel(f"scfa_{name}", f"{name}.cu", constants, device, arch_suffix="a")


@cache
def _envelope_kernel(device: int) -> Kernel:
    """The kernel that makes envelopes of ranges in any order, and finds those that have one."""
    return get_kernel("scfa_bwd_envelope_sm90", "bwd_envelope_sm90.cu", (), device, arch_suffix="a")


@cache
def _choose_kernel(device: int, head_dim: int, monotone: bool = True) -> Kernel:
    """The kernel that chooses between the two ways of the backward."""
    constants = (("LONG_KEYS", _LONG_KEYS.get(head_dim, 0)),)
    constants += () if monotone else (("MONOTONE", 0),)
    return get_kernel(
        "scfa_bwd_choose_sm90", "bwd_choose_sm90.cu", constants, device, arch_suffix="a"
    )


def _persistent(
    kernel: Kernel, device: int, shape: Shape, shared: int, tiles: int
) -> Callable[[int, bytes], None]:
    """One persistent block per multiprocessor, or fewer if there are fewer tiles."""
    blocks = min(tiles, multiprocessors(device))
    threads = threads_of(kernel.name.removeprefix("scfa_"), shape)
    return kernel.bind((blocks, 1, 1), threads, shared)


def _in_turn(heads: int) -> int:
    """Binary logarithm of how many heads at the end have their tiles handed out in turn."""
    return min(heads, _HEADS_IN_TURN).bit_length() - 1


def _fused_in_turn(problem: Problem, slots: int) -> int:
    """Binary logarithm of how many key heads' tiles the fused kernel may hand out in turn.

    No more than have sums at a time, `slots` query heads: a head's room is that of a head before
    it, all tiles of which must have been handed out earlier.
    """
    if problem.head_dim != 64 or slots == 0:
        return 0
    heads = min(problem.batch * problem.heads_kv, slots // problem.group_size)
    return min(heads, _FUSED_IN_TURN).bit_length() - 1


def _sum_heads(head_dim: int, seqlen_q: int, heads: int) -> int:
    """How many query heads have sums of dq at a time, in the room that so many heads give."""
    head_bytes = 4 * head_dim * _SUM_ROWS * -(-seqlen_q // _SUM_ROWS)
    return (4 * head_dim * _SUM_ROOM + _SUM_BYTES_PER_ROW * heads * seqlen_q) // head_bytes


def _sums_fit(problem: Problem) -> bool:
    """Whether sums of dq of one key head's query heads fit into the room their own rows give.

    A block may wait for any earlier key head, so these are the least. Neither batch nor the number
    of key heads counts: which kernels run must not depend on what else is in the call.
    """
    group = problem.group_size
    return _sum_heads(problem.head_dim, problem.seqlen_q, group) >= group


def _sum_slots(problem: Problem) -> int:
    """How many query heads can have sums of dq at a time in the room allowed."""
    heads = problem.batch * problem.heads
    return min(heads, _sum_heads(problem.head_dim, problem.seqlen_q, heads))
