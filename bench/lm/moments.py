"""What hashes learn of their rows: mean and second moments of the last batch, of all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.lm.config import Config
from scfa_core.hashing_checks import CENTER_ROWS
from scfa_core.nn.centers import second_moments

SAMPLED = 2048  # about so many queries of a head count

# Sampled rows (batch, heads, rows, head_dim) of one layer, and what those of a sequence were
# hashed about: (batch, heads, blocks of CENTER_ROWS, head_dim), or None.
Seen = tuple[Tensor, "Tensor | None"]


def sample_every(batch: int, seqlen: int) -> int:
    """Of how many queries one is sampled."""
    return max(batch * seqlen // SAMPLED, 1)


class Moments(nn.Module):
    """Overwritten by every batch, not added up, so that a batch may be computed twice.

    All layers at once: a layer's own are eight kernels of some 2 us each.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = config.layers
        shape = (config.layers, config.sides * config.hashed_heads, config.head_dim)
        self.mean: Tensor
        self.square: Tensor
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("square", torch.zeros(*shape, config.head_dim))

    def forward(self, rows: Tensor, about: Tensor | None, each: int) -> None:
        """Store moments of rows (layers * batch, heads, rows, head_dim), one row in `each`.

        Of those sequences of each head that are finite: one NaN would stay for good.
        """
        with torch.autocast(rows.device.type, enabled=False):
            apart = rows
            if about is not None:
                own = torch.arange(rows.shape[2], device=rows.device) * each // CENTER_ROWS
                apart = (rows.float() - about[:, :, own]).to(rows.dtype)
            by_layer = (self.layers, -1, rows.shape[1])
            sums = rows.sum(2, dtype=torch.float32).unflatten(0, by_layer[:2])
            squares = second_moments(apart.flatten(0, 1)[None]).unflatten(0, by_layer)
            # No product's sum is beyond those of the two squares.
            of_squares = squares.diagonal(dim1=-2, dim2=-1)
            known = (sums.isfinite() & of_squares.isfinite()).all(-1, keepdim=True)
            number = rows.shape[2] * known.sum(1)
            mean = sums.where(known, 0.0).sum(1) / number
            square = squares.where(known[..., None], 0.0).sum(1) / number[..., None]
            for buffer, found in ((self.mean, mean), (self.square, square)):
                buffer.copy_(found.where(found.isfinite(), buffer))  # NaN is 0 / 0: none is finite


def gather(seen: Sequence[Seen]) -> tuple[Tensor, Tensor | None]:
    """What all layers saw, along the first axis."""
    about = [center for _, center in seen if center is not None]
    return torch.cat([rows for rows, _ in seen]), torch.cat(about) if about else None
