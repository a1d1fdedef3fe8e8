"""Two backends on one problem, held against each other row by row: ``scfa verify --against``.

That both are near the truth as a whole says already that they are near each other as a whole. So
the same rule is asked of every row: every query's out, lse and dq, every key's dk and dv. There an
error counts that is small beside the largest entries of its tensor, and in problems whose truth is
only sampled, every row that was not.
"""

from __future__ import annotations

import numpy as np

from scfa_core import testing
from scfa_core.campaign_blocks import Answers, evaluate, numbers_on
from scfa_core.dispatch import load_backend
from scfa_core.testing import ROUNDOFF, Case, Results, Verdict

Fields = dict[str, np.ndarray]


def on_host(*backends: str) -> bool:
    """Whether any of the backends works in host memory."""
    return any(getattr(load_backend(name), "memory", "host") == "host" for name in backends)


def allowances_of(case: Case, device: str) -> Answers:
    """Truth, same-dtype formula and sizes of every row, by blocks where the mask is too large.

    Parameters
    ----------
    device : str
        Where blocks are computed: "numpy", or what torch calls it.
    """
    if case.mask.size:
        return Answers(testing.truth(case), testing.baseline(case), testing.magnitudes(case))
    from scfa_core.verify import carried_pattern

    numbers = numbers_on(device, case.spec.dtype)
    return evaluate(numbers, case, carried_pattern(case.pattern, numbers.integers))


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


def row_verdicts(case: Case, one: Results, two: Results, answers: Answers) -> list[Verdict]:
    """The row of each result at which two backends differ most, of what they may.

    Each may be off by what `testing.judge_tensor` allows a tensor of that row alone, from its own
    rounding in the same dtype and the size of its own terms; their difference, at its maximum and
    in norm, by the sum of both, which is twice that. Less would ask more of the two than of each
    (their errors may have opposite signs), and a share of the whole tensor's allowance would
    tell nothing new. What is not finite must be the same in both.

    Parameters
    ----------
    one, two : Results
        In float64.
    answers : Answers
        Of the case; its truth counts only as the size of what is stored.
    """
    verdicts = []
    for name in Results._fields:
        tensors = [np.asarray(getattr(x, name), np.float64) for x in (one, two, *answers)]
        if tensors[0].shape != tensors[1].shape:
            told = f"shapes {tensors[0].shape} and {tensors[1].shape}"
            verdicts.append(Verdict(name, np.inf, np.inf, told))
        else:
            verdicts.append(_worst_row(name, case, tensors))
    return verdicts


def _worst_row(name: str, case: Case, tensors: list[np.ndarray]) -> Verdict:
    """`row_verdicts` of one result; tensors are both answers, truth, plain formula and sizes."""
    if name == "lse":
        tensors = [x[..., None] for x in tensors]
    mine, other, true, plain, size = tensors
    if mine.size == 0:
        return Verdict(name, 0.0, 0.0, "empty")
    finite = np.isfinite(mine) & np.isfinite(other)
    unlike = int((~finite & (mine != other) & ~(np.isnan(mine) & np.isnan(other))).sum())
    if unlike:
        return Verdict(name, np.inf, np.inf, f"{unlike} entries are NaN or Inf in one of the two")
    counted = finite & np.isfinite(true)
    mine, other, true, plain = (np.where(counted, x, 0.0) for x in (mine, other, true, plain))
    apart, rounding = np.abs(mine - other), np.abs(plain - true)
    slack = np.where(counted, _slack(name, case, true, size), 0.0)
    tiny = np.finfo(np.float64).tiny
    allowed = 2 * (2 * rounding.max(axis=-1) + slack.max(axis=-1)) + tiny
    norm = np.linalg.norm
    allowed_norm = 2 * (2 * norm(rounding, axis=-1) + norm(slack, axis=-1)) + tiny
    of_max, of_norm = apart.max(axis=-1) / allowed, norm(apart, axis=-1) / allowed_norm
    place = np.unravel_index(np.argmax(np.maximum(of_max, of_norm)), of_max.shape)
    b, h, row = (int(x) for x in place)
    told = f"batch {b}, head {h}, row {row}: {apart[place].max():.2e} apart"
    return Verdict(name, float(of_max[place]), float(of_norm[place]), told)


def _slack(name: str, case: Case, true: np.ndarray, size: np.ndarray) -> np.ndarray:
    """What `testing.judge_tensor` allows beside the plain formula's error: a row is small.

    That allowance, several roundings of all terms, covers the rounded out in delta as well.
    """
    spec = case.spec
    accumulator = ROUNDOFF["float64" if spec.dtype == "float64" else "float32"]
    stored = ROUNDOFF["float32" if name == "lse" else spec.dtype]
    longest = max(spec.seqlen_q * spec.heads // spec.heads_kv, spec.seqlen_k)
    terms = max(16.0, 2 * longest**0.5) if spec.dtype == "float64" else 2.0
    return (terms * accumulator + 4 * ROUNDOFF[spec.dtype]) * size + 2 * stored * np.abs(true)
