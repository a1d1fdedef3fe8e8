"""The public functions: adopt arrays, check, plan, dispatch. Torch tensors go to `torch_bridge`."""

from __future__ import annotations

from typing import Any, NoReturn

from scfa_core.array_kinds import adopt, is_torch_tensor, restore_kind
from scfa_core.arrays import Framework
from scfa_core.dispatch import Backend, choose_backend, choose_for_plan, requested_backend
from scfa_core.foreign import unknown_options
from scfa_core.lowering import lower
from scfa_core.patterns import Causal, Pattern
from scfa_core.patterns.base import PATTERN, map_arrays, require_pattern
from scfa_core.plan import Plan
from scfa_core.problem import (
    Problem,
    build_problem,
    check_flag,
    check_layout,
    check_like,
    one_framework,
)
from scfa_core.runner import run_backward, run_forward, run_make_plan

_OPTIONS = "pattern, sinks, softmax_scale, layout, return_lse, deterministic, backend"


def attention(
    q: Any,
    k: Any,
    v: Any,
    pattern: Pattern | Plan | None = None,
    *,
    sinks: Any = None,
    softmax_scale: float | None = None,
    layout: str = "bhtd",
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
    **foreign: NoReturn,  # options of other libraries' attention
) -> Any:
    """Attend each query to exactly the keys that its pattern lets it see.

    >>> import numpy as np
    >>> q = np.random.default_rng(0).standard_normal((1, 2, 5, 16))
    >>> attention(q, q, q, Causal(), backend="reference").shape
    (1, 2, 5, 16)

    Parameters
    ----------
    q : array, (batch, heads, seqlen_q, head_dim), float16 | bfloat16 | float32 | float64
        Queries: torch (autograd works), NumPy, CuPy, Numba, or anything with DLPack. Any strides
        with a contiguous last axis; not copied, not modified. head_dim is a multiple of 8 from 16
        to 256. float64 on the CPU, and on a GPU by ``numba-cuda`` alone.
    k : array, (batch, heads_kv, seqlen_k, head_dim)
        Keys; heads_kv divides heads, and query head h reads head ``h // (heads // heads_kv)``.
    v : array, (batch, heads_kv, seqlen_k, head_dim_v)
        Values; head_dim_v may differ from head_dim.
    pattern : Pattern or Plan
        Which keys each query sees; `Causal()` by default. A `Plan` from `make_plan` skips planning.
    sinks : array, (heads,), floating-point, optional
        A logit of each head that takes weight in the softmax and gives no value, as if every query
        saw one key more, of this score and of value 0; -inf for none. Beside torch, NumPy or CuPy
        arrays; gradients flow to it.
    softmax_scale : float, optional
        Multiplies ``q @ k.T`` before the softmax (dimensionless). Default ``head_dim ** -0.5``;
        0.0 is kept.
    layout : "bhtd" | "bthd"
        "bthd" means (batch, seqlen, heads, head_dim) for q, k, v and out.
    return_lse : bool
        Also return the log-sum-exp of each query's scores.
    deterministic : bool
        False allows gradients whose last bits may differ from run to run, where that is faster.
    backend : str, optional
        A name of `backends()` or ``"auto"``. Default: `use_backend`, then $SCFA_BACKEND, then
        ``"auto"``.
    **foreign
        Options of other libraries' attention (``causal=``, ``attn_mask=``, ``window_size=``, ...)
        raise, and the message names what says the same here.

    Returns
    -------
    out : array like `q`, last axis head_dim_v
        In q's dtype, stride order and library. 0 where a query sees no key.
    lse : array, (batch, heads, seqlen_q), float32
        Natural logarithm, in nats, sinks among the scores; ``-inf`` where a query sees no key and
        has no sink. Only if `return_lse`.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ScaleError, OptionError, PatternError
        Something does not fit; the message says what was expected, what came and what to do.
    BackendUnavailable
        The chosen backend cannot serve this call, with the reason.

    Notes
    -----
    Cost: sorting (near-linear in seqlen) plus 4 * visible pairs * head_dim flop; no permuted copy
    of a tensor is made. Sums are accumulated in float32 (float64 for float64). Values of hashes and
    ranges are never inspected: see `validate`. Source: arXiv 2306.01160.
    """
    if foreign:
        raise unknown_options("attention", foreign, _OPTIONS)
    check_flag("return_lse", return_lse)
    check_flag("deterministic", deterministic)
    pattern = Causal() if pattern is None else pattern
    if sinks is not None:
        from scfa_core.merging import attention_over

        result = attention_over(
            adopt(q),
            adopt(k),
            adopt(v),
            [adopt_pattern(pattern)],
            sinks=adopt(sinks),
            softmax_scale=softmax_scale,
            layout=layout,
            return_lse=return_lse,
            deterministic=deterministic,
            backend=backend,
        )
        if return_lse:
            return restore_kind(result[0], q), restore_kind(result[1], q)
        return restore_kind(result, q)
    if is_torch_tensor(q):
        from scfa_core import torch_bridge

        return torch_bridge.attention(
            q,
            k,
            v,
            pattern,
            softmax_scale=softmax_scale,
            layout=layout,
            return_lse=return_lse,
            deterministic=deterministic,
            backend=backend,
        )
    caller = q
    q, k, v, pattern = adopt(q), adopt(k), adopt(v), adopt_pattern(pattern)
    framework = one_framework(q, k=k, v=v)
    problem = build_problem(
        framework.info(q),
        framework.info(k),
        framework.info(v),
        layout=layout,
        softmax_scale=softmax_scale,
        deterministic=deterministic,
    )
    q, k, v = (_heads_first(framework, x, layout) for x in (q, k, v))
    chosen, plan = prepare(pattern, problem, framework, backend)
    out, lse = run_forward(chosen, problem, plan, q, k, v, framework)
    out = restore_kind(_heads_first(framework, out, layout), caller)
    return (out, restore_kind(lse, caller)) if return_lse else out


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    pattern: Pattern | Plan | None = None,
    *,
    softmax_scale: float | None = None,
    layout: str = "bhtd",
    deterministic: bool = True,
    backend: str | None = None,
) -> tuple[Any, Any, Any]:
    """Gradients of `attention` with respect to q, k and v, for arrays without autograd.

    Parameters
    ----------
    dout : array like `out`
        Gradient of the loss with respect to `out`.
    q, k, v, pattern, softmax_scale, layout, deterministic, backend
        As given to `attention`; pass the same `Plan` to both to plan once.
    out, lse : arrays
        What `attention` returned with ``return_lse=True``. Or what `merge_attention` made of
        several patterns: these are then the gradients of this pattern's part, and all parts' add
        up. After `attention` with sinks they are right as they are; that of sinks comes from
        `scfa_core.sinks.sinks_backward`.

    Returns
    -------
    dq, dk, dv : arrays like `q`, `k`, `v`
        0 in rows that see nothing or are seen by nobody.

    Raises
    ------
    ScfaError
        As `attention`.

    Notes
    -----
    Cost: 10 * visible pairs * head_dim flop by the usual count. Bitwise deterministic by default.
    Under torch's autocast, where `out` has the dtype of the region, gradients come in the dtypes of
    the q, k and v that are given.
    """
    check_flag("deterministic", deterministic)
    pattern = Causal() if pattern is None else pattern
    if is_torch_tensor(q):
        from scfa_core import torch_bridge

        return torch_bridge.attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            pattern,
            softmax_scale=softmax_scale,
            layout=layout,
            deterministic=deterministic,
            backend=backend,
        )
    callers = (q, k, v)
    dout, q, k, v, out, lse = (adopt(x) for x in (dout, q, k, v, out, lse))
    pattern = adopt_pattern(pattern)
    framework = one_framework(q, dout=dout, k=k, v=v, out=out, lse=lse)
    problem = build_problem(
        framework.info(q),
        framework.info(k),
        framework.info(v),
        layout=layout,
        softmax_scale=softmax_scale,
        deterministic=deterministic,
    )
    dout, q, k, v, out = (_heads_first(framework, x, layout) for x in (dout, q, k, v, out))
    rows = (problem.batch, problem.heads, problem.seqlen_q)
    for name, x, shape, dtype in (
        ("dout", dout, (*rows, problem.head_dim_v), problem.dtype),
        ("out", out, (*rows, problem.head_dim_v), problem.dtype),
        ("lse", lse, rows, "float32"),
    ):
        check_like(name, framework.info(x), shape, dtype, problem.device)
    dout, out = (_dense_rows(framework, x) for x in (dout, out))
    chosen, plan = prepare(pattern, problem, framework, backend)
    grads = run_backward(chosen, problem, plan, dout, q, k, v, out, lse, framework)
    dq, dk, dv = (
        restore_kind(_heads_first(framework, x, layout), caller)
        for x, caller in zip(grads, callers, strict=True)
    )
    return dq, dk, dv


