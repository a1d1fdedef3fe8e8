"""From a pattern to clauses: groups, keeps and intervals, normalised and broadcast, values unseen.

Every pattern is a conjunction of three kinds of clause (docs/plan.md). This file checks shapes,
dtypes and devices, and lets the caller's framework do the few element-wise conversions. It never
reads a value.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from scfa_core.array_kinds import framework_of
from scfa_core.arrays import INT_DTYPES, ITEMSIZE, Framework
from scfa_core.errors import DeviceError, DTypeError, PatternError, ShapeError
from scfa_core.patterns import (
    Causal,
    Documents,
    HashSparse,
    KeyRanges,
    Pattern,
    QKSparse,
    SlidingWindow,
)
from scfa_core.patterns.base import PATTERN_OR_PLAN, require_pattern, unknown_pattern
from scfa_core.problem import Problem

MAX_GROUP_CLAUSES = 8
START_BITS = 10  # queries are sorted by their starts in steps of 1024 keys, then by their ends
ROWS_IN_ANY_ORDER = 64  # so few queries are one tile, whose order does not matter
ARRAY_FIELDS = ("q_groups", "k_groups", "q_keeps", "k_keeps", "starts", "ends")


class Clauses(NamedTuple):
    """A lowered pattern: q arrays (batch, heads, seqlen_q), k arrays (batch, heads_kv, seqlen_k).

    Visible iff every pair of groups is equal, every keep is 1, and
    ``max(i + lo_offset, starts...) <= j < min(i + hi_offset, ends...)`` clipped to [0, seqlen_k].
    """

    q_groups: tuple[Any, ...] = ()  # int32 | int64
    k_groups: tuple[Any, ...] = ()
    q_keeps: tuple[Any, ...] = ()  # uint8, 0 or 1
    k_keeps: tuple[Any, ...] = ()
    lo_offset: int | None = None
    hi_offset: int | None = None
    starts: tuple[Any, ...] = ()  # int32 | int64
    ends: tuple[Any, ...] = ()

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Every array, in the order of `ARRAY_FIELDS`."""
        return tuple(x for name in ARRAY_FIELDS for x in getattr(self, name))

    def with_arrays(self, arrays: Iterable[Any]) -> Clauses:
        """Put others in their places, in the order of `ARRAY_FIELDS`."""
        rest = iter(arrays)
        fields: dict[str, Any] = {
            name: tuple(next(rest) for _ in getattr(self, name)) for name in ARRAY_FIELDS
        }
        return self._replace(**fields)

    @property
    def monotone(self) -> bool:
        """Whether ranges are nondecreasing along sorted queries: all patterns but KeyRanges."""
        return not self.starts

    def sorted_bounds(self, seqlen_q: int) -> tuple[Any, ...]:
        """Starts, then ends, by which queries are sorted after their groups; () where they are not.

        Neighbours share a tile, so those that see much the same keys are made neighbours. Bounds
        count as clipped to [0, seqlen_k], starts shifted right by `START_BITS`: finer steps would
        leave no order of ends, which tells as much of causal queries.
        """
        fits = len(self.q_groups) + 2 * len(self.starts) <= MAX_GROUP_CLAUSES
        return (*self.starts, *self.ends) if fits and seqlen_q > ROWS_IN_ANY_ORDER else ()


