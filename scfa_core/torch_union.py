"""Attention over disjoint patterns on torch tensors: the ways of `attention_over`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from scfa_core.api import attention, attention_backward, make_plan
from scfa_core.merging import merge_attention, merge_sinks
from scfa_core.patterns import Pattern
from scfa_core.plan import Plan
from scfa_core.problem import check_layout, one_framework
from scfa_core.torch_bridge import (
    check_scale_kind,
    holds_plain,
    in_autocast,
    is_plain,
    narrowed,
    traced_plan,
)
from scfa_core.torch_saved import count_changes, refuse_changed
from scfa_core.torch_transforms import functorch_is_active
from scfa_core.torch_union_ops import (
    ATTEND_UNION,
    SINKS_BACKWARD,
    add_gradients,
    merge_in_place,
)


def union_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    patterns: list[Pattern | Plan],
    options: dict[str, Any],
    wants_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Merge one call per pattern; lse is differentiable only if `wants_lse`.

    Plain tensors take the node below, what somebody watches (a compiler, a dispatch mode, the
    profiler) the operator. Neither can pass a gradient that arrives at lse, functorch takes
    neither, and the reference, like every backward in float64, has more digits than a merged lse;
    in those cases every part is an ordinary call, differentiated through its own lse.
    """
    eager = is_plain(q, k, v) and all(map(holds_plain, patterns))
    eager = eager and (sinks is None or type(sinks) in (Tensor, Parameter))
    if not eager:
        one_framework(q, k=k, v=v)
    if in_autocast(q):
        q, k, v = narrowed(q, k, v)  # here, so that the node saves what the backend saw
    layout, backend = options["layout"], options["backend"]
    if eager:
        plans = [
            p if isinstance(p, Plan) else make_plan(p, q, k, layout=layout, backend=backend)
            for p in patterns
        ]
        names = {plan.backend for plan in plans}
    else:
        check_scale_kind(options["softmax_scale"])
        named = [
            traced_plan(q, k, v, p, layout, backend, options["softmax_scale"]) for p in patterns
        ]
        plans = [plan for _, plan in named]
        names = {name for name, _ in named}
    given = (q, k, v) if sinks is None else (q, k, v, sinks)
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    trusted = q.dtype != torch.float64 and "reference" not in names
    if not trusted or (tracked and wants_lse):
        return _merged(q, k, v, sinks, plans, options)
    if eager:
        out, lse = _Union.apply(q, k, v, sinks, plans, options)
        return out, lse
    transformed = not torch.compiler.is_compiling() and functorch_is_active()
    if transformed or len(names) > 1:
        return _merged(q, k, v, sinks, plans, options)
    tensors = [x for plan in plans for x in plan.arrays]
    monotone = [int(plan.monotone) for plan in plans]
    scale, deterministic = options["softmax_scale"], options["deterministic"]
    how = (scale, deterministic, layout, next(iter(names)))
    out, lse = ATTEND_UNION(q, k, v, sinks, tensors, monotone, *how)
    return out, lse


def _merged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    plans: list[Plan],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Out and lse over all plans, differentiated part by part."""
    parts = [attention(q, k, v, plan, return_lse=True, **options) for plan in plans]
    out, lse = merge_attention(*zip(*parts, strict=True), layout=options["layout"])
    return (out, lse) if sinks is None else merge_sinks(out, lse, sinks, options["layout"])


class _Union(torch.autograd.Function):
    """Forward: merge. Backward: sum of the parts' gradients under the merged softmax."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        plans: list[Plan],
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        parts = [attention(q, k, v, plan, return_lse=True, **options) for plan in plans]
        outs, lses = zip(*parts, strict=True)
        out, lse = merge_in_place(outs, lses, check_layout(options["layout"]), sinks)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.plans, ctx.options = plans, options
        ctx.changes = [count_changes(plan) for plan in plans]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        dsinks = None
        if ctx.needs_input_grad[3]:
            dsinks = SINKS_BACKWARD(dout, out, lse, sinks, ctx.options["layout"])
            if not any(ctx.needs_input_grad[:3]):
                return (None, None, None, dsinks, None, None)

        def gradients() -> Iterator[tuple[Tensor, ...]]:
            for plan, changes in zip(ctx.plans, ctx.changes, strict=True):
                refuse_changed(plan, changes)
                yield attention_backward(dout, q, k, v, out, lse, plan, **ctx.options)

        return (*add_gradients(gradients(), len(ctx.plans)), dsinks, None, None)
