"""Random problems (`testing_problems`), and the rule by which an answer to one counts as exact.

Shared by the tests, `scfa verify` and the benchmarks. The rule (docs/numerics.md): against float64,
an answer's error may be at most twice that of the same formula evaluated step by step in the same
dtype, at its maximum and in norm. Only where a tensor is so small that this is a matter of luck are
a few roundings of the intermediates allowed on top.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scfa_core.reference.attention import probabilities, spread_heads
from scfa_core.reference.backend import narrow, widen
from scfa_core.testing_parts import (
    GROUP_STYLES,
    KEEP_STYLES,
    RANGE_STYLES,
    Part,
    random_length,
    random_part,
)
from scfa_core.testing_problems import (
    Case,
    Results,
    Spec,
    as_numpy_kind,
    as_torch,
    build,
    random_spec,
    run_numpy,
    truth,
)

__all__ = [
    "GROUP_STYLES",
    "KEEP_STYLES",
    "RANGE_STYLES",
    "ROUNDOFF",
    "Case",
    "Part",
    "Results",
    "Spec",
    "Verdict",
    "as_numpy_kind",
    "as_tf32",
    "as_torch",
    "baseline",
    "build",
    "judge",
    "judge_tensor",
    "magnitudes",
    "random_length",
    "random_part",
    "random_spec",
    "run_numpy",
    "truth",
]

ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
ROUNDOFF["tf32"] = 2.0**-11  # of what is multiplied; sums are those of float32
SMALL = 4096  # entries but for zeros, below which one lucky rounding decides the maximum
FEW = 64  # queries that see two keys or more: every gradient of such a query hangs on one delta


def _clean(case: Case) -> tuple[np.ndarray, ...]:
    """q, k, v, dout in float64 with poisoned rows set to 0 (they take no part)."""
    return tuple(np.where(np.isfinite(x), x, 0.0) for x in case.wide())


def as_tf32(x: np.ndarray) -> np.ndarray:
    """Float32 with 10 mantissa bits, ties away from 0: what a tensor core multiplies of `x`."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFF_E000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def baseline(case: Case, *, tf32: bool = False) -> Results:
    """The formula as a framework evaluates it: every step rounded to the dtype, sums in float32.

    This is what torch's composite attention does in the same dtype; with `tf32`, where its products
    of float32 arrays may be TF32.
    """
    dtype, scale = case.spec.dtype, case.softmax_scale
    acc = np.float64 if dtype == "float64" else np.float32
    factor = as_tf32 if tf32 else np.asarray

    def step(x: np.ndarray) -> np.ndarray:
        return widen(narrow(x.astype(np.float64), dtype), dtype).astype(acc)

    q, k, v, dout = (factor(x.astype(acc)) for x in _clean(case))
    heads, heads_kv = q.shape[1], k.shape[1]
    k, v = spread_heads(k, heads), spread_heads(v, heads)
    scores = np.where(case.mask, step(step(q @ k.swapaxes(-1, -2)) * acc(scale)), -np.inf)
    row_max = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    row_max = np.where(np.isfinite(row_max), row_max, 0).astype(acc)
    weights = np.exp((scores - row_max).astype(acc))
    row_sum = weights.sum(axis=-1, keepdims=True)
    p = step(weights / np.where(row_sum == 0, 1, row_sum))
    with np.errstate(divide="ignore"):
        lse = (row_max + np.log(row_sum))[..., 0]
    dp = step(dout @ v.swapaxes(-1, -2))
    ds = step(p * (dp - (p * dp).sum(axis=-1, keepdims=True)))

    def summed(x: np.ndarray) -> np.ndarray:
        shape = (x.shape[0], heads_kv, heads // heads_kv, *x.shape[2:])
        return step(x.reshape(shape).sum(axis=2))

    p, ds = factor(p), factor(ds)
    return Results(
        step(p @ v),
        lse,
        step(step(ds @ k) * acc(scale)),
        summed(step(step(ds.swapaxes(-1, -2) @ q) * acc(scale))),
        summed(step(p.swapaxes(-1, -2) @ dout)),
    )


def _rms_product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Size of the rounding noise of ``x @ y``: roots of summed squares, not of absolute values."""
    return np.sqrt(x**2 @ y**2)


def magnitudes(case: Case) -> Results:
    """Typical size of each result's terms: times a unit roundoff, one rounding of each step."""
    q, k, v, dout = _clean(case)
    heads, heads_kv = q.shape[1], k.shape[1]
    scale = abs(case.softmax_scale)
    k, v = spread_heads(k, heads), spread_heads(v, heads)
    p, lse = probabilities(q, k, case.mask, case.softmax_scale)
    moved = 1.0 + scale * (_rms_product(q, k.swapaxes(-1, -2)) + np.abs(q @ k.swapaxes(-1, -2)))
    if case.spec.dtype in ("float32", "float64"):  # p = exp(s - lse), and lse is rounded once
        moved = moved + np.where(np.isfinite(lse), np.abs(lse), 0.0)[..., None]
    p = p * moved
    dp = _rms_product(dout, v.swapaxes(-1, -2))
    ds = p * (dp + np.sqrt(((p * dp) ** 2).sum(axis=-1, keepdims=True)))

    def summed(x: np.ndarray) -> np.ndarray:
        shape = (x.shape[0], heads_kv, heads // heads_kv, *x.shape[2:])
        return np.sqrt((x.reshape(shape) ** 2).sum(axis=2))

    lse_size = np.where(np.isfinite(lse), np.abs(lse), 0.0) + p.max(axis=-1, initial=0.0)
    return Results(
        _rms_product(p, v),
        lse_size,
        scale * _rms_product(ds, k),
        summed(scale * _rms_product(ds.swapaxes(-1, -2), q)),
        summed(_rms_product(p.swapaxes(-1, -2), dout)),
    )


def stored_out_sizes(case: Case) -> dict[str, np.ndarray]:
    """How far one rounding of the stored out reaches dq and dk, in units of that rounding.

    Every flash backward, torch's own included, forms ``delta = rowsum(dout * out)`` from rounded
    out. The plain formula sums ``p * dp``, which is exact by luck where one key has all the weight.
    """
    if not reads_stored_out(case):
        return {}
    q, k, v, dout = _clean(case)
    heads, heads_kv = q.shape[1], k.shape[1]
    k, v = spread_heads(k, heads), spread_heads(v, heads)
    p, _ = probabilities(q, k, case.mask, case.softmax_scale)
    delta = np.sqrt(((dout * (p @ v)) ** 2).sum(axis=-1, keepdims=True))
    of_queries = _rms_product((p * delta).swapaxes(-1, -2), q) ** 2
    shape = (q.shape[0], heads_kv, heads // heads_kv, *of_queries.shape[2:])
    scale = abs(case.softmax_scale)
    return {
        "dq": scale * delta * np.abs(p @ k),
        "dk": scale * np.sqrt(of_queries.reshape(shape).sum(axis=2)),
    }


def reads_stored_out(case: Case) -> bool:
    """Whether the rounding of the stored out counts: it does in 16 bits."""
    return case.spec.dtype in ("float16", "bfloat16")


class Verdict(NamedTuple):
    """How one tensor fared: error over allowed error, at its maximum and in norm; fine up to 1."""

    name: str
    max_ratio: float
    norm_ratio: float
    detail: str

    @property
    def ok(self) -> bool:
        """Whether both ratios are within the rule."""
        return self.max_ratio <= 1.0 and self.norm_ratio <= 1.0


def judge(
    case: Case, got: Results, right: Results | None = None, *, tf32: bool = False
) -> list[Verdict]:
    """Hold `got` (float64 or NumPy arrays, None to leave one out) against the truth by the rule.

    With `tf32` the products of float32 arrays may be TF32, here as in the formula compared with.
    """
    right = truth(case) if right is None else right
    plain, sizes, of_out = baseline(case, tf32=tf32), magnitudes(case), stored_out_sizes(case)
    few = int((case.mask.sum(axis=-1) > 1).sum()) < FEW
    verdicts = []
    for name, mine, true, other, size in zip(
        Results._fields, got, right, plain, sizes, strict=True
    ):
        if mine is not None:
            wide, from_out = np.asarray(mine, np.float64), of_out.get(name)
            verdicts.append(
                judge_tensor(
                    name, wide, true, other, size, case, few=few, from_out=from_out, tf32=tf32
                )
            )
    return verdicts


def judge_tensor(
    name: str,
    mine: np.ndarray,
    true: np.ndarray,
    other: np.ndarray,
    size: np.ndarray,
    case: Case,
    *,
    few: bool = False,
    from_out: np.ndarray | None = None,
    tf32: bool = False,
) -> Verdict:
    """Hold one tensor, or some of its rows, against the truth.

    Parameters
    ----------
    name : str
        Of `Results`: lse is judged as float32.
    mine, true, other, size : array, all of one shape
        The answer, the truth, the plain formula's answer, and the size of the terms (`magnitudes`).
    case : Case
        Its dtype and lengths count.
    few : bool
        Whether it all hangs on few queries, as far as the caller knows.
    from_out : array, optional
        Of `stored_out_sizes`: twice that rounding is allowed.
    tf32 : bool
        Whether products are TF32, and with them the luck of few entries.
    """
    if mine.shape != true.shape:
        return Verdict(name, np.inf, np.inf, f"shape {mine.shape}, expected {true.shape}")
    if mine.size == 0:
        return Verdict(name, 0.0, 0.0, "empty")
    special = ~np.isfinite(true)
    same = (mine[special] == true[special]) | (np.isnan(mine[special]) & np.isnan(true[special]))
    wrong = int((~same).sum()) + int((~np.isfinite(mine[~special])).sum())
    if wrong:
        return Verdict(name, np.inf, np.inf, f"{wrong} entries are NaN or Inf, or should be")
    mine, true, other, size = (x[~special] for x in (mine, true, other, size))
    error, plain_error = np.abs(mine - true), np.abs(other - true)
    accumulator = ROUNDOFF["float64" if case.spec.dtype == "float64" else "float32"]
    stored = ROUNDOFF["float32" if name == "lse" else case.spec.dtype]
    # Rows of one key have dq 0 whatever is rounded: they say nothing about the luck of others.
    uncertain = np.count_nonzero((size != 0) & ((true != 0) | (other != 0)))
    unit = ROUNDOFF["tf32" if tf32 else case.spec.dtype]
    luck = 4 * unit if few or uncertain < SMALL else 0.0
    # In float64 the truth has roundings of its own and the plain formula repeats them exactly;
    # nothing coarser hides that a sum of n terms rounds n times.
    longest = max(case.spec.seqlen_q * case.spec.heads // case.spec.heads_kv, case.spec.seqlen_k)
    terms = max(16.0, 2 * longest**0.5) if case.spec.dtype == "float64" else 2.0
    slack = (terms * accumulator + luck) * size + 2 * stored * np.abs(true)
    if from_out is not None:
        slack = slack + 2 * stored * from_out[~special]
    allowed_max = 2 * plain_error.max(initial=0.0) + slack.max(initial=0.0)
    allowed_norm = 2 * np.linalg.norm(plain_error) + np.linalg.norm(slack)
    tiny = np.finfo(np.float64).tiny
    return Verdict(
        name,
        float(error.max(initial=0.0) / (allowed_max + tiny)),
        float(np.linalg.norm(error) / (allowed_norm + tiny)),
        f"max error {error.max(initial=0.0):.2e}, same-dtype formula "
        f"{plain_error.max(initial=0.0):.2e}",
    )
