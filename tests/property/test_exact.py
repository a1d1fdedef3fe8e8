"""Every visible pair, no invisible one: random problems against float64, and invariances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scfa_core as scfa
from scfa_core.strategies import specs
from scfa_core.testing import Part, Spec, build, judge, run_numpy

BACKEND = "numba-cpu"


def check(case):
    got, plan = run_numpy(case, BACKEND)
    np.testing.assert_array_equal(plan.to_dense(), case.mask)
    bad = [verdict for verdict in judge(case, got) if not verdict.ok]
    assert not bad, f"{case.spec}: {bad}"
    return got


@given(spec=specs(dtypes=("float32", "float64", "float16", "bfloat16")))
def test_random_problems(spec: Spec):
    check(build(spec))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 129, 257])
@pytest.mark.parametrize("style", ["clustered", "single", "distinct", "zipf", "disjoint"])
def test_lengths_beside_tile_edges(length, style):
    """The original lost gradients where q and k are hashed apart and cluster in time."""
    spec = Spec(
        heads=2,
        seqlen_q=length,
        seqlen_k=length,
        head_dim=32,
        head_dim_v=32,
        parts=(Part("hash", style, 8),),
        seed=length,
    )
    check(build(spec))


def test_clustered_hashes_at_length():
    """original-system.md, fault 1: 32 buckets, each stretch of 256 uses two of them."""
    parts = (Part("hash", "clustered", 32),)
    check(
        build(Spec(seqlen_q=1100, seqlen_k=1100, head_dim=64, head_dim_v=64, parts=parts, seed=5))
    )


@given(spec=specs(most_rows=70), shift=st.floats(-3, 3))
@settings(max_examples=10)
def test_values_of_one_give_one(spec: Spec, shift: float):
    case = build(Spec(**(vars(spec) | {"poison": False})))
    out, lse = scfa.attention(
        case.q, case.k, np.ones_like(case.v), case.pattern, return_lse=True, backend=BACKEND
    )
    sees = case.mask.any(axis=-1)
    np.testing.assert_allclose(out[sees], 1, rtol=2e-6)
    assert not out[~sees].any()
    assert np.isneginf(lse[~sees]).all()


@given(spec=specs(most_rows=70))
@settings(max_examples=10)
def test_batches_and_heads_do_not_touch_each_other(spec: Spec):
    """The result of one (batch, head) is the same bits alone and among others."""
    case = build(spec)
    _, plan = run_numpy(case, BACKEND)
    out, lse = scfa.attention(
        case.q,
        case.k,
        case.v,
        plan,
        return_lse=True,
        backend=BACKEND,
        softmax_scale=spec.softmax_scale,
    )
    b, h = spec.batch - 1, spec.heads - 1
    g = h // (spec.heads // spec.heads_kv)
    one = scfa.Plan(
        plan.q_index[b : b + 1, h : h + 1].copy(),
        plan.q_count[b : b + 1, h : h + 1].copy(),
        plan.k_index[b : b + 1, g : g + 1].copy(),
        plan.k_count[b : b + 1, g : g + 1].copy(),
        plan.key_start[b : b + 1, h : h + 1].copy(),
        plan.key_end[b : b + 1, h : h + 1].copy(),
        plan.work,
        plan.monotone,
        plan.backend,
        plan.device,
    )
    alone, alone_lse = scfa.attention(
        case.q[b : b + 1, h : h + 1],
        case.k[b : b + 1, g : g + 1],
        case.v[b : b + 1, g : g + 1],
        one,
        return_lse=True,
        backend=BACKEND,
        softmax_scale=spec.softmax_scale,
    )
    np.testing.assert_array_equal(alone[0, 0], out[b, h])
    np.testing.assert_array_equal(alone_lse[0, 0], lse[b, h])


def test_all_visible_is_dense_causal():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 2, 130, 64)).astype(np.float32)
    same = np.zeros((1, 1, 130), np.int32)
    keep = np.ones((1, 1, 130), bool)
    dense = scfa.attention(x, x, x, backend=BACKEND)
    for pattern in (
        scfa.HashSparse(same, same),
        scfa.QKSparse(keep, keep),
        scfa.Documents(same[0]),
        scfa.SlidingWindow(130),
        scfa.KeyRanges(same, np.arange(1, 131)[None, None]),
    ):
        np.testing.assert_array_equal(scfa.attention(x, x, x, pattern, backend=BACKEND), dense)
