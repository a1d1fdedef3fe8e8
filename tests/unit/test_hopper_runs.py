"""The Hopper kernels on fibers (hopper_host.py): rows that the tensor engine fetches."""

from dataclasses import replace

import hopper_host
import host_build
import numpy as np
import pytest
from hopper_host import check_case, run
from scfa_core.reference.masks import dense_mask

import scfa_core as scfa
from scfa_core import testing
from scfa_core.testing import Part, Spec

pytestmark = host_build.NEEDS_COMPILER
kernels = hopper_host.kernels

CAUSAL = (Part("causal", number=0),)
FAR = (Part("causal", number=70),)  # of which the first rows see nothing, and hold no numbers
WAYS = [(64, False), (64, True), (96, False), (128, True)]


def with_pattern(case, pattern):
    spec = case.spec
    sizes = (spec.batch, spec.heads, spec.heads_kv, spec.seqlen_q, spec.seqlen_k)
    return replace(case, pattern=pattern, mask=dense_mask(pattern, *sizes))


@pytest.mark.parametrize(("head_dim", "fused"), WAYS)
@pytest.mark.parametrize(
    "parts", [CAUSAL, (Part("window", number=150),), FAR], ids=["causal", "window", "far keys"]
)
def test_runs_and_rows_by_index_are_the_same_bits(kernels, head_dim, fused, parts):
    batch = 2 if parts == CAUSAL else 1
    sizes = (batch, 2, 1, 270, 270, head_dim, head_dim, "bfloat16")
    case = testing.build(Spec(*sizes, parts=parts, poison=True, seed=11))
    results = (run(kernels, case, fused=fused, mapped=mapped) for mapped in (True, False))
    for mapped, gathered in zip(*results, strict=True):
        assert mapped.tobytes() == gathered.tobytes()


@pytest.mark.parametrize("first", [144, 150, 208])
@pytest.mark.parametrize(("head_dim", "fused"), WAYS)
def test_keys_between_runs_that_nobody_sees(kernels, head_dim, fused, first):
    """Rows in order whose keys lie far apart; in between are blocks that no warpgroup looks at."""
    sizes = (1, 1, 1, 400, 1500, head_dim, head_dim, "bfloat16")
    case = testing.build(Spec(*sizes, parts=CAUSAL, seed=12))
    q_hash, k_hash = np.zeros((1, 1, 400), np.int32), np.ones((1, 1, 1500), np.int32)
    q_hash[..., first:] = 2
    k_hash[..., :300], k_hash[..., 1000:] = 0, 2
    case.k[:, :, 300:1000] = case.v[:, :, 300:1000] = 0x7FC0  # NaN
    pattern = scfa.HashSparse(q_hash, k_hash, causal=False)
    check_case(kernels, with_pattern(case, pattern), fused=fused)


@pytest.mark.parametrize(("head_dim", "fused"), WAYS)
@pytest.mark.parametrize("dropped", [31, 32, 300])
def test_lists_that_are_runs_but_for_one_row(kernels, head_dim, fused, dropped):
    """What tells that rows may be runs says so of tiles that hold other rows as well."""
    sizes = (1, 1, 1, 390, 390, head_dim, head_dim, "bfloat16")
    case = testing.build(Spec(*sizes, parts=CAUSAL, seed=13))
    keep = np.ones((1, 1, 390), bool)
    keep[..., dropped] = False
    case.q[:, :, dropped] = case.k[:, :, dropped] = case.v[:, :, dropped] = 0x7FC0
    case.dout[:, :, dropped] = 0x7FC0
    check_case(kernels, with_pattern(case, scfa.QKSparse(keep, keep)), fused=fused)


@pytest.mark.parametrize(("head_dim", "fused"), WAYS)
def test_rows_that_only_seem_to_be_runs(kernels, head_dim, fused):
    """32 rows whose first and last are as far apart as those of a run, before rows that are one."""
    sizes = (1, 1, 1, 384, 384, head_dim, head_dim, "bfloat16")
    case = testing.build(Spec(*sizes, parts=CAUSAL, seed=14))
    ids = np.arange(384) // 32 * 3
    ids[1:160] += 1 - (np.arange(1, 160) % 32 == 0) + (np.arange(1, 160) % 32 == 31)
    ids[5:160:32], ids[9:160:32] = ids[:160:32], ids[31:160:32]  # sorted: 0, 5, ..., 9, 31
    ids[160:] = 99
    ids = ids.astype(np.int32)[None, None]
    check_case(kernels, with_pattern(case, scfa.HashSparse(ids, ids)), fused=fused)


@pytest.mark.parametrize(("head_dim", "fused"), WAYS)
def test_a_row_that_nobody_sees_before_row_0(kernels, head_dim, fused):
    """As if it were row -1 of a run: the tensor engine has zeros there."""
    sizes = (1, 1, 1, 384, 384, head_dim, head_dim, "bfloat16")
    case = testing.build(Spec(*sizes, parts=CAUSAL, seed=15))
    q_hash, k_hash = (np.ones((1, 1, 384), np.int32) for _ in range(2))
    q_hash[..., 5], k_hash[..., 9] = 2, 0  # first of the keys is one that nobody sees
    case.k[:, :, 9] = case.v[:, :, 9] = 0x7FC0
    case.q[:, :, 5] = case.dout[:, :, 5] = 0x7FC0
    check_case(kernels, with_pattern(case, scfa.HashSparse(q_hash, k_hash)), fused=fused)
