"""Random problems on one backend against the reference: what ``scfa verify`` runs.

The truth comes from the dense mask in float64 (`testing.truth`), never from a plan; the plan is
compared entry by entry with the reference planner's. With two backends each is held against the
truth, and then the one against the other (`verify_against`). One seed is one problem, on every
machine.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from scfa_core import testing
from scfa_core.api import attention, attention_backward, make_plan
from scfa_core.dispatch import check_name, load_backend, unavailable_reason
from scfa_core.errors import BackendUnavailable, ScfaError, UnknownBackend
from scfa_core.patterns.base import map_arrays
from scfa_core.verify_against import (
    Fields,
    Rule,
    allowances_of,
    differing_entries,
    multiplies_tf32,
    on_host,
    row_verdicts,
)
from scfa_core.verify_bits import changed_bits
from scfa_core.verify_findings import Finding

if TYPE_CHECKING:
    from scfa_core.campaign import Drawn
    from scfa_core.campaign_blocks import Answers
    from scfa_core.patterns import Pattern

HOST_DTYPES = ("float32", "float64", "float16", "bfloat16")
CUDA_DTYPES = ("float16", "bfloat16", "float32")
PLAN_FIELDS = ("q_index", "q_count", "k_index", "k_count", "key_start", "key_end")
DEFAULT_ROWS = 200


def drawn_dtypes(*backends: str) -> tuple[str, ...]:
    """The element types that all of the backends are given.

    They depend on nothing else, so that seeds keep their meaning.
    """
    dtypes: tuple[str, ...] = HOST_DTYPES
    for backend in backends:
        check_name(backend)
        if backend == "auto":
            raise UnknownBackend("verify needs the name of one backend, got 'auto'")
        found = load_backend(backend)
        if isinstance(found, str):
            raise BackendUnavailable(f"backend {backend!r} {found}")
        if found.memory != "host":
            dtypes = CUDA_DTYPES
    return dtypes


def verify(
    backend: str,
    *,
    against: str | None = None,
    seed: int = 0,
    count: int = 100,
    rows: int | None = None,
    dtype: str | None = None,
    time_budget: float | None = None,
    deep: bool = False,
    long: int = 0,
    workers: int = 1,
    warm: bool = False,
    changed: bool = False,
    repeat: int = 0,
) -> Iterator[Finding]:
    """Yield the finding of each seed from `seed` on, until `count` or the seconds are used up.

    After a finding that is `fatal` there is none.

    Parameters
    ----------
    backend : str
        Name of one backend, not ``auto``.
    against : str, optional
        Name of another: it computes every problem too, and both must agree.
    seed, count : int
        Seeds ``seed .. seed + count - 1``.
    rows : int, optional
        Longest seqlen drawn; by default 200, 4096 if `deep`, and 131072 if long.
    dtype : str, optional
        Draw only this element type.
    time_budget : float, optional
        Seconds after which no new problem is begun.
    deep : bool
        Draw the structured problems of `campaign` instead.
    long : int
        Of the structured ones, every seed that this divides is one of `campaign_long`; 0 is none.
    workers : int
        Processes that share the seeds; with 1 all is done in this one.
    warm : bool
        Processes first compile what the seeds need, each kernel in one of them (`verify_warm`).
    changed : bool
        The structured ones, but for long ones, changed in random steps (`campaign_changes`).
    repeat : int
        Further calls of each problem, which must give the same bits: what goes wrong once in fifty
        calls is not seen in one.

    Raises
    ------
    UnknownBackend, BackendUnavailable
        No such backend, or it cannot run here.
    ScfaError
        A worker died; long or changed problems without deep ones; a backend against itself; `warm`
        with one worker, which compiles a kernel once anyway.
    """
    if long and not deep:
        raise ScfaError("long problems are structured ones: ask for deep problems too (--deep)")
    if changed and not deep:
        raise ScfaError("only structured problems are changed: ask for deep problems too (--deep)")
    if backend == against:
        raise ScfaError(
            f"backend {backend!r} always agrees with itself; compare it with another (--against)"
        )
    if warm and workers == 1:
        raise ScfaError("one process compiles every kernel once anyway: --warm goes with --workers")
    backends = (backend,) if against is None else (backend, against)
    dtypes = drawn_dtypes(*backends) if dtype is None else (dtype,)
    for name in backends:
        reason = unavailable_reason(name)
        if reason is not None:
            raise BackendUnavailable(f"backend {name!r} cannot run here: {reason}")
    deadline = None if time_budget is None else time.monotonic() + time_budget
    task = partial(
        verify_seed,
        backend=backend,
        against=against,
        rows=rows,
        dtypes=dtypes,
        deep=deep,
        long=long,
        changed=changed,
        repeat=repeat,
    )
    seeds = range(seed, seed + count)
    if workers > 1:
        from scfa_core.verify_workers import in_processes, processes

        with processes(workers) as pool:
            if warm:
                from scfa_core.verify_warm import kind_of, warm_up

                draw = partial(
                    kind_of, rows=rows, dtypes=dtypes, deep=deep, long=long, changed=changed
                )
                warm_up(backends, draw, seeds, pool, deadline)
            yield from _until_fatal(in_processes(task, seeds, pool, deadline))
    else:
        yield from _until_fatal(_in_turn(task, seeds, deadline))


def _until_fatal(findings: Iterator[Finding]) -> Iterator[Finding]:
    for finding in findings:
        yield finding
        if finding.fatal:
            return


def _in_turn(
    task: Callable[[int], Finding], seeds: range, deadline: float | None
) -> Iterator[Finding]:
    for number in seeds:
        if deadline is not None and time.monotonic() >= deadline:
            return
        yield task(number)


def verify_seed(
    seed: int,
    *,
    backend: str,
    rows: int | None,
    dtypes: tuple[str, ...],
    deep: bool,
    long: int = 0,
    changed: bool = False,
    against: str | None = None,
    repeat: int = 0,
) -> Finding:
    """Draw the problem of one seed, and run it."""
    how: dict[str, Any] = {"against": against, "repeat": repeat}
    if deep and long and seed % long == 0:
        from scfa_core.campaign_long import LONG_ROWS, verify_long

        return verify_long(backend, seed, most_rows=rows or LONG_ROWS, dtypes=dtypes, **how)
    if deep:
        from scfa_core.campaign import DEEP_ROWS, verify_deep

        how |= {"most_rows": rows or DEEP_ROWS, "dtypes": dtypes, "changed": changed}
        return verify_deep(backend, seed, **how)
    spec = testing.random_spec(seed, most_rows=rows or DEFAULT_ROWS, dtypes=dtypes)
    return verify_one(backend, spec, **how)


def verify_one(
    backend: str, spec: testing.Spec, against: str | None = None, repeat: int = 0
) -> Finding:
    """Run one problem forward and backward, and hold everything against the truth."""
    case = testing.build(spec)
    return hold(
        case,
        (backend, against),
        run=lambda name: run_case(case, name),
        judge=lambda got, _, tf32: testing.judge(case, got, tf32=tf32),
        repeat=repeat,
    )


def hold(
    case: testing.Case,
    backends: tuple[str, str | None],
    *,
    run: Callable[[str], tuple[testing.Results, Fields]],
    judge: Callable[[testing.Results, Fields, bool], list[testing.Verdict]],
    answers: dict[bool, Answers] | None = None,
    repeat: int = 0,
    told: str = "",
) -> Finding:
    """Hold what one backend, or each of two, makes of a problem against the truth; then the two.

    Parameters
    ----------
    backends : (str, str or None)
        The second one, if there is one, is compared with the first.
    run, judge : callable
        Results and plan of a backend; the verdicts on these, and whether its products are TF32.
    answers : dict of bool to Answers, optional
        For the comparison, if they are at hand: by whether products are TF32.
    repeat : int
        Further calls of each backend, held against its first bit by bit.
    told : str
        Ends every complaint.
    """
    names = [name for name in backends if name is not None]
    ran: list[tuple[testing.Results, Fields]] = []
    tf32: list[bool] = []
    complaints: list[str] = []
    worst = apart = 0.0
    try:
        right = reference_fields(case)
        for name in names:
            tf32.append(multiplies_tf32(name, case.spec))
            got, plan = run(name)
            ran.append((got, plan))
            verdicts = judge(got, plan, tf32[-1])
            found = _beyond(verdicts, "error")
            found += plan_differences(case, plan, right)
            found += changed_bits((got, plan), [run(name) for _ in range(repeat)])
            complaints += found if len(names) == 1 else [f"{name}: {text}" for text in found]
            worst = max([worst, *map(_ratio, verdicts)])
        if len(names) == 2:
            (one, one_plan), (two, two_plan) = ran
            if answers is None:
                device = "numpy" if on_host(*names) else "cuda"
                answers = {x: allowances_of(case, device, tf32=x) for x in set(tf32)}
            verdicts = row_verdicts(case, one, two, [Rule(answers[x], x) for x in tf32])
            found = _beyond(verdicts, "difference")
            found += differing_entries(one_plan, two_plan)
            complaints += [f"{names[0]} against {names[1]}: {text}" for text in found]
            apart = max(map(_ratio, verdicts))
    except Exception as error:  # one bad problem must not hide its seed
        which = f" (on {names[len(ran)]})" if len(names) == 2 and len(ran) < 2 else ""
        return crash(error, case.spec, which + told)
    told_each = tuple(x + told for x in complaints)
    return Finding(case.spec.seed, case.spec, worst, told_each, apart=apart, tf32=any(tf32))


def _ratio(verdict: testing.Verdict) -> float:
    return max(verdict.max_ratio, verdict.norm_ratio)


def _beyond(verdicts: Sequence[testing.Verdict], what: str) -> list[str]:
    """What is said of the verdicts that are not fine."""
    return [
        f"{v.name}: {_ratio(v):.2f} of the allowed {what}; {v.detail}" for v in verdicts if not v.ok
    ]


def crash(error: Exception, spec: testing.Spec, told: str = "") -> Finding:
    """The finding of a problem that raised `error`."""
    complaints = [f"raised {type(error).__name__}: {error}{told}"]
    broken = broken_context()
    if broken:
        complaints.append(f"the CUDA context is broken, and this process with it: {broken}")
    return Finding(spec.seed, spec, float("inf"), tuple(complaints), fatal=bool(broken))


def broken_context() -> str | None:
    """Why nothing runs on the GPU any more, if a kernel broke this process's CUDA context."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:  # which class depends on the version of torch
        return str(error).splitlines()[0]
    return None


