"""Mask functions of Hugging Face transformers, read by one call with symbols for indices.

A mask function takes (batch, head, query, key) and says whether the pair is visible. `hf_symbols`
turns its comparisons into clauses; here it is called, and look-ups in tensors are made to give
symbols. `torch.compile` traces the call like any other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from scfa_core.hf_symbols import (
    BatchIndex,
    Clause,
    HeadIndex,
    PerBatch,
    Positions,
    RowIndex,
    Rows,
    Symbol,
    as_clause,
    refuse_part,
)

__all__ = ["read_function"]


def read_function(
    function: Callable[..., Any],
    queries: Positions,
    keys: Positions,
    device: torch.device,
    *,
    plain: bool = False,
    custom: bool = False,
) -> Clause:
    """Clauses of `function`.

    Parameters
    ----------
    function : callable
        As composed by `transformers.masking_utils`.
    queries, keys : Positions
    device : torch.device
        For ids that are computed from positions alone.
    plain : bool
        The function looks nothing up in tensors.
    custom : bool
        Some of the function is not transformers' own: positions that it looks up need not rise by
        one within a document, so comparing them is refused.

    Raises
    ------
    PatternError
        The function has a part that is no interval, group or keep clause.
    """
    indices = BatchIndex(), HeadIndex(), RowIndex(queries, device), RowIndex(keys, device)
    try:
        if plain:
            said = function(*indices)
        else:
            with _LookUps():
                said = function(*indices)
    except (AttributeError, TypeError) as error:  # a method that symbols do not have
        refuse_part(str(error), error)
    found = as_clause(said)
    if found.compares_looked_up and (custom or not found.packed):
        refuse_part("a comparison of positions looked up in a tensor")
    return found


class _LookUps(TorchFunctionMode):
    """Tensors indexed with symbols give symbols: ``table[batch, key]``, ``table[batch]``."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__ or func is operator.getitem:
            table, index = args
            if isinstance(index, BatchIndex) and table.ndim == 1:
                return PerBatch(table)
            if isinstance(index, tuple) and len(index) == 2 and isinstance(index[0], BatchIndex):
                at = index[1]
                if isinstance(at, RowIndex) and at.shift == 0 and table.ndim == 2:
                    return Rows(at.at, at.at.rows_of(table), table)
            if any(
                isinstance(x, Symbol) for x in (index if isinstance(index, tuple) else (index,))
            ):
                refuse_part(f"a look-up in a tensor of shape {tuple(table.shape)}")
        return func(*args, **(kwargs or {}))
