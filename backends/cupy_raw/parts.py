"""Results in parts made into one, in one pass over memory: merging, sinks, sums of gradients.

Mirrors the arguments of cuda/parts_merge.cu, cuda/parts_add.cu and cuda/sinks_gradient.cu field by
field. No backend verbs, as hashing is none: whoever merges asks `reason_against` first, and
computes in its own library where there is a reason.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache

from scfa_core.backends.cupy_raw.loader import Kernel, get_kernel

from scfa_core.arrays import DeviceArray

Constants = tuple[tuple[str, int], ...]

NAMES = ("parts_merge", "parts_add", "sinks_gradient")
MOST_PARTS = 16  # kMostParts
COLUMNS = 8  # kColumns: of a thread
THREADS = 256  # kThreads
MERGE_ROUNDS, GRADIENT_ROUNDS = 4, 16  # kRounds
MOST_HEAD_DIM = 256
_ELEMENTS = {"float32": (0, 4), "float16": (1, 2), "bfloat16": (2, 2)}  # code, bytes
_MOST_GRID = 2**31 - 1
_MERGE = struct.Struct(f"<{2 * MOST_PARTS}Q3Q3q6i")
_ADD = struct.Struct(f"<{MOST_PARTS}Q3Qq2i")
_SINKS = struct.Struct("<5Q6q4i")


def constants(dtype: str, *, aligned: bool) -> Constants:
    """What the kernels are compiled with; a thread's columns are all that it knows of head_dim."""
    code, _ = _ELEMENTS[dtype]
    sizes = (("HEAD_DIM", COLUMNS), ("HEAD_DIM_V", COLUMNS))
    return (*sizes, ("ELEMENT", code), ("ALIGNED", int(aligned)))


def shipped_constants() -> list[Constants]:
    """All that there are."""
    return [constants(dtype, aligned=aligned) for dtype in _ELEMENTS for aligned in (False, True)]


def reason_against(dtype: str, head_dim: int, device: int) -> str | None:
    """None if the kernels serve rows of `head_dim` on CUDA device `device`, otherwise why not."""
    from scfa_core.backends.cupy_raw import BACKEND, _card_reason

    if dtype not in _ELEMENTS:
        return f"they read {', '.join(_ELEMENTS)}, got {dtype}"
    if not 0 < head_dim <= MOST_HEAD_DIM or head_dim % COLUMNS:
        return f"head_dim must be a multiple of {COLUMNS} up to {MOST_HEAD_DIM}, got {head_dim}"
    return BACKEND.availability() or _card_reason(device)


def is_aligned(*arrays: DeviceArray) -> bool:
    """Whether every eight elements of a row can be read as 16 bytes."""
    return all(
        x.pointer % 16 == 0
        and all(
            step * _ELEMENTS[x.dtype][1] % 16 == 0
            for step, size in zip(x.strides[:3], x.shape[:3], strict=True)
            if size > 1
        )
        for x in arrays
    )


def tiles_of(rows: int, head_dim: int, rounds: int) -> int:
    """Blocks of one (batch, head)."""
    return -(-rows // (THREADS // (head_dim // COLUMNS) * rounds))


@cache
def _kernel(name: str, values: Constants, device: int) -> Kernel:
    return get_kernel(f"scfa_{name}", f"{name}.cu", values, device)


def _launch(
    name: str, like: DeviceArray, blocks: int, params: bytes, stream: int, *, aligned: bool
) -> None:
    if blocks > _MOST_GRID:
        raise ValueError(f"{like.shape=} needs {blocks} blocks, at most {_MOST_GRID} fit a launch")
    kernel = _kernel(name, constants(like.dtype, aligned=aligned), like.device)
    kernel.launch((blocks, 1, 1), THREADS, 0, stream, params)


def _addresses(arrays: Sequence[DeviceArray]) -> list[int]:
    return [x.pointer for x in arrays] + [0] * (MOST_PARTS - len(arrays))


def run_merge(
    outs: Sequence[DeviceArray],
    lses: Sequence[DeviceArray],
    sinks: DeviceArray | None,
    out: DeviceArray,
    lse: DeviceArray,
    stream: int,
) -> None:
    """Enqueue the merge of at most `MOST_PARTS` parts on a raw stream; never waits.

    Parameters
    ----------
    outs : (batch, heads, rows, head_dim) each
        All with the strides of `out`, the last of them 1; the first may be `out` itself.
    lses : (batch, heads, rows) each, float32
        Contiguous, as `lse` is, which is none of them.
    sinks : (heads,), float32, optional
        Contiguous.
    """
    batch, heads, rows, head_dim = out.shape
    if batch * heads * rows == 0:
        return
    tiles = tiles_of(rows, head_dim, MERGE_ROUNDS)
    params = _MERGE.pack(
        *_addresses(outs),
        *_addresses(lses),
        *(0 if sinks is None else sinks.pointer, out.pointer, lse.pointer),
        *out.strides[:3],
        *(len(outs), heads, rows, head_dim // COLUMNS, tiles, 0),
    )
    aligned = is_aligned(out, *outs)
    _launch("parts_merge", out, batch * heads * tiles, params, stream, aligned=aligned)


def run_add(
    parts: Sequence[DeviceArray], before: DeviceArray | None, out: DeviceArray, stream: int
) -> None:
    """Enqueue ``out = before + sum(parts)``; arrays hold the same elements in the same order.

    A multiple of eight elements; `before` is float32, and `out` may be.
    """
    elements = 1
    for size in out.shape:
        elements *= size
    if elements == 0:
        return
    chunks = elements // COLUMNS
    wide = out.dtype != parts[0].dtype
    params = _ADD.pack(
        *_addresses(parts),
        *(0 if before is None else before.pointer, 0 if wide else out.pointer),
        *(out.pointer if wide else 0, chunks, len(parts), 0),
    )
    aligned = all(x.pointer % 16 == 0 for x in (*parts, out))
    _launch("parts_add", parts[0], -(-chunks // THREADS), params, stream, aligned=aligned)


def run_sinks_gradient(
    dout: DeviceArray,
    out: DeviceArray,
    lse: DeviceArray,
    sinks: DeviceArray,
    partial: DeviceArray,
    stream: int,
) -> None:
    """Enqueue what each tile of rows adds to the gradient of its head's sink.

    Parameters
    ----------
    dout, out : (batch, heads, rows, head_dim)
        Of any strides, the last of them 1.
    lse, sinks : (batch, heads, rows) and (heads,), float32
        Contiguous.
    partial : (batch, heads, `tiles_of` with GRADIENT_ROUNDS), float32
        Contiguous; every element is written.
    """
    batch, heads, rows, head_dim = out.shape
    tiles = tiles_of(rows, head_dim, GRADIENT_ROUNDS)
    if batch * heads * tiles == 0:
        return
    params = _SINKS.pack(
        *(dout.pointer, out.pointer, lse.pointer, sinks.pointer, partial.pointer),
        *(*dout.strides[:3], *out.strides[:3]),
        *(heads, rows, head_dim // COLUMNS, tiles),
    )
    aligned = is_aligned(dout, out)
    _launch("sinks_gradient", out, batch * heads * tiles, params, stream, aligned=aligned)
