"""Tables and the regression check, from stored JSON only: no number is typed by hand."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from bench import accuracy_page

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
MODE_WORDS = {"forward": "fwd", "backward": "bwd", "plan": "plan", "planned": "fwd, plan given"}


def load(path: Path) -> dict[str, Any]:
    """Read one result file."""
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def page_or_table(record: dict[str, Any]) -> str:
    """Return the Markdown of a record of whatever kind."""
    return accuracy_page.markdown(record) if is_accuracy(record) else markdown(record)


def is_accuracy(record: dict[str, Any]) -> bool:
    """Whether `bench accuracy` wrote the record."""
    return record.get("kind") == "accuracy"


def markdown(record: dict[str, Any], modes: tuple[str, ...] = ("forward", "backward")) -> str:
    """Table of medians in ms: a row per case, a column per method, modes joined by a slash."""
    rows = [row for row in record["rows"] if "ms" in row]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    times = {(row["case"], row["method"], row["mode"]): row["ms"] for row in rows}
    words = " / ".join(MODE_WORDS[mode] for mode in modes)
    lines = [
        f"| ms, {words} | " + " | ".join(methods) + " |",
        "|---|" + "---|" * len(methods),
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = []
        for method in methods:
            found = [times.get((case, method, mode)) for mode in modes]
            text = " / ".join("-" if ms is None else f"{ms:.3g}" for ms in found)
            cells.append("-" if not any(found) else text)
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    facts = record["machine"]
    software = f"torch {facts['torch']}" + (f", CUDA {facts['cuda']}" if "cuda" in facts else "")
    changed = " with uncommitted changes" if facts.get("changed") else ""
    lines += [
        "",
        f"{facts['card']}, {software}, commit {facts['commit']}{changed}, {facts['date']}.",
    ]
    return "\n".join(lines)


def write_readme(text: str, readme: Path = ROOT / "README.md") -> None:
    """Put the tables between the markers of the README."""
    old = readme.read_text()
    if BEGIN not in old or END not in old:
        raise SystemExit(f"{readme} has no {BEGIN} ... {END}")
    section = f"{BEGIN}\n{text}\n{END}"
    readme.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: section, old, flags=re.DOTALL))


def compare(argv: list[str]) -> int:
    """Flag rows of NEW that differ from OLD beyond both spreads; 1 if any is slower."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=compare.__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args(argv)
    old = {_key(row): row for row in load(args.old)["rows"] if "ms" in row}
    slower = 0
    for row in load(args.new)["rows"]:
        before = old.get(_key(row))
        if before is None or "ms" not in row:
            continue
        ratio = row["ms"] / before["ms"]
        if row["low"] > before["high"]:
            slower += 1
            print(f"SLOWER {ratio:5.2f}x  {' '.join(_key(row))}")
        elif row["high"] < before["low"]:
            print(f"faster {ratio:5.2f}x  {' '.join(_key(row))}")
    print(f"{slower} slower")
    return 1 if slower else 0


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["case"], row["method"], row["mode"]


def main(argv: list[str]) -> None:
    """Print the tables of result files; put them into the README or a page of their own."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--readme", action="store_true", help="fill the README's section")
    parser.add_argument("--page", type=Path, help="write a page, with the plots of --plots in it")
    args = parser.parse_args(argv)
    records = [load(path) for path in args.files]
    text = "\n\n".join(page_or_table(record) for record in records)
    print(text)
    if args.readme:
        write_readme(text)
    if args.page:
        if len({is_accuracy(record) for record in records}) > 1:
            raise SystemExit("a page holds times or accuracy, not both")
        args.page.write_text(f"{accuracy_page.HEAD}\n{text}\n")
