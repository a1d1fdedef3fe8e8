"""The paper's decoder, with one place where variants differ: `attend(q, v) -> out`.

Keys are the normalised queries, as in the paper's language model, so that query and key of a token
share their bucket; a token does not attend to itself in hash mode, since its own key is the nearest
of all. Dense, dropped and window variants use the same projections; those that end with "o" hide a
row from itself as well, those that end with "k" project their keys, as models without a hash do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.lm.attend import attend_for
from bench.lm.config import Config
from bench.lm.data import document_ids
from bench.lm.moments import Moments, Seen, gather, sample_every
from scfa_core.hashing import angular_hash
from scfa_core.nn.past import past_hash

ROTARY_BASE = 10000.0
RIDGE = 0.01  # of the mean variance, added to all before dividing by the covariance


class Rotary(nn.Module):
    """Turn pairs of channels (batch, heads, seqlen, head_dim) by angles that grow with the row.

    Rotary embedding (Su et al. 2021, arXiv 2104.09864): scores then depend on distances. Angles are
    found once, for `rows`: in a compiled call a power, a sine and a cosine would be found for every
    element of every tensor that is turned.
    """

    def __init__(self, rows: int, head_dim: int) -> None:
        super().__init__()
        self.table: Tensor
        rates = ROTARY_BASE ** -(torch.arange(head_dim // 2) / (head_dim // 2))
        angles = torch.arange(rows)[:, None] * rates
        table = torch.stack((angles.cos(), angles.sin()))
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of x's shape and dtype."""
        cos, sin = self.table[:, : x.shape[-2]].unbind()
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def rotary(config: Config) -> Rotary | None:
    """What turns queries and keys, if positions are not learned."""
    return None if config.positions == "learned" else Rotary(config.seqlen, config.head_dim)


def cost_of(bucket: Tensor, buckets: int, sides: int = 1) -> float:
    """Same-bucket pairs over those of even buckets, averaged over all but the last axis.

    (batch, heads, seqlen); of two `sides` the second half of the heads is of the keys.
    """
    share = functional.one_hot(bucket.long(), buckets).sum(-2).double() / bucket.shape[-1]
    halves = share.chunk(sides, dim=1)
    return float((halves[0] * halves[-1]).sum(-1).mean()) * buckets


