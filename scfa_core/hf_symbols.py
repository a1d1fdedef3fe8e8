"""Symbols for the indices of a mask function: they remember what they are compared with.

A mask function says by comparisons which keys a query sees. Made of these symbols a comparison is a
`Clause`: an interval around the query's position, group ids, keep flags. Nothing is drawn, nothing
is looked at on the host. What is no such clause raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from scfa_core.errors import PatternError

__all__ = [
    "Band",
    "BatchIndex",
    "Clause",
    "HeadIndex",
    "PerBatch",
    "Positions",
    "RowIndex",
    "Rows",
    "Symbol",
    "as_clause",
    "refuse_part",
]


class Band(NamedTuple):
    """Key at position p is visible to a query at position i iff ``i + lo <= p < i + hi``."""

    lo: int | None = None
    hi: int | None = None

    def narrowed(self, other: Band) -> Band:
        """Both bands at once."""
        los = [x for x in (self.lo, other.lo) if x is not None]
        his = [x for x in (self.hi, other.hi) if x is not None]
        return Band(max(los, default=None), min(his, default=None))


EVERYTHING = Band()


class Positions(NamedTuple):
    """Rows ``0 .. length - 1`` stand at positions from `offset` on; `side` is "query" or "key"."""

    side: str
    length: int
    offset: int | Tensor

    def on(self, device: torch.device) -> Tensor:
        """Position of every row."""
        return torch.arange(self.length, device=device) + self.offset

    def rows_of(self, table: Tensor) -> Tensor:
        """Pick a (batch, positions) table at these positions."""
        if not isinstance(self.offset, Tensor) and (self.offset, self.length) == (
            0,
            table.shape[1],
        ):
            return table
        return table[:, self.on(table.device)]


def refuse_part(part: str, cause: Exception | None = None) -> NoReturn:
    """Raise, naming the part of a mask function that is no clause."""
    raise PatternError(
        f"the attention mask has a part that scfa_core cannot express: {part}. It knows causal, "
        "sliding-window, chunked, bidirectional, packed and padding masks, and what is made of "
        "their comparisons joined by &; use attn_implementation='sdpa' for this model"
    ) from cause


class Symbol:
    """Stands for an index or for what became of one; whatever a child does not define raises."""

    __hash__ = None  # type: ignore[assignment]
    device = None
    what = "an index"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse a torch function, and a tensor's operator with a symbol at its right."""
        refuse_part(f"{getattr(func, '__name__', func)} of {cls.what}")

    def to(self, *args: Any, **kwargs: Any) -> Symbol:
        """Symbols live nowhere."""
        return self

    def new_ones(self, *args: Any, **kwargs: Any) -> Clause:
        """With what transformers' ``and_masks`` begins: every pair is visible."""
        return Clause()

    def new_zeros(self, *args: Any, **kwargs: Any) -> NoReturn:
        """With what transformers' ``or_masks`` begins."""
        refuse_part("a union of masks (or_masks)")

    def __bool__(self) -> NoReturn:
        refuse_part(f"a decision on the value of {self.what}")


def _refused(name: str) -> Callable[..., NoReturn]:
    def operate(self: Symbol, *others: Any) -> NoReturn:
        refuse_part(f"{name} of {self.what}")

    return operate


for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "truediv", "rtruediv"),
    *("mod", "rmod", "and", "rand", "or", "ror", "xor", "rxor", "invert", "abs", "neg"),
    *("lt", "le", "gt", "ge", "eq", "ne", "getitem", "index", "int", "float"),
):
    setattr(Symbol, f"__{_name}__", _refused(_name))


class Clause(Symbol):
    """What must hold for a pair to be visible.

    Attributes
    ----------
    band : Band
    groups : tuple of (q_ids, k_ids)
        Each (batch or 1, rows): equal ids see each other.
    keeps : tuple of bool Tensor, (batch or 1, keys)
    packed : bool
        One table tells queries and keys apart: documents.
    compares_looked_up : bool
        The band was said of positions looked up in a table. Within a document those rise by one, as
        rows do.
    """

    what = "a mask"

    def __init__(
        self,
        band: Band = EVERYTHING,
        groups: tuple[tuple[Tensor, Tensor], ...] = (),
        keeps: tuple[Tensor, ...] = (),
        packed: bool = False,
        compares_looked_up: bool = False,
    ) -> None:
        self.band = band
        self.groups = groups
        self.keeps = keeps
        self.packed = packed
        self.compares_looked_up = compares_looked_up

    def __and__(self, other: Any) -> Clause:
        other = as_clause(other)
        return Clause(
            self.band.narrowed(other.band),
            self.groups + other.groups,
            self.keeps + other.keeps,
            self.packed or other.packed,
            self.compares_looked_up or other.compares_looked_up,
        )


def as_clause(said: Any) -> Clause:
    """Return what a mask function said as a clause; flags of keys are one."""
    if isinstance(said, Clause):
        return said
    if isinstance(said, Rows) and said.at.side == "key" and said.values.dtype == torch.bool:
        return Clause(keeps=(said.values,))
    what = said.what if isinstance(said, Symbol) else f"a {type(said).__name__}"
    refuse_part(f"{what} in place of a comparison")


class BatchIndex(Symbol):
    """Which sequence; all that a function may do with it is look up in tensors."""

    what = "the batch index"


class HeadIndex(Symbol):
    """Which head; masks of this package are alike in all."""

    what = "the head index"


class PerBatch(Symbol):
    """``table[batch]`` of a (batch,) table."""

    what = "a value of each sequence"

    def __init__(self, values: Tensor) -> None:
        self.values = values


