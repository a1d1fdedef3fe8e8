"""The simulator's side of `ptx`: what each instruction does, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

exp2_float = exp2_double = np.exp2


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
