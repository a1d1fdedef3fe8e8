"""Draw the pictures of docs/gallery.md from the code of that page: `make images`."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import scfa_core as scfa
from scfa_core.plotting import original_mask, require_matplotlib, sorted_mask, tile_states

HERE = Path(__file__).parent
PAGE = HERE / "gallery.md"
TILE = 8
SIDE, GAP, TITLE = 1.5, 0.25, 0.25  # inches
# Page, ink of a visible pair, ink of a tile with some; a tile with all has the first ink.
THEMES = {
    "light": ("#ffffff", "#1f4e79", "#f2c14e", "#1f2328", "#d0d7de"),
    "dark": ("#0d1117", "#6cb6ff", "#c69026", "#e6edf3", "#30363d"),
}
_PART = re.compile(
    r"^```python\n(?P<code>.*?)^```$|<img src=\"(?P<picture>[^\"]+)-light\.png\"", re.M | re.S
)


class Entry(NamedTuple):
    """One picture: what is drawn and under which name."""

    path: Path  # without "-light.png"
    masks: list[Any]  # bool (queries, rows), one a head
    tiles: Any  # 0, 1, 2 of each tile, or None for a union

    def digest(self) -> str:
        """Name what is drawn; stored in each picture, so that a test finds those out of date."""
        return sha256(b"".join(np.packbits(mask).tobytes() for mask in self.masks)).hexdigest()


def entries() -> list[Entry]:
    """Run the page from top to bottom; each picture shows what the block before it left behind."""
    names: dict[str, Any] = {"__name__": "gallery"}
    found = []
    for part in _PART.finditer(PAGE.read_text()):
        if part["code"]:
            for name in ("pattern", "union", "queries"):
                names.pop(name, None)
            exec(part["code"], names)
            continue
        rows = names["rows"]
        queries = names.get("queries", rows)
        patterns = [names["pattern"]] if "pattern" in names else names["union"]
        found.append(Entry(HERE / part["picture"], *look(patterns, queries, rows)))
    return found


def look(patterns: list[scfa.Pattern], queries: int, rows: int) -> tuple[list[Any], Any]:
    """Masks of the heads, and the tiles of the first head's plan if there is one plan."""
    heads = max((x.shape[1] for p in patterns for x in arrays_of(p)), default=1)
    q, k = (np.zeros((1, heads, n, 16), np.float32) for n in (queries, rows))
    plans = [scfa.make_plan(p, q, k, backend="reference") for p in patterns]
    masks = [np.sum([original_mask(p, 0, h) for p in plans], axis=0) for h in range(heads)]
    if any(mask.max() > 1 for mask in masks):
        raise ValueError("the parts of a union must be disjoint")
    tiles = tile_states(sorted_mask(plans[0]), TILE) if len(plans) == 1 else None
    return masks, tiles


def arrays_of(pattern: scfa.Pattern) -> list[Any]:
    """Every array of a pattern that has heads."""
    names = ("q_hash", "k_hash", "q_keep", "k_keep", "start", "end")
    return [getattr(part, name) for part in pattern.parts for name in names if hasattr(part, name)]


def draw(entry: Entry, theme: str) -> None:
    """Write one picture for pages of one brightness."""
    from matplotlib.colors import ListedColormap

    page, ink, some, text, grid = THEMES[theme]
    panels = [(mask, 1, ListedColormap([page, ink])) for mask in entry.masks]
    if entry.tiles is not None:
        panels.append((entry.tiles, TILE, ListedColormap([page, some, ink])))
    height = SIDE * entry.masks[0].shape[0] / entry.masks[0].shape[1]
    size = (len(panels) * (SIDE + GAP) - GAP + 0.1, height + TITLE + 0.05)
    figure = require_matplotlib()(figsize=size, facecolor=page)
    for number, (values, step, colours) in enumerate(panels):
        box = (0.05 + number * (SIDE + GAP), 0.05, SIDE, height)
        axes = figure.add_axes([x / size[i % 2] for i, x in enumerate(box)])
        extent = (0, values.shape[1] * step, values.shape[0] * step, 0)
        axes.imshow(values, colours, vmin=0, vmax=colours.N - 1, extent=extent, aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(grid)
        many = len(entry.masks) > 1
        head = f"head {number}" if many else "mask"
        title = head if number < len(entry.masks) else "sorted" + (", head 0" if many else "")
        axes.set_title(title, fontsize=7, color=text, pad=3)
    path = entry.path.with_name(f"{entry.path.name}-{theme}.png")
    notes = {"Software": None, "Description": entry.digest()}
    figure.savefig(path, dpi=150, facecolor=page, metadata=notes)


def main() -> None:
    """Write every picture twice."""
    for entry in entries():
        entry.path.parent.mkdir(parents=True, exist_ok=True)
        for theme in THEMES:
            draw(entry, theme)


if __name__ == "__main__":
    main()