def reference_fields(case: testing.Case | Drawn) -> Fields:
    """The reference planner's plan of a problem."""
    size = (case.spec.batch, case.spec.heads, case.spec.seqlen_q, case.spec.head_dim)
    size_kv = (case.spec.batch, case.spec.heads_kv, case.spec.seqlen_k, case.spec.head_dim)
    q, k = np.zeros(size, np.float32), np.zeros(size_kv, np.float32)
    plan = make_plan(case.pattern, q, k, backend="reference")
    return {name: getattr(plan, name) for name in PLAN_FIELDS}


def plan_differences(case: testing.Case, plan: Fields, right: Fields | None = None) -> list[str]:
    """Fields in which the backend's plan is not the reference planner's (`right`, if at hand)."""
    return differing_entries(plan, reference_fields(case) if right is None else right)


def run_case(case: testing.Case, backend: str) -> tuple[testing.Results, Fields]:
    """Run `case` through the public API on arrays that the backend takes, all back in float64."""
    on_host = getattr(load_backend(backend), "memory", "host") == "host"
    if on_host and case.spec.dtype != "bfloat16":
        results, plan = testing.run_numpy(case, backend)
        return results, {name: getattr(plan, name) for name in PLAN_FIELDS}
    if importlib.util.find_spec("torch") is not None:
        device = "cpu" if on_host else "cuda"
        to_device = partial(testing.as_torch, dtype=case.spec.dtype, device=device)
        return _run(case, backend, to_device, lambda x: x.detach().double().cpu().numpy())
    if on_host:
        raise BackendUnavailable(
            "bfloat16 on the host goes through torch, which is not installed; "
            "pass --dtype float32, or pip install 'scfa-core[torch]'"
        )
    return _run_cupy(case, backend)


