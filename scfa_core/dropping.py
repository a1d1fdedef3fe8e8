"""Choose which queries and keys to keep, for `QKSparse`: at random, by score, or learned.

All functions take scores of any axes whose last is the row, and give bool flags of the same shape:
(batch, heads, seqlen_q) for queries, (batch, heads_kv, seqlen_k) for keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from scfa_core.extras import missing

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise missing("scfa_core.dropping", "torch", error) from error

from scfa_core.api import attention
from scfa_core.errors import DTypeError, OptionError, PatternError, ShapeError
from scfa_core.patterns import Causal, Pattern, QKSparse
from scfa_core.problem import as_size, check_flag, check_layout, check_share
from scfa_core.torch_checks import check_tensor

__all__ = ["drop_attention", "random_keep", "straight_through", "threshold_keep", "top_k_keep"]


def random_keep(
    shape: Sequence[int],
    keep: float,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep each row with probability `keep`, independently of all others.

    Parameters
    ----------
    shape : sequence of int
        Of the flags, e.g. ``q.shape[:3]``.
    keep : float
        From 0 to 1; the paper's ``sparsity`` is ``1 - keep``.
    device : torch.device, optional
        Where; the CPU by default.
    generator : torch.Generator, optional
        On that device; torch's own by default.

    Returns
    -------
    flags : bool Tensor of that shape

    Raises
    ------
    PatternError
        `keep` is no number from 0 to 1.
    ShapeError
        `shape` is no sequence of sizes.
    """
    check_share("keep", keep)
    if not isinstance(shape, torch.Size):
        if not isinstance(shape, Sequence):
            raise ShapeError(f"shape must be a sequence of sizes, got {shape!r}")
        shape = [as_size("each size of shape", n) for n in shape]
    options = drawn_by(generator)  # float32 whatever torch's default: bfloat16 has few numbers
    return torch.rand(tuple(shape), dtype=torch.float32, device=device, **options) < keep


def drawn_by(generator: torch.Generator | None) -> dict[str, Any]:
    """Options of torch's draws: beside ``generator=None`` no size that is traced compiles."""
    return {} if generator is None else {"generator": generator}


def top_k_keep(scores: Tensor, k: int) -> Tensor:
    """Keep the `k` rows of highest score in each head; of equals the earlier ones.

    >>> top_k_keep(torch.tensor([[0.3, 0.9, 0.3, -1.0]]), 2).int().tolist()
    [[1, 1, 0, 0]]

    Parameters
    ----------
    scores : Tensor, (..., seqlen)
    k : int
        At least 0; more than seqlen keeps all.

    Returns
    -------
    flags : bool Tensor like `scores`

    Raises
    ------
    PatternError
        A `k` that is no int, or negative.
    DTypeError, ShapeError
        Scores that are no torch tensor, or a single number.

    Notes
    -----
    A causal model must not choose by comparing with later rows if it is to generate text: what a
    row sees then depends on the future. Use `threshold_keep` there.
    """
    k = as_size("k", k, error=PatternError)
    if check_tensor("scores", scores).ndim == 0:
        raise ShapeError("scores must be (..., seqlen), got a single number")
    return highest(scores, k)


def highest(scores: Tensor, k: int) -> Tensor:
    """Flags of `top_k_keep`, its arguments known to be right: `k` may be a traced size."""
    order = torch.argsort(scores.detach(), dim=-1, descending=True, stable=True)
    first = torch.arange(scores.shape[-1], device=scores.device) < k  # no slice, no guard on k
    flags = torch.zeros_like(scores, dtype=torch.bool)  # batched where the scores are
    return flags.scatter(-1, order, first.expand_as(order))


def threshold_keep(scores: Tensor, threshold: float = 0.0) -> Tensor:
    """Keep the rows whose score exceeds `threshold`; each row is judged by itself, so causally.

    Parameters
    ----------
    scores : Tensor, (..., seqlen)
    threshold : float or Tensor
        A tensor broadcasts against the scores, one for each head for instance.

    Returns
    -------
    flags : bool Tensor like `scores`

    Raises
    ------
    DTypeError
        Scores that are no torch tensor.
    PatternError
        A threshold that is no number.
    """
    check_tensor("scores", scores)
    if not isinstance(threshold, (Real, Tensor)):
        raise PatternError(f"threshold must be a number, got {threshold!r}")
    return scores.detach() > threshold


