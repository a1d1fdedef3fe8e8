"""Blocks of keys that each query chooses by their mean: mixture of block attention (MoBA).

A block of keys is a group, and the one that a query chose is the query's group: so every choice is
a hash pattern, queries are sorted by what they chose, and no block is computed that nobody wants.
"""

from __future__ import annotations

from typing import Any

from scfa_core.extras import missing

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise missing("scfa_core.choosing", "torch", error) from error

from scfa_core.errors import ShapeError
from scfa_core.patterns import Causal, HashSparse, Pattern
from scfa_core.problem import as_size
from scfa_core.torch_checks import check_tensor

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
    block`` of q's dtype in memory while they are looked at; then one call of attention a pattern,
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
    # Who has no choice left names a block that lies ahead: of as many numbers as blocks 256 are
    # planned in one pass.
    causal = rows == keys
    none = last + (own == last).int() if causal else own.new_tensor(last + 1)
    means = k.detach()[:, :, : whole * block].unflatten(2, (-1, block)).mean(3)
    chosen = _choices(q.detach(), means, own, min(top, whole), none)
    patterns += [HashSparse(ids, of_key, causal=causal) for ids in chosen]
    return patterns


def _choices(q: Tensor, means: Tensor, own: Tensor, top: int, none: Tensor) -> list[Tensor]:
    """Blocks (batch, heads, seqlen_q) of the highest scores, `top` times; `none` where none is.

    `means` are those of whole blocks of keys, `own` and `none` (1, 1, seqlen_q) or one for all.
    Scores of a query lie a row apart, so that neighbouring queries are read side by side; one
    maximum after the other then takes a fraction of the time of topk.
    """
    grouped = q.unflatten(1, (means.shape[1], -1))
    scores = (means.unsqueeze(2) @ grouped.mT).flatten(1, 2)
    later = torch.arange(means.shape[2], device=q.device).unsqueeze(-1) >= own.unsqueeze(-2)
    scores = scores.masked_fill_(later, -torch.inf)
    found = []
    for _ in range(top):
        best = scores.max(dim=-2, keepdim=True)
        scores.scatter_(-2, best.indices, -torch.inf)
        ids = torch.where(best.values.isneginf().squeeze(-2), none, best.indices.squeeze(-2))
        found.append(ids.int())
    return found
