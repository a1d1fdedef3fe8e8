"""Attention on torch tensors: straight to the backend when eager, through ``scfa::`` when traced.

Both ways share `torch_calls`. Plain tensors in plain Python skip the dispatcher, which would cost
more host time than all else together; whatever must be seen by somebody (torch.compile,
functorch, dispatch modes, subclasses, the profiler) goes through the operators.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any, TypeVar

import numpy as np
import torch
from torch.autograd import forward_ad

from scfa_core.array_kinds import check_dense
from scfa_core.arrays import FLOAT_DTYPES
from scfa_core.dispatch import AUTO, check_name, choose_backend, choose_for_plan, requested_backend
from scfa_core.errors import ScaleError
from scfa_core.lowering import is_monotone
from scfa_core.patterns import Pattern
from scfa_core.patterns.base import kind_of
from scfa_core.plan import Plan
from scfa_core.problem import HEAD_DIMS, Problem, check_layout, check_scale, one_framework
from scfa_core.torch_calls import (
    Call,
    NativePlan,
    Seven,
    check_backward,
    find_call,
    native_plan,
    run_backward,
    run_forward,
)
from scfa_core.torch_framework import TORCH_FRAMEWORK, device_name, dtype_name
from scfa_core.torch_meta import check_backward_on_meta, check_on_meta
from scfa_core.torch_ops import BACKWARD, FORWARD, MAKE_PLAN, refuse_forward_mode
from scfa_core.torch_patterns import encode
from scfa_core.torch_plans import native_own_plan, new_plan, own_plan, own_plan_tensors
from scfa_core.torch_saved import call_of_saved, count_changes, refuse_changed
from scfa_core.torch_transforms import forward_in_functorch, functorch_is_active

__all__ = [
    "TORCH_FRAMEWORK",
    "attention",
    "attention_backward",
    "check_scale_kind",
    "holds_plain",
    "in_autocast",
    "is_plain",
    "make_plan",
    "narrowed",
    "traced_plan",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_TRACED_AS_TENSORS = (torch.Tensor, np.ndarray, np.generic)
_AUTOCAST_KINDS = ("cpu", "cuda")
_AUTOCAST_TAKES = (torch.float16, torch.bfloat16, torch.float32)

_dispatch_modes = torch._C._len_torch_dispatch_stack
_profiler_is_on = torch._C._autograd._profiler_enabled
_tracing_state = torch._C._get_tracing_state
_any_requires_grad = torch._C._any_requires_grad
_has_storage = torch._C._has_storage  # batched gradients (is_grads_batched) have none


def attention(
    q: Any,
    k: Any,
    v: Any,
    pattern: Pattern | Plan,
    *,
    softmax_scale: float | None = None,
    layout: str = "bhtd",
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Any:
    """`scfa_core.attention` on torch tensors; gradients flow to q, k and v, from out and lse."""
    eager = is_plain(q, k, v) and holds_plain(pattern)
    if not eager:
        one_framework(q, k=k, v=v)
    if in_autocast(q):
        q, k, v = narrowed(q, k, v)
    if eager:
        out, lse = _eager(q, k, v, pattern, softmax_scale, layout, deterministic, backend)
    else:
        check_scale_kind(softmax_scale)
        name, plan = traced_plan(q, k, v, pattern, layout, backend, softmax_scale)
        options = (plan.monotone, softmax_scale, deterministic, layout, name)
        transformed = not torch.compiler.is_compiling() and functorch_is_active()
        forward = forward_in_functorch if transformed else FORWARD
        out, lse = forward(q, k, v, *plan.arrays, *options)
    return (out, lse) if return_lse else out


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    pattern: Pattern | Plan,
    *,
    softmax_scale: float | None = None,
    layout: str = "bhtd",
    deterministic: bool = True,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`scfa_core.attention_backward` on torch tensors.

    Under autocast, where `attention` gave a narrow out, q, k, v and dout are narrowed as it did
    with q, k and v, and gradients come in the dtypes of the q, k and v that are given.
    """
    plain = is_plain(q, k, v) and is_plain(dout, out, lse) and holds_plain(pattern)
    plain = plain and _has_storage(dout)
    if not plain:
        one_framework(q, k=k, v=v, dout=dout, out=out, lse=lse)
    options = (softmax_scale, layout, deterministic, backend)
    # a wider out is of float64, or of a forward outside the region
    if not in_autocast(q) or out.dtype != torch.get_autocast_dtype(q.device.type):
        return _backward(plain, dout, q, k, v, out, lse, pattern, *options)
    given = (q, k, v)
    dout, q, k, v = narrowed(dout, q, k, v)
    grads = _backward(plain, dout, q, k, v, out, lse, pattern, *options)
    dq, dk, dv = (grad.to(x.dtype) for grad, x in zip(grads, given, strict=True))
    return dq, dk, dv


