"""The Hopper kernels on fibers (hopper_host.py) against the truth: ranges in order."""

import dataclasses
import itertools

import hopper_host
import host_build
import numpy as np
import pytest
from hopper_host import HASH, IN_ONE_PASS, WINDOW, check, check_case, run
from scfa_core.backends.cupy_raw import shapes_sm90

import scfa_core as scfa
from scfa_core import testing
from scfa_core.testing import Part, Spec

pytestmark = host_build.NEEDS_COMPILER
kernels = hopper_host.kernels


@pytest.mark.parametrize("head_dim", [40, 96, 120])
def test_narrow_rows(kernels, head_dim):
    spec = Spec(1, 2, 1, 140, 200, head_dim, head_dim, "bfloat16", parts=HASH, poison=True, seed=1)
    check(kernels, spec)


@pytest.mark.parametrize("head_dim", [136, 192, 256])
def test_wide_rows(kernels, head_dim):
    spec = Spec(1, 2, 1, 130, 200, head_dim, head_dim, "bfloat16", parts=HASH, poison=True, seed=2)
    check(kernels, spec)


@pytest.mark.parametrize("seqlen", [1, 49, 331])
@pytest.mark.parametrize("name", ["causal", "all together", "keep none"])
@pytest.mark.parametrize("head_dim", [184, 256])
def test_wide_rows_in_many_blocks(kernels, head_dim, name, seqlen):
    """Buffers come round, weights are handed over, out lies where keys were and will be."""
    parts = {"causal": (Part("causal", number=0),), **IN_ONE_PASS}[name]
    sizes = (1, 2, 1, seqlen, seqlen, head_dim, head_dim, "bfloat16")
    spec = Spec(*sizes, parts=parts, poison=True, seed=seqlen)
    check(kernels, spec, order=seqlen % 3, blocks=1 + seqlen % 2)


def test_the_narrowest_rows_in_float16(kernels):
    spec = Spec(1, 2, 1, 200, 200, 16, 16, "float16", parts=WINDOW, poison=True, seed=3)
    check(kernels, spec, order=2, blocks=2)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    # At the others float16 would be compiled for this test alone, and differs in conversions only.
    [
        *itertools.product((64, 128, 256), ("float16", "bfloat16")),
        *((d, "bfloat16") for d in (40, 192)),
    ],
)
def test_weights_that_outgrow_what_came_before(kernels, head_dim, dtype):
    """Maxima of later blocks far above those of the first: sums and outputs shrink on the way."""
    sizes = (1, 2, 1, 330, 330, head_dim, head_dim, dtype)
    check(kernels, Spec(*sizes, softmax_scale=4.0, parts=(Part("causal", number=0),), seed=6))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_scores_far_below_those_of_another_block(kernels, head_dim):
    """Half of the keys at -1e6: differences of the other scores survive that."""
    sizes = (1, 1, 1, 300, 300, head_dim, head_dim, "float16")
    case = testing.build(Spec(*sizes, softmax_scale=1.0, parts=(Part("hash", "uniform", 1),)))
    rng = np.random.default_rng(0)
    q, k = np.zeros(case.q.shape), np.zeros(case.k.shape)
    q[..., 0], q[..., 1] = 100.0, 2.0
    k[..., 1] = rng.standard_normal(k.shape[:3]) * 2
    k[:, :, 150:, 0] = -1e4
    case.q[...], case.k[...] = q, k
    got, right = run(kernels, case), testing.truth(case)
    rows = case.mask[:, :, :, :150].sum(-1) > 1
    assert np.abs(got.lse - right.lse)[rows].max() < 1e-5
    assert all(verdict.ok for verdict in testing.judge(case, got))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_row_of_one_key_is_that_key(kernels, head_dim, dtype):
    """Its weight is 1 whatever the sign of its score: a reference off its maximum is rounded."""
    sizes = (1, 1, 1, 100, 100, head_dim, head_dim, dtype)
    case = testing.build(Spec(*sizes, parts=(Part("window", number=1),), seed=3))
    assert np.array_equal(run(kernels, case).out, testing.widen(case.v, dtype))


# Scores of one block after another as the forward kernel meets them, for a row of weight 1.
OF_EITHER_SIGN = {
    "below zero": (-5.0, -4.0, -6.0),
    "just below zero, then above": (-0.5, -3.0, 0.5),
    "zero": (0.0, -0.0, 0.0),
    "zero, then far above": (0.0, -60.0, 60.0),
    "far below, just below, far above": (-60.0, -1.0, 60.0),
    "above, then far below": (3.0, -60.0, -60.0),
    "above, and further": (3.0, 20.0, 60.0),
}


