"""Launches through the driver, without numba's own launch path, and one attribute it does not set.

A kernel of numba takes its arguments flat, eight bytes each at most: of an array two unused
pointers, the number of elements, their size, the address, the shape and the strides in bytes.
Packing that from plain facts takes a few microseconds; making numba's array objects and letting it
take them apart again takes more than a hundred per launch.
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from functools import lru_cache
from typing import Any

import numpy as np

from scfa_core.arrays import ITEMSIZE, DeviceArray

_SLOT = 8  # bytes; every argument starts one
_grant_lock = threading.Lock()


def argument_format(names: tuple[str, ...]) -> str:
    """`struct` format of a kernel's flat arguments; names as `compiling.argument_type` reads."""
    parts = []
    for name in names:
        scalar, _, rank = name.partition(":")
        if rank:
            parts.append("q" * (5 + 2 * int(rank)))
        else:
            parts.append("d" if scalar == "float64" else "q")
    return "<" + "".join(parts)


@lru_cache(maxsize=4096)
def _layout(
    dtype: str, shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands before and after the address of an array."""
    itemsize = ITEMSIZE[dtype]
    return (0, 0, math.prod(shape), itemsize), (*shape, *(x * itemsize for x in strides))


def flatten(arguments: tuple[Any, ...]) -> list[Any]:
    """Flat values of arguments: `DeviceArray` facts and plain numbers."""
    values: list[Any] = []
    for x in arguments:
        if isinstance(x, DeviceArray):
            before, after = _layout(x.dtype, x.shape, x.strides)
            values += before
            values.append(x.pointer)
            values += after
        else:
            values.append(x)
    return values


class _Slots(threading.local):
    """Where one thread's arguments of a kernel lie, and the pointers to each."""

    def __init__(self, size: int) -> None:
        self.values = ctypes.create_string_buffer(size)
        first = ctypes.addressof(self.values)
        self.places = np.arange(first, first + size, _SLOT, dtype=np.uint64)
        self.address = self.places.ctypes.data


class Entry:
    """A compiled kernel on one device, ready to be launched."""

    def __init__(self, definition: Any, names: tuple[str, ...], device: int) -> None:
        """Load the kernel into the current context; `device` is the current one."""
        from cuda.bindings import driver

        self._driver = driver
        self._loaded = definition._codelibrary.get_cufunc()  # keeps the module alive
        self._kernel = driver.CUkernel(int(self._loaded.handle))
        self._function = driver.CUfunction(int(self._loaded.handle))
        packer = struct.Struct(argument_format(names))
        self._pack_into = packer.pack_into
        self._slots = _Slots(packer.size)
        self._device = device
        self._granted = 0

    def _check(self, error: Any, what: str) -> None:
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the CUDA driver refused {what}: {error.name}")

    def grant(self, shared: int) -> None:
        """Allow `shared` bytes of dynamic shared memory, once; never fewer than another thread."""
        if shared <= self._granted:
            return
        attributes = self._driver.CUfunction_attribute
        with _grant_lock:
            if shared <= self._granted:
                return
            (error,) = self._driver.cuKernelSetAttribute(
                attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                shared,
                self._kernel,
                self._driver.CUdevice(self._device),
            )
            self._check(error, f"{shared} bytes of shared memory")
            self._granted = shared

    def launch(
        self, grid: int, threads: int, stream: int, arguments: tuple[Any, ...], shared: int
    ) -> None:
        """Launch on a raw stream handle; the driver copies the arguments before it returns."""
        self.grant(shared)
        slots = self._slots
        self._pack_into(slots.values, 0, *flatten(arguments))
        (error,) = self._driver.cuLaunchKernel(
            self._function,
            *(grid, 1, 1),
            *(threads, 1, 1),
            shared,
            stream,
            slots.address,
            0,
        )
        if error != self._driver.CUresult.CUDA_SUCCESS:
            self._granted = 0  # a kernel whose code found no memory has forgotten it
        self._check(error, f"a launch of {grid} blocks")
