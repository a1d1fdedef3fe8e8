"""The directions of an angular hash as a module's buffer, so that a checkpoint holds them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from scfa_core.errors import PatternError
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
    center : bool
        Hash queries and keys each about their mean, see `scfa_core.hashing.angular_hash`: in deep
        layers this is what spreads rows over the buckets. The means are those of earlier steps, so
        that no bucket depends on a later row: call `move_centers` after each step of the optimiser.
    query_heads : int, optional
        With `center` and grouped queries, how many heads the queries have.
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
        center: bool = False,
        query_heads: int | None = None,
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
        heads_q = heads if query_heads is None else query_heads
        self.centers = nn.ModuleList(
            _Center(size, head_dim) for size in ((heads_q, heads) if center else ())
        )

    def forward(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Hash tensors (batch, heads, seqlen, head_dim), all by the same directions.

        Returns
        -------
        buckets : tuple of int32 Tensors, each (rounds, batch, heads, seqlen)
        """
        directions = self.directions
        if directions is None:
            directions = normalize(torch.randn(self._shape, device=rows[0].device), dim=2)
        if not self.centers:
            return tuple(angular_hash(x, directions) for x in rows)
        if len(rows) > len(self.centers):
            raise PatternError(f"a centered hash takes queries and keys, got {len(rows)} tensors")
        pairs = list(zip(rows, self.centers, strict=False))
        if self.training:
            for x, center in pairs:
                center.note(x)
        return tuple(angular_hash(x, directions, center.place) for x, center in pairs)

    def move_centers(self, share: float = 0.1) -> None:
        """Move each center by `share` of its way to the mean of the last training batch.

        The first moves go further, so that a center is soon a mean of the batches so far.

        Raises
        ------
        PatternError
            The hash was made without ``center=True``.
        """
        if not self.centers:
            raise PatternError("move_centers needs AngularHash(..., center=True)")
        for center in self.centers:
            center.move(share)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        rounds, heads, head_dim, _ = self._shape
        return (
            f"heads={heads}, head_dim={head_dim}, buckets={self.buckets}, rounds={rounds}, "
            f"redraw={self.redraw}, center={len(self.centers) > 0}"
        )


class _Center(nn.Module):
    """Running mean of the rows of each head."""

    place: Tensor
    mean: Tensor
    moves: Tensor

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(heads, head_dim))
        self.register_buffer("mean", torch.zeros(heads, head_dim))
        self.register_buffer("moves", torch.zeros(()))

    @torch.no_grad()
    def note(self, x: Tensor) -> None:
        """Store the mean of a batch; not added up, so that a layer may be recomputed."""
        self.mean.copy_(x.float().mean((0, 2)))

    @torch.no_grad()
    def move(self, share: float) -> None:
        """Go towards the mean last stored."""
        self.moves += 1
        self.place += (self.mean - self.place) * (1 / self.moves).clamp(min=share)