class _Lowering:
    """Collects the clauses of one pattern for one problem."""

    def __init__(self, problem: Problem, framework: Framework) -> None:
        self.problem = problem
        self.framework = framework
        self.q_shape = (problem.batch, problem.heads, problem.seqlen_q)
        self.k_shape = (problem.batch, problem.heads_kv, problem.seqlen_k)
        self.arrays: dict[str, list[Any]] = {name: [] for name in ARRAY_FIELDS}
        self.seen_groups: set[tuple[int, int]] = set()
        self.lo: int | None = None
        self.hi: int | None = None

    def add(self, part: Pattern) -> None:
        """Add the clauses of one atomic pattern."""
        if isinstance(part, Causal):
            shift = self.problem.seqlen_k - self.problem.seqlen_q
            lag = min(part.lag, self.problem.seqlen_q + self.problem.seqlen_k)  # as for windows
            self._causal(lag, shift if part.align == "bottom-right" else 0)
        elif isinstance(part, HashSparse):
            self._group("HashSparse", "q_hash", part.q_hash, "k_hash", part.k_hash)
            if part.causal:
                self._causal(int(not part.include_self))
        elif isinstance(part, QKSparse):
            self._keep("q_keep", part.q_keep, "q_keeps", self.q_shape)
            self._keep("k_keep", part.k_keep, "k_keeps", self.k_shape)
            if part.causal:
                self._causal()
        elif isinstance(part, Documents):
            self._group("Documents", "q_ids", part.q_ids, "k_ids", part.k_ids)
            if part.causal:
                self._causal()
        elif isinstance(part, SlidingWindow):
            # A window longer than both sequences sees all: keep offsets small enough for int32.
            window = min(part.window, self.problem.seqlen_q + self.problem.seqlen_k)
            self._at_least(1 - window)
            self._below(1 if part.causal else window)
        elif isinstance(part, KeyRanges):
            self._bound("start", part.start, "starts")
            self._bound("end", part.end, "ends")
        else:
            raise unknown_pattern(part)

    def _at_least(self, offset: int) -> None:
        self.lo = offset if self.lo is None else max(self.lo, offset)

    def _below(self, offset: int) -> None:
        self.hi = offset if self.hi is None else min(self.hi, offset)

    def _causal(self, lag: int = 0, shift: int = 0) -> None:
        self._below(shift + 1 - lag)

    def _view(self, name: str, x: Any, shape: tuple[int, ...], rank: int = 3) -> Any:
        """Check device and shape of one pattern array and broadcast it by strides of 0."""
        framework = self.framework
        if not framework.owns(x):
            framework_of(name, x)  # what is no array at all, or has a mask, is told as such
            raise DeviceError(
                f"{name} must be a {framework.name} array like q, got {type(x).__module__}."
                f"{type(x).__name__}; convert one of them (torch.from_numpy, .numpy(), "
                "cupy.asarray)"
            )
        info = framework.info(x)
        if info.device != self.problem.device:
            raise DeviceError(
                f"{name} must be on {self.problem.device} like q, got {info.device}; move it there "
                "before the pattern is made"
            )
        want = shape if rank == 3 else (shape[0], shape[2])
        ok = len(info.shape) == rank and all(
            got in (1, size) for got, size in zip(info.shape, want, strict=True)
        )
        if not ok:
            axes = "(batch, heads, seqlen)" if rank == 3 else "(batch, seqlen)"
            raise ShapeError(
                f"{name} must broadcast to {axes} = {want}, got {name}.shape={info.shape}"
                f"{_advice(name.rpartition('.')[2], info.shape, want)}"
            )
        return framework.expand(framework.insert_head(x) if rank == 2 else x, shape)

    def _integer(self, name: str, x: Any, shape: tuple[int, ...], rank: int = 3) -> Any:
        """Check an integer array and widen what is neither int32 nor int64."""
        view = self._view(name, x, shape, rank)
        dtype = self.framework.info(view).dtype
        if dtype not in INT_DTYPES:
            raise DTypeError(
                f"{name} must be an integer array ({', '.join(INT_DTYPES)}), got {dtype}; cast it "
                "(.long(), .astype('int64')); flags of kept rows are QKSparse's"
            )
        if dtype in ("int32", "int64"):
            return view
        if dtype == "uint64":
            return self.framework.order_uint64(view)
        return self.framework.cast(view, "int64" if dtype == "uint32" else "int32")

    def _group(self, pattern: str, q_name: str, q: Any, k_name: str, k: Any) -> None:
        rank = 2 if pattern == "Documents" else 3
        pair = (
            self._integer(f"{pattern}.{q_name}", q, self.q_shape, rank),
            self._integer(f"{pattern}.{k_name}", k, self.k_shape, rank),
        )
        if (id(q), id(k)) in self.seen_groups:
            return  # the same clause twice, e.g. (a & b) & (a & c)
        self.seen_groups.add((id(q), id(k)))
        unsigned = [self.framework.info(x).dtype == "uint64" for x in (q, k)]
        if unsigned[0] != unsigned[1]:
            raise DTypeError(
                f"{pattern}.{q_name} and {k_name}: uint64 compares with uint64 only, "
                f"got {self.framework.info(q).dtype} and {self.framework.info(k).dtype}"
            )
        if len(self.arrays["q_groups"]) == MAX_GROUP_CLAUSES:
            raise PatternError(
                f"at most {MAX_GROUP_CLAUSES} hash or document clauses can be intersected; "
                "merge some into one integer id"
            )
        self.arrays["q_groups"].append(pair[0])
        self.arrays["k_groups"].append(pair[1])

    def _keep(self, name: str, x: Any, into: str, shape: tuple[int, ...]) -> None:
        name = f"QKSparse.{name}"
        view = self._view(name, x, shape)
        dtype = self.framework.info(view).dtype
        if dtype not in ITEMSIZE:
            raise DTypeError(f"{name} must be an array of bools or real numbers, got {dtype}")
        self.arrays[into].append(self.framework.nonzero(view))

    def _bound(self, name: str, x: Any, into: str) -> None:
        name = f"KeyRanges.{name}"
        view = self._integer(name, x, self.q_shape)
        if self.framework.info(x).dtype == "uint64":
            raise DTypeError(f"{name} must be a signed or narrower integer array, got uint64")
        self.arrays[into].append(view)


