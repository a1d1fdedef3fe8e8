"""Blocks of neighbours as groups, beside the buckets of a hash: some heads see what is near."""

from __future__ import annotations

import torch
from torch import Tensor

_LONGEST = 2**40  # rows; times any number of heads an int64 still


def near_groups(seqlen: int, heads: int, block: int, like: Tensor, begin: int = 0) -> Tensor:
    """Number of the block of `block` rows that each row lies in, (heads, seqlen), for each head.

    Rows count from `begin`: new ones behind a cache are not the first of their sequence.

    Of several heads' blocks each begins a share of a block further on, so that a row that is the
    first of its block in one head has neighbours before it in another. Dtype and device are those
    of `like`.
    """
    block = min(block, _LONGEST)  # one block holds all rows then, wherever it begins
    shift = torch.arange(heads, device=like.device) * block // heads
    groups = (torch.arange(seqlen, device=like.device) + begin + shift[:, None]) // block
    return groups.to(like.dtype)


def with_near_heads(
    bucket: Tensor, heads: int, block: int, group_size: int = 1, begin: int = 0
) -> Tensor:
    """Append the groups of `heads` more heads to buckets (batch, heads, seqlen).

    With `group_size` query heads to a key head each of these is repeated so often.
    """
    near = near_groups(bucket.shape[-1], heads, block, bucket, begin)
    near = near.repeat_interleave(group_size, dim=0).expand(bucket.shape[0], -1, -1)
    return torch.cat((bucket, near), dim=1)
