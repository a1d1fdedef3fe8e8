"""The portable kernels on fibers (portable_host.py) against the truth."""

import dataclasses

import host_build
import numpy as np
import portable_host
import pytest
from portable_host import Machine, check
from scfa_core.backends.cupy_raw import variants

import scfa_core as scfa
from scfa_core import campaign, testing, verify
from scfa_core.testing import Case, Part, Results, Spec

pytestmark = host_build.NEEDS_COMPILER
kernels = portable_host.kernels


HASH = (Part("hash", "uniform", 3),)


@pytest.mark.parametrize(
    "parts",
    [HASH, (Part("keep", "uniform", 50),), (Part("ranges", "random"),)],
    ids=["hash", "keep", "ranges"],
)
def test_patterns(kernels, parts):
    check(kernels, Spec(1, 2, 1, 150, 170, 64, 64, "bfloat16", parts=parts, poison=True, seed=1))


@pytest.mark.parametrize("order", [2])
def test_no_barrier_is_missing(kernels, order):
    spec = Spec(1, 2, 1, 150, 290, 64, 64, "float16", parts=HASH, poison=True, seed=2)
    check(kernels, spec, order=order)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "card"),
    [(72, 128, 86), (24, 136, 90), (256, 200, 86), (16, 128, 90), (32, 256, 86)],
)
def test_head_dims(kernels, head_dim, head_dim_v, card):
    spec = Spec(1, 1, 1, 90, 100, head_dim, head_dim_v, "bfloat16", parts=HASH, seed=3)
    check(kernels, spec, shared_limit=variants.SHARED_LIMITS[card])


@pytest.mark.parametrize("head_dim", [24])
def test_float32(kernels, head_dim):
    parts = (Part("keep", "uniform", 80),)  # the last queries see keys of two tiles
    spec = Spec(2, 6, 2, 110, 100, head_dim, 40, "float32", parts=parts, poison=True, seed=4)
    check(kernels, spec)


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scales(kernels, scale):
    spec = Spec(2, 6, 2, 80, 80, 32, 32, "bfloat16", softmax_scale=scale, parts=HASH, seed=5)
    check(kernels, spec)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_poisoned_row_reaches_only_those_who_see_it(kernels, dtype):
    """NaN in one key and one query that many do see: everything else is exact all the same."""
    clean = testing.build(Spec(1, 2, 1, 100, 100, 32, 32, dtype, seed=6))
    bad = np.float32("nan") if dtype == "float32" else 0x7FC0
    for x, row in ((clean.v, 60), (clean.k, 61), (clean.dout, 30)):
        x[:, :, row] = bad
    got = Machine(kernels, clean).results()
    right = testing.truth(clean)
    for name in Results._fields:
        unspoilt = np.isfinite(getattr(right, name))
        assert np.isfinite(getattr(got, name))[unspoilt].all(), name
        assert np.isnan(getattr(got, name))[np.isnan(getattr(right, name))].all(), name


MARGIN = 0.3  # of the allowed error; each of the sums below took 0.4 to 1.3 when added row by row


def assert_margin(case, got):
    verdicts = testing.judge(case, got)
    thin = [v for v in verdicts if max(v.max_ratio, v.norm_ratio) > MARGIN]
    assert not thin, f"{case.spec}: {thin}"


@pytest.mark.parametrize("seed", [1694, 8058])
def test_float32_sums_over_many_rows(kernels, seed):
    """Keys that 300 to 1000 queries of a group see: problems of the campaign that failed."""
    case = campaign.draw(seed, most_rows=4096, dtypes=verify.CUDA_DTYPES).case
    assert case.spec.dtype == "float32"
    assert_margin(case, Machine(kernels, case).results())


@pytest.mark.parametrize(("heads", "seqlen_q", "seqlen_k"), [(8, 500, 20), (2, 70, 2000)])
def test_float32_sums_that_are_made_anew(kernels, heads, seqlen_q, seqlen_k):
    """Hidden NaN in every tile: all rows are recomputed one by one, and sum as well as tiles do."""
    spec = Spec(1, heads, 1, seqlen_q, seqlen_k, 16, 32, "float32", softmax_scale=0.0)
    rng = np.random.default_rng(7)
    q_hash, k_hash = (np.zeros((1, n, rows), int) for n, rows in ((heads, seqlen_q), (1, seqlen_k)))
    q_hash[..., 1:3], k_hash[..., 1:3] = 1, 2  # nobody's
    q_hash[..., 3:5] = k_hash[..., 3:5] = 3  # so that tiles reach over those
    lengths = ((heads, seqlen_q, 16), (1, seqlen_k, 16), (1, seqlen_k, 32), (heads, seqlen_q, 32))
    arrays = [rng.standard_normal((1, *shape), np.float32) for shape in lengths]
    for x in arrays:
        x[:, :, 1:3] = np.nan
    mask = q_hash[..., :, None] == k_hash[..., None, :]
    case = Case(spec, *arrays, scfa.HashSparse(q_hash, k_hash, causal=False), mask)
    assert_margin(case, Machine(kernels, case).results())


def test_the_weight_of_an_only_key_is_one(kernels):
    """Forward and both kernels of backward find the same bits of a score, and lse is one."""
    case = testing.build(Spec(1, 4, 2, 150, 150, 24, 16, "float32", seed=6))
    spread = np.float32(1e3)
    case = dataclasses.replace(
        case, q=case.q * spread, k=case.k * spread, pattern=scfa.SlidingWindow(1)
    )
    got = Machine(kernels, case).results()
    np.testing.assert_array_equal(got.out, case.v.repeat(2, axis=1))
    dv = case.dout.reshape(1, 2, 2, 150, 16)
    np.testing.assert_array_equal(got.dv, dv[:, :, 0] + dv[:, :, 1])


def test_float32_infinity_stays_infinite(kernels):
    case = testing.build(Spec(1, 1, 1, 150, 150, 16, 16, "float32", seed=6))
    case.v[:, :, 60] = np.inf
    got, right = Machine(kernels, case).results(), testing.truth(case)
    assert np.isinf(right.out[:, :, 60:]).all()
    np.testing.assert_array_equal(got.out[:, :, 60:], right.out[:, :, 60:])
    assert np.isfinite(got.out[:, :, :60]).all()


def test_float32_sums_that_overflow_are_infinite(kernels):
    """Gradients of 400 queries whose sum no float32 can hold, tile after tile: Inf, not NaN."""
    spec = Spec(1, 1, 1, 400, 1, 16, 16, "float32", softmax_scale=1.0, seed=7)
    case = testing.build(spec)
    case.q[...] = case.k[...] = 0.0
    case.v[...] = 1.0
    case.dout[...] = 4e36
    got = Machine(kernels, case).results()
    assert np.isposinf(got.dv).all()