class Mix(nn.Module):
    """Queries and values projected, keys the normalised queries, attention, output projected.

    With `Config.own_keys` keys are projected too.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.hashed_heads = config.heads, config.hashed_heads
        self.adapts, self.follows_past = config.adapts, config.follows_past
        self.sides = config.sides
        self.attend = attend_for(config)
        self.rotary, self.hashes_turned = rotary(config), config.positions == "rotary-first"
        self.projected = 3 if config.own_keys else 2
        self.query_value = nn.Linear(config.width, self.projected * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (batch, heads, seqlen, head_dim)."""
        batch, seqlen, _ = x.shape
        mixed = self.query_value(x).view(batch, seqlen, self.projected, self.heads, -1)
        q, v, *own = mixed.permute(2, 0, 3, 1, 4)
        return q, own[0] if own else functional.normalize(q, dim=-1).to(q.dtype), v

    def forward(
        self,
        x: Tensor,
        directions: Tensor | None,
        center: Tensor | None,
        documents: Tensor | None,
    ) -> tuple[Tensor, Seen | None]:
        """(batch, seqlen, width) to the same, and a sample of what an adapting hash was given."""
        q, k, v = self.project(x)
        turned = self.turn(q, k)
        hashed = self.rows_to_hash((q, k), turned)
        sample = hashed[:, :, :: sample_every(q.shape[0], q.shape[2])]
        if directions is not None and (self.follows_past or self.sides == 2):
            hashed, center = self.buckets(hashed, directions, center)
            directions = None
        out = self.attend(*turned, v, hashed, directions, center, documents)
        mixed_back: Tensor = self.output(out.transpose(1, 2).flatten(2))
        if not self.adapts:
            return mixed_back, None
        # A copy: what shares memory with q would be given a gradient, of zeros, by torch.compile.
        sample = sample.clone(memory_format=torch.contiguous_format)
        return mixed_back, (sample, center if self.follows_past else None)

    def turn(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys at their places."""
        return (q, k) if self.rotary is None else (self.rotary(q), self.rotary(k))

    def rows_to_hash(self, plain: tuple[Tensor, Tensor], turned: tuple[Tensor, Tensor]) -> Tensor:
        """Queries of the heads that hash; keys of their own behind them, as further heads."""
        chosen = turned if self.hashes_turned else plain
        rows = [x.detach()[:, : self.hashed_heads] for x in chosen[: self.sides]]
        return torch.cat(rows, dim=1) if self.sides == 2 else rows[0]

    def buckets(
        self, rows: Tensor, directions: Tensor, center: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Buckets of `rows_to_hash` (batch, heads, seqlen), and what they were hashed about."""
        if self.sides == 2:  # queries and keys meet by the same directions
            directions = torch.cat((directions, directions), dim=1)
        if center is None or not self.follows_past:
            return angular_hash(rows, directions, center)[0], center
        bucket, about = past_hash(rows, directions, center, self.adapts == "e")
        return bucket[0], about


def _reformer(config: Config) -> nn.Module:
    """The chunked baseline, e.g. ``reformer16`` for 16 buckets, chunks of two mean buckets."""
    from scfa_core.nn import ReformerAttention

    if config.main != config.attention:
        raise SystemExit(f"the Reformer attends in all heads, got {config.attention!r}")
    if config.packed:
        raise SystemExit("packed=True is served by this package's attention, not the Reformer's")
    buckets = int(config.attention.removeprefix("reformer") or 16)
    chunk = max(2 * config.seqlen // buckets, 1)
    return ReformerAttention(
        config.width,
        config.heads,
        buckets=buckets,
        chunk=chunk,
        rounds=1,
        redraw=True,
        softmax_scale=config.softmax_scale,
        rotary=rotary(config),
    )


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to the stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.mix = _reformer(config) if config.attention.startswith("reformer") else Mix(config)
        self.norm_feed = nn.LayerNorm(width, bias=False)
        self.widen = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        directions: Tensor | None,
        center: Tensor | None,
        documents: Tensor | None,
    ) -> tuple[Tensor, Seen | None]:
        """(batch, seqlen, width) to the same, and what `Mix` tells of it."""
        mixed, seen = self.norm_attention(x), None
        if isinstance(self.mix, Mix):
            mixed, seen = self.mix(mixed, directions, center, documents)
        else:
            mixed = self.mix(mixed)
        x = x + mixed
        return x + self.narrow(functional.gelu(self.widen(self.norm_feed(x)))), seen


class Embed(nn.Module):
    """Tokens and their places to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.width)
        if config.positions not in ("learned", "rotary", "rotary-first"):
            raise SystemExit(
                f"positions must be 'learned', 'rotary' or 'rotary-first', got {config.positions!r}"
            )
        learned = config.positions == "learned"
        self.position = nn.Embedding(config.seqlen, config.width) if learned else None

    def forward(self, text: Tensor) -> Tensor:
        """(batch, seqlen) to (batch, seqlen, width)."""
        x: Tensor = self.token(text)
        return x if self.position is None else x + self.position.weight[: text.shape[1]]


class Head(nn.Module):
    """Residual stream and next tokens to the mean cross-entropy, in nats."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, bias=False)

    def forward(self, x: Tensor, token_weight: Tensor, target: Tensor) -> Tensor:
        """Scalar; logits share the weights of the token embedding."""
        logits = functional.linear(self.norm(x), token_weight)
        return functional.cross_entropy(logits.flatten(0, 1), target.flatten())


class LanguageModel(nn.Module):
    """Tokens to the mean cross-entropy of the next one, in nats."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = Embed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        self.apply(self._start)
        for name, weight in self.named_parameters():
            if name.endswith(("output.weight", "narrow.weight")):
                nn.init.normal_(weight, std=0.02 / (2 * config.layers) ** 0.5)
        self.center: Tensor | None
        self.spread: Tensor | None
        self.turn: Tensor | None
        means = (config.layers, config.sides * config.hashed_heads, config.head_dim)
        turns = (config.layers, config.hashed_heads, config.head_dim, config.head_dim)
        for name, shape, kinds in (
            ("center", means, "cwre"),
            ("spread", (*means, config.head_dim), "wre"),
            ("turn", turns, "wre"),
        ):
            used = bool(config.adapts) and config.adapts in kinds
            self.register_buffer(name, torch.zeros(shape) if used else None)
        if self.turn is not None:
            self.turn += torch.eye(config.head_dim)
        self.moments = Moments(config) if config.adapts else None

    @staticmethod
    def _start(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def compile_parts(self) -> None:
        """Compile as the configuration says; a graph break is an error."""
        scope = self.config.compile
        if scope == "none":
            return
        if scope not in ("blocks", "model"):
            raise SystemExit(f"compile must be 'blocks', 'model' or 'none', got {scope!r}")
        parts = [self] if scope == "model" else self.parts()
        whole = not self.config.attention.startswith("reformer")
        for part in parts:
            part.compile(fullgraph=whole, dynamic=False)

    def parts(self) -> list[nn.Module]:
        """What the model is made of, to be compiled each by itself."""
        moments = [] if self.moments is None else [self.moments]
        return [self.embed, *self.blocks, self.head, *moments]

    def directions(self) -> Tensor | None:
        """Directions of the angular hash of all layers, drawn anew at every call, as in the paper.

        (layers, 1, hashed_heads, head_dim, buckets // 2), of unit length, in variant "w" among
        queries divided by their covariance; None without hashing.
        """
        config = self.config
        if not config.buckets:
            return None
        shape = (config.layers, 1, config.hashed_heads, config.head_dim, config.buckets // 2)
        drawn = torch.randn(shape, device=self.embed.token.weight.device)
        drawn = functional.normalize(drawn, dim=3)
        if self.turn is None:
            return drawn
        with torch.autocast(drawn.device.type, enabled=False):
            return self.turn.unsqueeze(1) @ drawn.to(self.turn.dtype)

    def forward(self, text: Tensor, target: Tensor) -> Tensor:
        """(batch, seqlen) tokens and their successors to a scalar."""
        directions = self.directions()
        documents = document_ids(text) if self.config.packed else None
        x, seen = self.embed(text), []
        for layer, block in enumerate(self.blocks):
            x, of_layer = block(x, *self._hash_of(layer, directions), documents)
            seen.append(of_layer)
        if self.moments is not None:
            self.moments(*gather(seen), sample_every(*text.shape))
        return self.head(x, self.embed.token.weight, target)

    def _hash_of(
        self, layer: int, directions: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Directions and center of one layer."""
        center = None if self.center is None else self.center[layer]
        return None if directions is None else directions[layer], center

    @torch.no_grad()
    def adapt(self, share: float) -> None:
        """Move what the hashes know of the queries by `share` of its way to the last batch.

        After a step: buckets of a sequence must not depend on its own later rows. In variants "r"
        and "e" the mean only begins a sequence, and its latest value serves best.
        """
        if self.center is None or self.moments is None:
            return
        mean, square = self.moments.mean, self.moments.square
        follows_past = self.config.follows_past
        self.center.lerp_(mean, 1.0 if follows_past else share)
        if self.spread is None or self.turn is None:
            return
        if not follows_past:
            square = square - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        self.spread.lerp_(square, share)
        size = self.spread.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        one = torch.eye(mean.shape[-1], device=mean.device)
        common = self.spread / size.clamp(min=1e-20)
        common = common.unflatten(1, (self.config.sides, -1)).mean(1)  # each side counts alike
        root, _ = torch.linalg.cholesky_ex(common + RIDGE * one)
        inverse = torch.linalg.solve_triangular(root, one.expand_as(root), upper=False)
        self.turn.copy_(inverse.transpose(-1, -2))

    @torch.no_grad()
    def queries(self, text: Tensor, directions: Tensor | None) -> Iterator[Tensor]:
        """What is hashed (batch, heads, seqlen, head_dim), layer by layer, not compiled."""
        documents = document_ids(text) if self.config.packed else None
        x = self.embed.forward(text)
        for layer, block in enumerate(self.blocks):
            mixed = block.norm_attention(x)
            if isinstance(block.mix, Mix):
                q, k, _ = block.mix.project(mixed)
                yield block.mix.rows_to_hash((q, k), block.mix.turn(q, k))
            else:
                yield block.mix.query(mixed).unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
            x, _ = block.forward(x, *self._hash_of(layer, directions), documents)

    @torch.no_grad()
    def bucket_cost(self, text: Tensor) -> list[float]:
        """Same-bucket pairs of each layer over those of even buckets, for a hash variant.

        1.0 is even; the work of hash attention grows with it.
        """
        directions = self.directions()
        if directions is None:
            return []
        costs = []
        for layer, q in enumerate(self.queries(text, directions)):
            drawn, center = self._hash_of(layer, directions)
            mix = self.blocks[layer].mix
            plain = not isinstance(mix, Mix)
            bucket = angular_hash(q, drawn)[0] if plain else mix.buckets(q, drawn, center)[0]
            costs.append(cost_of(bucket, self.config.buckets, self.config.sides))
        return costs

    @torch.no_grad()
    def states(self, text: Tensor) -> Tensor:
        """(batch, seqlen) tokens to what logits are made of (batch, seqlen, width); not compiled.

        A sampler's text is one token longer at each call, and so would be compiled each time.
        """
        directions = self.directions()
        documents = document_ids(text) if self.config.packed else None
        x = self.embed.forward(text)
        for layer, block in enumerate(self.blocks):
            x, _ = block.forward(x, *self._hash_of(layer, directions), documents)
        normed: Tensor = self.head.norm(x)
        return normed

    @torch.no_grad()
    def next_logits(self, text: Tensor) -> Tensor:
        """(batch, seqlen) tokens to logits (batch, vocabulary) of the one that follows."""
        return functional.linear(self.states(text)[:, -1], self.embed.token.weight).float()

    @torch.no_grad()
    def token_losses(self, text: Tensor, target: Tensor) -> Tensor:
        """(batch, seqlen) tokens and their successors to the cross-entropy of each, in nats."""
        rows = []
        for state, following in zip(self.states(text), target, strict=True):  # logits are large
            logits = functional.linear(state, self.embed.token.weight).float()
            rows.append(functional.cross_entropy(logits, following, reduction="none"))
        return torch.stack(rows)
