"""Kernels before problems: what ``scfa verify --warm`` does first.

A problem's kernels take seconds to compile, the problem itself a twentieth of one. Left to
themselves, processes compile the same kernel side by side, and wait while another compiles. Here
every kind of problem that the seeds hold is run once, tiny, and kinds that share kernels are run by
one process: all of them are compiled once, on all cores, and the others find them on disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from scfa_core import campaign, testing
from scfa_core import patterns as pt
from scfa_core.campaign import DeepProblem
from scfa_core.campaign_clauses import Shapes
from scfa_core.dispatch import load_backend
from scfa_core.lowering import is_monotone
from scfa_core.reference.backend import narrow
from scfa_core.testing import Case, Spec
from scfa_core.verify_workers import Pool, in_processes

_LOG = logging.getLogger("scfa_core")
_ROWS = 8  # of a tiny problem


class Kind(NamedTuple):
    """What decides which kernels serve a problem."""

    dtype: str
    head_dim: int
    head_dim_v: int
    softmax_scale: float | None  # 0, one negative or one positive number
    offset: tuple[bool, ...]  # of q, k, v, dout: rows do not start at multiples of 16 bytes
    monotone: bool
    group: int  # query heads of one key head


class Task(NamedTuple):
    """Kinds that one process runs on one backend; no `kinds` stands for the planner's kernels."""

    backend: str
    kinds: tuple[Kind, ...]


def kind_of(
    seed: int,
    *,
    rows: int | None,
    dtypes: tuple[str, ...],
    deep: bool,
    long: int,
    changed: bool = False,
) -> Kind | None:
    """The kind of a seed's problem; None for long ones, which are few and costly to draw."""
    from scfa_core.verify import DEFAULT_ROWS

    if deep and long and seed % long == 0:
        return None
    if deep:
        most_rows = rows or campaign.DEEP_ROWS
        problem = campaign.draw(seed, most_rows=most_rows, dtypes=dtypes, changed=changed)
        spec, views = problem.case.spec, problem.views
        monotone = is_monotone(problem.case.pattern)
    else:
        spec = testing.random_spec(seed, most_rows=rows or DEFAULT_ROWS, dtypes=dtypes)
        views = ("plain",) * 4
        monotone = not any("ranges" in part.kind for part in spec.parts)
    scale = spec.softmax_scale
    if scale:
        scale = None if scale > 0 else -0.2
    return Kind(
        *(spec.dtype, spec.head_dim, spec.head_dim_v),
        scale,
        tuple(view == "offset" for view in views),
        monotone,
        spec.heads // spec.heads_kv,
    )


def tasks_for(backends: Iterable[str], kinds: Iterable[Kind | None]) -> list[Task]:
    """Split kinds so that no two tasks need the same kernel, the longest tasks first.

    A backend whose kernels serve several head_dims says so by ``kernel_family(dtype, head_dim,
    head_dim_v)``: problems of one family share kernels.
    """
    distinct = [kind for kind in dict.fromkeys(kinds) if kind is not None]
    tasks, planners = [], []
    for backend in backends:
        family = getattr(load_backend(backend), "kernel_family", lambda *sizes: sizes)
        found: dict[object, list[Kind]] = {}
        for kind in distinct:
            found.setdefault(family(*kind[:3]), []).append(kind)
        tasks += [Task(backend, tuple(some)) for some in found.values()]
        planners.append(Task(backend, ()))
    # Kernels for tensor cores take longest.
    return planners + sorted(tasks, key=lambda task: task.kinds[0].dtype == "float32")


def run_task(task: Task) -> str | None:
    """Run the tiny problems of one task; what went wrong, if anything: seeds tell it better."""
    try:
        for problem in map(_of_kind, task.kinds) if task.kinds else _of_planner(task.backend):
            campaign.run(problem, task.backend)
    except Exception as error:
        return f"{task.backend}: {type(error).__name__}: {error}"
    return None


def _of_kind(kind: Kind) -> DeepProblem:
    pattern: pt.Pattern = pt.Causal()
    if not kind.monotone:
        start = np.zeros((1, kind.group, _ROWS), np.int64)
        pattern = pt.KeyRanges(start, start + 3)
    views = tuple("offset" if offset else "plain" for offset in kind.offset)
    return _tiny(pattern, kind, views)


def _of_planner(backend: str) -> list[DeepProblem]:
    """Ids of both widths in every combination, flags that meet, ranges of both widths."""
    shapes = Shapes((1, 1, _ROWS), (1, 1, _ROWS))
    wide, flags = np.zeros(shapes.q, np.int64), np.ones(shapes.q, bool)
    ids = (wide, wide.astype(np.int32))
    patterns: list[pt.Pattern] = [pt.HashSparse(q, k) for q in ids for k in ids]
    patterns += [pt.KeyRanges(start, start + 3) for start in ids]
    patterns.append(pt.QKSparse(flags, flags) & pt.QKSparse(flags, flags))
    kind = Kind("float32", 64, 64, None, (False,) * 4, True, 1)
    return [_tiny(pattern, kind, ("plain",) * 4) for pattern in patterns]


def _tiny(pattern: pt.Pattern, kind: Kind, views: tuple[str, ...]) -> DeepProblem:
    """A problem of one sequence and one key head."""
    spec = Spec(
        heads=kind.group,
        seqlen_q=_ROWS,
        seqlen_k=_ROWS,
        head_dim=kind.head_dim,
        head_dim_v=kind.head_dim_v,
        dtype=kind.dtype,
        softmax_scale=kind.softmax_scale,
    )
    q, k, v, dout = (
        narrow(np.zeros((1, heads, _ROWS, width)), kind.dtype)
        for heads, width in (
            (kind.group, kind.head_dim),
            (1, kind.head_dim),
            (1, kind.head_dim_v),
            (kind.group, kind.head_dim_v),
        )
    )
    return DeepProblem(Case(spec, q, k, v, dout, pattern, np.zeros((0,), bool)), views)


def warm_up(
    backends: tuple[str, ...],
    draw: Callable[[int], Kind | None],
    seeds: Iterable[int],
    pool: Pool,
    deadline: float | None,
) -> None:
    """Compile what `backends` need for the seeds; `draw` tells a seed's kind."""
    start = time.monotonic()
    tasks = tasks_for(backends, in_processes(draw, seeds, pool, deadline))
    drawn = time.monotonic()
    for trouble in in_processes(run_task, tasks, pool, deadline, "kinds of problem"):
        if trouble:
            _LOG.warning("kernels could not be made beforehand: %s", trouble)
    _LOG.info(
        "drew kinds in %.1f s, made kernels of %d tasks in %.1f s",
        drawn - start,
        len(tasks),
        time.monotonic() - drawn,
    )
