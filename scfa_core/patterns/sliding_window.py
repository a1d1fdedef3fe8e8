"""SlidingWindow: a query sees the nearest keys only."""

from __future__ import annotations

from scfa_core.patterns.base import Pattern, require_bool, require_count


class SlidingWindow(Pattern):
    """`window` keys back from the query, its own among them.

    Key j is visible to query i iff ``i - window < j`` and, causal, ``j <= i``; without `causal`
    iff ``i - window < j < i + window``.

    >>> SlidingWindow(2).mask(3, 3)[0, 0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]

    Parameters
    ----------
    window : int
        Number of keys, at least 0 (0 sees nothing).
    causal : bool
        See above.

    Raises
    ------
    PatternError
        A negative window, or one that is not an integer.
    """

    __slots__ = ("causal", "window")

    def __init__(self, window: int, *, causal: bool = True) -> None:
        self.window = require_count("SlidingWindow: window", window)
        self.causal = require_bool("causal", causal)

    def __repr__(self) -> str:
        return f"SlidingWindow({self.window}, causal={self.causal})"