class _OneSide(Symbol):
    """A value of queries or of keys: compared with one of the other side by their distance."""

    def __le__(self, other: Any) -> Any:
        return self._less(other) <= 0

    def __lt__(self, other: Any) -> Any:
        return self._less(other) <= -1

    def __gt__(self, other: Any) -> Any:
        return self._less(other) >= 1

    def __ge__(self, other: Any) -> Any:
        return self._less(other) >= 0

    def __eq__(self, other: Any) -> Any:
        return self._less(other) == 0

    def _less(self, other: Any) -> _Distance:
        """``self - other``, which comparisons are made of."""
        less: Any = self - other
        if isinstance(less, _Distance):
            return less
        refuse_part(f"{self.what} compared with what is none of the other side")


class RowIndex(_OneSide):
    """Position of a query or key, plus `shift`."""

    def __init__(self, at: Positions, device: torch.device, shift: int = 0) -> None:
        self.at = at
        self.device = device
        self.shift = shift
        self.what = f"the {at.side} index"

    def __add__(self, other: Any) -> Any:
        if isinstance(other, int):
            return RowIndex(self.at, self.device, self.shift + other)
        refuse_part(f"a sum of {self.what}")

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, int):
            return RowIndex(self.at, self.device, self.shift - other)
        if isinstance(other, PerBatch):
            return Rows(self.at, self._rows(other.values.device) - other.values[:, None])
        if isinstance(other, RowIndex) and other.at.side != self.at.side:
            return _Distance(self.at.side, self.shift - other.shift)
        refuse_part(f"a difference of {self.what}")

    def __floordiv__(self, other: Any) -> Any:
        if isinstance(other, int):
            return Rows(self.at, self._rows(self.device)) // other
        refuse_part(f"a division of {self.what}")

    def _rows(self, device: torch.device) -> Tensor:
        return self.at.on(device)[None] + self.shift

    def __ge__(self, other: Any) -> Any:
        # Positions begin at 0; so says the mask that sees everything.
        if isinstance(other, int) and self.shift >= other:
            return Clause()
        return super().__ge__(other)


class _Distance(Symbol):
    """Position of `side` less that of the other, plus `shift`; `looked_up`: as a table has them."""

    what = "a distance of query and key"

    def __init__(self, side: str, shift: int, looked_up: bool = False) -> None:
        self.side = side
        self.shift = shift
        self.looked_up = looked_up

    def __add__(self, other: Any) -> Any:
        if isinstance(other, int):
            return _Distance(self.side, self.shift + other, self.looked_up)
        refuse_part(f"a sum of {self.what}")

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, int):
            return _Distance(self.side, self.shift - other, self.looked_up)
        refuse_part(f"a difference of {self.what}")

    def __abs__(self) -> Any:
        return _Reach(self)

    abs = __abs__  # as of a tensor

    def __le__(self, other: Any) -> Any:
        return self._between(None, other)

    def __lt__(self, other: Any) -> Any:
        return self <= other - 1

    def __ge__(self, other: Any) -> Any:
        return self._between(other, None)

    def __gt__(self, other: Any) -> Any:
        return self >= other + 1

    def __eq__(self, other: Any) -> Any:
        return self._between(other, other)

    def _between(self, least: Any, most: Any) -> Clause:
        """Of key less query, both ends included."""
        if not all(x is None or isinstance(x, int) for x in (least, most)):
            refuse_part(f"{self.what} compared with what is no int")
        lo = None if least is None else least - self.shift
        hi = None if most is None else most - self.shift
        if self.side == "query":
            lo, hi = None if hi is None else -hi, None if lo is None else -lo
        band = Band(lo, None if hi is None else hi + 1)
        return Clause(band, compares_looked_up=self.looked_up)


class _Reach(Symbol):
    """``abs`` of a distance."""

    what = "a distance both ways"

    def __init__(self, distance: _Distance) -> None:
        self.distance = distance

    def __le__(self, other: Any) -> Any:
        return (self.distance <= other) & (self.distance >= -other)

    def __lt__(self, other: Any) -> Any:
        return self <= other - 1


class Rows(_OneSide):
    """A value of each row of one side, (batch or 1, rows), looked up in `table` or computed.

    `shift` has been added to what was looked up; it is not in `values`.
    """

    def __init__(
        self, at: Positions, values: Tensor, table: Tensor | None = None, shift: int = 0
    ) -> None:
        self.at = at
        self.values = values
        self.table = table
        self.shift = shift
        self.what = f"values of each {at.side}"

    def __add__(self, other: Any) -> Any:
        if isinstance(other, int):
            return Rows(self.at, self.values, self.table, self.shift + other)
        refuse_part(f"a sum of {self.what}")

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, int):
            return self + -other
        if isinstance(other, PerBatch):
            return Rows(self.at, self._shifted() - other.values[:, None])
        if isinstance(other, Rows) and self._same_table(other):
            return _Distance(self.at.side, self.shift - other.shift, looked_up=True)
        refuse_part(f"a difference of {self.what}")

    def __floordiv__(self, other: Any) -> Any:
        if isinstance(other, int):
            quotient = torch.div(self._shifted(), other, rounding_mode="floor")
            return Rows(self.at, quotient)
        refuse_part(f"a division of {self.what}")

    def _same_table(self, other: Rows) -> bool:
        sides = self.at.side != other.at.side
        return sides and self.table is not None and self.table is other.table

    def _shifted(self) -> Tensor:
        return self.values + self.shift if self.shift else self.values

    def __eq__(self, other: Any) -> Any:
        if not isinstance(other, Rows) or other.at.side == self.at.side:
            refuse_part(f"{self.what} compared with what is none of the other side")
        mine, others = self._shifted(), other._shifted()
        groups = (mine, others) if self.at.side == "query" else (others, mine)
        packed = self._same_table(other) and self.shift == other.shift
        return Clause(groups=(groups,), packed=packed)
