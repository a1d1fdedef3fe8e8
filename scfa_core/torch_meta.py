"""Tensors on "meta" have shapes and no values: the door for them, since no backend is ever asked.

A fake implementation of an operator names the shapes of results and checks nothing. That is right
under a compiler, whose program meets the checks when it runs; a call on "meta" never runs.
"""

from __future__ import annotations

import torch

from scfa_core.lowering import lower
from scfa_core.patterns import Pattern
from scfa_core.plan import Plan
from scfa_core.problem import build_problem, check_like
from scfa_core.torch_framework import TORCH_FRAMEWORK
from scfa_core.torch_transforms import functorch_is_active

_ORDINARY = (torch.Tensor, torch.nn.Parameter)


def is_traced(q: torch.Tensor) -> bool:
    """Whether somebody records this call, to run it later, so that values cannot be read."""
    if torch.compiler.is_compiling() or functorch_is_active() or type(q) not in _ORDINARY:
        return True
    return bool(torch._C._len_torch_dispatch_stack()) or torch._C._get_tracing_state() is not None


def check_on_meta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | Plan,
    softmax_scale: float | None,
    layout: str,
) -> None:
    """Raise what a forward of tensors with memory raises; nothing while somebody traces."""
    if is_traced(q):
        return
    infos = [TORCH_FRAMEWORK.info(x) for x in (q, k, v)]
    problem = build_problem(*infos, softmax_scale=softmax_scale, layout=layout)
    if isinstance(pattern, Plan):
        pattern.check_fits(problem, TORCH_FRAMEWORK)
    else:
        lower(pattern, problem, TORCH_FRAMEWORK)


def check_backward_on_meta(
    q: torch.Tensor, v: torch.Tensor, layout: str, **results: torch.Tensor
) -> None:
    """Raise what a backward says of `dout`, `out` and `lse`; nothing while somebody traces."""
    if is_traced(q):
        return
    rows = TORCH_FRAMEWORK.info(q)
    shape = (*rows.shape[:3], v.shape[-1])
    lse_shape = shape[:3] if layout == "bhtd" else (shape[0], shape[2], shape[1])
    for name, x in results.items():
        expected = (lse_shape, "float32") if name == "lse" else (shape, rows.dtype)
        check_like(name, TORCH_FRAMEWORK.info(x), *expected, rows.device)
