"""`torch.func` transforms (grad, vjp, vmap and their nesting) around the operators.

Functorch refuses the autograd formulas that operators register, and takes autograd functions with a
separate `setup_context` and a `vmap` rule instead: these two.
"""

from __future__ import annotations

from typing import Any

import torch

from scfa_core.torch_ops import (
    BACKWARD,
    FORWARD,
    Tensors,
    batched,
    differentiate,
    refuse_double_backward,
    refuse_forward_mode,
    save_for_backward,
)

functorch_is_active = torch._C._are_functorch_transforms_active


class _Backward(torch.autograd.Function):
    """``scfa::backward`` under functorch, which always records it; differentiating it raises."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return BACKWARD(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Nothing is kept: there is no second derivative."""

    backward = staticmethod(refuse_double_backward)
    jvp = staticmethod(refuse_forward_mode)
    vmap = staticmethod(batched(lambda *arguments: _Backward.apply(*arguments)))


class _Forward(torch.autograd.Function):
    """``scfa::forward`` under functorch."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return FORWARD(*arguments)

    setup_context = staticmethod(save_for_backward)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> tuple[torch.Tensor | None, ...]:
        return differentiate(ctx, dout, dlse, _Backward.apply)

    jvp = staticmethod(refuse_forward_mode)
    vmap = staticmethod(batched(lambda *arguments: _Forward.apply(*arguments)))


forward_in_functorch = _Forward.apply
