"""Self-attention within the buckets of a hash, with heads that see their neighbours beside it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from scfa_core.errors import OptionError, PatternError
from scfa_core.hashing import check_rounds, disjoint_rounds
from scfa_core.nn.attention import SparseSelfAttention
from scfa_core.nn.hashing import AngularHash
from scfa_core.nn.near import with_near_heads
from scfa_core.patterns import HashSparse, Pattern
from scfa_core.problem import as_size


class HashSelfAttention(SparseSelfAttention):
    """Every row sees the earlier rows whose key shares a bucket with its query, in any round.

    The layer of the paper is ``shared_qk=True, include_self=False, redraw=True``.

    Parameters
    ----------
    width, heads : int
    buckets : int
        Even. More buckets are sparser: visible pairs fall about as ``rounds / buckets``.
    rounds : int
        Independent hashes; the union of what they see, each pair once. 2 or 3 at most: see
        `scfa_core.hashing.disjoint_rounds`.
    seed, redraw, center, adapt, momentum
        As for `AngularHash`. With ``adapt="center"`` (or `center`), ``"whiten"``, ``"past"`` or
        ``"even"`` buckets are more even and attention cheaper; call `scfa_core.nn.move_centers` of
        the model after each step.
    near_heads : int
        Of the key heads, the last so many do not hash: a row there sees the earlier rows of the
        block of `near_block` rows that it lies in, and each head's blocks begin elsewhere. A hash
        alone leaves out the neighbours, which language models need, in most heads to begin with
        (`docs/guides/torch.md`); blocks are groups like buckets, so that one call serves all.
    near_block : int
        Rows of such a block.
    **options
        As for `SparseSelfAttention`.

    Raises
    ------
    PatternError
        As `AngularHash`; near heads with several rounds, more of them than leave a head to hash,
        blocks of no rows.
    ShapeError, OptionError
        As `SparseSelfAttention`; in a call, near heads of DTensors, whose heads may be elsewhere.
    """

    _takes_pattern = False

    def __init__(
        self,
        width: int,
        heads: int,
        buckets: int,
        *,
        rounds: int = 1,
        seed: int | None = None,
        redraw: bool = False,
        center: bool = False,
        adapt: str = "none",
        momentum: float = 0.1,
        near_heads: int = 0,
        near_block: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(width, heads, **options)
        self.near_heads = as_size("near_heads", near_heads, 0, PatternError)
        self.near_block = as_size("near_block", near_block, 1, PatternError)
        if self.near_heads >= self.heads_kv:
            raise PatternError(
                f"near_heads must leave a key head to hash, got {near_heads=} of {self.heads_kv}; "
                "WindowSelfAttention sees neighbours in all"
            )
        if self.near_heads and rounds != 1:
            raise PatternError(f"near_heads go with one round of hashing, got {rounds=}")
        hashed = self.heads_kv - self.near_heads
        self.hash = AngularHash(
            hashed,
            self.head_dim,
            buckets,
            rounds=rounds,
            seed=seed,
            redraw=redraw,
            center=center,
            query_heads=hashed * (self.heads // self.heads_kv),
            adapt=adapt,
            momentum=momentum,
        )
        check_rounds(rounds, buckets)

    def make_patterns(self, q: Tensor, k: Tensor) -> list[Pattern]:
        """One hash pattern per round and way of differing from the earlier ones.

        Fewer queries than keys are the last rows of the sequence, as beside a cache; then
        `scfa_core.decoding.at_end` of each pattern says so of its interval.
        """
        each = self.heads // self.heads_kv
        before = k.shape[2] - q.shape[2]  # rows of the cache
        if before:
            self._check_cached()
        if self.near_heads:
            if hasattr(q, "device_mesh"):
                raise OptionError(
                    "near_heads of DTensors are not served: heads may lie on several ranks; split "
                    "the batch or the rows, or take near_heads=0"
                )
            q, k = q[:, : -self.near_heads * each], k[:, : -self.near_heads]
        # A normalised query has its query's bucket, but for rounding.
        found = self.hash(q) if self.shared_qk and not before else self.hash(q, k)
        if not self.near_heads:
            sizes = {"include_self": self.include_self}
            return list(disjoint_rounds(found[0], found[-1], self.hash.buckets, **sizes))
        near = self.near_heads, self.near_block
        q_group = with_near_heads(found[0][0], *near, each, before)
        k_group = q_group if len(found) == 1 else with_near_heads(found[1][0], *near)
        return [HashSparse(q_group, k_group, include_self=self.include_self)]

    def _check_cached(self) -> None:
        """Refuse fewer queries than keys where their buckets hang on rows that are not there."""
        adapt = self.hash.adapt
        if adapt in ("past", "even"):
            raise PatternError(
                f"with adapt={adapt!r} buckets of queries hang on all earlier queries: give whole "
                "sequences; adapt='center' or 'whiten' serves a cache"
            )
        if self.shared_qk and adapt != "none":
            raise PatternError(
                f"with shared_qk and adapt={adapt!r} buckets of keys are those of their queries, "
                "not of normalised ones: give whole sequences, or keep buckets in the cache"
            )

    def extra_repr(self) -> str:
        """Sizes and choices, for printing."""
        text = super().extra_repr()
        if self.near_heads:
            text += f", near_heads={self.near_heads}, near_block={self.near_block}"
        return text
