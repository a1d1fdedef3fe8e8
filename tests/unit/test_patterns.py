"""Masks against the plain reading of each definition, pair by pair."""

import numpy as np
import pytest

import scfa_core as scfa

RNG = np.random.default_rng(0)
BATCH, HEADS, HEADS_KV, TQ, TK = 2, 4, 2, 7, 9
I64 = np.iinfo(np.int64)


def spelled_out(visible):
    """Build the mask from a predicate of (batch, head, kv head, query, key)."""
    mask = np.zeros((BATCH, HEADS, TQ, TK), bool)
    for b, h, i, j in np.ndindex(mask.shape):
        mask[b, h, i, j] = visible(b, h, h // 2, i, j)
    return mask


def dense(pattern):
    return pattern.mask(TQ, TK, batch=BATCH, heads=HEADS, heads_kv=HEADS_KV)


Q_HASH = RNG.choice([I64.min, -1, 0, I64.max], (BATCH, HEADS, TQ))
K_HASH = RNG.choice([I64.min, -1, 0, I64.max], (BATCH, HEADS_KV, TK))
Q_KEEP = RNG.random((BATCH, HEADS, TQ)) < 0.5
K_KEEP = RNG.random((BATCH, HEADS_KV, TK)) < 0.5
Q_IDS = np.sort(RNG.integers(0, 3, (BATCH, TQ)))
K_IDS = np.sort(RNG.integers(0, 3, (BATCH, TK)))
START = RNG.integers(-3, TK, (BATCH, HEADS, TQ))
END = RNG.integers(0, TK + 3, (BATCH, HEADS, TQ))

CASES = {
    "causal": (scfa.Causal(), lambda b, h, g, i, j: j <= i),
    "causal strict": (scfa.Causal(include_self=False), lambda b, h, g, i, j: j < i),
    "causal, far keys": (scfa.Causal(lag=5), lambda b, h, g, i, j: j <= i - 5),
    "causal, no key is so far": (scfa.Causal(lag=2**40), lambda b, h, g, i, j: False),
    "causal, nothing is so far": (
        scfa.Causal(lag=2**63 - 1, align="bottom-right"),
        lambda b, h, g, i, j: False,
    ),
    "hash, far keys": (
        scfa.HashSparse(Q_HASH, K_HASH) & scfa.Causal(lag=3, align="bottom-right"),
        lambda b, h, g, i, j: j <= min(i, i + TK - TQ - 3) and Q_HASH[b, h, i] == K_HASH[b, g, j],
    ),
    "causal bottom-right": (
        scfa.Causal(align="bottom-right"),
        lambda b, h, g, i, j: j <= i + TK - TQ,
    ),
    "hash": (
        scfa.HashSparse(Q_HASH, K_HASH),
        lambda b, h, g, i, j: j <= i and Q_HASH[b, h, i] == K_HASH[b, g, j],
    ),
    "hash, self excluded": (
        scfa.HashSparse(Q_HASH, K_HASH, include_self=False),
        lambda b, h, g, i, j: j < i and Q_HASH[b, h, i] == K_HASH[b, g, j],
    ),
    "hash, not causal": (
        scfa.HashSparse(Q_HASH, K_HASH, causal=False),
        lambda b, h, g, i, j: Q_HASH[b, h, i] == K_HASH[b, g, j],
    ),
    "keep": (
        scfa.QKSparse(Q_KEEP, K_KEEP.astype(np.float32)),
        lambda b, h, g, i, j: j <= i and Q_KEEP[b, h, i] and K_KEEP[b, g, j],
    ),
    "documents": (
        scfa.Documents(Q_IDS, K_IDS),
        lambda b, h, g, i, j: j <= i and Q_IDS[b, i] == K_IDS[b, j],
    ),
    "window": (scfa.SlidingWindow(3), lambda b, h, g, i, j: i - 3 < j <= i),
    "window, both sides": (
        scfa.SlidingWindow(3, causal=False),
        lambda b, h, g, i, j: i - 3 < j < i + 3,
    ),
    "window of none": (scfa.SlidingWindow(0), lambda b, h, g, i, j: False),
    "ranges": (
        scfa.KeyRanges(START, END),
        lambda b, h, g, i, j: START[b, h, i] <= j < END[b, h, i],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_mask_is_the_definition(name):
    pattern, visible = CASES[name]
    np.testing.assert_array_equal(dense(pattern), spelled_out(visible))


@pytest.mark.parametrize("name", CASES)
def test_plan_is_the_mask(name):
    pattern, _ = CASES[name]
    q, k = np.zeros((BATCH, HEADS, TQ, 16)), np.zeros((BATCH, HEADS_KV, TK, 16))
    plan = scfa.make_plan(pattern, q, k, backend="reference")
    np.testing.assert_array_equal(plan.to_dense(), dense(pattern))
    assert plan.density() == dense(pattern).mean()


def test_size_one_axes_broadcast():
    wide = scfa.HashSparse(np.broadcast_to(Q_HASH[:1, :1], Q_HASH.shape), K_HASH)
    narrow = scfa.HashSparse(Q_HASH[:1, :1], K_HASH)
    np.testing.assert_array_equal(dense(wide), dense(narrow))


def test_intersection_is_flat_and_readable():
    three = scfa.Causal() & (scfa.SlidingWindow(2) & scfa.Causal(include_self=False))
    assert len(three.parts) == 3
    assert repr(three).count(" & ") == 2
    with pytest.raises(TypeError):
        scfa.Causal() & 3


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64"])
def test_any_integer_dtype_of_hashes(dtype):
    info = np.iinfo(dtype)
    q_hash = RNG.choice(np.array([info.min, 1, info.max], dtype), (BATCH, HEADS, TQ))
    k_hash = RNG.choice(np.array([info.min, 1, info.max], dtype), (BATCH, HEADS_KV, TK))
    pattern = scfa.HashSparse(q_hash, k_hash)
    q, k = np.zeros((BATCH, HEADS, TQ, 16)), np.zeros((BATCH, HEADS_KV, TK, 16))
    plan = scfa.make_plan(pattern, q, k, backend="reference")
    np.testing.assert_array_equal(plan.to_dense(), dense(pattern))


@pytest.mark.parametrize("align", ["top-left", "bottom-right"])
@pytest.mark.parametrize("far", [2**63 - 1, 2**63, 10**30])
def test_masks_of_numbers_beyond_64_bits(far, align):
    for seqlen_q, seqlen_k in ((2, 9), (9, 2)):
        assert not scfa.Causal(lag=far, align=align).mask(seqlen_q, seqlen_k).any()
        assert scfa.SlidingWindow(far, causal=False).mask(seqlen_q, seqlen_k).all()
        causal = scfa.SlidingWindow(far).mask(seqlen_q, seqlen_k)
        assert (causal == scfa.Causal().mask(seqlen_q, seqlen_k)).all()


def test_windows_beyond_any_length():
    plan = scfa.make_plan(
        scfa.SlidingWindow(10**30, causal=False),
        np.zeros((1, 1, TQ, 16)),
        np.zeros((1, 1, TK, 16)),
        backend="reference",
    )
    assert plan.to_dense().all()


@pytest.mark.parametrize("make", [scfa.SlidingWindow, lambda n: scfa.Causal(lag=n)])
def test_a_flag_of_any_library_is_no_number_of_keys(make):
    """A bool tensor of torch is an index to Python, and counted as 1 or 0."""
    torch = pytest.importorskip("torch", reason="its bool tensors have an __index__")
    for value in (True, False):
        for flag in (value, np.bool_(value), np.array(value), torch.tensor(value)):
            with pytest.raises(scfa.PatternError, match="must be an int >= 0"):
                make(flag)
    for number in (
        3,
        np.int16(3),
        np.array(3),
        torch.tensor(3),
        torch.tensor(3, dtype=torch.uint8),
    ):
        assert repr(make(number)) == repr(make(3))


def test_an_intersection_of_nothing_has_a_name():
    """Messages end in what came, and this one was the empty string."""
    assert repr(scfa.Intersection()) == "Intersection()"
    assert repr(scfa.Intersection(scfa.Causal())) == repr(scfa.Causal())
    with pytest.raises(scfa.PatternError, match=r"got Intersection\(\)$"):
        bool(scfa.Intersection())


@pytest.mark.parametrize("shape", [(3, 5), (0,)])
def test_arrays_are_no_patterns(shape):
    mask = np.ones(shape, bool)
    for intersect in (lambda: scfa.Causal() & mask, lambda: mask & scfa.Causal()):
        with pytest.raises(scfa.PatternError, match="& takes patterns, not a mask"):
            intersect()
