"""The original's functions on random problems, against the dense masks of the definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scfa_core.reference.attention import attention as dense_attention

import scfa_core as scfa

pytest.importorskip("torch", reason="the original's functions are torch functions")

from scfa_core.compat import dynamic_sparse_attention

lengths = st.integers(1, 70)


@given(
    seqlen_q=lengths,
    seqlen_k=lengths,
    heads_kv=st.integers(1, 2),
    group=st.integers(1, 3),
    mode=st.sampled_from(["hash", "qk"]),
    kinds=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_problems(seqlen_q, seqlen_k, heads_kv, group, mode, kinds, seed):
    rng = np.random.default_rng(seed)
    heads = heads_kv * group
    q = rng.standard_normal((2, seqlen_q, heads, 16))
    k, v = rng.standard_normal((2, 2, seqlen_k, heads_kv, 16))
    top = kinds if mode == "hash" else 2
    q_idx, k_idx = (rng.integers(0, top, x.shape[:3], dtype=np.int32) for x in (q, k))
    if mode == "qk":
        q_idx, k_idx = q_idx.astype(np.float32), k_idx.astype(np.float32)
    with scfa.use_backend("reference"):
        out = dynamic_sparse_attention(q, k, v, q_idx, k_idx, None, mode)
    a = q_idx.swapaxes(1, 2)[..., :, None]
    b = np.repeat(k_idx.swapaxes(1, 2), group, axis=1)[..., None, :]
    met = a == b if mode == "hash" else (a == 1) & (b == 1)
    mask = met & (np.arange(seqlen_k) <= np.arange(seqlen_q)[:, None])
    right, _ = dense_attention(*(x.swapaxes(1, 2) for x in (q, k, v)), mask, 0.25)
    np.testing.assert_allclose(out, right.swapaxes(1, 2), rtol=0, atol=1e-12)