def is_monotone(pattern: Pattern) -> bool:
    """What `Clauses.monotone` will say, before lowering."""
    return not any(isinstance(part, KeyRanges) for part in pattern.parts)


def _advice(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> str:
    """What brings an array of a pattern into shape, where that can be told."""

    def fits(*shape: int) -> bool:
        pairs = zip(shape, want, strict=False)
        return len(shape) == len(want) and all(size in (1, wanted) for size, wanted in pairs)

    if len(want) == 2:
        if fits(1, *got):
            return f"; {name}[None] has the axis of sequences"
        if len(got) == 3:
            return "; ids have no axis of heads"
        if len(got) == 1 or (got[0] == 1 and name == "q_ids"):
            return "; an id for each row, and Documents.from_cu_seqlens makes them of cu_seqlens"
        if name == "k_ids":
            return "; ids of keys, where there are others than queries, are the second argument"
        return ""
    if len(got) == 4:
        return f"; of one round take {name}[0], of several scfa_core.hashing.disjoint_rounds"
    if fits(1, 1, *got):
        return f"; {name}[None, None] has the axes of sequences and heads"
    if len(got) == 2 and fits(got[0], 1, got[1]):
        return f"; {name}[:, None] has the axis of heads"
    if fits(1, *got):
        return f"; {name}[None] has the axis of sequences"
    if len(got) == 3 and fits(got[0], got[2], got[1]):
        return "; heads come before rows here, whatever layout says"
    if name.startswith("k_") and len(got) == 3 and fits(got[0], want[1], got[2]):
        return f"; keys have {want[1]} heads (heads_kv), each shared by several of the queries"
    return ""


def lower(pattern: Pattern, problem: Problem, framework: Framework) -> Clauses:
    """Lower `pattern` for `problem`; arrays of the result are `framework`'s.

    Raises
    ------
    PatternError, ShapeError, DTypeError, DeviceError
        The pattern does not fit the problem; the message names the array.
    """
    require_pattern(PATTERN_OR_PLAN, pattern)
    lowering = _Lowering(problem, framework)
    for part in pattern.parts:
        lowering.add(part)
    arrays = {name: tuple(xs) for name, xs in lowering.arrays.items()}
    return Clauses(lo_offset=lowering.lo, hi_offset=lowering.hi, **arrays)
