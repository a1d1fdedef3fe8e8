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
from scfa_core.arrays import HostContext, cuda_ordinal, stride_order, strides_in_order
from scfa_core.dispatch import Backend, Bound, choose_backend, choose_for_plan
from scfa_core.errors import DeviceError, DTypeError, LayoutError, ShapeError
from scfa_core.plan import Plan, PlanAddresses, PlanArrays
from scfa_core.problem import (
    Problem,
    build_problem,
    check_layout,
    check_like,
    check_scale,
    one_framework,
)
from scfa_core.torch_bound import Facts, Shape, bind_attention
from scfa_core.torch_framework import (
    TORCH_FRAMEWORK,
    TorchContext,
    current_device,
    device_name,
    dtype_name,
    empty_cpu,
    empty_cuda,
    host_view,
    raw_stream,
)
from scfa_core.torch_storage import PlanStorage, plan_storage

MAX_REMEMBERED_CALLS = 1024
MAX_BOUND_VERBS = 64  # of one call; dout comes in few stride orders
_HOST_CONTEXT = HostContext()
_NEGATIVE_INFINITY = float("-inf")
_FLOAT16_BITS = 15  # 2**15 is the largest power of 2 in float16
_FORWARD = ()  # its key among a call's bound verbs; that of a backward has strides

Seven = tuple[Any, Any, Any, Any, Any, Any, Any]  # the arrays of a plan
Empty = tuple[Shape, Shape, torch.dtype]  # shape and strides of what is to be allocated
NativePlan = PlanArrays | PlanAddresses  # on the host, on a GPU


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
    nothing: bool  # no query row, or no key
    seen: tuple[Any, ...]  # of q, k, v, by `look_at`
    plan_use: tuple[Any, ...]  # what a plan has to fit: sizes, device, kind of memory
    inputs: tuple[Facts, ...]  # of q, k, v
    out: Empty  # in the stride order of q
    out_facts: Facts
    lse: Empty
    grads: tuple[Empty, ...]
    grad_facts: tuple[Facts, ...]
    storage: PlanStorage
    bound: dict[Any, Bound]  # verbs of a GPU backend, bound when first called

    def facts(self, x: torch.Tensor) -> Facts:
        """Facts of a 4-axis tensor of q's dtype whose strides are the caller's."""
        return _facts(x.shape, x.stride(), self.swap, self.problem.dtype, self.ordinal)

    def host_views(self, *tensors: torch.Tensor) -> list[Any]:
        """Hand tensors to a backend on the host; those of 4 axes heads first."""
        views = [host_view(x) for x in tensors]
        return [x.swapaxes(1, 2) if self.swap and x.ndim == 4 else x for x in views]

    def bind(self, key: Any, verb: str, *arrays: Facts) -> Bound:
        """Bind a verb of the backend to these arrays, and remember it under `key`."""
        if len(self.bound) >= MAX_BOUND_VERBS:
            self.bound.clear()
        bound = bind_attention(verb, self.backend, self.problem, self.storage.facts, arrays)
        self.bound[key] = bound
        return bound


def look_at(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Any, ...]:
    """Shapes, dtypes and devices, then strides."""
    return (
        *(q.shape, k.shape, v.shape),
        *(q.dtype, k.dtype, v.dtype),
        *(q.device, k.device, v.device),
        *(q.stride(), k.stride(), v.stride()),
    )


