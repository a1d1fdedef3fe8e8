"""The truth is checked too: against loops, finite differences, and its own roundings."""

import numpy as np
import pytest
from scfa_core.reference.attention import attention
from scfa_core.reference.backend import narrow, widen
from scfa_core.reference.gradients import gradients

from scfa_core.testing import Part, Spec, build, truth


def test_forward_equals_loops():
    case = build(Spec(batch=2, heads=4, heads_kv=2, parts=(Part("hash", number=3),), seed=1))
    q, k, v, _ = case.wide()
    out, lse = attention(q, k, v, case.mask, 0.25)
    for b, h, i in np.ndindex(out.shape[:3]):
        seen = np.flatnonzero(case.mask[b, h, i])
        if not seen.size:
            assert not out[b, h, i].any()
            assert np.isneginf(lse[b, h, i])
            continue
        weights = np.exp([0.25 * (q[b, h, i] @ k[b, h // 2, j]) for j in seen])
        np.testing.assert_allclose(lse[b, h, i], np.log(weights.sum()), rtol=1e-13)
        expected = (weights[:, None] * v[b, h // 2, seen]).sum(0) / weights.sum()
        np.testing.assert_allclose(out[b, h, i], expected, rtol=1e-12, atol=1e-14)


def test_gradients_equal_finite_differences():
    case = build(
        Spec(
            heads=2,
            seqlen_q=5,
            seqlen_k=6,
            dtype="float64",
            parts=(Part("keep", number=80),),
            seed=3,
        )
    )
    q, k, v, dout = case.wide()
    exact = gradients(dout, q, k, v, case.mask, 0.3)
    step = 1e-5
    for which, gradient in enumerate(exact):
        for place in np.ndindex(gradient.shape):
            values = []
            for sign in (step, -step):
                moved = [x.copy() for x in (q, k, v)]
                moved[which][place] += sign
                values.append((attention(*moved, case.mask, 0.3)[0] * dout).sum())
            np.testing.assert_allclose(
                gradient[place], (values[0] - values[1]) / (2 * step), atol=1e-8
            )


def test_poison_in_rows_that_nobody_sees_does_not_leak():
    parts = (Part("hash", "disjoint", 3), Part("window", number=5))
    for seed in range(5):
        case = build(Spec(heads=2, seqlen_q=33, seqlen_k=40, parts=parts, poison=True, seed=seed))
        for name, x in truth(case)._asdict().items():
            assert np.isfinite(x[x != -np.inf]).all(), name


def test_nan_in_a_visible_key_reaches_exactly_those_who_see_it():
    case = build(Spec(seqlen_q=9, seqlen_k=9))
    q, k, v, _ = case.wide()
    v[0, 0, 4, 0] = np.nan
    out, _ = attention(q, k, v, case.mask, 0.25)
    assert np.isnan(out[0, 0, 4:, 0]).all()
    assert np.isfinite(out[0, 0, :4]).all()
    assert np.isfinite(out[..., 1:]).all()


def test_bfloat16_rounding_is_to_nearest_even():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(2000) * 10.0 ** rng.integers(-30, 30, 2000), [0, -0.0]])
    x = np.concatenate([x, [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-50, np.inf, np.nan]])
    single = x.astype(np.float32)
    expected = torch.from_numpy(single).to(torch.bfloat16).to(torch.float64).numpy()
    np.testing.assert_array_equal(
        widen(narrow(single.astype(np.float64), "bfloat16"), "bfloat16"), expected
    )
    assert widen(narrow(np.array([1 + 2.0**-8 + 2.0**-50]), "bfloat16"), "bfloat16") == 1 + 2.0**-7
    near = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40])
    assert widen(narrow(near, "bfloat16"), "bfloat16").tolist() == [1 + 2.0**-7, 1, 1 + 2.0**-7]
    assert (narrow(-near, "bfloat16") == narrow(near, "bfloat16") ^ 0x8000).all()
