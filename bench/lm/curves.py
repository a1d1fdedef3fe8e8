"""Validation curves of many runs and sittings to tables and plots, one for each setting."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bench.lm.train import COOLING
from bench.looks import COLORS

Run = dict[str, Any]
SKIPPED = 0.1  # share of the longest curve whose losses may lie above the plot


APART = ("attention", "seed", "micro_batch")  # what runs of one table need not share


def settings(run: Run) -> tuple[Any, ...]:
    """What runs of one table share; a step may be made of more or fewer passes."""
    given = {"graph": False} | run["config"]  # older runs lack what they did not do
    config = {k: v for k, v in given.items() if k not in APART}
    facts = run["machine"]
    return (run["corpus"], facts["card"], facts["torch"], *sorted(config.items(), key=str))


def merge(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of all sittings by setting; of those that are the same run, the one that got furthest.

    A setting of which no run is finished is left out.
    """
    groups: dict[tuple[Any, ...], dict[tuple[str, int], Run]] = {}
    for run in runs:
        group = groups.setdefault(settings(run), {})
        name = run["config"]["attention"], run["config"]["seed"]
        if name not in group or _progress(run) > _progress(group[name]):
            group[name] = run
    found = [sorted(group.values(), key=_order) for group in groups.values()]
    return [group for group in found if any(run["done"] for run in group)]


def _progress(run: Run) -> tuple[bool, int]:
    return run["done"], run["curve"][-1]["step"] if run["curve"] else 0


def _order(run: Run) -> tuple[bool, str, int, str, int]:
    """Dense first, then by kind and number, then by seed."""
    name = run["config"]["attention"]
    number = "".join(itertools.takewhile(str.isdigit, name.lstrip("abcdefghijklmnopqrstuvwxyz")))
    kind = "".join(itertools.takewhile(str.isalpha, name))
    return name != "dense", kind, int(number or 0), name, run["config"]["seed"]


def by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Finished runs of each variant."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run["done"]:
            found.setdefault(run["config"]["attention"], []).append(run)
    return found


def spread(values: Sequence[float], digits: int = 4, sign: str = "") -> str:
    """Mean, and the standard deviation if there are several."""
    text = f"{statistics.fmean(values):{sign}.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def last(run: Run) -> float:
    """Validation loss at the end."""
    return float(run["curve"][-1]["validation"])


def against(
    runs: Sequence[Run], others: Sequence[Run], loss: Callable[[Run], float]
) -> list[float]:
    """Differences of losses, seed by seed where both have it, else of the means."""
    mine, theirs = ({r["config"]["seed"]: loss(r) for r in x} for x in (runs, others))
    both = sorted(mine.keys() & theirs.keys())
    if both:
        return [mine[seed] - theirs[seed] for seed in both]
    return [statistics.fmean(mine.values()) - statistics.fmean(theirs.values())]


def comparable(run: Run) -> list[dict[str, Any]]:
    """Points at which the learning rate does not yet depend on how long the run is."""
    config = run["config"]
    if not config["seconds"]:
        return list(run["curve"])
    if config["schedule"] != "trapezoid":
        return []

    def share(point: dict[str, Any]) -> float:
        steps = (point["step"] - config["warmup"]) / max(config["steps"] - config["warmup"], 1)
        return max(steps, point["seconds"] / config["seconds"])

    return [point for point in run["curve"] if share(point) <= 1 - COOLING]


def loss_at(run: Run, step: float) -> float:
    """Validation loss at a step among the comparable points, on the line between neighbours."""
    points = [(point["step"], point["validation"]) for point in comparable(run)]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= step <= x1:
            return float(y0 + (y1 - y0) * (step - x0) / (x1 - x0))
    if points and points[-1][0] == step:
        return float(points[-1][1])
    return math.nan


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def end_table(runs: Sequence[Run]) -> list[str]:
    """Losses at the end of the seconds or steps."""
    variants = by_variant(runs)
    dense = variants.get("dense", [])
    unit = runs[0].get("unit", "byte")
    head = ["variant", "seeds", "steps", f"{unit}s/s", "validation, nats", "minus dense"]
    head += [f"bits a {unit}"]
    head += ["bits a byte"] if unit == "token" else []
    head += ["lowest on the way, bits"] if unit == "pixel" else []
    rows = []
    for variant, same in variants.items():
        ends = [run["curve"][-1] for run in same]
        losses = [last(run) for run in same]
        bits = statistics.fmean(losses) / math.log(2)
        rate = statistics.fmean(point["tokens"] / max(point["seconds"], 1e-9) for point in ends)
        row = [
            variant,
            str(len(same)),
            f"{statistics.fmean(point['step'] for point in ends):.0f}",
            f"{rate:,.0f}",
            spread(losses),
            spread(against(same, dense, last), sign="+") if dense and variant != "dense" else "-",
            f"{bits:.4f}",
        ]
        if unit == "token":
            row.append(f"{bits / same[0]['bytes_per_token']:.4f}")
        if unit == "pixel":
            low = [min(point["validation"] for point in run["curve"]) for run in same]
            row.append(f"{statistics.fmean(low) / math.log(2):.4f}")
        costs = [run["bucket_cost"] for run in same if run.get("bucket_cost")]
        rows.append([*row, f"{statistics.fmean(costs):.2f}" if costs else "-"])
    return _markdown([*head, "bucket cost"], rows)


