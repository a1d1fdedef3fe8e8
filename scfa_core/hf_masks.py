"""Attention masks of Hugging Face transformers, read as clauses instead of being drawn.

Transformers describes a mask by a function of (batch, head, query, key), put together from a few
known pieces. `read_mask` takes it apart into an interval around the query's position, group ids and
keep flags: memory grows with length, not with its square. A piece it does not know raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad
from transformers import masking_utils

from scfa_core.api import make_plan
from scfa_core.errors import PatternError
from scfa_core.patterns import Causal, HashSparse, KeyRanges, Pattern, QKSparse, SlidingWindow
from scfa_core.plan import Plan

__all__ = ["StructuredMask", "everything", "read_mask"]


class Band(NamedTuple):
    """Key at position p is visible to a query at position i iff ``i + lo <= p < i + hi``."""

    lo: int | None = None
    hi: int | None = None

    def narrowed(self, other: Band) -> Band:
        """Both bands at once."""
        los = [x for x in (self.lo, other.lo) if x is not None]
        his = [x for x in (self.hi, other.hi) if x is not None]
        return Band(max(los, default=None), min(his, default=None))


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
    ) -> None:
        self._shape = shape
        self.shift = shift
        self.band = band
        self.groups = groups
        self.keep = keep
        self._plans: dict[Any, Plan] = {}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, 1, queries, keys)."""
        return (self._shape[0], 1, *self._shape[1:])

    @property
    def packed(self) -> bool:
        """Whether documents are told apart; chunks number queries and keys each by themselves."""
        return any(q_ids is k_ids for q_ids, k_ids in self.groups)

    @property
    def ndim(self) -> int:
        """4, as of the tensor that it stands for."""
        return 4

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
        pattern = self.pattern(query.device)
        if torch.compiler.is_compiling():
            return pattern
        use = (query.device, query.shape[:3], key.shape[:3], query.dtype)
        if use not in self._plans:
            self._plans[use] = make_plan(pattern, query, key)
        return self._plans[use]

    def _interval(self, band: Band, device: torch.device) -> Pattern:
        """Return the band as a pattern; positions of queries are ``row + shift``."""
        _, queries, keys = self._shape
        if band == Band():
            return everything(queries, keys)
        if not isinstance(self.shift, Tensor):
            aligned = {0: "top-left", keys - queries: "bottom-right"}.get(self.shift)
            if band == Band(hi=1) and aligned is not None:
                return Causal(align=aligned)
            if self.shift == 0 and band.lo is not None and band.hi in (1, 1 - band.lo):
                return SlidingWindow(1 - band.lo, causal=band.hi == 1)
        shift = self.shift.to(device) if isinstance(self.shift, Tensor) else self.shift
        position = torch.arange(queries, device=device) + shift
        start = torch.zeros_like(position) if band.lo is None else position + band.lo
        end = torch.full_like(position, keys) if band.hi is None else position + band.hi
        return KeyRanges(start.view(1, 1, -1), end.view(1, 1, -1))


def everything(queries: int, keys: int) -> Pattern:
    """Every query sees every key."""
    return SlidingWindow(queries + keys, causal=False)


def read_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
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

    Returns
    -------
    mask : StructuredMask

    Raises
    ------
    PatternError
        The mask function has a piece that is no interval, group or keep clause.

    Notes
    -----
    A causal mask and one both ways, padded or not, are traced by `torch.compile`. Others are
    closures, which cannot be traced: there the graph breaks.
    """
    read = _read if mask_function in _PLAIN else _read_untraced
    positions = _Positions(q_length, q_offset), _Positions(kv_length, kv_offset)
    return read(batch_size, *positions, mask_function, attention_mask)


_PLAIN = (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)


def _read(
    batch_size: int,
    queries: _Positions,
    keys: _Positions,
    mask_function: Callable[..., Any],
    keep: Tensor | None,
) -> StructuredMask:
    found = _Found(queries, keys)
    found.add(mask_function)
    if keep is not None:
        missing = keys.length + keys.offset - keep.shape[-1]
        keep = pad(keep, (0, missing)) if missing > 0 else keep
        keep = keep[:, keys.offset : keys.offset + keys.length]
    shape = (batch_size, queries.length, keys.length)
    return StructuredMask(shape, queries.offset - keys.offset, found.band, found.groups, keep)


_read_untraced = torch.compiler.disable(_read, reason="reads closures, which cannot be traced")


class _Positions(NamedTuple):
    """Rows ``0 .. length - 1`` stand at positions from `offset` on."""

    length: int
    offset: int | Tensor

    def on(self, device: torch.device) -> Tensor:
        return torch.arange(self.length, device=device) + self.offset


class _Found:
    """Clauses collected from a mask function."""

    def __init__(self, queries: _Positions, keys: _Positions) -> None:
        self.queries = queries
        self.keys = keys
        self.band = Band()
        self.groups: list[tuple[Tensor, Tensor]] = []

    def add(self, function: Callable[..., Any], packed: bool = False) -> None:
        """Read one piece; `packed` where positions restart with each document.

        Bands need no such care: within a document positions rise by one, as rows do.
        """
        if function is masking_utils.bidirectional_mask_function:
            return
        if function is masking_utils.causal_mask_function:
            self._narrow(hi=1)
            return
        name = getattr(function, "__qualname__", "").partition(".")[0]
        held = _held(function) if function.__module__ == masking_utils.__name__ else {}
        if name == "and_masks":
            for piece in held["mask_functions"]:
                self.add(piece, packed)
        elif name == "sliding_window_overlay":
            self._narrow(lo=1 - held["sliding_window"])
        elif name == "sliding_window_bidirectional_overlay":
            reach = held["sliding_window"]
            self._narrow(lo=-reach, hi=reach + 1)
        elif name == "remap_positions_for_packed_sequence":
            self.add(held["mask_function"], packed=True)
        elif name == "packed_sequence_mask_function":
            ids = held["packed_sequence_mask"]
            self.groups.append((ids, ids))
        elif name == "chunked_overlay" and not packed:
            padding = held["left_padding"].view(-1, 1)
            q_ids, k_ids = (
                torch.div(x.on(padding.device) - padding, held["chunk_size"], rounding_mode="floor")
                for x in (self.queries, self.keys)
            )
            self.groups.append((q_ids, k_ids))
        else:
            label = f"{function.__module__}.{getattr(function, '__qualname__', function)}"
            raise PatternError(
                f"the attention mask has a part that scfa_core cannot express: {label}"
                f"{' in packed sequences' if packed else ''}. It knows causal, sliding-window, "
                "chunked, bidirectional, packed and padding masks; use attn_implementation='sdpa' "
                "for this model"
            )

    def _narrow(self, lo: int | None = None, hi: int | None = None) -> None:
        self.band = self.band.narrowed(Band(lo, hi))


def _held(function: Any) -> dict[str, Any]:
    """Return the values that a closure holds, by name."""
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {n: cell.cell_contents for n, cell in zip(names, cells, strict=True)}
