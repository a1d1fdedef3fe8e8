"""One problem called several times: what later calls give must be what the first gave, bit by bit.

A read that a copy overtakes once in fifty calls is seen by no comparison with the truth that calls
once.
"""

from __future__ import annotations

import numpy as np

from scfa_core.testing import Results
from scfa_core.verify_against import Fields


def changed_bits(first: tuple[Results, Fields], others: list[tuple[Results, Fields]]) -> list[str]:
    """What of later calls of one problem is not what the first call gave, NaN for NaN."""

    def named(results: Results, plan: Fields) -> Fields:
        return results._asdict() | plan

    right, found = named(*first), []
    for name, x in right.items():
        calls = [np.flatnonzero(~same_bits(x, named(*other)[name])) for other in others]
        wrong = [places for places in calls if len(places)]
        if wrong:
            found.append(
                f"{name}: {len(wrong)} of {len(calls)} further calls gave other bits, in up to "
                f"{max(map(len, wrong))} of {np.size(x)} entries"
            )
    return found


def same_bits(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where two arrays of numbers hold the same ones; zeros by their sign, NaN equal NaN."""
    left, right = np.asarray(left), np.asarray(right)
    if left.dtype.kind != "f":
        return left == right
    both_nan = np.isnan(left) & np.isnan(right)
    return both_nan | ((left == right) & (np.signbit(left) == np.signbit(right)))
