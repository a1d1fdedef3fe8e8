"""The blocks of keys that a query scores highest, in one pass over its scores.

Mirrors the arguments of cuda/top_blocks.cu field by field. No backend verb, as hashing is none:
whoever chooses asks `reason_against` first, and computes in its own library where there is one.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import TYPE_CHECKING

from scfa_core.backends.cupy_raw.loader import Kernel, get_kernel

if TYPE_CHECKING:
    from scfa_core.arrays import DeviceArray

Constants = tuple[tuple[str, int], ...]

SOURCE = "top_blocks.cu"
THREADS = 256  # kThreads
TOPS = (4, 8, 16)  # kTop: blocks that a thread keeps in mind
_ELEMENTS = {"float32": 0, "float16": 1, "bfloat16": 2}
_MOST_GRID = 2**31 - 1
_PARAMS = struct.Struct("<2Qq8i")


def constants(dtype: str, top: int) -> Constants:
    """What the kernel is compiled with for so many blocks or more."""
    held = next(most for most in TOPS if top <= most)
    sizes = (("HEAD_DIM", 8), ("HEAD_DIM_V", 8))
    return (*sizes, ("ELEMENT", _ELEMENTS[dtype]), ("ALIGNED", 0), ("TOP", held))


def shipped_constants() -> list[Constants]:
    """All that there are."""
    return [constants(dtype, top) for dtype in _ELEMENTS for top in TOPS]


def reason_against(dtype: str, top: int, device: int) -> str | None:
    """None if the kernel serves such scores on CUDA device `device`, otherwise why not."""
    from scfa_core.backends.cupy_raw import BACKEND, _card_reason

    if dtype not in _ELEMENTS:
        return f"it reads {', '.join(_ELEMENTS)}, got {dtype}"
    if not 1 <= top <= TOPS[-1]:
        return f"it keeps {TOPS[-1]} blocks in mind, got top={top}"
    return BACKEND.availability() or _card_reason(device)


@cache
def _kernel(values: Constants, device: int) -> Kernel:
    return get_kernel("scfa_top_blocks", SOURCE, values, device)


def run_top_blocks(
    scores: DeviceArray,
    ids: DeviceArray,
    block: int,
    first: int,
    last: int,
    ahead: bool,
    stream: int,
) -> None:
    """Enqueue the choice on a raw stream; never waits.

    Parameters
    ----------
    scores : (batch, heads, blocks, rows)
        Contiguous.
    ids : (top, batch, heads, rows), int32
        Contiguous; every element is written.
    block, first, last : int
        Keys of a block; the place of the first row among the keys; the last block's number.
    ahead : bool
        Who has no choice left gets `last`, in `last` itself one more; else all get one more.
    """
    batch, heads, blocks, rows = scores.shape
    tiles = -(-rows // THREADS)
    if batch * heads * tiles == 0:
        return
    if batch * heads * tiles > _MOST_GRID:
        raise ValueError(f"{scores.shape=} needs {batch * heads * tiles} blocks of threads")
    top = ids.shape[0]
    params = _PARAMS.pack(
        *(scores.pointer, ids.pointer, batch * heads),
        *(blocks, rows, block, first, last, top, tiles, int(ahead)),
    )
    kernel = _kernel(constants(scores.dtype, top), scores.device)
    kernel.launch((batch * heads * tiles, 1, 1), THREADS, 0, stream, params)
