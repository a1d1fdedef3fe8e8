"""Blocks of keys that each query chooses by their mean: mixture of block attention (MoBA).

A block of keys is a group, and the one that a query chose is the query's group: so every choice is
a hash pattern, queries are sorted by what they chose, and no block is computed that nobody wants.
"""

from __future__ import annotations

from typing import Any

from scfa_core.extras import missing

try:
    import torch
except ModuleNotFoundError as error:
    raise missing("scfa_core.choosing", "torch", error) from error

from scfa_core.errors import ShapeError
from scfa_core.patterns import Causal, HashSparse, Pattern
from scfa_core.problem import as_size
from scfa_core.torch_checks import check_tensor
from scfa_core.torch_choosing import TOP_BLOCKS

__all__ = ["chosen_blocks"]

_AXES = ("batch", "heads", "seqlen", "head_dim")


def chosen_blocks(q: Any, k: Any, *, block: int, top: int) -> list[Pattern]:
    """Disjoint patterns: a query's own block as far as itself, and the `top` it scores highest.

    >>> from scfa_core.merging import attention_over
    >>> q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    >>> attention_over(q, k, v, chosen_blocks(q, k, block=16, top=3)).shape
    torch.Size([1, 2, 100, 16])

    Parameters
    ----------
    q : Tensor, (batch, heads, seqlen_q, head_dim)
        Where there are fewer queries than keys they are the last rows, as beside a cache.
    k : Tensor, (batch, heads_kv, seqlen_k, head_dim)
    block : int
        Rows of a block; blocks are counted from the first key.
    top : int
        Blocks that a query chooses among those that end before its own begins; it gets all where
        there are fewer.

    Returns
    -------
    patterns : list of Pattern
        At most ``1 + top``, for `scfa_core.merging.attention_over`: no pair is in two of them.

    Raises
    ------
    ShapeError
        Axes other than these, more queries than keys, a `block` or `top` that is no such number.
    DTypeError
        What is no tensor.

    Notes
    -----
    A block's score is the product of the query and the mean of the block's keys. Choices take no
    gradient, and depend on no later row. Cost: the scores, ``batch * heads * seqlen_q * seqlen_k /
    block`` of q's dtype in memory until they are looked at; then one call of attention a pattern,
    in all ``4 * (top + 0.5) * block * seqlen_q * head_dim`` flop a head, forward. Source: MoBA
    (arXiv 2502.13189).
    """
    check_tensor("q", q, *_AXES)
    check_tensor("k", k, *_AXES)
    block, top = as_size("block", block, 1), as_size("top", top)
    (batch, heads, rows, head_dim), (batch_k, heads_kv, keys, head_dim_k) = q.shape, k.shape
    if (batch, head_dim) != (batch_k, head_dim_k) or heads % max(heads_kv, 1) or rows > keys:
        raise ShapeError(
            "q and k must share batch and head_dim, heads must be a multiple of heads_kv, and "
            f"queries at most as many as keys, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    of_key = torch.arange(keys, device=k.device, dtype=torch.int32).view(1, 1, -1) // block
    own = of_key[..., keys - rows :]
    patterns: list[Pattern] = [HashSparse(own, of_key, causal=False) & Causal(align="bottom-right")]
    whole, last = keys // block, (keys - 1) // block
    if not whole or not top:
        return patterns
    means = k.detach()[:, :, : whole * block].unflatten(2, (-1, block)).mean(3)
    grouped = q.detach().unflatten(1, (heads_kv, -1))
    # Scores of a query lie a row apart: neighbouring queries are read side by side.
    scores = (means.unsqueeze(2) @ grouped.mT).flatten(1, 2)
    # Who has no choice left names a block that lies ahead: of as many numbers as blocks 256 are
    # planned in one pass.
    causal = rows == keys
    chosen = TOP_BLOCKS(scores, block, keys - rows, last, causal, min(top, whole))
    patterns += [HashSparse(ids, of_key, causal=causal) for ids in chosen.unbind(0)]
    return patterns
