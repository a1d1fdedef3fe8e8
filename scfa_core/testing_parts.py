"""Recipes of random patterns: ids, flags and ranges that aim at the places where kernels go wrong.

`testing_problems` puts them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scfa_core import patterns as pt

if TYPE_CHECKING:
    from scfa_core.testing_problems import Spec

GROUP_STYLES = (
    "uniform",
    "zipf",
    "clustered",
    "single",
    "distinct",
    "extreme",
    "tile-edges",
    "alternating",
    "descending",
    "disjoint",
    "one-huge",
)
KEEP_STYLES = ("uniform", "all", "none", "one-head", "blocks", "floats")
RANGE_STYLES = ("random", "narrow", "reversed", "outside", "sorted", "empty")
LEAST_LAG = 5  # a causal part's number is a lag from here on; below it chooses the alignment alone


@dataclass(frozen=True)
class Part:
    """Recipe of one atomic pattern: kind, style of its random arrays, and one number."""

    kind: str
    style: str = "uniform"
    number: int = 4
    causal: bool = True


def _group_ids(
    style: str, rng: np.random.Generator, shape: tuple[int, ...], number: int, side: str
) -> np.ndarray:
    """Integer ids of one side; styles aim at the places where kernels go wrong."""
    seqlen = shape[-1]
    row = np.broadcast_to(np.arange(seqlen), shape)
    number = max(number, 1)
    if style == "zipf":
        return np.minimum(rng.zipf(1.5, shape), number).astype(np.int64)
    if style == "clustered":  # each stretch uses two of the buckets, q and k apart
        stretch = max(seqlen // 6, 1)
        choice = rng.integers(0, number, (*shape[:-1], -(-seqlen // stretch), 2))
        pick = rng.integers(0, 2, shape)
        return np.take_along_axis(
            choice.reshape(*shape[:-1], -1), (row // stretch) * 2 + pick, axis=-1
        )
    if style == "single":
        return np.full(shape, 7, np.int64)
    if style == "distinct":
        return rng.permuted(row, axis=-1)
    if style == "extreme":
        info = np.iinfo(np.int64)
        pool = np.array([info.min, info.min + 1, -1, 0, 1, info.max - 1, info.max])
        return rng.choice(pool, shape)
    if style == "tile-edges":  # group lengths one off the multiples of 8..128
        lengths = rng.choice([8, 16, 32, 64, 128], 64) + rng.integers(-1, 2, 64)
        return _in_runs(rng, shape, lengths)
    if style == "alternating":
        return row % min(number, 2)
    if style == "descending":
        return (seqlen - row) // max(seqlen // number, 1)
    if style == "disjoint":
        return rng.integers(0, number, shape) * 2 + (side == "q")
    if style == "one-huge":
        return np.where(rng.random(shape) < 0.9, 0, row + 1)
    return rng.integers(-(number // 2), number - number // 2, shape)


def _in_runs(rng: np.random.Generator, shape: tuple[int, ...], lengths: np.ndarray) -> np.ndarray:
    """Ids whose groups have the given lengths, scattered over the rows."""
    seqlen = shape[-1]
    ids = np.resize(np.repeat(np.arange(lengths.size), lengths), seqlen)
    return rng.permuted(np.broadcast_to(ids, shape), axis=-1)


def _keep_flags(
    style: str, rng: np.random.Generator, shape: tuple[int, ...], percent: int
) -> np.ndarray:
    if style == "all":
        return np.ones(shape, bool)
    if style == "none":
        return np.zeros(shape, bool)
    keep = rng.random(shape) * 100 < percent
    if style == "one-head":  # one head keeps everything, the others a few
        keep[:, 0] = True
    elif style == "blocks":
        keep = (np.arange(shape[-1]) // 50 + rng.integers(0, 2, (*shape[:-1], 1))) % 2 == 0
    elif style == "floats":
        return keep.astype(np.float32)
    return keep


def _ranges(
    style: str, rng: np.random.Generator, shape: tuple[int, ...], seqlen_k: int
) -> tuple[np.ndarray, np.ndarray]:
    start = rng.integers(0, seqlen_k + 1, shape)
    end = rng.integers(0, seqlen_k + 1, shape)
    if style == "narrow":
        end = start + rng.integers(0, 5, shape)
    elif style == "reversed":
        start, end = np.sort(start)[..., ::-1], np.sort(end)[..., ::-1]
    elif style == "outside":
        big = np.iinfo(np.int64)
        start = rng.choice([big.min, -5, 0, 1, seqlen_k, big.max], shape)
        end = rng.choice([big.min, -1, 0, seqlen_k - 1, seqlen_k + 9, big.max], shape)
    elif style == "sorted":
        start, end = np.sort(start), np.sort(end)
    elif style == "empty":
        end = np.minimum(start, end)
    return start, end


def build_part(part: Part, spec: Spec, rng: np.random.Generator) -> pt.Pattern:
    """Make the atomic pattern of a recipe, its arrays in the sizes of `spec`."""
    q_shape = (spec.batch, spec.heads, spec.seqlen_q)
    k_shape = (spec.batch, spec.heads_kv, spec.seqlen_k)
    if rng.random() < 0.2:  # broadcast heads
        q_shape, k_shape = (spec.batch, 1, spec.seqlen_q), (spec.batch, 1, spec.seqlen_k)
    int_dtype = np.int32 if part.style != "extreme" and rng.random() < 0.5 else np.int64
    if part.kind == "causal":
        align = "bottom-right" if part.number % 2 else "top-left"
        lag = part.number if part.number >= LEAST_LAG else 0
        return pt.Causal(include_self=part.causal, align=align, lag=lag)
    if part.kind == "hash":
        q_hash, k_hash = (
            _group_ids(part.style, rng, shape, part.number, side).astype(int_dtype)
            for shape, side in ((q_shape, "q"), (k_shape, "k"))
        )
        include_self = not part.causal or part.number % 3 != 0
        return pt.HashSparse(q_hash, k_hash, causal=part.causal, include_self=include_self)
    if part.kind == "documents":
        shapes = ((spec.batch, spec.seqlen_q), (spec.batch, spec.seqlen_k))
        q_ids, k_ids = (
            np.sort(_group_ids(part.style, rng, shape, part.number, side)).astype(int_dtype)
            for shape, side in zip(shapes, "qk", strict=True)
        )
        return pt.Documents(q_ids, k_ids, causal=part.causal)
    if part.kind == "keep":
        q_keep, k_keep = (
            _keep_flags(part.style, rng, shape, part.number) for shape in (q_shape, k_shape)
        )
        return pt.QKSparse(q_keep, k_keep, causal=part.causal)
    if part.kind == "window":
        return pt.SlidingWindow(part.number, causal=part.causal)
    if part.kind == "ranges":
        start, end = _ranges(part.style, rng, q_shape, spec.seqlen_k)
        return pt.KeyRanges(start.astype(np.int64), end.astype(np.int64))
    raise ValueError(f"no such kind of part: {part.kind!r}")


def random_part(rng: np.random.Generator) -> Part:
    """Draw the recipe of one atomic pattern."""
    kind = str(rng.choice(["causal", "hash", "hash", "documents", "keep", "window", "ranges"]))
    styles = {
        "hash": GROUP_STYLES,
        "documents": GROUP_STYLES,
        "keep": KEEP_STYLES,
        "ranges": RANGE_STYLES,
    }.get(kind, ("uniform",))
    numbers = [20, 50, 80] if kind == "keep" else [0, 1, 2, 3, 5, 16, 70]
    return Part(kind, str(rng.choice(styles)), int(rng.choice(numbers)), bool(rng.random() < 0.7))


def random_length(rng: np.random.Generator, most: int) -> int:
    """Draw a length, mostly beside the edges of tiles."""
    edges = [1, 2, 7, 31, 33, 63, 64, 65, 97, 127, 128, 129, 191, 193, 255, 257]
    if rng.random() < 0.7:
        return min(int(rng.choice(edges)), most)
    return int(rng.integers(1, most + 1))
