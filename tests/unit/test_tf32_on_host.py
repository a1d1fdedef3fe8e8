"""float32 under $SCFA_CUPY_FP32=tf32: the portable kernels on fibers, their products TF32.

Judged beside the formula with TF32 products. The instruction as the host plays it refuses operands
that were not rounded.
"""

import host_build
import numpy as np
import portable_host
import pytest
from portable_host import Machine, check
from scfa_core.backends.cupy_raw import variants

from scfa_core import campaign, testing
from scfa_core.testing import Case, Part, Results, Spec

pytestmark = host_build.NEEDS_COMPILER
kernels = portable_host.kernels
HASH = (Part("hash", "uniform", 3),)
A100, ADA, H100 = (variants.SHARED_LIMITS[card] for card in (80, 89, 90))


@pytest.mark.parametrize("seqlen", [1, 63, 64, 65, 127, 129, 331])
def test_lengths(kernels, seqlen):
    parts = (Part("causal", number=0),)
    spec = Spec(1, 2, 1, seqlen, seqlen, 64, 64, "float32", parts=parts, seed=seqlen)
    check(kernels, spec, tf32=True, order=seqlen % 3)


@pytest.mark.parametrize(
    ("parts", "head_dim"),
    [
        (HASH, 128),
        ((Part("keep", "uniform", 50),), 64),
        ((Part("keep", "none"),), 64),
        ((Part("ranges", "random"),), 128),
        ((Part("ranges", "outside"),), 64),
        ((Part("documents", "uniform", 4),), 64),
        ((Part("causal", number=70), Part("hash", "uniform", 3)), 64),
    ],
    ids=["hash", "keep", "none", "ranges", "outside", "documents", "far"],
)
def test_patterns(kernels, parts, head_dim):
    """Grouped heads, rows that see nothing, and NaN in all that nobody sees."""
    sizes = (1, 4, 2, 150, 170, head_dim, head_dim, "float32")
    check(kernels, Spec(*sizes, parts=parts, poison=True, seed=1), tf32=True)


@pytest.mark.parametrize(("head_dim", "order"), [(64, 1), (128, 2)])
def test_no_barrier_is_missing(kernels, head_dim, order):
    """Among them the one after a thread has rounded what it copied."""
    spec = Spec(1, 2, 1, 150, 290, head_dim, head_dim, "float32", parts=HASH, poison=True, seed=2)
    check(kernels, spec, order=order, tf32=True)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "limit"),
    [(16, 16, H100), (24, 40, A100), (72, 128, ADA), (128, 24, H100)],
)
def test_head_dims(kernels, head_dim, head_dim_v, limit):
    """Tiles filled in part, and the shapes of each card."""
    sizes = (1, 2, 2, 90, 130, head_dim, head_dim_v, "float32")
    check(kernels, Spec(*sizes, parts=HASH, seed=3), tf32=True, shared_limit=limit)


@pytest.mark.parametrize(("head_dim", "limit"), [(64, A100), (64, ADA), (128, A100)])
def test_tiles_of_each_card(kernels, head_dim, limit):
    spec = Spec(1, 2, 1, 200, 210, head_dim, head_dim, "float32", parts=HASH, seed=4)
    check(kernels, spec, tf32=True, shared_limit=limit)


@pytest.mark.parametrize(("heads", "heads_kv", "head_dim"), [(8, 1, 32), (80, 1, 128)])
def test_grouped_heads(kernels, heads, heads_kv, head_dim):
    """The last are more than have room beside the preferred tiles of keys on the smallest card."""
    sizes = (1, heads, heads_kv, 20, 75, head_dim, head_dim, "float32")
    check(kernels, Spec(*sizes, parts=HASH, seed=5), tf32=True, shared_limit=ADA)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
def test_scales(kernels, scale):
    spec = Spec(2, 6, 2, 80, 80, 32, 32, "float32", softmax_scale=scale, parts=HASH, seed=5)
    check(kernels, spec, tf32=True)


@pytest.mark.parametrize("seed", range(6))
def test_random_problems(kernels, seed):
    options = {"most_rows": 150, "head_dims": (16, 64)}
    check(kernels, testing.random_spec(seed, **options), tf32=True, order=seed % 3)


@pytest.mark.parametrize("layout", ["bthd", "unaligned"])
def test_strides(kernels, layout):
    spec = Spec(2, 4, 2, 70, 80, 40, 64, "float32", parts=HASH, poison=True, seed=6)
    check(kernels, spec, tf32=True, layout=layout)


