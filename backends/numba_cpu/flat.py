"""Any strided tensor as one flat array and four strides: a kernel is compiled once per dtype."""

from typing import Any

import numpy as np

__all__ = ["Layout", "STORED", "flat"]

Layout = tuple[
    int, int, int, int
]  # elements: offset of (0, 0, 0), then batch, head and row strides

# float16 and bfloat16 travel as the integers that convert.py knows them by.
STORED = {"float16": "<i2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8", "int32": "<i4"}


class _Window:
    """Hands NumPy an address range, keeping the owner of the memory alive."""

    def __init__(self, owner: Any, address: int, size: int, dtype: str) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (size,),
            "typestr": dtype,
            "version": 3,
        }


def flat(x: np.ndarray, dtype: str) -> tuple[np.ndarray, Layout]:
    """View (batch, heads, rows[, dim]) as a flat array of `dtype` and its (offset, strides).

    No copy, except of an input whose strides are not whole elements (a structured field).
    """
    size = x.itemsize
    if any(stride % size for stride in x.strides):
        x = np.ascontiguousarray(x)
    strides = [stride // size for stride in x.strides]
    steps = [stride * (n - 1) for stride, n in zip(strides, x.shape, strict=True)]
    lowest = sum(step for step in steps if step < 0)
    extent = sum(abs(step) for step in steps) + 1
    address = x.__array_interface__["data"][0] + lowest * size
    view = np.asarray(_Window(x, address, extent, STORED[dtype]))
    return view, (-lowest, strides[0], strides[1], strides[2])
