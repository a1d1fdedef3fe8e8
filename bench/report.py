"""Tables and the regression check, from stored JSON only: no number is typed by hand."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from bench import accuracy_page, details, looks, plots, records
from bench.cases import DENSE_ONLY, every_case, select

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
MODE_WORDS = {"forward": "fwd", "backward": "bwd", "plan": "plan", "planned": "fwd, plan given"}
TIMES_HEAD = """\
Made by `python -m bench` and `make report`, from stored JSON. A
cell is the median of repeated calls in ms. Forward is the whole call from raw inputs, planning
included; backward reuses the plan. What a row computes was held against float64 before it was
timed (a dense peer's result on dense rows only)."""


def page_or_table(record: dict[str, Any]) -> str:
    """Return the Markdown of a record of whatever kind."""
    return accuracy_page.markdown(record) if is_accuracy(record) else markdown(record)


def is_accuracy(record: dict[str, Any]) -> bool:
    """Whether `bench accuracy` wrote the record."""
    return record.get("kind") == "accuracy"


def markdown(record: dict[str, Any], modes: tuple[str, ...] = ("forward", "backward")) -> str:
    """Table of medians in ms: a row per case, a column per method, modes joined by a slash."""
    rows = [row for row in record["rows"] if "ms" in row and row["mode"] in modes]
    if not rows:
        return caption(record, [row for row in record["rows"] if "ms" in row])
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
            text = " / ".join("-" if ms is None else _three_digits(ms) for ms in found)
            cells.append("-" if not any(found) else text)
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", caption(record, rows)])


def _three_digits(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def caption(record: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Say under a table what its rows share, where they come from and how busy the machine was."""
    facts = record["machine"]
    known = every_case()
    cases = [known[row["case"]] for row in rows if row["case"] in known]
    words = []
    for field in ("dtype", "batch", "heads", "head_dim"):
        found = {getattr(case, field) for case in cases}
        if len(found) == 1:
            value = found.pop()
            words.append(str(value) if field == "dtype" else f"{field} {value}")
    software = f"torch {facts['torch']}" + (f", CUDA {facts['cuda']}" if "cuda" in facts else "")
    threads = f" ({facts['threads']} threads)" if "threads" in facts else ""
    changed = " with uncommitted changes" if facts.get("changed") else ""
    origin = f"{facts['card']}{threads}, {software}, commit {facts['commit']}{changed}"
    later = dict.fromkeys(x["commit"] for x in facts.get("resumed", ()))
    if later:
        origin += f", resumed at {', '.join(later)}"
    told = f"{', '.join(words)}. " if words else ""
    text = f"{told}{origin}, {facts['date'][:10]}."
    loads = [row["load"] for row in rows if "load" in row]
    if loads and "threads" in facts:
        text += f" Load of the machine during the run: {min(loads):.1f} to {max(loads):.1f}."
    dense = dict.fromkeys(row["method"] for row in rows if row["method"] in DENSE_ONLY)
    if dense:
        text += f" {', '.join(dense)}: dense causal attention, whatever the row's pattern."
    return text


def only(record: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    """The record with the rows of the named sets or cases alone."""
    if names is None or is_accuracy(record):
        return record
    wanted = {case.name for case in select(names)}
    return record | {"rows": [row for row in record["rows"] if row["case"] in wanted]}


Shown = tuple[dict[str, Any], str, list[tuple[str, str]]]  # record, heading, pictures


def page(shown: list[Shown], intro: str = "") -> str:
    """Return a page: what it is, then of each record its table, plots and details.

    Pictures are (path relative to the page without its ending, caption).
    """
    if all(is_accuracy(record) for record, _, _ in shown):
        tables = "\n\n".join(accuracy_page.markdown(record) for record, _, _ in shown)
        return f"{accuracy_page.HEAD}\n{tables}\n"
    parts = [intro or f"# Times: {shown[0][0]['machine']['card']}", TIMES_HEAD]
    for record, heading, pictures in shown:
        if heading:
            parts.append(f"## {heading}")
        mark = "###" if heading else "##"
        parts.append(markdown(record))
        for path, words in pictures:
            parts += [f"{mark} {words}", looks.picture(path, words)]
        parts += filter(None, [details.sections(record, mark)])
    return "\n\n".join(parts) + "\n"


def with_section(old: str, text: str) -> str:
    """Return the README with `text` between its markers."""
    if BEGIN not in old or END not in old:
        raise SystemExit(f"the README has no {BEGIN} ... {END}")
    section = f"{BEGIN}\n{text}\n{END}"
    return re.sub(f"{BEGIN}.*?{END}", lambda _: section, old, flags=re.DOTALL)


def write_readme(text: str, readme: Path = ROOT / "README.md") -> None:
    """Put the tables between the markers of the README."""
    readme.write_text(with_section(readme.read_text(), text))


def compare(argv: list[str]) -> int:
    """Flag rows of NEW that differ from OLD beyond both spreads.

    1 if any is slower or missing, or if no row is in both. Missing is what OLD timed and NEW tried
    without a result. Cases that NEW did not try are not.
    """
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=compare.__doc__)
    parser.add_argument("old", type=Path, help="JSON of `python -m bench --json`")
    parser.add_argument("new", type=Path, help="the same, of later sources")
    args = parser.parse_args(argv)
    before, after = records.times(args.old), records.times(args.new)
    cards = [record.get("machine", {}).get("card") for record in (before, after)]
    if cards[0] != cards[1]:
        print(f"these are of two cards: {cards[0]}, {cards[1]}")
    old = {_key(row): row for row in before["rows"] if "ms" in row}
    new = {_key(row): row for row in after["rows"] if "ms" in row}
    reasons = {_key(row)[:2]: row["reason"] for row in after["rows"] if "reason" in row}
    slower = missing = 0
    for key, then in old.items():
        words = " ".join(key)
        if key not in new:
            if key[:2] in reasons:
                missing += 1
                print(f"MISSING        {words}: {reasons[key[:2]]}")
            continue
        ratio = new[key]["ms"] / then["ms"]
        if new[key]["low"] > then["high"]:
            slower += 1
            print(f"SLOWER {ratio:5.2f}x  {words}")
        elif new[key]["high"] < then["low"]:
            print(f"faster {ratio:5.2f}x  {words}")
    common = len(old.keys() & new.keys())
    print(f"{common} rows in both: {slower} slower, {missing} missing")
    return int(slower + missing > 0 or not common)


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["case"], row["method"], row["mode"]


def main(argv: list[str]) -> None:
    """Print the tables of result files; draw plots, write a page; `pages` makes them all."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--case", nargs="+", help="only rows of these sets or cases in the tables")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw plots, light and dark")
    parser.add_argument("--page", type=Path, help="write a page, with the plots of --plots in it")
    args = parser.parse_args(argv)
    whole = [records.read(path) for path in args.files]
    for path, record in zip(args.files, whole, strict=True):
        if not is_accuracy(record):
            records.times(path)
    if len({is_accuracy(record) for record in whole}) > 1:
        raise SystemExit("times and accuracy go to pages of their own")
    print("\n\n".join(page_or_table(only(record, args.case)) for record in whole))
    home = os.path.relpath(args.plots, args.page.parent) if args.plots and args.page else "."
    shown = []
    for path, record in zip(args.files, whole, strict=True):
        made = [] if is_accuracy(record) or not args.plots else plots.names(record, path.stem)
        if made:
            plots.draw(record, args.plots, path.stem)
        print(*(f"{args.plots / stem}-{{light,dark}}.png" for stem, _ in made), sep="\n")
        pictures = [(f"{home}/{stem}", words) for stem, words in made]
        shown.append((only(record, args.case), "", pictures))
    if args.page:
        args.page.write_text(page(shown))
