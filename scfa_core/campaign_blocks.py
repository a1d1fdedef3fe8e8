"""Attention of long problems to the last entry: blocks of queries times all keys that these see.

What a block sees comes from the patterns' definitions, never from a plan. The truth is float64;
beside it, over the same pairs, stand the formula as a framework evaluates it in the problem's dtype
(`testing.baseline`) and the size of the terms (`testing.magnitudes`). NumPy computes on the host
and torch on a GPU, with one code: what differs between the two is `Numbers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from scfa_core import patterns as pt
from scfa_core.campaign_judge import entries, visible
from scfa_core.reference.backend import narrow, widen
from scfa_core.testing import Case, Results, Spec, as_tf32, as_torch, reads_stored_out

ROWS = 1024  # queries whose keys are looked for together
HOST_PAIRS, CUDA_PAIRS = 2**20, 2**23  # (query, key) pairs of one block: 1 GB on a GPU


class Numbers:
    """NumPy: arrays of float64 or of the accumulator's type, steps rounded to a dtype.

    With `tf32` the plain formula multiplies TF32.
    """

    xp: Any = np
    pairs = HOST_PAIRS

    def __init__(self, dtype: str, tf32: bool = False) -> None:
        self.dtype, self.tf32 = dtype, tf32
        self.acc = "float64" if dtype == "float64" else "float32"

    def wide(self, x: np.ndarray) -> Any:
        """A host array of the problem's dtype, in float64."""
        return widen(x, self.dtype)

    def integers(self, x: np.ndarray) -> Any:
        """An array of a pattern."""
        return x

    def to(self, x: Any, dtype: str) -> Any:
        """Convert to float32 or float64."""
        return x.astype(dtype)

    def step(self, x: Any) -> Any:
        """Round to the problem's dtype, and back to the accumulator's."""
        return self.to(widen(narrow(x.astype(np.float64), self.dtype), self.dtype), self.acc)

    def factor(self, x: Any) -> Any:
        """What the plain formula multiplies of `x`."""
        return self.rounded(x) if self.tf32 else x

    def rounded(self, x: Any) -> Any:
        """Float32 rounded to TF32."""
        return as_tf32(x)

    def zeros(self, shape: tuple[int, ...], dtype: str = "float64") -> Any:
        """An array of zeros."""
        return np.zeros(shape, dtype)

    def arange(self, n: int) -> Any:
        """Row numbers."""
        return np.arange(n)

    def order(self, ids: Any) -> Any:
        """Rows in the order of their ids."""
        return np.argsort(ids, kind="stable")

    def row_max(self, x: Any) -> Any:
        """Largest entry of each row, rows of nothing but -inf give -inf."""
        return x.max(axis=-1)

    def host(self, x: Any) -> np.ndarray:
        """In NumPy, float64."""
        return np.asarray(x, np.float64)


class _TorchNumbers(Numbers):
    """torch on a device: its own rounding, float64 and float32 products without TF32."""

    pairs = CUDA_PAIRS

    def __init__(self, dtype: str, tf32: bool, device: str) -> None:
        super().__init__(dtype, tf32)
        import torch

        torch.set_float32_matmul_precision("highest")  # what it is unless somebody changed it
        self.xp, self.device = torch, device

    def wide(self, x: np.ndarray) -> Any:
        return as_torch(x, self.dtype, self.device).double()

    def integers(self, x: np.ndarray) -> Any:
        return self.xp.from_numpy(np.ascontiguousarray(x)).to(self.device)

    def to(self, x: Any, dtype: str) -> Any:
        return x.to(getattr(self.xp, dtype))

    def step(self, x: Any) -> Any:
        return self.to(self.to(x, self.dtype), self.acc)

    def rounded(self, x: Any) -> Any:
        bits = (x.view(self.xp.int32) + (1 << 12)) & -(1 << 13)
        return self.xp.where(x.isfinite(), bits.view(self.xp.float32), x)

    def zeros(self, shape: tuple[int, ...], dtype: str = "float64") -> Any:
        return self.xp.zeros(shape, dtype=getattr(self.xp, dtype), device=self.device)

    def arange(self, n: int) -> Any:
        return self.xp.arange(n, device=self.device)

    def order(self, ids: Any) -> Any:
        return self.xp.argsort(ids, stable=True)

    def row_max(self, x: Any) -> Any:
        return x.amax(-1)

    def host(self, x: Any) -> np.ndarray:
        return np.asarray(x.double().cpu().numpy())


