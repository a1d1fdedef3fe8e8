"""A training step on inputs that stay in place, and the same step as one CUDA graph.

`StaticStep` runs anywhere; `GraphStep` differs by the capture alone. A graph holds addresses: the
weights, the optimiser's state, buffers and inputs have to stay where they are. Random numbers are
torch's default generator's, which a replay reads anew: seed it before each call.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # inputs and targets (sequences, seqlen)
Advance = Callable[[Sequence[Batch]], Tensor]  # micro-batches to a loss; weights move


class StaticStep:
    """Runs `advance` on copies of its batches that lie at the same addresses in every call."""

    due = False  # whether `capture` is to be called before the next step

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.inputs: list[Batch] = []

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        """Advance by one step; return its loss, not overwritten by later ones."""
        if not self.inputs:
            self.inputs = [(torch.empty_like(a), torch.empty_like(b)) for a, b in batches]
        for mine, given in zip(self.inputs, batches, strict=True):
            for to, source in zip(mine, given, strict=True):
                if to.shape != source.shape:
                    raise ValueError(
                        f"a captured step takes batches of one shape, {tuple(to.shape)}, got "
                        f"{tuple(source.shape)}"
                    )
                to.copy_(source)
        return self.run().clone()

    def run(self) -> Tensor:
        """Advance on the inputs as they lie."""
        return self.advance(self.inputs)

    def capture(self) -> None:
        """Nothing to prepare."""


class GraphStep(StaticStep):
    """The first step runs plainly, on a stream beside, and makes the optimiser's state.

    Then `capture` is due, which enqueues nothing; replays follow on the current stream.
    """

    def __init__(self, advance: Advance) -> None:
        super().__init__(advance)
        self.stream = self.new_stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss: Tensor | None = None

    @staticmethod
    def new_stream() -> torch.cuda.Stream:
        """A stream other than the default one, which cannot be captured."""
        return torch.cuda.Stream()

    def run(self) -> Tensor:
        """Replay, or in the first step run plainly."""
        if self.graph is None:
            loss = self.run_beside()
            self.due = True
            return loss
        assert self.loss is not None
        self.graph.replay()
        return self.loss

    def run_beside(self) -> Tensor:
        """Advance plainly on the stream of the capture."""
        torch.cuda.empty_cache()  # blocks of the default stream do not serve another
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            loss = self.advance(self.inputs)
        here.wait_stream(self.stream)
        return loss

    def capture(self) -> None:
        """Record what `advance` enqueues; nothing of it runs yet."""
        gc.collect()  # neither old graphs nor nodes of other streams may die or live on meanwhile
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream()
        collects = gc.isenabled()
        gc.disable()  # what dies meanwhile may free memory or code, which ends a capture
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                loss = self.advance(self.inputs)
        finally:
            torch.cuda.set_stream(here)  # a capture that fails does not return to it
            if collects:
                gc.enable()
        self.graph, self.loss, self.due = graph, loss, False


def refusal(device: str, processes: int) -> str | None:
    """Why steps cannot be captured here, if they cannot."""
    if not device.startswith("cuda"):
        return f"graph=True captures CUDA graphs, and this runs on {device}; leave graph out"
    if processes > 1:
        return (
            f"graph=True captures the step of one GPU, and there are {processes} processes; start "
            "one, or leave graph out"
        )
    return None
