"""Choose which queries and keys to keep, for `QKSparse`: at random, by score, or learned.

All functions take scores of any axes whose last is the row, and give bool flags of the same shape:
(batch, heads, seqlen_q) for queries, (batch, heads_kv, seqlen_k) for keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from scfa_core.extras import missing

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise missing("scfa_core.dropping", "torch", error) from error

from scfa_core.api import attention
from scfa_core.arrays import FLOAT_DTYPES
from scfa_core.errors import DeviceError, DTypeError, OptionError, PatternError, ShapeError
from scfa_core.patterns import Causal, Pattern, QKSparse
from scfa_core.problem import as_size, check_flag, check_layout, check_share
from scfa_core.torch_checks import broadcasts, check_dtype, check_fits, check_tensor
from scfa_core.torch_framework import dtype_name

__all__ = ["drop_attention", "random_keep", "straight_through", "threshold_keep", "top_k_keep"]

_OPTIONS = ("softmax_scale", "deterministic", "backend")  # of `attention`, passed on
_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_MOST = 2**63 - 1  # the largest number of int64


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
    DeviceError, OptionError
        A device that torch does not know, a generator that is none or of another device.
    """
    check_share("keep", keep)
    if not isinstance(shape, torch.Size):
        if not isinstance(shape, Sequence):
            raise ShapeError(f"shape must be a sequence of sizes, got {shape!r}")
        shape = [as_size("each size of shape", n) for n in shape]
    if device is not None and not isinstance(device, torch.device):
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError):
            raise DeviceError(
                f"device must be a torch.device or a name of one ('cpu', 'cuda:0'), got {device!r}"
            ) from None
    options = drawn_by(generator, device)  # float32 whatever the default: bfloat16 has few numbers
    return torch.rand(tuple(shape), dtype=torch.float32, device=device, **options) < keep


def drawn_by(generator: torch.Generator | None, device: torch.device | None) -> dict[str, Any]:
    """Options of torch's draws: beside ``generator=None`` no size that is traced compiles."""
    if not isinstance(generator, (torch.Generator, type(None))):
        raise OptionError(
            f"generator must be a torch.Generator or None, got {generator!r}; a seed goes as "
            "torch.Generator(device).manual_seed(seed)"
        )
    if generator is None:
        return {}
    own, place = generator.device, torch.get_default_device() if device is None else device
    indices = {own.index, place.index} - {None}
    if place.type != "meta" and (own.type != place.type or len(indices) > 1):
        raise DeviceError(
            f"generator must be of the device drawn on, {place}, got one of {own}: "
            f"torch.Generator({str(place)!r})"
        )
    return {"generator": generator}


def top_k_keep(
    scores: Tensor, k: int | Tensor, *, among: Tensor | None = None, groups: Tensor | None = None
) -> Tensor:
    """Keep the `k` rows of highest score in each head; of equals the earlier ones.

    >>> scores = torch.tensor([[0.3, 0.9, 0.3, -1.0]])
    >>> top_k_keep(scores, 2).int().tolist()
    [[1, 1, 0, 0]]
    >>> top_k_keep(scores, 2, among=torch.tensor([True, False, True, True])).int().tolist()
    [[1, 0, 1, 0]]

    Parameters
    ----------
    scores : Tensor, (..., seqlen)
        NaN ranks above all numbers, as `torch.sort` has it.
    k : int, or integer Tensor that broadcasts against `scores`
        At least 0; more than there are keeps all. A tensor tells each row how many of its group
        are kept; its values are not looked at.
    among : bool Tensor that broadcasts against `scores`, optional
        False where a row is padding: it is not kept and takes no other's place, whatever its score.
        Numbers count as True where nonzero.
    groups : integer Tensor that broadcasts against `scores`, optional
        Document of each row, in any order: `k` rows of each are kept.

    Returns
    -------
    flags : bool Tensor like `scores`

    Raises
    ------
    PatternError
        A `k` that is no int and no tensor of integers, or negative.
    DTypeError, ShapeError, DeviceError
        Scores that are no torch tensor of real numbers, or a single number; what does not fit them.

    Notes
    -----
    A causal model must not choose by comparing with later rows if it is to generate text: what a
    row sees then depends on the future. Use `threshold_keep` there.
    """
    check_fits("scores", scores, scores)
    if scores.ndim == 0:
        raise ShapeError("scores must be (..., seqlen), got a single number")
    if isinstance(k, Tensor):
        check_fits("k", k, scores, PatternError)
        whole = k.long()  # torch compares no wider unsigned integers with others
        k = whole.where(whole >= 0, _MOST) if k.dtype == torch.uint64 else whole
    else:
        k = min(as_size("k", k, error=PatternError), _MOST)
    if among is not None:
        check_fits("among", among, scores)
    if groups is not None:
        check_fits("groups", groups, scores, DTypeError)
    place, _ = places(scores, among, () if groups is None else (groups,))
    return place <= k if among is None else (place <= k) & (among != 0)


