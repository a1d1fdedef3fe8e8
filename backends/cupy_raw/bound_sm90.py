"""The Hopper kernels bound to a call's facts: launches that are ready but for their addresses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from scfa_core.backends.cupy_raw import launch_sm90 as sm90
from scfa_core.backends.cupy_raw.loader import Kernel, multiprocessors, side_by_side
from scfa_core.backends.cupy_raw.prepared import Launch, Template, marks
from scfa_core.backends.cupy_raw.shapes_sm90 import (
    DKDV,
    DQ,
    FORWARD,
    FUSED,
    FUSED_KERNELS,
    PREPARE,
    SHARED,
    Shape,
    shape_of,
    tiles_of,
)
from scfa_core.backends.cupy_raw.tensor_maps import NO_MAPS, tensor_maps

from scfa_core.arrays import DeviceArray
from scfa_core.environment import Choice
from scfa_core.plan import PlanAddresses, PlanArrays

if TYPE_CHECKING:
    from scfa_core.arrays import CallContext
    from scfa_core.dispatch import Bound
    from scfa_core.problem import Problem

__all__ = ["bind_backward", "bind_forward"]

_asked = Choice("SCFA_CUPY_BACKWARD", "auto", "fused", "split")
_PLAN_SLOTS = 6  # arrays of a plan that kernels read: all but `work`


class _Marked:
    """Stand-ins for arrays, a plan and addresses of workspace, in the order of a call's addresses.

    Attributes
    ----------
    arrays, plan, workspace : stand-ins, whose addresses are `marks`
    """

    def __init__(self, described: tuple[DeviceArray, ...], monotone: bool, workspace: int) -> None:
        lists = len(described)
        self._slots = lists + _PLAN_SLOTS + workspace
        at = marks(self._slots)
        self.arrays = [x._replace(pointer=mark) for x, mark in zip(described, at, strict=False)]
        lists_at = at[lists : lists + _PLAN_SLOTS]
        plan = [DeviceArray(mark, (), (), "int32", described[0].device) for mark in lists_at]
        self.plan = PlanArrays.of([*plan, None], monotone)
        self.workspace = at[lists + _PLAN_SLOTS :]

    def bind(self, params: bytes, enqueue: Callable[[int, bytes], None]) -> Launch:
        """A kernel's bound launch with arguments that were packed with the stand-ins."""
        return Template(params, self._slots).bind(enqueue)


def _counters(ctx: CallContext, device: int) -> int:
    """Address of two zeroed words for this call alone."""
    take = getattr(ctx, "counters", None)
    if take is not None:
        return int(take())
    at: int = ctx.empty((2,), "int32").pointer
    sm90._zero(at, 8, ctx.stream, device)
    return at


def bind_forward(problem: Problem, monotone: bool, *described: DeviceArray) -> Bound:
    """Settle all of the forward but addresses: every element of `out` and `lse` is written.

    `described` are q, k, v, out, lse as `supports_forward` was shown them.
    """
    marked = _Marked(described, monotone, 1)
    q, k, v, out, lse = marked.arrays
    head_dim, device = problem.head_dim, q.device
    shape = FORWARD[head_dim]
    tiles = tiles_of(problem.seqlen_q, 64 * shape.warpgroups, problem.batch * problem.heads)
    arrays = (q, k, v, out, None, None, None, None)
    (counter,) = marked.workspace
    maps = tensor_maps(k, v)
    params = sm90._params(
        *(problem, marked.plan, arrays, lse, (0, 0), counter, tiles, problem.heads),
        maps=maps or NO_MAPS,
        in_turn=sm90._in_turn(problem.batch * problem.heads),
    )
    kernel = sm90._kernel(
        "fwd_sm90", device, problem.dtype, head_dim, shape, monotone, mapped=maps is not None
    )
    shared = SHARED["fwd_sm90"](head_dim, shape)
    launch = marked.bind(params, sm90._persistent(kernel, device, shape, shared, tiles[1]))

    def run(plan: PlanAddresses, arrays: tuple[int, ...], ctx: CallContext) -> None:
        launch(ctx.stream, (*arrays, *plan[:_PLAN_SLOTS], _counters(ctx, device)))

    return run


