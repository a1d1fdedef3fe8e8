"""Sharp scores of float32 arrays: a score is one number in forward and backward on the card too."""

import numpy as np
import pytest
from gpu_calls import everything
from sharp import HEADS, SEQLEN, SIZES, assert_as_exact, dense, on_a_grid, pairs, visible

import scfa_core as scfa


def call(torch, backend, arrays, pattern):
    """Out, lse, dq, dk, dv as NumPy arrays."""
    tensors = [torch.from_numpy(x).cuda() for x in arrays]
    return [x.cpu().numpy() for x in everything(backend, tensors, pattern)]


def hashes(torch, ids, causal=True):
    return scfa.HashSparse(*(torch.from_numpy(x).cuda() for x in ids), causal=causal)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("head_dim", [16, 24, 64, 104])
def test_the_weight_of_an_only_key_is_one(torch, backend, head_dim, size):
    """Also where dot products are inexact: all kernels find the same bits of one."""
    rng = np.random.default_rng(3)
    shape = (1, HEADS, SEQLEN, head_dim)
    wide = [rng.standard_normal(shape).astype(np.float32) * np.float32(size**0.5) for _ in "qk"]
    _, _, v, dout = on_a_grid(head_dim)
    pattern, key = pairs()
    ids = pattern.q_hash, pattern.k_hash
    out, _, _, _, dv = call(torch, backend, (*wide, v, dout), hashes(torch, ids, causal=False))
    np.testing.assert_array_equal(out, np.take_along_axis(v, key, 2))
    np.testing.assert_array_equal(np.take_along_axis(dv, key, 2), dout)


@pytest.mark.parametrize("buckets", [1, 8])
@pytest.mark.parametrize("head_dim", [16, 24, 64])
def test_gradients_are_as_exact_as_the_formula(torch, backend, head_dim, buckets):
    ids = np.random.default_rng(1).integers(0, buckets, (1, HEADS, SEQLEN))
    for size in SIZES:
        case = on_a_grid(head_dim, size)
        right, others = (dense(*case, visible(ids), kind) for kind in (np.float64, np.float32))
        got = call(torch, backend, case, hashes(torch, (ids, ids)))[2:]
        assert_as_exact(got, others, right, f"scores of size {size}")
