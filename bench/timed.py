"""What a method gives to be timed, and how it says that it cannot take part."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.inputs import Inputs


class CannotRun(Exception):  # noqa: N818 - a reason, not an error
    """A method does not serve this case or this machine; the message is the reason."""


def found(module: str) -> bool:
    """Whether a module can be imported here; a mere folder of its name is none.

    flash-attn's fourth generation alone leaves `flash_attn` such a folder, around its own `cute`.
    """
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return False
    except Exception:  # its package is there and raises whatever it likes; importing says what
        return True
    return spec is not None and spec.origin is not None


@dataclass
class Timed:
    """What to time. Each callable does the whole work of its mode, ready to be repeated."""

    forward: Callable[[], torch.Tensor]  # from raw inputs to out in the user's order
    backward: Callable[[], tuple[torch.Tensor, ...]] | None = None  # from dout; forward done before
    plan: Callable[[], Any] | None = None
    planned: Callable[[], torch.Tensor] | None = None  # forward with the plan given
    lse: Callable[[], torch.Tensor] | None = None
    both: Callable[[], tuple[torch.Tensor, ...]] | None = None  # a training step's: all of it


def autograd(
    inputs: Inputs,
    run: Callable[..., torch.Tensor],
    whole: Callable[..., torch.Tensor] | None = None,
) -> Timed:
    """Time any differentiable function of q, k, v.

    `whole` is `run` with whatever a new pattern needs made first, where that is more.
    """
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    every = run if whole is None else whole
    out = run(*leaves)

    def forward(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return function(inputs.q, inputs.k, inputs.v)

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(every(*leaves), leaves, inputs.dout)

    planned = None if whole is None else (lambda: forward(run))
    return Timed(lambda: forward(every), backward, planned=planned, both=both)
