"""A pattern of torch tensors made into a plan, with the device of the arrays current."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from scfa_core.arrays import cuda_ordinal
from scfa_core.dispatch import Backend, Bound
from scfa_core.lowering import Clauses, is_monotone, lower
from scfa_core.patterns import Pattern
from scfa_core.plan import Plan, PlanAddresses, PlanArrays
from scfa_core.problem import Problem
from scfa_core.runner import run_make_plan
from scfa_core.torch_bound import bind_make_plan
from scfa_core.torch_calls import MAX_REMEMBERED_CALLS, Call, checked_plan_arrays
from scfa_core.torch_framework import (
    TORCH_FRAMEWORK,
    TorchContext,
    current_device,
    empty_cuda,
    raw_stream,
)
from scfa_core.torch_recipes import describe_clauses, find_recipe, read_pattern
from scfa_core.torch_storage import plan_storage


def new_plan(pattern: Pattern, problem: Problem, backend: Backend) -> Plan:
    """Lower and sort `pattern` with `backend`; its arrays are tensors of their own."""
    if backend.memory == "host":
        clauses = _lowered(pattern, problem)
        arrays = run_make_plan(backend, problem, clauses, TORCH_FRAMEWORK)
        return Plan.of(arrays, clauses.monotone, backend.name, problem.device)
    ordinal = cuda_ordinal(problem.device)
    if ordinal == current_device():
        return _plan_on_device(pattern, problem, backend, ordinal)
    with torch.cuda.device(ordinal):
        return _plan_on_device(pattern, problem, backend, ordinal)


def own_plan(
    pattern: Pattern, call: Call
) -> tuple[tuple[torch.Tensor, ...], PlanArrays | PlanAddresses]:
    """Plan for one call: its memory, to be kept until kernels are enqueued, and its native form."""
    if call.host:
        own = new_plan(pattern, call.problem, call.backend).arrays
        return own, checked_plan_arrays(own, is_monotone(pattern), call)
    if call.ordinal == current_device():
        return _own_plan_on_device(pattern, call)
    with torch.cuda.device(call.ordinal):
        return _own_plan_on_device(pattern, call)


def native_own_plan(
    own: Sequence[torch.Tensor], monotone: bool, call: Call
) -> PlanArrays | PlanAddresses:
    """The native form of what `own_plan` made, as saved tensors give it back."""
    if call.host:
        return checked_plan_arrays(own, monotone, call)
    call.storage.check(own[0], call.device)
    return call.storage.addresses(own[0], monotone)


def own_plan_tensors(own: Sequence[torch.Tensor], call: Call) -> Sequence[torch.Tensor]:
    """The seven tensors of what `own_plan` made."""
    return own if call.host else call.storage.tensors(own[0])


def _plan_on_device(pattern: Pattern, problem: Problem, backend: Backend, ordinal: int) -> Plan:
    bound, tensors, monotone = _prepare(pattern, problem, backend, ordinal)
    arrays = [
        empty_cuda(shape, strides, torch.int32)
        for shape, strides in plan_storage(problem, "cuda").facts
    ]
    plan = PlanAddresses.of([x.data_ptr() for x in arrays], monotone)
    _fill(plan, bound, tensors, problem, ordinal)
    return Plan.of(tuple(arrays), monotone, backend.name, problem.device)


def _own_plan_on_device(
    pattern: Pattern, call: Call
) -> tuple[tuple[torch.Tensor, ...], PlanAddresses]:
    problem, ordinal = call.problem, call.ordinal
    bound, tensors, monotone = _prepare(pattern, problem, call.backend, ordinal)
    storage = call.storage.allocate()
    plan = call.storage.addresses(storage, monotone)
    _fill(plan, bound, tensors, problem, ordinal)
    return (storage,), plan


def _fill(
    plan: PlanAddresses,
    bound: Bound,
    tensors: Sequence[torch.Tensor],
    problem: Problem,
    ordinal: int,
) -> None:
    """Run bound planning on tensors that the caller keeps alive."""
    if problem.batch * problem.heads:
        addresses = tuple([x.data_ptr() for x in tensors])
        bound(plan, addresses, TorchContext(ordinal, raw_stream(ordinal)))


class _Known(NamedTuple):
    """What a structure of patterns comes to."""

    bound: Bound | None  # None: tensors are converted at every call
    sources: tuple[int, ...]
    monotone: bool


_Planning = tuple[Bound, Sequence[torch.Tensor], bool]  # what runs, its tensors, monotone
_NO_RECIPE = _Known(None, (), monotone=True)
_recipes: dict[tuple[Any, ...], _Known] = {}
_bound: dict[tuple[Any, ...], Bound] = {}


def _prepare(pattern: Pattern, problem: Problem, backend: Backend, ordinal: int) -> _Planning:
    """Check `pattern` and bind its planning, or remember having done so."""
    read = read_pattern(pattern)
    if read is None:
        return _lower(pattern, problem, backend, ordinal)
    structure, tensors = read
    key = (backend, problem, structure)
    known = _recipes.get(key)
    if known is not None:
        bound, sources, monotone = known
        if bound is not None:
            return bound, [tensors[at] for at in sources], monotone
    work = _lower(pattern, problem, backend, ordinal)  # every check, with words for mistakes
    if known is None:
        recipe = find_recipe(pattern, tensors, problem, ordinal)
        known = _NO_RECIPE
        if recipe is not None:
            bound = _bind(recipe.clauses, problem, backend, ordinal)
            known = _Known(bound, recipe.sources, work[2])
        _make_room(_recipes)
        _recipes[key] = known
    return work


def _lowered(pattern: Pattern, problem: Problem) -> Clauses:
    """Clauses whose values are in memory: a lazy minus sign is not."""
    clauses = lower(pattern, problem, TORCH_FRAMEWORK)
    return clauses.with_arrays([x.resolve_neg() for x in clauses.arrays])


def _lower(pattern: Pattern, problem: Problem, backend: Backend, ordinal: int) -> _Planning:
    """Check and convert the pattern's tensors."""
    clauses = _lowered(pattern, problem)
    bound = _bind(describe_clauses(clauses, ordinal), problem, backend, ordinal)
    return bound, clauses.arrays, clauses.monotone


def _bind(clauses: Clauses, problem: Problem, backend: Backend, ordinal: int) -> Bound:
    key = (backend, problem, clauses)
    bound = _bound.get(key)
    if bound is None:
        facts = plan_storage(problem, "cuda").facts
        _make_room(_bound)
        bound = _bound[key] = bind_make_plan(backend, problem, facts, clauses, ordinal)
    return bound


def _make_room(known: dict[Any, Any]) -> None:
    if len(known) >= MAX_REMEMBERED_CALLS:
        known.clear()
