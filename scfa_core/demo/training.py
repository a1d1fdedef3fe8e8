"""Training one model, and holding its attention against the reference on its own tensors."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

import scfa_core as scfa
from scfa_core.demo.model import (
    SOFTMAX_SCALE,
    Attend,
    LanguageModel,
    Size,
    Variant,
)
from scfa_core.patterns.base import map_arrays

LEARNING_RATE = 4e-3
WARM_UP_STEPS = 8
CHECK_ROWS = 4096  # the reference is quadratic in memory
HELD_OUT_SHARE = 0.05
HELD_OUT_BATCHES = 4


@dataclass
class Run:
    """What training one variant gave."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: float = math.nan

    def step_seconds(self) -> float:
        """Median seconds of a step, the first left out."""
        return statistics.median(self.seconds[1:] or self.seconds)


class Corpus:
    """Batches of text; the n-th batch is the same for every variant."""

    def __init__(self, text: bytes, size: Size, device: str, seed: int) -> None:
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        if len(data) < 40 * (size.seqlen + 1):
            raise scfa.ScfaError(
                f"the text has {len(data)} bytes; training at seqlen {size.seqlen} needs at least "
                f"{40 * (size.seqlen + 1)}. Give more text (--text) or a smaller --seqlen"
            )
        cut = int(len(data) * (1 - HELD_OUT_SHARE))
        self.train, self.held_out = data[:cut], data[cut:]
        self.size, self.device, self.seed = size, device, seed

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Training bytes and the bytes that follow them, each (batch, seqlen)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        most = len(self.train) - self.size.seqlen - 1
        starts = torch.randint(most, (self.size.batch,), generator=generator)
        return self._rows(self.train, starts)

    def held_out_batch(self, number: int) -> tuple[Tensor, Tensor]:
        """The same from text that training never sees."""
        count = HELD_OUT_BATCHES * self.size.batch
        most = len(self.held_out) - self.size.seqlen - 1
        starts = torch.linspace(0, most, count).long()
        return self._rows(self.held_out, starts[number::HELD_OUT_BATCHES])

    def _rows(self, data: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        span = torch.arange(self.size.seqlen + 1)
        rows = data[starts[:, None] + span].long().to(self.device)
        return rows[:, :-1], rows[:, 1:]


def fresh_model(size: Size, attend: Attend, device: str, seed: int) -> LanguageModel:
    """The same weights for every variant."""
    torch.manual_seed(seed)
    model = LanguageModel(size).to(device)
    model.use(attend)
    return model


def precision(device: str) -> contextlib.AbstractContextManager[object]:
    """bfloat16 autocast on a GPU, float32 on the CPU."""
    if device == "cpu":
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.bfloat16)


def loss_of(model: LanguageModel, batch: tuple[Tensor, Tensor], device: str) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    with precision(device):
        logits = model(batch[0])
    return functional.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten())


class Trainer:
    """One variant on its way: model, optimizer and what came of it."""

    def __init__(self, name: str, attend: Attend, corpus: Corpus, planned: int) -> None:
        self.run, self.corpus, self.planned = Run(name), corpus, planned
        self.model = fresh_model(corpus.size, attend, corpus.device, corpus.seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True
        )

    def step(self) -> float:
        """Take the next step of a schedule laid out for `planned`; return its loss."""
        number = len(self.run.losses)
        began = time.perf_counter()
        warm_up = min(1.0, (number + 1) / WARM_UP_STEPS)
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * number / self.planned))
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm_up * decay
        loss = loss_of(self.model, self.corpus.batch(number), self.corpus.device)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        value = loss.item()  # waits for the device
        self.run.losses.append(value)
        self.run.seconds.append(time.perf_counter() - began)
        return value


def held_out_loss(model: LanguageModel, corpus: Corpus) -> float:
    """Loss on text that training did not see, in nats per byte."""
    with torch.no_grad():
        losses = [
            loss_of(model, corpus.held_out_batch(i), corpus.device).item()
            for i in range(HELD_OUT_BATCHES)
        ]
    return sum(losses) / len(losses)


def captured_tensors(model: LanguageModel, corpus: Corpus) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the last layer for one head of one held-out sequence, (1, 1, rows, head_dim)."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    last = model.blocks[-1]
    attend = last.attend

    def watch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q, k, v))
        return attend(q, k, v)

    last.attend = watch
    try:
        with torch.no_grad():
            loss_of(model, corpus.held_out_batch(0), corpus.device)
    finally:
        last.attend = attend
    q, k, v = (x[:1, :1, :CHECK_ROWS].detach() for x in seen[0])
    return q, k, v


def deviations(
    variant: Variant, tensors: tuple[Tensor, Tensor, Tensor], backend: str | None
) -> dict[str, float]:
    """Largest deviation from the float64 reference, over the largest entry, of each result."""
    torch.manual_seed(0)
    pattern = variant.pattern_of(tensors[0])
    dout = torch.randn_like(tensors[2])
    mine = _with_gradients(tensors, dout, pattern, backend)
    on_host = [x.cpu().double() for x in tensors]
    pattern = map_arrays(pattern, lambda x: x.cpu())
    right = _with_gradients(on_host, dout.cpu().double(), pattern, "reference")
    return {
        name: ((a.cpu().double() - b).abs().max() / b.abs().max()).item()
        for name, a, b in zip(("out", "dq", "dk", "dv"), mine, right, strict=True)
    }


def _with_gradients(
    tensors: tuple[Tensor, ...] | list[Tensor],
    dout: Tensor,
    pattern: scfa.Pattern,
    backend: str | None,
) -> list[Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in tensors)
    out = scfa.attention(q, k, v, pattern, softmax_scale=SOFTMAX_SCALE, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