def _run_cupy(case: testing.Case, backend: str) -> tuple[testing.Results, Fields]:
    import cupy

    if case.spec.dtype == "bfloat16":
        raise BackendUnavailable("CuPy arrays hold no bfloat16; pass --dtype, or install torch")
    return _run(case, backend, cupy.asarray, lambda x: cupy.asnumpy(x).astype(np.float64))


def _run(
    case: testing.Case, backend: str, to_device: Any, to_host: Any
) -> tuple[testing.Results, Fields]:
    """Carry a case over to a library, call, and bring everything back."""
    tensors = [to_device(x) for x in (case.q, case.k, case.v, case.dout)]
    return call(case.spec, backend, tensors, map_arrays(case.pattern, to_device), to_host)


def call(
    spec: testing.Spec,
    backend: str,
    tensors: Sequence[Any],
    pattern: Pattern,
    to_host: Callable[[Any], np.ndarray],
) -> tuple[testing.Results, Fields]:
    """Plan, forward and backward of one problem; results and plan in NumPy, heads first.

    Parameters
    ----------
    spec : Spec
        Its layout and scale count.
    tensors : (q, k, v, dout)
        (batch, heads, rows, dim), whatever the layout.
    to_host : callable
        An array of their library in NumPy, float64.
    """
    options: dict[str, Any] = {"layout": spec.layout, "backend": backend}
    swap = (lambda x: x.swapaxes(1, 2)) if spec.layout == "bthd" else (lambda x: x)
    q, k, v, dout = map(swap, tensors)
    plan = make_plan(pattern, q, k, **options)
    options["softmax_scale"] = spec.softmax_scale
    out, lse = attention(q, k, v, plan, return_lse=True, **options)
    grads = attention_backward(dout, q, k, v, out, lse, plan, **options)
    wide = [to_host(swap(x)) for x in (out, *grads)]
    fields = {name: to_host(getattr(plan, name)).astype(np.int64) for name in PLAN_FIELDS}
    return testing.Results(wide[0], to_host(lse), *wide[1:]), fields
