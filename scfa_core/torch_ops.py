"""The operators ``scfa::make_plan``, ``scfa::forward``, ``scfa::backward``.

They are what tracing sees: an implementation on real tensors (CPU and CUDA), a fake one that names
shapes and strides, an autograd formula and a batching rule. Outputs never alias inputs; the number
of outputs is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from scfa_core.dispatch import AUTO
from scfa_core.errors import GradientError, ShapeError
from scfa_core.plan import plan_shapes
from scfa_core.problem import Problem, check_layout
from scfa_core.torch_calls import (
    check_backward,
    checked_plan_arrays,
    find_call,
    heads_first,
    like_order,
    run_backward,
    run_forward,
)
from scfa_core.torch_fakes import register_fake
from scfa_core.torch_patterns import decode
from scfa_core.torch_plans import new_plan

Tensors = tuple[torch.Tensor, ...]

PLAN_SIZE = 7
_PLAN = (
    "Tensor q_index, Tensor q_count, Tensor k_index, Tensor k_count, "
    "Tensor key_start, Tensor key_end, Tensor work, bool monotone"
)
OPTIONS = "float? softmax_scale, bool deterministic, str layout, str backend"
_SEVEN = ", ".join(["Tensor"] * PLAN_SIZE)

LIBRARY = torch.library.Library("scfa", "DEF")
LIBRARY.define(
    "make_plan(Tensor q, Tensor k, str pattern, Tensor[] arrays, SymInt[] ints, str layout, "
    f"str backend) -> ({_SEVEN})"
)
LIBRARY.define(f"forward(Tensor q, Tensor k, Tensor v, {_PLAN}, {OPTIONS}) -> (Tensor, Tensor)")
LIBRARY.define(
    "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_PLAN}, {OPTIONS}) -> (Tensor, Tensor, Tensor)"
)

MAKE_PLAN = torch.ops.scfa.make_plan.default
FORWARD = torch.ops.scfa.forward.default
BACKWARD = torch.ops.scfa.backward.default


def _make_plan(
    q: torch.Tensor,
    k: torch.Tensor,
    pattern: str,
    arrays: list[torch.Tensor],
    ints: list[int],
    layout: str,
    backend: str,
) -> Tensors:
    """``scfa::make_plan`` on real tensors; the pattern as `torch_patterns.encode` gives it."""
    call = find_call(q, k, k, None, layout, True, backend or AUTO)
    return new_plan(decode(pattern, arrays, ints), call.problem, call.backend).arrays


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Tensors:
    """``scfa::forward`` on real tensors."""
    plan, (monotone, scale, deterministic, layout, backend) = rest[:PLAN_SIZE], rest[PLAN_SIZE:]
    call = find_call(q, k, v, scale, layout, deterministic, backend or AUTO)
    return run_forward(call, checked_plan_arrays(plan, monotone, call), q, k, v)


def _backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> Tensors:
    """``scfa::backward`` on real tensors."""
    plan, (monotone, scale, deterministic, layout, backend) = rest[:PLAN_SIZE], rest[PLAN_SIZE:]
    call = find_call(q, k, v, scale, layout, deterministic, backend or AUTO)
    check_backward(call, dout=dout, out=out, lse=lse)
    if dlse is not None:
        check_backward(call, dlse=dlse)
    arrays = checked_plan_arrays(plan, monotone, call)
    return run_backward(call, arrays, dout, dlse, q, k, v, out, lse)


def _fake_make_plan(
    q: torch.Tensor,
    k: torch.Tensor,
    pattern: str,
    arrays: list[torch.Tensor],
    ints: list[int],
    layout: str,
    backend: str,
) -> Tensors:
    swap = check_layout(layout)
    batch, heads, seqlen_q, _ = heads_first(q.shape, swap)
    _, heads_kv, seqlen_k, _ = heads_first(k.shape, swap)
    sizes = (batch, heads, heads_kv, seqlen_q, seqlen_k)
    problem = Problem(*sizes, 0, 0, "", "", 1.0)  # of the rest no shape of a plan depends
    shapes = plan_shapes(problem, "cuda" if q.device.type == "cuda" else "host")
    return tuple(q.new_empty(shape, dtype=torch.int32) for shape in shapes)


def fake_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Tensors:
    """Out and lse without values; the last but one of `rest` is the layout."""
    swap = check_layout(rest[-2])
    shape = (*q.shape[:3], v.shape[3])
    out = q.new_empty_strided(shape, like_order(q, shape))
    return out, q.new_empty(heads_first(q.shape, swap)[:3], dtype=torch.float32)


def _fake_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: Any,
) -> Tensors:
    return fake_gradients(q, k, v)


def fake_gradients(*tensors: torch.Tensor) -> Tensors:
    """Gradients of some tensors, without values."""
    return tuple(x.new_empty_strided(x.shape, like_order(x, x.shape)) for x in tensors)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    """Keep what the backward needs: q, k, v, out, lse, the plan, the options."""
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3 : 3 + PLAN_SIZE])
    ctx.options = inputs[3 + PLAN_SIZE :]
    ctx.set_materialize_grads(False)


def differentiate(
    ctx: Any,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    backward: Callable[..., Tensors] = BACKWARD,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, v; None for the rest."""
    nothing = (None,) * (PLAN_SIZE + len(ctx.options))
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    q, k, v, out, lse, *plan = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return (*backward(dout, dlse, q, k, v, out, lse, *plan, *ctx.options), *nothing)


