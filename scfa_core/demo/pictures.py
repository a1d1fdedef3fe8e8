"""The demo's picture of losses: each variant by step and by second."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scfa_core.plotting import require_matplotlib

if TYPE_CHECKING:
    from scfa_core.demo.training import Run

COLOURS = ("#1f4e79", "#c8553d", "#7a9e3f", "#888888")


def smoothed(losses: list[float], width: int = 9) -> NDArray[np.float64]:
    """Mean over up to `width` steps around each; batches differ more than steps do."""
    values = np.asarray(losses, np.float64)
    window = np.ones(min(width, len(values)))
    total = np.convolve(values, window, mode="same")
    mean: NDArray[np.float64] = total / np.convolve(np.ones_like(values), window, mode="same")
    return mean


def draw_losses(runs: list[Run], path: Path) -> None:
    """Write the loss curves."""
    figure = require_matplotlib()(figsize=(8.4, 3.6), layout="constrained")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for run, colour in zip(runs, COLOURS, strict=False):
        curve = smoothed(run.losses)
        label = f"{run.name} (held out {run.held_out:.2f})"
        by_step.plot(np.arange(1, len(curve) + 1), curve, color=colour, label=label)
        by_second.plot(np.cumsum(run.seconds), curve, color=colour)
    by_step.set_xlabel("step")
    by_step.set_ylabel("loss, nats per byte")
    by_second.set_xlabel("seconds of training")
    by_step.legend(frameon=False, fontsize=8)
    for axes in (by_step, by_second):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