_calls: dict[tuple[Any, ...], Call] = {}
_plans: WeakKeyDictionary[Plan, tuple[Any, NativePlan]] = WeakKeyDictionary()


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
    if type(layout) is not str:
        check_layout(layout)
    if softmax_scale is not None and type(softmax_scale) is not float:
        softmax_scale = check_scale(softmax_scale, 1, dtype_name(q.dtype))
    maker = None if plan is None else plan.backend
    try:
        key = (*look_at(q, k, v), softmax_scale, layout, deterministic, requested, maker)
    except RuntimeError:  # some sparse tensors have no strides
        one_framework(q, k=k, v=v)
        raise
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

    host = backend.memory == "host"
    sizes = (
        *(problem.batch, problem.heads, problem.heads_kv),
        *(problem.seqlen_q, problem.seqlen_k),
    )
    lse_shape = (problem.batch, problem.heads, problem.seqlen_q)
    out_shape = (*q.shape[:3], problem.head_dim_v)
    out = (out_shape, like_order(q, out_shape))
    grads = tuple((tuple(x.shape), like_order(x, x.shape)) for x in (q, k, v))
    return Call(
        problem=problem,
        backend=backend,
        host=host,
        swap=swap,
        device=q.device,
        ordinal=ordinal,
        dtype=q.dtype,
        nothing=problem.is_empty or problem.seqlen_k == 0,
        seen=look_at(q, k, v),
        plan_use=(sizes, q.device, host),
        inputs=tuple(facts(x.shape, x.stride()) for x in (q, k, v)),
        out=(*out, q.dtype),
        out_facts=facts(*out),
        lse=(lse_shape, strides_in_order(lse_shape, (0, 1, 2)), torch.float32),
        grads=tuple((*x, q.dtype) for x in grads),
        grad_facts=tuple(facts(*x) for x in grads),
        storage=plan_storage(problem, backend.memory),
        bound={},
    )


def native_plan(plan: Plan, call: Call) -> NativePlan:
    """Hand a plan to the call's backend; remembered while the plan lives and its memory stays."""
    try:
        use = (call.plan_use, *[x.data_ptr() for x in plan.arrays])
    except AttributeError:  # no tensors: a remembered call has not looked at this plan
        plan.check_library(TORCH_FRAMEWORK)
        raise
    known = _plans.get(plan)
    if known is not None and known[0] == use:
        return known[1]
    plan.check_fits(call.problem, TORCH_FRAMEWORK)
    arrays = checked_plan_arrays(plan.arrays, plan.monotone, call)
    _plans[plan] = (use, arrays)
    return arrays


def checked_plan_arrays(tensors: Sequence[torch.Tensor], monotone: bool, call: Call) -> NativePlan:
    """Hand plan tensors to the call's backend after checking that no index can miss its array."""
    for x, (shape, _) in zip(tensors, call.storage.facts, strict=True):
        if (
            x.shape != shape
            or x.dtype is not torch.int32
            or x.device != call.device
            or not x.is_contiguous()
        ):
            _refuse_plan(tensors, call)
    if call.host:
        return PlanArrays.of([host_view(x) for x in tensors], monotone)
    return PlanAddresses.of([x.data_ptr() for x in tensors], monotone)


def _refuse_plan(tensors: Sequence[torch.Tensor], call: Call) -> None:
    """Say what is wrong with a plan's tensors."""
    for name, x, (shape, _) in zip(PlanArrays._fields, tensors, call.storage.facts, strict=False):
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
    call: Call, plan: NativePlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out, in q's layout and stride order, and lse."""
    if call.host:
        out, lse = empty_cpu(*call.out), empty_cpu(*call.lse)
    elif call.ordinal != current_device():
        with torch.cuda.device(call.ordinal):
            return run_forward(call, plan, q, k, v)
    else:
        out, lse = empty_cuda(*call.out), empty_cuda(*call.lse)
    if call.nothing:
        return out.zero_(), lse.fill_(_NEGATIVE_INFINITY)
    if call.host:
        run: Any = call.backend.forward
        run(call.problem, plan, *call.host_views(q, k, v, out, lse), _HOST_CONTEXT)
        return out, lse
    bound = call.bound.get(_FORWARD)
    if bound is None:
        lse_facts = (*call.lse[:2], "float32", call.ordinal)
        bound = call.bind(_FORWARD, "forward", *call.inputs, call.out_facts, lse_facts)
    bound(
        cast(PlanAddresses, plan),
        (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr()),
        TorchContext(call.ordinal, raw_stream(call.ordinal)),
    )
    return out, lse


