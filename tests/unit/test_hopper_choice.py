"""Which way a key head's backward goes, by the shipped kernel run as host C++."""

import ctypes

import hopper_host
import host_build
import numpy as np
import pytest
from scfa_core.backends.cupy_raw import launch_sm90

import scfa_core as scfa
from scfa_core.plan import PlanArrays
from scfa_core.problem import Problem

pytestmark = host_build.NEEDS_COMPILER
kernels = hopper_host.kernels
SPLIT, FUSED = 0, 1
NONE, ALL, SOME = 0, 1, 2
HEADS_AT = 8  # kChoiceHeads
# Where the fused way begins is a constant of the shipped kernel, and here a number of each call:
# so one compilation serves all tests.
SOURCE = hopper_host.source_of(
    (),
    "static int long_keys;\n"
    "#define SCFA_LONG_KEYS long_keys\n"
    '#include "bwd_choose_sm90.cu"\n'
    + hopper_host.DRIVER.replace("KERNEL", "scfa_bwd_choose_sm90")
    .replace("READS_IN_VAIN", "")
    .replace("int run(", "int run_blocks(")
    + """
extern "C" int run(const Params* p, int blocks, int keys) {
  long_keys = keys;
  return run_blocks(p, blocks, 32, 0, 0);
}
""",
)


def planned(pattern, heads, heads_kv, seqlen):
    rows = [np.zeros((1, some, seqlen, 64), np.float32) for some in (heads, heads_kv)]
    return scfa.make_plan(pattern, *rows, backend="numba-cpu")


def chosen(kernels, plan, long_keys):
    """Words of choice_sm90.cuh for a plan, with the fused way from `long_keys` on."""
    _, heads, seqlen = plan.q_index.shape
    heads_kv, keys = plan.k_index.shape[1:]
    problem = Problem(1, heads, heads_kv, seqlen, keys, 64, 64, "bfloat16", "cpu", 1.0)
    names = ("q_index", "q_count", "k_index", "k_count", "key_start", "key_end")
    lists = [np.ascontiguousarray(getattr(plan, name)) for name in names]
    arrays = PlanArrays.of([*(hopper_host.described(x, "int32") for x in lists), None], True)
    choice = np.full(HEADS_AT + heads_kv, -7, np.int32)
    tiles, counted = -(-keys // 128), np.zeros(2, np.int32)
    params = launch_sm90._params(
        *(problem, arrays, (None,) * 8, None, (0, 0), counted.ctypes.data),
        *((tiles, tiles * heads_kv), heads_kv),
        choice=choice.ctypes.data,
    )
    run = kernels.start(SOURCE, (("BFLOAT16", 1),)).result()
    held = host_build.aligned_copy(np.frombuffer(params, np.uint8), 64)
    assert run(ctypes.c_void_p(held.ctypes.data), -(-heads_kv // 4), long_keys) == 0
    return choice


def pair_keys(plan, head):
    """Keys of an average pair's tile, by all 64-row tiles of a query head."""
    count = int(plan.q_count[0, head])
    first = np.arange(0, count, 64)
    last = np.minimum(first + 64, count) - 1
    keys = plan.key_end[0, head][last] - plan.key_start[0, head][first]
    keys = np.maximum(keys, 0).astype(np.float64)
    return (keys**2).sum() / max(keys.sum(), 1)


def hashed(rng, heads, seqlen, buckets):
    ids = rng.integers(0, buckets, (1, heads, seqlen)).astype(np.int32)
    return scfa.HashSparse(ids, ids)


@pytest.mark.parametrize(
    ("seqlen", "buckets"),
    [(4096, 13), (8192, 16), (16384, 16), (16384, 32), (20011, 24), (65536, 64), (131072, 128)],
)
def test_heads_that_are_alike_go_one_way(kernels, seqlen, buckets):
    """Also where buckets and looks are at distances that divide each other."""
    rng = np.random.default_rng(seqlen + buckets)
    heads = 2 if seqlen > 65536 else 6
    plan = planned(hashed(rng, heads, seqlen, buckets), heads, heads, seqlen)
    exact = [pair_keys(plan, head) for head in range(heads)]
    for long_keys, way in ((int(0.93 * min(exact)), FUSED), (int(1.07 * max(exact)), SPLIT)):
        choice = chosen(kernels, plan, long_keys)
        assert choice[HEADS_AT:].tolist() == [way] * heads
        assert choice[:2].tolist() == ([ALL, NONE] if way == SPLIT else [NONE, ALL])
        assert not choice[2:6].any()  # counters, and the word after the last of them


@pytest.mark.parametrize(
    ("pattern", "seqlen"),
    [
        (scfa.Causal(), 1),
        (scfa.Causal(), 1031),
        (scfa.SlidingWindow(500), 4099),
        (scfa.Causal(), 9001),
    ],
)
def test_exact_but_for_looks(kernels, pattern, seqlen):
    plan = planned(pattern, 1, 1, seqlen)
    exact = pair_keys(plan, 0)
    assert chosen(kernels, plan, int(0.97 * exact))[HEADS_AT] == FUSED
    assert chosen(kernels, plan, int(1.03 * exact) + 1)[HEADS_AT] == SPLIT


def test_long_tiles_count_by_their_pairs(kernels):
    """One long bucket among many rows that see little: its pairs are nearly all there are."""
    seqlen = 8192
    ids = np.arange(seqlen, dtype=np.int32)
    ids[: seqlen // 4] = -1
    plan = planned(scfa.HashSparse(ids[None, None], ids[None, None]), 1, 1, seqlen)
    assert chosen(kernels, plan, 1050)[HEADS_AT] == FUSED  # 350 keys a tile, 1140 a pair's tile
    assert chosen(kernels, plan, 1250)[HEADS_AT] == SPLIT


def test_query_heads_of_a_key_head_decide_together_and_other_heads_do_not(kernels):
    rng = np.random.default_rng(5)
    seqlen = 2048
    ids = rng.integers(0, 64, (1, 6, seqlen))
    ids[:, 2:4] = 0
    keys = ids[:, ::2].copy()
    keys[:, 2], ids[:, 4], ids[:, 5] = 0, 1, 0  # the first head of this group sees nothing
    plan = planned(scfa.HashSparse(ids.astype(np.int32), keys.astype(np.int32)), 6, 3, seqlen)
    choice = chosen(kernels, plan, launch_sm90._LONG_KEYS[128])
    assert choice[HEADS_AT:].tolist() == [SPLIT, FUSED, FUSED]
    assert choice[:2].tolist() == [SOME, SOME]


def test_nothing_visible_is_not_long(kernels):
    nobody = np.zeros((1, 2, 700), bool)
    plan = planned(scfa.QKSparse(nobody, nobody), 2, 2, 700)
    assert chosen(kernels, plan, 1)[HEADS_AT:].tolist() == [SPLIT, SPLIT]
