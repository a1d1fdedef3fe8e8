"""Plots from stored JSON, each once for a light and once for a dark page."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from bench import looks
from bench.cases import DENSE_ONLY, Case, every_case
from bench.details import beyond_results, executed
from bench.looks import COLORS, THEMES

MODES = {"forward": "forward, whole call", "backward": "backward, plan given"}
PAPER = {"hash: forward and backward": "hash", "drops: forward and backward": "qk"}
PANELS = (*MODES, *PAPER)

Series = dict[str, list[tuple[float, dict[str, Any]]]]
Styles = dict[str, dict[str, Any]]


def timed_rows(record: dict[str, Any], mode: str) -> list[tuple[Case, dict[str, Any]]]:
    """Rows of one mode that hold a time, with the case each names."""
    known = every_case()
    return [
        (known[row["case"]], row)
        for row in record["rows"]
        if row["mode"] == mode and "ms" in row and row["case"] in known
    ]


def by_length(record: dict[str, Any], mode: str, growth: bool) -> Series:
    """Times against T of every method and pattern that has at least two lengths of one shape.

    Of each, the shape with the most lengths: cases of other shapes belong to no line of it.
    """
    found: dict[str, dict[Any, list[tuple[float, dict[str, Any]]]]] = {}
    for case, row in timed_rows(record, mode):
        if case.name.startswith("growth") != growth:
            continue
        if row["method"] in DENSE_ONLY:
            if case.kind != "dense" and not growth:
                continue
            label = f"{row['method']}, dense"
        else:
            label = f"{row['method']}, {'growing buckets' if growth else case.pattern}"
        shape = (case.batch, case.heads, case.heads_kv, case.head_dim, case.dtype)
        found.setdefault(label, {}).setdefault(shape, []).append((case.seqlen, row))
    best = {label: max(shapes.values(), key=len) for label, shapes in found.items()}
    return {
        label: sorted(points, key=lambda x: x[0])
        for label, points in best.items()
        if len(points) > 1
    }


def speedups(record: dict[str, Any], mode: str) -> Series:
    """Speed-up over the fastest dense peer of the same case, against the share of pairs seen.

    Of each method and kind, the sweep with the most cases at one length; the dense case of that
    length joins it.
    """
    rows = timed_rows(record, mode)
    dense: dict[str, float] = {}
    for case, row in rows:
        if row["method"] in DENSE_ONLY:
            dense[case.name] = min(row["ms"], dense.get(case.name, math.inf))
    sweeps: dict[tuple[Any, ...], dict[str, tuple[float, dict[str, Any]]]] = {}
    for case, row in rows:
        growing = case.name.startswith("growth")
        if row["method"] in DENSE_ONLY or case.name not in dense or growing:
            continue
        share = 2 * row["density"] * case.seqlen / (case.seqlen + 1)
        point = share, row | {"speedup": dense[case.name] / row["ms"], "label": case.number}
        shape = (case.seqlen, case.batch, case.heads, case.heads_kv, case.head_dim, case.dtype)
        sweeps.setdefault((row["method"], case.kind, shape), {})[case.name] = point
    best: Series = {}
    for (method, kind, shape), found in sweeps.items():
        if kind not in ("hash", "qk") or len(found) < 3:
            continue
        points = [*found.values(), *sweeps.get((method, "dense", shape), {}).values()]
        label = f"{method}, {kind}, T={shape[0]}"
        best[label] = sorted(points, key=lambda x: x[0])
    return best


def by_length_of(record: dict[str, Any], mode: str, field: str) -> Series:
    """`by_length` where every point has `field`; empty where none has."""
    found = {
        label: [(x, row) for x, row in points if row.get(field) is not None]
        for label, points in by_length(record, mode, growth=False).items()
    }
    return {label: points for label, points in found.items() if len(points) > 1}


def paper(record: dict[str, Any], panel: str) -> Series:
    """The paper's runtime figure: forward and backward together against T, at its shape.

    Batch 4, 48 heads, head_dim 64; a panel of hashes and one of drops, of this package and of the
    original, beside dense kernels. A record may bring dense rows of another run, as "beside".
    """
    lines = _of_the_paper(record, PAPER.get(panel, ""))
    if all(label.endswith(", dense") for label in lines):
        return {}
    for label, points in _of_the_paper({"rows": record.get("beside", ())}, "dense").items():
        lines.setdefault(f"{label} (another run)", points)
    return lines


def _of_the_paper(record: dict[str, Any], kind: str) -> Series:
    """Lines of dense attention and of one kind of pattern, at the paper's shape."""
    backward = {(case.name, row["method"]): row for case, row in timed_rows(record, "backward")}
    series: Series = {}
    for case, row in timed_rows(record, "forward") if kind else ():
        other = backward.get((case.name, row["method"]))
        if other is None or (case.batch, case.heads, case.head_dim) != (4, 48, 64):
            continue
        if case.dtype != "bfloat16" or case.kind not in (kind, "dense"):
            continue
        if row["method"] in DENSE_ONLY and case.kind != "dense":
            continue
        both = {name: row[name] + other[name] for name in ("ms", "low", "high")}
        label = f"{row['method']}, {case.pattern}"
        series.setdefault(label, []).append((case.seqlen, row | both))
    lines = {label: sorted(points, key=lambda x: x[0]) for label, points in series.items()}
    return {label: points for label, points in lines.items() if len(points) > 1}


