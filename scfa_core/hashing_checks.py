"""What hashing is given: arrays of one library and device, integers, centers that fit."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from scfa_core.array_kinds import adopt, check_dense, dtype_name, framework_of, is_torch_tensor
from scfa_core.arrays import INT_DTYPES, ITEMSIZE
from scfa_core.errors import DeviceError, DTypeError, PatternError, ShapeError

__all__ = [
    "CENTER_ROWS",
    "EVEN_START",
    "MOST_SUM",
    "PAST_START",
    "centers_from",
    "check_buckets",
    "check_integers",
    "check_real",
    "check_shapes",
    "even_power",
    "of_one_library",
]

CENTER_ROWS = 64  # that share a center, where a sequence has several
MOST_SUM = 1e30  # of such rows: sums of all of them stay finite
PAST_START = 16  # rows that the start of a sequence counts for
EVEN_START = 2  # rows that each bucket begins with, where full ones are given less


def even_power(buckets: int) -> float:
    """By which power of its fill the products of a bucket are divided, to make buckets even.

    Of the largest of `buckets` // 2 normal products, a bucket's share grows about as the power
    log2(buckets) - 1.5 of a factor (0.6, 2.4, 4.6 measured for 4, 16, 64): three quarters of the
    step that would undo a fill. Two buckets have one border, which no factor moves.
    """
    return 0.75 / (math.log2(buckets) - 1.5) if buckets > 2 else 0.0


def of_one_library(**given: Any) -> list[Any]:
    """Arrays of one library and device, those of Numba and DLPack as CuPy's or NumPy's.

    What is None is left out, but for the first two.
    """
    named = {n: adopt(x) for i, (n, x) in enumerate(given.items()) if i < 2 or x is not None}
    first, *_ = named
    if not all(is_torch_tensor(x) for x in named.values()):
        for name, x in named.items():
            if framework_of(name, x) is not framework_of(first, named[first]):
                raise DeviceError(
                    f"{name} must come from the library of {first}, {_kind(named[first])}, got "
                    f"{_kind(x)}; convert one of them (torch.from_numpy, cupy.asarray)"
                )
    for name, x in named.items():
        check_dense(name, x)
    place = getattr(named[first], "device", None)
    for name, x in named.items():
        if getattr(x, "device", None) != place:
            raise DeviceError(
                f"{name} must be on the device of {first}, {place}, got {x.device}; move one of "
                "them"
            )
    return list(named.values())


def _kind(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__name__}"


def check_buckets(buckets: Any, name: str = "buckets") -> int:
    """Refuse what is no number of buckets of an angular hash, which come in pairs."""
    whole = type(buckets) is not bool and isinstance(buckets, Integral)
    if not whole or buckets < 2 or buckets % 2:
        raise PatternError(f"{name} must be an even int of at least 2, got {buckets!r}")
    return int(buckets)


def check_integers(name: str, x: Any) -> None:
    """Refuse buckets that are no integers."""
    kind = dtype_name(x)
    if kind not in INT_DTYPES:
        raise DTypeError(f"{name} must hold integers, as angular_hash returns them, got {kind}")


def check_real(**arrays: Any) -> None:
    """Refuse complex numbers, of which a projection would take one part, and what is no number."""
    for name, x in arrays.items():
        kind = "" if x is None else dtype_name(x)
        if x is not None and kind not in ITEMSIZE and not kind.startswith(("float8", "float128")):
            cure = "hash x.real, or both parts" if "complex" in kind else "cast it to float32"
            raise DTypeError(f"{name} must be real numbers, got {x.dtype}; {cure}")


def check_shapes(x: Any, directions: Any, center: Any) -> None:
    """Refuse what `angular_hash` cannot project: see there."""
    if len(x.shape) != 4 or len(directions.shape) != 4:
        raise ShapeError(
            "angular_hash needs x (batch, heads, seqlen, head_dim) and directions "
            f"(rounds, heads, head_dim, buckets // 2), got {tuple(x.shape)} and "
            f"{tuple(directions.shape)}"
        )
    _, heads, _, head_dim = x.shape
    _, own_heads, dim, half = directions.shape
    if not half:
        raise ShapeError(
            "directions must be (rounds, heads, head_dim, buckets // 2) of 2 buckets or more, got "
            f"{tuple(directions.shape)}"
        )
    if dim != head_dim or not own_heads or heads % own_heads:
        raise ShapeError(
            f"directions have {own_heads} heads of head_dim {dim}; x.shape={tuple(x.shape)} needs "
            "the same head_dim and a multiple of these heads"
        )
    if center is not None:
        _check_center(tuple(center.shape), tuple(x.shape))


def _check_center(center: tuple[int, ...], x: tuple[int, ...]) -> None:
    """Refuse a center whose shape does not fit rows of shape `x`."""
    batch, heads, seqlen, head_dim = x
    blocks = (seqlen - 1) // CENTER_ROWS + 1  # in this form, as traced lengths compare by form
    own, fits = 0, False
    if len(center) == 2:
        own, fits = center[0], center[1] == head_dim
    elif len(center) == 4:
        own, fits = center[1], (center[0], *center[2:]) == (batch, blocks, head_dim)
    if not fits or not own or heads % own:
        raise ShapeError(
            f"center must be (heads or a divisor, head_dim) or (batch, heads or a divisor, "
            f"ceil(seqlen / {CENTER_ROWS}), head_dim) for x.shape={x}, got {center}"
        )


def centers_from(center: Any, row: int) -> Any:
    """Centers of rows from `row` on, which is the first of its stretch."""
    of_rows = center is not None and len(center.shape) == 4
    return center[:, :, row // CENTER_ROWS :] if of_rows else center
