"""How many pairs of a bucket the Reformer's chunks keep, against the length of the sequence.

Exact hash attention computes every earlier key of a query's bucket. The Reformer sorts rows by
bucket, cuts them into equal chunks and looks at its own chunk and the one before: what a bucket
holds beyond that is lost. For one round the share follows from the sizes of the buckets alone, so
that any length can be counted without attention; `ReformerAttention.coverage` counts the same pairs
one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench import records
from bench.lm.config import Config
from bench.lm.data import Corpus
from bench.lm.model import cost_of
from bench.lm.train import Trainer, World
from bench.machine import machine
from scfa_core.hashing import angular_hash

TWICE = 0  # chunks of two mean buckets: 2 * seqlen // buckets, as `ReformerAttention` recommends


def covered_pairs(bucket: Tensor, chunk: int) -> tuple[int, int]:
    """(query, earlier key) pairs of one round that chunks of `chunk` rows keep, and all of them.

    `bucket` is (..., seqlen); a pair counts if both share a bucket.
    """
    ordered, _ = bucket.sort(dim=-1)
    place = torch.arange(bucket.shape[-1], device=bucket.device)
    first = torch.searchsorted(ordered, ordered)  # where a row's bucket begins
    oldest = (place // chunk - 1) * chunk  # the first row of the chunk before
    kept = place - torch.maximum(first, oldest)
    return int(kept.sum()), int((place - first).sum())


def measure(
    layers: Sequence[Tensor], buckets: int, chunk: int, draws: int, generator: torch.Generator
) -> dict[str, Any]:
    """Coverage of each layer's queries (batch, heads, seqlen, head_dim), pooled over draws.

    Every draw hashes with fresh random directions, as a training step does.
    """
    by_layer, costs = [], []
    kept_of_all = pairs_of_all = 0
    for q in layers:
        kept = pairs = 0
        for _ in range(draws):
            shape = (1, q.shape[1], q.shape[3], buckets // 2)
            directions = normalize(torch.randn(shape, generator=generator), dim=2).to(q.device)
            bucket = angular_hash(q.float(), directions)[0]
            some, every = covered_pairs(bucket, chunk)
            kept, pairs = kept + some, pairs + every
            costs.append(cost_of(bucket, buckets))
        by_layer.append(round(kept / max(pairs, 1), 5))
        kept_of_all, pairs_of_all = kept_of_all + kept, pairs_of_all + pairs
    return {
        "coverage": round(kept_of_all / max(pairs_of_all, 1), 5),
        "by_layer": by_layer,
        "bucket_cost": round(sum(costs) / len(costs), 4),
    }


def rows_of(
    source: str,
    layers: Sequence[Tensor],
    buckets: Sequence[int],
    chunks: Sequence[int],
    draws: int,
) -> Iterator[dict[str, Any]]:
    """One row for each number of buckets and size of chunks, all over the same directions."""
    seqlen = layers[0].shape[2]
    for count in buckets:
        for rule in chunks:
            chunk = max(2 * seqlen // count, 1) if rule == TWICE else rule
            yield {
                "queries": source,
                "seqlen": seqlen,
                "buckets": count,
                "rule": f"2T/{count}" if rule == TWICE else str(rule),
                "chunk": chunk,
                **measure(layers, count, chunk, draws, torch.Generator().manual_seed(count)),
            }


def run(
    base: Config,
    corpus: Corpus,
    where: World,
    *,
    lengths: Sequence[int],
    buckets: Sequence[int],
    chunks: Sequence[int],
    draws: int,
    json_path: Path | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Coverage for normal queries, for a model as initialised, and after ``base.steps`` steps.

    The model has the longest of `lengths`; shorter sequences are the beginning of its text. With no
    steps there are normal queries alone. The file is written after each group of rows.
    """
    config = dataclasses.replace(base, seqlen=max(lengths))
    record: dict[str, Any] = {
        "machine": machine("cuda" if where.device.startswith("cuda") else "cpu", commit),
        "corpus": corpus.sha256,
        "config": dataclasses.asdict(config),
        "draws": draws,
        "coverage": [],
    }

    def add(source: str, layers: Sequence[Tensor]) -> None:
        for row in rows_of(source, layers, buckets, chunks, draws):
            record["coverage"].append(row)
            print(
                f"{source:10s} T={row['seqlen']:6d} {row['buckets']:3d} buckets, chunks of "
                f"{row['chunk']:5d}: {100 * row['coverage']:6.2f} % kept, bucket cost "
                f"{row['bucket_cost']:.2f}",
                flush=True,
            )
        if json_path is not None:
            records.write(json_path, record)

    for seqlen in lengths:
        shape = (1, config.heads, seqlen, config.head_dim)
        normal = torch.randn(shape, generator=torch.Generator().manual_seed(seqlen))
        add("normal", [normal.to(where.device)])
    if not config.steps:
        return record
    trainer = Trainer(config, corpus, where)

    def look(source: str) -> None:
        for seqlen in lengths:
            torch.manual_seed(seqlen)
            text = trainer.probe_text(config.seqlen)[:, :seqlen]
            with trainer.precision():
                layers = list(trainer.model.queries(text, trainer.model.directions()))
            add(source, layers)

    look("untrained")
    for _ in range(config.steps):
        loss = trainer.train_step()
    trainer.pause()
    record["loss"] = float(loss)
    record["parameters"] = sum(p.numel() for p in trainer.model.parameters())
    print(f"{config.steps} steps, {trainer.seconds:.1f} s, last loss {float(loss):.4f} nats")
    look("trained")
    return record
