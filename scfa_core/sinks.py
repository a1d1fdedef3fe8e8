"""Sinks: a logit of each head that takes weight in the softmax and gives no value.

The row's weights become ``exp(s_ij - lse)`` with ``lse = log(exp(sink) + sum(exp(s_ij)))``, as if
every query saw one key more, of score `sink` and value 0. Backends know nothing of it: given this
lse, and the out that belongs to it, their gradients of q, k and v are right as they are.
"""

from __future__ import annotations

from typing import Any

from scfa_core.array_kinds import dtype_name, is_torch_tensor
from scfa_core.errors import ShapeError
from scfa_core.merging import check_sinks, namespace
from scfa_core.problem import check_layout, one_framework

__all__ = ["sinks_backward"]

_CHUNK = 2**22  # elements that are widened at a time: a GPU keeps them in its L2


def sinks_backward(dout: Any, out: Any, lse: Any, sinks: Any, *, layout: str = "bhtd") -> Any:
    """Gradient of sinks, beside what `attention_backward` gives; for arrays without autograd.

    >>> import numpy as np, scfa_core as scfa
    >>> q = np.random.default_rng(0).standard_normal((1, 2, 4, 16))
    >>> sinks = np.zeros(2)
    >>> out, lse = scfa.attention(q, q, q, sinks=sinks, return_lse=True, backend="reference")
    >>> dq, dk, dv = scfa.attention_backward(out, q, q, q, out, lse, backend="reference")
    >>> sinks_backward(out, out, lse, sinks).shape
    (2,)

    Parameters
    ----------
    dout : array like `out`
        Gradient of the loss with respect to `out`.
    out, lse : arrays
        What `attention` returned with these sinks and ``return_lse=True``.
    sinks : array, (heads,)
    layout : "bhtd" | "bthd"
        Of `out` and `dout`.

    Returns
    -------
    dsinks : array like `sinks`

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError
        Arrays of other shapes, libraries or devices.

    Notes
    -----
    ``-sum(exp(sink - lse) * sum(dout * out))`` over the rows of a head, in float32 (float64 for
    float64), widened a piece at a time.
    """
    swap = check_sinks_backward(dout, out, lse, sinks, layout)
    (batch, heads, rows), size = lse.shape, out.shape[3]
    xp = namespace(out)
    wide = xp.float64 if dtype_name(out) == "float64" else xp.float32
    logits = _cast(sinks, wide)[None, :, None]
    never = xp.isneginf(logits)  # no sink: the lse of a row without keys is -inf as well
    weights = xp.exp(logits - xp.where(never, 0.0, _cast(lse, wide)))
    axis = 2 if swap else 1
    pieces = []
    step = max(1, _CHUNK // max(1, batch * rows * size))
    for begin in range(0, heads, step):
        piece = (slice(None),) * axis + (slice(begin, begin + step),)
        dots = (_cast(dout[piece], wide) * out[piece]).sum(-1)
        dots = dots.swapaxes(1, 2) if swap else dots
        pieces.append(-(weights[:, begin : begin + step] * dots).sum((0, 2)))
    whole = xp.concatenate(pieces) if pieces else xp.zeros_like(logits[0, :, 0])
    return _cast(whole, sinks.dtype)


def check_sinks_backward(dout: Any, out: Any, lse: Any, sinks: Any, layout: str) -> bool:
    """Refuse arrays that do not fit each other; return whether heads and seqlen are swapped."""
    swap = check_layout(layout)
    check_sinks(sinks, out, layout)
    one_framework(out, dout=dout, lse=lse)
    if tuple(dout.shape) != tuple(out.shape):
        raise ShapeError(f"dout must be like out, {tuple(out.shape)}, got {tuple(dout.shape)}")
    batch, heads, rows, _ = (out.shape[at] for at in ((0, 2, 1, 3) if swap else range(4)))
    if tuple(lse.shape) != (batch, heads, rows):
        raise ShapeError(f"lse must be {(batch, heads, rows)}, got {tuple(lse.shape)}")
    return swap


def _cast(x: Any, dtype: Any) -> Any:
    if is_torch_tensor(x):
        return x.to(dtype)
    return x.astype(dtype, copy=False)