def bind_backward(problem: Problem, monotone: bool, *described: DeviceArray) -> Bound:
    """Settle all of the backward but addresses: every element is written, in a fixed order.

    `described` are dout, q, k, v, out, lse, dq, dk, dv as `supports_backward` was shown them.

    Notes
    -----
    Bitwise deterministic. $SCFA_CUPY_BACKWARD: "split" is a kernel for dq and one for dk and dv,
    with 8 bytes of workspace a query row (lse in base 2 and delta, in sorted order); "fused" is one
    kernel for all three where it serves, with the sums of dq as well (`_sum_slots`); "auto", the
    default, is fused at head_dim 64 and lets the GPU choose for each key head at 128, split where
    there are few keys.

    Of ranges that the host does not know to be in order (`monotone` False) the GPU finds out, with
    8 more bytes a query row (their envelopes). Unless all are asked to go the "split" way it is
    then given a choice at head_dim 64 as well, and so room for sums of dq, whether or not it comes
    to use: a key head goes the fused way only where the ranges of all its query heads are in order.
    "fused" means that even of few keys.
    """
    bound: dict[str | None, Bound] = {}

    def run(plan: PlanAddresses, arrays: tuple[int, ...], ctx: CallContext) -> None:
        asked = _asked.get()
        chosen = bound.get(asked)
        if chosen is None:
            ways = _ways(problem, asked, monotone)
            chosen = bound[asked] = _Backward(problem, monotone, described, *ways)
        chosen(plan, arrays, ctx)

    return run


def _ways(problem: Problem, asked: str | None, monotone: bool = True) -> tuple[bool, bool]:
    """Whether the split and the fused kernels are launched, with $SCFA_CUPY_BACKWARD `asked`."""
    way = _asked.word(asked)
    serves = problem.head_dim in FUSED and sm90._sums_fit(problem)
    if not serves or way == "split":
        return True, False
    if way == "fused":
        return not monotone, True
    # A few keys: the split kernels are faster in any order.
    if problem.seqlen_k <= sm90._FEW_KEYS[problem.head_dim]:
        return True, False
    return not monotone or problem.head_dim in sm90._LONG_KEYS, True


