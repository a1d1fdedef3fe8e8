"""How DTensor may shard the registered operators: by batch and by heads, which are independent.

Importing this module registers the rules, each for one mesh dimension: placements of the outputs,
and of the inputs (None where one is no tensor). Calls that meet a DTensor import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import prod
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from scfa_core.problem import check_layout
from scfa_core.torch_choosing import TOP_BLOCKS
from scfa_core.torch_hashing import ANGULAR_HASH, PAST_HASH
from scfa_core.torch_ops import BACKWARD, FORWARD, MAKE_PLAN
from scfa_core.torch_union_ops import ATTEND_UNION, ATTEND_UNION_BACKWARD, SINKS_BACKWARD

Placements = list[Any]
Rule = tuple[Placements, Placements]


def _axes(q: Any, k: Any, layout: str) -> list[tuple[int, int]]:
    """Return pairs of (axis of q, k, v; axis of lse and plan) that may be sharded: batch and heads.

    Grouped heads need shares that hold whole groups.
    """
    heads_axis = 2 if check_layout(layout) else 1
    heads, heads_kv = q.shape[heads_axis], k.shape[heads_axis]
    even = heads == heads_kv or _splits_evenly(heads_kv, q.mesh.shape)
    return [(0, 0), (heads_axis, 1)] if even else [(0, 0)]


def _splits_evenly(size: int, mesh: Sequence[int]) -> bool:
    """Whether shares of `size` are equal, whichever dimensions of the mesh share it.

    More shares than `size` has are no way to share: DTensor leaves those out.
    """
    ways = (prod(dims) for n in range(1, len(mesh) + 1) for dims in combinations(mesh, n))
    return all(size % ranks == 0 for ranks in ways if ranks <= size)


def _plan_placements(placement: Any) -> Placements:
    """Placements of a plan's tensors; `work`, each rank's own scratch, is never moved."""
    return [placement] * 6 + [Replicate()]


@register_sharding(FORWARD)
def _shard_forward(q: Any, k: Any, v: Any, *rest: Any) -> Sequence[Rule]:
    """Shardings of ``scfa::forward``."""
    tail: Placements = [None] * 5  # monotone, scale, deterministic, layout, backend
    rules = [([Replicate()] * 2, [Replicate()] * 10 + tail)]
    for axis, plan_axis in _axes(q, k, rest[-2]):
        x, p = Shard(axis), Shard(plan_axis)
        rules.append(([x, p], [x, x, x, *_plan_placements(p), *tail]))
    return rules


@register_sharding(BACKWARD)
def _shard_backward(dout: Any, dlse: Any, q: Any, k: Any, v: Any, *rest: Any) -> Sequence[Rule]:
    """Shardings of ``scfa::backward``."""
    tail: Placements = [None] * 5
    has_dlse = dlse is not None
    first: Placements = [Replicate(), Replicate() if has_dlse else None]
    rules = [([Replicate()] * 3, [*first, *[Replicate()] * 12, *tail])]
    for axis, plan_axis in _axes(q, k, rest[-2]):
        x, p = Shard(axis), Shard(plan_axis)
        inputs = [x, p if has_dlse else None, x, x, x, x, p, *_plan_placements(p), *tail]
        rules.append(([x] * 3, inputs))
    return rules


@register_sharding(ATTEND_UNION)
def _shard_attend_union(
    q: Any, k: Any, v: Any, sinks: Any, plans: Any, *rest: Any
) -> Sequence[Rule]:
    """Shardings of ``scfa::attend_union``: those of ``scfa::forward``, for all plans alike."""
    tail: Placements = [None] * 5
    parts = len(rest[0])
    whole = [Replicate()] * len(plans) + tail
    rules = [([Replicate()] * 2, [*[Replicate()] * 3, _of_sinks(sinks, 0), *whole])]
    for axis, plan_axis in _axes(q, k, rest[-2]):
        x, p = Shard(axis), Shard(plan_axis)
        inputs = [x, x, x, _of_sinks(sinks, plan_axis), *_plan_placements(p) * parts, *tail]
        rules.append(([x, p], inputs))
    return rules


def _of_sinks(sinks: Any, plan_axis: int) -> Any:
    """Placement of sinks, which go with heads, where there are any."""
    if sinks is None:
        return None
    return Shard(0) if plan_axis == 1 else Replicate()


@register_sharding(SINKS_BACKWARD)
def _shard_sinks_backward(dout: Any, out: Any, lse: Any, sinks: Any, layout: str) -> Sequence[Rule]:
    """Shardings of ``scfa::sinks_backward``: shares of a batch have a sum each."""
    whole = Replicate()
    heads = Shard(2 if check_layout(layout) else 1)
    return [
        ([whole], [whole] * 4 + [None]),
        ([Shard(0)], [heads, heads, Shard(1), Shard(0), None]),
        ([Partial()], [Shard(0), Shard(0), Shard(0), whole, None]),
    ]


@register_sharding(ATTEND_UNION_BACKWARD)
def _shard_attend_union_backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, plans: Any, *rest: Any
) -> Sequence[Rule]:
    """Shardings of ``scfa::attend_union_backward``."""
    tail: Placements = [None] * 5
    parts = len(rest[0])
    rules = [([Replicate()] * 3, [Replicate()] * (6 + len(plans)) + tail)]
    for axis, plan_axis in _axes(q, k, rest[-2]):
        x, p = Shard(axis), Shard(plan_axis)
        rules.append(([x] * 3, [*[x] * 5, p, *_plan_placements(p) * parts, *tail]))
    return rules


@register_sharding(MAKE_PLAN)
def _shard_make_plan(
    q: Any, k: Any, pattern: str, arrays: Sequence[Any], ints: Any, layout: str, backend: str
) -> Sequence[Rule]:
    """Shardings of ``scfa::make_plan``; axes of length 1 broadcast and stay whole."""
    tail: Placements = [None] * 3  # ints, layout, backend
    whole: Placements = [Replicate()] * (2 + len(arrays))
    rules = [([Replicate()] * 7, [*whole[:2], None, *whole[2:], *tail])]
    for axis, plan_axis in _axes(q, k, layout):
        held: Placements = []
        for x in arrays:
            has_axis = len(x.shape) == 3 or plan_axis == 0
            spread = has_axis and x.shape[plan_axis] > 1
            held.append(Shard(plan_axis) if spread else Replicate())
        outputs = _plan_placements(Shard(plan_axis))
        rules.append((outputs, [Shard(axis), Shard(axis), None, *held, *tail]))
    return rules


@register_sharding(ANGULAR_HASH)
def _shard_angular_hash(x: Any, directions: Any, center: Any) -> Sequence[Rule]:
    """Shardings of ``scfa::angular_hash``: its rows are independent, so seqlen may be cut too.

    Tables go with the heads that read them; those of a single head serve every rank whole.
    """
    whole = Replicate()
    of_rows = center is not None and len(center.shape) == 4  # a center for every few rows
    tables = [(directions, 1), (center, int(of_rows))]  # and the axis of heads

    def held(spread: bool) -> Placements:
        return [
            None if y is None else Shard(axis) if spread and y.shape[axis] > 1 else whole
            for y, axis in tables
        ]

    rules: list[Rule] = [([whole], [whole, *held(False)])]
    of_batch = [whole, Shard(0)] if of_rows else held(False)
    rules.append(([Shard(1)], [Shard(0), *of_batch]))
    if not of_rows:  # a rank's rows need not begin with a center's
        rules.append(([Shard(3)], [Shard(2), *held(False)]))
    own = [y.shape[axis] for y, axis in tables if y is not None]
    if all(n in (1, x.shape[1]) or _splits_evenly(n, x.mesh.shape) for n in own):
        rules.append(([Shard(2)], [Shard(1), *held(True)]))
    return rules


@register_sharding(PAST_HASH)
def _shard_past_hash(x: Any, directions: Any, start: Any, even: bool = False) -> Sequence[Rule]:
    """Shardings of ``scfa::past_hash``: sequences and heads are independent, rows are not."""
    whole = Replicate()
    rules: list[Rule] = [
        ([whole] * 2, [*[whole] * 3, None]),
        ([Shard(1), Shard(0)], [Shard(0), whole, whole, None]),
    ]
    tables = [(directions, 1), (start, 0)]  # and the axis of heads
    own = [y.shape[axis] for y, axis in tables]
    if all(n in (1, x.shape[1]) or _splits_evenly(n, x.mesh.shape) for n in own):
        held = [Shard(axis) if y.shape[axis] > 1 else whole for y, axis in tables]
        rules.append(([Shard(2), Shard(1)], [Shard(1), *held, None]))
    return rules


@register_sharding(TOP_BLOCKS)
def _shard_top_blocks(scores: Any, *sizes: Any) -> Sequence[Rule]:
    """Shardings of ``scfa::top_blocks``: sequences and heads are independent, rows are counted."""
    whole, rest = Replicate(), [None] * len(sizes)
    return [
        ([whole], [whole, *rest]),
        ([Shard(1)], [Shard(0), *rest]),
        ([Shard(2)], [Shard(1), *rest]),
    ]
