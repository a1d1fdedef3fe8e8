"""What a plan holds, as a set of features: how far a campaign got, without a GPU or a tracer.

A feature is a pair of properties that some tile, or some problem, has at once: a query tile whose
last key tile holds one key and whose first row sees nothing, a key tile that two heads of four see.
Kernels branch on such properties; faults hide where two of them rarely meet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from scfa_core import campaign, campaign_changes
from scfa_core import patterns as pt
from scfa_core.testing import Spec
from scfa_core.verify import reference_fields

Fields = Mapping[str, np.ndarray]
Features = frozenset[tuple[Any, ...]]

TILES = ((32, 32), (64, 64), (128, 48), (128, 128))  # (queries, keys) of kernels' tiles
KINDS = ("Causal", "Documents", "HashSparse", "KeyRanges", "QKSparse", "SlidingWindow")
FEW, MANY = 3, 8  # counts up to FEW are told apart, then those below MANY, then the rest


def covered(
    seeds: Iterable[int], *, rows: int | None, dtypes: tuple[str, ...], changed: bool
) -> Iterator[Counter[str]]:
    """Yield, seed after seed, how many features of each kind the deep problems had so far."""
    draw = campaign_changes.draw_pattern if changed else campaign.draw_pattern
    seen: set[tuple[Any, ...]] = set()
    count: Counter[str] = Counter()
    for seed in seeds:
        drawn = draw(seed, most_rows=rows or campaign.DEEP_ROWS, dtypes=dtypes)
        new = features(drawn.spec, drawn.pattern, reference_fields(drawn)) - seen
        seen |= new
        count.update(str(feature[0]) for feature in new)
        yield count


def features(spec: Spec, pattern: pt.Pattern, plan: Fields) -> Features:
    """Every pair of properties that the problem, a query tile or a key tile has."""
    found: set[tuple[Any, ...]] = set()
    whole = _of_problem(spec, pattern, plan)
    found.update(("problem", *pair) for pair in combinations(sorted(whole.items()), 2))
    context = {name: whole[name] for name in ("group", "monotone")}
    context["bits"] = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}[spec.dtype]
    for block_m, block_n in TILES:
        for name, tiles in (
            ("query tile", _of_query_tiles(plan, block_m, block_n)),
            ("key tile", _of_key_tiles(plan, block_m, block_n)),
        ):
            found.update((name, block_m, block_n, *pair) for pair in _pairs(tiles, context))
    return frozenset(found)


def _of_problem(spec: Spec, pattern: pt.Pattern, plan: Fields) -> dict[str, Any]:
    start, end = plan["key_start"], plan["key_end"]
    kept = np.arange(spec.seqlen_q) < plan["q_count"][..., None]
    steps = kept[..., 1:] & ((np.diff(start) < 0) | (np.diff(end) < 0))
    seen = (end - start).sum(axis=-1)
    kinds = [type(part).__name__ for part in pattern.parts]
    return {
        "dtype": spec.dtype,
        "head_dim": (spec.head_dim, spec.head_dim_v),
        "group": spec.heads // spec.heads_kv,
        "heads_kv": spec.heads_kv,
        "batch": spec.batch,
        "clauses": min(len(kinds), FEW),
        "monotone": not bool(steps.any()),
        "queries": _remainder(spec.seqlen_q, 64),
        "keys": _remainder(spec.seqlen_k, 64),
        "longer": int(np.sign(spec.seqlen_q - spec.seqlen_k)),
        "heads that see nothing": int(_share((seen == 0).sum(), seen.size)),
        "scale": spec.softmax_scale,
        "poison": spec.poison,
    } | {name: min(kinds.count(name), 2) for name in KINDS}


def _remainder(count: int, tile: int) -> str:
    rest = count % tile
    place = {0: "0", 1: "1", tile - 1: "-1"}.get(rest, "some")
    return f"{'<' if count < tile else '>'}{place}"


def _share(count: Any, size: Any) -> Any:
    """0 none, 1 one, 2 some, 3 all but one, 4 all."""
    count, size = np.asarray(count), np.asarray(size)
    return np.select([count == 0, count == size, count == 1, count == size - 1], [0, 4, 1, 3], 2)


def _count(count: np.ndarray) -> np.ndarray:
    return np.where(count <= FEW, count, np.where(count < MANY, FEW + 1, FEW + 2))


def _rest(count: np.ndarray, tile: int) -> np.ndarray:
    """0 whole tiles, 1 a row more, 2 a row less, 3 something else."""
    rest = count % tile
    return np.select([rest == 0, rest == 1, rest == tile - 1], [0, 1, 2], 3)


def _pairs(tiles: dict[str, np.ndarray], context: dict[str, Any]) -> set[tuple[Any, ...]]:
    """Pairs of properties that some tile has; every array holds one small number a tile."""
    found: set[tuple[Any, ...]] = set()
    for (a, xs), (b, ys) in combinations(tiles.items(), 2):
        for both in np.unique(xs * 64 + ys).tolist():
            found.add((a, both // 64, b, both % 64))
    for a, xs in tiles.items():
        for x in np.unique(xs).tolist():
            found.update((a, x, b, y) for b, y in context.items())
    return found


def _tiled(x: np.ndarray, tile: int, filling: int) -> np.ndarray:
    """(..., rows) as (tiles of all lists, tile)."""
    rows = x.shape[-1]
    padded = np.full((*x.shape[:-1], -(-rows // tile) * tile), filling, np.int64)
    padded[..., :rows] = x
    return padded.reshape(-1, tile)


def _of_query_tiles(plan: Fields, block_m: int, block_n: int) -> dict[str, np.ndarray]:
    start, end = plan["key_start"].astype(np.int64), plan["key_end"].astype(np.int64)
    if start.size == 0:
        return {}
    rows = start.shape[-1]
    kept = np.broadcast_to(np.arange(rows) < plan["q_count"][..., None], start.shape)
    start, end, kept = _tiled(start, block_m, 0), _tiled(end, block_m, 0), _tiled(kept, block_m, 0)
    group = plan["q_count"].shape[1] // plan["k_count"].shape[1]
    keys = np.repeat(np.repeat(plan["k_count"], group, axis=1).ravel(), -(-rows // block_m))
    count = kept.sum(axis=-1)
    sees = start < end
    seen = sees.sum(axis=-1)
    low = np.where(sees, start, 2**31).min(axis=-1)
    low = np.where(seen > 0, low, 0)
    high = np.where(sees, end, 0).max(axis=-1)
    last = np.maximum(count - 1, 0)
    inside = (kept[:, 1:] > 0) & sees[:, 1:] & sees[:, :-1]
    back = (inside & (np.diff(start) < 0)).any(axis=-1) * 1
    back += (inside & (np.diff(end) < 0)).any(axis=-1) * 2
    order = np.argsort(np.where(sees, start, 2**31), axis=-1, kind="stable")
    starts, ends = (
        np.take_along_axis(np.where(sees, x, high[:, None]), order, -1) for x in (start, end)
    )
    gap = (starts[:, 1:] - np.maximum.accumulate(ends, axis=-1)[:, :-1]).max(axis=-1, initial=0)
    common = np.where(sees, end, 2**31).min(axis=-1) - np.where(sees, start, 0).max(axis=-1)
    common = np.where(seen == count, common, 0)
    return {
        "rows": _share(count, block_m),
        "seeing": _share(seen, count),
        "first row": sees[:, 0].astype(np.int64),
        "last row": sees[np.arange(last.size), last].astype(np.int64),
        "key tiles": _count(-(-(high - low) // block_n)),
        "last key tile": _rest(high - low, block_n),
        "begins": _rest(low, block_n),
        "ends": _rest(high, block_n) + 4 * (high == keys),
        "steps back": back,
        "gap": np.select([gap <= 0, gap < block_n, gap < 2 * block_n], [0, 1, 2], 3),
        "common": np.select([common <= 0, common < block_n, common < 2 * block_n], [0, 1, 2], 3),
    }


def _of_key_tiles(plan: Fields, block_m: int, block_n: int) -> dict[str, np.ndarray]:
    start, end = plan["key_start"].astype(np.int64), plan["key_end"].astype(np.int64)
    batch, heads_kv = plan["k_count"].shape
    rows = start.shape[-1]
    group = start.shape[1] // heads_kv
    found: list[np.ndarray] = []
    if rows == 0:
        return {}
    start, end = (x.reshape(batch * heads_kv, group, rows) for x in (start, end))
    tiles_q = -(-rows // block_m)
    edges = np.arange(0, rows, block_m)
    for line in range(batch * heads_kv):
        keys = int(plan["k_count"].ravel()[line])
        first = np.arange(0, keys, block_n)[:, None, None]
        if first.size == 0:
            continue
        last = np.minimum(first + block_n, keys)
        s, e = start[line], end[line]
        touch = (s < last) & (e > first) & (s < e)  # (key tiles, group, rows)
        number = touch.sum(axis=(1, 2))
        by_tile = np.add.reduceat(touch, edges, axis=-1) > 0
        met = by_tile.sum(axis=-1)  # of each head
        span = tiles_q - by_tile.argmax(axis=-1) - by_tile[..., ::-1].argmax(axis=-1)
        hole = np.where(met > 0, span - met, 0)
        of_first = (~touch | (e <= first + 1)).all(axis=(1, 2))
        of_last = (~touch | (s >= last - 1)).all(axis=(1, 2))
        all_of_it = (~touch | ((s <= first) & (e >= last))).all(axis=(1, 2))
        size = (last - first)[:, 0, 0]
        found.append(
            np.stack(
                (
                    _rest(size, block_n),
                    _count(number),
                    _share((met > 0).sum(axis=-1), group),
                    _count(met.max(axis=-1)),
                    _count(hole.max(axis=-1)),
                    np.where(number > 0, of_first + 2 * of_last + 4 * all_of_it, 8),
                    by_tile[:, :, -1].any(axis=-1) + 2 * by_tile[:, :, 0].any(axis=-1),
                    (first[:, 0, 0] > 0) + 2 * (last[:, 0, 0] == keys),
                    touch[:, :, 0].any(-1) + 2 * touch[:, :, -1].any(-1),
                )
            )
        )
    if not found:
        return {}
    names = ("keys", "queries", "heads", "query tiles", "holes", "part", "ends", "place", "edges")
    return dict(zip(names, np.concatenate(found, axis=1).astype(np.int64), strict=True))