def make_plan(
    pattern: Pattern,
    q: Any,
    k: Any,
    *,
    layout: str = "bhtd",
    backend: str | None = None,
) -> Plan:
    """Lower and sort a pattern once, to be reused over layers, steps and the backward pass.

    Parameters
    ----------
    pattern : Pattern
        Its arrays must be of q's library and on q's device.
    q, k : arrays
        Only sizes, dtype and device are read.
    layout, backend
        As for `attention`.

    Returns
    -------
    plan : Plan
        Accepted wherever a pattern is.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, PatternError, BackendUnavailable
        As `attention`.

    Notes
    -----
    Near-linear time and O(seqlen) memory, on the device, without host synchronisation.
    """
    require_pattern(f"make_plan takes {PATTERN}", pattern)
    if is_torch_tensor(q):
        from scfa_core import torch_bridge

        return torch_bridge.make_plan(pattern, q, k, layout=layout, backend=backend)
    q, k, pattern = adopt(q), adopt(k), adopt_pattern(pattern)
    framework = one_framework(q, k=k)
    problem = build_problem(framework.info(q), framework.info(k), None, layout=layout)
    return prepare(pattern, problem, framework, backend)[1]


def prepare(
    pattern: Pattern | Plan, problem: Problem, framework: Framework, backend: str | None
) -> tuple[Backend, Plan]:
    """Choose the backend and make the plan, or take the one given."""
    requested = requested_backend(backend)
    if not isinstance(pattern, Plan):
        clauses = lower(pattern, problem, framework)
        chosen = choose_backend(problem, requested)
        arrays = run_make_plan(chosen, problem, clauses, framework)
        return chosen, Plan.of(arrays, clauses.monotone, chosen.name, problem.device)
    pattern.check_fits(problem, framework)
    return choose_for_plan(pattern, problem, requested), pattern


def adopt_pattern(pattern: Any) -> Any:
    """View foreign arrays of a pattern as NumPy or CuPy; the caller's pattern stays as it is.

    Every call views them anew, for a view of a GPU array waits for what its library does to it.
    """
    return map_arrays(pattern, adopt) if isinstance(pattern, Pattern) else pattern


def _heads_first(framework: Framework, x: Any, layout: str) -> Any:
    """Exchange heads and seqlen where the layout has them the other way (its own inverse)."""
    return framework.swap_heads(x) if check_layout(layout) else x


def _dense_rows(framework: Framework, x: Any) -> Any:
    """Copy what is strided in its last axis: gradients come as they like, backends take rows."""
    return x if framework.info(x).strides[-1:] == (1,) else framework.contiguous(x)
