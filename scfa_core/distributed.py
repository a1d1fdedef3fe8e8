"""Attention over many processes: sharded batches and heads, and sharded sequences.

Heads and sequences of a batch are independent, so DTensor shards them by rules alone
(`distributed_rules`; a pattern's arrays are then DTensors too). A sequence that is itself
spread over ranks needs communication: either `ulysses_attention`, where an all-to-all gives each
rank whole sequences of some heads, or `gathered_attention`, where each rank keeps its queries and
gathers all keys. Results and gradients are those of one process. Only torch.distributed
communicates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scfa_core.extras import missing

try:
    import torch
    import torch.distributed as dist
    from torch import Tensor
except ModuleNotFoundError as error:
    raise missing("scfa_core.distributed", "torch", error) from error

import scfa_core.distributed_rules  # noqa: F401  (registers them)
from scfa_core.api import attention
from scfa_core.distributed_agreement import agreed, is_checked
from scfa_core.distributed_exchange import from_all, to_heads, to_rows
from scfa_core.distributed_patterns import (
    check_rows,
    distribute_pattern,
    heads_of,
    queries_of,
    require_whole,
)
from scfa_core.errors import OptionError, PatternError, ShapeError
from scfa_core.merging import check_sinks
from scfa_core.patterns import Pattern
from scfa_core.patterns.base import PATTERN, require_pattern
from scfa_core.problem import as_size
from scfa_core.torch_checks import check_tensor

__all__ = [
    "distribute_pattern",
    "gathered_attention",
    "heads_of",
    "queries_of",
    "ulysses_attention",
    "zigzag_rows",
]

MakePattern = Callable[[Tensor, Tensor], Pattern]


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
    k, v : Tensor, (batch, heads_kv, seqlen_k / ranks, head_dim)
    pattern : Pattern or callable
        Of the whole sequence and all heads, the same on every rank: each takes its heads
        (`heads_of`). Or ``pattern(q, k)``, called with whole sequences of this rank's heads, to
        hash them for instance.
    group : ProcessGroup, optional
        All ranks by default; their number divides heads and heads_kv.
    **options
        As for `scfa_core.attention`, but layout and lse; sinks of all heads.

    Returns
    -------
    out : Tensor like `q`
        Differentiable.

    Raises
    ------
    ShapeError
        Heads that the number of ranks does not divide, other axes than these, or other shares on
        another rank.
    DTypeError
        What is no torch tensor.

    Notes
    -----
    On the host an error of one rank is raised on all, and unequal shares are told: two small
    all-gathers. On GPUs, where they would wait for the device, only with the environment variable
    ``TORCH_DISTRIBUTED_DEBUG=INFO`` (or DETAIL); without it the other ranks wait.

    Two all-to-alls forward, of q, k and v together and of out, and two backward; v goes apart where
    its head_dim is another one, as does q where its length is. Every pattern works unchanged,
    because no sequence is cut while attention runs. Source: arXiv 2309.14509.
    """
    checked = is_checked(q, group)
    with agreed(group, checked, q=q, k=k, v=v):
        _refuse_options("ulysses_attention", options)
        if not isinstance(pattern, Pattern) and not callable(pattern):
            raise PatternError(
                "ulysses_attention takes the pattern of the whole sequence, or a function of q and "
                f"k, got {type(pattern).__name__}"
            )
        _check_shapes(q, k, v)
        ranks = dist.get_world_size(group)
        if q.shape[1] % ranks or k.shape[1] % ranks:
            raise ShapeError(
                f"{ranks} ranks must divide heads={q.shape[1]} and heads_kv={k.shape[1]}; use "
                "gathered_attention for fewer heads"
            )
        sinks = options.pop("sinks", None)
        if sinks is not None:
            check_sinks(sinks, q, "bhtd")
            sinks = sinks.unflatten(0, (ranks, -1))[dist.get_rank(group)]
    q, k, v = to_heads((q, k, v), group)
    with agreed(group, checked):
        if isinstance(pattern, Pattern):
            pattern = heads_of(pattern, dist.get_rank(group), ranks)
        else:
            pattern = pattern(q, k)
            require_pattern(f"ulysses_attention: the function must return {PATTERN}", pattern)
        out: Tensor = attention(q, k, v, pattern, sinks=sinks, **options)
    (out,) = to_rows((out,), group)
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
    k, v : Tensor, (batch, heads_kv, seqlen_k / ranks, head_dim)
    pattern : Pattern
        Of the whole sequence, the same on every rank: each takes its queries (`queries_of`).
    group : ProcessGroup, optional
    rows : integer Tensor, (seqlen / ranks,), optional
        Global row of each local one, of q and of k; all ranks together name each row once (on
        GPUs that is not checked, as it would wait for the device). By default ranks hold
        consecutive stretches, and under a causal pattern later ranks have more to do; `zigzag_rows`
        evens that out.
    **options
        As for `scfa_core.attention`, but layout and lse.

    Returns
    -------
    out : Tensor like `q`
        Differentiable.

    Raises
    ------
    PatternError
        No pattern.
    DTypeError, ShapeError
        Rows that are no integer tensor, or not as many as q and k have; other axes than these, or
        other shares on another rank.

    Notes
    -----
    Memory: k and v of the whole sequence on every rank. One all-gather of both, and one
    reduce-scatter of their gradients; `rows` are gathered as well. Any number of heads. Ranks tell
    each other of errors as in `ulysses_attention`.
    """
    checked = is_checked(q, group)
    with agreed(group, checked, q=q, k=k, v=v, rows=rows):
        _refuse_options("gathered_attention", options)
        require_whole("gathered_attention", pattern)
        _check_shapes(q, k, v)
        rows = None if rows is None else _check_rows(rows, q, k)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    k, v = from_all((k, v), rows, group)
    if rows is None:
        rows = torch.arange(rank * q.shape[2], (rank + 1) * q.shape[2], device=q.device)
    with agreed(group, checked):
        local = queries_of(pattern, rows, q.shape[2] * ranks, k.shape[2])
        out: Tensor = attention(q, k, v, local, **options)
    return out


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise on what could not be exchanged; `attention` sees to the rest."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, "batch", "heads", "seqlen", "head_dim")
    if k.shape[:3] != v.shape[:3]:
        raise ShapeError(f"k and v must agree in all but the last axis, got {k.shape=}, {v.shape=}")


def _check_rows(rows: Tensor, q: Tensor, k: Tensor) -> Tensor:
    rows = check_rows(rows)
    for name, x in (("q", q), ("k", k)):
        if len(rows) != x.shape[2]:
            raise ShapeError(f"rows must name the {x.shape[2]} rows of {name}, got {len(rows)}")
    return rows


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
