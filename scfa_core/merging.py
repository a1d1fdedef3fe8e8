"""Attention in parts: merge results over disjoint sets of keys, or attend over disjoint patterns.

With ``lse = log(sum(exp(lse_i)))`` and weights ``w_i = exp(lse_i - lse)``, ``sum(w_i out_i)`` is
attention over all keys, exactly; where a part sees nothing its lse is -inf and its weight 0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from scfa_core.api import attention
from scfa_core.array_kinds import check_dense, dtype_name, is_torch_tensor
from scfa_core.arrays import FLOAT_DTYPES
from scfa_core.errors import DeviceError, DTypeError, PatternError, ShapeError
from scfa_core.patterns import Pattern
from scfa_core.plan import Plan
from scfa_core.problem import check_flag, check_layout, one_framework

__all__ = ["attention_over", "merge_attention", "namespace"]


def namespace(x: Any) -> Any:
    """The library of an array (torch, numpy, cupy), already imported by whoever made it."""
    if is_torch_tensor(x):
        import torch

        return torch
    name = type(x).__module__.partition(".")[0]
    if name not in ("numpy", "cupy"):
        raise PatternError(
            f"merging takes torch, NumPy and CuPy arrays, got {type(x).__name__}; convert by DLPack"
        )
    return sys.modules[name]


def merge_attention(
    outs: Sequence[Any], lses: Sequence[Any], *, layout: str = "bhtd"
) -> tuple[Any, Any]:
    """Merge results of the same queries over disjoint sets of keys.

    >>> import numpy as np, scfa_core as scfa
    >>> q = np.random.default_rng(0).standard_normal((1, 2, 4, 16))
    >>> halves = [scfa.attention(q, x, x, scfa.SlidingWindow(9, causal=False), return_lse=True,
    ...                          backend="reference") for x in (q[:, :, :2], q[:, :, 2:])]
    >>> out, lse = merge_attention(*zip(*halves))

    Parameters
    ----------
    outs : sequence of arrays, (batch, heads, seqlen_q, head_dim_v)
        Torch (differentiable), NumPy or CuPy.
    lses : sequence of arrays, (batch, heads, seqlen_q), float32
        Natural logarithms, as ``return_lse=True`` gives.
    layout : "bhtd" | "bthd"
        Of `outs`.

    Returns
    -------
    out : array like ``outs[0]``
        0 where no part sees a key.
    lse : array like ``lses[0]``
        ``-inf`` there.

    Raises
    ------
    PatternError
        No parts, different numbers of them, or arrays of another library.
    ShapeError
        Parts whose shapes differ, or without 4 axes.
    DTypeError
        What is not floating-point, or dtypes that differ among the outs or among the lses.
    DeviceError
        Parts on several devices.

    Notes
    -----
    Weights and sums are float32 (float64 for float64 outs). Gradients flow into every out and lse.
    A key that two parts see is counted twice: keep the parts disjoint. Source: the online softmax
    of flash attention (arXiv 2205.14135), applied between calls instead of between tiles.
    """
    outs, lses = as_list("outs", outs), as_list("lses", lses)
    if not outs or len(outs) != len(lses):
        raise PatternError(
            "merge_attention needs at least one part, and an lse for each out, got "
            f"{len(outs)} outs and {len(lses)} lses"
        )
    swap = check_layout(layout)
    xp = namespace(outs[0])
    for x in outs:
        check_dense("each out", x)
    for x in lses:
        check_dense("each lse", x)
    for x in (*outs[1:], *lses):
        if namespace(x) is not xp:
            raise PatternError(
                f"outs and lses must come from one library, got {type(outs[0]).__name__} and "
                f"{type(x).__name__}"
            )
    _check_kinds(outs=outs, lses=lses)
    want = tuple(outs[0].shape)
    if len(want) != 4:
        raise ShapeError(f"each out of the list must have 4 axes, got {want}")
    rows = (want[0], want[2], want[1]) if swap else want[:3]
    for out, lse in zip(outs, lses, strict=True):
        if tuple(out.shape) != want or tuple(lse.shape) != rows:
            raise ShapeError(
                f"each out must be {want} and each lse {rows}, got {tuple(out.shape)} and "
                f"{tuple(lse.shape)}"
            )
    top = lses[0]
    for lse in lses[1:]:
        top = xp.maximum(top, lse)
    top = top.detach() if is_torch_tensor(top) else top  # a mere shift: takes no gradient
    empty = xp.isneginf(top)
    shift = xp.where(empty, xp.zeros_like(top), top)
    weights = [xp.exp(lse - shift) for lse in lses]
    total = sum(weights[1:], weights[0])
    total = xp.where(empty, xp.ones_like(total), total)
    lse = xp.where(empty, top, shift + xp.log(total))
    merged = None
    for out, weight in zip(outs, weights, strict=True):
        share = (weight / total).swapaxes(1, 2) if swap else weight / total
        term = share[..., None] * out
        merged = term if merged is None else merged + term
    return _cast_like(merged, outs[0]), lse


def merge_sinks(out: Any, lse: Any, sinks: Any, layout: str) -> tuple[Any, Any]:
    """Merge one key more into out and lse, of score `sinks` (heads,) and value 0."""
    xp = namespace(out)
    nothing = xp.broadcast_to(xp.zeros_like(out[:1, :1, :1, :1]), tuple(out.shape))
    logits = _cast_like(sinks, lse)[None, :, None]
    return merge_attention(
        [out, nothing], [lse, xp.broadcast_to(logits, tuple(lse.shape))], layout=layout
    )


def check_sinks(sinks: Any, q: Any, layout: str) -> None:
    """Refuse sinks that are not one floating-point number a head, beside q."""
    one_framework(q, sinks=sinks)
    shape = tuple(q.shape)
    heads = shape[2:3] if check_layout(layout) else shape[1:2]
    if len(shape) == 4 and tuple(sinks.shape) != heads:
        raise ShapeError(
            f"sinks must be one logit a head, {heads} for q.shape={shape} and {layout=}, got "
            f"{tuple(sinks.shape)}"
        )
    if dtype_name(sinks) not in FLOAT_DTYPES:
        raise DTypeError(f"sinks must be floating-point, got {sinks.dtype}")
    if getattr(sinks, "device", None) != getattr(q, "device", None):
        raise DeviceError(f"sinks must be on {q.device} like q, got {sinks.device}; move them")


def _check_kinds(**lists: list[Any]) -> None:
    """Refuse what holds no floating-point numbers, and lists of several dtypes or devices."""
    home = lists["outs"][0]
    for name, parts in lists.items():
        for at, x in enumerate(parts):
            if dtype_name(x) not in FLOAT_DTYPES:
                raise DTypeError(
                    f"{name} must be floating-point, as attention gives them, got {x.dtype}"
                )
            if x.dtype != parts[0].dtype:
                raise DTypeError(
                    f"{name} must share a dtype, got {parts[0].dtype} and {x.dtype}; cast them to "
                    "the one that the result shall have"
                )
            if getattr(x, "device", None) != getattr(home, "device", None):
                raise DeviceError(
                    f"all parts must be on one device, got outs[0] on {home.device}, {name}[{at}] "
                    f"on {x.device}; move them to one"
                )


def as_list(name: str, parts: Any) -> list[Any]:
    """Read a sequence, or say that it is none."""
    try:
        return list(parts)
    except TypeError as error:
        raise PatternError(f"{name} must be a list, got {type(parts).__name__}") from error


def _cast_like(x: Any, like: Any) -> Any:
    if is_torch_tensor(x):
        return x.to(like.dtype)
    return x.astype(like.dtype, copy=False)


def attention_over(
    q: Any,
    k: Any,
    v: Any,
    patterns: Sequence[Pattern | Plan],
    *,
    sinks: Any = None,
    softmax_scale: float | None = None,
    layout: str = "bhtd",
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Any:
    """Attend over the union of pairwise disjoint patterns.

    A query sees what any of the patterns lets it see; `&` intersects, this unites.

    Parameters
    ----------
    q, k, v, sinks, softmax_scale, layout, return_lse, deterministic, backend
        As for `scfa_core.attention`; torch, NumPy or CuPy. Sinks count once, not in each part.
    patterns : sequence of Pattern or Plan
        No pair may be visible in two of them, or it counts twice; `hashing.disjoint_rounds` and
        `KeyRanges` that do not overlap are such. ``scfa_core.validate(patterns, q, k)`` finds out,
        of some fifty patterns at most, as it compares each with each.

    Returns
    -------
    out, or (out, lse)
        As `scfa_core.attention`.

    Raises
    ------
    PatternError
        No patterns, one that is not in a list, or what is neither pattern nor plan.
    ScfaError
        As `scfa_core.attention`.

    Notes
    -----
    One call per pattern, forward and backward: the gradient of a part is that of `attention` under
    the merged lse. Traced (torch.compile, torch.export), all parts are one operator,
    ``scfa::attend_union``, at the same cost. Where a backend computes lse anew (float64, and the
    reference), lse is asked for and has a gradient, parts have plans of several backends (traced),
    or torch.func transforms the call, each part is differentiated through its own lse instead: its
    backward then runs a forward and a second backward too.

    The lse of a part is float32 whatever the inputs: of several patterns, float64 results are exact
    to some 1e-7, and gradients through lse to 1e-6.
    """
    check_flag("return_lse", return_lse)
    if isinstance(patterns, (Pattern, Plan)):
        raise PatternError(
            f"patterns must be a list of patterns, got {type(patterns).__name__}; "
            "attention takes a single one"
        )
    patterns = as_list("patterns", patterns)
    if not patterns:
        raise PatternError("attention_over needs at least one pattern")
    for p in patterns:
        if not isinstance(p, (Pattern, Plan)):
            raise PatternError(
                "patterns must be a list of scfa_core patterns or plans, got a "
                f"{type(p).__name__} in it"
            )
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "layout": layout,
        "deterministic": deterministic,
        "backend": backend,
    }
    if sinks is not None:
        check_sinks(sinks, q, layout)
    if not is_torch_tensor(q):
        parts = [attention(q, k, v, p, return_lse=True, **options) for p in patterns]
        out, lse = merge_attention(*zip(*parts, strict=True), layout=layout)
        if sinks is not None:
            out, lse = merge_sinks(out, lse, sinks, layout)
        return (out, lse) if return_lse else out
    from scfa_core.torch_union import union_attention

    out, lse = union_attention(q, k, v, sinks, patterns, options, return_lse)
    return (out, lse) if return_lse else out