def test_the_same_bits_in_any_order_of_threads(kernels):
    case = testing.build(Spec(1, 6, 2, 130, 150, 64, 64, "float32", parts=HASH, seed=7))
    first, *others = [Machine(kernels, case, order, tf32=True).results() for order in (0, 1, 2)]
    for other in others:
        for name in Results._fields:
            np.testing.assert_array_equal(getattr(first, name), getattr(other, name), name)


def test_products_are_tf32(kernels):
    """What the low 13 bits of an operand hold makes no difference; without the switch it does."""
    spec = Spec(1, 1, 1, 60, 60, 32, 32, "float32", parts=HASH, seed=8)
    case = testing.build(spec)
    rounded = Case(spec, *map(testing.as_tf32, arrays(case)), case.pattern, case.mask)
    for tf32 in (True, False):
        whole, short = (Machine(kernels, x, tf32=tf32).results() for x in (case, rounded))
        for name in Results._fields:
            assert np.array_equal(getattr(whole, name), getattr(short, name)) is tf32, name


def arrays(case):
    return case.q, case.k, case.v, case.dout


def test_rows_that_are_made_anew_have_the_same_scores(kernels):
    """Hidden NaN has rows recomputed one by one: their lse is that of tiles but for sums' order.

    Beside the lse of exact scores a backward of TF32 would weigh a row's keys to more than 1.
    """
    sizes = (1, 2, 1, 100, 140, 128, 64, "float32")
    clean, poisoned = (
        testing.build(Spec(*sizes, parts=HASH, poison=poison, seed=7)) for poison in (False, True)
    )
    unseen = ~clean.mask.any(axis=(1, 2))
    assert np.isnan(poisoned.v[:, 0][unseen]).any()
    right, got = (Machine(kernels, case, tf32=True).results() for case in (clean, poisoned))
    assert (got.out != right.out).any()
    np.testing.assert_allclose(got.lse, right.lse, rtol=0, atol=4e-6)


def test_a_poisoned_row_reaches_only_those_who_see_it(kernels):
    """NaN of every kind in one key and one query that many do see: all else is exact all the same.

    The NaN that CUDA makes has all bits set: rounding its bits like a number's would make it -0.
    """
    clean = testing.build(Spec(1, 2, 1, 100, 100, 32, 32, "float32", seed=6))
    for bits in (0x7FFFFFFF, 0x7FC00000, 0xFFFFFFFF):
        case = Case(clean.spec, *(x.copy() for x in arrays(clean)), clean.pattern, clean.mask)
        for x, row in ((case.v, 60), (case.k, 61), (case.dout, 30)):
            x.view(np.uint32)[:, :, row] = bits
        got, right = Machine(kernels, case, tf32=True).results(), testing.truth(case)
        for name in Results._fields:
            nan = np.isnan(getattr(right, name))
            np.testing.assert_array_equal(np.isnan(getattr(got, name)), nan, name)


def test_infinity_stays_infinite(kernels):
    case = testing.build(Spec(1, 1, 1, 150, 150, 16, 16, "float32", seed=6))
    case.v[:, :, 60] = np.inf
    got, right = Machine(kernels, case, tf32=True).results(), testing.truth(case)
    assert np.isinf(right.out[:, :, 60:]).all()
    np.testing.assert_array_equal(got.out[:, :, 60:], right.out[:, :, 60:])
    assert np.isfinite(got.out[:, :, :60]).all()


def test_one_key_leaves_no_gradient_of_its_score(kernels):
    """delta is made of dout as it is multiplied: what it is taken from cancels."""
    parts = (Part("window", number=1),)  # everybody sees itself alone
    case = testing.build(Spec(1, 1, 1, 100, 100, 64, 64, "float32", parts=parts, seed=9))
    assert (case.mask.sum(-1) == 1).all()
    got = Machine(kernels, case, tf32=True).results()
    assert max(np.abs(got.dq).max(), np.abs(got.dk).max()) < 1e-5  # 2e-3 with dout as given


@pytest.mark.parametrize("seed", [500252, 501932])
def test_delta_is_no_worse_than_the_formula_s(kernels, seed):
    """Out, of which delta is made, takes its weights unrounded; these erred by 1.01 and 1.13."""
    case = campaign.draw(seed, dtypes=("float32",)).case
    got = Machine(kernels, case, tf32=True).results()
    ratios = {v.name: max(v.max_ratio, v.norm_ratio) for v in testing.judge(case, got, tf32=True)}
    assert max(ratios["dq"], ratios["dk"]) < 0.55, ratios  # half is the formula's own error
