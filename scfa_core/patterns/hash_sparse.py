"""HashSparse: a query sees the keys of its own hash bucket (the paper's hash mode)."""

from __future__ import annotations

from typing import Any

from scfa_core.errors import PatternError
from scfa_core.patterns.base import (
    Pattern,
    describe_array,
    require_arrays,
    require_bool,
)


class HashSparse(Pattern):
    """Key j is visible to query i iff ``q_hash[i] == k_hash[j]``, and causally if `causal`.

    Coverage is exact: every pair of the same bucket, whatever the bucket sizes.

    Parameters
    ----------
    q_hash : integer array, (batch, heads, seqlen_q)
        Bucket of each query. Any integers, negative and extreme ones too; size-1 axes broadcast.
    k_hash : integer array, (batch, heads_kv, seqlen_k)
        Bucket of each key.
    causal : bool
        Also require ``j <= i``.
    include_self : bool
        False requires ``j < i`` instead (the paper's language model); needs `causal`.

    Raises
    ------
    PatternError
        ``include_self=False`` without `causal`, or hashes that are not arrays.

    Notes
    -----
    Source: arXiv 2306.01160, section 3.2 (hash-sparse attention).
    """

    __slots__ = ("causal", "include_self", "k_hash", "q_hash")

    def __init__(
        self,
        q_hash: Any,
        k_hash: Any,
        *,
        causal: bool = True,
        include_self: bool = True,
    ) -> None:
        require_arrays("HashSparse", q_hash=q_hash, k_hash=k_hash)
        self.q_hash = q_hash
        self.k_hash = k_hash
        self.causal = require_bool("causal", causal)
        self.include_self = require_bool("include_self", include_self)
        if not causal and not include_self:
            raise PatternError(
                "HashSparse: include_self=False means j < i and so needs causal=True, "
                "got causal=False"
            )

    def __repr__(self) -> str:
        return (
            f"HashSparse(q_hash={describe_array(self.q_hash)}, "
            f"k_hash={describe_array(self.k_hash)}, causal={self.causal}, "
            f"include_self={self.include_self})"
        )
