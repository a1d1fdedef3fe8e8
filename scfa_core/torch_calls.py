"""One checked call on real tensors: the door remembered, results allocated, the backend run.

Checks and facts (strides, shapes, the backend) depend only on what the key of `find_call` holds, so
a training loop pays for them once. Nothing here knows about autograd or tracing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch

from scfa_core import dispatch
from scfa_core.arrays import DeviceArray, HostContext, cuda_ordinal, stride_order, strides_in_order
from scfa_core.dispatch import Backend, choose_backend, choose_for_plan
from scfa_core.errors import DeviceError, DTypeError, LayoutError, ShapeError
from scfa_core.plan import Plan, PlanArrays, plan_shapes
from scfa_core.problem import Problem, build_problem, check_layout, check_like, check_scale
from scfa_core.torch_framework import (
    TORCH_FRAMEWORK,
    TorchContext,
    device_name,
    dtype_name,
    host_view,
    raw_stream,
)

MAX_REMEMBERED_CALLS = 1024
_HOST_CONTEXT = HostContext()
_NEGATIVE_INFINITY = float("-inf")

Shape = tuple[int, ...]
Seven = tuple[Any, Any, Any, Any, Any, Any, Any]  # the arrays of a plan
Facts = tuple[Shape, Shape, str, int]  # a `DeviceArray` but for its pointer, heads first


def heads_first(facts: Shape, swap: bool) -> Shape:
    """Shape or strides of a 4-axis array in (batch, heads, seqlen, dim) order."""
    return (facts[0], facts[2], facts[1], facts[3]) if swap else tuple(facts)


def _facts(shape: Shape, strides: Shape, swap: bool, dtype: str, ordinal: int) -> Facts:
    return heads_first(shape, swap), heads_first(strides, swap), dtype, ordinal


def like_order(x: torch.Tensor, shape: Sequence[int]) -> Shape:
    """Dense strides for `shape` in the stride order of `x`; also for symbolic sizes."""
    return strides_in_order(tuple(shape), stride_order(x.stride()))


class Call(NamedTuple):
    """What is settled before any memory is touched. Shapes and strides as the caller sees them."""

    problem: Problem
    backend: Backend
    host: bool
    swap: bool
    device: torch.device
    ordinal: int
    dtype: torch.dtype
    sizes: tuple[int, int, int, int, int]
    inputs: tuple[Facts, ...]  # of q, k, v
    out: tuple[Shape, Shape]  # shape and strides to allocate
    out_facts: Facts
    lse: Shape
    grads: tuple[tuple[Shape, Shape], ...]
    grad_facts: tuple[Facts, ...]
    plan: tuple[tuple[Shape, Shape], ...]  # shape and strides of each array of a plan

    def facts(self, x: torch.Tensor) -> Facts:
        """Facts of a 4-axis tensor of q's dtype whose strides are the caller's."""
        return _facts(x.shape, x.stride(), self.swap, self.problem.dtype, self.ordinal)

    def native(self, x: torch.Tensor, facts: Facts) -> Any:
        """Hand one 4-axis tensor to the backend."""
        if self.host:
            view = host_view(x)
            return view.swapaxes(1, 2) if self.swap else view
        return DeviceArray(x.data_ptr(), *facts)

    def native_lse(self, x: torch.Tensor) -> Any:
        """Hand lse to the backend."""
        if self.host:
            return host_view(x)
        return DeviceArray(x.data_ptr(), self.lse, x.stride(), "float32", self.ordinal)

    def empty(self, shape_and_strides: tuple[Shape, Shape]) -> torch.Tensor:
        """Allocate a result of q's dtype."""
        return torch.empty_strided(*shape_and_strides, dtype=self.dtype, device=self.device)

    def run(self, verb: Any, *arguments: Any) -> None:
        """Call `verb` of the backend on the caller's stream, with the arrays' device current."""
        if self.host:
            verb(self.problem, *arguments, _HOST_CONTEXT)
        elif self.ordinal == torch.cuda.current_device():
            context = TorchContext(self.device, self.ordinal, raw_stream(self.ordinal))
            verb(self.problem, *arguments, context)
        else:
            with torch.cuda.device(self.ordinal):
                context = TorchContext(self.device, self.ordinal, raw_stream(self.ordinal))
                verb(self.problem, *arguments, context)


