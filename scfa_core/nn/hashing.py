"""The directions of an angular hash, and what it knows of its rows, as buffers of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from scfa_core.errors import PatternError, ShapeError
from scfa_core.hashing import angular_hash, random_directions
from scfa_core.hashing_checks import check_buckets, check_real
from scfa_core.nn.centers import Center, without_autocast
from scfa_core.nn.past import past_hash
from scfa_core.problem import as_size, check_flag, check_share
from scfa_core.torch_checks import check_tensor

ADAPTS = ("none", "center", "whiten", "past", "even")
_RIDGE = 0.01  # of the mean variance, added to every variance: no axis is stretched beyond tenfold
_TINY = 1e-20


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
        Of the directions, unless they are redrawn. By default drawn from torch's generator, so
        `torch.manual_seed` rules.
    redraw : bool
        Draw directions anew at every call, as the paper's language models do, by torch's generator
        on the input's device. Nothing is stored then. Of DTensors, the first rank draws for all.
    center : bool
        The same as ``adapt="center"``.
    query_heads : int, optional
        With `adapt` and grouped queries, how many heads the queries have.
    adapt : "none" | "center" | "whiten" | "past" | "even"
        What is done about rows that have much in common, as in deep layers, where few buckets would
        hold most of them. ``"center"`` hashes queries and keys each about their mean. ``"whiten"``
        also divides both by one root of their common covariance, in each head of the directions, so
        that no axis of much variance decides alone. ``"past"`` takes instead of their mean of
        earlier batches that of the earlier rows of the same sequence, and whitens what is left: in
        training the mean moves from step to step by a good part of the rows' spread, so that the
        others come late and buckets crowd all the same. ``"even"`` gives less to buckets that the
        earlier rows of the sequence filled, besides. Call `move_centers` after each step of the
        optimiser.
    momentum : float
        Share of the way to the last step's batches that `move_centers` goes by default.

    Raises
    ------
    PatternError
        An unknown `adapt`, or `center` with another one; a seed with `redraw`; see
        `random_directions` for the rest. In a call: no tensor, or more than an adapting hash knows.
    ShapeError
        In a call: rows of other heads or another head_dim than an adapting hash was made for.

    Notes
    -----
    Causality. The bucket of a row is a function of that row, of the directions and of buffers that
    no forward pass reads from its own batch: what a pass notes is used from the next `move_centers`
    on. So no bucket depends on a later row of its sequence, in training as in evaluation, and a
    sequence gets the same buckets in one call as row by row. Moving within a step, by statistics of
    the batch at hand, would break that. With ``"past"`` and ``"even"`` a bucket depends on earlier
    rows of its sequence as well: give whole sequences from their first row on, not parts or single
    rows. Padding and other documents before a row count among them.

    NaN and infinities. Such a row gets some valid bucket, and no other row another one, but that
    with ``"past"`` its block of 64 rows counts for nothing in the mean of later rows (with
    ``"even"`` the row still fills its bucket). A sequence
    that holds one is not noted in that head: a NaN would stay in the buffers for good.

    Buffers are part of ``state_dict``: directions unless `redraw`; with ``"center"`` two means of
    head_dim per head of the queries, and of the keys; for what whitens two matrices of head_dim
    squared more for each, and one for the directions. Under
    DistributedDataParallel each process notes its own share of the batch, and the first one's
    buffers go to all.
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
        adapt: str = "none",
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        check_flag("center", center)
        if adapt not in ADAPTS or (center and adapt not in ("none", "center")):
            raise PatternError(
                f"adapt must be one of {ADAPTS}, and center=True means 'center', got {adapt=}, "
                f"{center=}"
            )
        check_flag("redraw", redraw)
        if redraw and seed is not None:
            raise PatternError(
                f"redraw=True draws from torch's generator at every call, and {seed=} would say "
                "nothing: leave it out, and seed torch"
            )
        check_share("momentum", momentum)
        check_buckets(buckets)
        self.adapt = "center" if center else adapt
        self.momentum = momentum
        self.buckets = buckets
        self.rounds = rounds
        self.redraw = redraw
        self._shape = (rounds, heads, head_dim, buckets // 2)
        self.seed = seed
        # torch.tensor, unlike from_numpy, minds `with torch.device(...)`, where a model is made.
        drawn = torch.tensor(self._drawn())
        self.directions: Tensor | None
        self.register_buffer("directions", None if redraw else drawn)
        heads_q = heads
        if query_heads is not None:
            heads_q = as_size("query_heads", query_heads, 1, PatternError)
            if heads_q % heads:
                raise PatternError(f"{query_heads=} must be a multiple of {heads=}")
        past = self.adapt in ("past", "even")
        whiten = past or self.adapt == "whiten"
        self.centers = nn.ModuleList(
            Center(size, head_dim, whiten, past)
            for size in (() if self.adapt == "none" else (heads_q, heads))
        )
        self.turn: Tensor | None
        none_turned = torch.eye(head_dim, dtype=torch.float32).repeat(heads, 1, 1)
        self.register_buffer("turn", none_turned if whiten else None)

    def _drawn(self) -> Any:
        """Directions as NumPy draws them, of `seed` or of a lot of torch's."""
        rounds, heads, head_dim, half = self._shape
        seed = self.seed
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        return random_directions(heads, head_dim, 2 * half, rounds=rounds, seed=seed)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the directions (those of `seed`, if given) and forget every batch.

        For a module that was made on "meta" and got its memory by ``to_empty``. Without a seed each
        process draws its own: give one, or seed torch alike on all ranks.
        """
        if self.directions is not None:
            _local(self.directions).copy_(torch.from_numpy(self._drawn()))
        for buffer in self.centers.buffers():
            _local(buffer).zero_()
        if self.turn is not None:
            _local(self.turn).copy_(torch.eye(self._shape[2], device="cpu"))

    def forward(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Hash tensors (batch, heads, seqlen, head_dim), all by the same directions.

        Returns
        -------
        buckets : tuple of int32 Tensors, each (rounds, batch, heads, seqlen)
        """
        if not rows:
            raise PatternError(
                "AngularHash hashes one tensor or more, got none; pass q, or q and k"
            )
        for x in rows:
            check_tensor("each tensor to hash", x, "batch", "heads", "seqlen", "head_dim")
            check_real(**{"each tensor to hash": x})
        directions = self.directions
        if directions is None:
            drawn = torch.randn(self._shape, dtype=torch.float32, device=rows[0].device)
            directions = normalize(drawn, dim=2)
            if hasattr(rows[0], "device_mesh"):
                directions = _same_on_all_ranks(directions, rows[0].device_mesh)
        if not self.centers:
            return tuple(angular_hash(x, directions) for x in rows)
        if self.turn is not None:  # rows times a root of the inverse: the directions take it
            with torch.no_grad(), without_autocast(directions.device):
                directions = self.turn.float() @ directions.float()
        if len(rows) > len(self.centers):
            raise PatternError(f"an adapting hash takes queries and keys, got {len(rows)} tensors")
        pairs = list(zip(rows, list(self.centers)[: len(rows)], strict=True))
        for x, center in pairs:
            if (x.shape[1], x.shape[3]) != center.place.shape:
                raise ShapeError(
                    f"an adapting hash of {tuple(center.place.shape)} (heads, head_dim) got rows "
                    f"(batch, heads, seqlen, head_dim) of {tuple(x.shape)}; make it with "
                    "query_heads where the queries have more heads than the keys"
                )
        found = []
        for x, center in pairs:
            place = center.place
            if center.past:
                bucket, place = past_hash(x, directions, place, self.adapt == "even")
            else:
                bucket = angular_hash(x, directions, place)
            found.append(bucket)
            if self.training:
                center.note(x, place)
        return tuple(found)

    @torch.no_grad()
    def move_centers(self, share: float | None = None) -> None:
        """Move what is known by `share` (`momentum`) of its way to the batches since the last move.

        Of several, as where gradients are accumulated, their mean counts. The first moves go
        further, so that soon it is a mean of all so far. With ``adapt="whiten"`` covariances move
        as well, and are taken to pieces anew; with ``"past"`` and ``"even"`` covariances alone, and
        the mean is that of the batches since the last move.

        Raises
        ------
        PatternError
            The hash was made with ``adapt="none"``, or a share that is no number from 0 to 1.
        """
        share = self.momentum if share is None else check_share("share", share)
        if not self.centers:
            raise PatternError(
                "move_centers needs AngularHash(..., center=True) or adapt='center', 'whiten', "
                "'past' or 'even'"
            )
        for center in self.centers:
            center.move(share)
        if self.turn is not None:
            _local(self.turn).copy_(self._turn())

    def _turn(self) -> Tensor:
        """Inverse root of the covariance that queries and keys have in common, per head.

        Each side counts by its form, not its size; a side that never came counts nothing. Query
        heads that share directions share a covariance.
        """
        heads, head_dim = self._shape[1], self._shape[2]
        one = torch.eye(head_dim, device=self.centers[0].place.device)
        common = torch.zeros_like(one).expand(heads, -1, -1)
        for center in self.centers:
            common = common + _scaled(_local(center.spread)).unflatten(0, (heads, -1)).mean(1)
        common = _scaled(common)
        known = common.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] > 0
        common = torch.where(known, common, one)
        root, _ = torch.linalg.cholesky_ex(common + _RIDGE * one)
        inverse = torch.linalg.solve_triangular(root, one.expand_as(root), upper=False)
        return inverse.transpose(-1, -2)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        rounds, heads, head_dim, _ = self._shape
        return (
            f"heads={heads}, head_dim={head_dim}, buckets={self.buckets}, rounds={rounds}, "
            f"redraw={self.redraw}, adapt={self.adapt!r}"
        )


