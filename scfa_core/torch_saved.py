"""Tensors as they come back to a backward pass: hooks may have moved them to the host and back."""

from __future__ import annotations

import torch

from scfa_core.errors import ShapeError
from scfa_core.plan import Plan
from scfa_core.torch_calls import Call, check_backward, find_call, look_at

__all__ = ["call_of_saved"]


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
