"""What a pattern is: a conjunction of group, keep and interval clauses, closed under ``&``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Pattern:
    """Which keys each query may see.

    Patterns hold the caller's arrays as they are (no copy, no look at the values) and say nothing
    about how attention is computed. ``a & b`` sees exactly the pairs that both see.
    """

    __slots__ = ()

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The atomic patterns whose intersection this is, in the order written."""
        return (self,)

    def __and__(self, other: Pattern) -> Intersection:
        if not isinstance(other, Pattern):
            return NotImplemented
        return Intersection(*self.parts, *other.parts)

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
            An array of the pattern does not broadcast to these sizes.

        Notes
        -----
        Copies arrays to the host and takes quadratic memory.
        """
        from scfa_core.reference.masks import dense_mask

        return dense_mask(self, batch, heads, heads_kv or heads, seqlen_q, seqlen_k)


class Intersection(Pattern):
    """The pairs that every part sees; what ``a & b`` returns."""

    __slots__ = ("_parts",)

    def __init__(self, *parts: Pattern) -> None:
        self._parts = parts

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The atomic patterns, flattened, in the order written."""
        return self._parts

    def __repr__(self) -> str:
        return " & ".join(repr(part) for part in self._parts)


def describe_array(x: Any) -> str:
    """Shape and dtype of any array-like, for a pattern's repr."""
    shape = tuple(getattr(x, "shape", ()))
    dtype = str(getattr(x, "dtype", type(x).__name__)).removeprefix("torch.")
    return f"{dtype}{list(shape)}"


def require_bool(name: str, value: Any) -> bool:
    """Refuse flags that are not flags: `Causal(3)` is a slip, not a truth value."""
    from scfa_core.errors import PatternError

    if not isinstance(value, bool):
        raise PatternError(f"{name} must be True or False, got {value!r}")
    return value


def require_arrays(pattern: str, **arrays: Any) -> None:
    """Refuse lists and scalars where a pattern needs arrays."""
    from scfa_core.errors import PatternError

    for name, x in arrays.items():
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise PatternError(
                f"{pattern}: {name} must be an array (torch, NumPy, CuPy, ...), "
                f"got {type(x).__name__}; wrap it, e.g. numpy.asarray(...)"
            )
