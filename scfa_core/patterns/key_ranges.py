"""KeyRanges: each query names the range of keys that it sees."""

from __future__ import annotations

from typing import Any

from scfa_core.patterns.base import Pattern, describe_array, require_arrays


class KeyRanges(Pattern):
    """Key j is visible to query i iff ``start[i] <= j < end[i]``.

    Ranges are clipped to [0, seqlen_k]; where ``start >= end`` the query sees nothing. No order
    among the queries is assumed, but it has a price: queries are taken by tiles of neighbours, each
    over all keys from its first to its last range's. Ranges that jump from row to row cost many
    times what sorted ones do. Where ranges are whole blocks, let these be groups, by which queries
    are sorted: ``HashSparse(block of each query, block of each key, causal=False)``.

    Parameters
    ----------
    start, end : integer array, (batch, heads, seqlen_q)
        Range of each query, in key rows. Size-1 axes broadcast.

    Raises
    ------
    PatternError
        A bound that is not an array.
    """

    __slots__ = ("end", "start")

    def __init__(self, start: Any, end: Any) -> None:
        require_arrays("KeyRanges", start=start, end=end)
        self.start = start
        self.end = end

    def __repr__(self) -> str:
        return f"KeyRanges(start={describe_array(self.start)}, end={describe_array(self.end)})"
