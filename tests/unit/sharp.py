"""Attention with sharp scores: inputs whose dot products are exact, and what to compare with.

q, k, v and dout are multiples of 1 / 64 (times a power of two), so that no order of summation makes
one evaluation luckier than another: what is left is one rounding of a score, one of lse, and those
of weights and results.
"""

import numpy as np

import scfa_core as scfa

SIZES = {1: (1, 1), 8: (4, 2), 128: (16, 8), 1024: (32, 32), 2**13: (128, 64), 2**17: (512, 256),
         2**20: (1024, 1024)}  # fmt: skip
HEADS, SEQLEN = 4, 160


def on_a_grid(head_dim, size=1, seqlen=SEQLEN, seed=0):
    """q, k, v and dout; scores before softmax_scale have a standard deviation of about size *
    sqrt(head_dim)."""
    draws = np.random.default_rng(seed).standard_normal((4, 1, HEADS, seqlen, head_dim))
    q, k, v, dout = (np.rint(draws * 64) / 64).astype(np.float32)
    return q * np.float32(SIZES[size][0]), k * np.float32(SIZES[size][1]), v, dout


def dense(q, k, v, dout, mask, dtype):
    """dq, dk, dv by the formula of flash attention, every step in `dtype`."""
    scale = dtype(np.float32(q.shape[-1] ** -0.5))
    q, k, v, dout = (x.astype(dtype) for x in (q, k, v, dout))
    scores = np.where(mask, q @ k.swapaxes(-1, -2) * scale, dtype(-np.inf))
    row_max = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - row_max)
    total = weights.sum(axis=-1, keepdims=True)
    delta = (dout * (weights @ v / total)).sum(axis=-1, keepdims=True)
    p = np.exp(scores - (row_max + np.log(total)))
    ds = p * (dout @ v.swapaxes(-1, -2) - delta)
    return ds @ k * scale, ds.swapaxes(-1, -2) @ q * scale, p.swapaxes(-1, -2) @ dout


def visible(buckets):
    """Mask of causal attention within buckets."""
    return np.tri(SEQLEN, dtype=bool) & (buckets[..., :, None] == buckets[..., None, :])


def pairs(seqlen=SEQLEN):
    """A pattern that shows every query one key, and that key of each head and query."""
    rng = np.random.default_rng(2)
    q_ids = np.stack([rng.permutation(seqlen) for _ in range(HEADS)])[None]
    k_ids = np.stack([rng.permutation(seqlen) for _ in range(HEADS)])[None]
    key = np.take_along_axis(np.argsort(k_ids), q_ids, -1)[..., None]
    return scfa.HashSparse(q_ids, k_ids, causal=False), key


def assert_as_exact(got, others, right, where):
    """dq, dk and dv err by at most twice what others do, at the largest entry and in norm."""
    for name, mine, other, true in zip(("dq", "dk", "dv"), got, others, right, strict=True):
        error, allowed = np.abs(mine - true), np.abs(other - true)
        # Of what is tiny altogether, a weight of e**-80, no more than its size is asked.
        floor = 4 * np.spacing(np.float32(max(np.abs(true).max(), 1e-20)))
        assert error.max() <= 2 * allowed.max() + floor, f"{name} of {where}"
        assert np.linalg.norm(error) <= 2 * np.linalg.norm(allowed) + floor, f"{name} of {where}"