def check_backward(call: Call, **tensors: torch.Tensor) -> None:
    """Refuse out, dout or lse that do not fit the call."""
    for name, x in tensors.items():
        if name.endswith("lse"):
            shape, dtype = call.lse[0], torch.float32
        else:
            shape, dtype = call.out[0], call.dtype
        fits = x.shape == shape and x.dtype is dtype and x.device == call.device
        if not fits or x.layout is not torch.strided:
            info = TORCH_FRAMEWORK.info(x)
            check_like(name, info, shape, dtype_name(dtype), call.problem.device)


def run_backward(
    call: Call,
    plan: NativePlan,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk, dv in the stride orders of q, k, v."""
    if call.host:
        dq, dk, dv = [empty_cpu(*x) for x in call.grads]
    elif call.ordinal != current_device():
        with torch.cuda.device(call.ordinal):
            return run_backward(call, plan, dout, dlse, q, k, v, out, lse)
    else:
        dq, dk, dv = [empty_cuda(*x) for x in call.grads]
    if call.nothing:
        return dq.zero_(), dk.zero_(), dv.zero_()
    dout, out = dense_rows(dout), dense_rows(out)
    arrays = (dout, q, k, v, out, lse, dq, dk, dv)
    if call.host:
        run: Any = call.backend.backward
        run(call.problem, plan, *call.host_views(*arrays), _HOST_CONTEXT)
    else:
        bound = _bound_backward(call, dout, out, lse)
        addresses = tuple([x.data_ptr() for x in arrays])
        context = TorchContext(call.ordinal, raw_stream(call.ordinal))
        bound(cast(PlanAddresses, plan), addresses, context)
    if dlse is not None:
        dq_lse, dk_lse = _backward_of_lse(call, plan, dlse, q, k, lse)
        dq += dq_lse
        dk += dk_lse
    return dq, dk, dv


def _bound_backward(call: Call, dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Bound:
    """Bind the backward to the strides of what the call did not allocate, or remember it."""
    key = (dout.stride(), out.stride(), lse.stride())
    bound = call.bound.get(key)
    if bound is not None:
        return bound
    lse_facts = (call.lse[0], lse.stride(), "float32", call.ordinal)
    given = (call.facts(dout), *call.inputs, call.facts(out), lse_facts)
    return call.bind(key, "backward", *given, *call.grad_facts)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """Copy what is broadcast (``sum().backward()`` gives that) or strided in its last axis."""
    strides = x.stride()
    return x.contiguous() if strides[-1] != 1 or 0 in strides else x


def _backward_of_lse(
    call: Call,
    plan: NativePlan,
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
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    dlse = torch.where(torch.isneginf(lse), 0.0, dlse).to(wide) * problem.softmax_scale
    dlse = (dlse.transpose(1, 2) if call.swap else dlse).unsqueeze(-1)
    layout = "bthd" if call.swap else "bhtd"
    options = (problem.softmax_scale, layout, problem.deterministic, call.backend.name)
    keys_as_values = find_call(q, k, k, *options)
    mean_key, _ = run_forward(keys_as_values, plan, q, k, k)
    weighted, raised = dlse * q, None
    if call.dtype == torch.float16:
        raised = _room_in_float16(weighted, problem.seqlen_q * problem.heads // problem.heads_kv)
        weighted = torch.ldexp(weighted, -raised)
    dout = weighted.to(call.dtype)
    _, _, dk = run_backward(keys_as_values, plan, dout, None, q, k, k, mean_key, lse)
    if raised is not None:
        dk = torch.ldexp(dk.float(), raised).to(call.dtype)
    return (dlse * mean_key).to(call.dtype), dk


def _room_in_float16(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Powers of 2, one for each sequence: x over them has sums of so many rows in range.

    The gradient of a key is a mean of rows that may be a thousand times larger. What is not finite
    has no say: it spoils its own rows, not others'.
    """
    size = torch.where(x.isfinite(), x.abs(), 0.0).amax(dim=(1, 2, 3), keepdim=True)
    raised = torch.frexp(size).exponent + rows.bit_length() - _FLOAT16_BITS
    return raised.clamp(-100, 100)  # exponents that float32 has, whichever their sign
