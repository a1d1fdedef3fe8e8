"""The directions of an angular hash as a module's buffer, so that a checkpoint holds them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from scfa_core.hashing import angular_hash, random_directions


class AngularHash(nn.Module):
    """Bucket of each row by ``argmax [xR, -xR]``; see `scfa_core.hashing.angular_hash`.

    Parameters
    ----------
    heads : int
        Heads with directions of their own; with grouped queries heads_kv.
    head_dim : int
    buckets : int
        Even, at least 2.
    rounds : int
        Independent hashes.
    seed : int, optional
        Of the directions. By default drawn from torch's generator, so `torch.manual_seed` rules.
    redraw : bool
        Draw directions anew at every call, as the paper's language models do, by torch's generator
        on the input's device. Nothing is stored then.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        buckets: int,
        *,
        rounds: int = 1,
        seed: int | None = None,
        redraw: bool = False,
    ) -> None:
        super().__init__()
        self.buckets = buckets
        self.rounds = rounds
        self.redraw = redraw
        self._shape = (rounds, heads, head_dim, buckets // 2)
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        drawn = random_directions(heads, head_dim, buckets, rounds=rounds, seed=seed)
        self.directions: Tensor | None
        self.register_buffer("directions", None if redraw else torch.from_numpy(drawn))

    def forward(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Hash tensors (batch, heads, seqlen, head_dim), all by the same directions.

        Returns
        -------
        buckets : tuple of int32 Tensors, each (rounds, batch, heads, seqlen)
        """
        directions = self.directions
        if directions is None:
            directions = normalize(torch.randn(self._shape, device=rows[0].device), dim=2)
        return tuple(angular_hash(x, directions) for x in rows)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        rounds, heads, head_dim, _ = self._shape
        return (
            f"heads={heads}, head_dim={head_dim}, buckets={self.buckets}, rounds={rounds}, "
            f"redraw={self.redraw}"
        )