def straight_through(keep: Tensor, scores: Tensor) -> Tensor:
    """Gate that is exactly `keep` forward and has the gradient of ``sigmoid(scores)`` backward.

    Parameters
    ----------
    keep : bool Tensor
        The choice made.
    scores : Tensor of the same shape
        What the choice was made by.

    Returns
    -------
    gate : Tensor like `scores`
        0.0 or 1.0.

    Raises
    ------
    ShapeError
        Shapes that differ.
    DTypeError
        What is no torch tensor, or scores that are no floating-point numbers.
    """
    check_tensor("keep", keep)
    check_tensor("scores", scores)
    if not scores.is_floating_point():
        raise DTypeError(
            f"scores must be floating-point numbers, which have gradients; got {scores.dtype}"
        )
    if keep.shape != scores.shape:
        raise ShapeError(
            f"keep and scores must have one shape, got {tuple(keep.shape)} and "
            f"{tuple(scores.shape)}"
        )
    soft = torch.sigmoid(scores)
    return keep.to(scores.dtype) + (soft - soft.detach())  # the bracket is exactly 0


def drop_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_keep: Tensor,
    k_keep: Tensor,
    *,
    q_scores: Tensor | None = None,
    k_scores: Tensor | None = None,
    causal: bool = True,
    include_self: bool = True,
    layout: str = "bhtd",
    **options: Any,
) -> Tensor:
    """Attend among the kept queries and keys, and let gradients reach the scores that chose them.

    Parameters
    ----------
    q, k, v : Tensor
        As for `scfa_core.attention`.
    q_keep, k_keep : bool Tensor, (batch, heads, seqlen_q), (batch, heads_kv, seqlen_k)
        As for `QKSparse`.
    q_scores, k_scores : Tensor, optional
        Scores behind the flags, of the same shapes; they get straight-through gradients.
    causal, include_self : bool
        ``j <= i``, or ``j < i`` without self.
    layout, **options
        As for `scfa_core.attention`, but for `return_lse`.

    Returns
    -------
    out : Tensor, as `scfa_core.attention`
        The scores do not change it.

    Raises
    ------
    PatternError
        ``include_self=False`` without `causal`.
    ScfaError
        As `scfa_core.attention`.

    Notes
    -----
    A query's score is learned as a gate on its output row, a key's as a gate on its value:
    d loss / d q_score = sigmoid' * (out . dout), d loss / d k_score = sigmoid' * (v . dv). Rows
    that were dropped take part in nothing, so their scores get a gradient of 0: scores of kept rows
    are pushed up or down, and a dropped row returns only as others fall (`top_k_keep`) or by
    weights shared between rows (a scoring layer). What a dropped row *would* have contributed is
    not computed; that costs dense attention.
    """
    check_flag("include_self", include_self)
    if "return_lse" in options:
        raise OptionError("drop_attention returns out alone and takes no return_lse")
    if "pattern" in options:
        raise OptionError(
            "drop_attention makes its pattern of the flags and takes no other; for more clauses "
            "give attention QKSparse(q_keep, k_keep) & pattern, and gate by straight_through"
        )
    if not causal and not include_self:
        raise PatternError("include_self=False means j < i and so needs causal=True")
    swap = check_layout(layout)
    pattern: Pattern = QKSparse(q_keep, k_keep, causal=causal)
    if not include_self:
        pattern = pattern & Causal(include_self=False)
    if k_scores is not None:
        v = gated(v, k_keep, k_scores, swap)
    out: Tensor = attention(q, k, v, pattern, layout=layout, **options)
    if q_scores is not None:
        out = gated(out, q_keep, q_scores, swap)
    return out


def gated(x: Tensor, keep: Tensor, scores: Tensor, swap: bool = False) -> Tensor:
    """Rows of a 4-axis tensor times their straight-through gate, (batch, heads, seqlen).

    What a dropped row holds reaches neither the result nor its score's gradient, NaN included.
    """
    keep = keep != 0
    kept, gate = (
        (y.transpose(1, 2) if swap else y).unsqueeze(-1)
        for y in (keep, straight_through(keep, scores).to(x.dtype))
    )
    return torch.where(kept, x, 0.0) * gate