def shared_step(runs: Sequence[Run]) -> int:
    """The last step that all of some runs reached before their rates fell; 0 if there is none."""
    return min((max((p["step"] for p in comparable(r)), default=0) for r in runs), default=0)


def steps_table(runs: Sequence[Run]) -> list[str]:
    """Losses at equal steps, where runs of equal seconds took different numbers; may be empty.

    At the last step that all reached, and of each variant at the last that it and dense reached.
    """
    variants = by_variant(runs)
    finished = [run for same in variants.values() for run in same]
    if not finished or not finished[0]["config"]["seconds"] or len(variants) < 2:
        return []
    step = shared_step(finished)
    if not step or any(math.isnan(loss_at(run, step)) for run in finished):
        return []
    dense = variants.get("dense", [])
    head = ["variant", f"at step {step}"]
    head += ["last step shared with dense", "there", "dense there", "difference"] if dense else []
    rows = []
    for variant, same in variants.items():
        row = [variant, spread([loss_at(run, step) for run in same])]
        if dense:
            own = shared_step([*same, *dense])
            pairs = against(same, dense, lambda run, own=own: loss_at(run, own))  # type: ignore[misc]
            row += [
                str(own),
                *(spread([loss_at(run, own) for run in some]) for some in (same, dense)),
                spread(pairs, sign="+") if variant != "dense" else "-",
            ]
        rows.append(row)
    return _markdown(head, rows)


def places_table(runs: Sequence[Run]) -> list[str]:
    """Losses by place in the sequence, and what they fall from the first stretch to the last.

    Of the runs that were asked for them; may be empty.
    """
    variants = by_variant([run for run in runs if "by_place" in run])
    if not variants:
        return []
    ends = next(iter(variants.values()))[0]["by_place"]["ends"]
    names = [f"{begin} to {end}" for begin, end in itertools.pairwise([0, *ends])]
    rows = []
    for variant, same in variants.items():
        losses = [run["by_place"]["loss"] for run in same]
        cells = [spread(column) for column in zip(*losses, strict=True)]
        rows.append([variant, *cells, spread([loss[0] - loss[-1] for loss in losses])])
    return _markdown(["variant", *names, "first minus last"], rows)


def unfinished(runs: Sequence[Run]) -> list[str]:
    """What failed or stopped, in words."""
    return [
        f"{run['config']['attention']} seed {run['config']['seed']} "
        f"({(run.get('error') or run.get('stopped') or 'stopped').split('. ')[0]}, "
        f"step {run['curve'][-1]['step'] if run['curve'] else 0})"
        for run in runs
        if not run["done"]
    ]


def painter(runs: Sequence[Run]) -> Callable[[Any], None]:
    """Validation loss against seconds and against steps; each seed is a line."""
    variants = by_variant(runs)
    curves = [run["curve"] for same in variants.values() for run in same]
    begin = SKIPPED * max(curve[-1]["seconds"] for curve in curves)
    late = [p["validation"] for curve in curves for p in curve if p["seconds"] >= begin]
    unit = runs[0].get("unit", "byte")

    def paint(axes: Any) -> None:
        for axis, key in zip(axes, ("seconds", "step"), strict=True):
            for (variant, same), color in zip(variants.items(), COLORS * 4, strict=False):
                for nth, run in enumerate(same):
                    axis.plot(
                        [point[key] for point in run["curve"]],
                        [point["validation"] for point in run["curve"]],
                        marker="o",
                        markersize=2.5,
                        linewidth=1.2,
                        alpha=0.9 if nth == 0 else 0.55,
                        color=color,
                        label=variant if nth == 0 else None,
                    )
            axis.set_xlabel("seconds of training" if key == "seconds" else "steps")
            axis.grid(True, linewidth=0.6)
        margin = 0.05 * (max(late) - min(late)) + 1e-3
        axes[0].set_ylim(min(late) - margin, max(late) + margin)
        axes[0].set_ylabel(f"validation loss, nats a {unit}")
        axes[0].legend(fontsize=7.5)

    return paint
