"""Two backends on one problem, held against each other row by row: ``scfa verify --against``.

That both are near the truth as a whole says already that they are near each other as a whole. So
the same rule is asked of every row: every query's out, lse and dq, every key's dk and dv. There an
error counts that is small beside the largest entries of its tensor, and in problems whose truth is
only sampled, every row that was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scfa_core import testing
from scfa_core.campaign_blocks import Answers, evaluate, numbers_on
from scfa_core.dispatch import load_backend
from scfa_core.patterns.base import map_arrays
from scfa_core.testing import ROUNDOFF, Case, Results, Spec, Verdict

Fields = dict[str, np.ndarray]


def on_host(*backends: str) -> bool:
    """Whether any of the backends works in host memory."""
    return any(getattr(load_backend(name), "memory", "host") == "host" for name in backends)


class Rule(NamedTuple):
    """What one backend's answers to a problem are held against."""

    answers: Answers
    tf32: bool = False  # whether products are TF32, those of the plain formula in `answers` too


def multiplies_tf32(backend: str, spec: Spec) -> bool:
    """Whether the backend says that its products of such a problem are TF32, by its settings."""
    says = getattr(load_backend(backend), "multiplies_tf32", None)
    return says is not None and bool(says(spec.dtype, spec.head_dim, spec.head_dim_v))


def allowances_of(case: Case, device: str, *, tf32: bool = False) -> Answers:
    """Truth, same-dtype formula and sizes of every row, by blocks where the mask is too large.

    Parameters
    ----------
    device : str
        Where blocks are computed: "numpy", or what torch calls it.
    tf32 : bool
        Whether the formula multiplies TF32.
    """
    if case.mask.size:
        plain = testing.baseline(case, tf32=tf32)
        return Answers(testing.truth(case), plain, testing.magnitudes(case))
    numbers = numbers_on(device, case.spec.dtype, tf32=tf32)
    return evaluate(numbers, case, map_arrays(case.pattern, numbers.integers))


def differing_entries(one: Fields, two: Fields) -> list[str]:
    """Fields of two plans that are not the same entry by entry."""
    found = []
    for name, mine in one.items():
        if mine.shape != two[name].shape:
            found.append(f"plan.{name}: shapes {mine.shape} and {two[name].shape}")
        elif (mine != two[name]).any():
            differ = int((mine != two[name]).sum())
            found.append(f"plan.{name}: {differ} of {mine.size} entries differ")
    return found


def row_verdicts(case: Case, one: Results, two: Results, rules: Sequence[Rule]) -> list[Verdict]:
    """The row of each result at which two backends differ most, of what they may.

    Each may be off by what `testing.judge_tensor` allows a tensor of that row alone, from its own
    rounding in the same dtype and the size of its own terms; their difference, at its maximum and
    in norm, by the sum of both. Less would ask more of the two than of each (their errors may have
    opposite signs), and a share of the whole tensor's allowance would tell nothing new. What is not
    finite must be the same in both.

    Parameters
    ----------
    one, two : Results
        In float64.
    rules : (Rule, Rule)
        What each of the two is held against; truth counts only as the size of what is stored.
    """
    verdicts = []
    for name in Results._fields:
        mine, other = (np.asarray(getattr(x, name), np.float64) for x in (one, two))
        if mine.shape != other.shape:
            told = f"shapes {mine.shape} and {other.shape}"
            verdicts.append(Verdict(name, np.inf, np.inf, told))
        else:
            verdicts.append(_worst_row(name, case, mine, other, rules))
    return verdicts


def _worst_row(
    name: str, case: Case, mine: np.ndarray, other: np.ndarray, rules: Sequence[Rule]
) -> Verdict:
    """`row_verdicts` of one result."""
    if mine.size == 0:
        return Verdict(name, 0.0, 0.0, "empty")
    finite = np.isfinite(mine) & np.isfinite(other)
    unlike = int((~finite & (mine != other) & ~(np.isnan(mine) & np.isnan(other))).sum())
    if unlike:
        return Verdict(name, np.inf, np.inf, f"{unlike} entries are NaN or Inf in one of the two")
    mine, other = (_by_row(np.where(finite, x, 0.0)) for x in (mine, other))
    counted = _by_row(finite & np.isfinite(getattr(rules[0].answers.true, name)))
    apart = np.where(counted, np.abs(mine - other), 0.0)
    tiny, norm = np.finfo(np.float64).tiny, np.linalg.norm
    allowed = allowed_norm = tiny
    for rule in rules:
        true, plain, size = (
            np.where(counted, _by_row(getattr(x, name)), 0.0) for x in rule.answers
        )
        rounding, slack = np.abs(plain - true), _slack(name, case, true, size, rule.tf32)
        allowed = allowed + 2 * rounding.max(axis=-1) + slack.max(axis=-1)
        allowed_norm = allowed_norm + 2 * norm(rounding, axis=-1) + norm(slack, axis=-1)
    of_max, of_norm = apart.max(axis=-1) / allowed, norm(apart, axis=-1) / allowed_norm
    place = np.unravel_index(np.argmax(np.maximum(of_max, of_norm)), of_max.shape)
    b, h, row = (int(x) for x in place)
    told = f"batch {b}, head {h}, row {row}: {apart[place].max():.2e} apart"
    return Verdict(name, float(of_max[place]), float(of_norm[place]), told)


def _by_row(x: np.ndarray) -> np.ndarray:
    """With the last axis that lse lacks."""
    return x[..., None] if x.ndim == 3 else x


def _slack(name: str, case: Case, true: np.ndarray, size: np.ndarray, tf32: bool) -> np.ndarray:
    """What `testing.judge_tensor` allows beside the plain formula's error: a row is small.

    That allowance, several roundings of all terms, covers the rounded out in delta as well.
    """
    spec = case.spec
    accumulator = ROUNDOFF["float64" if spec.dtype == "float64" else "float32"]
    stored = ROUNDOFF["float32" if name == "lse" else spec.dtype]
    longest = max(spec.seqlen_q * spec.heads // spec.heads_kv, spec.seqlen_k)
    terms = max(16.0, 2 * longest**0.5) if spec.dtype == "float64" else 2.0
    luck = 4 * ROUNDOFF["tf32" if tf32 else spec.dtype]
    return (terms * accumulator + luck) * size + 2 * stored * np.abs(true)
