"""The operators ``scfa::attend_union`` and ``scfa::attend_union_backward``, and what they compute.

One forward and one backward kernel a part; parts and sinks are merged here, outside of autograd.
lse has no gradient: whoever wants one differentiates every part through its own. Sinks have theirs
from ``scfa::sinks_backward``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, library

from scfa_core.dispatch import AUTO
from scfa_core.sinks import check_sinks_backward, sinks_backward
from scfa_core.torch_calls import (
    Call,
    NativePlan,
    check_backward,
    checked_plan_arrays,
    find_call,
    run_backward,
    run_forward,
)
from scfa_core.torch_ops import (
    LIBRARY,
    OPTIONS,
    PLAN_SIZE,
    Tensors,
    fake_forward,
    fake_gradients,
    refuse_double_backward,
    register,
)
from scfa_core.torch_parts import (
    add_by_kernel,
    adds_by_kernel,
    merge_by_kernel,
    sinks_gradient_by_kernel,
)

# The seven tensors of every part, one after another; flags as 0 and 1, as torch.jit.trace takes no
# list of bools.
_PLANS = "Tensor[] plans, int[] monotone"

LIBRARY.define(
    f"attend_union(Tensor q, Tensor k, Tensor v, Tensor? sinks, {_PLANS}, {OPTIONS}) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define(
    "attend_union_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_PLANS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "sinks_backward(Tensor dout, Tensor out, Tensor lse, Tensor sinks, str layout) -> Tensor"
)

ATTEND_UNION = torch.ops.scfa.attend_union.default
ATTEND_UNION_BACKWARD = torch.ops.scfa.attend_union_backward.default
SINKS_BACKWARD = torch.ops.scfa.sinks_backward.default


def merge_in_place(
    outs: Sequence[Tensor], lses: Sequence[Tensor], swap: bool, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`merging.merge_attention` and `merge_sinks` without gradients, two passes over two parts.

    Sums are float32, or wider like outs. The memory of ``outs[0]`` takes the result. On a GPU one
    kernel where it serves.
    """
    if len(outs) > 1 or sinks is not None:
        merged = merge_by_kernel(outs, lses, swap, sinks)
        if merged is not None:
            return merged
    if sinks is not None:
        lses = [*lses, sinks.to(lses[0].dtype)[:, None].expand_as(lses[0])]
    if len(lses) == 1:
        return outs[0], lses[0]
    lse = reduce(torch.logaddexp, lses)
    # Where no part sees a key the softmax of nothing but -inf would be NaN.
    shares = torch.softmax(torch.stack(list(lses)), 0).masked_fill_(torch.isneginf(lse), 0.0)
    shares = (shares.transpose(2, 3) if swap else shares).unsqueeze(-1)
    if len(outs) == 1:
        return outs[0].mul_(shares[0]), lse
    total = outs[0] * shares[0]
    for out, share in zip(outs[1:-1], shares[1 : len(outs) - 1], strict=True):
        total.addcmul_(out, share)
    return torch.addcmul(total, outs[-1], shares[len(outs) - 1], out=outs[0]), lse


def add_gradients(gradients: Iterable[Tensors], parts: int) -> Tensors:
    """Sum dq, dk, dv over parts, in float32 or wider; the memory of the first takes two of them.

    A narrow sum of two is rounded once, as one in float32 that is narrowed would be. Of more, on a
    GPU, one kernel where it serves.
    """
    others = iter(gradients)
    held = [next(others)]  # let go of as soon as it is added
    dtype = held[0][0].dtype
    if parts > 2 and adds_by_kernel(held[0]):
        return add_by_kernel(held, others, parts)
    wide = dtype if parts <= 2 else torch.promote_types(dtype, torch.float32)
    totals = tuple(x.to(wide) for x in held.pop())
    for grads in others:
        for total, grad in zip(totals, grads, strict=True):
            total += grad
    return tuple(x.to(dtype) for x in totals)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, plans: Sequence[Tensor], monotone: Sequence[int], *rest: Any
) -> tuple[Call, list[NativePlan]]:
    """Check the call, and hand the plan of every part to the backend."""
    scale, deterministic, layout, backend = rest
    call = find_call(q, k, v, scale, layout, deterministic, backend or AUTO)
    arrays = [
        checked_plan_arrays(plans[PLAN_SIZE * at : PLAN_SIZE * (at + 1)], bool(flag), call)
        for at, flag in enumerate(monotone)
    ]
    return call, arrays


def _attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *rest: Any) -> Tensors:
    """``scfa::attend_union`` on real tensors."""
    call, arrays = _prepare(q, k, v, *rest)
    outs, lses = zip(*[run_forward(call, plan, q, k, v) for plan in arrays], strict=True)
    return merge_in_place(outs, lses, call.swap, sinks)


def _attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> Tensors:
    """``scfa::attend_union_backward`` on real tensors."""
    call, arrays = _prepare(q, k, v, *rest)
    check_backward(call, dout=dout, out=out, lse=lse)
    each = (run_backward(call, plan, dout, None, q, k, v, out, lse) for plan in arrays)
    return add_gradients(each, len(arrays))


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensors:
    return fake_gradients(q, k, v)


def _sinks_backward(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor, layout: str) -> Tensor:
    """``scfa::sinks_backward`` on real tensors."""
    swap = check_sinks_backward(dout, out, lse, sinks, layout)
    dsinks = sinks_gradient_by_kernel(dout, out, lse, sinks, swap)
    return sinks_backward(dout, out, lse, sinks, layout=layout) if dsinks is None else dsinks


def _fake_sinks_backward(
    dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor, layout: str
) -> Tensor:
    return sinks.new_empty(sinks.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    q, k, v, sinks, plans, *options = inputs
    ctx.save_for_backward(q, k, v, sinks, *output, *plans)
    ctx.options = options
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """Gradients of q, k, v and sinks; None for the rest."""
    q, k, v, sinks, out, lse, *plans = ctx.saved_tensors
    nothing = ([None] * len(plans), *[None] * len(ctx.options))
    if dout is None:
        return (None, None, None, None, *nothing)
    dsinks = None
    if ctx.needs_input_grad[3]:
        dsinks = SINKS_BACKWARD(dout, out, lse, sinks, ctx.options[-2])
        if not any(ctx.needs_input_grad[:3]):
            return (None, None, None, dsinks, *nothing)
    grads = ATTEND_UNION_BACKWARD(dout, q, k, v, out, lse, plans, *ctx.options)
    return (*grads, dsinks, *nothing)


register("attend_union", _attend, fake_forward)
register("attend_union_backward", _attend_backward, _fake_backward)
register("sinks_backward", _sinks_backward, _fake_sinks_backward)
library.register_autograd(
    "scfa::attend_union", _differentiate, setup_context=_save_for_backward, lib=LIBRARY
)
for _name in ("attend_union_backward", "sinks_backward"):
    library.register_autograd(f"scfa::{_name}", refuse_double_backward, lib=LIBRARY)
