"""Causal: a query sees the keys up to its own position."""

from __future__ import annotations

from scfa_core.errors import PatternError
from scfa_core.patterns.base import Pattern, require_bool

ALIGNMENTS = ("top-left", "bottom-right")


class Causal(Pattern):
    """Key j is visible to query i iff ``j <= i`` (``j < i`` without self).

    >>> Causal()
    Causal(include_self=True, align='top-left')
    >>> Causal().mask(2, 3)[0, 0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0]]
    >>> Causal(align="bottom-right").mask(2, 3)[0, 0].astype(int).tolist()
    [[1, 1, 0], [1, 1, 1]]

    Parameters
    ----------
    include_self : bool
        Whether a query sees the key of its own position.
    align : "top-left" | "bottom-right"
        Where the diagonal starts when seqlen_q != seqlen_k. "bottom-right" adds
        ``seqlen_k - seqlen_q`` to the query positions of this clause (decoding with a KV cache).

    Raises
    ------
    PatternError
        An unknown alignment, or a flag that is not a bool.
    """

    __slots__ = ("align", "include_self")

    def __init__(self, include_self: bool = True, align: str = "top-left") -> None:
        if align not in ALIGNMENTS:
            raise PatternError(f"align must be one of {ALIGNMENTS}, got {align!r}")
        self.include_self = require_bool("include_self", include_self)
        self.align = align

    def __repr__(self) -> str:
        return f"Causal(include_self={self.include_self}, align={self.align!r})"
