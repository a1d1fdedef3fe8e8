"""From checked arrays to a backend's verb: allocate results, hand arrays over, call.

Shared by `api` (NumPy, CuPy, ...) and the torch operators. Arrays come in (batch, heads, seqlen,
head_dim) order and checked; nothing here raises on user input.
"""

from __future__ import annotations

from typing import Any

from scfa_core.arrays import Framework
from scfa_core.dispatch import Backend
from scfa_core.lowering import Clauses
from scfa_core.plan import Plan, plan_shapes
from scfa_core.problem import Problem


def run_make_plan(
    backend: Backend, problem: Problem, clauses: Clauses, framework: Framework
) -> tuple[Any, ...]:
    """Allocate the plan's arrays and let the backend fill them; in the order of `PlanArrays`."""
    memory = backend.memory
    arrays = tuple(
        framework.empty(shape, "int32", problem.device) for shape in plan_shapes(problem, memory)
    )
    if problem.batch * problem.heads == 0:
        return arrays
    native_plan = Plan.of(arrays, clauses.monotone, backend.name, problem.device).native(
        framework, memory
    )
    native_clauses = clauses.with_arrays(framework.native(x, memory) for x in clauses.arrays)
    backend.make_plan(problem, native_clauses, native_plan, framework.context(problem.device))
    return arrays


def run_forward(
    backend: Backend,
    problem: Problem,
    plan: Plan,
    q: Any,
    k: Any,
    v: Any,
    framework: Framework,
) -> tuple[Any, Any]:
    """Return out, in q's stride order, and lse."""
    shape = (problem.batch, problem.heads, problem.seqlen_q)
    out = framework.empty_like_order(q, (*shape, problem.head_dim_v))
    lse = framework.empty(shape, "float32", problem.device)
    if problem.is_empty:
        return out, lse
    if problem.seqlen_k == 0:
        framework.fill(out, 0.0)
        framework.fill(lse, float("-inf"))
        return out, lse
    memory = backend.memory
    q, k, v, out_native, lse_native = (framework.native(x, memory) for x in (q, k, v, out, lse))
    context = framework.context(problem.device)
    backend.forward(
        problem, plan.native(framework, memory), q, k, v, out_native, lse_native, context
    )
    return out, lse


def run_backward(
    backend: Backend,
    problem: Problem,
    plan: Plan,
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    framework: Framework,
) -> tuple[Any, Any, Any]:
    """Return dq, dk, dv in the stride orders of q, k and v."""
    grads = tuple(framework.empty_like_order(x, tuple(x.shape)) for x in (q, k, v))
    if problem.is_empty or problem.seqlen_k == 0:
        for x in grads:
            framework.fill(x, 0.0)
        return grads[0], grads[1], grads[2]
    memory = backend.memory
    dout, q, k, v, out, lse = (framework.native(x, memory) for x in (dout, q, k, v, out, lse))
    dq, dk, dv = (framework.native(x, memory) for x in grads)
    context = framework.context(problem.device)
    backend.backward(
        problem, plan.native(framework, memory), dout, q, k, v, out, lse, dq, dk, dv, context
    )
    return grads[0], grads[1], grads[2]
