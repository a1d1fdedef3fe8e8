"""The page and its plots from stored JSON alone: what was run, on what, for how long."""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path
from typing import Any

from bench.lm.speed import BOUND, table
from bench.plots import COLORS, THEMES

HEAD = """\
# The paper's language model

Training speed at equal quality was the claim of the paper (arXiv 2306.01160). `python -m bench.lm`
trains its model: a decoder whose keys are the normalised queries, so that query and key of a token
share a bucket, hashed with fresh directions at every step; a token does not see itself in hash
mode. Variants differ by attention alone: `dense` (torch SDPA, on a GPU cuDNN's kernel),
`hash<buckets>`, `drop<percent>` (random queries and keys dropped), `window<keys>`,
`hash...+window...`, `naive` (masked, all scores in memory), `reformer<buckets>`, and `none`:
attention replaced by q + k + v, which nothing can beat in speed.

The queries of a layer have much in common, so that an angular hash puts most of them into few
buckets, and the more so the deeper the layer: the work is then a multiple of what even buckets
would cost. `hash<buckets>c` hashes queries about the running mean of earlier steps, and
`hash<buckets>w` divides by their covariance as well; both choose buckets without a look at later
rows of the sequence. The tables name the multiple (bucket cost; 1 is even, the number of buckets is
dense attention).

Text is the standard library of Python and the installed packages of the machine, by bytes,
deduplicated, split by file; a run records the hash of its corpus. Packages copy from each other, so
validation files are not strangers to training: read losses against each other, not against those of
other corpora. Steps are timed on the same text by words hashed to the model's vocabulary, so that
their frequencies, and with them the buckets, are like a tokeniser's.

This page is made by `python -m bench.lm report` from stored JSON. In order: the paper's 12 layers
at T=8192 to 32768; the kernels of their steps; 8 layers of 512 at T=8192, ten minutes each for
dense, hash16 and drop50; the paper's model with checkpoints, resumed where it stopped; this page.

```text
python -m bench.lm speed --json speed.json
python -m bench.lm speed --profile --lengths 16384
python -m bench.lm quality --seconds 600 --json quality.json
python -m bench.lm train --attention hash16 --out runs
python -m bench.lm report speed.json quality.json --page page.md --plots img
```"""
NO_GPU = (
    "**No GPU run is recorded yet.** What follows ran on a CPU that other work shared, a small "
    "model for a short time: it shows that the trainer works and how buckets crowd. It says "
    "nothing about the paper's claim, and its seconds and tokens/s are no measure of speed."
)


def _machine(record: dict[str, Any]) -> str:
    """Where, with what and when."""
    facts = record["machine"]
    threads = f" ({facts['threads']} threads)" if "threads" in facts else ""
    cuda = f", CUDA {facts['cuda']}" if "cuda" in facts else ""
    changed = " with uncommitted changes" if facts.get("changed") else ""
    commit = f", commit {facts['commit']}{changed}" if facts.get("commit") else ""
    return f"{facts['card']}{threads}, torch {facts['torch']}{cuda}{commit}, {facts['date'][:10]}"


def speed_section(record: dict[str, Any]) -> str:
    """Table of milliseconds, and how the steps were made."""
    rows = [row for row in record["rows"] if "ms" in row]
    scopes = ", ".join(dict.fromkeys(row["compile"] for row in rows))
    tokens = ", ".join(dict.fromkeys(str(row["tokens_per_step"]) for row in rows))
    text = (
        f"Whole steps (forward, backward, clipping, AdamW), median, {tokens} tokens a step, "
        f"compiled: {scopes}. In brackets the speed-up over dense and the share of the bound "
        f"`{BOUND}` that is reached. {_machine(record)}."
    )
    costs = [
        f"{row['variant']} {row['bucket_cost']:.2f} (T={row['seqlen']})"
        for row in rows
        if "bucket_cost" in row
    ]
    if costs:
        text += (
            " Same-bucket pairs over those of even buckets, after the steps of the measurement: "
            f"{', '.join(costs)}."
        )
    failed = [
        f"{r['variant']} at T={r['seqlen']} ({r['error']})" for r in record["rows"] if "error" in r
    ]
    if failed:
        text += " Failed: " + "; ".join(failed) + "."
    return "\n".join([*table(rows), "", text])