def crossover(points: list[tuple[float, dict[str, Any]]]) -> float | None:
    """Share of pairs at which the speed-up passes 1, between two measured points; None if never."""
    for (x0, low), (x1, high) in itertools.pairwise(points):
        y0, y1 = math.log(low["speedup"]), math.log(high["speedup"])
        if y0 >= 0 > y1 or y0 < 0 <= y1:
            return math.exp(math.log(x0) + (math.log(x1) - math.log(x0)) * y0 / (y0 - y1))
    return None


def exponent(points: list[tuple[float, dict[str, Any]]]) -> float:
    """By which power of T the time grows, from the first to the last point."""
    (x0, first), (x1, last) = points[0], points[-1]
    return math.log(last["ms"] / first["ms"]) / math.log(x1 / x0)


def names(record: dict[str, Any], stem: str) -> list[tuple[str, str]]:
    """File stem and caption of every plot that the record has rows for."""
    return [
        (f"{stem}-{name}", caption)
        for name, (caption, find, _) in PLOTS.items()
        if any(find(record, panel) for panel in PANELS)
    ]


def draw(record: dict[str, Any], folder: Path, stem: str) -> None:
    """Write every plot that the record has rows for."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, find, paint) in PLOTS.items():
        panels = {panel: find(record, panel) for panel in PANELS}
        panels = {panel: series for panel, series in panels.items() if series}
        for theme in THEMES if panels else ():
            _figure(panels, paint, theme, folder / f"{stem}-{name}-{theme}.png")


def _figure(panels: dict[str, Series], paint: Any, theme: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    look = THEMES[theme]
    styles = looks.lines(dict.fromkeys(itertools.chain.from_iterable(panels.values())))
    with plt.rc_context(looks.style(theme)):
        width = 4.8 * len(panels)
        figure, axes = plt.subplots(1, len(panels), figsize=(width, 4.0), squeeze=False)
        for axis, (title, series) in zip(axes[0], panels.items(), strict=True):
            axis.set_title(MODES.get(title, title))
            axis.grid(True, which="major", linewidth=0.6)
            axis.minorticks_off()
            paint(axis, series, look["ink"], styles)
        looks.legend(figure, list(axes[0]))
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)


def _log_axes(axis: Any, ticks: list[float], words: list[str]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(ticks, words)
    axis.minorticks_off()


def _times(
    axis: Any,
    series: Series,
    ink: str,
    styles: Styles | None = None,
    label: Any = lambda name, points: name,
) -> None:
    lengths = sorted({x for points in series.values() for x, _ in points})
    _log_axes(axis, lengths, [f"{x // 1024:g}k" for x in lengths])
    styles = styles or looks.lines(series)
    for name, points in series.items():
        ms = [row["ms"] for _, row in points]
        spread = [
            [row["ms"] - row["low"] for _, row in points],
            [row["high"] - row["ms"] for _, row in points],
        ]
        axis.errorbar(
            [x for x, _ in points],
            ms,
            yerr=spread,
            capsize=2,
            label=label(name, points),
            **styles[name],
        )
    axis.set_xlabel("sequence length T")
    axis.set_ylabel("ms, median; bars: 20 % to 80 %")


def _field(words: str, *lines: tuple[str, bool, Any], title: str = "") -> Any:
    """A painter against T from 0: of each series a line per (name, main or faint, value)."""

    def paint(axis: Any, series: Series, ink: str, styles: Styles | None = None) -> None:
        lengths = sorted({x for points in series.values() for x, _ in points})
        axis.set_xscale("log")
        axis.set_xticks(lengths, [f"{x // 1024:g}k" for x in lengths])
        styles = styles or looks.lines(series)
        many = len(styles) > looks.IN_AXES
        for name, points in series.items():
            for which, main, value in lines:
                found = [(x, value(row)) for x, row in points if value(row) is not None]
                look = styles[name] | ({} if main else looks.FAINT)
                # A legend of many lines names each once; the label of the axis says what is faint.
                label = f"{name}: {which}" if which and not (main and many) else name
                if found:
                    xs, ys = zip(*found, strict=True)
                    axis.plot(xs, ys, label=f"_{label}" if many and not main else label, **look)
        axis.set_ylim(bottom=0)
        axis.minorticks_off()
        axis.set_xlabel("sequence length T")
        axis.set_ylabel(words)
        if title:
            axis.set_title(title)

    return paint


def host_times(record: dict[str, Any], mode: str) -> Series:
    """Host time of a call with its plan given, against T; one panel, under the forward's name."""
    return by_length_of(record, "planned", "host_us") if mode == "forward" else {}