def make_plan(
    pattern: Pattern, q: Any, k: Any, *, layout: str = "bhtd", backend: str | None = None
) -> Plan:
    """`scfa_core.make_plan` for torch tensors."""
    if not (is_plain(q, k, k) and holds_plain(pattern)):
        one_framework(q, k=k)
        return traced_plan(q, k, k, pattern, layout, backend)[1]
    call = find_call(q, k, k, None, layout, True, requested_backend(backend))
    return new_plan(pattern, call.problem, call.backend)


def is_plain(q: Any, k: Any, v: Any) -> bool:
    """Whether all three are ordinary tensors and nobody is watching."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        _refuse_tangents(q, k, v)
    return (
        type(q) is torch.Tensor
        and type(k) is torch.Tensor
        and type(v) is torch.Tensor
        and not _dispatch_modes()
        and not functorch_is_active()
        and not _profiler_is_on()
        and _tracing_state() is None
        and not q.is_meta
        and not (q.is_neg() or k.is_neg() or v.is_neg())  # a lazy minus sign is not in memory
        and not (q.is_nested or k.is_nested or v.is_nested)
    )


def holds_plain(pattern: Any) -> bool:
    """Whether what `pattern` holds of tensors are ordinary ones; the door judges what is none."""
    if type(pattern) is Plan:
        return not _is_odd(pattern.q_index)
    if not isinstance(pattern, Pattern):
        return True
    for part in pattern.parts:
        # A derived class may have slots of its own, which hold nothing that attention reads.
        names: tuple[str, ...] = kind_of(part).__slots__
        for name in names:
            if _is_odd(getattr(part, name)):
                return False
    return True


def _is_odd(x: Any) -> bool:
    """Whether `x` is a tensor of a kind that may have no memory of its own."""
    return type(x) is not torch.Tensor and isinstance(x, torch.Tensor)


def check_scale_kind(softmax_scale: Any) -> None:
    """Refuse what an operator would take for a number; numbers are checked where it runs."""
    if torch.compiler.is_compiling() and isinstance(softmax_scale, _TRACED_AS_TENSORS):
        raise ScaleError(
            "softmax_scale must be a number of Python inside of torch.compile, where NumPy's are "
            "arrays: take float(scale) outside (multiply q by a scale that is learned)"
        )
    if isinstance(softmax_scale, (str, bool, torch.Tensor)):
        check_scale(softmax_scale, 1, "float64")


def _refuse_tangents(*tensors: Any) -> None:
    """Forward-mode derivatives would be lost silently: refuse them."""
    for x in tensors:
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            refuse_forward_mode(None)


def in_autocast(x: torch.Tensor) -> bool:
    """Whether a region of torch's autocast is open for the device of `x`."""
    kind = "cuda" if x.is_cuda else x.device.type  # what is on a GPU makes no device to ask
    return kind in _AUTOCAST_KINDS and torch.is_autocast_enabled(kind)


