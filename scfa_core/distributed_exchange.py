"""Rows for heads, and keys from all ranks: the exchanges behind a sharded sequence, differentiable.

Tensors of one type, length and head_dim travel together, in buffers whose first axis is the
sequence. What comes from all ranks is then whole rows in order, and is used where it lies:
attention takes any strides, so nothing is put together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from scfa_core.errors import PatternError
from scfa_core.torch_meta import is_traced

Group: TypeAlias = "dist.ProcessGroup | None"
Tensors = tuple[Tensor, ...]
# Into one tensor; the first names are torch 2.13's, which warns of the others.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def to_heads(tensors: Sequence[Tensor], group: Group) -> Tensors:
    """Turn (batch, heads, own rows, n) of each rank into (batch, own heads, all rows, n).

    Differentiable. The number of ranks divides all heads.
    """
    return _by_kind(_ToHeads, tensors, group)


def to_rows(tensors: Sequence[Tensor], group: Group) -> Tensors:
    """Turn (batch, own heads, all rows, n) of each rank into (batch, heads, own rows, n)."""
    return _by_kind(_ToRows, tensors, group)


def from_all(tensors: Sequence[Tensor], rows: Tensor | None, group: Group) -> Tensors:
    """Turn (batch, heads, own rows, n) of each rank into (batch, heads, all rows, n).

    Differentiable: ranks add their gradients. `rows` are the global ones of this rank, None where
    ranks hold consecutive stretches.
    """
    if rows is None:
        return _by_kind(_FromAll, tensors, None, None, group)
    held = gather(rows, 0, group)  # global row of each gathered one
    _refuse_no_permutation(held)
    return _by_kind(_FromAll, tensors, torch.argsort(held), held, group)


def _refuse_no_permutation(held: Tensor) -> None:
    """Raise where ranks name a row twice or one that nobody has; not on a GPU, which would wait."""
    if held.device.type != "cpu" or is_traced(held):
        return
    found = held.sort().values.tolist()
    wrong = next((place for place, row in enumerate(found) if row != place), None)
    if wrong is not None:
        raise PatternError(
            f"rows of all ranks must be 0 to {len(found) - 1}, each once; in order they have "
            f"{found[wrong]} in place of {wrong}"
        )


def gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """Concatenate every rank's `x` along `dim`; no gradient."""
    parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def _size(group: Group) -> int:
    return dist.get_world_size(group)


def _by_kind(function: Any, tensors: Sequence[Tensor], *arguments: Any) -> Tensors:
    """Apply `function` to tensors that differ in heads alone together, in their order."""
    kinds: dict[Any, list[int]] = {}
    for i, x in enumerate(tensors):
        kinds.setdefault((x.dtype, len(x), *x.shape[2:]), []).append(i)
    found = dict[int, Tensor]()
    for places in kinds.values():
        found |= zip(places, function.apply(*arguments, *(tensors[i] for i in places)), strict=True)
    return tuple(found[i] for i in range(len(tensors)))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the last axis but one, in memory as the axes are."""
    shape = (*parts[0].shape[:-2], sum(x.shape[-2] for x in parts), parts[0].shape[-1])
    return torch.cat(list(parts), dim=-2, out=parts[0].new_empty(shape))


def _all_to_all(sent: Tensor, group: Group) -> Tensor:
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


def _exchange_for_heads(tensors: Sequence[Tensor], group: Group) -> Tensors:
    ranks = _size(group)
    # (ranks, own rows, batch, heads of a rank, n)
    pieces = [x.unflatten(1, (ranks, -1)).permute(1, 3, 0, 2, 4) for x in tensors]
    whole = _all_to_all(_joined(pieces), group).flatten(0, 1)
    heads = [x.shape[3] for x in pieces]
    return tuple(x.permute(1, 2, 0, 3) for x in whole.split(heads, dim=2))


def _exchange_for_rows(tensors: Sequence[Tensor], group: Group) -> Tensors:
    ranks = _size(group)
    pieces = [x.permute(2, 0, 1, 3).unflatten(0, (ranks, -1)) for x in tensors]
    received = _all_to_all(_joined(pieces), group).split([x.shape[3] for x in pieces], dim=3)
    return tuple(x.permute(2, 0, 3, 1, 4).flatten(1, 2) for x in received)


class _ToHeads(torch.autograd.Function):
    """`to_heads` of one kind; its gradient is the way back."""

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> Tensors:
        ctx.group = group
        return _exchange_for_heads(tensors, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_exchange_for_rows(gradients, ctx.group))


class _ToRows(torch.autograd.Function):
    """`to_rows` of one kind; its gradient is the way back."""

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> Tensors:
        ctx.group = group
        return _exchange_for_rows(tensors, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_exchange_for_heads(gradients, ctx.group))


class _FromAll(torch.autograd.Function):
    """`from_all` of one kind: `place` is where a global row was gathered, `held` the inverse."""

    @staticmethod
    def forward(
        ctx: Any, place: Tensor | None, held: Tensor | None, group: Group, *tensors: Tensor
    ) -> Tensors:
        ctx.held, ctx.group = held, group
        own = _joined([x.permute(2, 0, 1, 3) for x in tensors])
        whole = own.new_empty((_size(group) * len(own), *own.shape[1:]))
        _all_gather(whole, own, group=group)
        if place is not None:
            whole = whole.index_select(0, place)
        parts = whole.split([x.shape[1] for x in tensors], dim=2)
        return tuple(x.permute(1, 2, 0, 3) for x in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        whole = _joined([x.permute(2, 0, 1, 3) for x in gradients])
        if ctx.held is not None:
            whole = whole.index_select(0, ctx.held)
        own = whole.new_empty((len(whole) // _size(ctx.group), *whole.shape[1:]))
        _reduce_scatter(own, whole, group=ctx.group)
        parts = own.split([x.shape[1] for x in gradients], dim=2)
        return (None, None, None, *(x.permute(1, 2, 0, 3) for x in parts))
