"""torch's own attention, computed here: `scaled_dot_product_attention` with ``is_causal=True``.

torch keeps a registry of implementations of its flash attention; `register` enters this package
there. Only dense causal attention fits its operators: they know of no other pattern. What does not
fit (a mask, dropout, no causality) goes on to torch's own kernel, with a warning in the log.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from scfa_core.extras import missing

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise missing("scfa_core.torch_flash", "torch", error) from error

from scfa_core.api import attention, attention_backward
from scfa_core.arrays import strides_in_order
from scfa_core.dispatch import choose_backend, requested_backend
from scfa_core.errors import OptionError, ScfaError
from scfa_core.patterns import Causal
from scfa_core.problem import build_problem
from scfa_core.torch_framework import TORCH_FRAMEWORK

__all__ = ["register"]

logger = logging.getLogger("scfa_core")

_ROWS_OUTSIDE_HEADS = (0, 2, 1, 3)  # axes from outermost in memory to innermost


def register(name: str = "scfa") -> None:
    """Enter this package into torch's registry of flash attention implementations.

    >>> from torch.nn.attention import activate_flash_attention_impl
    >>> register()
    >>> activate_flash_attention_impl("scfa")

    Parameters
    ----------
    name : str
        What `activate_flash_attention_impl` will know it by. Nothing changes before that call;
        from then on it holds for the whole process, until `restore_flash_attention_impl`.

    Raises
    ------
    ScfaError
        This torch has no such registry; 2.13 has.
    OptionError
        A name that is none.
    """
    if not isinstance(name, str) or not name:
        raise OptionError(f"name must be a word, got {name!r}")
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError as error:
        raise ScfaError(
            f"torch {torch.__version__} has no registry of flash attention implementations; "
            "install torch 2.13 or newer, or call scfa_core.attention"
        ) from error
    register_flash_attention_impl(name, register_fn=_activate)


class _Handle:
    """Holds the overrides; torch drops it to restore its own kernels."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def remove(self) -> None:
        """Take the overrides back."""
        self._library = None


def _activate() -> _Handle:
    """Override torch's operators, those of the CPU and those of CUDA."""
    library = torch.library.Library("aten", "IMPL")
    for make, operator, key in (
        (_cpu_forward, "_scaled_dot_product_flash_attention_for_cpu", "CPU"),
        (_cpu_backward, "_scaled_dot_product_flash_attention_for_cpu_backward", "CPU"),
        (_cuda_forward, "_scaled_dot_product_flash_attention", "CUDA"),
        (_cuda_backward, "_scaled_dot_product_flash_attention_backward", "CUDA"),
    ):
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", key):
            own = torch.library.get_kernel(f"aten::{operator}", key)
            with warnings.catch_warnings():  # torch warns of what is done here on purpose
                warnings.filterwarnings("ignore", "Warning only once for all operators")
                library.impl(operator, make(own), key, with_keyset=True)
    return _Handle(library)


def _misfit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> str | None:
    """Why torch's kernel must serve this call, or None; the same forward and backward."""
    if not is_causal or attn_mask is not None:
        return "only is_causal=True without a mask is served"
    if dropout_p != 0.0:
        return "dropout is not served"
    if q.shape[2] != k.shape[2]:
        return "queries and keys of unequal number are not served"
    if q.shape[3] != v.shape[3]:
        return "a head_dim of values other than that of queries is not served"
    if q.dtype is torch.float64:
        return "float64 is not served"  # torch's lse is then float64, ours float32
    try:
        problem = build_problem(
            *(TORCH_FRAMEWORK.info(x) for x in (q, k, v)), layout="bhtd", softmax_scale=scale
        )
        choose_backend(problem, requested_backend())
    except ScfaError as error:
        return str(error)
    return None


@cache
def _say_once(reason: str) -> None:
    logger.warning("scaled_dot_product_attention goes on to torch's own kernel: %s", reason)


def _with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`x`, or a copy in other strides: compiled code counts on those that torch's kernel gives."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _rows_outside_heads(x: Tensor) -> Tensor:
    """Give `x` the memory order (batch, seqlen, heads, ...), as torch's CPU kernel does."""
    return _with_strides(x, strides_in_order(tuple(x.shape), _ROWS_OUTSIDE_HEADS[: x.ndim]))


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    # Below autograd tensors still say that they require gradients; torch's own formula has them.
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = attention(q, k, v, Causal(), softmax_scale=scale, return_lse=True)
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out, lse = (x.detach() for x in (dout, q, k, v, out, lse.contiguous()))
    return attention_backward(dout, q, k, v, out, lse, Causal(), softmax_scale=scale)


def _cpu_forward(own: Any) -> Callable[..., Any]:
    def forward(
        keys: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        reason = _misfit(q, k, v, dropout_p, is_causal, attn_mask, scale)
        if reason is not None:
            _say_once(reason)
            options = {"attn_mask": attn_mask, "scale": scale}
            return own.call_boxed(keys, q, k, v, dropout_p, is_causal, **options)
        out, lse = _forward(q, k, v, scale)
        return out, _rows_outside_heads(lse)

    return forward


def _cpu_backward(own: Any) -> Callable[..., Any]:
    def backward(
        keys: Any,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        if _misfit(q, k, v, dropout_p, is_causal, attn_mask, scale) is not None:
            options = {"attn_mask": attn_mask, "scale": scale}
            return own.call_boxed(keys, dout, q, k, v, out, lse, dropout_p, is_causal, **options)
        grads = _backward(dout, q, k, v, out, lse, scale)
        return tuple(_rows_outside_heads(x) for x in grads)

    return backward


def _cuda_forward(own: Any) -> Callable[..., Any]:
    def forward(
        keys: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> Any:
        reason = _misfit(q, k, v, dropout_p, is_causal, None, scale)
        if reason is None and return_debug_mask:
            reason = "the debug mask is not served"
        if reason is not None:
            _say_once(reason)
            return own.call_boxed(
                keys, q, k, v, dropout_p, is_causal, return_debug_mask, scale=scale
            )
        out, lse = _forward(q, k, v, scale)
        seed = q.new_empty((2,), dtype=torch.uint64)  # of dropout: never read
        offset = q.new_empty((), dtype=torch.uint64)
        return out, lse, None, None, q.shape[2], k.shape[2], seed, offset, q.new_empty(0)

    return forward


def _cuda_backward(own: Any) -> Callable[..., Any]:
    def backward(
        keys: Any,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        seed: Tensor,
        offset: Tensor,
        *,
        scale: float | None = None,
    ) -> Any:
        # A debug mask changes neither out nor lse, so its gradient may be computed here.
        if _misfit(q, k, v, dropout_p, is_causal, None, scale) is None:
            return _backward(dout, q, k, v, out, lse, scale)
        sizes = (cum_seq_q, cum_seq_k, max_q, max_k)
        options = (dropout_p, is_causal, seed, offset)
        return own.call_boxed(keys, dout, q, k, v, out, lse, *sizes, *options, scale=scale)

    return backward
