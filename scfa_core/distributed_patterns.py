"""Patterns over many processes: as DTensors, and the shares of one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from scfa_core.errors import DTypeError, OptionError, PatternError, ShapeError
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
from scfa_core.patterns.base import require_pattern
from scfa_core.problem import as_size
from scfa_core.torch_checks import check_tensor
from scfa_core.torch_meta import is_traced

__all__ = ["check_rows", "distribute_pattern", "heads_of", "queries_of", "require_whole"]

_PLACEMENTS = (Shard(0), Shard(1), Replicate())


def require_whole(verb: str, pattern: Any) -> None:
    """Refuse what is no pattern, a plan among it."""
    require_pattern(f"{verb} takes the pattern of the whole sequence", pattern)


def check_rows(rows: Any) -> Tensor:
    """Rows as int64, in which none is too far; refuse what no pattern's arrays could be read at."""
    check_tensor("rows", rows, "n")
    if rows.is_floating_point() or rows.dtype is torch.bool:
        raise DTypeError(f"rows must be an integer tensor, got {rows.dtype}")
    held: Tensor = rows.long()
    return held


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
        No pattern, not as many placements as the mesh has dimensions, or one that is none of these.
    OptionError
        No mesh.
    """
    require_whole("distribute_pattern", pattern)
    if not isinstance(mesh, DeviceMesh):
        raise OptionError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    single = isinstance(placement, Placement) or not isinstance(placement, Sequence)
    placements = [placement] if single else list(placement)
    if len(placements) != mesh.ndim or not all(p in _PLACEMENTS for p in placements):
        raise PatternError(
            f"each of the mesh's {mesh.ndim} dimensions needs a placement of {_PLACEMENTS}, got "
            f"{placement!r}; sequences are shared by ulysses_attention or gathered_attention"
        )

    def place(x: Tensor) -> Tensor:
        check_tensor("each array of the pattern", x)
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

    Parameters
    ----------
    pattern : Pattern
        Of all heads.
    rank, ranks : int
        Which share, from 0 on, and of how many.

    Returns
    -------
    pattern : Pattern
        Arrays of a single head, which broadcasts, and documents, which have none, stay.

    Raises
    ------
    PatternError
        No pattern, or no rank of so many.
    ShapeError
        Heads that `ranks` does not divide.
    DTypeError
        Arrays that are no torch tensors.
    """
    require_whole("heads_of", pattern)
    ranks = as_size("ranks", ranks, 1, PatternError)
    if as_size("rank", rank, 0, PatternError) >= ranks:
        raise PatternError(f"rank must be below ranks={ranks}, got {rank}")

    def share(x: Tensor) -> Tensor:
        check_tensor("each array of the pattern", x)
        if x.shape[1] == 1:
            return x
        if x.shape[1] % ranks:
            raise ShapeError(f"{ranks} ranks must divide the {x.shape[1]} heads of a pattern")
        return x.chunk(ranks, dim=1)[rank]

    return Intersection(
        *(
            part if isinstance(part, Documents) else _rebuilt_part(part, share, share)
            for part in pattern.parts
        )
    )


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

    Raises
    ------
    PatternError
        No pattern; on the host, a row that is none of `seqlen_q`.
    DTypeError, ShapeError
        Rows that are no integer tensor of one axis, sizes that are none, arrays that are no torch
        tensors or of another length.
    """
    require_whole("queries_of", pattern)
    rows = check_rows(rows)
    seqlen_q, seqlen_k = as_size("seqlen_q", seqlen_q), as_size("seqlen_k", seqlen_k)
    if rows.device.type == "cpu" and not is_traced(rows):  # a GPU would have to be waited for
        beyond = rows[(rows < 0) | (rows >= seqlen_q)]
        if beyond.numel():
            raise PatternError(f"rows must be from 0 to {seqlen_q - 1}, got {int(beyond[0])}")

    def take(x: Tensor) -> Tensor:
        check_tensor("each array of the pattern", x)
        if x.shape[-1] not in (1, seqlen_q):
            raise ShapeError(
                f"arrays of a pattern must have an entry for each of the {seqlen_q} queries of the "
                f"whole sequence, got {tuple(x.shape)}; give every rank the whole pattern"
            )
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
