"""Rows of very many keys: what is small beside the sum of a row is not lost on the way."""

import numpy as np
import pytest

import scfa_core as scfa

KEYS, LEAD = 40_000, 17.4  # exp(-17.4) = 2.8e-8: beside 1, less than half a rounding of float32


def leading_key(head_dim=16):
    """One query whose first key leads all others by 17.4 nats; values are 1, and 3 of the first."""
    q = np.zeros((1, 1, 1, head_dim), np.float32)
    k = np.zeros((1, 1, KEYS, head_dim), np.float32)
    v = np.ones((1, 1, KEYS, head_dim), np.float32)
    q[..., 0] = 1
    k[:, :, 0, 0] = LEAD
    v[:, :, 0] = 3
    return q, k, v


def test_small_weights_of_a_long_row_are_not_lost():
    """One by one they would be: a thousandth of the sum in all."""
    q, k, v = leading_key()
    options = {"softmax_scale": 1.0, "backend": "numba-cpu"}
    pattern = scfa.KeyRanges(np.zeros((1, 1, 1), np.int64), np.full((1, 1, 1), KEYS))
    out, lse = scfa.attention(q, k, v, pattern, return_lse=True, **options)
    rest = (KEYS - 1) * np.exp(-np.float64(np.float32(LEAD)))
    assert lse[0, 0, 0] - np.float32(LEAD) == pytest.approx(np.log1p(rest), abs=2e-5)
    assert out[0, 0, 0, 5] == pytest.approx((3 + rest) / (1 + rest), rel=1e-4)
    dout = np.ones_like(q)
    _, _, dv = scfa.attention_backward(dout, q, k, v, out, lse, pattern, **options)
    assert dv[0, 0, 0, 0] == pytest.approx(1 / (1 + rest), rel=1e-4)
