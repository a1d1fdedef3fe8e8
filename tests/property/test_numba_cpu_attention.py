"""Attention of the CPU backend against float64, and what may not change its bits."""

import numpy as np
import pytest
from hypothesis import given, settings

import scfa_core as scfa
from scfa_core.strategies import specs
from scfa_core.testing import Part, Spec, build, judge, run_numpy, truth

BACKEND = "numba-cpu"


def check(spec):
    case = build(spec)
    got, _ = run_numpy(case, BACKEND)
    bad = [verdict for verdict in judge(case, got) if not verdict.ok]
    assert not bad, f"{spec}: {bad}"


@given(spec=specs(dtypes=("float32", "float16"), head_dims=(16, 72, 136)))
@settings(max_examples=15)
def test_random_problems(spec: Spec):
    check(spec)


@pytest.mark.parametrize("head_dims", [(16, 256), (256, 16), (24, 40), (128, 128)])
def test_head_dims(head_dims):
    head_dim, head_dim_v = head_dims
    parts = (Part("hash", "zipf", 4),)
    check(
        Spec(
            heads=4, heads_kv=2, seqlen_q=131, seqlen_k=193, head_dim=head_dim,
            head_dim_v=head_dim_v, parts=parts, poison=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("seqlen_q", [1, 63, 64, 65, 127, 129])
@pytest.mark.parametrize("seqlen_k", [1, 64, 67, 128])
def test_lengths(seqlen_q, seqlen_k):
    check(Spec(seqlen_q=seqlen_q, seqlen_k=seqlen_k, parts=(Part("causal", number=1),)))


@pytest.mark.parametrize("style", ["random", "narrow", "reversed", "outside", "empty"])
def test_ranges_in_any_order(style):
    parts = (Part("ranges", style), Part("hash", "uniform", 2, causal=False))
    check(Spec(heads=2, seqlen_q=200, seqlen_k=180, parts=parts, poison=True, seed=6))
    check(Spec(heads=2, seqlen_q=200, seqlen_k=180, parts=parts[:1], poison=True, seed=7))


def problem(seqlen=150, heads=2, heads_kv=1, head_dim=32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((1, heads, seqlen, head_dim),) + ((1, heads_kv, seqlen, head_dim),) * 2
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return q, k, v, rng.standard_normal(q.shape).astype(np.float32)


def run(q, k, v, dout, pattern):
    out, lse = scfa.attention(q, k, v, pattern, return_lse=True, backend=BACKEND)
    return out, lse, *scfa.attention_backward(dout, q, k, v, out, lse, pattern, backend=BACKEND)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_poison_reaches_exactly_those_who_see_it(name, poison):
    """Key 70 is bad: in a causal tile it is hidden from some of the rows that share the tile."""
    q, k, v, dout = problem()
    clean = run(q, k, v, dout, scfa.Causal())
    {"k": k, "v": v}[name][0, 0, 70] = poison
    bad = run(q, k, v, dout, scfa.Causal())
    # Rows before 70 do not see it; their out, lse and dq keep every bit.
    for index in (0, 1, 2):
        np.testing.assert_array_equal(bad[index][:, :, :70], clean[index][:, :, :70])
    # Rows from 70 on do see it. (k = -inf or +inf times q of either sign gives +inf, -inf or NaN.)
    if np.isnan(poison):
        for index in (0, 2):
            assert np.isnan(bad[index][:, :, 70:]).all()
    else:
        assert not np.isfinite(bad[0][:, :, 70:]).all()
    assert np.isfinite(bad[0][:, :, :70]).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "dout"])
def test_poisoned_query_reaches_only_keys_it_sees(name, poison):
    q, k, v, dout = problem()
    clean = run(q, k, v, dout, scfa.Causal())
    {"q": q, "dout": dout}[name][0, 1, 70] = poison
    bad = run(q, k, v, dout, scfa.Causal())
    for index in (3, 4):  # keys after 70 are hidden from query 70: dk and dv keep every bit
        np.testing.assert_array_equal(bad[index][:, :, 71:], clean[index][:, :, 71:])
    assert not np.isfinite(bad[4][:, :, :71]).all(axis=-1).any()
    others = np.arange(150) != 70
    np.testing.assert_array_equal(bad[2][:, :, others], clean[2][:, :, others])


def test_infinite_scores_follow_the_truth():
    case = build(Spec(seqlen_q=80, seqlen_k=80, parts=(Part("causal"),), seed=9))
    case.k[0, 0, 3] = np.inf
    case.q[0, 0, 40] = 0  # 0 * inf is NaN
    got, _ = run_numpy(case, BACKEND)
    right = truth(case)
    np.testing.assert_array_equal(np.isnan(got.out), np.isnan(right.out))


def test_large_scores_do_not_overflow():
    q, k, v, dout = problem()
    out, _, *grads = run(q * 300, k * 300, v, dout, scfa.Causal())
    assert np.isfinite(out).all()
    assert all(np.isfinite(x).all() for x in grads)


def test_any_strides():
    """Broadcast heads (stride 0), reversed rows, a slice of a wider array: the same bits."""
    q, k, v, dout = problem(heads=4, heads_kv=4)
    k = np.broadcast_to(k[:, :1], k.shape)
    v = np.ascontiguousarray(v[:, :, ::-1])[:, :, ::-1]
    wide = np.zeros((1, 4, 150, 45), np.float32)
    wide[..., 7:39] = q
    strided = run(wide[..., 7:39], k, v, dout.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3),
                  scfa.SlidingWindow(90))  # fmt: skip
    plain = run(q, k.copy(), v.copy(), dout, scfa.SlidingWindow(90))
    for ours, theirs in zip(strided, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_rows_at_odd_byte_strides():
    """A field of a structured array: rows are not whole elements apart."""
    q, k, v, dout = problem()
    packed = np.zeros(k.shape[:3], np.dtype([("row", np.float32, k.shape[3]), ("tag", np.uint8)]))
    packed["row"] = k
    ours, theirs = (run(q, x, v, dout, scfa.Causal()) for x in (packed["row"], k))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_float64_gradients_do_not_inherit_the_float32_lse():
    case = build(Spec(seqlen_q=100, seqlen_k=100, dtype="float64", parts=(Part("causal"),), seed=2))
    got, right = run_numpy(case, BACKEND)[0], truth(case)
    for name in ("out", "dq", "dk", "dv"):
        np.testing.assert_allclose(getattr(got, name), getattr(right, name), rtol=0, atol=2e-14)