def by_variant(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Finished runs of each variant."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run["done"]:
            found.setdefault(run["config"]["attention"], []).append(run)
    return found


def settings(run: dict[str, Any]) -> tuple[Any, ...]:
    """What runs of one table share."""
    config = {k: v for k, v in run["config"].items() if k not in ("attention", "seed")}
    return (run["corpus"], run["machine"]["card"], *sorted(config.items(), key=lambda x: x[0]))


def quality_section(runs: list[dict[str, Any]]) -> str:
    """Final validation losses of runs with the same settings."""
    lines = [
        "| variant | seeds | steps | tokens/s | validation, nats | bits a token | bucket cost |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, same in by_variant(runs).items():
        last = [run["curve"][-1] for run in same]
        losses = [point["validation"] for point in last]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        mean = statistics.fmean(losses)
        steps = round(statistics.fmean(point["step"] for point in last))
        rate = statistics.fmean(point["tokens"] / point["seconds"] for point in last)
        cost = f"{same[0]['bucket_cost']:.2f}" if same[0].get("bucket_cost") else "-"
        lines.append(
            f"| {variant} | {len(same)} | {steps} | {rate:,.0f} | {mean:.4f}{spread} | "
            f"{mean / math.log(2):.4f} | {cost} |"
        )
    config = runs[0]["config"]
    equal = (
        f"{config['seconds']:g} seconds of training each" if config["seconds"] else "equal steps"
    )
    text = (
        f"{runs[0]['parameters'] / 1e6:.1f} million parameters, {config['layers']} layers of "
        f"{config['heads']} heads of {config['head_dim']}, T={config['seqlen']}, "
        f"{config['tokens_per_step']} tokens a step, {equal} (compilation and validation not "
        f"counted). Bucket cost: same-bucket pairs over those of even buckets, at the end. Corpus "
        f"{runs[0]['corpus'][:12]}. {_machine(runs[0])}."
    )
    return "\n".join([*lines, "", text])


def _style(theme: str) -> dict[str, Any]:
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


def draw(runs: list[dict[str, Any]], folder: Path, stem: str) -> None:
    """Validation loss against seconds and against steps, light and dark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        with plt.rc_context(_style(theme)):
            figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.0), sharey=True)
            for axis, key, word in zip(
                axes, ("seconds", "step"), ("seconds of training", "steps"), strict=True
            ):
                for (variant, same), color in zip(
                    by_variant(runs).items(), COLORS * 4, strict=False
                ):
                    for nth, run in enumerate(same):
                        axis.plot(
                            [point[key] for point in run["curve"]],
                            [point["validation"] for point in run["curve"]],
                            marker="o",
                            markersize=3,
                            linewidth=1.4,
                            color=color,
                            label=variant if nth == 0 else None,
                        )
                axis.set_xlabel(word)
                axis.grid(True, linewidth=0.6)
            axes[0].set_ylabel("validation loss, nats a token")
            axes[0].legend(fontsize=7.5)
            figure.tight_layout()
            figure.savefig(folder / f"{stem}-{theme}.png", dpi=110, metadata={"Software": None})
            plt.close(figure)


def write(records: list[dict[str, Any]], page: Path, plots: Path) -> None:
    """Write the page; pictures are linked relative to it."""
    parts = [HEAD]
    machines = [r["machine"] for r in records if "rows" in r]
    machines += [run["machine"] for r in records for run in r.get("runs", ())]
    if not any("cuda" in facts for facts in machines):
        parts.append(NO_GPU)
    timed = [record for record in records if "rows" in record]
    if timed:
        parts += ["## Speed", *(speed_section(record) for record in timed)]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        for run in record.get("runs", ()):
            if run["done"]:
                groups.setdefault(settings(run), []).append(run)
    if groups:
        parts.append("## Quality")
    home = Path(os.path.relpath(plots, page.parent)).as_posix()
    for nth, runs in enumerate(groups.values()):
        stem = f"lm-quality-{nth}"
        draw(runs, plots, stem)
        parts += [
            quality_section(runs),
            f"""<picture>
<source media="(prefers-color-scheme: dark)" srcset="{home}/{stem}-dark.png">
<img src="{home}/{stem}-light.png" alt="Validation loss against seconds and steps">
</picture>""",
        ]
    page.write_text("\n\n".join(parts) + "\n")
