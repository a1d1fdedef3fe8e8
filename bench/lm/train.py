"""Train, checkpoint, resume; on one device or under torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from bench.lm.config import Config
from bench.lm.data import Corpus
from bench.lm.graph import Batch, GraphStep, StaticStep, refusal
from bench.lm.model import LanguageModel

VALIDATION_SEED = 10**6
FINAL_RATE = 0.1  # of the highest
ADAPTED_SHARE = 0.5  # of its way to the last batch's queries that a hash goes after each step
COOLING = 0.2  # share of a trapezoid's length
DENSE_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]  # the first that can


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

    def agree(self, value: float) -> float:
        """The leading process's value, on all: what hangs on a clock is decided once.

        It goes from host to host, so that no GPU is waited for.
        """
        if self.size == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(told, 0)
        return float(told)

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Join torchrun's group if there is one."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")  # gloo: `World.agree`
    try:
        yield World(rank, size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


def learning_rate(config: Config, step: int, seconds: float = 0.0) -> float:
    """Rate of the next step; `Config` says the shape."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    share = (step - config.warmup) / max(config.steps - config.warmup, 1)
    if config.seconds:
        share = max(share, seconds / config.seconds)
    share = min(share, 1.0)
    if config.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * share))
    elif config.schedule == "trapezoid":
        height = min(1.0, (1 - share) / COOLING)
    else:
        raise SystemExit(f"schedule must be 'cosine' or 'trapezoid', got {config.schedule!r}")
    return config.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * height)


