"""Element types: 16-bit floats travel as uint16 bits and are widened to the accumulator's type."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import float32, float64, uint16, uint32
from scfa_core.backends.numba_cuda.compiling import LOG2_E, device
from scfa_core.backends.numba_cuda.intrinsics import (
    bits_to_float,
    exp2_float,
    exp_double,
    exp_float,
    float_to_bits,
    float_to_half,
    half_to_float,
    times_double,
    times_float,
)


class Element(NamedTuple):
    """How one dtype is stored and computed with."""

    storage: str  # NumPy dtype of the arrays a kernel sees
    acc: Any  # numba type of sums
    acc_name: str
    widen: Any  # stored element -> acc
    narrow: Any  # acc -> stored element, to nearest even
    times: Any  # of two acc, rounded: forward and backward find the same score
    exp: Any  # of acc, to base 2 or e
    log_unit: float  # scores times this are in that base; powers of 2 are fast, of e exact


@device
def _same(x):
    """Return x: nothing to convert."""
    return x


@device
def _widen_bfloat16(x):
    """A bfloat16 is the upper half of a float32."""
    return bits_to_float(uint32(x) << uint32(16))


@device
def _narrow_bfloat16(x):
    """Round to nearest even in integers; NaN becomes a quiet NaN."""
    bits = float_to_bits(x)
    if (bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000):
        return uint16((bits >> uint32(16)) | uint32(0x40))
    rounded = bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))
    return uint16(rounded >> uint32(16))


@device
def _low_bfloat16(word):
    """The lower of two bfloat16 in 32 bits."""
    return bits_to_float(uint32(word << uint32(16)))


@device
def _high_bfloat16(word):
    """The upper of two bfloat16 in 32 bits."""
    return bits_to_float(uint32(word & uint32(0xFFFF0000)))


@device
def _low_float16(word):
    """The lower of two float16 in 32 bits."""
    return half_to_float(uint16(word & uint32(0xFFFF)))


@device
def _high_float16(word):
    """The upper of two float16 in 32 bits."""
    return half_to_float(uint16(word >> uint32(16)))


def pair_widener(dtype: str) -> tuple[Any, Any]:
    """Return the functions that widen the lower and the upper of two 16-bit floats in a word."""
    if dtype == "bfloat16":
        return _low_bfloat16, _high_bfloat16
    return _low_float16, _high_float16


ELEMENTS = {
    "float16": Element(
        "uint16", float32, "float32", half_to_float, float_to_half, times_float, exp2_float, LOG2_E
    ),
    "bfloat16": Element(
        "uint16",
        float32,
        "float32",
        _widen_bfloat16,
        _narrow_bfloat16,
        times_float,
        exp2_float,
        LOG2_E,
    ),
    "float32": Element("float32", float32, "float32", _same, _same, times_float, exp_float, 1.0),
    "float64": Element("float64", float64, "float64", _same, _same, times_double, exp_double, 1.0),
}


def as_storage(x: np.ndarray) -> np.ndarray:
    """View a host array as kernels see it: float16 as its bits."""
    return x.view(np.uint16) if x.dtype == np.float16 else x
