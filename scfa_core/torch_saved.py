"""What a backward pass finds again: plans may be changed, hooks may have moved what was saved."""

from __future__ import annotations

import torch

from scfa_core.errors import GradientError, ShapeError
from scfa_core.plan import Plan
from scfa_core.torch_calls import Call, check_backward, find_call, look_at

__all__ = ["call_of_saved", "count_changes", "refuse_changed"]


def call_of_saved(
    call: Call,
    plan: Plan | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[Call, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`call` for q, k, v as they come back; hooks on saved tensors may have laid them out anew.

    `torch.autograd.graph.save_on_cpu` does so with everything that was not contiguous.
    """
    check_backward(call, out=out, lse=lse)
    seen = look_at(q, k, v)
    if seen == call.seen:
        return call, q, k, v
    if seen[:-3] != call.seen[:-3]:
        told = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (q, k, v))
        raise ShapeError(
            "hooks on saved tensors must give q, k and v back in their shapes, dtypes and on their "
            f"device, got {told} for {call.problem}"
        )
    q, k, v = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
    scale, deterministic = call.problem.softmax_scale, call.problem.deterministic
    layout = "bthd" if call.swap else "bhtd"
    return find_call(q, k, v, scale, layout, deterministic, call.backend.name, plan), q, k, v


def count_changes(plan: Plan) -> int:
    """How often torch has changed the arrays of a plan in place: any such change raises it.

    Kernels write through addresses and so uncounted. 0.35 us; only gradients need it.
    """
    try:
        return (
            plan.q_index._version
            + plan.q_count._version
            + plan.k_index._version
            + plan.k_count._version
            + plan.key_start._version
            + plan.key_end._version
        )
    except RuntimeError:  # tensors of `torch.inference_mode` are not counted
        return 0


def refuse_changed(plan: Plan, changes: int) -> None:
    """Raise if a plan was changed since `count_changes` gave `changes`."""
    if count_changes(plan) != changes:
        raise GradientError(
            "the plan was changed in place after the forward pass that now needs its gradient; "
            "keep it until backward has run, or make another plan with make_plan"
        )
