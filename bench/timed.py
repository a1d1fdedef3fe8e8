"""What a method gives to be timed, and how it says that it cannot take part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.inputs import Inputs


class CannotRun(Exception):  # noqa: N818 - a reason, not an error
    """A method does not serve this case or this machine; the message is the reason."""


@dataclass
class Timed:
    """What to time. Each callable does the whole work of its mode, ready to be repeated."""

    forward: Callable[[], torch.Tensor]  # from raw inputs to out in the user's order
    backward: Callable[[], tuple[torch.Tensor, ...]] | None = None  # from dout; forward done before
    plan: Callable[[], Any] | None = None
    planned: Callable[[], torch.Tensor] | None = None  # forward with the plan given
    lse: Callable[[], torch.Tensor] | None = None


def autograd(inputs: Inputs, run: Callable[..., torch.Tensor]) -> Timed:
    """Time any differentiable function of q, k, v."""
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = run(*leaves)

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return run(inputs.q, inputs.k, inputs.v)

    return Timed(forward, backward)