@pytest.mark.parametrize("name", OF_EITHER_SIGN)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_of_either_sign(kernels, head_dim, name):
    """Rows of one warp on both sides of zero, and keys that stand out, at any place of a block."""
    sizes = (1, 1, 1, 384, 384, head_dim, head_dim, "float16")
    case = testing.build(Spec(*sizes, softmax_scale=1.0, parts=(Part("causal", number=0),)))
    rng = np.random.default_rng(len(name))
    q, k = np.zeros(case.q.shape), np.zeros(case.k.shape)
    drawn, first_half = rng.choice([1.0, 0.25, -1.0], 384), np.arange(384) // 8 % 2 == 0
    q[..., 0] = np.where(first_half & (head_dim == 64), 1.0, drawn)  # a thread holds one of either
    of_key = np.repeat(OF_EITHER_SIGN[name][::-1], 128)  # the last block comes first
    k[..., 0] = of_key + np.where(rng.random(384) < 0.02, rng.choice([-30.0, 30.0], 384), 0.0)
    case.q[...], case.k[...] = q, k
    got, right = run(kernels, case), testing.truth(case)
    assert np.abs(got.lse - right.lse).max() < 1e-5
    assert all(verdict.ok for verdict in testing.judge(case, got))


UPWARDS, DOWNWARDS = 3, 4  # of cuda_on_host.hpp: those who fetch run far ahead, or far behind


@pytest.mark.parametrize("seqlen", [1, 129, 450])
@pytest.mark.parametrize("name", ["causal", "all together", "keep none"])
def test_two_gathering_warpgroups(kernels, name, seqlen):
    """They take blocks in turn, on from tile to tile, and fetch no tile that nobody sees."""
    parts = {"causal": (Part("causal", number=0),), **IN_ONE_PASS}[name]
    spec = Spec(1, 4, 2, seqlen, seqlen, 64, 64, "bfloat16", parts=parts, poison=True, seed=seqlen)
    assert shapes_sm90.DQ[64].gatherers == shapes_sm90.DKDV[64].gatherers == 2
    check(kernels, spec, order=seqlen % 3, blocks=1 + seqlen % 2)


@pytest.mark.parametrize("head_dim", sorted(shapes_sm90.FUSED))
@pytest.mark.parametrize("seqlen", [1, 63, 64, 65, 127, 129, 331])
def test_causal_in_one_pass(kernels, head_dim, seqlen):
    causal = (Part("causal", number=0),)
    spec = Spec(1, 1, 1, seqlen, seqlen, head_dim, head_dim, "bfloat16", parts=causal, seed=seqlen)
    check(kernels, spec, fused=True, order=seqlen % 3)


@pytest.mark.parametrize("head_dim", sorted(shapes_sm90.FUSED))
@pytest.mark.parametrize("name", IN_ONE_PASS)
def test_patterns_in_one_pass(kernels, head_dim, name):
    """Grouped heads, and sums of dq whose room is used again."""
    sizes = (1, 4, 2, 150, 277, head_dim, head_dim, "float16")
    spec = Spec(*sizes, parts=IN_ONE_PASS[name], poison=True, seed=5)
    check(kernels, spec, fused=True, order=2, blocks=2, slots=2)


@pytest.mark.parametrize(("name", "order"), [*zip(IN_ONE_PASS, (0, 2, 0, 2), strict=True)])
def test_tiles_of_heads_in_turn(kernels, name, order):
    """Of two at a time, and of one left over; the bits are those of heads one after the other."""
    parts = IN_ONE_PASS[name]
    spec = Spec(1, 6, 3, 277, 277, 64, 64, "bfloat16", parts=parts, poison=True, seed=3)
    case = testing.build(spec)
    got = run(kernels, case, fused=True, order=order, blocks=2, slots=4, in_turn=1)
    assert not [verdict for verdict in testing.judge(case, got) if not verdict.ok]
    after = run(kernels, case, fused=True, slots=4)
    for x in ("dq", "dk", "dv"):
        np.testing.assert_array_equal(getattr(got, x), getattr(after, x))


@pytest.mark.parametrize(
    ("head_dim", "ways"), [(128, [0, 1, 1, 0]), (128, [1, 0, 0, 0]), (128, [0, 1, 0, 1])]
)
def test_heads_that_go_different_ways(kernels, head_dim, ways):
    """Each as where all go its way, whichever heads are passed over before or after it."""
    spec = Spec(2, 4, 2, 200, 277, head_dim, head_dim, "bfloat16", parts=HASH, poison=True, seed=6)
    case = testing.build(spec)
    mixed = run(kernels, case, blocks=2, order=2, ways=ways)
    for way in (0, 1):
        alone = run(kernels, case, fused=bool(way))
        for x in ("dq", "dk", "dv"):
            got, want = getattr(mixed, x), getattr(alone, x)
            got, want = (y.reshape(4, -1, *y.shape[2:]) for y in (got, want))  # by key heads
            np.testing.assert_array_equal(got[np.equal(ways, way)], want[np.equal(ways, way)])


