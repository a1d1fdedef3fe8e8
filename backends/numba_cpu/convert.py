"""Stored type <-> arithmetic type, and e**x, as straight-line code that vectorises.

Stored types are float32, float64, int16 (bits of a float16) and uint16 (bits of a bfloat16);
the arithmetic type is float64 for float64 and float32 for the rest.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# numba infers the types of compiled functions from their arguments.

from math import factorial

import numpy as np
from numba import types
from numba.extending import overload, register_jitable
from scfa_core.backends.numba_cpu.vector import as_bits, as_float

__all__ = ["exp", "narrow", "widen"]


def exp(x):
    """e**x to a few units in the last place; 0 below the normal range, NaN for NaN and +inf."""
    raise NotImplementedError("compiled code only")


def widen(x):
    """Stored element as arithmetic value; exact."""
    raise NotImplementedError("compiled code only")


def narrow(x, like):
    """Arithmetic value as stored element of the type of `like`; round to nearest, ties to even."""
    raise NotImplementedError("compiled code only")


_LN2 = 0.6931471805599453


def _polynomial(degree: int) -> list[float]:
    """Coefficients of e**f on |f| <= log(2) / 2 by Chebyshev interpolation; the first is one."""
    nodes = _LN2 / 2 * np.cos(np.pi * (np.arange(degree) + 0.5) / degree)
    # e**f = 1 + f * r(f): interpolate r, whose Taylor series avoids cancellation near zero.
    powers = [sum(f**n / factorial(n + 1) for n in range(25)) for f in nodes]
    return [1.0, *np.linalg.solve(np.vander(nodes, increasing=True), powers).tolist()]


_F0, _F1, _F2, _F3, _F4, _F5, _F6 = (np.float32(c) for c in _polynomial(6))
_F_MAGIC = np.float32(1.5 * 2**23)  # adding it rounds to an integer, kept in the lowest bits
_F_LOG2E, _F_LN2 = np.float32(1 / _LN2), np.float32(_LN2)
_F_LOWEST = np.float32(-126 * _LN2)
_F_ZERO = np.float32(0)
_D = tuple(_polynomial(12))
_D0, _D1, _D2, _D3, _D4, _D5, _D6, _D7, _D8, _D9, _D10, _D11, _D12 = _D
_D_MAGIC = 1.5 * 2**52
_D_LOG2E, _D_LN2, _D_LN2_REST = 1 / _LN2, _LN2, 2.3190468138462996e-17
_D_LOWEST = -1022 * _LN2


@register_jitable
def _exp_single(x):
    """e**x = 2**n * e**f in float32, n whole; as many operations as 2**x takes where FMA is."""
    shifted = x * _F_LOG2E + _F_MAGIC
    f = x - (shifted - _F_MAGIC) * _F_LN2
    power = _F5 + f * _F6
    power = _F4 + f * power
    power = _F3 + f * power
    power = _F2 + f * power
    power = _F1 + f * power
    power = _F0 + f * power
    scale = as_float(np.int32((as_bits(shifted) + np.int32(127)) << np.int32(23)))
    return _F_ZERO if x < _F_LOWEST else power * scale


@register_jitable
def _exp_double(x):
    """e**x in float64, where n * log(2) takes two parts: its rest counts from n of a few up."""
    shifted = x * _D_LOG2E + _D_MAGIC
    whole = shifted - _D_MAGIC
    f = x - whole * _D_LN2 - whole * _D_LN2_REST
    power = _D11 + f * _D12
    power = _D10 + f * power
    power = _D9 + f * power
    power = _D8 + f * power
    power = _D7 + f * power
    power = _D6 + f * power
    power = _D5 + f * power
    power = _D4 + f * power
    power = _D3 + f * power
    power = _D2 + f * power
    power = _D1 + f * power
    power = _D0 + f * power
    scale = as_float((as_bits(shifted) + 1023) << 52)
    return 0.0 if x < _D_LOWEST else power * scale


@overload(exp)
def _choose_exp(x):
    return _exp_double if x == types.float64 else _exp_single


_HALF_SCALE = np.float32(2.0**112)  # moves the exponent bias from 15 to 127, subnormals included
_HALF_SUBNORMAL = np.float32(0.5)  # adding it rounds to multiples of 2**-24


@register_jitable
def _widen_half(x):
    """float16 bits to float32."""
    magnitude = np.int32((x & 0x7FFF) << 13)
    value = as_bits(as_float(magnitude) * _HALF_SCALE)
    special = np.int32(0x7F800000) if magnitude >= 0x0F800000 else np.int32(0)
    sign = np.int32((x & 0x8000) << 16)
    return as_float(np.int32(value | special | sign))


@register_jitable
def _widen_brain(x):
    """bfloat16 bits to float32."""
    return as_float(np.int32(np.int32(x) << 16))


@register_jitable
def _same(x):
    return x


@overload(widen)
def _choose_widen(x):
    return {types.int16: _widen_half, types.uint16: _widen_brain}.get(x, _same)


@register_jitable
def _narrow_half(x, like):
    """float32 to float16 bits."""
    bits = as_bits(x)
    magnitude = bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        result = 0x7E00
    elif magnitude >= 0x477FF000:
        result = 0x7C00
    elif magnitude < 0x38800000:
        result = as_bits(as_float(np.int32(magnitude)) + _HALF_SUBNORMAL) - 0x3F000000
    else:
        result = (magnitude - (112 << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    return np.int16(result | ((bits >> 16) & 0x8000))


@register_jitable
def _narrow_brain(x, like):
    """float32 to bfloat16 bits."""
    bits = np.int64(as_bits(x))
    if (bits & 0x7FFFFFFF) > 0x7F800000:
        return np.uint16(((bits >> 16) & 0x8000) | 0x7FC0)
    return np.uint16(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF)


@register_jitable
def _narrow_same(x, like):
    return x


@overload(narrow)
def _choose_narrow(x, like):
    return {types.int16: _narrow_half, types.uint16: _narrow_brain}.get(like, _narrow_same)
