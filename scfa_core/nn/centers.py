"""What an adapting hash learns of its rows: their mean, and their covariance if wanted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from scfa_core.nn.past import less_past


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Sums and products in the precision of their arguments; "meta" has no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def second_moments(x: Tensor) -> Tensor:
    """Sums of ``outer(x, x)`` over batch and rows: (batch, heads, seqlen, n) to (heads, n, n).

    In float32. Products of 16-bit numbers are exact there, so tensor cores sum what they would be
    given as float32, which they do not multiply.
    """
    x = x.transpose(0, 1).flatten(1, 2)
    half = x.dtype in (torch.float16, torch.bfloat16)
    if half and x.is_cuda and not hasattr(x, "device_mesh"):
        found: Tensor = torch.bmm(x.transpose(1, 2), x, out_dtype=torch.float32)
        return found
    x = x.float()
    return x.transpose(1, 2) @ x


class Center(nn.Module):
    """Mean of the rows of each head, and their covariance if wanted.

    With `past` that of the rows less those before them; the mean is then the last step's.
    """

    place: Tensor
    mean: Tensor
    moves: Tensor
    notes: Tensor

    def __init__(self, heads: int, head_dim: int, whiten: bool, past: bool) -> None:
        super().__init__()
        self.past = past

        def zeros(*shape: int) -> Tensor:  # float32 whatever torch's default: means move slowly
            return torch.zeros(shape, dtype=torch.float32)

        self.register_buffer("place", zeros(heads, head_dim))
        self.register_buffer("mean", zeros(heads, head_dim))
        self.register_buffer("moves", zeros())
        self.register_buffer("notes", zeros(heads))  # batches in `mean` and `scatter`
        self.spread: Tensor | None
        self.scatter: Tensor | None
        square = (heads, head_dim, head_dim)
        self.register_buffer("spread", zeros(*square) if whiten else None)
        self.register_buffer("scatter", zeros(*square) if whiten else None)

    @torch.no_grad()
    def note(self, given: Tensor, place: Tensor) -> None:
        """Take mean and covariance of a batch into those of all since the last move.

        Each counts alike, so that a layer whose forward is computed twice (checkpointing) learns
        the same. Of those sequences of each head that are finite: one NaN would stay in the buffers
        for good. `place` is what rows were hashed about.
        """
        with without_autocast(given.device):
            x = given.detach().float()
            sums = x.sum(2, keepdim=True)
            known = sums.isfinite().all(-1, keepdim=True)
            number = x.shape[2] * known.sum(0)
            mean = sums.where(known, 0.0).sum(0) / number
            share = 1 / (self.notes + 1)
            self.notes += number[:, 0, 0] > 0  # a head with no finite sequence learns nothing
            self._store(self.mean, mean[:, 0], share[:, None])
            if self.scatter is None:
                return
            # with `past` what is left is what must spread, its mean as well
            rows = less_past(given, place) if self.past else x - mean
            self._store(
                self.scatter, second_moments(rows.where(known, 0.0)) / number, share[:, None, None]
            )

    @staticmethod
    def _store(buffer: Tensor, found: Tensor, share: Tensor) -> None:
        """Go to what was found by `share`, but not to infinities of the buffer's type and NaN.

        NaN is 0 / 0, where there was no finite sequence.
        """
        found = found.to(buffer.dtype)
        found = found.where(found.isfinite(), buffer)
        buffer.copy_(torch.lerp(buffer, found, share.to(buffer.dtype)))

    @torch.no_grad()
    def move(self, share: float) -> None:
        """Go towards what was noted since the last move, or before it if nothing was."""
        self.moves += 1
        self.notes.zero_()
        step = (1 / self.moves).clamp(min=share)
        self.place += (self.mean - self.place) * (1.0 if self.past else step)
        if self.spread is not None and self.scatter is not None:
            self.spread += (self.scatter - self.spread) * step
