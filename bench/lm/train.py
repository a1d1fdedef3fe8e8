"""Train, checkpoint, resume; on one device or under torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bench.lm.config import Config
from bench.lm.data import Corpus, batch_at
from bench.lm.model import LanguageModel

VALIDATION_SEED = 10**6


@dataclasses.dataclass
class World:
    """One process among those of torchrun."""

    rank: int
    size: int
    device: str

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Join torchrun's group if there is one."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World(rank, size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0))))


class Trainer:
    """One run: model, optimiser, position in the schedule."""

    def __init__(self, config: Config, corpus: Corpus, where: World) -> None:
        torch.manual_seed(config.seed)
        self.config, self.corpus, self.where = config, corpus, where
        self.step, self.seconds = 0, 0.0
        self.model = LanguageModel(config).to(where.device)
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        run: Any = torch.compile(self.model) if config.compile else self.model
        self.run = DistributedDataParallel(run) if where.size > 1 else run

    def loss_of(self, text: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss of one micro-batch, under bfloat16 autocast on a GPU."""
        device = self.where.device
        cast = torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda"))
        with cast:
            loss: torch.Tensor = self.run(text.to(device), target.to(device))
        return loss

    def train_step(self) -> float:
        """Advance one step; return the mean loss of its tokens on this process, in nats."""
        config, where = self.config, self.where
        begin = time.perf_counter()
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        micro_steps = config.accumulation(where.size)
        total = 0.0
        for micro in range(micro_steps):
            draw = (self.step * micro_steps + micro) * where.size + where.rank
            batch = batch_at(
                self.corpus.train, config.seqlen, config.micro_batch, config.seed, draw
            )
            torch.manual_seed(config.seed * 1_000_003 + draw)  # hashes and drops of this step
            last = micro == micro_steps - 1
            wait = self.run.no_sync() if where.size > 1 and not last else contextlib.nullcontext()
            with wait:
                loss = self.loss_of(*batch) / micro_steps
                loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.perf_counter() - begin
        return total

    @torch.no_grad()
    def validate(self, batches: int = 8) -> float:
        """Mean loss on fixed validation sequences, in nats."""
        self.model.eval()
        total = 0.0
        for draw in range(batches):
            torch.manual_seed(draw)
            batch = batch_at(self.corpus.validation, self.config.seqlen, 1, VALIDATION_SEED, draw)
            total += float(self.loss_of(*batch))
        self.model.train()
        return total / batches

    def save(self, path: Path) -> None:
        """Write a checkpoint so that a stop at any moment leaves a whole one."""
        state = {
            "config": dataclasses.asdict(self.config),
            "corpus": self.corpus.sha256,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Take up a checkpoint of the same configuration and corpus."""
        state = torch.load(path, map_location=self.where.device, weights_only=True)
        mine = dataclasses.asdict(self.config)
        other = {k: v for k, v in state["config"].items() if mine.get(k) != v}
        if other or state["corpus"] != self.corpus.sha256:
            raise SystemExit(f"{path} is of another run: {other or 'another corpus'}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def log_line(path: Path, **facts: Any) -> None:
    """Append one JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(facts) + "\n")
