"""Blocks of neighbours as groups, beside the buckets of a hash: some heads see what is near."""

from __future__ import annotations

import torch
from torch import Tensor


def near_groups(seqlen: int, heads: int, block: int, like: Tensor) -> Tensor:
    """Number of the block of `block` rows that each row lies in, (heads, seqlen), for each head.

    Of several heads' blocks each begins a share of a block further on, so that a row that is the
    first of its block in one head has neighbours before it in another. Dtype and device are those
    of `like`.
    """
    where = {"dtype": like.dtype, "device": like.device}
    shift = torch.arange(heads, **where) * block // heads
    groups: Tensor = (torch.arange(seqlen, **where) + shift[:, None]) // block
    return groups


def with_near_heads(bucket: Tensor, heads: int, block: int, group_size: int = 1) -> Tensor:
    """Append the groups of `heads` more heads to buckets (batch, heads, seqlen).

    With `group_size` query heads to a key head each of these is repeated so often.
    """
    near = near_groups(bucket.shape[-1], heads, block, bucket)
    near = near.repeat_interleave(group_size, dim=0).expand(bucket.shape[0], -1, -1)
    return torch.cat((bucket, near), dim=1)
