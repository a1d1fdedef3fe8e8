"""Pictures of the page: each drawn for a light and for a dark theme, and linked as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.plots import THEMES


def page_style(theme: str) -> dict[str, Any]:
    """Colours of a page's theme, and no frame."""
    look = THEMES[theme]
    ink = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    page = ("axes.facecolor", "figure.facecolor", "savefig.facecolor")
    return {
        **dict.fromkeys(ink, look["ink"]),
        **dict.fromkeys(page, look["page"]),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), look["grid"]),
        "font.size": 9,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def save(
    paint: Callable[[Any], None], folder: Path, stem: str, panels: int, size: tuple[float, float]
) -> None:
    """Write ``<stem>-light.png`` and ``<stem>-dark.png``; `paint` gets the list of axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        with plt.rc_context(page_style(theme)):
            figure, axes = plt.subplots(1, panels, figsize=size, sharey=True, squeeze=False)
            paint(list(axes[0]))
            figure.tight_layout()
            figure.savefig(folder / f"{stem}-{theme}.png", dpi=110, metadata={"Software": None})
            plt.close(figure)


def link(home: str, stem: str, words: str) -> str:
    """The picture in Markdown, by the reader's theme."""
    return f"""<picture>
<source media="(prefers-color-scheme: dark)" srcset="{home}/{stem}-dark.png">
<img src="{home}/{stem}-light.png" alt="{words}">
</picture>"""


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
