"""Pictures of the page, each drawn for a light and for a dark theme."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import looks


def save(
    paint: Callable[[Any], None], folder: Path, stem: str, panels: int, size: tuple[float, float]
) -> None:
    """Write ``<stem>-light.png`` and ``<stem>-dark.png``; `paint` gets the list of axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for theme in looks.THEMES:
        with plt.rc_context(looks.style(theme)):
            figure, axes = plt.subplots(1, panels, figsize=size, sharey=True, squeeze=False)
            paint(list(axes[0]))
            figure.tight_layout()
            figure.savefig(folder / f"{stem}-{theme}.png", dpi=110, metadata={"Software": None})
            plt.close(figure)


def mosaic(
    rows: dict[str, list[list[int]]], shape: list[int], levels: int
) -> Callable[[Any], None]:
    """Painter of grey images (pixels row by row), a named line of them each."""
    import numpy as np

    def paint(axes: Any) -> None:
        axis = axes[0]
        height, width = shape
        count = max(len(images) for images in rows.values())
        sheet = np.full((len(rows) * (height + 1) - 1, count * (width + 1) - 1), np.nan)
        for line, images in enumerate(rows.values()):
            for place, pixels in enumerate(images):
                top, left = line * (height + 1), place * (width + 1)
                sheet[top : top + height, left : left + width] = np.reshape(pixels, shape)
        axis.imshow(sheet, cmap="gray", vmin=0, vmax=levels - 1)
        centers = [line * (height + 1) + (height - 1) / 2 for line in range(len(rows))]
        axis.set_yticks(centers, list(rows))
        axis.set_xticks([])
        axis.tick_params(length=0)
        for side in ("left", "bottom"):
            axis.spines[side].set_visible(False)

    return paint
