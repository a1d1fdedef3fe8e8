"""How lines look on a light and on a dark page: a color a pattern, a marker and a dash a method."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

THEMES = {
    "light": {"ink": "#1f2328", "grid": "#d0d7de", "page": "#ffffff"},
    "dark": {"ink": "#e6edf3", "grid": "#30363d", "page": "#0d1117"},
}
COLORS = ("#2f81f7", "#f0883e", "#3fb950", "#db61a2", "#a371f7", "#d4a72c", "#39c5cf", "#8b949e")
# From few to many pairs left out; readable on both pages.
RAMPS = {"hash": ("#56b7e6", "#2f6fe0", "#8a4bd8"), "qk": ("#d9a62e", "#e8702a", "#c4306b")}
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*X"
IN_AXES = 6  # lines that a legend within the axes can name
FAINT = {"alpha": 0.45, "linewidth": 1.0}


def style(theme: str) -> dict[str, Any]:
    """Settings of matplotlib for a page."""
    look = THEMES[theme]
    return {
        "font.size": 9,
        "text.color": look["ink"],
        "axes.labelcolor": look["ink"],
        "axes.edgecolor": look["grid"],
        "xtick.color": look["ink"],
        "ytick.color": look["ink"],
        "grid.color": look["grid"],
        "axes.facecolor": look["page"],
        "figure.facecolor": look["page"],
        "savefig.facecolor": look["page"],
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def picture(path: str, words: str) -> str:
    """Markdown of ``<path>-light.png`` and ``<path>-dark.png``, shown by the reader's theme."""
    return f"""<picture>
<source media="(prefers-color-scheme: dark)" srcset="{path}-dark.png">
<img src="{path}-light.png" alt="{words}">
</picture>"""


def lines(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the look of each line named "method, pattern"; no two lines look alike.

    Few lines have a color each. Many share the color of their pattern, in the order of what the
    pattern leaves out, and tell methods apart by dash and marker.
    """
    names = list(names)
    if len(names) <= IN_AXES:
        plain = {"marker": "o", "markersize": 3.5, "linewidth": 1.4}
        return {name: plain | {"color": color} for name, color in zip(names, COLORS, strict=False)}
    parts = [name.partition(", ")[::2] for name in names]
    colors = _colors({pattern for _, pattern in parts})
    # This package's lines are whole, whoever was timed first.
    methods = sorted(
        dict.fromkeys(method for method, _ in parts), key=lambda x: not x.startswith("scfa-")
    )
    looks = {}
    for name, (method, pattern) in zip(names, parts, strict=True):
        place = methods.index(method)
        looks[name] = {
            "color": colors[pattern],
            "linestyle": DASHES[place % len(DASHES)],
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 3.5,
            "linewidth": 1.4,
        }
    return looks


def _colors(patterns: set[str]) -> dict[str, Any]:
    from matplotlib.colors import LinearSegmentedColormap

    found: dict[str, Any] = {}
    for kind, ramp in RAMPS.items():
        mine = {int(x[1]): x[0] for p in patterns if (x := re.fullmatch(rf"{kind}(\d+)", p))}
        steps = LinearSegmentedColormap.from_list(kind, ramp)
        for place, number in enumerate(sorted(mine)):
            found[mine[number]] = steps(place / max(len(mine) - 1, 1))
    rest = sorted(patterns - set(found))
    others = ("#3fb950", "#8b949e", "#39c5cf", "#a0522d", "#6e7781")
    return found | {pattern: others[i % len(others)] for i, pattern in enumerate(rest)}


def legend(figure: Any, axes: list[Any]) -> None:
    """Name the lines: within the axes where they are few, else once, below all of them."""
    named: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if len(named) <= IN_AXES or max(len(label) for label in named) > 60:
        for axis in axes:
            axis.legend(fontsize=7.5)
        figure.tight_layout()
        return
    columns = 2 * len(axes)
    order = sorted(named, key=_in_order)
    rows = -(-len(order) // columns)
    width, height = figure.get_size_inches()
    below = 0.165 * rows + 0.1
    figure.set_size_inches(width, height + below)
    figure.legend(
        [named[label] for label in order], order, loc="lower center", ncols=columns, fontsize=7.5
    )
    figure.tight_layout(rect=(0, below / (height + below), 1, 1))


def _in_order(label: str) -> tuple[Any, ...]:
    """Sort by method, then by kind, then by number: hash16 before hash128."""
    return tuple(int(x) if x.isdigit() else x for x in re.split(r"(\d+)", label))
