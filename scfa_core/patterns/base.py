"""What a pattern is: a conjunction of group, keep and interval clauses, closed under ``&``."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from scfa_core.errors import PatternError, ShapeError
from scfa_core.problem import is_flag, is_symbolic, told

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Pattern:
    """Which keys each query may see.

    Patterns hold the caller's arrays as they are (no copy, no look at the values) and say nothing
    about how attention is computed. ``a & b`` sees exactly the pairs that both see.
    """

    __slots__ = ()
    __array_ufunc__ = None  # NumPy leaves `array & pattern` to us, not to the array's elements

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The atomic patterns whose intersection this is, in the order written."""
        return (self,)

    def __and__(self, other: Pattern) -> Intersection:
        if hasattr(other, "shape") and not isinstance(other, Pattern):
            raise self._no_such(
                "& takes patterns, not a mask or flags: kept rows are QKSparse(q_keep, k_keep, "
                "causal=False), ranges of keys KeyRanges(start, end)"
            )
        if not isinstance(other, Pattern):
            return NotImplemented
        return Intersection(*self.parts, *other.parts)

    __rand__ = __and__
    __iand__ = __and__  # torch.compile of torch 2.11 knows no other way to &=

    def __or__(self, other: object) -> NoReturn:
        raise self._no_such(
            "a pattern is no union of others: attention_over(q, k, v, [a, b]) of "
            "scfa_core.merging attends over disjoint ones"
        )

    __ror__ = __or__

    def __invert__(self) -> NoReturn:
        raise self._no_such("a pattern has no complement: say what is seen, e.g. by KeyRanges")

    def __bool__(self) -> NoReturn:
        raise self._no_such(
            "a pattern is neither true nor false: `a and b` would be b alone, write a & b "
            "(and `pattern is not None` to ask for one)"
        )

    def _no_such(self, why: str) -> PatternError:
        return PatternError(f"{why}; got {self!r}")

    def mask(
        self,
        seqlen_q: int,
        seqlen_k: int,
        *,
        batch: int = 1,
        heads: int = 1,
        heads_kv: int | None = None,
    ) -> NDArray[np.bool_]:
        """Return the dense mask, straight from the definition; for looking and testing.

        Parameters
        ----------
        seqlen_q, seqlen_k : int
            Number of queries and keys, in rows.
        batch, heads, heads_kv : int
            Sizes that the pattern's arrays broadcast to; `heads_kv` defaults to `heads`.

        Returns
        -------
        mask : numpy bool array, (batch, heads, seqlen_q, seqlen_k)
            True where the query sees the key.

        Raises
        ------
        ShapeError
            A size that is no int of at least 0, `heads_kv` does not divide `heads`, or an array of
            the pattern does not broadcast to these sizes.
        DTypeError, LayoutError, DeviceError
            Arrays that `attention` takes no pattern of, or that have no values.

        Notes
        -----
        Copies arrays to the host and takes quadratic memory.
        """
        from scfa_core.problem import as_size
        from scfa_core.reference.masks import dense_mask

        sizes = {
            "batch": batch,
            "heads": heads,
            "heads_kv": heads if heads_kv is None else heads_kv,
        }
        sizes |= {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
        read = {name: as_size(f"mask: {name}", size) for name, size in sizes.items()}
        if read["heads"] and (not read["heads_kv"] or read["heads"] % read["heads_kv"]):
            raise ShapeError(f"mask: heads_kv must divide heads, got {heads_kv=}, {heads=}")
        return dense_mask(self, **read)


class Intersection(Pattern):
    """The pairs that every part sees; what ``a & b`` returns.

    Parameters
    ----------
    *parts : Pattern
        Patterns, intersections among them. Of none at all, every query sees every key.

    Raises
    ------
    PatternError
        A part that is no pattern.
    """

    __slots__ = ("_parts",)

    def __init__(self, *parts: Pattern) -> None:
        for part in parts:
            if not isinstance(part, Pattern):
                raise PatternError(
                    f"Intersection takes patterns one by one, got {type(part).__name__}; of a list "
                    "Intersection(*patterns), of a plan nothing: intersect first, then plan"
                )
        self._parts = tuple(atom for part in parts for atom in part.parts)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The atomic patterns, flattened, in the order written."""
        return self._parts

    def __repr__(self) -> str:
        return " & ".join(repr(part) for part in self._parts) or "Intersection()"


def describe_array(x: Any) -> str:
    """Shape and dtype of any array-like, for a pattern's repr."""
    shape = tuple(getattr(x, "shape", ()))
    dtype = str(getattr(x, "dtype", type(x).__name__)).removeprefix("torch.")
    return f"{dtype}{list(shape)}"


def require_bool(name: str, value: Any) -> bool:
    """Refuse flags that are not flags: `Causal(3)` is a slip, not a truth value."""
    if not isinstance(value, bool):
        raise PatternError(f"{name} must be True or False, got {told(value)}")
    return value


def require_count(name: str, value: Any, of: str = "keys") -> int:
    """Read a number of keys or rows, refusing floats, negatives and flags of any library."""
    try:  # a length that is traced stays open: as an int it would be the length of this call
        if is_flag(value):
            count = -1
        else:
            count = value if type(value) is int or is_symbolic(value) else operator.index(value)
    except (TypeError, RuntimeError):  # a tensor of no known value
        count = -1
    if count < 0:
        raise PatternError(f"{name} must be an int >= 0 (a number of {of}), got {told(value)}")
    return count


def require_arrays(pattern: str, **arrays: Any) -> None:
    """Refuse lists, scalars and nested tensors where a pattern needs arrays."""
    for name, x in arrays.items():
        if getattr(x, "is_nested", False):  # of such a tensor even the shape may raise
            raise PatternError(
                f"{pattern}: {name} is a nested tensor, whose sequences share no length: pack them "
                "into one, and pass Documents(ids), ids (1, rows of all) the sequence of each row; "
                "Documents.from_cu_seqlens(nested.offsets(), rows) of a jagged one"
            )
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise PatternError(
                f"{pattern}: {name} must be an array (torch, NumPy, CuPy, ...), "
                f"got {type(x).__name__}; wrap it, e.g. numpy.asarray(...)"
            )


PATTERN = "a scfa_core pattern (Causal(), HashSparse(...), ...)"  # in messages
PATTERN_OR_PLAN = f"pattern must be {PATTERN} or a Plan"


def require_pattern(wanted: str, pattern: Any) -> None:
    """Refuse what is no pattern, a plan among it; `wanted` begins the message."""
    if not isinstance(pattern, Pattern):
        raise no_pattern(wanted, pattern)


def kind_of(part: Pattern) -> type[Pattern]:
    """Return the class of this package that an atomic pattern is, or is derived from.

    Raises
    ------
    PatternError
        It is derived from `Pattern` alone, and nothing says which clauses it is made of; or it has
        a `mask` of its own, which kernels would not know.
    """
    for kind in type(part).__mro__:
        if kind.__module__.startswith("scfa_core.patterns.") and kind is not Pattern:
            if type(part) is not kind and type(part).mask is not Pattern.mask:
                raise unknown_pattern(part)
            return kind
    raise unknown_pattern(part)


def map_arrays(pattern: Pattern, change: Callable[[Any], Any]) -> Pattern:
    """Return a pattern with ``change(x)`` in place of each array x; the given one stays as it is.

    Parts whose arrays all come back as they were are the same objects.
    """
    parts = []
    for part in pattern.parts:
        names: tuple[str, ...] = kind_of(part).__slots__
        arrays = {name: x for name in names if hasattr(x := getattr(part, name), "shape")}
        changed = {name: change(x) for name, x in arrays.items()}
        if any(changed[name] is not x for name, x in arrays.items()):
            part = copy.copy(part)
            for name, x in changed.items():
                setattr(part, name, x)
        parts.append(part)
    return parts[0] if len(parts) == 1 else Intersection(*parts)


def unknown_pattern(part: Any) -> PatternError:
    """Say how a pattern is built, to one who derived a class from `Pattern`."""
    return PatternError(
        f"{type(part).__name__} is no pattern of scfa_core: build yours of HashSparse, QKSparse, "
        "KeyRanges, ... and &, in a function that returns it; "
        "docs/guides/write-your-own-pattern.md shows how"
    )


def no_pattern(what: str, x: Any) -> PatternError:
    """Say that `x` is no pattern, and how what it seems to mean is said; `what` takes one."""
    kind = type(x).__name__
    advice = ""
    if isinstance(x, type) and issubclass(x, Pattern):
        kind = f"the class {x.__name__}"
        advice = f"; make one: {x.__name__}(...)"
    elif isinstance(x, (list, tuple)):
        advice = (
            "; where all must hold a & b is the pattern, and attention_over of scfa_core.merging "
            "takes a list of which any may hold"
        )
    elif isinstance(x, (str, bool)):
        kind = repr(x)
        advice = "; Causal() is the default, Intersection() lets every query see every key"
    elif hasattr(x, "shape"):
        advice = (
            "; no dense mask is read: Documents(ids) and HashSparse(q_hash, k_hash) say who sees "
            "whom by a number for each row, QKSparse(q_keep, k_keep) by flags, KeyRanges(start, "
            "end) by a range of keys for each query"
        )
    return PatternError(f"{what}, got {kind}{advice}")
