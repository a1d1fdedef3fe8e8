"""Tables and plots of many processes, from stored JSON alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import looks
from bench.looks import COLORS, THEMES

PANELS = {"strong": "strong scaling", "weak": "weak scaling", "comm_share": "communication alone"}


def _percent(row: dict[str, Any], field: str) -> str:
    return f"{100 * row[field]:.0f} %" if field in row else "-"


def _source(record: dict[str, Any]) -> str:
    facts = record["machine"]
    cards = ", ".join(f"{record['cards'].count(x)} x {x}" for x in dict.fromkeys(record["cards"]))
    nccl = f" {facts['nccl']}" if "nccl" in facts else ""
    return (
        f"{cards}; torch {facts['torch']}, {record['transport']}{nccl}, commit "
        f"{facts['commit'] or 'unknown'}, {facts['date'][:10]}."
    )


def checks(record: dict[str, Any]) -> str:
    """Table of one record of `check`."""
    lines = ["| check | error | error of one process | repeats bitwise |", "|---|---|---|---|"]
    for row in record["rows"]:
        name = row["check"] if row["ok"] else f"**failed** {row['check']}"
        again = "yes" if row["repeats"] else "no"
        lines.append(f"| {name} | {row['error']:.1e} | {row['error_of_one']:.1e} | {again} |")
    return "\n".join([*lines, "", f"{record['dtype']}, T={record['seqlen']}. {_source(record)}"])


def scaling(record: dict[str, Any]) -> str:
    """Tables of one record of `scale`: times, and the longest sequence."""
    lines = [
        "| what | way | T | buckets | ms | tokens/s | strong | weak | communication alone |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if row["what"] == "longest":
            continue
        head = f"| {row['what']} | {row['way']} | {row['seqlen']} | {row['buckets']} |"
        if "error" in row:
            lines.append(f"{head} {row['error']} | - | - | - | - |")
            continue
        shares = " | ".join(_percent(row, field) for field in PANELS)
        lines.append(f"{head} {row['ms']:.2f} | {row['tokens_per_s']:,.0f} | {shares} |")
    found = [row for row in record["rows"] if row["what"] == "longest"]
    if found:
        lines += [
            "",
            "| longest training sequence | T | ended by | peak GiB |",
            "|---|---|---|---|",
        ]
    for row in found:
        peak = f"{row['peak_gib']:.1f}" if row.get("peak_gib") else "-"
        lines.append(f"| {row['way']} | {row['seqlen']} | {row['stopped_by']} | {peak} |")
    return "\n".join([*lines, "", _source(record)])


def _series(record: dict[str, Any], field: str) -> dict[str, list[tuple[int, float]]]:
    """Percent against T of each way: buckets of one size, and one number of buckets for all T.

    A row may be a point of both.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    rows = [row for row in record["rows"] if field in row]
    size = record["bucket_size"]
    kept = {row["buckets"] for row in rows if row["buckets"] * size != row["seqlen"]}
    for row in rows:
        point = row["seqlen"], 100 * row[field]
        name = f"{row['what']}, {row['way']}"
        if row["buckets"] * size == row["seqlen"]:
            series.setdefault(f"{name}, T/{size} buckets", []).append(point)
        if row["buckets"] in kept:
            series.setdefault(f"{name}, {row['buckets']} buckets", []).append(point)
    return series


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Efficiency and communication against T in two themes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for theme in THEMES:
        with plt.rc_context(looks.style(theme)):
            figure, axes = plt.subplots(1, 3, figsize=(14.4, 4.0), sharey=True)
            for axis, (field, title) in zip(axes, PANELS.items(), strict=True):
                series = _series(record, field)
                for (name, points), color in zip(series.items(), COLORS * 4, strict=False):
                    xs, ys = zip(*sorted(points), strict=True)
                    axis.plot(xs, ys, "o-", markersize=3.5, linewidth=1.4, color=color, label=name)
                axis.set_title(title)
                axis.set_xscale("log", base=2)
                axis.set_xlabel("sequence length T")
                axis.grid(True, linewidth=0.6)
                if series:
                    axis.legend(fontsize=7)
            axes[0].set_ylabel(f"%, {record['ranks']} processes")
            axes[0].set_ylim(bottom=0)
            figure.tight_layout()
            path = folder / f"scale-{record['ranks']}-{theme}.png"
            figure.savefig(path, dpi=110, metadata={"Software": None})
            plt.close(figure)
            made.append(path)
    return made


def main(records: list[Path], plots: Path | None) -> None:
    """Print every record's tables; draw those of scaling."""
    for path in records:
        record = json.loads(path.read_text())
        if record["kind"] == "distributed-check":
            print(checks(record), end="\n\n")
            continue
        print(scaling(record), end="\n\n")
        if plots is not None:
            draw(record, plots)
