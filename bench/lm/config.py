"""One dataclass that fixes a run: model, attention, data, schedule; part of every checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes.

    `attention` is ``dense``, ``hash<buckets>``, ``drop<percent>``, ``window<keys>``,
    ``hash<buckets>+window<keys>`` (keys of the same bucket and the last so many; ``drop`` as well),
    ``chosen<rows>x<top>`` (the own block of so many rows, and the blocks before it that a query
    scores highest), ``naive``, ``reformer<buckets>`` or ``none``: q + k + v, the bound on speed.
    After a comma,
    ``window<keys>x<heads>``, the last so many heads see a window instead, as in
    ``hash16r,window128x4``; or ``blocks<keys>x<heads>``, earlier rows of the block of so many that
    a row lies in, each head's blocks beginning elsewhere: groups like a hash's, in the same call.
    ``hash<buckets>c`` hashes queries about their mean of earlier steps, and ``hash<buckets>w``
    divides by their covariance as well, so that buckets become even; ``hash<buckets>r`` subtracts
    the running mean of the sequence's earlier rows, which does not lag behind moving weights, and
    ``hash<buckets>e`` gives less to buckets that these rows filled, besides.

    `compile` is ``blocks`` (embedding, one block, loss: each compiled once and used by all layers),
    ``model`` (one graph of everything, several times slower to compile) or ``none``.

    The learning rate warms up over `warmup` steps. Then ``cosine`` falls to a tenth and
    ``trapezoid`` stays until the last fifth, where it falls linearly to a tenth: two runs of
    different length are then comparable step by step before that. The end is `steps`, or
    `seconds` of training (0: no limit), whichever share is further.

    `graph` replays each training step as one CUDA graph, on one GPU: the host enqueues little.
    """

    attention: str = "hash16"
    seqlen: int = 8192
    tokens_per_step: int = 32768  # over all processes and accumulation steps
    micro_batch: int = 1  # sequences in one forward pass of one process
    layers: int = 12
    heads: int = 12
    head_dim: int = 64
    vocabulary: int = 50304
    softmax_scale: float | None = None  # 1 / sqrt(head_dim) by default, though keys have length 1
    # or "rotary-first": queries and keys turned by their places, then hashed; "rotary": after
    positions: str = "learned"
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup: int = 100
    steps: int = 1000
    seconds: float = 0.0
    grad_clip: float = 1.0
    seed: int = 0
    compile: str = "blocks"
    graph: bool = False
    packed: bool = False  # documents of a sequence do not see each other
    backend: str | None = None

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.heads * self.head_dim

    @property
    def near(self) -> tuple[str, int]:
        """What the last heads see ("window128", "blocks256"), and how many heads those are."""
        main, comma, last = self.attention.partition(",")
        if not comma:
            return "", 0
        match = re.fullmatch(r"(window0*[1-9]\d*o?|blocks0*[1-9]\d*)x(\d+)", last)
        if match is None or not 0 < int(match[2]) < self.heads:
            raise SystemExit(
                "after a comma comes what the last heads see, such as hash16,window128x4 or "
                f"hash16,blocks256x4 of {self.heads} heads, got {self.attention!r}"
            )
        if match[1].startswith("blocks") and re.fullmatch(r"hash\d+[cwre]?k?", main) is None:
            raise SystemExit(
                f"blocks are groups beside those of a hash, such as hash16,blocks256x4, got "
                f"{self.attention!r}"
            )
        return match[1], int(match[2])

    @property
    def hashed_heads(self) -> int:
        """Heads that see what stands before a comma."""
        return self.heads - self.near[1]

    @property
    def main(self) -> str:
        """The attention of all heads, or of all but the last."""
        return self.attention.partition(",")[0].removesuffix("k")

    @property
    def own_keys(self) -> bool:
        """Whether keys are projected, not the normalised queries: variants that end with "k"."""
        if not self.attention.partition(",")[0].endswith("k"):
            return False
        hashed = r"hash\d+[re]?k(,(blocks|window)\d+x\d+)?"
        others = r"densek|chosen\d+x\d+k|(window|blocks|drop)\d+k"
        if re.fullmatch(rf"{others}|{hashed}", self.attention) is None:
            raise SystemExit(
                "keys of their own are for densek, window128k, blocks256k, chosen256x3k, drop50k, "
                f"hash16k, hash16ek,blocks256x4 and hash16ek,window128x4; got {self.attention!r}"
            )
        return True

    @property
    def sides(self) -> int:
        """How much of a head is hashed: its queries, or its queries and its keys, each apart."""
        return 2 if self.own_keys and self.buckets else 1

    @property
    def scale(self) -> float | None:
        """Factor of the scores: `softmax_scale` is for keys of length 1, others take None."""
        return None if self.own_keys else self.softmax_scale

    @property
    def buckets(self) -> int:
        """Buckets of a hash variant, 0 for others."""
        first = self.main.partition("+")[0]
        if not first.startswith("hash"):
            return 0
        count = int(first.removeprefix("hash").rstrip("cwre"))
        if count < 2 or count % 2:
            raise ValueError(f"buckets must be even and at least 2, got {count}")
        return count

    @property
    def adapts(self) -> str:
        """How a hash follows the queries.

        "c" their mean of earlier steps, "w" their covariance too, "r" that covariance about the
        mean of a sequence's earlier rows, "e" how full these left each bucket too, "" not.
        """
        first = self.main.partition("+")[0]
        return first[-1] if first.startswith("hash") and first[-1] in "cwre" else ""

    @property
    def follows_past(self) -> bool:
        """Whether a hash knows the earlier rows of its sequence."""
        return self.adapts in ("r", "e")

    def accumulation(self, processes: int) -> int:
        """Forward passes of one process per step."""
        each = self.micro_batch * self.seqlen * processes
        if self.tokens_per_step % each:
            raise SystemExit(
                f"tokens_per_step={self.tokens_per_step} must be a multiple of micro_batch * "
                f"seqlen * processes = {each}"
            )
        return self.tokens_per_step // each

    def fingerprint(self) -> str:
        """Short name of this exact configuration."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


PRESETS = {
    "paper": Config(),
    "small": Config(
        layers=8, heads=8, vocabulary=256, micro_batch=4, schedule="trapezoid", steps=10**6,
        softmax_scale=1.0, positions="rotary-first",
    ),
    "tiny": Config(
        layers=2, heads=2, head_dim=32, vocabulary=256, seqlen=512, tokens_per_step=1024, steps=40,
        micro_batch=2, warmup=5, compile="none",
    ),
    "digits": Config(
        layers=6, heads=4, vocabulary=18, seqlen=1024, tokens_per_step=16384,
        schedule="trapezoid", warmup=50, steps=10**6,
    ),
}  # fmt: skip
