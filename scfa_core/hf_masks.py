"""Attention masks of Hugging Face transformers, carried as clauses instead of being drawn.

Transformers describes a mask by a function of (batch, head, query, key). `read_mask` makes of it an
interval around the query's position, group ids and keep flags: memory grows with length, not with
its square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad
from transformers import masking_utils

from scfa_core.api import make_plan
from scfa_core.errors import OptionError, PatternError
from scfa_core.hf_reading import read_function
from scfa_core.hf_symbols import Band, Positions
from scfa_core.patterns import (
    Causal,
    HashSparse,
    Intersection,
    KeyRanges,
    Pattern,
    QKSparse,
    SlidingWindow,
)
from scfa_core.plan import Plan
from scfa_core.problem import MIN_HEAD_DIM

__all__ = ["StructuredMask", "read_mask"]


class StructuredMask(BlockMask):
    """What a model carries from its mask function to its layers, in place of a 4-axis tensor.

    A `BlockMask` by name only: models hand those on untouched, with static caches too.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        shift: int | Tensor,
        band: Band,
        groups: list[tuple[Tensor, Tensor]],
        keep: Tensor | None,
        packed: bool = False,
    ) -> None:
        self._shape = shape
        self.shift = shift
        self.band = band
        self.groups = groups
        self.keep = keep
        self.packed = packed  # documents are told apart
        self._plans: dict[Any, Plan] = {}
        self._ahead: tuple[Tensor, Tensor, Plan] | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, 1, queries, keys)."""
        return (self._shape[0], 1, *self._shape[1:])

    @property
    def ndim(self) -> int:
        """4, as of the tensor that it stands for."""
        return 4

    def __add__(self, other: Any) -> Any:
        """Say what a model that adds its mask to scores of its own has to be loaded with."""
        raise OptionError(
            "this model adds its mask to scores that it computes itself, and calls no attention "
            "function; load it with attn_implementation='eager'"
        )

    __radd__ = __add__

    def __repr__(self) -> str:
        kept = "" if self.keep is None else ", padded"
        return f"StructuredMask({self.shape}, {self.band}, {len(self.groups)} groups{kept})"

    def pattern(self, device: torch.device, band: Band | None = None) -> Pattern:
        """Spell the mask as a pattern on `device`; `band` narrows it further."""
        band = self.band if band is None else self.band.narrowed(band)
        pattern = self._interval(band, device)
        for q_ids, k_ids in self.groups:
            ids = (q_ids[:, None].to(device), k_ids[:, None].to(device))
            pattern = pattern & HashSparse(*ids, causal=False)
        if self.keep is not None:
            every = torch.ones((1, 1, 1), dtype=torch.bool, device=device)
            pattern = pattern & QKSparse(every, self.keep[:, None].to(device), causal=False)
        return pattern

    def plan(self, query: Tensor, key: Tensor) -> Pattern | Plan:
        """Plan for these tensors; layers of the same sizes share it."""
        if torch.compiler.is_compiling():
            return self._planned_ahead(query, key)
        use = (query.device, query.shape[:3], key.shape[:3], query.dtype)
        if use not in self._plans:
            self._plans[use] = make_plan(self.pattern(query.device), query, key)
        return self._plans[use]

    def plan_ahead(self, heads: int, heads_kv: int, dtype: torch.dtype, device: Any) -> None:
        """Plan for layers to come, where they cannot: a graph lets no layer change its mask."""
        batch, queries, keys = self._shape
        row = torch.zeros(MIN_HEAD_DIM, dtype=dtype, device=device)
        query = row.expand(batch, heads, queries, -1)
        key = row.expand(batch, heads_kv, keys, -1)
        self._ahead = query, key, make_plan(self.pattern(query.device), query, key)

    def _planned_ahead(self, query: Tensor, key: Tensor) -> Pattern | Plan:
        """Return the plan made ahead if it is for tensors like these."""
        if self._ahead is not None:
            *alike, plan = self._ahead
            if all(
                x.shape[:3] == y.shape[:3] and (x.dtype, x.device) == (y.dtype, y.device)
                for x, y in zip(alike, (query, key), strict=True)
            ):
                return plan
        return self.pattern(query.device)

    def _interval(self, band: Band, device: torch.device) -> Pattern:
        """Return the band as a pattern; positions of queries are ``row + shift``."""
        _, queries, keys = self._shape
        if band == Band():
            return Intersection()
        if not isinstance(self.shift, Tensor):
            if band == Band(hi=1) and self.shift == 0:
                return Causal()
            if band == Band(hi=1) and self.shift == keys - queries:
                return Causal(align="bottom-right")
            if self.shift == 0 and band.lo is not None and band.hi in (1, 1 - band.lo):
                return SlidingWindow(max(1 - band.lo, 0), causal=band.hi == 1)
        shift = self.shift.to(device) if isinstance(self.shift, Tensor) else self.shift
        position = torch.arange(queries, device=device) + shift
        start = torch.zeros_like(position) if band.lo is None else position + band.lo
        end = torch.full_like(position, keys) if band.hi is None else position + band.hi
        return KeyRanges(start.view(1, 1, -1), end.view(1, 1, -1))


def read_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    dtype: torch.dtype = torch.float32,
    ahead: bool = False,
    **unused: Any,
) -> StructuredMask:
    """Mask interface for `transformers.AttentionMaskInterface`.

    Parameters
    ----------
    batch_size, q_length, kv_length : int
    q_offset, kv_offset : int or Tensor
        Positions of the first query and the first key. A tensor (static caches) is not looked at.
    mask_function : callable
        As composed by `transformers.masking_utils`.
    attention_mask : bool Tensor, (batch_size, keys), optional
        False where a key is padding, by position.
    use_vmap : bool
        Transformers says so where some of the function is not its own.
    device : torch.device or str
        Where the model computes.
    config : PreTrainedConfig, optional
    dtype : torch.dtype
        Of the model's layers.
    ahead : bool
        Plan at once if a graph is being traced, for heads as `config` counts them.

    Returns
    -------
    mask : StructuredMask

    Raises
    ------
    PatternError
        The mask function has a part that is no interval, group or keep clause, or `attention_mask`
        is not of two axes or of another batch.

    Notes
    -----
    No value of a tensor is looked at, so `torch.compile` traces it in one graph.
    """
    if attention_mask is not None:
        _check_padding(attention_mask, batch_size)
    queries = Positions("query", q_length, q_offset)
    keys = Positions("key", kv_length, kv_offset)
    said = read_function(
        mask_function,
        queries,
        keys,
        torch.device(device),
        plain=mask_function in _PLAIN,
        custom=use_vmap,
    )
    keep = None if attention_mask is None else _cut(attention_mask, kv_length, kv_offset)
    for flags in said.keeps:
        keep = flags if keep is None else keep & flags
    shape = (batch_size, q_length, kv_length)
    shift = q_offset - kv_offset
    mask = StructuredMask(shape, shift, said.band, list(said.groups), keep, said.packed)
    heads = getattr(config, "num_attention_heads", None)
    if ahead and isinstance(heads, int) and torch.compiler.is_compiling():
        heads_kv = getattr(config, "num_key_value_heads", None) or heads
        mask.plan_ahead(heads, heads_kv, dtype, device)
    return mask


def _check_padding(mask: Tensor, batch_size: int) -> None:
    """Refuse a padding mask that is not a row of flags a sequence."""
    if mask.ndim != 2:
        raise PatternError(
            "scfa_core takes a padding mask (batch, seqlen), got an attention mask of shape "
            f"{tuple(mask.shape)}; use attn_implementation='sdpa' for custom masks"
        )
    # Not `in (1, batch_size)`: a traced size of its own is found in no tuple.
    if mask.shape[0] != 1 and mask.shape[0] != batch_size:
        raise PatternError(
            "the padding mask must have as many sequences as the batch, got shape "
            f"{tuple(mask.shape)} for a batch of {batch_size}; give it a row a sequence"
        )


def _cut(keep: Tensor, length: int, offset: int) -> Tensor:
    """Flags of `length` keys from `offset` on; what is not told of is padding."""
    missing = length + offset - keep.shape[-1]
    keep = pad(keep, (0, missing)) if missing > 0 else keep
    return keep[:, offset : offset + length]


_PLAIN = (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