_calls: dict[tuple[Any, ...], Call] = {}
_plans: WeakKeyDictionary[Plan, tuple[Any, PlanArrays]] = WeakKeyDictionary()


def find_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None,
    layout: str,
    deterministic: bool,
    requested: str,
    plan: Plan | None = None,
) -> Call:
    """Check a call and choose its backend, or remember having done so."""
    if softmax_scale is not None and type(softmax_scale) is not float:
        softmax_scale = check_scale(softmax_scale, 1, dtype_name(q.dtype))
    maker = None if plan is None else plan.backend
    key = (
        *(q.shape, k.shape, v.shape),
        *(q.stride(), k.stride(), v.stride()),
        *(q.dtype, k.dtype, v.dtype),
        *(q.device, k.device, v.device),
        *(softmax_scale, layout, deterministic, requested, maker),
    )
    call = _calls.get(key)
    if call is not None and dispatch.load_backend(call.backend.name) is call.backend:
        return call
    call = _new_call(q, k, v, softmax_scale, layout, deterministic, requested, plan)
    if len(_calls) >= MAX_REMEMBERED_CALLS:
        _calls.clear()
    _calls[key] = call
    return call


def _new_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None,
    layout: str,
    deterministic: bool,
    requested: str,
    plan: Plan | None,
) -> Call:
    """Every check at the door, then the facts."""
    info = TORCH_FRAMEWORK.info
    problem = build_problem(
        *(info(q), info(k), info(v)),
        layout=layout,
        softmax_scale=softmax_scale,
        deterministic=deterministic,
    )
    if plan is None:
        backend = choose_backend(problem, requested)
    else:
        plan.check_fits(problem, TORCH_FRAMEWORK)
        backend = choose_for_plan(plan, problem, requested)
    swap = check_layout(layout)
    ordinal = cuda_ordinal(problem.device)

    def facts(shape: Shape, strides: Shape) -> Facts:
        return _facts(shape, strides, swap, problem.dtype, ordinal)

    out_shape = (*q.shape[:3], problem.head_dim_v)
    out = (out_shape, like_order(q, out_shape))
    grads = tuple((tuple(x.shape), like_order(x, x.shape)) for x in (q, k, v))
    return Call(
        problem=problem,
        backend=backend,
        host=backend.memory == "host",
        swap=swap,
        device=q.device,
        ordinal=ordinal,
        dtype=q.dtype,
        sizes=(
            problem.batch,
            problem.heads,
            problem.heads_kv,
            problem.seqlen_q,
            problem.seqlen_k,
        ),
        inputs=tuple(facts(x.shape, x.stride()) for x in (q, k, v)),
        out=out,
        out_facts=facts(*out),
        lse=(problem.batch, problem.heads, problem.seqlen_q),
        grads=grads,
        grad_facts=tuple(facts(*x) for x in grads),
        plan=tuple(
            (shape, strides_in_order(shape, tuple(range(len(shape)))))
            for shape in plan_shapes(problem, backend.memory)
        ),
    )


def native_plan(plan: Plan, call: Call) -> PlanArrays:
    """Hand a plan to the call's backend; remembered as long as the plan lives."""
    use = (call.sizes, call.device, call.host)
    known = _plans.get(plan)
    if known is not None and known[0] == use:
        return known[1]
    plan.check_fits(call.problem, TORCH_FRAMEWORK)
    arrays = checked_plan_arrays(plan.arrays, plan.monotone, call)
    _plans[plan] = (use, arrays)
    return arrays


def checked_plan_arrays(tensors: Sequence[torch.Tensor], monotone: bool, call: Call) -> PlanArrays:
    """Hand plan tensors to the call's backend after checking that no index can miss its array."""
    for x, (shape, _) in zip(tensors, call.plan, strict=True):
        if (
            x.shape != shape
            or x.dtype is not torch.int32
            or x.device != call.device
            or not x.is_contiguous()
        ):
            _refuse_plan(tensors, call)
    native: list[Any]
    if call.host:
        native = [host_view(x) for x in tensors]
    else:
        native = [
            DeviceArray(x.data_ptr(), *facts, "int32", call.ordinal)
            for x, facts in zip(tensors, call.plan, strict=True)
        ]
    return PlanArrays(*cast(Seven, tuple(native)), monotone)


