"""Attention as it is defined: scores materialised, masked, softmaxed, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def spread_heads(x: Array, heads: int) -> Array:
    """Repeat key/value heads so that there is one per query head."""
    return np.repeat(x, heads // x.shape[1], axis=1)


def hidden_rows_as_zero(x: Array, used: NDArray[np.bool_]) -> Array:
    """Set rows that take no part to 0, so that NaN or Inf in them cannot spread (0 * NaN)."""
    return np.where(used[..., None], x, 0.0)


def probabilities(
    q: Array, k: Array, mask: NDArray[np.bool_], softmax_scale: float
) -> tuple[Array, Array]:
    """Return the softmax over visible keys (batch, heads, tq, tk) and lse (batch, heads, tq).

    ``p = exp(scale * q @ k.T - lse)`` where visible, 0 elsewhere; lse is -inf in empty rows.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        scores = np.where(mask, softmax_scale * (q @ np.swapaxes(k, -1, -2)), -np.inf)
        row_max = scores.max(axis=-1, initial=-np.inf)
        shift = np.where(np.isfinite(row_max) | np.isnan(row_max), row_max, 0.0)
        weights = np.where(mask, np.exp(scores - shift[..., None]), 0.0)
        row_sum = weights.sum(axis=-1)
        lse = np.where(row_sum == 0.0, -np.inf, shift + np.log(row_sum))
        p = weights / np.where(row_sum == 0.0, 1.0, row_sum)[..., None]
    return p, lse


def visible_product(weights: Array, mask: NDArray[np.bool_], values: Array) -> Array:
    """``weights @ values`` where a hidden pair contributes nothing, even if the value is NaN.

    Finite rows go through the plain product (a hidden pair's weight is exactly 0); rows of `values`
    that hold NaN or Inf are added pair by pair.
    """
    finite: NDArray[np.bool_] = np.all(np.isfinite(values), axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        total = (
            np.where(mask, weights, 0.0)
            * finite[..., None, :]
            @ hidden_rows_as_zero(values, finite)
        )
        for b, h, j in np.argwhere(~finite):
            seen = mask[b, h, :, j]
            total[b, h, seen] += weights[b, h, seen, j, None] * values[b, h, j]
    return total


def attention(
    q: Array, k: Array, v: Array, mask: NDArray[np.bool_], softmax_scale: float
) -> tuple[Array, Array]:
    """Return out (batch, heads, tq, head_dim_v) and lse (batch, heads, tq), both float64.

    q (batch, heads, tq, head_dim), k and v (batch, heads_kv, tk, ...), mask (batch, heads, tq, tk).
    """
    heads = q.shape[1]
    k, v = spread_heads(k, heads), spread_heads(v, heads)
    q = hidden_rows_as_zero(q, np.asarray(mask.any(axis=-1)))
    with np.errstate(invalid="ignore", over="ignore"):
        p, lse = probabilities(q, k, mask, softmax_scale)
    return visible_product(p, mask, v), lse
