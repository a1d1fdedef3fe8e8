"""Variants trained for equal seconds or steps, validation loss on the way; sittings add to a file.

Runs that the file holds to their end are not repeated, so that seeds and variants can be spread
over sittings; what failed, or stopped because the sitting was over, is recorded and taken up again.
With a folder for checkpoints a run goes on where it stopped, else nothing but the file need survive
and it begins anew.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import records
from bench.lm.config import Config
from bench.lm.data import Corpus
from bench.lm.speed import compile_kernels_meanwhile
from bench.lm.train import Trainer, World
from bench.machine import machine

SAMPLED_EVERY = 10  # steps between losses read; each waits for the GPU
VALIDATION_BATCHES = 16  # the same for every point of a curve


def identity(config: Config, corpus: Corpus) -> dict[str, Any]:
    """What makes two runs the same run."""
    return {"config": dataclasses.asdict(config), "corpus": corpus.sha256}


def _told(trainer: Trainer, point: dict[str, Any]) -> str:
    """One point of a curve in words."""
    config, validation = trainer.config, point["validation"]
    rate = point["tokens"] / max(point["seconds"], 1e-9)
    return (
        f"{config.attention:14s} seed {config.seed}  step {point['step']:6d}  "
        f"{point['seconds']:6.1f} s  train {point['train']:.4f}  validation {validation:.4f} nats "
        f"({validation / math.log(2):.4f} bits)  {rate:,.0f} tokens/s"
    )


def train_one(
    trainer: Trainer,
    run: dict[str, Any],
    *,
    points: int,
    store: Callable[[], None],
    deadline: float = math.inf,
    checkpoint: Path | None = None,
) -> bool:
    """Train to the end of the seconds or steps, or to the deadline; return whether it is the end.

    Parameters
    ----------
    trainer : Trainer
        Compiled; possibly resumed.
    run : dict
        Its ``curve`` grows by about `points` validations in all.
    store : function
        Called after each validation.
    deadline : float
        Of `time.monotonic`.
    checkpoint : Path, optional
        Written after each validation.

    Raises
    ------
    FloatingPointError
        A loss that is no number.
    """
    config, where = trainer.config, trainer.where
    recent: list[torch.Tensor] = []

    def recent_loss() -> float:
        # The leading process's: all stop at the same step, else one waits for the others for good.
        loss = where.agree(float(torch.stack(recent[-SAMPLED_EVERY:]).mean()))
        if not math.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss} at step {trainer.step}")
        return loss

    def note(loss: float) -> None:
        run["curve"].append({
            "step": trainer.step,
            "tokens": trainer.step * config.tokens_per_step,
            "validation": trainer.validate(VALIDATION_BATCHES),
            "seconds": round(trainer.seconds, 3),
            "train": loss,
        })  # fmt: skip
        store()
        if checkpoint is not None and where.leads:
            trainer.save(checkpoint)
        print(_told(trainer, run["curve"][-1]), flush=True)

    passed = int(trainer.share() * points)
    while trainer.share() < 1:
        recent.append(trainer.train_step())
        if trainer.step % SAMPLED_EVERY:
            continue
        loss = recent_loss()
        share, late = trainer.share(), where.agree(deadline - time.monotonic()) < 0
        if late or (share < 1 and int(share * points) > passed):
            passed = int(share * points)
            note(loss)
        if late and share < 1:
            return False
    if recent and (not run["curve"] or run["curve"][-1]["step"] < trainer.step):
        note(recent_loss())
    return True


def load(path: Path) -> dict[str, Any]:
    """Read a result file, or begin one."""
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text())
        for run in record["runs"]:
            run["config"].setdefault("graph", False)  # older runs lack what they did not do
        return record
    return {"runs": []}


class Sitting:
    """One call of `run`: what it knows of all its runs."""

    def __init__(
        self,
        corpus: Corpus,
        where: World,
        json_path: Path,
        *,
        points: int,
        budget: float,
        checkpoints: Path | None,
        finish: Callable[[Trainer], dict[str, Any]] | None,
        commit: str | None,
    ) -> None:
        self.corpus, self.where, self.json_path = corpus, where, json_path
        self.points, self.checkpoints, self.finish = points, checkpoints, finish
        self.deadline = time.monotonic() + budget
        self.record = load(json_path)
        self.facts = machine("cuda" if where.device.startswith("cuda") else "cpu", commit)
        self.overhead = 0.0  # seconds of a run beyond its training, the most so far
        self.longest = 0.0  # seconds of a run, the most so far

    def write(self) -> None:
        """Replace the file by one that holds everything so far."""
        if self.where.leads:
            records.write(self.json_path, self.record)

    def fits(self, config: Config) -> bool:
        """Whether a run of this kind can be expected to end in time, or to be taken up later."""
        needed = config.seconds + self.overhead if config.seconds else self.longest
        if self.checkpoints is not None:
            needed = self.overhead
        return self.where.agree(self.deadline - time.monotonic() - needed) >= 0

    def _same(self, config: Config) -> list[dict[str, Any]]:
        """Entries of this very run."""
        same = identity(config, self.corpus)
        return [x for x in self.record["runs"] if all(x[key] == same[key] for key in same)]

    def _entry(self, config: Config) -> dict[str, Any]:
        """A new entry in place of what came of the run before; its curve is kept to go on with."""
        old = self._same(config)
        run = {
            **identity(config, self.corpus),
            "unit": self.corpus.unit,
            "bytes_per_token": self.corpus.bytes_per_token,
            "machine": self.facts,
            "curve": old[-1]["curve"] if old else [],
            "done": False,
        }
        self.record["runs"] = [x for x in self.record["runs"] if x not in old] + [run]
        return run

    def _train(self, config: Config, run: dict[str, Any]) -> None:
        """Fill the entry of one run."""
        begin = time.perf_counter()
        trainer = Trainer(config, self.corpus, self.where)
        checkpoint = None
        if self.checkpoints is not None:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            name = f"{config.attention}-{config.fingerprint()}-{self.corpus.sha256[:8]}.pt"
            checkpoint = self.checkpoints / name
            if checkpoint.exists():
                trainer.resume(checkpoint)
        run["curve"] = [point for point in run["curve"] if point["step"] <= trainer.step]
        trainer.warm_up()
        run["parameters"] = sum(p.numel() for p in trainer.model.parameters())
        run["compile_seconds"] = time.perf_counter() - begin
        ended = train_one(
            trainer,
            run,
            points=self.points,
            store=self.write,
            deadline=self.deadline,
            checkpoint=checkpoint,
        )
        if ended:
            run["bucket_cost"] = trainer.bucket_cost()
            run |= self.finish(trainer) if self.finish is not None else {}
            run["done"] = True
            if checkpoint is not None and self.where.leads:
                checkpoint.unlink(missing_ok=True)
        else:
            run["stopped"] = "the budget was spent"
            print(f"{config.attention} seed {config.seed}: stopped, the budget is spent")
        wall = time.perf_counter() - begin
        self.longest = max(self.longest, wall)
        self.overhead = max(self.overhead, wall - trainer.seconds)

    def do(self, config: Config, kernels_ready: Callable[[], None]) -> None:
        """Train one variant and seed, unless it is done or will not fit; record what came of it."""
        name = f"{config.attention} seed {config.seed}"
        if any(run["done"] for run in self._same(config)):
            return
        if not self.fits(config):
            print(f"{name}: not begun, the budget is spent", flush=True)
            return
        run = self._entry(config)
        kernels_ready()
        try:
            self._train(config, run)
        except (Exception, SystemExit) as error:  # SystemExit: a configuration that cannot be
            run["error"] = f"{error!r:.300}"
            print(f"{name}: failed: {run['error']}", flush=True)
        self.write()
        gc.collect()
        if self.where.device.startswith("cuda"):
            torch.cuda.empty_cache()


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
    checkpoints: Path | None = None,
    finish: Callable[[Trainer], dict[str, Any]] | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Train every variant and seed that the file lacks.

    Parameters
    ----------
    budget : float
        Seconds of this sitting: no run begins that is not expected to end in them (with
        checkpoints: to be compiled in them), and one that lasts longer stops.
    checkpoints : Path, optional
        A folder from which a stopped run goes on, in this sitting or a later one.
    finish : function, optional
        Of the trainer of a run at its end; what it returns is kept with the run.
    commit : str, optional
        Of the sources, where git cannot tell.
    """
    sitting = Sitting(
        corpus,
        where,
        json_path,
        points=points,
        budget=budget,
        checkpoints=checkpoints,
        finish=finish,
        commit=commit,
    )
    kernels_ready = compile_kernels_meanwhile(base, where)
    for seed in seeds:
        for variant in variants:
            sitting.do(dataclasses.replace(base, attention=variant, seed=seed), kernels_ready)
    return sitting.record
