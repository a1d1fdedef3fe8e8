"""Closed-form gradients of masked attention, in float64.

p = softmax(scale * q @ k.T);  dv = p.T @ dout;  dp = dout @ v.T
ds = p * (dp - delta), delta = rowsum(p * dp);  dq = scale * ds @ k;  dk = scale * ds.T @ q
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scfa_core.reference.attention import probabilities, spread_heads, visible_product

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def _sum_group(x: Array, heads_kv: int) -> Array:
    """Sum the heads that share a key/value head."""
    batch, heads, rows, cols = x.shape
    groups = x.reshape(batch, heads_kv, heads // heads_kv, rows, cols)
    return np.add.reduce(groups, axis=2)


def gradients(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    mask: NDArray[np.bool_],
    softmax_scale: float,
) -> tuple[Array, Array, Array]:
    """Return dq, dk, dv of ``sum(out * dout)``; rows that take no part get 0."""
    heads, heads_kv = q.shape[1], k.shape[1]
    k, v = spread_heads(k, heads), spread_heads(v, heads)
    with np.errstate(invalid="ignore", over="ignore"):
        p, _ = probabilities(q, k, mask, softmax_scale)
        dp = np.where(mask, dout @ np.swapaxes(v, -1, -2), 0.0)
        delta = (p * dp).sum(axis=-1, keepdims=True)
        ds = np.where(mask, p * (dp - delta), 0.0)
    mask_t = np.swapaxes(mask, -1, -2)
    dq = softmax_scale * visible_product(ds, mask, k)
    dk = softmax_scale * visible_product(np.swapaxes(ds, -1, -2), mask_t, q)
    dv = visible_product(np.swapaxes(p, -1, -2), mask_t, dout)
    return dq, _sum_group(dk, heads_kv), _sum_group(dv, heads_kv)
