"""KeyRanges: each query names the range of keys that it sees."""

from __future__ import annotations

from typing import Any

from scfa_core.patterns.base import Pattern, describe_array, require_arrays


class KeyRanges(Pattern):
    """Key j is visible to query i iff ``start[i] <= j < end[i]``.

    Ranges are clipped to [0, seqlen_k]; where ``start >= end`` the query sees nothing. They may
    jump from query to query: queries are sorted by their ranges, so that those with much the same
    keys share a tile (docs/plan.md). Where ranges are whole blocks, groups are cheaper still:
    ``HashSparse(block of each query, block of each key, causal=False)``.

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
