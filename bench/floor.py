"""The time below which no kernel can be: the bytes it must move, the flops it must do."""

from __future__ import annotations

from typing import Any, NamedTuple

from bench.cases import Case

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
FLOPS = {"forward": 4, "planned": 4, "backward": 10, "both": 14}  # per visible pair and head_dim


class Ceilings(NamedTuple):
    """What the card can do at best: 1e9 bytes and 1e12 flops a second."""

    gigabytes: float
    teraflops: float


def useful_flops(case: Case, mode: str, pairs: int) -> int:
    """Flops of the visible pairs alone; 0 for a mode that multiplies nothing."""
    return FLOPS.get(mode, 0) * pairs * case.head_dim


def least_bytes(case: Case, mode: str) -> int:
    """Each input read once, each output written once; lse in float32; the plan left out."""
    width = BYTES[case.dtype] * case.head_dim
    queries = case.rows * width
    keys = case.batch * case.heads_kv * case.seqlen * width
    lse = 4 * case.rows
    if mode == "both":
        return least_bytes(case, "forward") + least_bytes(case, "backward")
    if mode == "backward":  # q, out, dout, dq and k, v, dk, dv
        return 4 * queries + 4 * keys + lse
    return 2 * queries + 2 * keys + lse


def floor_facts(
    case: Case, mode: str, pairs: int, ms: float, ceilings: Ceilings | None
) -> dict[str, Any]:
    """Return the fields of a row: the floor in ms, what sets it, and its share of the time."""
    if ceilings is None or mode not in FLOPS:
        return {}
    by = {
        "bytes": least_bytes(case, mode) / ceilings.gigabytes / 1e6,
        "flops": useful_flops(case, mode, pairs) / ceilings.teraflops / 1e9,
    }
    name = max(by, key=lambda x: by[x])
    return {
        "floor_ms": round(by[name], 5),
        "floor_by": name,
        "floor_share": round(by[name] / ms, 4),
        "floor_bytes_share": round(by["bytes"] / ms, 4),
        "floor_flops_share": round(by["flops"] / ms, 4),
    }