class _Backward:
    """The launches of one backward: of one way, or of a choice and both ways after it."""

    def __init__(
        self,
        problem: Problem,
        monotone: bool,
        described: tuple[DeviceArray, ...],
        split: bool,
        fused: bool,
    ) -> None:
        self.problem, self.device, self.monotone = problem, described[0].device, monotone
        self.rows = problem.batch * problem.heads * problem.seqlen_q
        self.query_tiles, self.jobs = tiles_of(
            problem.seqlen_q, sm90._SUM_ROWS, problem.batch * problem.heads
        )
        self.slots = sm90._sum_slots(problem) if fused else 0
        self.records = 0  # words of the records of key tiles
        if fused:
            key_tiles = self._key_tiles(FUSED[problem.head_dim])[1]
            self.records = key_tiles * sm90._record_words(problem)
        self.both = split and fused
        heads = problem.heads_kv if monotone else problem.heads_kv + 2 * problem.heads
        self.choice_words = sm90._CHOICE_WORDS + problem.batch * heads
        self.marked = _Marked(described, monotone, 12)
        dout, q, *_ = self.marked.arrays
        self.maps = tensor_maps(q, dout)
        self._load(split, fused)
        launches = [] if monotone else [self._envelopes()]
        launches += [self._choose()] if self.both else []
        launches += self._split() if split else []
        launches += self._fused() if fused else []
        self.launches = tuple(launches)

    def __call__(self, plan: PlanAddresses, arrays: tuple[int, ...], ctx: CallContext) -> None:
        stats = ctx.empty((2 * self.rows + 1,), "float32").pointer  # the first: of absent rows
        choice = counted = key_tiles = added = sums = envelopes = 0
        if self.both:
            counted = _counters(ctx, self.device)
            choice = ctx.empty((self.choice_words,), "int32").pointer
            first = choice + 4 * sm90._CHOICE_COUNTERS
            counters = (first, first + 4, first + 8)
        else:
            first = _counters(ctx, self.device)
            counters = (first, first + 4, first)
        if self.slots:
            rows = self.slots * self.query_tiles * sm90._SUM_ROWS
            key_tiles = ctx.empty((self.records + self.jobs,), "int32").pointer
            added = key_tiles + 4 * self.records
            sums = ctx.empty((rows * self.problem.head_dim,), "float32").pointer
        if not self.monotone:
            envelopes = ctx.empty((2 * self.rows,), "int32").pointer
        workspace = (
            *(stats + 4, stats + 4 * (1 + self.rows), *counters, added, sums, choice),
            *(envelopes, envelopes + 4 * self.rows, key_tiles, counted),
        )
        addresses = (*arrays, *plan[:_PLAN_SLOTS], *workspace)
        for launch in self.launches:
            launch(ctx.stream, addresses)

    def _params(self, counter: int, tiles: tuple[int, int], heads: int, in_turn: int = 0) -> bytes:
        """Pack the arguments of one kernel; workspace 2, 3, 4 and 11 are the counters."""
        dout, q, k, v, out, lse, dq, dk, dv = self.marked.arrays
        lse_log2, delta, *_, added, dq_sum, choice, starts, ends, records, _ = self.marked.workspace
        sums = sm90.Sums(dq_sum, added, max(self.slots, 1), self.query_tiles)
        return sm90._params(
            self.problem,
            self.marked.plan,
            (q, k, v, out, dout, dq, dk, dv),
            lse,
            (lse_log2, delta),
            self.marked.workspace[counter],
            tiles,
            heads,
            sums if self.slots else sm90._NO_SUMS,
            choice if self.both else 0,
            (0, 0) if self.monotone else (starts, ends),
            records if self.slots else 0,
            self.maps or NO_MAPS,
            in_turn,
        )

    def _key_tiles(self, shape: Shape) -> tuple[int, int]:
        heads = self.problem.batch * self.problem.heads_kv
        return tiles_of(self.problem.seqlen_k, 64 * shape.warpgroups, heads)

    def _load(self, split: bool, fused: bool) -> None:
        """Compile what takes longest at once, the first time."""
        problem, head_dim = self.problem, self.problem.head_dim
        shapes = {}
        if split:
            tables = {"bwd_dq_sm90": DQ, "bwd_dkdv_sm90": DKDV}
            shapes = {x: shape_of(tables[x], head_dim, self.monotone) for x in tables}
        if fused:
            shapes[FUSED_KERNELS[head_dim]] = FUSED[head_dim]
            shapes["bwd_prepare_sm90"] = PREPARE[head_dim]
        which = (self.device, problem.dtype, head_dim, self.monotone, self.maps is not None)
        makers = [partial(self._kernel, name, shape) for name, shape in shapes.items()]
        side_by_side((*shapes, *which), makers)

    def _kernel(self, name: str, shape: Shape) -> Kernel:
        problem = self.problem
        return sm90._kernel(
            *(name, self.device, problem.dtype, problem.head_dim, shape, self.monotone),
            mapped=self.maps is not None,
        )

    def _tiled(self, name: str, shape: Shape, tiles: int, params: bytes) -> Launch:
        """A kernel of persistent blocks."""
        shared = SHARED[name](self.problem.head_dim, shape)
        enqueue = sm90._persistent(self._kernel(name, shape), self.device, shape, shared, tiles)
        return self.marked.bind(params, enqueue)

    def _envelopes(self) -> Launch:
        heads = self.problem.batch * self.problem.heads
        # A tile is a whole list: of all query rows there may be more than a tile count can say.
        params = self._params(2, (1, heads), self.problem.heads)
        kernel = sm90._envelope_kernel(self.device)
        return self.marked.bind(params, kernel.bind((2 * heads, 1, 1), 1024, 0))

    def _choose(self) -> Launch:
        tiles = self._key_tiles(FUSED[self.problem.head_dim])
        params = self._params(11, tiles, self.problem.heads_kv)
        kernel = sm90._choose_kernel(self.device, self.problem.head_dim, self.monotone)
        blocks = -(-self.problem.batch * self.problem.heads_kv // 4)
        return self.marked.bind(params, kernel.bind((blocks, 1, 1), 32, 0))

    def _split(self) -> list[Launch]:
        """The dq kernel, then the dk/dv kernel."""
        problem, head_dim = self.problem, self.problem.head_dim
        dq, dkdv = (shape_of(shapes, head_dim, self.monotone) for shapes in (DQ, DKDV))
        heads = problem.batch * problem.heads
        tiles = tiles_of(problem.seqlen_q, 64 * dq.warpgroups, heads)
        key_tiles = self._key_tiles(dkdv)
        to_dkdv = self._params(3, key_tiles, problem.heads_kv)
        return [
            self._tiled("bwd_dq_sm90", dq, tiles[1], self._params(2, tiles, problem.heads)),
            self._tiled("bwd_dkdv_sm90", dkdv, key_tiles[1], to_dkdv),
        ]

    def _fused(self) -> list[Launch]:
        """The kernel that prepares rows and tiles, then that which makes dq, dk and dv together."""
        head_dim = self.problem.head_dim
        shape = FUSED[head_dim]
        tiles = self._key_tiles(shape)
        in_turn = sm90._fused_in_turn(self.problem, self.slots)
        params = self._params(4, tiles, self.problem.heads_kv, in_turn)
        kernel = self._kernel("bwd_prepare_sm90", PREPARE[head_dim])
        wanted = self.jobs + -(-tiles[1] // sm90._PREPARE_WARPS)  # for rows and for tiles
        blocks = min(max(wanted, 2), sm90._PREPARE_BLOCKS[head_dim] * multiprocessors(self.device))
        prepare = kernel.bind((blocks, 1, 1), 32 * sm90._PREPARE_WARPS, 0)
        return [
            self.marked.bind(params, prepare),
            self._tiled(FUSED_KERNELS[head_dim], shape, tiles[1], params),
        ]
