"""The rule for TF32 products (`testing.judge(..., tf32=True)`): how it rounds, what it refuses."""

import numpy as np
import pytest

from scfa_core import testing
from scfa_core.testing import Part, Spec


def test_ten_bits_of_mantissa_are_left():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    x = bits.view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) >= 2.0**-126) & (np.abs(x) < 2.0**127)]
    rounded = testing.as_tf32(x)
    assert rounded.dtype == np.float32
    assert (rounded.view(np.uint32) & 0x1FFF == 0).all()
    unit = 2.0 ** (np.floor(np.log2(np.abs(x).astype(np.float64))) - 10)
    off = np.abs(rounded.astype(np.float64) - x)
    assert (off <= unit / 2).all()
    assert (testing.as_tf32(rounded) == rounded).all()


def test_ties_go_away_from_zero_and_the_rest_stays():
    one = 1 + np.arange(4) * 2.0**-11  # every other of them lies between two numbers of TF32
    up = 1 + np.array([0, 2, 2, 4]) * 2.0**-11
    for sign in (1, -1):
        got = testing.as_tf32((sign * one).astype(np.float32))
        np.testing.assert_array_equal(got, (sign * up).astype(np.float32))
    special = np.array([0.0, np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(testing.as_tf32(special), special)
    most = np.finfo(np.float32).max  # nearer to the power of two that float32 does not have
    assert np.isinf(testing.as_tf32(np.array([most]))).all()


@pytest.fixture(scope="module")
def case():
    parts = (Part("hash", "uniform", 3),)
    return testing.build(Spec(1, 4, 2, 200, 190, 64, 64, "float32", parts=parts, seed=1))


def test_only_where_it_is_asked_for(case):
    plain = testing.baseline(case, tf32=True)
    assert all(verdict.ok for verdict in testing.judge(case, plain, tf32=True))
    assert not any(verdict.ok for verdict in testing.judge(case, plain))
    exact = testing.baseline(case)
    assert all(verdict.ok for verdict in testing.judge(case, exact, tf32=True))


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])  # of lse there are 800: luck counts
def test_three_times_the_error_is_too_much(case, name):
    right, plain = testing.truth(case), testing.baseline(case, tf32=True)
    true, other = getattr(right, name), getattr(plain, name)
    finite = np.where(np.isfinite(true), true, 0.0)
    worse = finite + 3 * (np.where(np.isfinite(true), other, 0.0) - finite)
    got = plain._replace(**{name: np.where(np.isfinite(true), worse, true)})
    bad = [verdict.name for verdict in testing.judge(case, got, right, tf32=True) if not verdict.ok]
    assert bad == [name]
