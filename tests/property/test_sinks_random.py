"""Any pattern with sinks is dense attention with one key more, which has no value."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import scfa_core as scfa
from scfa_core.sinks import sinks_backward
from scfa_core.strategies import specs
from scfa_core.testing import Spec, build, truth


@given(
    spec=specs(most_rows=40, most_parts=2),
    backend=st.sampled_from(["numba-cpu", "reference"]),
    seed=st.integers(0, 999),
)
def test_a_sink_is_a_key_more(spec: Spec, backend: str, seed: int):
    case = build(replace(spec, dtype="float32"))
    q, k, v = case.q, case.k, case.v
    rng = np.random.default_rng(seed)
    sinks = rng.normal(0, 3, q.shape[1])
    sinks[rng.random(q.shape[1]) < 0.2] = -np.inf
    options = {"softmax_scale": spec.softmax_scale, "backend": backend}
    out, lse = scfa.attention(q, k, v, case.pattern, sinks=sinks, return_lse=True, **options)

    right = truth(case)
    true, seen_lse = right.out, right.lse
    with np.errstate(invalid="ignore"):  # -inf beside -inf
        whole = np.logaddexp(seen_lse, sinks[:, None])
        share = np.where(np.isneginf(seen_lse), 0, np.exp(seen_lse - whole))
    np.testing.assert_allclose(lse, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out, true * share[..., None], rtol=1e-4, atol=1e-5)

    dout = rng.standard_normal(out.shape).astype("float32")
    # a step along the sinks: what they say about out is what their gradient says
    step = np.where(np.isneginf(sinks), 0, 1e-3)
    ahead, behind = (
        scfa.attention(q, k, v, case.pattern, sinks=sinks + sign * step, **options)
        for sign in (1, -1)
    )
    slope = ((ahead.astype("float64") - behind) * dout).sum((0, 2, 3)) / 2e-3
    size = np.abs(out * dout).sum() + 1
    dsinks = sinks_backward(dout, out, lse, sinks)
    slope[np.isneginf(sinks)] = 0
    np.testing.assert_allclose(slope, dsinks, rtol=0, atol=1e-3 * size)
