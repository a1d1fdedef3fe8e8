"""QKSparse: drop queries and keys, each head and sequence its own (the paper's QK mode)."""

from __future__ import annotations

from typing import Any

from scfa_core.patterns.base import (
    Pattern,
    describe_array,
    require_arrays,
    require_bool,
)


class QKSparse(Pattern):
    """Key j is visible to query i iff both are kept, and causally if `causal`.

    Dropped queries give 0 and take no gradient; dropped keys and values take no gradient.

    Parameters
    ----------
    q_keep : bool array, (batch, heads, seqlen_q)
        True where the query is kept. Numbers are accepted: kept where nonzero. Size-1 axes
        broadcast.
    k_keep : bool array, (batch, heads_kv, seqlen_k)
        True where the key is kept.
    causal : bool
        Also require ``j <= i``.

    Raises
    ------
    PatternError
        A keep argument that is not an array.

    Notes
    -----
    Source: arXiv 2306.01160, section 3.1 (QK-sparse attention).
    """

    __slots__ = ("causal", "k_keep", "q_keep")

    def __init__(self, q_keep: Any, k_keep: Any, *, causal: bool = True) -> None:
        require_arrays("QKSparse", q_keep=q_keep, k_keep=k_keep)
        self.q_keep = q_keep
        self.k_keep = k_keep
        self.causal = require_bool("causal", causal)

    def __repr__(self) -> str:
        return (
            f"QKSparse(q_keep={describe_array(self.q_keep)}, k_keep={describe_array(self.k_keep)}, "
            f"causal={self.causal})"
        )