def places(
    scores: Tensor, among: Tensor | None = None, groups: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Place of each row by score, from 1 on, and the number of rows it is a place among.

    Arguments as of `top_k_keep`, known to be right; rows whose ids agree in each of `groups` are
    one group. Both results are int64, of the scores' shape or (..., 1); the place of a row that is
    not `among` means nothing. Nothing waits for a device or depends on a length, and every tensor
    comes of the scores: lengths stay open when traced, and DTensors stay what they are.
    """
    order = torch.argsort(scores.detach(), dim=-1, descending=True, stable=True)
    ids = [y.long().expand(scores.shape) for y in groups]
    for y in ids:  # each stable, so that scores decide last
        order = order.gather(-1, torch.argsort(y.gather(-1, order), dim=-1, stable=True))
    one = torch.ones_like(order)
    counted = one if among is None else (among != 0).expand(scores.shape).gather(-1, order).long()
    place = counted.cumsum(-1)
    size = counted.sum(-1, keepdim=True)
    if ids:
        starts = one.cumsum(-1) == 1
        for y in ids:
            y = y.gather(-1, order)
            starts = starts | (y != y.roll(1, -1))
        before = torch.where(starts, place - counted, 0).cummax(-1).values
        after = torch.where(starts.roll(-1, -1), place, _MOST).flip(-1).cummin(-1).values.flip(-1)
        place = place - before
        size = torch.zeros_like(order).scatter(-1, order, after - before)
    return torch.zeros_like(order).scatter(-1, order, place), size


def threshold_keep(scores: Tensor, threshold: float | Tensor = 0.0) -> Tensor:
    """Keep the rows whose score exceeds `threshold`; each row is judged by itself, so causally.

    Parameters
    ----------
    scores : Tensor, (..., seqlen)
    threshold : float or Tensor
        A tensor broadcasts against the scores, e.g. one for each head. A NaN score exceeds none.
        Wider unsigned scores than uint8 are compared as float64.

    Returns
    -------
    flags : bool Tensor like `scores`

    Raises
    ------
    DTypeError, ShapeError, DeviceError
        Scores that are no torch tensor of real numbers, or a threshold that does not fit them.
    PatternError
        A threshold that is no number.
    """
    check_fits("scores", scores, scores)
    if isinstance(threshold, Tensor):
        check_fits("threshold", threshold, scores)
    elif isinstance(threshold, Real):
        threshold = as_compared(threshold)
    else:
        raise PatternError(f"threshold must be a number, got {threshold!r}")
    return _comparable(scores.detach()) > _comparable(threshold)


def _comparable(x: Any) -> Any:
    """A number or tensor that torch compares; wider unsigned integers it compares with none."""
    return x.double() if isinstance(x, Tensor) and x.dtype in _WIDE_UNSIGNED else x


def as_compared(number: Any) -> Any:
    """Read a real number as one that torch compares tensors with."""
    if isinstance(number, float) or (isinstance(number, Integral) and abs(int(number)) <= _MOST):
        return number
    try:
        return float(number)
    except OverflowError:
        return float("inf" if number > 0 else "-inf")


def straight_through(keep: Tensor, scores: Tensor) -> Tensor:
    """Gate that is exactly `keep` forward and has the gradient of ``sigmoid(scores)`` backward.

    Parameters
    ----------
    keep : bool Tensor
        The choice made. Numbers count as True where nonzero.
    scores : Tensor of the same shape
        What the choice was made by.

    Returns
    -------
    gate : Tensor like `scores`
        0.0 or 1.0, whatever the scores.

    Raises
    ------
    ShapeError, DeviceError
        Shapes or devices that differ.
    DTypeError
        What is no torch tensor, or scores that are no floating-point numbers.

    Notes
    -----
    The gradient of a NaN score is NaN, in dropped rows as well; `drop_attention` makes it 0 there.
    """
    check_gate("keep", keep, "scores", scores)
    soft = torch.sigmoid(scores)
    # the bracket is 0, or NaN where the score is
    return (keep != 0).to(scores.dtype) + (soft - soft.detach()).nan_to_num()


def check_gate(keep_name: str, keep: Any, name: str, scores: Any) -> None:
    """Refuse flags and scores that make no gate."""
    check_tensor(keep_name, keep)
    check_tensor(name, scores)
    check_dtype(keep_name, keep)
    if dtype_name(scores.dtype) not in FLOAT_DTYPES:
        raise DTypeError(
            f"{name} must be floating-point numbers, which have gradients; got {scores.dtype}"
        )
    if keep.shape != scores.shape:
        raise ShapeError(
            f"{keep_name} and {name} must have one shape, got {tuple(keep.shape)} and "
            f"{tuple(scores.shape)}"
        )
    if keep.device != scores.device:
        raise DeviceError(
            f"{keep_name} and {name} must be on one device, got {keep.device} and {scores.device}"
        )


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
        As for `scfa_core.attention`: softmax_scale, deterministic, backend.

    Returns
    -------
    out : Tensor, as `scfa_core.attention`
        The scores do not change it.

    Raises
    ------
    PatternError, OptionError
        ``include_self=False`` without `causal`; options other than these.
    ScfaError
        As `scfa_core.attention`, and as `straight_through` for the scores.

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
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise OptionError(
            f"drop_attention takes {', '.join(_OPTIONS)} as further options, got {unknown[0]}"
        )
    if not causal and not include_self:
        raise PatternError("include_self=False means j < i and so needs causal=True")
    swap = check_layout(layout)
    pattern: Pattern = QKSparse(q_keep, k_keep, causal=causal)
    if not include_self:
        pattern = pattern & Causal(include_self=False)
    if q_scores is not None:
        check_gate("q_keep", q_keep, "q_scores", q_scores)
    if k_scores is not None:
        check_gate("k_keep", k_keep, "k_scores", k_scores)
        if takes_gate(v, k_keep, swap):  # else `attention` says what does not fit
            v = gated(v, k_keep, k_scores, swap)
    out: Tensor = attention(q, k, v, pattern, layout=layout, **options)
    if q_scores is not None:
        out = gated(out, q_keep, q_scores, swap)
    return out


def takes_gate(x: Any, keep: Tensor, swap: bool) -> bool:
    """Whether `gated` leaves shape and dtype of `x` as they are, which may be anything yet."""
    dense = isinstance(x, Tensor) and not x.is_nested and x.layout is torch.strided
    if not dense or x.ndim != 4 or keep.ndim != 3:
        return False
    rows = (x.shape[0], x.shape[2], x.shape[1]) if swap else x.shape[:3]
    fits = broadcasts(keep.shape, rows) and x.device == keep.device
    return fits and dtype_name(x.dtype) in FLOAT_DTYPES


def gated(x: Tensor, keep: Tensor, scores: Tensor, swap: bool = False) -> Tensor:
    """Rows of a 4-axis tensor times their straight-through gate, (batch, heads, seqlen).

    What a dropped row or its score holds reaches neither the result nor the score's gradient, NaN
    included: the one is 0 and so is the other.
    """
    keep = keep != 0
    # laid as the scores are: what sigmoid rounds to may depend on it
    scores = torch.zeros_like(scores) + scores.masked_fill(~keep, 0.0)
    kept, gate = (
        (y.transpose(1, 2) if swap else y).unsqueeze(-1)
        for y in (keep, straight_through(keep, scores).to(x.dtype))
    )
    return torch.where(kept, x, 0.0) * gate