def refuse_double_backward(ctx: Any, *grads: Any) -> Any:
    """Say that second derivatives do not exist here."""
    raise GradientError(
        "scfa_core.attention has first derivatives only, got a request to differentiate its "
        "backward (create_graph=True, torch.func.hessian, ...); for gradient penalties use "
        "torch.nn.functional.scaled_dot_product_attention with pattern.mask(...)"
    )


def refuse_forward_mode(ctx: Any, *tangents: Any) -> Any:
    """Say that forward-mode derivatives do not exist here."""
    raise GradientError(
        "scfa_core.attention has no forward-mode derivative, got a dual tensor (torch.func.jvp, "
        "jacfwd, hessian, ...); use reverse mode (backward, torch.func.vjp, jacrev)"
    )


def batched(op: Callable[..., Tensors]) -> Callable[..., Any]:
    """`torch.func.vmap` rule: run `op` for every slice and stack; exact, not faster than a loop."""

    def rule(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Tensors, tuple[int, ...]]:
        if not info.batch_size:
            raise ShapeError(
                "torch.func.vmap over an axis of length 0 has no slice to run; leave the call out, "
                "or map over an axis of at least 1"
            )

        def slice_of(x: Any, dim: Any, at: int) -> Any:
            if isinstance(x, (list, tuple)) and isinstance(dim, (list, tuple)):
                return [slice_of(one, d, at) for one, d in zip(x, dim, strict=True)]
            if not isinstance(x, torch.Tensor) or dim is None:
                return x
            part = x.select(dim, at)
            return part.contiguous() if part.ndim == 4 and part.stride(-1) != 1 else part

        results = [
            op(*(slice_of(x, dim, at) for x, dim in zip(arguments, in_dims, strict=True)))
            for at in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(xs) for xs in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def register(name: str, real: Any, fake: Any) -> None:
    """Give the operator ``scfa::name`` its body on every device, its fake and its vmap rule."""
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, real, key)
    register_fake(name, fake, LIBRARY)
    operator = getattr(torch.ops.scfa, name).default
    torch.library.register_vmap(operator, batched(operator), lib=LIBRARY)


register("make_plan", _make_plan, _fake_make_plan)
register("forward", _forward, fake_forward)
register("backward", _backward, _fake_backward)
torch.library.register_autograd(
    "scfa::forward", differentiate, setup_context=save_for_backward, lib=LIBRARY
)
torch.library.register_autograd("scfa::backward", refuse_double_backward, lib=LIBRARY)
