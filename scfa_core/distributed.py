"""Attention over many processes: sharded batches and heads, and sharded sequences.

Heads and sequences of a batch are independent, so DTensor shards them by rules alone
(`distributed_rules`; a pattern's arrays are then DTensors too). A sequence that is itself
spread over ranks needs communication: either `ulysses_attention`, where an all-to-all gives each
rank whole sequences of some heads, or `gathered_attention`, where each rank keeps its queries and
gathers all keys. Results and gradients are those of one process. Only torch.distributed
communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

import scfa_core.distributed_rules  # noqa: F401  (registers them)
from scfa_core.api import attention
from scfa_core.errors import OptionError, PatternError, ShapeError
from scfa_core.patterns import (
    Causal,
    Documents,
    HashSparse,
    Intersection,
    KeyRanges,
    Pattern,
    QKSparse,
    SlidingWindow,
)
from scfa_core.problem import as_size

__all__ = [
    "distribute_pattern",
    "gathered_attention",
    "heads_of",
    "queries_of",
    "ulysses_attention",
    "zigzag_rows",
]

MakePattern = Callable[[Tensor, Tensor], Pattern]
_PLACEMENTS = (Shard(0), Shard(1), Replicate())


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | MakePattern,
    *,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Tensor:
    """Attention over a sequence sharded among ranks, by exchanging rows for heads.

    Parameters
    ----------
    q : Tensor, (batch, heads, seqlen / ranks, head_dim)
        This rank's stretch of the sequence; ranks hold equal stretches, in order.
    k, v : Tensor, (batch, heads_kv, seqlen / ranks, head_dim)
    pattern : Pattern or callable
        Of the whole sequence and all heads, the same on every rank: each takes its heads
        (`heads_of`). Or ``pattern(q, k)``, called with whole sequences of this rank's heads, to
        hash them for instance.
    group : ProcessGroup, optional
        All ranks by default; their number divides heads and heads_kv.
    **options
        As for `scfa_core.attention`, but layout and lse.

    Returns
    -------
    out : Tensor like `q`
        Differentiable.

    Raises
    ------
    ShapeError
        Heads that the number of ranks does not divide.

    Notes
    -----
    Four all-to-alls forward and four backward, each of 1 / ranks of a tensor per rank. Every
    pattern works unchanged, because no sequence is cut while attention runs. Source: arXiv
    2309.14509.
    """
    _refuse_options("ulysses_attention", options)
    if not isinstance(pattern, Pattern) and not callable(pattern):
        raise PatternError(
            "ulysses_attention takes the pattern of the whole sequence, or a function of q and k, "
            f"got {type(pattern).__name__}"
        )
    ranks = dist.get_world_size(group)
    if q.shape[1] % ranks or k.shape[1] % ranks:
        raise ShapeError(
            f"{ranks} ranks must divide heads={q.shape[1]} and heads_kv={k.shape[1]}; use "
            "gathered_attention for fewer heads"
        )
    q, k, v = (_AllToAll.apply(x, 1, 2, group) for x in (q, k, v))
    if isinstance(pattern, Pattern):
        pattern = heads_of(pattern, dist.get_rank(group), ranks)
    else:
        pattern = pattern(q, k)
    out: Tensor = _AllToAll.apply(attention(q, k, v, pattern, **options), 2, 1, group)
    return out


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    group: dist.ProcessGroup | None = None,
    rows: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks.

    Parameters
    ----------
    q : Tensor, (batch, heads, seqlen / ranks, head_dim)
        This rank's rows of the sequence; ranks hold equally many.
    k, v : Tensor, (batch, heads_kv, seqlen / ranks, head_dim)
    pattern : Pattern
        Of the whole sequence, the same on every rank: each takes its queries (`queries_of`).
    group : ProcessGroup, optional
    rows : integer Tensor, (seqlen / ranks,), optional
        Global row of each local one. By default ranks hold consecutive stretches, and under a
        causal pattern later ranks have more to do; `zigzag_rows` evens that out.
    **options
        As for `scfa_core.attention`, but layout and lse.

    Returns
    -------
    out : Tensor like `q`
        Differentiable.

    Notes
    -----
    Memory: k and v of the whole sequence on every rank. One all-gather of each, and one
    reduce-scatter of each gradient. Any number of heads.
    """
    _refuse_options("gathered_attention", options)
    if not isinstance(pattern, Pattern):
        raise PatternError(
            "gathered_attention takes the pattern of the whole sequence, got "
            f"{type(pattern).__name__}"
        )
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    seqlen = q.shape[2] * ranks
    k, v = (_AllGather.apply(x, 2, group) for x in (k, v))
    if rows is None:
        rows = torch.arange(rank * q.shape[2], (rank + 1) * q.shape[2], device=q.device)
    else:
        where = torch.argsort(_gather(rows, 0, group))  # gathered place of each global row
        k, v = k.index_select(2, where), v.index_select(2, where)
    local = queries_of(pattern, rows, seqlen, seqlen)
    out: Tensor = attention(q, k, v, local, **options)
    return out


