"""The simulator's side of `ptx`: what each instruction does, in NumPy, lane by lane.

Lanes of a warp exchange values over a board between two barriers; a simulated block is one warp.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np

exp_double = exp_float = np.exp
exp2_float = exp2_fast = np.exp2
maximum = np.fmax
times_double = times_float = np.multiply
_BOARD: dict[int, Any] = {}


def _lane() -> int:
    return int(threading.current_thread().threadIdx.x)  # type: ignore[attr-defined]


def _exchange(value: Any) -> list[Any]:
    """Every lane's value, in the order of lanes."""
    barrier = threading.current_thread().syncthreads  # type: ignore[attr-defined]
    _BOARD[_lane()] = value
    barrier()
    values = [_BOARD[lane] for lane in range(32)]
    barrier()
    return values


def bits_to_float(bits: Any) -> np.float32:
    """Reinterpret 32 bits as a float."""
    return np.uint32(bits).view(np.float32)


def float_to_bits(x: Any) -> np.uint32:
    """Reinterpret a float as 32 bits."""
    return np.float32(x).view(np.uint32)


def half_to_float(bits: Any) -> np.float32:
    """Widen the bits of a float16."""
    return np.float32(np.uint16(bits).view(np.float16))


def float_to_half(x: Any) -> np.uint16:
    """Round to the bits of a float16."""
    return np.float16(x).view(np.uint16)


def _bfloat16_bits(x: Any) -> int:
    bits = int(float_to_bits(x))
    if bits & 0x7FFFFFFF > 0x7F800000:
        return bits >> 16 | 0x40
    return bits + 0x7FFF + (bits >> 16 & 1) >> 16


def pack_bfloat16(low: Any, high: Any) -> np.uint32:
    """Round two floats to bfloat16, `low` in the lower half."""
    return np.uint32(_bfloat16_bits(low) | _bfloat16_bits(high) << 16)


def pack_float16(low: Any, high: Any) -> np.uint32:
    """Round two floats to float16, `low` in the lower half."""
    return np.uint32(int(float_to_half(low)) | int(float_to_half(high)) << 16)


def _widen_bfloat16(words: Any) -> Any:
    return (words.astype(np.uint32) << 16).view(np.float32)


def _widen_float16(words: Any) -> Any:
    return words.view(np.float16).astype(np.float32)


def _multiplier(widen: Any) -> Any:
    def mma(acc: Any, i: int, a: Any, j: int, b: Any, k: int) -> None:
        """acc[i:i+4] += a[j:j+4] x b[k:k+2]: 16 x 8 of a warp's product over 16 columns."""
        mine = np.concatenate([a[j : j + 4], b[k : k + 2]]).astype(np.uint32)
        board = np.array(_exchange(mine))  # (lane, register)
        halves = widen(board.view(np.uint16)).reshape(8, 4, 6, 2)  # (group, quad, register, half)
        group, quad = divmod(_lane(), 4)
        left = halves[group, :, :4]  # (quad, register, half)
        for row in range(2):
            low, high = left[:, row].reshape(8), left[:, row + 2].reshape(8)
            for column in range(2):
                right = halves[2 * quad + column, :, 4:]
                total = low @ right[:, 0].reshape(8) + high @ right[:, 1].reshape(8)
                acc[i + 2 * row + column] += total

    return mma


mma_bfloat16 = _multiplier(_widen_bfloat16)
mma_float16 = _multiplier(_widen_float16)


def _rows_of_matrices(tile: Any, offset: int) -> Any:
    """The (matrix, row, column) words that all lanes point at."""
    offsets = _exchange(int(offset))
    return np.array([tile[place : place + 8] for place in offsets]).reshape(4, 8, 8)


def ldmatrix(fragment: Any, i: int, tile: Any, offset: int) -> None:
    """fragment[i:i+4] = four 8 x 8 matrices; lanes 8n..8n+7 give the rows of matrix n."""
    group, quad = divmod(_lane(), 4)
    words = _rows_of_matrices(tile, offset)
    fragment[i : i + 4] = np.ascontiguousarray(words[:, group, 2 * quad : 2 * quad + 2]).view(
        np.uint32
    )[:, 0]


def ldmatrix_transposed(fragment: Any, i: int, tile: Any, offset: int) -> None:
    """As `ldmatrix`, each matrix transposed."""
    group, quad = divmod(_lane(), 4)
    words = _rows_of_matrices(tile, offset)
    fragment[i : i + 4] = np.ascontiguousarray(words[:, 2 * quad : 2 * quad + 2, group]).view(
        np.uint32
    )[:, 0]


def _address(x: Any) -> int:
    while not isinstance(x, np.ndarray):  # the simulator wraps arrays, twice inside a kernel
        x = x.__dict__["_item"] if "_item" in x.__dict__ else x.__dict__["_ary"]
    return int(x.__array_interface__["data"][0])


def _async_copier(size: int) -> Any:
    def copy_async(tile: Any, offset: int, x: Any, byte_offset: int, is_there: bool) -> None:
        """Copy `size` bytes of global x to tile[offset:]; zeros unless `is_there`."""
        words = size // tile.itemsize
        target = tile[int(offset) : int(offset) + words]
        if is_there:
            raw = ctypes.string_at(_address(x) + int(byte_offset), size)
            target[:] = np.frombuffer(raw, tile.dtype)
        else:
            target[:] = 0

    return copy_async


copy_async_16 = _async_copier(16)
copy_async_4 = _async_copier(4)


def copy_row_piece(tile: Any, offset: int, x: Any, start: int, row: int, row_bytes: int) -> None:
    """Copy 16 bytes of global x to tile[offset:], those from start + row * row_bytes on."""
    copy_async_16(tile, offset, x, int(start) + int(row) * int(row_bytes), True)


def commit_copies() -> None:
    """Nothing to do: copies are done at once."""


def wait_copies() -> None:
    """Nothing to do: copies are done at once."""


def store_16(x: Any, byte_offset: int, tile: Any, offset: int) -> None:
    """Copy 16 bytes of shared memory to global x."""
    raw = tile[int(offset) : int(offset) + 16 // tile.itemsize].tobytes()
    ctypes.memmove(_address(x) + int(byte_offset), raw, 16)


def _quad(x: Any) -> list[Any]:
    first = _lane() // 4 * 4
    return _exchange(x)[first : first + 4]


def quad_max(x: Any) -> Any:
    """Maximum over the four lanes that share a row of a fragment; NaN gives way to numbers."""
    a, b, c, d = _quad(x)
    return np.fmax(np.fmax(a, b), np.fmax(c, d))


def quad_sum(x: Any) -> Any:
    """Sum over the four lanes that share a row of a fragment."""
    a, b, c, d = _quad(x)
    return np.float32((a + b) + (c + d))


def any_lane(condition: Any) -> bool:
    """Whether the condition holds in any lane of the warp; all of them must ask."""
    return any(_exchange(bool(condition)))


def _vector_loader(count: int) -> Any:
    def load(values: Any, array: Any, place: int) -> None:
        """values[:count] = array[place:place + count]."""
        values[:count] = array[int(place) : int(place) + count]

    return load


load_2 = _vector_loader(2)
load_4 = _vector_loader(4)