def move_centers(model: nn.Module, share: float | None = None) -> int:
    """Call `AngularHash.move_centers` of every adapting hash of a model; after each optimiser step.

    Parameters
    ----------
    model : torch.nn.Module
        Compiled and wrapped ones too; a hash that several layers share moves once.
    share : float, optional
        As of `AngularHash.move_centers`.

    Returns
    -------
    moved : int
        How many hashes adapt.

    Raises
    ------
    PatternError
        There is none, or a share that is no number from 0 to 1.

    >>> from scfa_core.nn import HashSelfAttention, move_centers
    >>> layers = [HashSelfAttention(64, heads=2, buckets=8, adapt="even") for _ in range(3)]
    >>> move_centers(torch.nn.Sequential(*layers))
    3
    """
    if not isinstance(model, nn.Module):
        raise PatternError(
            f"move_centers takes a module, got {type(model).__name__}; nn.ModuleList(layers) makes "
            "one of a list"
        )
    hashes = [part for part in model.modules() if isinstance(part, AngularHash) and part.centers]
    if not hashes:
        raise PatternError(
            f"move_centers found no adapting hash in {type(model).__name__}: make its layers with "
            "adapt='center', 'whiten', 'past' or 'even', or leave this call out"
        )
    for part in hashes:
        part.move_centers(share)
    return len(hashes)


def _same_on_all_ranks(x: Tensor, mesh: Any) -> Tensor:
    """What the first rank drew, as a replicated DTensor."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    spread: Tensor = distribute_tensor(x, mesh, [Replicate()] * mesh.ndim)
    return spread


def _local(x: Tensor) -> Tensor:
    """What a replicated DTensor holds, so that every rank takes the same covariances to pieces."""
    held: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return held


def _scaled(spread: Tensor) -> Tensor:
    """Covariances (heads, head_dim, head_dim) with a mean variance of 1, or 0 where all is 0."""
    size = spread.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return spread / size.clamp(min=_TINY)
