"""Attention over disjoint patterns on torch tensors: the autograd node of `attention_over`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scfa_core.api import attention, attention_backward, make_plan
from scfa_core.merging import merge_attention
from scfa_core.patterns import Pattern
from scfa_core.plan import Plan
from scfa_core.torch_bridge import _AUTOCAST_KINDS, _autocast
from scfa_core.torch_calls import count_changes, refuse_changed
from scfa_core.torch_transforms import functorch_is_active


def union_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    patterns: list[Pattern | Plan],
    options: dict[str, Any],
    wants_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Merge one call per pattern; lse is differentiable only if `wants_lse`.

    The cheap node below cannot pass a gradient that arrives at lse, tracers want operators only,
    and the backward of the reference, like every one in float64, does not use the lse it is given;
    in those cases every part is an ordinary call, differentiated through its own lse.
    """
    kind = q.device.type
    if kind in _AUTOCAST_KINDS and torch.is_autocast_enabled(kind):
        q, k, v = _autocast(q, k, v)  # here, so that the node saves what the backend saw
    layout, backend = options["layout"], options["backend"]
    plans = [
        p if isinstance(p, Plan) else make_plan(p, q, k, layout=layout, backend=backend)
        for p in patterns
    ]
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    traced = torch.compiler.is_compiling() or functorch_is_active()
    trusted = q.dtype != torch.float64 and all(plan.backend != "reference" for plan in plans)
    if traced or (tracked and wants_lse) or not trusted:
        return _merged(q, k, v, plans, options)
    out, lse = _Union.apply(q, k, v, plans, options)
    return out, lse


def _merged(
    q: Tensor, k: Tensor, v: Tensor, plans: list[Plan], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Out and lse over all plans."""
    parts = [attention(q, k, v, plan, return_lse=True, **options) for plan in plans]
    return merge_attention(*zip(*parts, strict=True), layout=options["layout"])


class _Union(torch.autograd.Function):
    """Forward: merge. Backward: sum of the parts' gradients under the merged softmax."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plans: list[Plan],
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        out, lse = _merged(q, k, v, plans, options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plans, ctx.options = plans, options
        ctx.changes = [count_changes(plan) for plan in plans]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        sums: list[Tensor] = []
        for plan, changes in zip(ctx.plans, ctx.changes, strict=True):
            refuse_changed(plan, changes)
            grads = attention_backward(dout, q, k, v, out, lse, plan, **ctx.options)
            if sums:
                for total, grad in zip(sums, grads, strict=True):
                    total += grad
            else:
                sums = [grad.to(wide) for grad in grads]
        dq, dk, dv = (x.to(q.dtype) for x in sums)
        return dq, dk, dv, None, None
