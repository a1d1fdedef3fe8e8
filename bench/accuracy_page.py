"""The accuracy page from stored JSON: a table per dtype and measure, this package beside torch."""

from __future__ import annotations

from typing import Any

TENSORS = ("out", "lse", "dq", "dk", "dv")
MEASURES = {
    "norm": "Norm of the error over the norm of the truth",
    "max": "Largest absolute error",
}
HEAD = """\
# Accuracy

Made by `python -m bench accuracy` and `make report`, from stored JSON. The truth is the formula
on a dense mask in float64, from the same rounded inputs. Each cell is *this package / torch*, where
torch is its own composite attention in the same dtype (masked softmax of materialised scores,
autograd) on the same inputs; smaller is better. *Of allowed* is the worst tensor's error over what
the rule of [numerics.md](../numerics.md) allows it, at its maximum or in norm: beyond 1 is a bug.
"""
FLOAT64 = """
In float64 the truth carries roundings of its own, so these figures say only that both agree to the
last few bits; `lse` is stored in float32 whatever the dtype.
"""


def markdown(record: dict[str, Any]) -> str:
    """Tables of one record: dtypes one after the other, norm before maximum."""
    record = record | {"rows": [row for row in record["rows"] if "ours" in row]}
    sizes = ", ".join(f"{name} {number}" for name, number in record["sizes"].items())
    backends = ", ".join(dict.fromkeys(f"`{row['backend']}`" for row in record["rows"]))
    facts = record["machine"]
    changed = " with uncommitted changes" if facts.get("changed") else ""
    lines = [
        f"## {backends}",
        "",
        f"Batch 1, {sizes}, normal inputs; the worst of {record['seeds']} problems. "
        f"{facts['card']}, torch {facts['torch']}, commit {facts['commit']}{changed}, "
        f"{facts['date'][:10]}.",
    ]
    several = len(backends.split(", ")) > 1
    for backend, dtype in dict.fromkeys((row["backend"], row["dtype"]) for row in record["rows"]):
        rows = [x for x in record["rows"] if (x["backend"], x["dtype"]) == (backend, dtype)]
        lines += ["", f"### `{backend}`, {dtype}" if several else f"### {dtype}"]
        if dtype == "float64":
            lines.append(FLOAT64.rstrip())
        for kind, words in MEASURES.items():
            lines += ["", f"{words}:", "", *_table(rows, kind)]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]], kind: str) -> list[str]:
    lines = [
        "| pattern | " + " | ".join(TENSORS) + " | of allowed |",
        "|---|" + "---|" * (len(TENSORS) + 1),
    ]
    for row in rows:
        cells = [
            f"{row['ours'][name][kind]:.1e} / {row['torch'][name][kind]:.1e}" for name in TENSORS
        ]
        lines.append(f"| {row['pattern']} | " + " | ".join(cells) + f" | {row['of_allowed']:.2f} |")
    return lines
