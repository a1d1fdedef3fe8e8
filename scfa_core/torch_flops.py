"""What attention costs, for torch's flop counter, which takes operators it does not know for free.

Counted are the pairs that a pattern lets be seen. Planning counts nothing, hashing its products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from scfa_core.extras import missing

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise missing("scfa_core.torch_flops", "torch", error) from error

import scfa_core.torch_hashing
import scfa_core.torch_union_ops  # noqa: F401  (both define operators)
from scfa_core.torch_calls import heads_first
from scfa_core.torch_ops import PLAN_SIZE

__all__ = ["register"]

_START, _END = 4, 5  # places of key_start and key_end among the arrays of a plan


@cache
def register() -> None:
    """Tell `torch.utils.flop_counter` what the operators of this package cost.

    >>> from torch.utils.flop_counter import FlopCounterMode
    >>> register()
    >>> q = torch.randn(1, 1, 4, 16)
    >>> with FlopCounterMode(display=False) as counter:
    ...     out = scfa.attention(q, q, q, scfa.SlidingWindow(1))  # 4 pairs
    >>> counter.get_total_flops() == 4 * 2 * (16 + 16)
    True

    Call it before a counter is made: each takes what is known then. A second call does nothing.

    Notes
    -----
    A visible pair counts ``2 * (head_dim + head_dim_v)`` forward and ``2 * (3 * head_dim + 2 *
    head_dim_v)`` backward, as torch counts its own attention. Counting reads the plan, and so waits
    for the device. Where there is nothing to read (fake and meta tensors, a CUDA graph being
    captured) all pairs count, as they do in torch under causality.
    """
    from torch.utils.flop_counter import register_flop_formula  # may import Triton

    ops = torch.ops.scfa
    for operator, formula in (
        (ops.forward, _forward),
        (ops.backward, _backward),
        (ops.attend_union, _union),
        (ops.attend_union_backward, _union_backward),
        (ops.angular_hash, _hash),
        (ops.past_hash, _hash),
    ):
        register_flop_formula(operator, get_raw=True)(formula)


def _pairs(q: Tensor, k: Tensor, plan: Sequence[Tensor], layout: str) -> int:
    """Visible pairs, or all where the plan cannot be read."""
    start, end = plan[_START], plan[_END]
    unread = type(start) is not Tensor or start.is_meta
    if unread or (start.is_cuda and torch.cuda.is_current_stream_capturing()):
        swap = layout == "bthd"
        batch, heads, seqlen_q, _ = heads_first(q.shape, swap)
        return batch * heads * seqlen_q * heads_first(k.shape, swap)[2]
    return int((end - start).sum())


def _forward_of(q: Tensor, v: Tensor) -> int:
    return 2 * (q.shape[-1] + v.shape[-1])


def _backward_of(q: Tensor, v: Tensor) -> int:
    return 2 * (3 * q.shape[-1] + 2 * v.shape[-1])


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> int:
    return _pairs(q, k, rest[:PLAN_SIZE], rest[-2]) * _forward_of(q, v)


def _backward(
    dout: Tensor, dlse: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any
) -> int:
    plan = rest[2 : 2 + PLAN_SIZE]  # behind out and lse
    return _pairs(q, k, plan, rest[-2]) * _backward_of(q, v)


def _parts(q: Tensor, k: Tensor, plans: Sequence[Tensor], layout: str) -> int:
    """Visible pairs of all parts of a union."""
    each = range(0, len(plans), PLAN_SIZE)
    return sum(_pairs(q, k, plans[at : at + PLAN_SIZE], layout) for at in each)


def _union(
    q: Tensor, k: Tensor, v: Tensor, sinks: Any, plans: Sequence[Tensor], *rest: Any, **_: Any
) -> int:
    return _parts(q, k, plans, rest[-2]) * _forward_of(q, v)


def _union_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plans: Sequence[Tensor],
    *rest: Any,
    **_: Any,
) -> int:
    return _parts(q, k, plans, rest[-2]) * _backward_of(q, v)


def _hash(x: Tensor, directions: Tensor, *rest: Any, **_: Any) -> int:
    """Products of every row with the directions of its head."""
    rounds, _, _, n = directions.shape
    return 2 * rounds * x.numel() * n