def _refuse_options(name: str, options: dict[str, Any]) -> None:
    """Raise on options of `attention` that have no meaning here."""
    for option in ("layout", "return_lse"):
        if option in options:
            raise OptionError(
                f"{name} takes (batch, heads, seqlen, head_dim) tensors and returns out alone: it "
                f"has no {option}"
            )


def zigzag_rows(
    seqlen: int,
    *,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Global rows of this rank, one early and one late chunk: the same causal work for every rank.

    Parameters
    ----------
    seqlen : int
        Of the whole sequence; a multiple of twice the number of ranks.
    group : ProcessGroup, optional
    device : torch.device, optional

    Returns
    -------
    rows : int64 Tensor, (seqlen / ranks,)
        Take these rows of the inputs: ``x.index_select(dim, rows)``.

    Raises
    ------
    ShapeError
        A length that does not split evenly.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    seqlen = as_size("seqlen", seqlen)
    if seqlen % (2 * ranks):
        raise ShapeError(f"seqlen must be a multiple of {2 * ranks}, got {seqlen}")
    chunks = torch.arange(seqlen, device=device).view(2 * ranks, -1)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def distribute_pattern(
    pattern: Pattern, mesh: DeviceMesh, placement: Placement | Sequence[Placement]
) -> Pattern:
    """Put the arrays of a pattern on a mesh, as q, k and v are put there.

    Parameters
    ----------
    pattern : Pattern
        Of all batches and heads, the same on every rank.
    mesh : DeviceMesh
    placement : Shard or Replicate, or one for each dimension of the mesh
        Of q, k and v in layout "bhtd": ``Shard(0)`` is batch, ``Shard(1)`` heads.

    Returns
    -------
    pattern : Pattern
        Its arrays are DTensors. Axes of length 1, which broadcast, and axes that an array does not
        have (documents have no heads) stay whole.

    Raises
    ------
    PatternError
        Not as many placements as the mesh has dimensions, or one that is none of these.
    """
    placements = [placement] if isinstance(placement, Placement) else list(placement)
    if len(placements) != mesh.ndim or not all(p in _PLACEMENTS for p in placements):
        raise PatternError(
            f"each of the mesh's {mesh.ndim} dimensions needs a placement of {_PLACEMENTS}, got "
            f"{placement!r}; sequences are shared by ulysses_attention or gathered_attention"
        )

    def place(x: Tensor) -> Tensor:
        spread = [
            isinstance(p, Shard) and (p.dim == 0 or x.ndim == 3) and x.shape[p.dim] > 1
            for p in placements
        ]
        own = [p if s else Replicate() for p, s in zip(placements, spread, strict=True)]
        placed: Tensor = distribute_tensor(x, mesh, own)
        return placed

    return Intersection(*(_rebuilt_part(part, place, place) for part in pattern.parts))


def heads_of(pattern: Pattern, rank: int, ranks: int) -> Pattern:
    """Restrict a pattern to the heads of one rank: the `rank`-th of `ranks` equal shares.

    Arrays of a single head, which broadcasts, stay.
    """

    def share(x: Tensor) -> Tensor:
        return x if x.shape[1] == 1 else x.chunk(ranks, dim=1)[rank]

    return _rebuilt(pattern, share, share)


def queries_of(pattern: Pattern, rows: Tensor, seqlen_q: int, seqlen_k: int) -> Pattern:
    """Restrict a pattern to some of its queries; keys stay all, in order.

    Parameters
    ----------
    pattern : Pattern
        Of a problem with `seqlen_q` queries and `seqlen_k` keys.
    rows : integer Tensor, (n,)
        The queries to keep, in any order.
    seqlen_q, seqlen_k : int
        Of the whole problem.

    Returns
    -------
    pattern : Pattern
        Of a problem with n queries and `seqlen_k` keys: its query r sees what ``rows[r]`` saw.
    """

    def take(x: Tensor) -> Tensor:
        return x if x.shape[-1] == 1 else x.index_select(-1, rows)

    # Whatever depends on the query's position becomes a range of keys.
    start, end = torch.zeros_like(rows), torch.full_like(rows, seqlen_k)
    reach = seqlen_q + seqlen_k  # no two positions are further apart
    others = []
    for part in pattern.parts:
        causal = getattr(part, "causal", isinstance(part, Causal))
        shift = 0
        if isinstance(part, Causal) and part.align == "bottom-right":
            shift = seqlen_k - seqlen_q
        if causal:
            lag = int(not getattr(part, "include_self", True))
            lag = min(part.lag, reach) if isinstance(part, Causal) else lag
            end = torch.minimum(end, rows + shift + 1 - lag)
        if isinstance(part, SlidingWindow):
            window = min(part.window, reach)
            start = torch.maximum(start, rows + 1 - window)
            end = end if causal else torch.minimum(end, rows + window)
        elif not isinstance(part, Causal):
            others.append(_rebuilt_part(part, take, lambda x: x, causal=False))
    narrowed: Pattern = KeyRanges(start.view(1, 1, -1), end.view(1, 1, -1))
    for other in others:
        narrowed = narrowed & other
    return narrowed


def _rebuilt(pattern: Pattern, on_q: Callable[..., Any], on_k: Callable[..., Any]) -> Pattern:
    """Rebuild every part with its arrays mapped; documents have no heads and stay."""
    parts = [
        part if isinstance(part, Documents) else _rebuilt_part(part, on_q, on_k)
        for part in pattern.parts
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole & part
    return whole


def _rebuilt_part(
    part: Pattern,
    on_q: Callable[[Tensor], Tensor],
    on_k: Callable[[Tensor], Tensor],
    causal: bool | None = None,
) -> Pattern:
    """One part with its arrays mapped, and `causal` as given or as it was."""
    if isinstance(part, (Causal, SlidingWindow)):
        return part
    if isinstance(part, KeyRanges):
        return KeyRanges(on_q(part.start), on_q(part.end))
    if not isinstance(part, (HashSparse, QKSparse, Documents)):
        raise PatternError(f"no rule to shard {part!r}")
    causal = part.causal if causal is None else causal
    if isinstance(part, HashSparse):
        include_self = part.include_self or not causal
        return HashSparse(
            on_q(part.q_hash), on_k(part.k_hash), causal=causal, include_self=include_self
        )
    if isinstance(part, QKSparse):
        return QKSparse(on_q(part.q_keep), on_k(part.k_keep), causal=causal)
    return Documents(on_q(part.q_ids), on_k(part.k_ids), causal=causal)


def _exchange(x: Tensor, split: int, join: int, group: dist.ProcessGroup | None) -> Tensor:
    """Cut `x` along `split`, send piece i to rank i, put what comes together along `join`."""
    pieces = torch.stack(x.chunk(dist.get_world_size(group), dim=split))
    received = torch.empty_like(pieces)
    dist.all_to_all_single(received, pieces, group=group)
    return torch.cat(received.unbind(0), dim=join)


def _gather(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate every rank's `x` along `dim`."""
    parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group)


class _AllToAll(torch.autograd.Function):
    """`_exchange`, whose gradient is the exchange backwards."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, split: int, join: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.split, ctx.join, ctx.group = split, join, group
        return _exchange(x, split, join, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad, ctx.join, ctx.split, ctx.group), None, None, None


class _AllGather(torch.autograd.Function):
    """`_gather`, whose gradient is the sum over ranks of this rank's piece."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pieces = [x.contiguous() for x in grad.chunk(_size(ctx.group), dim=ctx.dim)]
        mine = torch.empty_like(pieces[0])
        dist.reduce_scatter(mine, pieces, group=ctx.group)
        return mine, None, None
