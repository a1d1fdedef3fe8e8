"""Plans of the CPU backend equal the reference planner's, entry by entry."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import scfa_core as scfa
from scfa_core.strategies import specs
from scfa_core.testing import GROUP_STYLES, Part, Spec, build


def assert_same_plan(case):
    plans = [
        scfa.make_plan(case.pattern, case.q, case.k, backend=backend)
        for backend in ("numba-cpu", "reference")
    ]
    names = ("q_index", "q_count", "k_index", "k_count", "key_start", "key_end")
    for name, ours, theirs in zip(names, plans[0].arrays, plans[1].arrays, strict=False):
        np.testing.assert_array_equal(ours, theirs, err_msg=f"{name} of {case.spec}")
    np.testing.assert_array_equal(plans[0].to_dense(), case.mask)


@given(spec=specs(most_parts=4))
def test_random_patterns(spec: Spec):
    assert_same_plan(build(spec))


@pytest.mark.parametrize("style", GROUP_STYLES)
@pytest.mark.parametrize("causal", [True, False])
def test_every_style_of_groups(style, causal):
    parts = (Part("hash", style, 9, causal),)
    assert_same_plan(
        build(Spec(heads=4, heads_kv=2, seqlen_q=193, seqlen_k=257, parts=parts, seed=3))
    )


def test_wide_and_narrow_columns_together():
    """Three group columns: int64 over the whole range (radix passes), few values, all distinct."""
    parts = (Part("hash", "extreme"), Part("hash", "uniform", 3), Part("hash", "one-huge"))
    assert_same_plan(build(Spec(seqlen_q=300, seqlen_k=300, parts=parts, seed=8)))


@given(
    values=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40),
    seed=st.integers(0, 2**16),
)
def test_any_int64_values(values, seed):
    rng = np.random.default_rng(seed)
    q_hash, k_hash = rng.choice(np.array(values, np.int64), (2, 1, 1, 90))
    x = np.zeros((1, 1, 90, 16), np.float32)
    pattern = scfa.HashSparse(q_hash, k_hash)
    plans = [scfa.make_plan(pattern, x, x, backend=name) for name in ("numba-cpu", "reference")]
    for ours, theirs in zip(plans[0].arrays[:6], plans[1].arrays[:6], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_strided_and_reversed_hashes():
    rng = np.random.default_rng(4)
    wide = rng.integers(0, 5, (2, 3, 200)).astype(np.int32)
    q_hash, k_hash = wide[:, :, ::2], wide[:, :, ::-2]
    x = np.zeros((2, 3, 100, 16), np.float32)
    ours = scfa.make_plan(scfa.HashSparse(q_hash, k_hash), x, x, backend="numba-cpu")
    copied = scfa.HashSparse(np.ascontiguousarray(q_hash), np.ascontiguousarray(k_hash))
    theirs = scfa.make_plan(copied, x, x, backend="reference")
    for a, b in zip(ours.arrays[:6], theirs.arrays[:6], strict=True):
        np.testing.assert_array_equal(a, b)


def test_planning_time_grows_almost_linearly():
    """16 times the rows take less than 64 times as long; a quadratic plan takes 256 times."""
    from time import process_time  # what else runs on the machine does not count

    def seconds(seqlen):
        rng = np.random.default_rng(0)
        q_hash, k_hash = rng.integers(0, 2**40, (2, 1, 1, seqlen))
        x = np.zeros((1, 1, seqlen, 16), np.float16)
        best = np.inf
        for _ in range(5):
            begin = process_time()
            scfa.make_plan(scfa.HashSparse(q_hash, k_hash), x, x, backend="numba-cpu")
            best = min(best, process_time() - begin)
        return best

    seconds(64)
    assert seconds(16 * 8192) < 64 * seconds(8192)