def narrowed(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast to the dtype of the surrounding autocast region; float64 stays, as in torch."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) if x.dtype in _AUTOCAST_TAKES else x for x in tensors)


def _wants_gradient(*tensors: torch.Tensor) -> bool:
    return bool(torch.is_grad_enabled() and _any_requires_grad(*tensors))


def _eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | Plan,
    softmax_scale: float | None,
    layout: str,
    deterministic: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check, plan and run without the dispatcher."""
    requested = requested_backend(backend)
    given = pattern if isinstance(pattern, Plan) else None
    call = find_call(q, k, v, softmax_scale, layout, deterministic, requested, given)
    own: tuple[torch.Tensor, ...] = ()
    if isinstance(pattern, Plan):
        arrays = native_plan(pattern, call)
    else:
        own, arrays = own_plan(pattern, call)
    if not _wants_gradient(q, k, v):
        return run_forward(call, arrays, q, k, v)
    out, lse = ScfaAttention.apply(q, k, v, call, arrays, given, *own)
    return out, lse


def _backward(
    plain: bool,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pattern: Pattern | Plan,
    softmax_scale: float | None,
    layout: str,
    deterministic: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check, plan and differentiate; without the dispatcher where all is plain."""
    if not plain or _wants_gradient(dout, q, k, v):
        check_scale_kind(softmax_scale)
        name, plan = traced_plan(q, k, v, pattern, layout, backend, softmax_scale)
        if q.is_meta:
            check_backward_on_meta(q, v, layout, dout=dout, out=out, lse=lse)
        options = (plan.monotone, softmax_scale, deterministic, layout, name)
        dq, dk, dv = BACKWARD(dout, None, q, k, v, out, lse, *plan.arrays, *options)
        return dq, dk, dv
    given = pattern if isinstance(pattern, Plan) else None
    requested = requested_backend(backend)
    call = find_call(q, k, v, softmax_scale, layout, deterministic, requested, given)
    check_backward(call, dout=dout, out=out, lse=lse)
    if isinstance(pattern, Plan):
        return run_backward(call, native_plan(pattern, call), dout, None, q, k, v, out, lse)
    own, arrays = own_plan(pattern, call)  # held here: addresses alone do not keep its memory
    grads = run_backward(call, arrays, dout, None, q, k, v, out, lse)
    del own
    return grads


class ScfaAttention(torch.autograd.Function):
    """Autograd node of an eager call; traced calls have the operator's own.

    A plan made for this call alone is saved like any activation (checkpointing drops and remakes
    it); a plan given by the caller is only referred to, and must stay as it is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
        arrays: NativePlan,
        given: Plan | None,
        *own: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = run_forward(call, arrays, q, k, v)
        ctx.save_for_backward(q, k, v, out, lse, *own)
        ctx.call, ctx.given, ctx.monotone = call, given, arrays.monotone
        ctx.changes = 0 if given is None else count_changes(given)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, *own = ctx.saved_tensors
        nothing = (None,) * (3 + len(own))
        if dout is None and dlse is None:
            return (None, None, None, *nothing)
        dout = torch.zeros_like(out) if dout is None else dout
        call, given = ctx.call, ctx.given
        if given is not None:
            refuse_changed(given, ctx.changes)
        plain = is_plain(dout, q, out) and is_plain(k, v, lse)
        plain = plain and _has_storage(dout) and (dlse is None or _has_storage(dlse))
        if torch.is_grad_enabled() or not plain:
            check_dense("the gradient of out", dout)
            if dlse is not None:
                check_dense("the gradient of lse", dlse)
            plan = own_plan_tensors(own, call) if given is None else given.arrays
            scale, deterministic = call.problem.softmax_scale, call.problem.deterministic
            layout = "bthd" if call.swap else "bhtd"
            options = (ctx.monotone, scale, deterministic, layout, call.backend.name)
            return (*BACKWARD(dout, dlse, q, k, v, out, lse, *plan, *options), *nothing)
        call, q, k, v = call_of_saved(call, given, q, k, v, out, lse)
        if given is None:
            arrays = native_own_plan(own, ctx.monotone, call)
        else:
            arrays = native_plan(given, call)
        return (*run_backward(call, arrays, dout, dlse, q, k, v, out, lse), *nothing)


def traced_plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | Plan,
    layout: str,
    backend: str | None,
    softmax_scale: float | None = None,
) -> tuple[str, Plan]:
    """Name the backend and make the plan by operators; v is k where only planning is asked for."""
    if hasattr(q, "placements"):  # a DTensor
        import scfa_core.distributed_rules  # noqa: F401  (registers them)
    check_layout(layout)
    if backend is not None:
        check_name(backend)
    if q.is_meta:
        check_on_meta(q, k, v, pattern, softmax_scale, layout)
    facts = (index(q.shape[-1]), index(v.shape[-1]), dtype_name(q.dtype), device_name(q.device))
    if isinstance(pattern, Plan):
        pattern.check_library(TORCH_FRAMEWORK)
        return _name_backend(*facts, backend, pattern.backend), pattern
    name = _name_backend(*facts, backend, None)
    text, tensors, ints = encode(pattern)
    arrays: Seven = MAKE_PLAN(q.detach(), k.detach(), text, tensors, ints, layout, name)
    return name, Plan(*arrays, is_monotone(pattern), name, device_name(q.device))


def _are_head_dims(*sizes: int) -> bool:
    return all(size in HEAD_DIMS for size in sizes)


def _constant_in_graphs(function: _Function) -> _Function:
    """Mark as `torch.compiler.assume_constant_result` does, without its import of all of dynamo.

    That takes more than a second of a first call, compiled or not.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_in_graphs  # reads context, environment
def _name_backend(
    head_dim: int,
    head_dim_v: int,
    dtype: str,
    device: str,
    backend: str | None,
    maker: str | None,
) -> str:
    """Settle the backend by everything but batch, heads and seqlen, which may be symbolic.

    A compiled function keeps the answer of its tracing, so that its plan, its forward and its
    backward (perhaps on another thread) agree.
    """
    requested = requested_backend(backend)
    nominal = Problem(1, 1, 1, 1, 1, head_dim, head_dim_v, dtype, device, 1.0)
    known = device.partition(":")[0] in ("cpu", "cuda")
    if not known or dtype not in FLOAT_DTYPES or not _are_head_dims(head_dim, head_dim_v):
        return AUTO if requested == AUTO else requested  # the dispatcher has its own words
    if maker is None:
        return choose_backend(nominal, requested).name
    nothing: Seven = (None, None, None, None, None, None, None)
    return choose_for_plan(Plan(*nothing, True, maker, device), nominal, requested).name