@pytest.mark.parametrize(
    ("blind", "order"), [(0, UPWARDS), (1, DOWNWARDS), (2, UPWARDS), (2, DOWNWARDS)]
)
def test_who_says_that_a_tile_ends(kernels, blind, order):
    """Of three query heads to a key head one sees nothing; keys stay until the last has done."""
    spec = Spec(1, 6, 2, 400, 400, 64, 64, "float16", parts=(Part("causal", number=0),), seed=4)
    case = testing.build(spec)
    keep = np.ones((1, 6, 400), bool)
    keep[:, blind::3, 100:] = False
    keep[:, 3 + blind] = False
    pattern = case.pattern & scfa.QKSparse(keep, np.ones((1, 2, 400), bool))
    mask = case.mask & keep[..., None]
    case = dataclasses.replace(case, pattern=pattern, mask=mask)
    check_case(kernels, case, fused=True, order=order, slots=3)


@pytest.mark.parametrize("head_dim", sorted(shapes_sm90.FUSED))
def test_keys_between_rows_in_one_pass(kernels, head_dim):
    """Rows of one key and few more: what one row alone sees is fetched, in every 32 of them."""
    parts = (Part("hash", "uniform", 150),)
    spec = Spec(1, 3, 3, 400, 400, head_dim, head_dim, "bfloat16", parts=parts, poison=True, seed=8)
    check(kernels, spec, fused=True)


@pytest.mark.parametrize("head_dim", sorted(shapes_sm90.FUSED))
@pytest.mark.parametrize("kept", [0, 1, 30])
def test_tiles_that_nobody_sees_in_one_pass(kernels, head_dim, kept):
    """By blocks that take tiles in turn; the rows of these are 0."""
    parts = (Part("keep", "uniform", kept),)
    spec = Spec(2, 2, 1, 300, 700, head_dim, head_dim, "bfloat16", parts=parts, poison=True, seed=9)
    check(kernels, spec, fused=True, blocks=2)


@pytest.mark.parametrize(("head_dim", "fused"), [(64, False), (64, True), (128, True)])
def test_the_build_for_the_sanitizer(kernels, head_dim, fused):
    """It has arrivals, copies and sums of its own."""
    parts = (Part("window", number=200),)
    spec = Spec(1, 2, 2, 270, 270, head_dim, head_dim, "bfloat16", parts=parts, seed=6)
    check(kernels, spec, fused=fused, order=1, slots=1, sanitize=True)


@pytest.mark.parametrize("order", [UPWARDS, DOWNWARDS])
@pytest.mark.parametrize(
    ("head_dim", "fused", "mapped"),
    [(256, False, False), *itertools.product((64, 128), (False, True), (False, True))],
)
def test_warps_that_run_as_far_as_they_can(kernels, head_dim, fused, mapped, order):
    """More blocks than buffers, in several tiles and heads, whose sums share their room.

    Without maps all rows are copied by index, and each product needs its fence.
    """
    length = 200 if head_dim == 256 else 330
    parts = (Part("window", number=length - 30),)
    sizes = (1, 4, 2, length, length, head_dim, head_dim, "bfloat16")
    spec = Spec(*sizes, parts=parts, seed=7)
    check(kernels, spec, fused=fused, order=order, slots=2, mapped=mapped)


@pytest.mark.parametrize("lengths", [(66, 650), (650, 66)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_more_blocks_than_buffers(kernels, head_dim, lengths):
    """In one tile, so that no room is known to be free but by its own barrier."""
    many_keys = lengths[0] < lengths[1]
    parts = (Part("causal", number=int(many_keys)),)  # every query sees nearly all of them
    spec = Spec(1, 1, 1, *lengths, head_dim, head_dim, "bfloat16", parts=parts, seed=7)
    check(kernels, spec, order=DOWNWARDS if many_keys else UPWARDS)


def test_without_a_proxy_fence_products_see_no_copied_rows(kernels, monkeypatch):
    """The played memory is as unkind as that: no output is a number."""
    forward = itertools.islice(hopper_host.passes(Spec(1, 1, 1, 70, 70, 64, 64), False), 1)
    monkeypatch.setattr(hopper_host, "passes", lambda *_: forward)
    spec = Spec(1, 1, 1, 70, 70, 64, 64, "bfloat16", parts=(Part("causal", number=0),), seed=7)
    assert np.isnan(run(kernels, testing.build(spec), fences=False).out).all()
