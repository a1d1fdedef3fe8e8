"""Launches through the driver, without numba's own launch path, and one attribute it does not set.

A kernel of numba takes its arguments flat, eight bytes each at most: of an array two unused
pointers, the number of elements, their size, the address, the shape and the strides in bytes.
Packing that from plain facts takes a few microseconds; making numba's array objects and letting it
take them apart again takes more than a hundred per launch.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

import numpy as np

from scfa_core.arrays import ITEMSIZE, DeviceArray

_SLOT = 8  # bytes; every argument starts one


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


def flatten(arguments: tuple[Any, ...]) -> list[Any]:
    """Flat values of arguments: `DeviceArray` facts and plain numbers."""
    values: list[Any] = []
    for x in arguments:
        if isinstance(x, DeviceArray):
            itemsize, size = ITEMSIZE[x.dtype], 1
            for extent in x.shape:
                size *= extent
            values += (0, 0, size, itemsize, x.pointer, *x.shape)
            values += [stride * itemsize for stride in x.strides]
        else:
            values.append(x)
    return values


@cache
def _offsets(count: int) -> np.ndarray:
    return np.arange(0, count * _SLOT, _SLOT, dtype=np.uint64)


class Entry:
    """A compiled kernel on one device, ready to be launched."""

    def __init__(self, definition: Any, names: tuple[str, ...], device: int) -> None:
        """Load the kernel into the current context; `device` is the current one."""
        from cuda.bindings import driver

        self._driver = driver
        self._loaded = definition._codelibrary.get_cufunc()  # keeps the module alive
        self._kernel = driver.CUkernel(int(self._loaded.handle))
        self._function = driver.CUfunction(int(self._loaded.handle))
        self._pack = struct.Struct(argument_format(names)).pack
        self._device = device
        self._granted = 0

    def _check(self, error: Any, what: str) -> None:
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the CUDA driver refused {what}: {error.name}")

    def grant(self, shared: int) -> None:
        """Allow `shared` bytes of dynamic shared memory, once."""
        if shared <= self._granted:
            return
        attributes = self._driver.CUfunction_attribute
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
        values = np.frombuffer(self._pack(*flatten(arguments)), np.uint8)
        places = _offsets(values.size // _SLOT) + np.uint64(values.ctypes.data)
        (error,) = self._driver.cuLaunchKernel(
            self._function,
            *(grid, 1, 1),
            *(threads, 1, 1),
            shared,
            stream,
            places.ctypes.data,
            0,
        )
        self._check(error, f"a launch of {grid} blocks")
