"""Causal: a query sees the keys up to its own position, or up to some rows before it."""

from __future__ import annotations

from scfa_core.errors import PatternError
from scfa_core.patterns.base import Pattern, require_bool, require_count

ALIGNMENTS = ("top-left", "bottom-right")


class Causal(Pattern):
    """Key j is visible to query i iff ``j <= i`` (``j < i`` without self), or ``j <= i - lag``.

    >>> Causal()
    Causal(include_self=True, align='top-left')
    >>> Causal().mask(2, 3)[0, 0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0]]
    >>> Causal(align="bottom-right").mask(2, 3)[0, 0].astype(int).tolist()
    [[1, 1, 0], [1, 1, 1]]
    >>> Causal(lag=2).mask(4, 4)[0, 0].astype(int).tolist()
    [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]

    Parameters
    ----------
    include_self : bool
        Whether a query sees the key of its own position.
    align : "top-left" | "bottom-right"
        Where the diagonal starts when seqlen_q != seqlen_k. "bottom-right" adds
        ``seqlen_k - seqlen_q`` to the query positions of this clause (decoding with a KV cache).
    lag : int
        How many of the nearest keys stay hidden; 1 is ``include_self=False``. What
        ``SlidingWindow(n)`` shows, ``Causal(lag=n)`` does not: with `attention_over` a window
        unites with a pattern of far keys, and no pair counts twice.

    Raises
    ------
    PatternError
        An unknown alignment, a flag that is not a bool, or a lag that is no int of at least 0.
    """

    __slots__ = ("align", "lag")

    def __init__(self, include_self: bool = True, align: str = "top-left", *, lag: int = 0) -> None:
        if align not in ALIGNMENTS:
            raise PatternError(f"align must be one of {ALIGNMENTS}, got {align!r}")
        hidden = require_count("Causal: lag", lag)
        self.lag = max(hidden, 0 if require_bool("include_self", include_self) else 1)
        self.align = align

    @property
    def include_self(self) -> bool:
        """Whether a query sees the key of its own position."""
        return self.lag == 0

    def __repr__(self) -> str:
        nearest = f"lag={self.lag}" if self.lag > 1 else f"include_self={self.include_self}"
        return f"Causal({nearest}, align={self.align!r})"
