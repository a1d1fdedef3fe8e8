"""The two models of these runs: a small one whose hashes are given, and the paper's, sharded.

The small model hashes tokens, not activations, so that rounding cannot move a row to another bucket
and float64 is the truth of every precision. The paper's hashes its queries.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import scfa_core as scfa
from bench.lm.attend import Attend
from bench.lm.config import Config
from bench.lm.model import LanguageModel
from scfa_core import distributed
from scfa_core.distributed_exchange import gather
from scfa_core.errors import ShapeError
from scfa_core.hashing import angular_hash
from scfa_core.hashing_checks import CENTER_ROWS, MOST_SUM, PAST_START
from scfa_core.nn.past import past_hash

VOCABULARY = 64
LOSS_ROWS = 8192  # logits of so many rows are in memory at once
WAYS = ("all-to-all", "all-gather")


class Layer(nn.Module):
    """Hashed attention and a feed-forward, each added to the stream."""

    def __init__(self, heads: int, head_dim: int, low: torch.dtype | None, backend: Any) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads, self.low, self.backend = heads, low, backend
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.output, self.feed = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, bucket: Tensor) -> Tensor:
        """(batch, seqlen, width) and (batch, heads, seqlen) to the former's shape."""
        mixed = self.mix(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = mixed.to(self.low or x.dtype).permute(2, 0, 3, 1, 4)
        out = scfa.attention(q, k, v, scfa.HashSparse(bucket, bucket), backend=self.backend)
        x = x + self.output(out.transpose(1, 2).flatten(2).to(x.dtype))
        return x + functional.gelu(self.feed(x))


class Small(nn.Module):
    """Two layers; attention in `low` precision where one is given. Text to the mean loss."""

    def __init__(
        self, heads: int, head_dim: int, low: torch.dtype | None = None, backend: Any = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.embed = nn.Embedding(VOCABULARY, heads * head_dim)
        self.layers = nn.ModuleList(Layer(heads, head_dim, low, backend) for _ in range(2))
        self.head = nn.Linear(heads * head_dim, VOCABULARY)

    def forward(self, text: Tensor) -> Tensor:
        """(batch, seqlen + 1) tokens to a scalar, in nats."""
        before, after = text[:, :-1], text[:, 1:]
        steps = torch.arange(1, self.heads + 1, device=text.device).view(1, -1, 1)
        bucket = before[:, None] * steps % 5
        x = self.embed(before)
        for layer in self.layers:
            x = layer(x, bucket)
        return functional.cross_entropy(self.head(x).flatten(0, 1), after.flatten())


def ways_for(heads: int, ranks: int) -> list[str]:
    """Ways of sharding a sequence that serve so many heads."""
    return [way for way in WAYS if way == "all-gather" or heads % ranks == 0]


def rows_of(way: str, seqlen: int, device: str) -> Tensor:
    """Global rows of this rank."""
    if way == "all-gather":
        return distributed.zigzag_rows(seqlen, device=device)
    each = seqlen // dist.get_world_size()
    return torch.arange(each, device=device) + dist.get_rank() * each


def _pattern(config: Config, bucket: Tensor | None) -> scfa.Pattern:
    if bucket is not None:
        return scfa.HashSparse(bucket, bucket, include_self=False)
    window = config.attention.removeprefix("window")
    return scfa.Causal() if config.attention == "dense" else scfa.SlidingWindow(int(window))


def past_mean_of_all(x: Tensor, start: Tensor, rows: Tensor) -> Tensor:
    """The mean that `past_hash` hashes about, of a sequence of which this rank holds whole blocks.

    Ranks exchange the sum of each block, 1 / 64 of the rows. A block that `past_hash`
    does not count counts for nothing here either.
    """
    if len(rows) % CENTER_ROWS:
        raise ShapeError(f"ranks need blocks of {CENTER_ROWS} rows each, got {len(rows)} rows")
    own = rows[::CENTER_ROWS] // CENTER_ROWS
    order = torch.argsort(gather(own, 0, None))
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        sums = x.unflatten(2, (-1, CENTER_ROWS)).sum(3, dtype=torch.float32)
        sums = gather(sums, 2, None).index_select(2, order)
        known = (sums.abs() < MOST_SUM).all(-1, keepdim=True)
        before, number = (
            functional.pad(y[:, :, :-1].cumsum(2), (0, 0, 1, 0)).index_select(2, own)
            for y in (sums.where(known, 0.0), CENTER_ROWS * known.float())
        )
        return (before + PAST_START * start[:, None]) / (number + PAST_START)


def sharded_attend(config: Config, way: str, rows: Tensor) -> Attend:
    """Attention of the paper's model where each rank holds `rows` of the sequence.

    Positions are learned, so that queries are what is hashed; with a center about the mean of the
    earlier rows of the whole sequence.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    options = {"softmax_scale": config.softmax_scale, "backend": config.backend}

    def exchanged(
        q: Tensor, k: Tensor, v: Tensor, hashed: Tensor, directions: Tensor | None,
        center: Tensor | None, *_: Any,
    ) -> Tensor:  # fmt: skip
        own = None if directions is None else directions.chunk(ranks, dim=1)[rank]

        def pattern(q: Tensor, _k: Tensor) -> scfa.Pattern:
            if own is None:
                return _pattern(config, None)
            start = None if center is None else center.chunk(ranks)[rank]
            bucket = angular_hash(q, own) if start is None else past_hash(q, own, start)[0]
            return _pattern(config, bucket[0])

        return distributed.ulysses_attention(q, k, v, pattern, **options)

    order = torch.argsort(gather(rows, 0, None))

    def gathered(
        q: Tensor, k: Tensor, v: Tensor, hashed: Tensor, directions: Tensor | None,
        center: Tensor | None, *_: Any,
    ) -> Tensor:  # fmt: skip
        bucket = None
        if directions is not None:
            if center is not None:
                center = past_mean_of_all(hashed, center, rows)
            bucket = gather(angular_hash(hashed, directions, center)[0], 2, None)
            bucket = bucket.index_select(2, order)
        pattern = _pattern(config, bucket)
        return distributed.gathered_attention(q, k, v, pattern, rows=rows, **options)

    return exchanged if way == "all-to-all" else gathered


class Paper(nn.Module):
    """The paper's language model on one rank's rows; activations of blocks are recomputed.

    Positions are embedded by a table of this rank's rows alone, which DDP leaves out: no other rank
    has a gradient of them. Its gradient is that of the mean over all ranks, like DDP's.
    """

    def __init__(self, config: Config, rows: Tensor | None, way: str | None) -> None:
        super().__init__()
        if config.positions != "learned":
            raise SystemExit(f"rows of ranks need learned positions, not {config.positions!r}")
        if config.adapts not in ("", "r"):
            raise SystemExit(f"ranks share no statistics of a batch, so not {config.attention!r}")
        if set("+,") & set(config.attention):
            raise SystemExit(f"ranks share one pattern of all heads, not {config.attention!r}")
        local = config if rows is None else dataclasses.replace(config, seqlen=len(rows))
        self.inner = LanguageModel(local)
        if rows is None or way is None:
            return
        for block in self.inner.blocks:
            block.mix.attend = sharded_attend(config, way, rows)
            block.mix.follows_past = False  # rows before those of this rank count as well
        ranks = dist.get_world_size()
        position = self.inner.embed.position.weight
        position.register_hook(lambda gradient: gradient / ranks)
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self, ["inner.embed.position.weight"]
        )

    def forward(self, text: Tensor, target: Tensor) -> Tensor:
        """(batch, rows) tokens and their successors to the mean loss of these rows, in nats."""
        inner = self.inner
        directions = inner.directions()
        x = inner.embed(text)
        for layer, block in enumerate(inner.blocks):
            hashed_by = inner._hash_of(layer, directions)
            x, _ = checkpoint(block, x, *hashed_by, None, use_reentrant=False)
        losses = [
            checkpoint(inner.head, part, inner.embed.token.weight, right, use_reentrant=False)
            * right.numel()
            for part, right in zip(
                x.split(LOSS_ROWS, dim=1), target.split(LOSS_ROWS, dim=1), strict=True
            )
        ]
        return torch.stack(losses).sum() / target.numel()
