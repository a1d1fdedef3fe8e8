"""Element conversion of the CPU backend against NumPy, bit by bit where it is exact."""

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="numba is a base dependency")

from scfa_core.backends.numba_cpu.convert import exp, narrow, widen  # noqa: E402
from scfa_core.reference.backend import narrow as reference_narrow  # noqa: E402


@numba.njit(fastmath={"contract"})  # as kernels are compiled
def exp_all(x, y):
    for i in range(x.size):
        y[i] = exp(x[i])


@numba.njit
def widen_all(x, y):
    for i in range(x.size):
        y[i] = widen(x[i])


@numba.njit
def narrow_all(x, y):
    for i in range(x.size):
        y[i] = narrow(x[i], y[i])


@pytest.mark.parametrize(("dtype", "lowest"), [("float32", -87.3), ("float64", -708)])
def test_exp_within_units_in_the_last_place(dtype, lowest):
    """Two units, of float32 five where the result is tiny: n * log(2) is of one constant there."""
    rng = np.random.default_rng(0)
    for start, units in ((-30, 2), (lowest, 5 if dtype == "float32" else 2)):
        x = np.concatenate([rng.uniform(start, 1, 100_000), np.arange(start, 2)]).astype(dtype)
        y = np.empty_like(x)
        exp_all(x, y)
        wide = np.longdouble if dtype == "float64" else np.float64
        true = np.exp(x.astype(wide))
        assert (np.abs(y - true) / np.spacing(true.astype(dtype))).max() < units


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exp_of_special_values(dtype):
    quiet_with_payload = np.array([0x7FC00001], np.int32).view(np.float32).astype(dtype)
    x = np.concatenate([[-np.inf, 0, 1, np.nan, np.inf, -1e30], quiet_with_payload]).astype(dtype)
    y = np.empty_like(x)
    exp_all(x, y)
    np.testing.assert_array_equal(y[:2], [0, 1])
    assert y[2] == pytest.approx(np.e, rel=1e-6)
    assert np.isnan(y[[3, 4, 6]]).all()
    assert y[5] == 0


def test_every_half_widens_exactly_and_comes_back():
    bits = np.arange(2**16, dtype=np.uint16)
    wide = np.empty(bits.size, np.float32)
    widen_all(bits.view(np.int16), wide)
    true = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(wide, true)  # NaN equals NaN here
    back = np.empty(bits.size, np.int16)
    narrow_all(wide, back)
    number = ~np.isnan(true)
    np.testing.assert_array_equal(back.view(np.uint16)[number], bits[number])
    assert np.isnan(back.view(np.float16)[~number]).all()


def test_every_brain_float_widens_exactly_and_comes_back():
    bits = np.arange(2**16, dtype=np.uint16)
    wide = np.empty(bits.size, np.float32)
    widen_all(bits, wide)
    true = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(wide, true)
    back = np.empty_like(bits)
    narrow_all(wide, back)
    number = ~np.isnan(true)
    np.testing.assert_array_equal(back[number], bits[number])
    assert np.isnan((back[~number].astype(np.uint32) << 16).view(np.float32)).all()


@pytest.mark.parametrize(("dtype", "stored"), [("float16", np.int16), ("bfloat16", np.uint16)])
def test_narrow_rounds_to_nearest_even(dtype, stored):
    rng = np.random.default_rng(1)
    # Every exponent, ties and their neighbours among the low bits.
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (bits & np.uint32(0xFFFF0000)) | rng.choice([0, 0x8000, 0x7FFF, 0x8001, 0x1000], 200_000)
    x = np.concatenate([bits, ties.astype(np.uint32)]).view(np.float32)
    x = np.concatenate([x[~np.isnan(x)], np.float32([65504, 65519, 65520, 2**-24, 2**-25, 3e38])])
    got = np.empty(x.size, stored)
    narrow_all(x, got)
    want = reference_narrow(x.astype(np.float64), dtype)
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))
