"""Dense masks from the definition of each pattern: the only place where one is spelled out."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

import numpy as np

from scfa_core.array_kinds import check_dense, dtype_name
from scfa_core.arrays import INT_DTYPES, ITEMSIZE
from scfa_core.errors import DeviceError, DTypeError, PatternError, ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray


_KINDS = ("Causal", "HashSparse", "QKSparse", "Documents", "SlidingWindow", "KeyRanges")


def to_host(x: Any) -> NDArray[Any]:
    """Bring an array of any library to NumPy (a copy from a GPU)."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().resolve_neg()
        x = x.double() if x.is_floating_point() else x  # NumPy has no bfloat16
    elif hasattr(x, "copy_to_host"):
        x = x.copy_to_host()
    elif hasattr(x, "get"):
        x = x.get()
    return np.asarray(x)


def _spread(
    x: Any, shape: tuple[int, ...], name: str, dtypes: Container[str] = INT_DTYPES
) -> NDArray[Any]:
    """An array of a pattern on the host, broadcast; what `attention` refuses is refused here."""
    check_dense(name, x)
    if dtype_name(x) not in dtypes:
        wanted = "integers" if dtypes is INT_DTYPES else "bools or real numbers"
        raise DTypeError(f"{name} must be an array of {wanted}, got {dtype_name(x)}; cast it")
    if str(getattr(x, "device", "")) == "meta":
        raise DeviceError(f"{name} is on the device meta and has no values: give those to look at")
    pairs = zip(x.shape, shape, strict=False)
    if len(x.shape) != len(shape) or any(got not in (1, size) for got, size in pairs):
        raise ShapeError(
            f"{name} must broadcast to {shape}, axis by axis, got shape {tuple(x.shape)}; mask "
            "takes batch=, heads= and heads_kv= (by default 1, 1 and as many as heads)"
        )
    return np.broadcast_to(to_host(x), shape)


def _python_ints(x: NDArray[Any]) -> NDArray[Any]:
    """Exact integers of any size, so that uint64 and int64 compare as numbers."""
    return x.astype(object)


def _part_mask(part: Any, batch: int, heads: int, heads_kv: int, tq: int, tk: int) -> NDArray[Any]:
    """(batch, heads, tq, tk) mask of one atomic pattern."""
    i = np.arange(tq)[:, None]
    j = np.arange(tk)[None, :]
    q_shape, k_shape = (batch, heads, tq), (batch, heads_kv, tk)
    group = heads // heads_kv if heads_kv else 1
    reach = tq + tk  # no two positions are further apart: larger numbers may not fit in 64 bits
    kind = next((base.__name__ for base in type(part).__mro__ if base.__name__ in _KINDS), "")

    def per_query_head(x: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(x, group, axis=1)

    if kind == "Causal":
        shift = tk - tq if part.align == "bottom-right" else 0
        allowed = j <= i + shift - min(part.lag, reach)
    elif kind == "HashSparse":
        q_hash = _python_ints(_spread(part.q_hash, q_shape, "q_hash"))
        k_hash = per_query_head(_python_ints(_spread(part.k_hash, k_shape, "k_hash")))
        allowed = (q_hash[..., :, None] == k_hash[..., None, :]).astype(bool)
        if part.causal:
            allowed = allowed & (j <= i if part.include_self else j < i)
    elif kind == "QKSparse":
        q_keep = _spread(part.q_keep, q_shape, "q_keep", ITEMSIZE) != 0
        k_keep = per_query_head(_spread(part.k_keep, k_shape, "k_keep", ITEMSIZE) != 0)
        allowed = q_keep[..., :, None] & k_keep[..., None, :]
        if part.causal:
            allowed = allowed & (j <= i)
    elif kind == "Documents":
        q_ids = _python_ints(_spread(part.q_ids, (batch, tq), "q_ids"))
        k_ids = _python_ints(_spread(part.k_ids, (batch, tk), "k_ids"))
        allowed = (q_ids[:, None, :, None] == k_ids[:, None, None, :]).astype(bool)
        if part.causal:
            allowed = allowed & (j <= i)
    elif kind == "SlidingWindow":
        window = min(part.window, reach)
        allowed = (i - window < j) & (j <= i if part.causal else j < i + window)
    elif kind == "KeyRanges":
        start = _spread(part.start, q_shape, "start")[..., None]
        end = _spread(part.end, q_shape, "end")[..., None]
        allowed = (start <= j) & (j < end)
    else:
        raise PatternError(f"no definition for {part!r}: it is none of {', '.join(_KINDS)}")
    return np.broadcast_to(allowed, (batch, heads, tq, tk))


def dense_mask(
    pattern: Any, batch: int, heads: int, heads_kv: int, seqlen_q: int, seqlen_k: int
) -> NDArray[np.bool_]:
    """Return the bool mask (batch, heads, seqlen_q, seqlen_k) of a pattern.

    Source: the table of patterns in docs/patterns.md.
    """
    mask = np.ones((batch, heads, seqlen_q, seqlen_k), bool)
    for part in pattern.parts:
        mask &= _part_mask(part, batch, heads, heads_kv, seqlen_q, seqlen_k)
    return mask
