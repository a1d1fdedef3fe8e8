"""Deep problems chosen by what none before them had: ``scfa verify --deep --guided``.

A recipe whose plan has new features (`campaign_coverage`) is kept, and later ones begin with it.
Plans come from the reference planner, and nothing is asked of the backend that is tested: a seed
gives the same recipes on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from scfa_core import campaign
from scfa_core.campaign_coverage import features
from scfa_core.campaign_recipes import STEPS, Recipe, draw
from scfa_core.testing import Spec
from scfa_core.verify import reference_fields

if TYPE_CHECKING:
    from scfa_core.verify_findings import Finding

LEAST_SHARE = 0.1  # of problems that are fresh, and of those that are changed
MEMORY = 0.02  # weight of the newest problem in what either kind brings
RECENT = 64  # recipes kept last, from which half of the changes start
MOST_STEPS = 12
MOST_ROWS = 2**15  # of all heads of a changed problem


def recipes(
    seed: int, count: int, *, most_rows: int, dtypes: tuple[str, ...], seen: set[Any] | None = None
) -> Iterator[Recipe]:
    """Yield `count` recipes, the later ones guided by what the earlier ones reached.

    Features go into `seen`, those already there count as reached.
    """
    rng = np.random.default_rng([seed, 20261128])
    kept: list[Recipe] = []
    seen = set() if seen is None else seen
    gain = [1.0, 1.0]  # new features that a fresh recipe, and a changed one, brought of late
    for number in range(count):
        recipe = Recipe(seed + number, most_rows, dtypes)
        share = min(max(gain[1] / (gain[0] + gain[1]), LEAST_SHARE), 1 - LEAST_SHARE)
        if kept and rng.random() < share:
            recipe = _changed(rng, kept)
        drawn = draw(recipe)
        if recipe.steps and _rows_of(drawn.spec) > MOST_ROWS:
            recipe = Recipe(seed + number, most_rows, dtypes)
            drawn = draw(recipe)
        new = features(drawn.spec, drawn.pattern, reference_fields(drawn)) - seen
        changed = int(bool(recipe.steps))
        gain[changed] += (len(new) + 0.1 - gain[changed]) * MEMORY
        if new:
            seen |= new
            kept.append(recipe)
        yield recipe


def _changed(rng: np.random.Generator, kept: list[Recipe]) -> Recipe:
    """A kept recipe, one of the last ones half of the time, and a few steps more."""
    first = max(len(kept) - RECENT, 0) if rng.random() < 0.5 else 0
    recipe = kept[int(rng.integers(first, len(kept)))]
    more = int(rng.choice([1, 1, 2, 4]))
    steps = tuple((str(rng.choice(list(STEPS))), int(rng.integers(2**31))) for _ in range(more))
    return recipe._replace(steps=(*recipe.steps, *steps)[-MOST_STEPS:])


def _rows_of(spec: Spec) -> int:
    return spec.batch * max(spec.heads * spec.seqlen_q, spec.heads_kv * spec.seqlen_k)


def verify_recipe(recipe: Recipe, *, backend: str, against: str | None = None) -> Finding:
    """`campaign.verify_deep` of a recipe's problem."""
    finding = campaign.hold_deep(campaign.fill(draw(recipe)), backend, against)
    return replace(finding, recipe=str(recipe))