def numbers_on(device: str, dtype: str, *, tf32: bool = False) -> Numbers:
    """NumPy for "numpy"; else torch on that device."""
    return Numbers(dtype, tf32) if device == "numpy" else _TorchNumbers(dtype, tf32, device)


class Block(NamedTuple):
    """Queries, keys, and which pairs of them are visible; every row and every column has one."""

    rows: Any
    keys: Any
    mask: Any


def blocks(numbers: Numbers, pattern: pt.Pattern, spec: Spec, b: int, h: int) -> Iterator[Block]:
    """Yield every visible pair of one head once, each query with all its keys in one block.

    Queries of one group come together, and by the start of their range, which only saves work:
    keys of other groups and places drop out.
    """
    order = numbers.arange(spec.seqlen_q)
    starts = [part.start for part in pattern.parts if isinstance(part, pt.KeyRanges)]
    ids = [part.q_ids for part in pattern.parts if isinstance(part, pt.Documents)]
    ids += [part.q_hash for part in pattern.parts if isinstance(part, pt.HashSparse)]
    for x in (*starts, *ids):  # the last one comes first
        order = order[numbers.order(entries(x, b, h, order))]
    for first in range(0, spec.seqlen_q, ROWS):
        rows = order[first : first + ROWS]
        keys = candidates(numbers, pattern, spec, b, h, rows)
        height = max(numbers.pairs // max(len(keys), 1), 1)
        for at in range(0, len(rows), height):
            some = rows[at : at + height]
            mask = visible(pattern, spec, b, h, some, keys)
            seeing = mask.any(1)
            some, mask = some[seeing], mask[seeing]
            seen = mask.any(0)
            if len(some):
                yield Block(some, keys[seen], mask[:, seen])


def candidates(numbers: Numbers, pattern: pt.Pattern, spec: Spec, b: int, h: int, rows: Any) -> Any:
    """Keys but for those that a clause hides from every one of the rows."""
    g = h // (spec.heads // spec.heads_kv)
    j = numbers.arange(spec.seqlen_k)
    wanted = j >= 0
    for part in pattern.parts:
        if isinstance(part, pt.Causal):
            shift = spec.seqlen_k - spec.seqlen_q if part.align == "bottom-right" else 0
            wanted &= j <= rows.max() + shift
        elif getattr(part, "causal", False):
            wanted &= j <= rows.max()
        if isinstance(part, pt.SlidingWindow):
            wanted &= (j > rows.min() - part.window) & (j < rows.max() + max(part.window, 1))
        elif isinstance(part, pt.KeyRanges):
            start, end = (entries(x, b, h, rows) for x in (part.start, part.end))
            wanted &= (j >= start.min()) & (j < end.max())
        elif isinstance(part, pt.HashSparse):
            q_hash, k_hash = entries(part.q_hash, b, h, rows), entries(part.k_hash, b, g, j)
            wanted &= numbers.xp.isin(k_hash, q_hash)
        elif isinstance(part, pt.Documents):
            q_ids, k_ids = entries(part.q_ids, b, 0, rows), entries(part.k_ids, b, 0, j)
            wanted &= numbers.xp.isin(k_ids, q_ids)
        elif isinstance(part, pt.QKSparse):
            wanted &= entries(part.k_keep, b, g, j) != 0
    return j[wanted]


def count_visible(
    numbers: Numbers, pattern: pt.Pattern, spec: Spec
) -> tuple[np.ndarray, np.ndarray]:
    """Keys of each query (batch, heads, seqlen_q), and whether anyone sees each key."""
    counts = np.zeros((spec.batch, spec.heads, spec.seqlen_q), np.int64)
    seen = np.zeros((spec.batch, spec.heads_kv, spec.seqlen_k), bool)
    for b, h in np.ndindex(spec.batch, spec.heads):
        mine, keys_seen = numbers.zeros((spec.seqlen_q,)), numbers.zeros((spec.seqlen_k,))
        for block in blocks(numbers, pattern, spec, b, h):
            mine[block.rows] = numbers.to(block.mask.sum(1), "float64")
            keys_seen[block.keys] = 1.0
        counts[b, h] = numbers.host(mine)
        seen[b, h // (spec.heads // spec.heads_kv)] |= numbers.host(keys_seen) > 0
    return counts, seen


class Head(NamedTuple):
    """q, k, v and dout of one head, in one element type."""

    q: Any
    k: Any
    v: Any
    dout: Any

    def of(self, block: Block) -> Head:
        """The rows of a block."""
        q, dout = self.q[block.rows], self.dout[block.rows]
        return Head(q, self.k[block.keys], self.v[block.keys], dout)


class Answers(NamedTuple):
    """Truth, same-dtype formula and size of the terms, each of every result."""

    true: Results
    plain: Results
    size: Results


def evaluate(numbers: Numbers, case: Case, pattern: pt.Pattern) -> Answers:
    """Compute everything that `testing.judge_tensor` asks, in NumPy and float64.

    Parameters
    ----------
    pattern : Pattern
        The case's, its arrays where `numbers` computes.
    """
    spec = case.spec
    group = spec.heads // spec.heads_kv
    answers = Answers(*(_empty(spec) for _ in Answers._fields))
    for b, g in np.ndindex(spec.batch, spec.heads_kv):
        k, v = numbers.wide(case.k[b, g]), numbers.wide(case.v[b, g])
        sums = [[numbers.zeros(x.shape) for x in (k, v)] for _ in answers]  # of dk and dv
        for h in range(g * group, (g + 1) * group):
            wide = Head(numbers.wide(case.q[b, h]), k, v, numbers.wide(case.dout[b, h]))
            found = _evaluate_head(numbers, pattern, case, b, h, wide)
            for answer, (out, lse, dq, dk, dv), (sum_dk, sum_dv) in zip(
                answers, found, sums, strict=True
            ):
                answer.out[b, h] = numbers.host(out)
                answer.lse[b, h] = numbers.host(lse)
                answer.dq[b, h] = numbers.host(dq)
                sum_dk += dk
                sum_dv += dv
        for answer, (sum_dk, sum_dv) in zip(answers, sums, strict=True):
            answer.dk[b, g], answer.dv[b, g] = numbers.host(sum_dk), numbers.host(sum_dv)
        for x in (answers.plain.dk, answers.plain.dv):
            x[b, g] = widen(narrow(x[b, g], spec.dtype), spec.dtype)
        for x in (answers.size.dk, answers.size.dv):  # heads add up squares
            x[b, g] = np.sqrt(x[b, g])
    return answers


def stored_out_sizes(numbers: Numbers, case: Case, pattern: pt.Pattern) -> dict[str, np.ndarray]:
    """`testing.stored_out_sizes` by blocks."""
    if not reads_stored_out(case):
        return {}
    spec, scale = case.spec, abs(case.softmax_scale)
    empty = _empty(spec)
    for b, h in np.ndindex(spec.batch, spec.heads):
        g = h // (spec.heads // spec.heads_kv)
        rows = case.q[b, h], case.k[b, g], case.v[b, g], case.dout[b, h]
        head = Head(*(numbers.to(numbers.wide(x), "float32") for x in rows))
        dq, dk = numbers.zeros(head.q.shape), numbers.zeros(head.k.shape)
        for block in blocks(numbers, pattern, spec, b, h):
            x = head.of(block)
            p, _ = _softmax(numbers, case.softmax_scale * (x.q @ x.k.T), block.mask)
            delta = numbers.xp.sqrt(((x.dout * (p @ x.v)) ** 2).sum(-1))[:, None]
            dq[block.rows] = numbers.to(scale * delta * abs(p @ x.k), "float64")
            dk[block.keys] += numbers.to(scale**2 * ((p * delta) ** 2).T @ x.q**2, "float64")
        empty.dq[b, h] = numbers.host(dq)
        empty.dk[b, g] += numbers.host(dk)
    return {"dq": empty.dq, "dk": np.sqrt(empty.dk)}


def _empty(spec: Spec) -> Results:
    rows_q = (spec.batch, spec.heads, spec.seqlen_q)
    rows_k = (spec.batch, spec.heads_kv, spec.seqlen_k)
    return Results(
        np.zeros((*rows_q, spec.head_dim_v)),
        np.zeros(rows_q),
        np.zeros((*rows_q, spec.head_dim)),
        np.zeros((*rows_k, spec.head_dim)),
        np.zeros((*rows_k, spec.head_dim_v)),
    )


def _evaluate_head(
    numbers: Numbers, pattern: pt.Pattern, case: Case, b: int, h: int, wide: Head
) -> tuple[Results, Results, Results]:
    """Truth, plain formula and sizes of one head; of sizes, dk and dv are squares."""
    spec, scale, step = case.spec, case.softmax_scale, numbers.step
    single = Head(*(numbers.to(x, "float32") for x in wide))
    short = wide if numbers.acc == "float64" else Head(*map(numbers.factor, single))

    def start(like: Head, lse: float, dtype: str) -> Results:
        out, dq, dk, dv = (numbers.zeros(x.shape, dtype) for x in (like.dout, *like[:3]))
        return Results(out, numbers.zeros((spec.seqlen_q,), dtype) + lse, dq, dk, dv)

    true = start(wide, -np.inf, "float64")
    plain = start(wide, -np.inf, numbers.acc)
    size = start(wide, 0.0, "float32")
    for block in blocks(numbers, pattern, spec, b, h):
        lse = _true_block(numbers, wide.of(block), block, scale, true)
        _plain_block(numbers, short.of(block), block, scale, plain)
        _size_block(numbers, single.of(block), block, scale, numbers.to(lse, "float32"), size)
    plain = plain._replace(dk=step(step(plain.dk) * scale), dv=step(plain.dv))
    return true, plain, size


def _softmax(numbers: Numbers, scores: Any, mask: Any) -> tuple[Any, Any]:
    """Probabilities (not rounded) and lse of a block; every row sees a key."""
    xp = numbers.xp
    scores = xp.where(mask, scores, -np.inf)
    row_max = numbers.row_max(scores)
    weights = xp.exp(scores - row_max[:, None])
    row_sum = weights.sum(-1)
    return weights / row_sum[:, None], row_max + xp.log(row_sum)


def _true_block(numbers: Numbers, x: Head, block: Block, scale: float, into: Results) -> Any:
    """``dp = dout @ v.T``, ``ds = p * (dp - rowsum(p * dp))`` in float64; returns lse."""
    p, lse = _softmax(numbers, scale * (x.q @ x.k.T), block.mask)
    dp = x.dout @ x.v.T
    ds = p * (dp - (p * dp).sum(-1)[:, None])
    into.out[block.rows] = p @ x.v
    into.lse[block.rows] = lse
    into.dq[block.rows] = scale * (ds @ x.k)
    into.dk[block.keys] += scale * (ds.T @ x.q)
    into.dv[block.keys] += p.T @ x.dout
    return lse


def _plain_block(numbers: Numbers, x: Head, block: Block, scale: float, into: Results) -> None:
    """The same, every step rounded to the problem's dtype; dk still lacks its last two steps.

    `x` is what is multiplied (`Numbers.factor`).
    """
    step, factor = numbers.step, numbers.factor
    p, lse = _softmax(numbers, step(step(x.q @ x.k.T) * scale), block.mask)
    p = step(p)
    dp = step(x.dout @ x.v.T)
    ds = step(p * (dp - (p * dp).sum(-1)[:, None]))
    p, ds = factor(p), factor(ds)
    into.out[block.rows] = step(p @ x.v)
    into.lse[block.rows] = lse
    into.dq[block.rows] = step(step(ds @ x.k) * scale)
    into.dk[block.keys] += ds.T @ x.q
    into.dv[block.keys] += p.T @ x.dout


def _size_block(
    numbers: Numbers, x: Head, block: Block, scale: float, lse: Any, into: Results
) -> None:
    """`testing.magnitudes` in float32: sizes need few digits; dk and dv add up squares."""
    xp = numbers.xp
    scores = scale * (x.q @ x.k.T)
    p = xp.exp(xp.where(block.mask, scores, -np.inf) - lse[:, None])
    moved = 1.0 + abs(scale) * xp.sqrt(x.q**2 @ x.k.T**2) + abs(scores)
    if numbers.dtype in ("float32", "float64"):  # p = exp(s - lse), and lse is rounded once
        moved = moved + abs(lse)[:, None]
    p = p * moved
    dp = xp.sqrt(x.dout**2 @ x.v.T**2)
    ds = p * (dp + xp.sqrt(((p * dp) ** 2).sum(-1))[:, None])
    into.out[block.rows] = xp.sqrt(p**2 @ x.v**2)
    into.lse[block.rows] = abs(lse) + numbers.row_max(p)
    into.dq[block.rows] = abs(scale) * xp.sqrt(ds**2 @ x.k**2)
    into.dk[block.keys] += scale**2 * (ds**2).T @ x.q**2
    into.dv[block.keys] += (p**2).T @ x.dout**2
