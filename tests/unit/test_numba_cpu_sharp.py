"""Sharp scores, of sizes up to a million: float32 gradients are as exact as the formula allows."""

import numpy as np
import pytest
from sharp import HEADS, SEQLEN, SIZES, assert_as_exact, dense, on_a_grid, pairs, visible

import scfa_core as scfa

BACKEND = "numba-cpu"


def ours(q, k, v, dout, pattern, scale=None):
    """Out, lse, dq, dk, dv."""
    options = {"softmax_scale": scale, "backend": BACKEND}
    out, lse = scfa.attention(q, k, v, pattern, return_lse=True, **options)
    return out, lse, *scfa.attention_backward(dout, q, k, v, out, lse, pattern, **options)


def torch_flash(q, k, v, dout, buckets):
    """The same by torch's flash attention, each bucket of a head by itself."""
    torch = pytest.importorskip("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    results = [np.zeros_like(q) for _ in range(3)]
    for h in range(HEADS):
        for bucket in np.unique(buckets[0, h]):
            rows = np.flatnonzero(buckets[0, h] == bucket)
            *inputs, grad = (torch.tensor(x[:, h : h + 1, rows]) for x in (q, k, v, dout))
            inputs = [x.requires_grad_() for x in inputs]
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                out = scaled_dot_product_attention(*inputs, is_causal=True)
            for result, part in zip(results, torch.autograd.grad(out, inputs, grad), strict=True):
                result[:, h : h + 1, rows] = part.numpy()
    return results


def plain(q, k, v, dout, buckets):
    """The same by the formula in float32."""
    return dense(q, k, v, dout, visible(buckets), np.float32)


@pytest.mark.parametrize("rival", [plain, torch_flash])
@pytest.mark.parametrize("buckets", [1, 8])
@pytest.mark.parametrize("head_dim", [16, 24, 64])
def test_gradients_of_sharp_scores_are_as_exact_as_others(head_dim, buckets, rival):
    ids = np.random.default_rng(1).integers(0, buckets, (1, HEADS, SEQLEN))
    pattern = scfa.Causal() if buckets == 1 else scfa.HashSparse(ids, ids)
    for size in SIZES:
        case = on_a_grid(head_dim, size)
        right = dense(*case, visible(ids), np.float64)
        others = rival(*case, ids)
        assert_as_exact(ours(*case, pattern)[2:], others, right, f"scores of size {size}")


@pytest.mark.parametrize("scale", [None, -0.3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("head_dim", [16, 24, 64, 104])
def test_the_lse_of_one_key_is_its_score_and_its_weight_is_one(head_dim, size, scale):
    q, k, v, dout = on_a_grid(head_dim, size)
    pattern, key = pairs()
    out, lse, _, _, dv = ours(q, k, v, dout, pattern, scale)
    products = (q * np.take_along_axis(k, key, 2)).astype(np.float64).sum(axis=-1)
    factor = np.float32(head_dim**-0.5 if scale is None else scale)
    np.testing.assert_array_equal(lse, factor * products.astype(np.float32))
    np.testing.assert_array_equal(out, np.take_along_axis(v, key, 2))
    np.testing.assert_array_equal(np.take_along_axis(dv, key, 2), dout)


@pytest.mark.parametrize("head_dim", [16, 24, 64, 104])
def test_all_passes_find_the_same_bits_of_a_score(head_dim):
    """Products are inexact here. With delta 0 and dp 1, dq and dk are p times k and q."""
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, 1, HEADS, SEQLEN, head_dim)).astype(np.float32) * 1000
    v = np.zeros_like(q)
    v[..., 0] = 1
    pattern, key = pairs()
    _, lse = scfa.attention(q, k, v, pattern, return_lse=True, backend=BACKEND)
    dq, dk, dv = scfa.attention_backward(
        v, q, k, v, np.zeros_like(v), lse, pattern, backend=BACKEND
    )
    scale = np.float32(head_dim**-0.5)
    np.testing.assert_array_equal(dq, np.take_along_axis(k, key, 2) * scale)
    np.testing.assert_array_equal(np.take_along_axis(dk, key, 2), q * scale)
    np.testing.assert_array_equal(dv, v)


def test_the_first_row_of_causal_attention_has_weight_one():
    q, k, v, dout = on_a_grid(64, 2**20)
    dout[:, :, 1:] = 0
    out, _, _, _, dv = ours(q, k, v, dout, scfa.Causal())
    np.testing.assert_array_equal(out[:, :, 0], v[:, :, 0])
    np.testing.assert_array_equal(dv, dout)
