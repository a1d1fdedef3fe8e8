"""The running maximum of the online softmax, where it may be infinite or not there at all."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from numba import float32, float64
from scfa_core.backends.numba_cuda.compiling import INFINITY, LOG2_E, device
from scfa_core.backends.numba_cuda.convert import ELEMENTS

LSE_ROUNDING = 2.0**-23  # of the given lse: sums in another order may be rounded the other way


@cache
def softmax_functions(dtype: str) -> tuple[Any, Any, Any]:
    """Build `shift_of`, `rescale_factor` and `log_of` for the accumulator of `dtype`."""
    element = ELEMENTS[dtype]
    acc, exp, log_unit = element.acc, element.exp, element.log_unit

    @device
    def shift_of(row_max):
        """What is subtracted from scores: the maximum, 0 where it is no number to subtract."""
        if row_max > -INFINITY and row_max < INFINITY:
            return row_max
        return acc(0)

    @device
    def rescale_factor(old, new):
        """Factor of the sums when the maximum moves from old to new; 0 before any score."""
        if old == -INFINITY:
            return acc(0)
        return exp(shift_of(old) - shift_of(new))

    @device
    def log_of(x):
        """Logarithm in the base of the scores; -inf at 0."""
        if x > 0:
            return math.log(x) * acc(log_unit)
        if x == 0:
            return acc(-INFINITY)
        return x

    return shift_of, rescale_factor, log_of


@device
def refined_lse(own, given):
    """`own`, this softmax's lse in float64, if `given` is its float32 rounding.

    Otherwise `given`: that of another softmax, as where several patterns were merged.
    """
    rounded = float32(own)
    near = abs(rounded - given) <= LSE_ROUNDING * abs(given)
    if rounded == given or (abs(given) < INFINITY and near):
        return own
    return float64(given)


@device
def log2(x):
    """Logarithm to base 2; -inf at 0."""
    if x > 0:
        return math.log(x) * LOG2_E
    if x == 0:
        return -INFINITY
    return x
