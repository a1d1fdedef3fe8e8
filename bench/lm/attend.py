"""How a variant of the language model attends, by its name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import scfa_core as scfa
from bench.lm.config import Config
from scfa_core.choosing import chosen_blocks
from scfa_core.hashing import angular_hash
from scfa_core.merging import attention_over
from scfa_core.nn.near import near_groups, with_near_heads

# q, k, v, what is hashed (its buckets, where there are no directions), the hash's directions and
# center, documents
Attend = Callable[
    [Tensor, Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None"], Tensor
]


# What may follow a pattern's number: how a hash adapts, or that a row does not see itself.
_LETTERS = {"hash": "cwre", "blocks": "", "drop": "o", "window": "o", "dense": "o"}


class _Named(NamedTuple):
    """One pattern's name in parts; torch.compile need not trace how they are told apart."""

    kind: str
    number: int
    others: bool  # whether a row sees others alone


def _parse(name: str) -> _Named:
    """Parts of e.g. ``hash16e``, ``window128`` or, without the row itself, ``window128o``."""
    match = re.fullmatch(r"(hash|blocks|drop|window|dense)(\d*)([cwreo]?)", name)
    kind, number, last = match.groups() if match else ("", "", "")
    if not match or last not in _LETTERS[kind] or (not number) is not (kind == "dense"):
        raise SystemExit(f"no such attention: {name!r}")
    return _Named(kind, int(number or 0), others=last == "o" or kind in ("hash", "blocks"))


def _part(
    named: _Named,
    q: Tensor,
    directions: Tensor | None,
    center: Tensor | None,
    blocks: tuple[int, int],
    sides: int = 1,
) -> scfa.Pattern:
    """One pattern; `blocks`: so many heads more than those of a hash see blocks of so many rows.

    Of two `sides` the buckets of keys come behind those of queries, as further heads.
    """
    kind, number, others = named
    if kind == "hash":
        bucket = q if directions is None else angular_hash(q, directions, center)[0]
        ids = list(bucket.chunk(sides, dim=1))
        if blocks[0]:
            ids = [with_near_heads(x, *blocks) for x in ids]
        return scfa.HashSparse(ids[0], ids[-1], include_self=not others)
    if kind == "blocks":
        numbers = near_groups(q.shape[2], q.shape[1], number, q.new_empty(0, dtype=torch.int32))
        block = numbers.expand(q.shape[:3])
        return scfa.HashSparse(block, block, include_self=not others)
    pattern: scfa.Pattern = scfa.Causal(include_self=not others)
    if kind == "drop":
        keep = torch.rand((2, *q.shape[:3]), device=q.device) * 100 >= number
        pattern = pattern & scfa.QKSparse(keep[0], keep[1])
    elif kind == "window":
        pattern = pattern & scfa.SlidingWindow(number)
    return pattern


def chosen(config: Config) -> Attend:
    """Own block, and the blocks that each query scores highest (MoBA): ``chosen256x3``."""
    block, top = map(int, config.main.removeprefix("chosen").split("x"))
    options = {"softmax_scale": config.scale, "backend": config.backend}

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> Tensor:
        patterns = chosen_blocks(q, k, block=block, top=top)
        documents = rest[-1]
        if documents is not None:
            patterns = [pattern & scfa.Documents(documents) for pattern in patterns]
        out: Tensor = attention_over(q, k, v, patterns, **options)
        return out

    return attend


def sparse(config: Config) -> Attend:
    """Attention through this package."""
    parts = [_parse(name) for name in config.main.split("+")]
    if len(parts) > 2 or (
        len(parts) == 2 and (parts[1].kind != "window" or parts[0].kind == "window")
    ):
        raise SystemExit(
            "a sum is of one sparse attention and a window, such as hash16+window128, got "
            f"{config.attention!r}"
        )
    if config.own_keys:  # a row's own key is then one among others
        parts = [part._replace(others=False) for part in parts]
    near = parts[1].number if len(parts) == 2 else 0
    last, heads = config.near
    blocks = (heads, _parse(last).number) if last.startswith("blocks") else (0, 0)

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hashed: Tensor,
        directions: Tensor | None,
        center: Tensor | None,
        documents: Tensor | None,
    ) -> Tensor:
        patterns = [_part(parts[0], hashed, directions, center, blocks, config.sides)]
        if near:  # the window's keys, and those before it that the other pattern shows
            window = _part(parts[1], hashed, None, None, (0, 0))
            patterns = [patterns[0] & scfa.Causal(lag=near), window]
        if documents is not None:
            patterns = [pattern & scfa.Documents(documents) for pattern in patterns]
        options = {"softmax_scale": config.scale, "backend": config.backend}
        out: Tensor = (
            attention_over(q, k, v, patterns, **options)
            if near
            else scfa.attention(q, k, v, patterns[0], **options)
        )
        return out

    return attend


def attend_for(config: Config) -> Attend:
    """Choose the attention of a configuration."""
    name, heads = config.near
    most = _attend_for(config)
    if not name.startswith("window"):
        return most
    last = sparse(dataclasses.replace(config, attention=name + "k" * config.own_keys))
    shares = [config.hashed_heads, heads]

    def attend(q: Tensor, k: Tensor, v: Tensor, *hashed: Tensor | None) -> Tensor:
        first, second = zip(*(x.split(shares, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat((most(*first, *hashed), last(*second, *hashed)), dim=1)

    return attend


def _attend_for(config: Config) -> Attend:
    """Choose that of all heads but the last."""
    scale = config.scale
    if config.packed and config.main in ("dense", "naive", "none"):
        raise SystemExit(
            f"packed=True is served by this package's attention, not {config.attention}"
        )
    if config.main == "none":
        return lambda q, k, v, *_: q + k + v
    if config.main == "dense":
        return lambda q, k, v, *_: functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale
        )
    if config.main == "naive":

        def naive(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> Tensor:
            hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            scores = (q @ k.transpose(-1, -2) * factor).masked_fill(hidden, float("-inf"))
            return torch.softmax(scores, -1) @ v

        return naive
    if re.fullmatch(r"chosen0*[1-9]\d*x\d+", config.main):
        return chosen(config)
    return sparse(config)
