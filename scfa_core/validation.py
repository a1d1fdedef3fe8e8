"""A look at what attention never sees: the values of patterns, and pairs that two of them share."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from scfa_core.api import adopt_pattern, make_plan
from scfa_core.array_kinds import adopt, framework_of
from scfa_core.errors import DeviceError, PatternError
from scfa_core.lowering import MAX_GROUP_CLAUSES, lower
from scfa_core.patterns import Documents, HashSparse, KeyRanges, Pattern, QKSparse
from scfa_core.patterns.base import PATTERN, require_pattern
from scfa_core.plan import Plan
from scfa_core.problem import build_problem, one_framework


def validate(
    pattern: Pattern | list[Pattern] | tuple[Pattern, ...],
    q: Any,
    k: Any,
    *,
    layout: str = "bhtd",
) -> None:
    """Inspect the values of a pattern, or of several, and raise where they look like a mistake.

    Attention itself never looks: ranges are clipped and flags count as kept where nonzero, on every
    backend. Call this while developing; on a GPU it copies to the host and synchronises.

    >>> from scfa_core import Causal, SlidingWindow
    >>> q = np.zeros((1, 1, 8, 16))
    >>> validate([SlidingWindow(3), Causal(lag=3)], q, q)

    Parameters
    ----------
    pattern : Pattern, or a list of them
        Those of a list are parts of a union, as `scfa_core.merging.attention_over` takes them: no
        pair may be visible in two.
    q, k : arrays
        Sizes and device are read.
    layout : "bhtd" | "bthd"

    Raises
    ------
    PatternError
        A keep flag that is neither 0 nor 1, or a range with ``start < 0``, ``end > seqlen_k`` or
        ``start > end``; the message names the first such entry. Two patterns of a list that see the
        same pair; it names the first.
    ShapeError, DTypeError, DeviceError
        As `attention`.

    Notes
    -----
    Two patterns are compared by a plan of their intersection: near-linear, no mask is made. Of a
    list all pairs are, so that n patterns take n (n - 1) / 2 plans: seconds for some fifty.
    """
    if not isinstance(pattern, (list, tuple)):
        _validate_values(pattern, q, k, layout)
        return
    if not pattern:
        raise PatternError("validate takes a pattern or a list of some, got an empty list")
    for part in pattern:
        _validate_values(part, q, k, layout)
    for (at, one), (beside, other) in combinations(enumerate(pattern), 2):
        _refuse_overlap((at, one), (beside, other), q, k, layout)


def _validate_values(pattern: Pattern, q: Any, k: Any, layout: str) -> None:
    """Look at the values of one pattern."""
    if isinstance(pattern, Plan):
        raise PatternError(f"validate takes {PATTERN}, got Plan; give what it was made of")
    require_pattern(f"validate takes {PATTERN}", pattern)
    q, k, pattern = adopt(q), adopt(k), adopt_pattern(pattern)
    framework = one_framework(q, k=k)
    problem = build_problem(framework.info(q), framework.info(k), None, layout=layout)
    lower(pattern, problem, framework)
    for part in pattern.parts:
        if isinstance(part, QKSparse):
            for name in ("q_keep", "k_keep"):
                flags = _to_numpy(getattr(part, name))
                _complain(f"QKSparse.{name}", ~((flags == 0) | (flags == 1)), flags, "0 or 1")
        elif isinstance(part, KeyRanges):
            start, end = (_to_numpy(x).astype(np.int64) for x in (part.start, part.end))
            _complain("KeyRanges.start", start < 0, start, "at least 0")
            _complain(
                "KeyRanges.end",
                end > problem.seqlen_k,
                end,
                f"at most seqlen_k={problem.seqlen_k}",
            )
            start, end = np.broadcast_arrays(start, end)
            _complain("KeyRanges.start", start > end, start, "at most end")


def _refuse_overlap(
    one: tuple[int, Pattern], other: tuple[int, Pattern], q: Any, k: Any, layout: str
) -> None:
    """Raise where two numbered patterns of a list see the same pair."""
    both = one[1] & other[1]
    clauses = sum(isinstance(part, (HashSparse, Documents)) for part in both.parts)
    if clauses > MAX_GROUP_CLAUSES:
        raise PatternError(
            f"patterns {one[0]} and {other[0]} of the list cannot be compared: together they have "
            f"{clauses} clauses of hashes and documents, and at most {MAX_GROUP_CLAUSES} can be "
            "intersected; validate them one by one"
        )
    plan = make_plan(both, q, k, layout=layout)
    start, end, q_index, k_index = (
        _to_numpy(x) for x in (plan.key_start, plan.key_end, plan.q_index, plan.k_index)
    )
    seeing = np.argwhere(end > start)
    if not len(seeing):
        return
    batch, head, row = (int(i) for i in seeing[0])
    key = k_index[batch, head * k_index.shape[1] // q_index.shape[1], start[batch, head, row]]
    raise PatternError(
        f"patterns {one[0]} and {other[0]} of the list both see query {q_index[batch, head, row]}, "
        f"key {key} (batch {batch}, head {head}), one of {plan.visible_pairs()} pairs that would "
        "count twice; narrow one, e.g. far & Causal(lag=n) beside SlidingWindow(n)"
    )


def _to_numpy(x: Any) -> np.ndarray:
    if str(getattr(x, "device", "")) == "meta":
        raise DeviceError("validate reads values, and tensors on meta have none")
    return framework_of("pattern", x).to_numpy(x)


def _complain(name: str, wrong: np.ndarray, values: np.ndarray, wanted: str) -> None:
    """Raise `PatternError` naming the first wrong entry, if there is one."""
    if not wrong.any():
        return
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    raise PatternError(
        f"{name}{list(place)} must be {wanted}, got {values[place]} "
        f"({int(wrong.sum())} such entries of {wrong.size})"
    )