class Trainer:
    """One run: model, optimiser, position in the schedule.

    A step only enqueues; `pause` waits for the GPU and stops the clock, which `train_step` starts.
    With `static_step` it runs on inputs that stay in place, as a graph does.
    """

    def __init__(self, config: Config, corpus: Corpus, where: World) -> None:
        if config.graph:
            self.check_graph(where)
        torch.manual_seed(config.seed)
        torch._dynamo.config.recompile_limit = 64  # variants and lengths share code
        self.config, self.corpus, self.where = config, corpus, where
        self.step, self._seconds = 0, 0.0
        self._began: float | None = None
        with torch.device(where.device):
            self.model = LanguageModel(config).to(where.device)
        self.model.compile_parts()
        self.train_split = corpus.reader(corpus.train, where.device)
        self.validation_split = corpus.reader(corpus.validation, where.device)
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        self.rate = torch.zeros((), device=where.device)  # a graph reads it, so it is no number
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.run: Any = DistributedDataParallel(self.model) if where.size > 1 else self.model
        self.static_step: StaticStep | None = None
        if config.graph:
            self.use_graph()

    @staticmethod
    def check_graph(where: World) -> None:
        """Stop where steps cannot be captured."""
        reason = refusal(where.device, where.size)
        if reason is not None:
            raise SystemExit(reason)

    def use_graph(self) -> None:
        """From here on one step is plain, and later ones are replays of one graph."""
        self.check_graph(self.where)
        self.static_step = GraphStep(self.advance)

    @property
    def seconds(self) -> float:
        """Training time so far, validation and compilation left out."""
        running = 0.0 if self._began is None else time.perf_counter() - self._began
        return self._seconds + running

    def clock(self) -> float:
        """Seconds of training as the leading process counts them; to be called by all."""
        return self.where.agree(self.seconds)

    def share(self) -> float:
        """How much of the run is done, 1.0 at its end; the same on all, to be called by all."""
        config = self.config
        if self.step >= config.steps:
            return 1.0
        done = self.step / config.steps
        return max(done, min(self.clock() / config.seconds, 1.0)) if config.seconds else done

    def pause(self) -> None:
        """Stop the clock once everything enqueued is done."""
        self.where.synchronize()
        self._seconds, self._began = self.seconds, None

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """bfloat16 on a GPU, and the kernels of the dense variant."""
        if not self.where.device.startswith("cuda"):
            yield
            return
        with (
            torch.autocast("cuda", torch.bfloat16),
            sdpa_kernel(DENSE_KERNELS, set_priority=True),
        ):
            yield

    def _seed(self, draw: int) -> None:
        """Begin the random numbers of a step: hashes and drops of all its micro-batches."""
        torch.manual_seed(self.config.seed * 1_000_003 + draw)

    def _batch(self, draw: int) -> Batch:
        """One micro-batch of training text."""
        config = self.config
        return self.train_split.batch(config.seqlen, config.micro_batch, config.seed, draw)

    def _micro_step(self, batch: Batch, share: float) -> torch.Tensor:
        """Gradients of one micro-batch, added to those there; its loss times `share`."""
        with self.precision():
            loss = self.run(*batch) * share
        loss.backward()
        return loss.detach()

    def advance(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Forward, backward, clipping and AdamW; the mean loss. All of it can be captured."""
        losses = []
        for place, batch in enumerate(batches):
            waits = self.where.size > 1 and place < len(batches) - 1
            with self.run.no_sync() if waits else contextlib.nullcontext():
                losses.append(self._micro_step(batch, 1 / len(batches)))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    def _own_groups(self, *, captured: bool) -> None:
        """Set of the optimiser's groups what no checkpoint knows."""
        for group in self.optimizer.param_groups:
            group["lr"], group["capturable"] = self.rate, captured

    def warm_up(self) -> None:
        """Compile everything that a step needs; weights and clock stay as they are."""
        self._seed(0)
        self._micro_step(self._batch(0), 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        self.where.synchronize()

    def train_step(self) -> torch.Tensor:
        """Advance one step; return the mean loss of its tokens on this process, in nats."""
        config, where = self.config, self.where
        if self.static_step is not None and self.static_step.due:
            self.pause()
            self._own_groups(captured=True)
            self.static_step.capture()
        if self._began is None:
            self._began = time.perf_counter()
        # Gradients are averaged, rates are not: weights would drift apart by each one's own clock.
        seconds = self.clock() if config.seconds else 0.0
        self.rate.fill_(learning_rate(config, self.step, seconds))
        micro_steps = config.accumulation(where.size)
        draws = [
            (self.step * micro_steps + micro) * where.size + where.rank
            for micro in range(micro_steps)
        ]
        self._seed(draws[0])
        loss = (self.static_step or self.advance)([self._batch(draw) for draw in draws])
        self.model.adapt(max(1 / (self.step + 1), ADAPTED_SHARE))
        self.step += 1
        return loss

    def validation_batches(self, batches: int) -> Iterator[Batch]:
        """Fixed validation sequences; what is hashed or dropped in each is fixed too."""
        config = self.config
        for draw in range(batches):
            torch.manual_seed(draw)
            yield self.validation_split.batch(
                config.seqlen, config.micro_batch, VALIDATION_SEED, draw
            )

    def validate(self, batches: int = 8) -> float:
        """Mean loss on fixed validation sequences, in nats; the clock stands meanwhile.

        Tracks gradients, though none are taken: the graphs of training serve without compiling.
        """
        self.pause()
        losses = []
        for batch in self.validation_batches(batches):
            with self.precision():
                losses.append(self.model(*batch).detach())
        return float(torch.stack(losses).mean())

    def probe_text(self, seqlen: int, draw: int = 0) -> torch.Tensor:
        """One sequence (1, seqlen) to look at queries with.

        Of validation text, or of training text where that is shorter than a sequence.
        """
        held = self.validation_split.holds(seqlen)
        split = self.validation_split if held else self.train_split
        text, _ = split.batch(seqlen, 1, VALIDATION_SEED, draw)
        return text

    def bucket_cost(self) -> float:
        """How uneven the buckets of a hash variant are, over layers; 1.0 is even."""
        torch.manual_seed(0)
        text = self.probe_text(self.config.seqlen)
        with self.precision():
            costs = self.model.bucket_cost(text)
        return sum(costs) / len(costs) if costs else 0.0

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
        """Take up a checkpoint of the same configuration and corpus.

        One from before a field existed did what is the default of that field.
        """
        state = torch.load(path, map_location=self.where.device, weights_only=True)
        mine = dataclasses.asdict(self.config)
        stored = dataclasses.asdict(Config()) | state["config"]
        other = {k: v for k, v in stored.items() if mine.get(k) != v}
        if other or state["corpus"] != self.corpus.sha256:
            raise SystemExit(f"{path} is of another run: {other or 'another corpus'}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._own_groups(captured=False)
        if self.static_step is not None:  # what a graph knew of the optimiser is no longer used
            self.static_step = type(self.static_step)(self.advance)
        self.step, self._seconds = state["step"], state["seconds"]


def log_line(path: Path, **facts: Any) -> None:
    """Append one JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(facts) + "\n")
