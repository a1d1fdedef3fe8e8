"""The plan: any pattern as sorted rows and one contiguous range of sorted keys per query."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from weakref import WeakSet

import numpy as np

from scfa_core.arrays import strides_in_order
from scfa_core.errors import DeviceError, DTypeError, LayoutError, PatternError, ShapeError

if TYPE_CHECKING:
    from scfa_core.arrays import Framework
    from scfa_core.problem import Problem

WORK_TILE = 64  # rows; the finest tile any kernel cuts, so that every tile has a place in `work`
WORK_COUNTERS = 32


class PlanArrays(NamedTuple):
    """What a backend sees of a plan, in native form. docs/plan.md defines every entry."""

    q_index: (
        Any  # (batch, heads, seqlen_q) int32: original row of each sorted query, dropped ones last
    )
    q_count: Any  # (batch, heads) int32: how many are kept
    k_index: Any  # (batch, heads_kv, seqlen_k) int32
    k_count: Any  # (batch, heads_kv) int32
    key_start: Any  # (batch, heads, seqlen_q) int32: range of the sorted key list, per sorted query
    key_end: Any
    work: Any  # (work_size,) int32: the backend's own; empty on the host
    monotone: bool

    @classmethod
    def of(cls, arrays: Iterable[Any], monotone: bool) -> PlanArrays:
        """Of seven arrays."""
        q_index, q_count, k_index, k_count, start, end, work = arrays
        return cls(q_index, q_count, k_index, k_count, start, end, work, monotone)


class PlanAddresses(NamedTuple):
    """`PlanArrays` in GPU memory as bare addresses; shapes follow from the problem."""

    q_index: int
    q_count: int
    k_index: int
    k_count: int
    key_start: int
    key_end: int
    work: int
    monotone: bool

    @classmethod
    def of(cls, addresses: Iterable[int], monotone: bool) -> PlanAddresses:
        """Of seven addresses."""
        q_index, q_count, k_index, k_count, start, end, work = addresses
        return cls(q_index, q_count, k_index, k_count, start, end, work, monotone)


def work_size(problem: Problem, memory: str) -> int:
    """Entries of `work`: one per tile of 64 sorted rows, queries then keys, and a few counters."""
    if memory == "host":
        return 0
    tiles_q = problem.heads * -(-problem.seqlen_q // WORK_TILE)
    tiles_k = problem.heads_kv * -(-problem.seqlen_k // WORK_TILE)
    return problem.batch * (tiles_q + tiles_k) + WORK_COUNTERS


def plan_shapes(problem: Problem, memory: str) -> tuple[tuple[int, ...], ...]:
    """Shapes of the arrays of a plan, in the order of `PlanArrays`."""
    q_shape = (problem.batch, problem.heads, problem.seqlen_q)
    k_shape = (problem.batch, problem.heads_kv, problem.seqlen_k)
    work = (work_size(problem, memory),)
    return q_shape, q_shape[:2], k_shape, k_shape[:2], q_shape, q_shape, work


@dataclass(frozen=True, repr=False, eq=False)
class Plan:
    """A pattern, lowered and sorted for one set of sizes; reuse it over layers and steps.

    Made by `scfa_core.make_plan`. Arrays are of the caller's kind and on its device; they hold no
    scores and no values, only rows and ranges: 12 bytes per query row, 4 per key row, and the
    backend's work list.

    Attributes
    ----------
    q_index, q_count : int32, (batch, heads, seqlen_q), (batch, heads)
        Original row of each sorted query (kept ones first), and how many are kept.
    k_index, k_count : int32, (batch, heads_kv, seqlen_k), (batch, heads_kv)
        The same of the keys.
    key_start, key_end : int32, (batch, heads, seqlen_q)
        Sorted query r sees ``k_index[key_start[r]:key_end[r]]``.
    monotone : bool
        Whether ranges never step back along the sorted queries.
    backend : str
        Who made it, and whose work list it carries.
    """

    q_index: Any
    q_count: Any
    k_index: Any
    k_count: Any
    key_start: Any
    key_end: Any
    work: Any
    monotone: bool
    backend: str
    device: str

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The arrays in the order of `PlanArrays`."""
        return (
            self.q_index,
            self.q_count,
            self.k_index,
            self.k_count,
            self.key_start,
            self.key_end,
            self.work,
        )

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(batch, heads, heads_kv, seqlen_q, seqlen_k)."""
        batch, heads, seqlen_q = self.q_index.shape
        return (batch, heads, self.k_index.shape[1], seqlen_q, self.k_index.shape[2])

    @classmethod
    def of(cls, arrays: tuple[Any, ...], monotone: bool, backend: str, device: str) -> Plan:
        """Make a plan of arrays in the order of `PlanArrays`."""
        q_index, q_count, k_index, k_count, start, end, work = arrays
        return cls(q_index, q_count, k_index, k_count, start, end, work, monotone, backend, device)

    def native(self, framework: Framework, memory: str) -> PlanArrays:
        """Hand the arrays to a backend."""
        return PlanArrays.of((framework.native(x, memory) for x in self.arrays), self.monotone)

    def check_library(self, framework: Framework) -> None:
        """Raise unless all arrays are of this library."""
        for x in (self.q_index, self.k_index):
            if not framework.owns(x):
                raise DeviceError(
                    f"the plan holds arrays of {type(x).__module__}, q is a "
                    f"{framework.name} array; make a plan with arrays of that library"
                )
        for name, x in zip(PlanArrays._fields[:-1], self.arrays, strict=True):
            if not framework.owns(x):
                raise DeviceError(
                    f"plan.{name} must be a {framework.name} array like q, got "
                    f"{type(x).__name__}; take a plan as make_plan gives it"
                )

    def check_fits(self, problem: Problem, framework: Framework) -> None:
        """Raise unless the plan was made for these sizes, on this device, by this library."""
        self.check_library(framework)
        want = (
            problem.batch,
            problem.heads,
            problem.heads_kv,
            problem.seqlen_q,
            problem.seqlen_k,
        )
        if self.sizes != want:
            batch, heads, heads_kv, seqlen_q, seqlen_k = self.sizes
            swapped = (batch, seqlen_q, seqlen_k, heads, heads_kv) == want
            raise ShapeError(
                "the plan was made for (batch, heads, heads_kv, seqlen_q, seqlen_k) = "
                f"{self.sizes}, got arrays with {want}; make a plan for these"
                + (": make_plan takes their layout as well" if swapped else "")
            )
        if self.device != problem.device:
            raise DeviceError(
                f"the plan lives on {self.device}, q on {problem.device}; make a plan there"
            )
        if self not in _checked:
            self._check_arrays(problem, framework)
            _checked.add(self)

    def _check_arrays(self, problem: Problem, framework: Framework) -> None:
        """Raise where a plan made by hand holds arrays that backends would misread."""
        shapes = plan_shapes(problem, "cuda" if problem.device.startswith("cuda") else "host")
        for name, x, shape in zip(PlanArrays._fields[:-1], self.arrays, shapes, strict=True):
            info = framework.info(x)
            if info.shape != shape:
                raise ShapeError(f"plan.{name} must have shape {shape}, got {info.shape}")
            if info.dtype != "int32":
                raise DTypeError(f"plan.{name} must be int32, got {info.dtype}")
            if info.device != problem.device:
                raise DeviceError(f"plan.{name} must be on {problem.device}, got {info.device}")
            dense = strides_in_order(shape, tuple(range(len(shape))))
            steps = zip(shape, info.strides, dense, strict=True)
            if 0 not in shape and any(n > 1 and got != want for n, got, want in steps):
                raise LayoutError(f"plan.{name} must be contiguous, got strides {info.strides}")

    def _host(self, *names: str) -> list[np.ndarray]:
        from scfa_core.array_kinds import framework_of

        framework = framework_of("plan", self.q_index)
        return [framework.to_numpy(getattr(self, name)) for name in names]

    def nbytes(self) -> int:
        """Bytes that the plan's arrays hold."""
        return sum(4 * int(np.prod(x.shape)) for x in self.arrays)

    def visible_pairs(self) -> int:
        """Number of (query, key) pairs computed; copies to the host, so it synchronises."""
        start, end = self._host("key_start", "key_end")
        return int((end.astype(np.int64) - start).sum())

    def density(self) -> float:
        """Visible pairs over batch * heads * seqlen_q * seqlen_k; synchronises."""
        batch, heads, _, seqlen_q, seqlen_k = self.sizes
        total = batch * heads * seqlen_q * seqlen_k
        return self.visible_pairs() / total if total else 0.0

    def to_dense(self) -> np.ndarray:
        """The mask this plan computes: bool (batch, heads, seqlen_q, seqlen_k) on the host."""
        q_index, k_index, start, end = self._host("q_index", "k_index", "key_start", "key_end")
        batch, heads, heads_kv, seqlen_q, seqlen_k = self.sizes
        mask = np.zeros((batch, heads, seqlen_q, seqlen_k), bool)
        place = np.arange(seqlen_k)
        for b in range(batch):
            for h in range(heads):
                rows = (place >= start[b, h, :, None]) & (place < end[b, h, :, None])
                keys = k_index[b, h * heads_kv // heads]
                mask[b, h, q_index[b, h][:, None], keys[None, :]] = rows
        return mask

    def plot(self, batch: int = 0, head: int = 0, *, block: int = 64) -> Any:
        """Draw the mask of one head with the tiles that are visited; needs the extra ``plot``."""
        from scfa_core.plotting import plot_plan

        return plot_plan(self, batch, head, block=block)

    def __and__(self, other: object) -> NoReturn:
        raise PatternError(
            "a plan is not narrowed: intersect the patterns, then make the plan of a & b"
        )

    __rand__ = __and__

    def __repr__(self) -> str:
        batch, heads, heads_kv, seqlen_q, seqlen_k = self.sizes
        order = "monotone" if self.monotone else "any order"
        size = self.nbytes() / 1024
        held = f"{size:.1f} KiB" if size < 1024 else f"{size / 1024:.1f} MiB"
        return (
            f"Plan(batch={batch}, heads={heads}, heads_kv={heads_kv}, seqlen_q={seqlen_q}, "
            f"seqlen_k={seqlen_k}, ranges {order}, {held} on "
            f"{self.device}, backend={self.backend!r})"
        )


_checked: WeakSet[Plan] = WeakSet()  # plans whose arrays were looked at
