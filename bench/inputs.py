"""Arrays of a case, and the check that a timed call computed the right thing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

import scfa_core as scfa
from bench.cases import Case

SAMPLED_ROWS = 48
# A wrong pair or a lost tile moves sampled rows by far more than rounding does (docs/numerics.md
# holds the exact rule, which the tests apply to every element).
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}


@dataclass
class Inputs:
    """q, k, v, dout (batch, heads, seqlen, head_dim), and the pattern's raw arrays."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    q_ids: torch.Tensor | None
    k_ids: torch.Tensor | None
    pattern: scfa.Pattern


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Draw random normal inputs and the pattern's arrays on the case's device."""
    torch.manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(heads: int) -> torch.Tensor:
        shape = (case.batch, heads, case.seqlen, case.head_dim)
        return torch.randn(shape, device=case.device, dtype=torch.float32).to(dtype)

    q, dout = normal(case.heads), normal(case.heads)
    k, v = normal(case.heads_kv), normal(case.heads_kv)
    q_ids, k_ids = _pattern_arrays(case)
    return Inputs(case, q, k, v, dout, q_ids, k_ids, _pattern(case, q_ids, k_ids))


def _pattern_arrays(case: Case) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    q_shape = (case.batch, case.heads, case.seqlen)
    k_shape = (case.batch, case.heads_kv, case.seqlen)
    where = {"device": case.device}
    if case.kind in ("hash", "samehash"):
        k_ids = torch.randint(0, case.number, k_shape, dtype=torch.int32, **where)
        if case.kind == "samehash":
            return k_ids.repeat_interleave(case.heads // case.heads_kv, 1), k_ids
        return torch.randint(0, case.number, q_shape, dtype=torch.int32, **where), k_ids
    if case.kind == "qk":
        keep = 1 - case.number / 100
        return torch.rand(q_shape, **where) < keep, torch.rand(k_shape, **where) < keep
    if case.kind == "docs":
        cuts = torch.randint(0, case.seqlen, (case.batch, case.number - 1), **where)
        row = torch.arange(case.seqlen, **where)
        ids = (row[None, :, None] >= cuts[:, None, :]).sum(-1).to(torch.int32)
        return ids, ids
    if case.kind == "ranges":
        row = torch.arange(case.seqlen, dtype=torch.int32, **where)
        shift = torch.randint(0, case.number, (case.batch, case.heads, 1), **where)
        start = (row - case.number - shift).clamp_(min=0).to(torch.int32)
        return start, (start + case.number).to(torch.int32)
    return None, None


def _pattern(case: Case, q_ids: Any, k_ids: Any) -> scfa.Pattern:
    if case.kind in ("hash", "samehash"):
        return scfa.HashSparse(q_ids, k_ids)
    if case.kind == "qk":
        return scfa.QKSparse(q_ids, k_ids)
    if case.kind == "docs":
        return scfa.Documents(q_ids)
    if case.kind == "ranges":
        return scfa.KeyRanges(q_ids, k_ids)
    if case.kind == "window":
        return scfa.SlidingWindow(case.number)
    return scfa.Causal()


def rows_seen(inputs: Inputs, b: int, h: int, rows: torch.Tensor) -> torch.Tensor:
    """Bool (len(rows), seqlen): which keys the given query rows of one head see, by definition."""
    case = inputs.case
    g = h // (case.heads // case.heads_kv)
    j = torch.arange(case.seqlen, device=case.device)
    i = rows[:, None]
    causal = j <= i
    if case.kind in ("hash", "samehash"):
        return causal & (inputs.q_ids[b, h, rows][:, None] == inputs.k_ids[b, g])
    if case.kind == "qk":
        return causal & inputs.q_ids[b, h, rows][:, None] & inputs.k_ids[b, g]
    if case.kind == "docs":
        return causal & (inputs.q_ids[b, rows][:, None] == inputs.q_ids[b])
    if case.kind == "ranges":
        start, end = (x[b, h, rows][:, None] for x in (inputs.q_ids, inputs.k_ids))
        return (start <= j) & (j < end)
    if case.kind == "window":
        return causal & (j > i - case.number)
    return causal


def sampled_error(
    inputs: Inputs, out: torch.Tensor, dq: torch.Tensor | None = None, heads: int = 3
) -> float:
    """Largest relative norm error of sampled rows of out (and dq) against float64."""
    case = inputs.case
    scale = case.head_dim**-0.5
    picks = torch.Generator().manual_seed(1)
    worst = 0.0
    for _ in range(heads):
        b = int(torch.randint(case.batch, (1,), generator=picks))
        h = int(torch.randint(case.heads, (1,), generator=picks))
        g = h // (case.heads // case.heads_kv)
        rows = torch.randint(case.seqlen, (SAMPLED_ROWS,), generator=picks).to(case.device)
        seen = rows_seen(inputs, b, h, rows)
        q, dout = inputs.q[b, h, rows].double(), inputs.dout[b, h, rows].double()
        k, v = inputs.k[b, g].double(), inputs.v[b, g].double()
        scores = (scale * (q @ k.T)).masked_fill(~seen, float("-inf"))
        p = torch.softmax(scores, -1).nan_to_num(0.0)
        worst = max(worst, _relative(out[b, h, rows], p @ v))
        if dq is not None:
            dp = dout @ v.T
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            worst = max(worst, _relative(dq[b, h, rows], scale * (ds @ k)))
    return worst


def sampled_key_error(
    inputs: Inputs, lse: torch.Tensor | None, out: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
) -> float:
    """Relative norm error of dk and dv on sampled keys of one head, against float64.

    Uses out of the call under test, which `sampled_error` checks on its own, and its lse, or the
    true one where it gives none.
    """
    case = inputs.case
    scale = case.head_dim**-0.5
    g, group = case.heads_kv - 1, case.heads // case.heads_kv
    keys = torch.linspace(0, case.seqlen - 1, SAMPLED_ROWS, device=case.device).long()
    dk_true = torch.zeros(len(keys), case.head_dim, device=case.device, dtype=torch.float64)
    dv_true = torch.zeros_like(dk_true)
    k, v = inputs.k[0, g, keys].double(), inputs.v[0, g, keys].double()
    every = torch.arange(case.seqlen, device=case.device)
    for h in range(g * group, (g + 1) * group):
        for rows in every.split(4096):
            q, dout = inputs.q[0, h, rows].double(), inputs.dout[0, h, rows].double()
            seen = rows_seen(inputs, 0, h, rows)[:, keys]
            sums = true_lse(inputs, h, rows) if lse is None else lse[0, h, rows].double()
            p = torch.exp(scale * (q @ k.T) - sums[:, None])
            p = torch.where(seen, p, 0.0)
            delta = (dout * out[0, h, rows].double()).sum(-1, keepdim=True)
            ds = p * (dout @ v.T - delta)
            dk_true += scale * (ds.T @ q)
            dv_true += p.T @ dout
    return max(_relative(dk[0, g, keys], dk_true), _relative(dv[0, g, keys], dv_true))


def true_lse(inputs: Inputs, h: int, rows: torch.Tensor) -> torch.Tensor:
    """Natural log of the sum of exponentials of rows of one head of the first batch, float64."""
    case = inputs.case
    k = inputs.k[0, h // (case.heads // case.heads_kv)].double().T * case.head_dim**-0.5
    parts = []
    for some in rows.split(max(2**27 // case.seqlen, 1)):  # scores of at most 1 GiB at once
        scores = inputs.q[0, h, some].double() @ k
        hidden = ~rows_seen(inputs, 0, h, some)
        parts.append(torch.logsumexp(scores.masked_fill_(hidden, float("-inf")), -1))
    return torch.cat(parts)


def as_dense(inputs: Inputs) -> Inputs:
    """The same arrays under causal attention alone: what a dense kernel computes of them."""
    case = dataclasses.replace(inputs.case, pattern="dense")
    return dataclasses.replace(inputs, case=case, pattern=scfa.Causal())


def _relative(got: torch.Tensor, true: torch.Tensor) -> float:
    error = (got.double() - true).norm() / true.norm().clamp(min=1e-30)
    return float("inf") if not torch.isfinite(error) else float(error)


def visible_pairs(inputs: Inputs) -> int:
    """Pairs that the pattern makes visible over the whole case, from the plan."""
    case = inputs.case
    if case.kind == "dense":
        return case.batch * case.heads * case.seqlen * (case.seqlen + 1) // 2
    return scfa.make_plan(inputs.pattern, inputs.q, inputs.k).visible_pairs()


def tile_pairs(plan: scfa.Plan, rows: int = 64, keys: int = 128) -> int:
    """Pairs of all tiles that hold a visible pair: the least that whole products compute.

    Tiles of `rows` sorted queries and `keys` sorted keys; a stretch of rows takes the tiles from
    its first visible key to its last.
    """
    start, end = (torch.as_tensor(x).long() for x in (plan.key_start, plan.key_end))
    far = torch.iinfo(torch.int64).max
    start = torch.where(end > start, start, far)
    short = -start.shape[-1] % rows
    start = functional.pad(start, (0, short), value=far).unflatten(-1, (-1, rows)).amin(-1)
    end = functional.pad(end, (0, short)).unflatten(-1, (-1, rows)).amax(-1)
    tiles = torch.where(start < far, (end + keys - 1) // keys - start // keys, 0)
    return int(tiles.sum()) * rows * keys
