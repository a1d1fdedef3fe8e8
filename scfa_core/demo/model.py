"""A byte-level language model; variants differ in one function of (q, k, v) and in nothing else.

As in the paper (arXiv 2306.01160) keys are the normalised queries and a byte does not see itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import scfa_core as scfa

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
NEAR_BYTES = 4
SOFTMAX_SCALE = 1.0  # keys have length 1, so the queries' own length sets how sharp attention is


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of one batch."""

    seqlen: int
    batch: int = 1
    layers: int = 2
    heads: int = 2
    head_dim: int = 64
    buckets: int = 16
    keep: float = 0.5

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.heads * self.head_dim


class Variant(NamedTuple):
    """One kind of attention; `pattern_of` gives the pattern for the queries of one layer."""

    name: str
    meaning: str
    pattern_of: Callable[[Tensor], scfa.Pattern]


class Block(nn.Module):
    """Attention and a feed-forward layer, each normalised before and added to the stream."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.attend: Attend = torch_dense
        self.norm_attention = nn.LayerNorm(size.width)
        self.query_value = nn.Linear(size.width, 2 * size.width, bias=False)
        self.output = nn.Linear(size.width, size.width, bias=False)
        self.norm_feed = nn.LayerNorm(size.width)
        self.feed = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, width) to the same."""
        batch, seqlen, width = x.shape
        mixed = self.query_value(self.norm_attention(x))
        mixed = mixed.view(batch, seqlen, 2, self.size.heads, self.size.head_dim)
        q, v = mixed.permute(2, 0, 3, 1, 4)  # each (batch, heads, seqlen, head_dim)
        k = functional.normalize(q, dim=-1).to(q.dtype)
        out = self.attend(q, k, v).transpose(1, 2).reshape(batch, seqlen, width)
        x = x + self.output(out)
        return x + self.feed(self.norm_feed(x))


class LanguageModel(nn.Module):
    """Bytes to logits of the next byte; a mix of the last four bytes stands in for positions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, size.width)
        self.near = nn.Parameter(torch.randn(NEAR_BYTES, size.width) * NEAR_BYTES**-0.5)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, 256)

    def use(self, attend: Attend) -> None:
        """Let every block attend this way."""
        for block in self.blocks:
            block.attend = attend

    def forward(self, text: Tensor) -> Tensor:
        """(batch, seqlen) bytes to (batch, seqlen, 256)."""
        last = self.embed(text)
        shifted = (functional.pad(last, (0, 0, back, -back)) for back in range(NEAR_BYTES))
        x = sum(weight * x for weight, x in zip(self.near, shifted, strict=True))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def angular_hash(x: Tensor, buckets: int, seed: int = 0) -> Tensor:
    """Locality-sensitive bucket of each row: ``argmax [xR, -xR]``, a random R for each head.

    (batch, heads, seqlen, head_dim) to int64 (batch, heads, seqlen); lengths of rows have no say.
    """
    generator = torch.Generator().manual_seed(seed)
    planes = torch.randn((x.shape[1], x.shape[3], buckets // 2), generator=generator)
    turned = x.detach().float() @ planes.to(x.device)
    return torch.cat([turned, -turned], dim=-1).argmax(dim=-1)


def variants(size: Size) -> list[Variant]:
    """Hash attention, dense attention and query/key dropping; a byte never sees itself."""

    def hashed(q: Tensor) -> scfa.Pattern:
        buckets = angular_hash(q, size.buckets)  # k is q normalised: the same bucket
        return scfa.HashSparse(buckets, buckets, include_self=False)

    def dense(q: Tensor) -> scfa.Pattern:
        return scfa.Causal(include_self=False)

    def dropped(q: Tensor) -> scfa.Pattern:
        keep = torch.rand((2, *q.shape[:3]), device=q.device) < size.keep
        return scfa.QKSparse(keep[0], keep[1]) & scfa.Causal(include_self=False)

    return [
        Variant("hash", f"{size.buckets} buckets per head", hashed),
        Variant("dense", "every earlier byte", dense),
        Variant("qk-drop", f"{1 - size.keep:.0%} of queries and keys dropped", dropped),
    ]


def sparse_attend(variant: Variant, backend: str | None) -> Attend:
    """The attention of one variant, through this package."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = scfa.attention(
            q, k, v, variant.pattern_of(q), softmax_scale=SOFTMAX_SCALE, backend=backend
        )
        return out

    return attend


def torch_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention by torch: keys one step behind queries leave out the byte itself."""
    out = functional.scaled_dot_product_attention(
        q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], is_causal=True, scale=SOFTMAX_SCALE
    )
    return functional.pad(out, (0, 0, 1, 0))
