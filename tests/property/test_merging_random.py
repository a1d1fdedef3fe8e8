"""Any partition of the keys, merged, is attention over all of them."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import scfa_core as scfa
from scfa_core.merging import attention_over
from scfa_core.strategies import specs
from scfa_core.testing import Spec, build, truth


@given(spec=specs(most_rows=60, most_parts=2), parts=st.integers(1, 4), seed=st.integers(0, 999))
def test_partition_of_keys(spec: Spec, parts: int, seed: int):
    case = build(spec)
    rng = np.random.default_rng(seed)
    edges = np.sort(rng.integers(0, spec.seqlen_k + 1, (parts - 1, *case.q.shape[:3])), axis=0)
    zero = np.zeros(case.q.shape[:3], np.int64)
    bounds = [zero, *edges, zero + spec.seqlen_k]
    patterns = [case.pattern & scfa.KeyRanges(a, b) for a, b in pairwise(bounds)]
    options = {"softmax_scale": spec.softmax_scale, "backend": "reference", "return_lse": True}
    out, lse = attention_over(case.q, case.k, case.v, patterns, **options)
    right = truth(case)
    np.testing.assert_allclose(lse, right.lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out, right.out, rtol=1e-5, atol=1e-5)
