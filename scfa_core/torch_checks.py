"""Checks of tensors that are worked on before `attention` sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scfa_core.errors import DeviceError, DTypeError, PatternError, ShapeError
from scfa_core.torch_bridge import _is_plain

__all__ = ["check_index", "check_tensor"]


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


def check_index(index: Any, x: Tensor) -> None:
    """Refuse what names no rows of `x`, (batch, seqlen, heads, head_dim), for `compat.compact`."""
    batch, seqlen, heads, _ = x.shape
    if check_tensor("index", index, "batch", "rows", "heads").dtype is not torch.int64:
        raise DTypeError(f"index must be int64, as compact returns it, got {index.dtype}")
    if (index.shape[0], index.shape[2]) != (batch, heads):
        raise ShapeError(
            f"index must be (batch, rows, heads) = ({batch}, rows, {heads}) for "
            f"x.shape={tuple(x.shape)}, got {tuple(index.shape)}"
        )
    if index.device != x.device:
        raise DeviceError(f"index must be on {x.device} like x, got {index.device}; move it there")
    if not _is_plain(index, x, x) or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    least, most = index.aminmax() if index.numel() else (0, -1)
    if least < 0 or most >= seqlen:
        raise PatternError(
            f"index must name rows 0 to {seqlen - 1} of x.shape={tuple(x.shape)}, got "
            f"{int(least if least < 0 else most)}; what pad_index wrote over names none"
        )
