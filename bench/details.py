"""Tables of what is beside a time: rates, floors, memory, the host's time, compiling."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
Column = tuple[str, Any]


def sections(record: dict[str, Any]) -> str:
    """Every table that the record has rows for, each under its heading; empty if none has."""
    rows = [row for row in record["rows"] if "ms" in row]
    parts = []
    for heading, note, pick, columns in TABLES:
        chosen = [row for row in rows if pick(row)]
        if chosen:
            parts += [f"## {heading}", note, _table(chosen, columns)]
    absent = _absent(record)
    if absent:
        parts += ["## What was not timed", absent]
    return "\n\n".join(parts)


def _table(rows: list[Row], columns: list[Column]) -> str:
    names = ["case", "method", "mode", *(name for name, _ in columns)]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [row["case"], row["method"], row["mode"], *(show(row) for _, show in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _absent(record: dict[str, Any]) -> str:
    """A line per method and reason: who could not take part, and in how many cases."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in record["rows"]:
        if "reason" in row:
            found.setdefault((row["method"], row["reason"]), []).append(row["case"])
    return "\n".join(
        f"- {method}: {reason} ({', '.join(dict.fromkeys(cases))})"
        for (method, reason), cases in found.items()
    )


def _percent(name: str) -> Any:
    return lambda row: f"{100 * row[name]:.0f}"


def mebibytes(row: Row) -> float:
    """Memory at the peak beyond what was there before the call, in MiB."""
    return float(row["extra_bytes"]) / 2**20


TABLES: tuple[tuple[str, str, Any, list[Column]], ...] = (
    (
        "Rate, and share of the floor",
        "TFLOP/s counts visible pairs. The floor is the longer of two times: every input read "
        "and output written once at the card's copy rate, every useful flop at its matrix rate.",
        lambda row: "floor_ms" in row,
        [
            ("TFLOP/s, useful", lambda row: f"{row['tflops']:.0f}"),
            ("floor, ms", lambda row: f"{row['floor_ms']:.3g}"),
            ("set by", lambda row: row["floor_by"]),
            ("bytes' share of the time, %", _percent("floor_bytes_share")),
            ("flops' share, %", _percent("floor_flops_share")),
        ],
    ),
    (
        "Memory",
        "MiB held at the peak of a call beyond what was there before it; its results included.",
        lambda row: row.get("extra_bytes") is not None,
        [("MiB", lambda row: f"{mebibytes(row):.1f}")],
    ),
    (
        "Host time of one call",
        "Microseconds until the call returns, the plan given and the queue empty.",
        lambda row: row.get("host_us") is not None,
        [("us", lambda row: f"{row['host_us']:.0f}")],
    ),
    (
        "Compiling",
        "First use in a new process (plan, forward, backward) less the second, with an empty cache "
        "and with the cache it left.",
        lambda row: row["mode"].startswith("jit"),
        [("s", lambda row: f"{row['ms'] / 1e3:.2f}")],
    ),
)
