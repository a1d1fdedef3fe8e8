"""Truth for problems too long for a dense mask: some queries and some keys of one head.

Masks come from the definitions of the patterns, never from a plan; the rule is `testing.judge`'s.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from scfa_core import patterns as pt
from scfa_core import testing
from scfa_core.reference.attention import probabilities
from scfa_core.reference.backend import narrow, widen
from scfa_core.testing import Case, Results, Spec, Verdict

SAMPLES = 24  # queries, and keys, of one head
STRETCH = 512  # queries whose scores are in memory at once


def visible(
    pattern: pt.Pattern, spec: Spec, b: int, h: int, rows: Any, keys: Any = None
) -> np.ndarray | Any:
    """Mask of some queries and keys (all by default) of one head, from the definitions.

    NumPy, or torch where `rows`, `keys` and the arrays of the pattern are torch's.
    """
    g = h // (spec.heads // spec.heads_kv)
    keys = np.arange(spec.seqlen_k) if keys is None else keys
    i, j = rows[:, None], keys[None, :]
    mask = (i >= 0) & (j >= 0)
    for part in pattern.parts:
        if isinstance(part, pt.Causal):
            shift = spec.seqlen_k - spec.seqlen_q if part.align == "bottom-right" else 0
            mask &= j <= i + shift - part.lag
        elif isinstance(part, pt.SlidingWindow):
            mask &= (i - part.window < j) & (j < i + (1 if part.causal else part.window))
        elif isinstance(part, pt.KeyRanges):
            start, end = (entries(x, b, h, rows)[:, None] for x in (part.start, part.end))
            mask &= (start <= j) & (j < end)
        elif isinstance(part, pt.HashSparse):
            q_hash, k_hash = entries(part.q_hash, b, h, rows), entries(part.k_hash, b, g, keys)
            mask &= q_hash[:, None] == k_hash[None, :]
            mask &= (j < i + part.include_self) | (not part.causal)
        elif isinstance(part, pt.Documents):
            q_ids, k_ids = entries(part.q_ids, b, 0, rows), entries(part.k_ids, b, 0, keys)
            mask &= q_ids[:, None] == k_ids[None, :]
            mask &= (j <= i) | (not part.causal)
        elif isinstance(part, pt.QKSparse):
            q_keep, k_keep = entries(part.q_keep, b, h, rows), entries(part.k_keep, b, g, keys)
            mask &= (q_keep != 0)[:, None] & (k_keep != 0)[None, :]
            mask &= (j <= i) | (not part.causal)
        else:
            raise TypeError(f"no definition for {part!r}")
    return mask


def entries(x: Any, b: int, h: int, index: Any) -> Any:
    """Some rows of one head of a pattern's array; axes of length 1 broadcast."""
    line = x[b if x.shape[0] > 1 else 0]
    if line.ndim == 2:
        line = line[h if line.shape[0] > 1 else 0]
    return line[index if line.shape[0] > 1 else index * 0]


