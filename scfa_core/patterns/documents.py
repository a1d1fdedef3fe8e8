"""Documents: several documents packed in one sequence, none sees another."""

from __future__ import annotations

from typing import Any

from scfa_core.patterns.base import (
    Pattern,
    describe_array,
    require_arrays,
    require_bool,
)


class Documents(Pattern):
    """Key j is visible to query i iff both are of the same document, and causally if `causal`.

    Parameters
    ----------
    q_ids : integer array, (batch, seqlen_q)
        Document of each query; ids need be neither sorted nor contiguous. Batch 1 broadcasts.
    k_ids : integer array, (batch, seqlen_k), optional
        Document of each key; the same array as `q_ids` by default.
    causal : bool
        Also require ``j <= i``.

    Raises
    ------
    PatternError
        Ids that are not arrays, or nested tensors.
    """

    __slots__ = ("causal", "k_ids", "q_ids")

    def __init__(self, q_ids: Any, k_ids: Any = None, *, causal: bool = True) -> None:
        k_ids = q_ids if k_ids is None else k_ids
        require_arrays("Documents", q_ids=q_ids, k_ids=k_ids)
        self.q_ids = q_ids
        self.k_ids = k_ids
        self.causal = require_bool("causal", causal)

    def __repr__(self) -> str:
        return (
            f"Documents(q_ids={describe_array(self.q_ids)}, k_ids={describe_array(self.k_ids)}, "
            f"causal={self.causal})"
        )
