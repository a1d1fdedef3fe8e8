"""A pattern of torch tensors made into a plan, with the device of the arrays current."""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import torch

from scfa_core.arrays import DeviceArray, cuda_ordinal, strides_in_order
from scfa_core.dispatch import Backend
from scfa_core.lowering import Clauses, lower
from scfa_core.patterns import Pattern
from scfa_core.plan import Plan, PlanArrays, plan_shapes
from scfa_core.problem import Problem
from scfa_core.runner import run_make_plan
from scfa_core.torch_calls import MAX_REMEMBERED_CALLS, Seven, Shape
from scfa_core.torch_framework import TORCH_FRAMEWORK, TorchContext, dtype_name, raw_stream


def new_plan(pattern: Pattern, problem: Problem, backend: Backend) -> Plan:
    """Lower and sort `pattern` with `backend`."""
    clauses = lower(pattern, problem, TORCH_FRAMEWORK)
    ordinal = cuda_ordinal(problem.device)
    if ordinal < 0 or backend.memory == "host":
        arrays = run_make_plan(backend, problem, clauses, TORCH_FRAMEWORK)
    elif ordinal == torch.cuda.current_device():
        arrays = _plan_on_device(problem, clauses, backend, ordinal)
    else:
        with torch.cuda.device(ordinal):
            arrays = _plan_on_device(problem, clauses, backend, ordinal)
    return Plan(*cast(Seven, arrays), clauses.monotone, backend.name, problem.device)


@lru_cache(MAX_REMEMBERED_CALLS)
def _plan_facts(problem: Problem) -> tuple[tuple[Shape, Shape], ...]:
    """Shape and strides of each array of a plan on a GPU."""
    shapes = plan_shapes(problem, "cuda")
    return tuple((shape, strides_in_order(shape, tuple(range(len(shape))))) for shape in shapes)


def _plan_on_device(
    problem: Problem, clauses: Clauses, backend: Backend, ordinal: int
) -> tuple[torch.Tensor, ...]:
    """As `run_make_plan`, without asking torch what is known of the plan's arrays."""
    device = torch.device("cuda", ordinal)
    facts = _plan_facts(problem)
    arrays = tuple(torch.empty(shape, dtype=torch.int32, device=device) for shape, _ in facts)
    if problem.batch * problem.heads == 0:
        return arrays
    addressed = (
        DeviceArray(x.data_ptr(), *known, "int32", ordinal)
        for x, known in zip(arrays, facts, strict=True)
    )
    native = PlanArrays(*cast(Seven, tuple(addressed)), clauses.monotone)

    def addresses(tensors: tuple[torch.Tensor, ...]) -> tuple[DeviceArray, ...]:
        return tuple(
            DeviceArray(x.data_ptr(), tuple(x.shape), x.stride(), dtype_name(x.dtype), ordinal)
            for x in tensors
        )

    given = Clauses(
        addresses(clauses.q_groups),
        addresses(clauses.k_groups),
        addresses(clauses.q_keeps),
        addresses(clauses.k_keeps),
        clauses.lo_offset,
        clauses.hi_offset,
        addresses(clauses.starts),
        addresses(clauses.ends),
    )
    backend.make_plan(problem, given, native, TorchContext(device, ordinal, raw_stream(ordinal)))
    return arrays