def _refuse_plan(tensors: Sequence[torch.Tensor], call: Call) -> None:
    """Say what is wrong with a plan's tensors."""
    for name, x, (shape, _) in zip(PlanArrays._fields, tensors, call.plan, strict=False):
        if x.shape != shape:
            raise ShapeError(
                f"the plan does not fit: {name} must have shape {shape}, got {tuple(x.shape)}; "
                "make a plan for these sizes and this backend"
            )
        if x.dtype is not torch.int32:
            raise DTypeError(f"plan.{name} must be int32, got {dtype_name(x.dtype)}")
        if x.device != call.device:
            raise DeviceError(
                f"the plan lives on {device_name(x.device)}, q on {call.problem.device}; "
                "make a plan there"
            )
        if not x.is_contiguous():
            raise LayoutError(f"plan.{name} must be contiguous, got strides {x.stride()}")


def run_forward(
    call: Call, plan: PlanArrays, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out, in q's layout and stride order, and lse."""
    out = call.empty(call.out)
    lse = torch.empty(call.lse, dtype=torch.float32, device=call.device)
    if call.problem.is_empty:
        return out, lse
    if call.problem.seqlen_k == 0:
        return out.zero_(), lse.fill_(_NEGATIVE_INFINITY)
    native = call.native
    facts_q, facts_k, facts_v = call.inputs
    call.run(
        call.backend.forward,
        plan,
        native(q, facts_q),
        native(k, facts_k),
        native(v, facts_v),
        native(out, call.out_facts),
        call.native_lse(lse),
    )
    return out, lse


def check_backward(call: Call, **tensors: torch.Tensor) -> None:
    """Refuse out, dout or lse that do not fit the call."""
    for name, x in tensors.items():
        if name.endswith("lse"):
            shape, dtype = call.lse, "float32"
        else:
            shape, dtype = call.out[0], call.problem.dtype
        check_like(name, TORCH_FRAMEWORK.info(x), shape, dtype, call.problem.device)


def run_backward(
    call: Call,
    plan: PlanArrays,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk, dv in the stride orders of q, k, v."""
    dq, dk, dv = (call.empty(x) for x in call.grads)
    if call.problem.is_empty or call.problem.seqlen_k == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    native = call.native
    dout, out = dense_rows(dout), dense_rows(out)
    facts_q, facts_k, facts_v = call.inputs
    call.run(
        call.backend.backward,
        plan,
        native(dout, call.facts(dout)),
        native(q, facts_q),
        native(k, facts_k),
        native(v, facts_v),
        native(out, call.facts(out)),
        call.native_lse(lse),
        native(dq, call.grad_facts[0]),
        native(dk, call.grad_facts[1]),
        native(dv, call.grad_facts[2]),
    )
    if dlse is not None:
        dq_lse, dk_lse = _backward_of_lse(call, plan, dlse, q, k, lse)
        dq += dq_lse
        dk += dk_lse
    return dq, dk, dv


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """Copy what is broadcast (``sum().backward()`` gives that) or strided in its last axis."""
    strides = x.stride()
    return x.contiguous() if strides[-1] != 1 or 0 in strides else x


def _backward_of_lse(
    call: Call,
    plan: PlanArrays,
    dlse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients that reach q and k through lse, by verbs that every backend has.

    d lse / dS = P, so dq = scale * dlse * (P @ k), the forward with v = k, and
    dk = scale * P.T @ (dlse * q), the dv of the backward with dout = dlse * q.
    """
    problem = call.problem
    dlse = torch.where(torch.isneginf(lse), 0.0, dlse) * problem.softmax_scale
    dlse = (dlse.transpose(1, 2) if call.swap else dlse).unsqueeze(-1)
    layout = "bthd" if call.swap else "bhtd"
    options = (problem.softmax_scale, layout, problem.deterministic, call.backend.name)
    keys_as_values = find_call(q, k, k, *options)
    mean_key, _ = run_forward(keys_as_values, plan, q, k, k)
    weighted = (dlse * q).to(call.dtype)
    _, _, dk = run_backward(keys_as_values, plan, weighted, None, q, k, k, mean_key, lse)
    return (dlse * mean_key).to(call.dtype), dk
