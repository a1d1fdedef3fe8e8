"""Variants trained for equal seconds, validation loss on the way; one sitting adds runs to a file.

A run is whole within one sitting: nothing but the JSON file need survive the machine. Runs that the
file holds to their end are not repeated, so that seeds and variants can be spread over sittings.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from bench.lm.config import Config
from bench.lm.data import Corpus
from bench.lm.speed import compile_kernels_meanwhile
from bench.lm.train import Trainer, World
from bench.run import machine

SAMPLED_EVERY = 10  # steps between losses read; each waits for the GPU
VALIDATION_BATCHES = 16  # the same for every point of a curve


def identity(config: Config, corpus: Corpus) -> dict[str, Any]:
    """What makes two runs the same run."""
    return {"config": dataclasses.asdict(config), "corpus": corpus.sha256}


def train_one(
    config: Config, corpus: Corpus, where: World, points: int, store: Any
) -> dict[str, Any]:
    """Train one variant to the end of its seconds or steps.

    `store` is called with the run so far after each of about `points` validations.
    """
    begin = time.perf_counter()
    trainer = Trainer(config, corpus, where)
    trainer.warm_up()
    parameters = sum(p.numel() for p in trainer.model.parameters())
    run: dict[str, Any] = {
        **identity(config, corpus),
        "parameters": parameters,
        "compile_seconds": time.perf_counter() - begin,
        "curve": [],
        "done": False,
    }
    limit = config.seconds or math.inf

    def note(loss: float) -> None:
        validation = trainer.validate(VALIDATION_BATCHES)
        run["curve"].append({
            "step": trainer.step,
            "tokens": trainer.step * config.tokens_per_step,
            "seconds": round(trainer.seconds, 3),
            "train": loss,
            "validation": validation,
        })  # fmt: skip
        store(run)
        speed = trainer.step * config.tokens_per_step / max(trainer.seconds, 1e-9)
        print(
            f"{config.attention:14s} seed {config.seed}  step {trainer.step:6d}  "
            f"{trainer.seconds:6.1f} s  train {loss:.4f}  validation {validation:.4f} nats "
            f"({validation / math.log(2):.4f} bits)  {speed:,.0f} tokens/s",
            flush=True,
        )

    passed = 0
    recent: list[torch.Tensor] = []
    while trainer.step < config.steps and trainer.seconds < limit:
        recent.append(trainer.train_step())
        if trainer.step % SAMPLED_EVERY:
            continue
        loss = float(torch.stack(recent[-SAMPLED_EVERY:]).mean())
        share = max(trainer.step / config.steps, trainer.seconds / limit)
        if share < 1 and int(share * points) > passed:
            passed = int(share * points)
            note(loss)
    note(float(torch.stack(recent[-SAMPLED_EVERY:]).mean()))
    run["bucket_cost"] = trainer.bucket_cost()
    run["done"] = True
    store(run)
    return run


def load(path: Path) -> dict[str, Any]:
    """Read a result file, or begin one."""
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text())
        return record
    return {"runs": []}


def run(
    base: Config,
    corpus: Corpus,
    where: World,
    *,
    variants: list[str],
    seeds: list[int],
    points: int,
    json_path: Path,
    budget: float = math.inf,
) -> dict[str, Any]:
    """Train every variant and seed that the file lacks; begin none that `budget` cannot hold."""
    begin = time.monotonic()
    record = load(json_path)
    facts = machine("cuda" if where.device.startswith("cuda") else "cpu")
    kernels_ready = compile_kernels_meanwhile(base, where)
    for seed in seeds:
        for variant in variants:
            config = dataclasses.replace(base, attention=variant, seed=seed)
            same = identity(config, corpus)
            old = [x for x in record["runs"] if all(x[key] == same[key] for key in same)]
            if any(x["done"] for x in old):
                continue
            if time.monotonic() - begin + config.seconds > budget:
                print(f"{variant} seed {seed}: not begun, the budget is spent", flush=True)
                continue
            others = [x for x in record["runs"] if x not in old]

            def store(run: dict[str, Any], others: list[dict[str, Any]] = others) -> None:
                record["runs"] = [*others, run | {"machine": facts}]
                if where.leads:
                    partial = json_path.with_suffix(".partial")
                    partial.write_text(json.dumps(record, indent=1) + "\n")
                    partial.replace(json_path)

            kernels_ready()
            try:
                train_one(config, corpus, where, points, store)
            except Exception as error:
                print(f"{variant} seed {seed}: failed: {error!r:.300}", flush=True)
            gc.collect()
            if where.device.startswith("cuda"):
                torch.cuda.empty_cache()
    return record
