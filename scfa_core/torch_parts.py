"""Results in parts made into one on a GPU: kernels of one pass where they serve, else None.

What they compute is what plain torch would, in `torch_union_ops` and `sinks`: shares, sums and
products in float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from scfa_core.arrays import stride_order, strides_in_order
from scfa_core.dispatch import load_backend
from scfa_core.torch_framework import TORCH_FRAMEWORK, dtype_name, raw_stream

_MOST_HELD = 4  # narrow gradients at once, if that is all: as much memory as a float32 sum and two


def kernel_reason(x: Tensor) -> str | None:
    """None if kernels read rows of `x` and tensors like it, otherwise why plain torch does."""
    if not x.is_cuda:
        return f"it is on {x.device}"
    backend = load_backend("cupy")
    if isinstance(backend, str):
        return backend
    from scfa_core.backends.cupy_raw.parts import reason_against

    return reason_against(dtype_name(x.dtype), x.shape[-1], x.device.index)


def _in_memory(*tensors: Tensor) -> bool:
    """Whether values lie where a tensor says: it is no batch, no pair, and has no lazy minus sign.

    Gradients may be such where q, k and v are none: `is_grads_batched`, a subclass of Tensor.
    """
    return all(
        type(x) in (Tensor, Parameter) and torch._C._has_storage(x) and not x.is_neg()
        for x in tensors
    )


def _native(*tensors: Tensor) -> list[Any]:
    return [TORCH_FRAMEWORK.native(x.detach(), "cuda") for x in tensors]


def _by_heads(x: Tensor, swap: bool) -> Tensor:
    return x.transpose(1, 2) if swap else x


def merge_by_kernel(
    outs: Sequence[Tensor], lses: Sequence[Tensor], swap: bool, sinks: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Out, in the memory of ``outs[0]``, and lse."""
    first = outs[0]
    given = () if sinks is None else (sinks,)
    if not _in_memory(*outs, *lses, *given) or kernel_reason(first) is not None:
        return None
    if any(x.stride() != first.stride() for x in outs):
        return None
    if any(x.shape != lses[0].shape[1:2] for x in given):
        return None  # plain torch says so
    from scfa_core.backends.cupy_raw.parts import MOST_PARTS, run_merge

    if len(outs) > MOST_PARTS or first.stride(-1) != 1:
        return None
    lses = [x.float().contiguous() for x in lses]
    lse = torch.empty_like(lses[0])
    own = None if sinks is None else sinks.detach().float().contiguous()
    rows = _native(*(_by_heads(x, swap) for x in outs))
    logits = None if own is None else _native(own)[0]
    stream = raw_stream(first.device.index)
    run_merge(rows, _native(*lses), logits, rows[0], _native(lse)[0], stream)
    return first, lse


def _is_dense(x: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, each once."""
    return x.stride() == strides_in_order(tuple(x.shape), stride_order(x.stride()))


def adds_by_kernel(gradients: tuple[Tensor, ...]) -> bool:
    """Whether `add_by_kernel` adds such gradients."""
    return _in_memory(*gradients) and all(
        _is_dense(x) and kernel_reason(x) is None for x in gradients
    )


def add_by_kernel(
    held: list[tuple[Tensor, ...]], others: Iterator[tuple[Tensor, ...]], parts: int
) -> tuple[Tensor, ...]:
    """Sum of what `held` and `others` have, `parts` in all, in the memory of some of them.

    A few are added at once, and `held` is emptied; between such launches sums are float32.
    """
    narrow = held[0][0].dtype != torch.float32
    most = _MOST_HELD if narrow and parts <= _MOST_HELD else 2
    sums: list[Tensor] = []
    for count in range(len(held) + 1, parts + 1):
        held.append(next(others))
        if len(held) == most or count == parts:
            columns = list(zip(*held, strict=True))
            held.clear()
            before = sums or [None] * len(columns)
            sums = [
                _add(column, own, count == parts)
                for column, own in zip(columns, before, strict=True)
            ]
            del columns
    return tuple(sums)


def _add(parts: Sequence[Tensor], before: Tensor | None, last: bool) -> Tensor:
    from scfa_core.backends.cupy_raw.parts import run_add

    out = parts[0] if last else before
    if out is None:
        wide = parts[0].dtype == torch.float32
        out = parts[0] if wide else torch.empty_like(parts[0], dtype=torch.float32)
    native, held = _native(*parts, out), None if before is None else _native(before)[0]
    run_add(native[:-1], held, native[-1], raw_stream(out.device.index))
    return out


def sinks_gradient_by_kernel(
    dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor, swap: bool
) -> Tensor | None:
    """What `sinks.sinks_backward` gives."""
    if not _in_memory(dout, out, lse, sinks) or dout.dtype != out.dtype:
        return None
    if kernel_reason(out) is not None:
        return None
    from scfa_core.backends.cupy_raw.parts import GRADIENT_ROUNDS, run_sinks_gradient, tiles_of

    rows = [_by_heads(x if x.stride(-1) == 1 else x.contiguous(), swap) for x in (dout, out)]
    batch, heads, seqlen, head_dim = rows[1].shape
    tiles = tiles_of(seqlen, head_dim, GRADIENT_ROUNDS)
    partial = torch.empty((batch, heads, tiles), dtype=torch.float32, device=out.device)
    floats = lse.float().contiguous(), sinks.detach().float().contiguous(), partial
    given, made, logs, logits, sums = _native(*rows, *floats)
    run_sinks_gradient(given, made, logs, logits, sums, raw_stream(out.device.index))
    return partial.sum((0, 2)).to(sinks.dtype)