def sampled_verdicts(
    case: Case, got: Results, plan: dict[str, np.ndarray], *, tf32: bool = False
) -> list[Verdict]:
    """Hold one head's results against the truth at sampled queries and keys, ends included."""
    spec = case.spec
    rng = np.random.default_rng(spec.seed)
    b, h = int(rng.integers(spec.batch)), int(rng.integers(spec.heads))
    rows = np.unique(np.r_[rng.integers(0, spec.seqlen_q, SAMPLES), 0, spec.seqlen_q - 1])
    keys = np.unique(np.r_[rng.integers(0, spec.seqlen_k, SAMPLES), 0, spec.seqlen_k - 1])
    return [
        *_of_rows(case, got, b, h, rows, tf32),
        _of_plan(case, plan, b, h, rows),
        *_of_keys(case, got, b, h // (spec.heads // spec.heads_kv), keys, tf32),
    ]


def _of_rows(
    case: Case, got: Results, b: int, h: int, rows: np.ndarray, tf32: bool
) -> list[Verdict]:
    """Judge out, lse and dq of some queries, as a problem of one head and few queries."""
    spec = case.spec
    g = h // (spec.heads // spec.heads_kv)
    few = replace(spec, batch=1, heads=1, heads_kv=1, seqlen_q=rows.size)
    part = Case(
        few,
        case.q[b : b + 1, h : h + 1, rows],
        case.k[b : b + 1, g : g + 1],
        case.v[b : b + 1, g : g + 1],
        case.dout[b : b + 1, h : h + 1, rows],
        case.pattern,
        visible(case.pattern, spec, b, h, rows)[None, None],
    )
    out, lse, dq = (x[b : b + 1, h : h + 1, rows] for x in (got.out, got.lse, got.dq))
    return testing.judge(part, Results(out, lse, dq, None, None), tf32=tf32)


def _of_plan(case: Case, plan: dict[str, np.ndarray], b: int, h: int, rows: np.ndarray) -> Verdict:
    """Whether the plan shows some queries exactly the keys of their mask."""
    g = h // (case.spec.heads // case.spec.heads_kv)
    places = np.argsort(plan["q_index"][b, h])[rows]
    for row, place, mask in zip(
        rows, places, visible(case.pattern, case.spec, b, h, rows), strict=True
    ):
        first, last = plan["key_start"][b, h, place], plan["key_end"][b, h, place]
        if not np.array_equal(np.sort(plan["k_index"][b, g, first:last]), np.flatnonzero(mask)):
            return Verdict("plan", np.inf, np.inf, f"query {row}, head {h}, batch {b}: other keys")
    return Verdict("plan", 0.0, 0.0, "the mask")


def _of_keys(
    case: Case, got: Results, b: int, g: int, keys: np.ndarray, tf32: bool
) -> list[Verdict]:
    """Judge dk and dv of some keys, from all queries of the group."""
    spec, scale = case.spec, case.softmax_scale
    group = spec.heads // spec.heads_kv
    k, v = (widen(x[b, g], spec.dtype) for x in (case.k, case.v))
    shapes = (keys.size, spec.head_dim), (keys.size, spec.head_dim_v)
    dk, plain_dk, size_dk, out_dk = (np.zeros(shapes[0]) for _ in range(4))
    dv, plain_dv, size_dv = (np.zeros(shapes[1]) for _ in range(3))

    acc = np.float64 if spec.dtype == "float64" else np.float32
    factor = testing.as_tf32 if tf32 else np.asarray

    def step(x: np.ndarray) -> np.ndarray:
        return widen(narrow(x.astype(np.float64), spec.dtype), spec.dtype).astype(acc)

    for h in range(g * group, (g + 1) * group):
        head_dk, head_dv = np.zeros(shapes[0], acc), np.zeros(shapes[1], acc)
        for first in range(0, spec.seqlen_q, STRETCH):
            rows = np.arange(first, min(first + STRETCH, spec.seqlen_q))
            q, dout = (widen(x[b, h, rows], spec.dtype) for x in (case.q, case.dout))
            mask = visible(case.pattern, spec, b, h, rows)
            every_p, lse, every_dp, delta = _weights(q, k, v, dout, mask, scale)
            p, dp = every_p[:, keys], every_dp[:, keys]

            dk += (p * (dp - delta)).T @ q * scale
            dv += p.T @ dout

            # the formula as a framework evaluates it, every step rounded (testing.baseline)
            short_p, short_dp, short_delta = p, dp, delta
            if tf32:
                short_q, short_k, short_v, short_dout = map(factor, (q, k, v, dout))
                short_p, _, short_dp, short_delta = _weights(
                    short_q, short_k, short_v, short_dout, mask, scale
                )
                short_p, short_dp = short_p[:, keys], short_dp[:, keys]
            short_ds = step(step(short_p) * (step(short_dp) - short_delta.astype(acc)))
            head_dk += factor(short_ds).T @ factor(q.astype(acc))
            head_dv += factor(step(short_p)).T @ factor(dout.astype(acc))

            # squares of the terms' sizes (testing.magnitudes)
            noise = np.sqrt(q**2 @ k[keys].T ** 2) + np.abs(q @ k[keys].T)
            if spec.dtype in ("float32", "float64"):
                noise = noise * abs(scale) + np.where(np.isfinite(lse), np.abs(lse), 0.0)[:, None]
            else:
                noise = noise * abs(scale)
            size_p = p * (1 + noise)
            size_ds = size_p * (np.sqrt(dout**2 @ v[keys].T ** 2) + np.abs(delta))
            size_dk += (size_ds**2).T @ q**2 * scale**2
            size_dv += (size_p**2).T @ dout**2
            if testing.reads_stored_out(case):
                of_out = np.sqrt(((dout * (every_p @ v)) ** 2).sum(axis=-1, keepdims=True))
                out_dk += ((p * of_out) ** 2).T @ q**2 * scale**2
        plain_dk += step(step(head_dk) * acc(scale))
        plain_dv += step(head_dv)
    judge = partial(testing.judge_tensor, case=case, tf32=tf32)
    mine_dk, mine_dv = got.dk[b, g, keys], got.dv[b, g, keys]
    return [
        judge("dk", mine_dk, dk, step(plain_dk), size_dk**0.5, from_out=out_dk**0.5),
        judge("dv", mine_dv, dv, step(plain_dv), np.sqrt(size_dv)),
    ]


def _weights(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, mask: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """p, lse, dp and delta of some queries and all keys of one head."""
    p, lse = probabilities(q, k, mask, scale)
    dp = dout @ v.T
    return p, lse, dp, (p * dp).sum(axis=-1, keepdims=True)
