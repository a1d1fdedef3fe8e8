"""The README's table and every page of `docs/perf/` that is tables and plots, by one command.

Which results a page shows is said here; what is written by hand stands in `bench/intros/`, under
the page's name. A result that is not stored (yet) is left out.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import plots, report
from bench.cases import DENSE_ONLY, every_case
from bench.floor import Ceilings, floor_facts
from bench.records import read

HOME = Path(__file__).parent
RESULTS = HOME / "results"
INTROS = HOME / "intros"
PERF = HOME.parent / "docs" / "perf"


@dataclass(frozen=True)
class Page:
    """A page's name, and its result files; those beyond the first with a heading of their own."""

    name: str
    results: dict[str, str]


def _card(stem: str) -> Page:
    return Page(
        stem,
        {
            stem: "",
            f"{stem}-fused": "Sums of dq fetched a step ahead",
            f"{stem}-prepared": "Rows and key tiles prepared at once",
            f"{stem}-halves": "Half tiles pass over what they do not see",
            f"{stem}-fa4": "Beside flash-attn 4",
            f"{stem}-both": "Beside flash-attn and FlexAttention, a training step's attention too",
            f"{stem}-now": "After a second gathering warpgroup: what changed since",
            f"{stem}-wide": "Wide heads, with a backward of two roles",
            f"{stem}-choice": "Heads that are alike go one way",
            f"{stem}-original": "Beside the original, and numba-cuda",
            f"{stem}-flex": "Beside FlexAttention",
            f"{stem}-peers": "Beside flash-attn, xformers and cuDNN's frontend",
            f"{stem}-jit": "First use on a machine",
        },
    )


ACCURACY = ("accuracy-numba-cpu", "accuracy-h200", "accuracy-h200-numba", "accuracy-h100")
PAGES = (
    _card("h200"),
    Page("h200-sweeps", {"h200-sweeps": ""}),
    _card("h100"),
    Page("cpu", {"cpu-epyc": "", "cpu-epyc-jit": "First use on a machine"}),
    Page("accuracy", dict.fromkeys(ACCURACY, "")),
)
README = {"h200-fused": ["goal"], "h100-original": ["goal"], "cpu-epyc": ["cpu"]}  # files: sets


def intro(name: str) -> str:
    """What was written by hand for a page; empty if nothing was."""
    path = INTROS / f"{name}.md"
    return path.read_text().rstrip() if path.exists() else ""


def stored(page: Page) -> dict[str, dict[str, Any]]:
    """Return the page's records that are stored, floors filled in from a sibling's ceilings."""
    paths = {stem: RESULTS / f"{stem}.json" for stem in page.results}
    records = {stem: read(path) for stem, path in paths.items() if path.exists()}
    known = (record["machine"].get("ceilings") for record in records.values())
    ceilings = next(filter(None, known), None)
    records = {stem: with_floors(record, ceilings) for stem, record in records.items()}
    return {stem: with_dense(record, records.get(page.name)) for stem, record in records.items()}


def with_dense(record: dict[str, Any], first: dict[str, Any] | None) -> dict[str, Any]:
    """The record with the dense peers of the page's first, where it timed none of its own."""
    if first is None or any(row.get("method") in DENSE_ONLY for row in record["rows"]):
        return record
    return record | {"beside": [row for row in first["rows"] if row.get("method") in DENSE_ONLY]}


def with_floors(record: dict[str, Any], ceilings: dict[str, float] | None) -> dict[str, Any]:
    """The record whose rows have their floors, where only the card's ceilings were missing."""
    if ceilings is None or report.is_accuracy(record):
        return record
    limits, known = Ceilings(ceilings["gbps"], ceilings["tflops"]), every_case()
    rows = []
    for row in record["rows"]:
        if "floor_ms" not in row and "pairs" in row and row["case"] in known:
            case = known[row["case"]]
            row = row | floor_facts(case, row["mode"], row["pairs"], row["ms"], limits)
        rows.append(row)
    return record | {"rows": rows, "machine": {"ceilings": ceilings} | record["machine"]}


def text_of(page: Page, records: dict[str, dict[str, Any]]) -> str:
    """Return a page's Markdown; its plots are named, not drawn."""
    shown = []
    for stem, record in records.items():
        found = [] if report.is_accuracy(record) else plots.names(record, stem)
        pictures = [(f"img/{name}", words) for name, words in found]
        shown.append((record, page.results[stem], pictures))
    return report.page(shown, intro(page.name))


def readme_text() -> str:
    """What stands between the README's markers."""
    tables = [
        report.markdown(report.only(read(RESULTS / f"{stem}.json"), sets))
        for stem, sets in README.items()
    ]
    return "\n\n".join([*tables, intro("readme")])


def main(argv: list[str]) -> int:
    """Write the README's table, every page, its plots; 1 if --check finds one that differs."""
    parser = argparse.ArgumentParser(prog="python -m bench pages", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, name what differs")
    parser.add_argument("--no-plots", action="store_true", help="write the text alone")
    args = parser.parse_args(argv)
    changed = []
    for page in PAGES:
        records = stored(page)
        if not records:
            continue
        path, text = PERF / f"{page.name}.md", text_of(page, records)
        if not path.exists() or path.read_text() != text:
            changed.append(path)
        if args.check:
            continue
        path.write_text(text)
        if not args.no_plots:
            for stem, record in records.items():
                if not report.is_accuracy(record):
                    plots.draw(record, PERF / "img", stem)
    readme = HOME.parent / "README.md"
    if report.with_section(readme.read_text(), readme_text()) != readme.read_text():
        changed.append(readme)
        if not args.check:
            report.write_readme(readme_text(), readme)
    for path in changed:
        print(f"{'differs' if args.check else 'written'}: {path.relative_to(HOME.parent)}")
    return int(args.check and bool(changed))
