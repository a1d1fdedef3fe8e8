"""Closed-form gradients of masked attention, in float64.

p = softmax(scale * q @ k.T);  dv = p.T @ dout;  dp = dout @ v.T
ds = p * (dp - delta), delta = rowsum(p * dp);  dq = scale * ds @ k;  dk = scale * ds.T @ q

Where the softmax of a row goes over several patterns, of which this is one, the lse of all is
given: p = exp(scale * q @ k.T - lse), delta = rowsum(out * dout) with the out of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scfa_core.reference.attention import probabilities, spread_heads, visible_product

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_ROUNDING = 2.0**-23  # of the given lse: sums in another order may round to its neighbour


def _sum_group(x: Array, heads_kv: int) -> Array:
    """Sum the heads that share a key/value head."""
    batch, heads, rows, cols = x.shape
    groups = x.reshape(batch, heads_kv, heads // heads_kv, rows, cols)
    return np.add.reduce(groups, axis=2)


def under_given(
    lse: NDArray[np.float32], own: Array
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Array]:
    """Of each row: whether the given lse is this softmax's own, whether nearly, this one's share.

    Nearly is a rounding beside it: the digits are then those of `own`, in float64.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = own.astype(np.float32)
        near = np.isfinite(lse) & (np.abs(rounded - lse) <= _ROUNDING * np.abs(lse))
        share = np.where(np.isinf(lse), 0.0, np.exp(own - lse))
    return (rounded == lse) | (np.isnan(rounded) & np.isnan(lse)), near, share


def gradients(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    mask: NDArray[np.bool_],
    softmax_scale: float,
    merged: tuple[Array, NDArray[np.float32]] | None = None,
) -> tuple[Array, Array, Array]:
    """Return dq, dk, dv of ``sum(out * dout)``; rows that take no part get 0.

    `merged` are the out and lse given, which count in rows whose lse is not this softmax's own.
    """
    heads, heads_kv = q.shape[1], k.shape[1]
    k, v = spread_heads(k, heads), spread_heads(v, heads)
    with np.errstate(invalid="ignore", over="ignore"):
        p, own = probabilities(q, k, mask, softmax_scale)
        dp = np.where(mask, dout @ np.swapaxes(v, -1, -2), 0.0)
        delta = (p * dp).sum(axis=-1, keepdims=True)
        if merged is not None:
            out, lse = merged
            kept, near, share = under_given(lse, own)
            p = np.where(mask & ~(kept | near)[..., None], p * share[..., None], p)
            delta = np.where(kept[..., None], delta, (dout * out).sum(axis=-1, keepdims=True))
        ds = np.where(mask, p * (dp - delta), 0.0)
    mask_t = np.swapaxes(mask, -1, -2)
    dq = softmax_scale * visible_product(ds, mask, k)
    dk = softmax_scale * visible_product(np.swapaxes(ds, -1, -2), mask_t, q)
    dv = visible_product(np.swapaxes(p, -1, -2), mask_t, dout)
    return dq, _sum_group(dk, heads_kv), _sum_group(dv, heads_kv)
