"""Verbs of a GPU backend bound to a call's facts, so that a later call passes addresses only.

A backend that cannot bind (`dispatch.BindingBackend`) has its arrays described anew each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from scfa_core.arrays import CallContext, DeviceArray
from scfa_core.dispatch import Backend, Bound
from scfa_core.lowering import Clauses
from scfa_core.plan import PlanAddresses, PlanArrays
from scfa_core.problem import Problem

Shape = tuple[int, ...]
Facts = tuple[Shape, Shape, str, int]  # a `DeviceArray` but for its pointer, heads first


def bind_attention(
    verb: str,
    backend: Backend,
    problem: Problem,
    plan: Sequence[tuple[Shape, Shape]],
    arrays: Sequence[Facts],
) -> Bound:
    """Bind `verb`, "forward" or "backward"; `plan` has shape and strides of a plan's arrays."""
    bind = getattr(backend, f"bind_{verb}", None)
    if bind is not None:
        return cast(Bound, bind(problem, *(DeviceArray(0, *facts) for facts in arrays)))
    run = getattr(backend, verb)
    device = arrays[0][3]

    def bound(at_plan: PlanAddresses, at: tuple[int, ...], ctx: CallContext) -> None:
        run(problem, _describe_plan(at_plan, plan, device), *_describe(at, arrays), ctx)

    return bound


def bind_make_plan(
    backend: Backend,
    problem: Problem,
    plan: Sequence[tuple[Shape, Shape]],
    clauses: Clauses,
    device: int,
) -> Bound:
    """Bind planning to a pattern whose clauses are described by `DeviceArray`s."""
    bind = getattr(backend, "bind_make_plan", None)
    if bind is not None:
        return cast(Bound, bind(problem, clauses, device))
    arrays = [x[1:] for x in clauses.arrays]

    def bound(at_plan: PlanAddresses, at: tuple[int, ...], ctx: CallContext) -> None:
        described = clauses.with_arrays(_describe(at, arrays))
        backend.make_plan(problem, described, _describe_plan(at_plan, plan, device), ctx)

    return bound


def _describe(at: Sequence[int], arrays: Sequence[Facts]) -> list[DeviceArray]:
    return [DeviceArray(address, *facts) for address, facts in zip(at, arrays, strict=True)]


def _describe_plan(
    at: PlanAddresses, plan: Sequence[tuple[Shape, Shape]], device: int
) -> PlanArrays:
    *addresses, monotone = at
    arrays = _describe(addresses, [(*facts, "int32", device) for facts in plan])
    return PlanArrays.of(arrays, monotone)
