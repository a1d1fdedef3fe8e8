"""The plain planner: what every backend's plan must equal, entry by entry.

Plain Python over one (batch, head) at a time: sort tuples, then count with bisect.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

import numpy as np

from scfa_core.lowering import START_BITS

if TYPE_CHECKING:
    from numpy.typing import NDArray


def sorted_rows(groups: list[Any], keeps: list[Any], seqlen: int) -> tuple[list[int], int]:
    """Order rows by (groups..., row) with dropped rows last; also how many are kept.

    `groups` and `keeps` are lists of (seqlen,) sequences; a row is kept if every keep is nonzero.
    """
    kept = [r for r in range(seqlen) if all(keep[r] for keep in keeps)]
    dropped = [r for r in range(seqlen) if not all(keep[r] for keep in keeps)]
    kept.sort(key=lambda r: (*(group[r] for group in groups), r))
    return kept + dropped, len(kept)


def query_interval(
    i: int,
    seqlen_k: int,
    lo_offset: int | None,
    hi_offset: int | None,
    starts: Any,
    ends: Any,
) -> tuple[int, int]:
    """Key rows [lo, hi) that query row `i` may see by its interval clauses, clipped, lo <= hi."""
    lows = [start[i] for start in starts] + ([] if lo_offset is None else [i + lo_offset])
    highs = [end[i] for end in ends] + ([] if hi_offset is None else [i + hi_offset])
    lo = min(max([0, *lows]), seqlen_k)
    hi = max(min([seqlen_k, *highs]), 0)
    return lo, max(lo, hi)


def plan_lists(clauses: Any, batch: int, heads: int, heads_kv: int, tq: int, tk: int) -> Any:
    """Return q_index, q_count, k_index, k_count, key_start, key_end as int32 arrays.

    `clauses` has the fields of `scfa_core.lowering.Clauses` with NumPy arrays.
    """
    q_index = np.empty((batch, heads, tq), np.int32)
    q_count = np.empty((batch, heads), np.int32)
    k_index = np.empty((batch, heads_kv, tk), np.int32)
    k_count = np.empty((batch, heads_kv), np.int32)
    key_start = np.empty((batch, heads, tq), np.int32)
    key_end = np.empty((batch, heads, tq), np.int32)
    for b in range(batch):
        sorted_keys = []
        for g in range(heads_kv):
            groups = _rows(clauses.k_groups, b, g)
            order, count = sorted_rows(groups, _rows(clauses.k_keeps, b, g), tk)
            k_index[b, g], k_count[b, g] = order, count
            sorted_keys.append([(*(group[r] for group in groups), r) for r in order[:count]])
        for h in range(heads):
            keys = sorted_keys[h // (heads // heads_kv)]
            groups = _rows(clauses.q_groups, b, h)
            starts, ends = _rows(clauses.starts, b, h), _rows(clauses.ends, b, h)
            bounds = _bound_keys(starts, ends, tk) if clauses.sorted_bounds(tq) else []
            order, count = sorted_rows(groups + bounds, _rows(clauses.q_keeps, b, h), tq)
            q_index[b, h], q_count[b, h] = order, count
            key_start[b, h, count:] = key_end[b, h, count:] = len(keys)
            for r, i in enumerate(order[:count]):
                lo, hi = query_interval(i, tk, clauses.lo_offset, clauses.hi_offset, starts, ends)
                group = tuple(x[i] for x in groups)
                key_start[b, h, r] = bisect_left(keys, (*group, lo))
                key_end[b, h, r] = bisect_left(keys, (*group, hi))
    return q_index, q_count, k_index, k_count, key_start, key_end


def _bound_keys(starts: list[list[int]], ends: list[list[int]], seqlen_k: int) -> list[list[int]]:
    """What queries are sorted by after their groups, for each row."""
    firsts, lasts = (
        [[min(max(x, 0), seqlen_k) for x in bound] for bound in bounds] for bounds in (starts, ends)
    )
    return [[x >> START_BITS for x in bound] for bound in firsts] + lasts


def _rows(arrays: tuple[NDArray[Any], ...], b: int, h: int) -> list[list[int]]:
    """One (batch, head)'s sequences as Python ints."""
    return [x[b, h].tolist() for x in arrays]
