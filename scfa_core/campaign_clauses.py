"""Clauses that aim at one way each in which tiles, groups or lists go wrong, by family.

Group lengths one off every multiple of 8 up to 256, one huge group among singletons, orders that
sorts dislike, rows that see nothing, ranges that step back, heads that keep unequally much, packed
documents. `campaign` joins them to problems.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scfa_core import patterns as pt

__all__ = ["FAMILIES", "MORE", "Shapes", "draw_clause", "further_clause"]

FAMILIES = ("lengths", "huge", "orders", "empty", "steps-back", "drops", "packed")
MORE = (*FAMILIES[:3], "drops", "steps-back", "packed", "causal", "window")  # of further clauses
_LAGS = {7: 2, 8: 17, 9: 65}
_STRETCH = (1, -1, 7, 2**31 + 11, -(2**40) - 3)

Ids = tuple[np.ndarray, np.ndarray]


class Shapes(NamedTuple):
    """(batch, heads, seqlen) of queries and of keys."""

    q: tuple[int, int, int]
    k: tuple[int, int, int]


def _runs(rng: np.random.Generator, shape: tuple[int, ...], length: int) -> np.ndarray:
    """Groups of exactly `length` rows, of a row more, or of a row less; in place or scattered."""
    lengths = length + rng.integers(-1, 2, -(-shape[-1] // max(length - 1, 1)) + 1)
    ids = np.repeat(np.arange(lengths.size), lengths)[: shape[-1]]
    ids = rng.permutation(lengths.size)[ids]
    whole = np.broadcast_to(ids, shape)
    return rng.permuted(whole, axis=-1) if rng.random() < 0.5 else whole.copy()


def _lengths(rng: np.random.Generator, shapes: Shapes, seed: int) -> Ids:
    """Group lengths around 8 * (1 .. 32), every multiple in turn; q and k mostly differ."""
    length = 8 * (1 + seed % 32)
    other = length if rng.random() < 0.5 else 8 * int(rng.integers(1, 33))
    return _runs(rng, shapes.q, length), _runs(rng, shapes.k, other)


def _huge(rng: np.random.Generator, shapes: Shapes, seed: int) -> Ids:
    """One group holds nearly all, on one side or both; the others one row each."""
    sides = []
    for shape in shapes:
        alone = rng.random(shape) < (0.5 if rng.random() < 0.2 else 0.03)
        sides.append(np.where(alone, np.arange(shape[-1]) + 1, 0))
    return sides[0], sides[1]


def _orders(rng: np.random.Generator, shapes: Shapes, seed: int) -> Ids:
    """Alternating, descending, rotated, organ pipe: one order each for queries and keys."""

    def one(shape: tuple[int, ...]) -> np.ndarray:
        row, n = np.arange(shape[-1]), shape[-1]
        groups = int(rng.choice([1, 2, 3, 64, n]))
        ids = (
            row % groups,
            (n - row) * groups // n,
            (row + n // 3) % n * groups // n,
            np.minimum(row, n - row) * groups // n,
        )[int(rng.integers(4))]
        return np.broadcast_to(ids, shape).copy()

    return one(shapes.q), one(shapes.k)


def _drops(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Flags whose share differs from head to head: all, none, one row, few, most."""
    keep = rng.random(shape) < rng.choice([0, 0.02, 0.3, 0.9, 1], (*shape[:2], 1))
    if rng.random() < 0.5:
        keep[:, int(rng.integers(shape[1]))] = np.arange(shape[2]) == rng.integers(shape[2])
    return keep


def _steps_back(
    rng: np.random.Generator, shape: tuple[int, int, int], seqlen_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ranges in no order: sawtooth, falling, nested, shuffled, every other one empty."""
    row, n = np.arange(shape[-1]), shape[-1]
    width = int(rng.choice([1, 7, 64, seqlen_k]))
    style = int(rng.integers(5))
    start = (
        (row * 37) % max(seqlen_k, 1),
        (n - row) * seqlen_k // n - width // 2,
        np.minimum(row, seqlen_k // 2),
        rng.integers(-5, seqlen_k + 5, shape),
        row * seqlen_k // n,
    )[style]
    end = np.maximum(seqlen_k - row, start) if style == 2 else start + width
    if style == 4:
        end = np.where(row % 2 == 0, start, end)
    start, end = (np.broadcast_to(x, shape).astype(np.int64) for x in (start, end))
    return start, end


def draw_clause(rng: np.random.Generator, shapes: Shapes, family: str, seed: int) -> pt.Pattern:
    """One pattern of `FAMILIES`."""
    causal = bool(rng.random() < 0.7)
    if family == "drops":
        return pt.QKSparse(_drops(rng, shapes.q), _drops(rng, shapes.k), causal=causal)
    if family == "steps-back":
        return pt.KeyRanges(*_steps_back(rng, shapes.q, shapes.k[-1]))
    if family == "empty":
        kind = int(rng.integers(4))
        none, some = np.zeros(shapes.q, bool), np.ones(shapes.k, bool)
        if kind == 0:
            return pt.QKSparse(none, some, causal=causal)
        if kind == 1:
            return pt.QKSparse(~none, ~some, causal=causal)
        if kind == 2:
            return pt.HashSparse(none.astype(np.int32), some.astype(np.int32), causal=causal)
        return pt.SlidingWindow(0)
    if family == "packed":
        q_ids, k_ids = _lengths(rng, Shapes((*shapes.q[:1], 1, *shapes.q[2:]), shapes.k), seed)
        q_ids, k_ids = np.sort(q_ids[:, 0]), np.sort(k_ids[:, 0])
        return pt.Documents(q_ids, k_ids, causal=causal)
    make = {"lengths": _lengths, "huge": _huge, "orders": _orders}[family]
    stretch = int(rng.choice(_STRETCH))
    q_ids, k_ids = (ids.astype(np.int64) * stretch for ids in make(rng, shapes, seed))
    if abs(stretch) < 2**20 and rng.random() < 0.5:
        q_ids, k_ids = q_ids.astype(np.int32), k_ids.astype(np.int32)
    return pt.HashSparse(q_ids, k_ids, causal=causal, include_self=not causal or seed % 3 > 0)


def further_clause(rng: np.random.Generator, shapes: Shapes, family: str, seed: int) -> pt.Pattern:
    """One pattern of `MORE`."""
    if family == "causal":
        lag = _LAGS.get(seed % 11, 0)  # other seeds are the problems that they were
        return pt.Causal(seed % 2 == 0, "bottom-right", lag=lag)
    if family == "window":
        return pt.SlidingWindow(int(rng.integers(1, 200)), causal=seed % 2 == 0)
    return draw_clause(rng, shapes, family, int(rng.integers(96)))