def compiling(record: dict[str, Any], mode: str) -> Series:
    """Seconds of compiling by method and case, cold and from the cache; one panel."""
    series: Series = {}
    for row in record["rows"] if mode == "forward" else ():
        if row["mode"].startswith("jit-"):
            series.setdefault(f"{row['method']}\n{row['case']}", []).append((0.0, row))
    return series


def _compiling(axis: Any, series: Series, ink: str, styles: Styles | None = None) -> None:
    for number, (mode, words) in enumerate(
        (("jit-cold", "empty cache"), ("jit-cached", "filled cache"))
    ):
        bars = [
            (place + 0.4 * number, row["ms"] / 1e3)
            for place, points in enumerate(series.values())
            for _, row in points
            if row["mode"] == mode
        ]
        if bars:
            drawn = axis.barh(*zip(*bars, strict=True), 0.38, color=COLORS[number], label=words)
            axis.bar_label(drawn, fmt="%.2g s", fontsize=7.5, padding=2, color=ink)
    axis.set_yticks([place + 0.2 for place in range(len(series))], list(series))
    axis.set_xlabel("seconds of the first use")
    axis.set_title("compiling")
    axis.margins(x=0.15)


def _growth(axis: Any, series: Series, ink: str, styles: Styles | None = None) -> None:
    _times(axis, series, ink, styles, lambda name, points: f"{name}: T^{exponent(points):.2f}")


def _speedup(axis: Any, series: Series, ink: str, styles: Styles | None = None) -> None:
    ticks = [1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01]
    smallest = min(x for points in series.values() for x, _ in points)
    ticks = [x for x in ticks if x >= smallest * 0.8]
    _log_axes(axis, ticks, [f"{100 * x:g} %" for x in ticks])
    axis.axhline(1.0, color=ink, linewidth=1.0, linestyle=":")
    for (name, points), color in zip(series.items(), COLORS * 4, strict=False):
        at = crossover(points)
        note = "no crossover measured" if at is None else f"crossover at {100 * at:.0f} %"
        xs, ys = [x for x, _ in points], [row["speedup"] for _, row in points]
        axis.plot(
            xs, ys, marker="o", markersize=3.5, linewidth=1.4, color=color, label=f"{name}: {note}"
        )
        if at is not None:
            axis.axvline(at, color=color, linewidth=1.0, linestyle="--")
        for x, row in points:
            if row["label"]:
                where = {"textcoords": "offset points", "xytext": (3, 4), "fontsize": 7}
                axis.annotate(str(row["label"]), (x, row["speedup"]), color=color, **where)
    axis.invert_xaxis()
    most = max(row["speedup"] for points in series.values() for _, row in points)
    heights = [x for x in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100) if x <= most * 1.1]
    axis.set_yticks(heights, [f"{x:g}x" for x in heights])
    axis.minorticks_off()
    axis.set_xlabel("pairs seen, of the causal ones (points: buckets, or % dropped)")
    axis.set_ylabel("speed-up over the fastest dense peer")


PLOTS = {
    "length": (
        "Time against sequence length",
        lambda record, mode: by_length(record, mode, growth=False),
        _times,
    ),
    "speedup": ("Speed-up over dense attention against sparsity", speedups, _speedup),
    "growth": (
        "Growth with buckets of constant size",
        lambda record, mode: by_length(record, mode, growth=True),
        _growth,
    ),
    "paper": ("The paper's runtime figure on this card", paper, _times),
    "rate": (
        "Useful and executed TFLOP/s",
        lambda record, mode: by_length_of(record, mode, "tflops"),
        _field(
            "TFLOP/s of visible pairs; faint: of their tiles",
            ("", True, lambda row: row["tflops"]),
            ("executed", False, executed),
        ),
    ),
    "floor": (
        "Share of the floor, in flops and in bytes",
        lambda record, mode: by_length_of(record, mode, "floor_share"),
        _field(
            "floor over time, %: of flops; faint: of bytes",
            ("flops", True, lambda row: 100 * row["floor_flops_share"]),
            ("bytes", False, lambda row: 100 * row["floor_bytes_share"]),
        ),
    ),
    "memory": (
        "Memory at the peak beyond inputs and outputs",
        lambda record, mode: by_length_of(record, mode, "extra_bytes"),
        _field("MiB", ("", True, lambda row: beyond_results(row) / 2**20)),
    ),
    "host": (
        "Host time of one call",
        host_times,
        _field("microseconds", ("", True, lambda row: row["host_us"]), title="forward, plan given"),
    ),
    "jit": ("Compiling, cold and from the cache", compiling, _compiling),
}
