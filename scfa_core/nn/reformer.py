"""Reformer attention (chunked LSH) in plain torch: the baseline that truncates, and by how much.

Rows are sorted by bucket and cut into chunks of equal size; a row sees rows of its bucket in its
own chunk and the one before. What a bucket holds beyond that is lost, and
`ReformerAttention.coverage` measures it. Source: arXiv 2001.04451, section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from scfa_core.api import make_plan
from scfa_core.errors import OptionError, ShapeError
from scfa_core.hashing import disjoint_rounds
from scfa_core.merging import merge_attention
from scfa_core.nn.attention import applied
from scfa_core.nn.hashing import AngularHash
from scfa_core.problem import as_size, check_scale
from scfa_core.torch_checks import check_tensor


class Coverage(NamedTuple):
    """How many (query, key) pairs were computed, each counted once over all rounds."""

    visited: int  # pairs that Reformer computes
    colliding: int  # pairs that share a bucket in some round: what exact attention computes
    causal: int  # all pairs with key before query

    @property
    def of_colliding(self) -> float:
        """Share of the pairs that should be seen and are."""
        return self.visited / self.colliding if self.colliding else 1.0


class _Round(NamedTuple):
    """One round in sorted order: rows (batch, heads, chunks, chunk), keys two chunks each."""

    q_row: Tensor  # original row of each query
    k_row: Tensor  # (batch, heads, chunks, 2 * chunk)
    visible: Tensor  # bool (batch, heads, chunks, chunk, 2 * chunk)
    times: Tensor  # in how many rounds each of these pairs is visible


class ReformerAttention(nn.Module):
    """Self-attention of the Reformer: shared queries and keys, chunked buckets, several rounds.

    Parameters
    ----------
    width, heads : int
    buckets : int
        Even.
    chunk : int
        Rows of a chunk; the Reformer takes twice the mean bucket, ``2 * seqlen // buckets``.
    rounds : int
    head_dim : int, optional
        ``width // heads`` by default.
    seed, redraw
        As for `AngularHash`.
    softmax_scale : float, optional
        1 / sqrt(head_dim) by default; keys have length 1.
    rotary : callable, optional
        Turns queries and keys (batch, heads, seqlen, head_dim) by their place, once hashed.

    Raises
    ------
    ShapeError
        Heads that do not divide `width`, or sizes that are none. In a call: an x of other axes.
    PatternError, ScaleError, OptionError
        As `AngularHash`; a scale that is no finite number; a `rotary` that cannot be called.

    Notes
    -----
    A row does not see itself; one that sees nothing gives 0 (the original falls back to itself). A
    pair seen in several rounds is divided by their number, so it counts once, as there. Chunk 0 has
    no chunk before it.

    A baseline to measure against, not to build on: which earlier rows of its bucket a row sees
    hangs on where chunks end, and so on later rows; a NaN reaches every row of its chunk and the
    next, earlier ones too. It exports for one length alone.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        buckets: int,
        chunk: int,
        *,
        rounds: int = 1,
        head_dim: int | None = None,
        seed: int | None = None,
        redraw: bool = False,
        softmax_scale: float | None = None,
        rotary: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("width", width), ("heads", heads), ("chunk", chunk)):
            as_size(name, size, 1)
        if head_dim is None and width % heads:
            raise ShapeError(f"heads must divide width (or pass head_dim), got {width=}, {heads=}")
        self.heads = heads
        if rotary is not None and not callable(rotary):
            raise OptionError(f"rotary must be a function, got {type(rotary).__name__}")
        self.width = width
        self.head_dim = width // heads if head_dim is None else as_size("head_dim", head_dim, 1)
        self.chunk = chunk
        self.softmax_scale = check_scale(softmax_scale, self.head_dim, "float32")
        self.rotary = rotary
        self.query = nn.Linear(width, heads * self.head_dim, bias=False)
        self.value = nn.Linear(width, heads * self.head_dim, bias=False)
        self.output = nn.Linear(heads * self.head_dim, width, bias=False)
        self.hash = AngularHash(
            heads, self.head_dim, buckets, rounds=rounds, seed=seed, redraw=redraw
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, width) to the same."""
        self._check_rows(x)
        q, v = (self._split(applied(p, x)) for p in (self.query, self.value))
        k = normalize(q, dim=-1)
        rounds = self._rounds(self.hash(q)[0])
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        parts = [self._attend(q, k, v, one) for one in rounds]
        out, _ = merge_attention([p[0] for p in parts], [p[1] for p in parts])
        return self.output(out.transpose(1, 2).flatten(2))

    def _check_rows(self, x: Tensor) -> None:
        _, seqlen, width = check_tensor("x", x, "batch", "seqlen", "width").shape
        if width != self.width or not seqlen:
            raise ShapeError(
                f"x must be (batch, seqlen, {self.width}) with a row or more, got {tuple(x.shape)}"
            )

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rounds(self, bucket: Tensor) -> list[_Round]:
        """Sort, chunk and decide visibility, from buckets (rounds, batch, heads, seqlen)."""
        seqlen = bucket.shape[-1]
        padded = -(-seqlen // self.chunk) * self.chunk
        bucket = pad(bucket, (0, padded - seqlen), value=self.hash.buckets)  # padding sorts last
        order = torch.argsort(bucket, dim=-1, stable=True)
        chunk_of = torch.argsort(order, dim=-1) // self.chunk
        rounds: list[_Round] = []
        for row in order:
            q_row = row.unflatten(-1, (-1, self.chunk))
            before = q_row.roll(1, dims=2)
            before[:, :, 0] = seqlen  # nobody: at or beyond seqlen
            k_row = torch.cat([before, q_row], dim=-1)
            i, j = q_row[..., :, None], k_row[..., None, :]
            possible = (j < i) & (i < seqlen)
            met = [
                _met(b, c, q_row, k_row) & possible for b, c in zip(bucket, chunk_of, strict=True)
            ]
            visible = met[len(rounds)]
            times = torch.stack(met).sum(dim=0).clamp(min=1)
            rounds.append(_Round(q_row, k_row, visible, times))
        return rounds

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, one: _Round) -> tuple[Tensor, Tensor]:
        """Out and lse of one round, in original order."""
        seqlen = q.shape[2]
        q_row, k_row = one.q_row, one.k_row.clamp(max=seqlen - 1)
        scores = _rows(q, q_row.clamp(max=seqlen - 1)) @ _rows(k, k_row).transpose(-1, -2)
        scores = scores.float() * self.softmax_scale - one.times.log()
        scores = scores.masked_fill(~one.visible, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        weights = (scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp()
        out = weights.to(v.dtype) @ _rows(v, k_row)
        back = torch.argsort(q_row.flatten(2), dim=-1)[..., :seqlen]
        out = torch.take_along_dim(out.flatten(2, 3), back.unsqueeze(-1), dim=2)
        return out, torch.take_along_dim(lse.flatten(2), back, dim=2)

    @torch.no_grad()
    def coverage(self, x: Tensor) -> Coverage:
        """Count the pairs of a batch that this layer computes and those it should.

        Parameters
        ----------
        x : Tensor, (batch, seqlen, width)

        Returns
        -------
        coverage : Coverage
            Summed over batch and heads. With ``redraw`` each call judges other directions.
        """
        self._check_rows(x)
        q = self._split(applied(self.query, x))
        (bucket,) = self.hash(q)
        visited = sum(float((r.visible / r.times.double()).sum()) for r in self._rounds(bucket))
        exact = disjoint_rounds(bucket, bucket, self.hash.buckets, include_self=False)
        colliding = sum(make_plan(p, q, q).visible_pairs() for p in exact)
        batch, heads, seqlen, _ = q.shape
        return Coverage(round(visited), colliding, batch * heads * seqlen * (seqlen - 1) // 2)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"heads={self.heads}, head_dim={self.head_dim}, chunk={self.chunk}"


def _met(bucket: Tensor, chunk: Tensor, q_row: Tensor, k_row: Tensor) -> Tensor:
    """Which (query, key) rows one round brings together: same bucket, chunk or the one before."""
    last = bucket.shape[-1] - 1

    def at(x: Tensor, row: Tensor) -> Tensor:
        flat = torch.take_along_dim(x, row.clamp(max=last).flatten(2), dim=2)
        return flat.view(row.shape)

    same = at(bucket, q_row)[..., :, None] == at(bucket, k_row)[..., None, :]
    apart = at(chunk, q_row)[..., :, None] - at(chunk, k_row)[..., None, :]
    return same & (apart >= 0) & (apart <= 1)


def _rows(x: Tensor, row: Tensor) -> Tensor:
    """Rows of (batch, heads, seqlen, dim) at (batch, heads, chunks, n): (..., chunks, n, dim)."""
    taken = torch.take_along_dim(x, row.flatten(2).unsqueeze(-1), dim=2)
    return taken.unflatten(2, row.shape[2:])
