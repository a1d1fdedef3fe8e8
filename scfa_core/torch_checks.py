"""Checks of tensors that are worked on before `attention` sees them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from scfa_core.errors import DTypeError, ShapeError

__all__ = ["check_tensor"]


def check_tensor(name: str, x: Any, *axes: str) -> Tensor:
    """Refuse what is no torch tensor, or has not as many axes as are named."""
    if not isinstance(x, Tensor):
        shape = f" ({', '.join(axes)})" if axes else ""
        raise DTypeError(f"{name} must be a torch tensor{shape}, got {type(x).__name__}")
    if axes and x.ndim != len(axes):
        count = "1 axis" if len(axes) == 1 else f"{len(axes)} axes"
        raise ShapeError(
            f"{name} must have {count} ({', '.join(axes)}), got {name}.shape={tuple(x.shape)}"
        )
    return x
