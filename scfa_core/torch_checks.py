"""Checks of tensors that are worked on before `attention` sees them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from scfa_core.array_kinds import check_dense
from scfa_core.arrays import ITEMSIZE
from scfa_core.errors import DeviceError, DTypeError, PatternError, ShapeError
from scfa_core.torch_bridge import is_plain
from scfa_core.torch_framework import dtype_name

__all__ = [
    "broadcasts",
    "check_device",
    "check_dtype",
    "check_fits",
    "check_index",
    "check_tensor",
]


def check_tensor(name: str, x: Any, *axes: str) -> Tensor:
    """Refuse what is no dense torch tensor, or has not as many axes as are named."""
    if not isinstance(x, Tensor):
        shape = f" ({', '.join(axes)})" if axes else ""
        raise DTypeError(f"{name} must be a torch tensor{shape}, got {type(x).__name__}")
    check_dense(name, x)
    if axes and x.ndim != len(axes):
        count = "1 axis" if len(axes) == 1 else f"{len(axes)} axes"
        raise ShapeError(
            f"{name} must have {count} ({', '.join(axes)}), got {name}.shape={tuple(x.shape)}"
        )
    return x


def check_dtype(name: str, x: Tensor, dtypes: Container[str] = ITEMSIZE) -> None:
    """Refuse what torch cannot count or compare, or has none of the dtypes."""
    if dtype_name(x.dtype) not in dtypes:
        wanted = "real numbers" if dtypes is ITEMSIZE else f"one of {dtypes}"
        raise DTypeError(f"{name} must be {wanted}, got {x.dtype}; cast it (.float(), .long())")


def check_fits(
    name: str, x: Any, scores: Tensor, error: type[PatternError | DTypeError] | None = None
) -> None:
    """Refuse what is no real numbers that broadcast to the scores; with `error`, no integers."""
    check_tensor(name, x)
    if not broadcasts(x.shape, scores.shape):
        raise ShapeError(
            f"{name} must broadcast to scores.shape={tuple(scores.shape)}, got "
            f"{name}.shape={tuple(x.shape)}"
        )
    if x.ndim:
        check_device(name, x, "scores", scores)
    check_dtype(name, x)
    if error is not None and (x.is_floating_point() or x.dtype == torch.bool):
        raise error(f"{name} must be integers, got {x.dtype}")


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of `shape` expands to another."""
    return len(shape) <= len(to) and all(
        size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(to), strict=False)
    )


def check_device(name: str, x: Tensor, of: str, like: Tensor) -> None:
    """Refuse a tensor on another device."""
    if x.device != like.device:
        raise DeviceError(f"{name} must be on {like.device} like {of}, got {x.device}; move it")


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
    check_device("index", index, "x", x)
    if not is_plain(index, x, x) or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    least, most = index.aminmax() if index.numel() else (0, -1)
    if least < 0 or most >= seqlen:
        raise PatternError(
            f"index must name rows 0 to {seqlen - 1} of x.shape={tuple(x.shape)}, got "
            f"{int(least if least < 0 else most)}; what pad_index wrote over names none"
        )
