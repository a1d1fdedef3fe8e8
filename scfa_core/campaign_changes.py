"""Deep problems, changed in a few random steps: ``scfa verify --deep --changed``.

A row more or less, a group with as many rows as a tile, a range moved to an edge, other heads, one
more clause: what the families of `campaign` never put together. A seed is one problem, as there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from scfa_core import campaign
from scfa_core import patterns as pt
from scfa_core.campaign import Drawn
from scfa_core.campaign_clauses import MORE, Shapes, further_clause
from scfa_core.lowering import MAX_GROUP_CLAUSES
from scfa_core.testing import Part, Spec

NUMBERS_OF_STEPS = (1, 2, 3, 4, 6, 8)
MOST_ROWS = 2**15  # of all heads: no step leads beyond
EDGES = (8, 16, 32, 48, 64, 96, 128, 256)  # sizes that tiles, groups and lengths are put beside
QUERY_SIDE = {"q_hash", "q_keep", "q_ids", "start", "end"}


class Limits(NamedTuple):
    """What every problem of a campaign keeps to."""

    rows: int  # longest seqlen
    dtypes: tuple[str, ...]


def draw_pattern(
    seed: int, *, most_rows: int, dtypes: tuple[str, ...], steps: tuple[str, ...] | None = None
) -> Drawn:
    """Draw what `campaign.draw_pattern` does, and change it; `steps` names what to do, in order.

    Steps after which nothing is visible are left out, but where the family is "empty".
    """
    drawn = campaign.draw_pattern(seed, most_rows=most_rows, dtypes=dtypes)
    rng = np.random.default_rng([seed, 20261128])
    if steps is None:
        steps = tuple(rng.choice(list(STEPS), int(rng.choice(NUMBERS_OF_STEPS))))
    for step in map(str, steps):
        parts = list(drawn.pattern.parts)
        spec, parts = STEPS[step](rng, drawn.spec, parts, Limits(most_rows, dtypes))
        if _rows_of(spec) > max(_rows_of(drawn.spec), MOST_ROWS):
            continue
        pattern = pt.Intersection(*parts)
        spec = replace(spec, parts=(*spec.parts, Part(f"then {step}", "changed")))
        changed = Drawn(spec, pattern, campaign.mask_of(spec, pattern), rng)
        if spec.parts[0].kind == "empty" or campaign.shows_something(changed):
            drawn = changed
    return drawn._replace(rng=rng)


def _rows_of(spec: Spec) -> int:
    return spec.batch * max(spec.heads * spec.seqlen_q, spec.heads_kv * spec.seqlen_k)


# Steps -------------------------------------------------------------------------------------------

Parts = list[Any]
Changed = tuple[Spec, Parts]


def _arrays(part: Any) -> list[str]:
    return [name for name in type(part).__slots__ if hasattr(getattr(part, name, None), "shape")]


def _with(part: Any, **arrays: np.ndarray) -> Any:
    changed = copy.copy(part)
    for name, x in arrays.items():
        setattr(changed, name, x)
    return changed


def _one_of(rng: np.random.Generator, parts: Parts, kinds: Any) -> int | None:
    """Place of one part that is of `kinds`, if any is."""
    places = [n for n, part in enumerate(parts) if isinstance(part, kinds)]
    return int(rng.choice(places)) if places else None


def _beside(rng: np.random.Generator, most: int) -> int:
    """A size at, one below or one above a multiple of a tile's."""
    edge = int(rng.choice(EDGES))
    size = edge * int(rng.integers(1, max(min(most, 512) // edge, 1) + 1))
    return min(max(size + int(rng.integers(-1, 2)), 1), most)


def _resized(parts: Parts, axis: int, sizes: dict[str, int]) -> Parts:
    """All arrays of other sizes along one axis, from the front and again."""
    changed = []
    for part in parts:
        arrays = {}
        for name in _arrays(part):
            x = getattr(part, name)
            size = sizes["q" if name in QUERY_SIDE else "k"]
            at = axis if x.ndim == 3 or axis == 0 else axis - 1  # documents have no axis of heads
            if (x.ndim == 3 or axis != 1) and x.shape[at] > 1:
                arrays[name] = np.take(x, np.arange(size) % x.shape[at], axis=at)
        changed.append(_with(part, **arrays))
    return changed


def _length(rng: np.random.Generator, spec: Spec, parts: Parts, limits: Limits) -> Changed:
    """Queries, keys or both: a row more or less, or beside a multiple of a tile."""
    q, k = spec.seqlen_q, spec.seqlen_k
    side = int(rng.integers(3))
    if rng.random() < 0.4:
        one = int(rng.choice([-1, 1]))
        new_q, new_k = (min(max(n + one, 1), limits.rows) for n in (q, k))
    else:
        new_q = _beside(rng, limits.rows)
        new_k = new_q if rng.random() < 0.5 else _beside(rng, limits.rows)
    q, k = (new_q if side != 1 else q), (new_k if side != 0 else k)
    return replace(spec, seqlen_q=q, seqlen_k=k), _resized(parts, 2, {"q": q, "k": k})


def _heads(rng: np.random.Generator, spec: Spec, parts: Parts, limits: Limits) -> Changed:
    """Another number of heads, of key heads, or of sequences."""
    heads_kv = int(rng.choice([1, spec.heads_kv, 2, 3]))
    heads = heads_kv * int(rng.choice([1, 2, 3, 4, 5, 8]))
    batch = int(rng.choice([1, spec.batch, 2, 3]))
    parts = _resized(_resized(parts, 1, {"q": heads, "k": heads_kv}), 0, {"q": batch, "k": batch})
    return replace(spec, heads=heads, heads_kv=heads_kv, batch=batch), parts


def _kind(rng: np.random.Generator, spec: Spec, parts: Parts, limits: Limits) -> Changed:
    """Another dtype, or other head_dims."""
    if rng.random() < 0.5:
        return replace(spec, dtype=str(rng.choice(limits.dtypes))), parts
    dims = (int(rng.choice(campaign.HEAD_DIMS)), int(rng.choice(campaign.HEAD_DIMS_V)))
    return replace(spec, head_dim=dims[0], head_dim_v=dims[1]), parts


def _group(rng: np.random.Generator, spec: Spec, parts: Parts, limits: Limits) -> Changed:
    """Of a clause with ids: merge two groups, or give one a number of rows beside a tile's."""
    place = _one_of(rng, parts, (pt.HashSparse, pt.Documents))
    if place is None:
        return _clause(rng, spec, parts, limits)
    part = parts[place]
    names = _arrays(part)
    ids = {name: np.array(getattr(part, name)) for name in names}
    values = np.unique(ids[names[int(rng.integers(2))]])
    one, other = rng.choice(values, 2)
    if rng.random() < 0.3:
        for x in ids.values():
            x[x == other] = one
    else:
        sides = [x for x in ids.values() if rng.random() < 0.6] or [ids[names[0]]]
        lines = int(rng.integers(2)) == 0  # one list, or all
        for x in sides:
            flat = x.reshape(-1, x.shape[-1])
            some = [int(rng.integers(len(flat)))] if lines else range(len(flat))
            for line in some:
                mine = np.flatnonzero(flat[line] == one)
                wanted = 0 if rng.random() < 0.1 else _beside(rng, x.shape[-1])
                if mine.size > wanted:
                    flat[line, mine[wanted:]] = other
                else:
                    rest = np.flatnonzero(flat[line] != one)
                    rest = rng.permutation(rest) if rng.random() < 0.5 else rest
                    flat[line, rest[: wanted - mine.size]] = one
    return spec, [*parts[:place], _with(part, **ids), *parts[place + 1 :]]


def _order(rng: np.random.Generator, spec: Spec, parts: Parts, limits: Limits) -> Changed:
    """Rows of one array sorted, turned around or moved along."""
    places = [n for n, part in enumerate(parts) if _arrays(part)]
    if not places:
        return _clause(rng, spec, parts, limits)
    place = int(rng.choice(places))
    part = parts[place]
    style, by = int(rng.integers(3)), int(rng.choice([1, 63, 64, 65]))
    names = _arrays(part)
    names = ["start", "end"] if isinstance(part, pt.KeyRanges) else [str(rng.choice(names))]

    def ordered(x: np.ndarray) -> np.ndarray:
        return (np.sort(x, axis=-1), x[..., ::-1].copy(), np.roll(x, by, axis=-1))[style]

    arrays = {name: ordered(getattr(part, name)) for name in names}
    return spec, [*parts[:place], _with(part, **arrays), *parts[place + 1 :]]


def _drop(rng: np.random.Generator, spec: Spec, parts: Parts, limits: Limits) -> Changed:
    """Drop rows of queries, of keys, or of both: one, the first, the last, all but a few."""
    place = _one_of(rng, parts, pt.QKSparse)
    shapes = _shapes(spec)
    if place is None:
        place = len(parts)
        parts = [*parts, pt.QKSparse(*(np.ones(x, bool) for x in shapes), causal=False)]
    part = parts[place]
    keeps = {
        name: np.broadcast_to(getattr(part, name) != 0, shape).copy()
        for name, shape in zip(("q_keep", "k_keep"), shapes, strict=True)
    }
    side = int(rng.integers(3))
    for number, x in enumerate(keeps.values()):
        if side == 1 - number:
            continue
        heads = slice(None)
        if rng.random() < 0.6:
            head = int(rng.integers(x.shape[1]))
            heads = slice(head, head + 1)
        rows = x.shape[-1]
        some = _beside(rng, rows)
        style = int(rng.integers(6))
        where: Any = (
            int(rng.integers(rows)),
            0,
            rows - 1,
            slice(some, None),
            slice(None, rows - some),
            rng.permutation(rows)[some:],
        )[style]
        x[:, heads, where] = rng.random() < 0.15
    return spec, [*parts[:place], _with(part, **keeps), *parts[place + 1 :]]


def _ranges(rng: np.random.Generator, spec: Spec, parts: Parts, limits: Limits) -> Changed:
    """Ranges of a few rows moved to edges of tiles, emptied, or exchanged."""
    place = _one_of(rng, parts, pt.KeyRanges)
    shape, keys = _shapes(spec).q, spec.seqlen_k
    if place is None:
        place = len(parts)
        start = np.zeros(shape, np.int64)
        parts = [*parts, pt.KeyRanges(start, start + keys)]
    part = parts[place]
    start, end = (np.broadcast_to(getattr(part, x), shape).copy() for x in ("start", "end"))
    heads = slice(None)
    if rng.random() < 0.6:
        head = int(rng.integers(shape[1]))
        heads = slice(head, head + 1)
    rows = shape[2]
    size = 1 if rng.random() < 0.5 else _beside(rng, rows)
    first = int(rng.integers(max(rows - size, 0) + 1)) if rng.random() < 0.6 else 0
    some = slice(first, first + size)
    style = int(rng.integers(5))
    if style == 0:
        end[:, heads, some] = start[:, heads, some]
    elif style == 1:
        start[:, heads, some], end[:, heads, some] = 0, keys
    elif style == 2:
        at = _beside(rng, keys)
        start[:, heads, some], end[:, heads, some] = at, at + 1
    elif style == 3:
        (start if rng.random() < 0.5 else end)[:, heads, some] = _beside(rng, keys)
    else:
        for x in (start, end):
            x[:, heads, some] = x[:, heads, some][..., ::-1]
    part = _with(part, start=start, end=end)
    return spec, [*parts[:place], part, *parts[place + 1 :]]


def _clause(rng: np.random.Generator, spec: Spec, parts: Parts, limits: Limits) -> Changed:
    """One more clause, or one in the place of another."""
    family = str(rng.choice(MORE))
    clause = further_clause(rng, _shapes(spec), family, int(rng.integers(2**31)))
    groups = sum(isinstance(x, (pt.HashSparse, pt.Documents)) for x in parts)
    if groups == MAX_GROUP_CLAUSES or rng.random() < 0.3:
        place = int(rng.integers(len(parts)))
        return spec, [*parts[:place], clause, *parts[place + 1 :]]
    return spec, [*parts, clause]


def _without(rng: np.random.Generator, spec: Spec, parts: Parts, limits: Limits) -> Changed:
    """One clause less, if two are left."""
    if len(parts) == 1:
        return _clause(rng, spec, parts, limits)
    place = int(rng.integers(len(parts)))
    return spec, [*parts[:place], *parts[place + 1 :]]


def _shapes(spec: Spec) -> Shapes:
    return Shapes(
        (spec.batch, spec.heads, spec.seqlen_q), (spec.batch, spec.heads_kv, spec.seqlen_k)
    )


STEPS: dict[str, Callable[[np.random.Generator, Spec, Parts, Limits], Changed]] = {
    "length": _length,
    "heads": _heads,
    "kind": _kind,
    "group": _group,
    "order": _order,
    "drop": _drop,
    "ranges": _ranges,
    "clause": _clause,
    "without": _without,
}
