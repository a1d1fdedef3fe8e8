"""Tables of what is beside a time: rates, floors, memory, the host's time, compiling."""

from __future__ import annotations

from typing import Any

from bench.cases import every_case
from bench.floor import BYTES

Row = dict[str, Any]
Column = tuple[str, Any]


def sections(record: dict[str, Any], mark: str = "##") -> str:
    """Every table that the record has rows for, each under its heading; empty if none has."""
    rows = [row for row in record["rows"] if "ms" in row]
    parts = []
    for heading, note, pick, columns in TABLES:
        chosen = [row for row in rows if pick(row)]
        if chosen:
            parts += [f"{mark} {heading}", note, _table(chosen, columns)]
    if any(row["case"].startswith("growth") for row in rows):
        parts += [f"{mark} Growth at a constant bucket size", growth(record)]
    absent = _absent(record)
    if absent:
        parts += [f"{mark} What was not timed", absent]
    ceilings = record["machine"].get("ceilings")
    if ceilings and parts:
        parts.append(
            f"The card's rates, measured: copy {ceilings['gbps']:.0f} GB/s (read and written), "
            f"matrix product {ceilings['tflops']:.0f} TFLOP/s."
        )
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


def executed(row: Row) -> float | None:
    """TFLOP/s of all pairs of the tiles that are looked at; None where tiles are not known."""
    if not row.get("tile_pairs"):
        return None
    return float(row["tflops"] * row["tile_pairs"] / row["pairs"])


def _executed(row: Row) -> str:
    rate = executed(row)
    return "-" if rate is None else f"{rate:.0f}"


def growth(record: dict[str, Any]) -> str:
    """How much longer a call takes at twice the length and the same bucket size."""
    known = every_case()
    lengths: dict[tuple[str, str], dict[int, float]] = {}
    for row in record["rows"]:
        if "ms" in row and row["case"].startswith("growth") and row["case"] in known:
            at = lengths.setdefault((row["method"], row["mode"]), {})
            at[known[row["case"]].seqlen] = row["ms"]
    lines = [
        f"| {method} | {mode} | {seqlen // 1024}k | {seqlen // 512}k | {at[2 * seqlen] / ms:.2f}x |"
        for (method, mode), at in lengths.items()
        for seqlen, ms in sorted(at.items())
        if 2 * seqlen in at
    ]
    return "\n".join(["| method | mode | from | to | time |", "|---|---|---|---|---|", *lines])


def beyond_results(row: Row) -> int:
    """Bytes at the peak of a call beyond its inputs and its results (out, or dq, dk and dv)."""
    case = every_case()[row["case"]]
    width = BYTES[case.dtype] * case.head_dim
    keys = case.batch * case.heads_kv * case.seqlen
    gradients = case.rows + 2 * keys
    rows = {"forward": case.rows, "planned": case.rows}
    rows |= {"backward": gradients, "both": gradients}
    return int(row["extra_bytes"]) - rows.get(row["mode"], 0) * width


def _per_row(row: Row) -> str:
    return f"{beyond_results(row) / every_case()[row['case']].rows:.1f}"


TABLES: tuple[tuple[str, str, Any, list[Column]], ...] = (
    (
        "Rate, and share of the floor",
        "Useful TFLOP/s counts visible pairs; executed (counted, not measured) every pair of the "
        "tiles of 64 queries and 128 keys, in the plan's order, that hold one. The floor is the "
        "longer of two times: every input read and output written once at the card's copy rate, "
        "every useful flop at its matrix rate.",
        lambda row: "floor_ms" in row,
        [
            ("TFLOP/s, useful", lambda row: f"{row['tflops']:.0f}"),
            ("executed", _executed),
            ("floor, ms", lambda row: f"{row['floor_ms']:.3g}"),
            ("set by", lambda row: row["floor_by"]),
            ("bytes' share of the time, %", _percent("floor_bytes_share")),
            ("flops' share, %", _percent("floor_flops_share")),
        ],
    ),
    (
        "Memory",
        "Held at the peak of a call beyond its inputs and its results (out; dq, dk and dv). A plan "
        "that the call makes, lse and work space are in it.",
        lambda row: row.get("extra_bytes") is not None and row["case"] in every_case(),
        [
            ("MiB", lambda row: f"{beyond_results(row) / 2**20:.1f}"),
            ("bytes per query row", _per_row),
        ],
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
