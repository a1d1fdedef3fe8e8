"""Parts of a union that see the same pair are found, by whatever library and on odd sizes."""

import itertools
import re

import numpy as np
import pytest

import scfa_core as scfa
from scfa_core.hashing import disjoint_rounds

BATCH, HEADS, HEADS_KV, TQ, TK = 2, 4, 2, 9, 7
RNG = np.random.default_rng(0)
Q, K = np.zeros((BATCH, HEADS, TQ, 16)), np.zeros((BATCH, HEADS_KV, TK, 16))
Q_HASH, K_HASH = RNG.integers(0, 5, (BATCH, HEADS, TQ)), RNG.integers(0, 5, (BATCH, HEADS_KV, TK))
START = RNG.integers(0, TK, (BATCH, HEADS, TQ))
PARTS = {
    "window": scfa.SlidingWindow(3),
    "far": scfa.Causal(lag=3),
    "hash": scfa.HashSparse(Q_HASH, K_HASH),
    "far hash": scfa.HashSparse(Q_HASH, K_HASH) & scfa.Causal(lag=3),
    "ranges": scfa.KeyRanges(START, np.minimum(START + 2, TK)),
    "later": scfa.KeyRanges(np.minimum(np.arange(TQ)[None, None] + 1, TK), np.full((1, 1, 1), TK)),
    "flags": scfa.QKSparse(Q_HASH > 3, K_HASH > 3),
}


def dense(pattern):
    return pattern.mask(TQ, TK, batch=BATCH, heads=HEADS, heads_kv=HEADS_KV)


@pytest.mark.parametrize("names", list(itertools.combinations(PARTS, 2)), ids=" and ".join)
def test_the_first_shared_pair_is_one_and_all_are_counted(names):
    one, other = (PARTS[name] for name in names)
    shared = dense(one) & dense(other)
    if not shared.any():
        scfa.validate([one, other], Q, K)
        return
    with pytest.raises(scfa.PatternError, match="patterns 0 and 1 of the list") as caught:
        scfa.validate((one, other), Q, K)
    said = re.search(
        r"query (\d+), key (\d+) .batch (\d+), head (\d+)., one of (\d+)", str(caught.value)
    )
    query, key, batch, head, pairs = map(int, said.groups())
    assert shared[batch, head, query, key]
    assert pairs == shared.sum()


def test_the_patterns_are_told_by_their_places():
    parts = [PARTS["window"], PARTS["later"], PARTS["far"], PARTS["far hash"]]
    scfa.validate(parts[:3], Q, K)
    with pytest.raises(scfa.PatternError, match="patterns 2 and 3 of the list"):
        scfa.validate(parts, Q, K)


def test_rounds_are_disjoint():
    q_bucket, k_bucket = RNG.integers(0, 4, (2, 2, 1, 1, 30))
    x = np.zeros((1, 1, 30, 16))
    parts = disjoint_rounds(q_bucket, k_bucket, 4)
    scfa.validate(parts, x, x)
    with pytest.raises(scfa.PatternError, match="count twice"):
        scfa.validate([*parts, parts[-1]], x, x)


def test_each_of_a_list_is_looked_at_by_itself():
    with pytest.raises(scfa.PatternError, match=r"KeyRanges.start\[0, 0, 0\] must be at least 0"):
        scfa.validate([PARTS["window"], scfa.KeyRanges(START * 0 - 1, START)], Q, K)
    with pytest.raises(scfa.PatternError, match="validate takes a scfa_core pattern"):
        scfa.validate([PARTS["window"], None], Q, K)
    with pytest.raises(scfa.PatternError, match="got an empty list"):
        scfa.validate([], Q, K)
    plan = scfa.make_plan(PARTS["window"], Q, K)
    with pytest.raises(scfa.PatternError, match="got Plan; give what it was made of"):
        scfa.validate([PARTS["window"], plan], Q, K)


def test_more_clauses_than_can_be_intersected():
    hashes = scfa.Intersection(*[PARTS["hash"]] * 5)
    with pytest.raises(scfa.PatternError, match=r"0 and 1 of the list cannot be compared: .* 10"):
        scfa.validate([hashes & scfa.SlidingWindow(3), hashes & scfa.Causal(lag=3)], Q, K)


def test_meta_has_no_values():
    torch = pytest.importorskip("torch", reason="tensors are torch's")
    q, k = (torch.from_numpy(x).to("meta") for x in (Q, K))
    with pytest.raises(scfa.DeviceError, match="tensors on meta have none"):
        scfa.validate([scfa.SlidingWindow(3), scfa.Causal(lag=3)], q, k)


def test_tensors_and_the_other_layout():
    torch = pytest.importorskip("torch", reason="tensors are torch's")
    q, k = torch.from_numpy(Q).transpose(1, 2), torch.from_numpy(K).transpose(1, 2)
    hashed = scfa.HashSparse(torch.from_numpy(Q_HASH), torch.from_numpy(K_HASH))
    scfa.validate([hashed & scfa.SlidingWindow(3), scfa.Causal(lag=3)], q, k, layout="bthd")
    with pytest.raises(scfa.PatternError, match="count twice"):
        scfa.validate([hashed, scfa.Causal(lag=1)], q, k, layout="bthd")
