"""Tensor maps: what Hopper's bulk tensor engine must know of an array to fetch boxes of it.

The driver makes them from sizes, strides and an address. A launch is bound before addresses are
known (`prepared`), so a map is made with any address, in whose place the array's mark is put.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scfa_core.arrays import DeviceArray

__all__ = ["NO_MAPS", "tensor_maps"]

_LOG = logging.getLogger("scfa_core")
_BYTES, _ALIGNMENT = 128, 64  # of a CUtensorMap
NO_MAPS = bytes(2 * _BYTES)
_COLUMNS, _ROWS = 64, 32  # of a box: a panel, kRunRows (runs_sm90.cuh)
_UINT16, _SWIZZLE_128B, _L2_128B = 1, 3, 2  # CUtensorMapDataType, ...Swizzle, ...L2promotion
_STAND_INS = 0x7A5C_96E1_B2D0, 0x0531_2D4E_8C60  # any two addresses of rows


@cache
def _encode() -> Any:
    """The driver's cuTensorMapEncodeTiled, or None."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        _LOG.debug("no tensor maps: %s", error)
        return None


def _encoded(shape: tuple[int, ...], strides: tuple[int, ...], address: int) -> bytes | None:
    """The driver's map of (batch, heads, rows, columns); strides in bytes, but the last."""
    encode = _encode()
    if encode is None:
        return None
    buffer = ctypes.create_string_buffer(_BYTES + _ALIGNMENT)
    at = -(-ctypes.addressof(buffer) // _ALIGNMENT) * _ALIGNMENT
    four, three, words = ctypes.c_uint64 * 4, ctypes.c_uint64 * 3, ctypes.c_uint32 * 4
    status = encode(
        *(ctypes.c_void_p(at), _UINT16, 4, ctypes.c_void_p(address)),
        *(four(*reversed(shape)), three(*reversed(strides))),
        *(words(_COLUMNS, _ROWS, 1, 1), words(1, 1, 1, 1)),
        *(0, _SWIZZLE_128B, _L2_128B, 0),  # not interleaved; zeros beyond the array
    )
    if status:
        _LOG.debug("no tensor map of %s, strides %s: CUDA error %d", shape, strides, status)
        return None
    return ctypes.string_at(at, _BYTES)


def _tensor_map(array: DeviceArray) -> bytes | None:
    """One map, with `array.pointer` where its address goes."""
    strides = tuple(
        2 * (stride if size > 1 else array.strides[2])  # of one entry it is never used
        for size, stride in zip(array.shape[:3], array.strides, strict=False)
    )
    if min(strides) <= 0:
        _LOG.debug("no tensor map: strides %s", array.strides)
        return None
    made = set()
    for address in _STAND_INS:
        encoded = _encoded(array.shape, strides, address)
        if encoded is None:
            return None
        mark = array.pointer.to_bytes(8, "little")
        made.add(encoded.replace(address.to_bytes(8, "little"), mark))
    if len(made) > 1:  # a map is opaque: nobody has promised that an address is found in it
        _LOG.debug("no tensor map: this driver writes addresses in another form")
        return None
    return made.pop()


def tensor_maps(*arrays: DeviceArray) -> bytes | None:
    """Return maps of two arrays, one after the other, or None where one of them has none.

    Parameters
    ----------
    *arrays : DeviceArray
        (batch, heads, rows, columns) of 16 bits, contiguous columns, other strides multiples of 16
        bytes. An axis that is broadcast or runs backwards has no map, nor have arrays where the
        driver is too old for maps.

    Returns
    -------
    bytes or None
        In boxes of 32 rows and 64 columns, 128-byte swizzle; the address in a map is its array's
        `pointer`, whatever that is.
    """
    maps = [made for made in map(_tensor_map, arrays) if made is not None]
    return b"".join(maps) if len(maps) == len(arrays) else None
