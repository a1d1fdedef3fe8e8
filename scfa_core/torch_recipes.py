"""How a pattern's own tensors become clauses, remembered by its structure.

Lowering looks at kinds, flags, shapes, strides, dtypes and devices, never at values. Where all that
is as it was and no tensor needs converting, the clauses are the pattern's tensors in a known order.
Patterns can be changed between calls, so their fields are read every time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from scfa_core.arrays import ArrayInfo, DeviceArray
from scfa_core.lowering import Clauses, lower
from scfa_core.patterns import (
    Causal,
    Documents,
    HashSparse,
    KeyRanges,
    Pattern,
    QKSparse,
    SlidingWindow,
)
from scfa_core.patterns.base import map_arrays
from scfa_core.problem import Problem
from scfa_core.torch_framework import TorchFramework, dtype_name

# Fields that hold arrays, and fields that hold flags and numbers. Subclasses are not known here.
_FIELDS: dict[type[Pattern], tuple[tuple[str, ...], tuple[str, ...]]] = {
    Causal: ((), ("lag", "align")),
    Documents: (("q_ids", "k_ids"), ("causal",)),
    HashSparse: (("q_hash", "k_hash"), ("causal", "include_self")),
    KeyRanges: (("start", "end"), ()),
    QKSparse: (("q_keep", "k_keep"), ("causal",)),
    SlidingWindow: ((), ("window", "causal")),
}
_KINDS = (bool, int, str)
_TENSOR, _STRIDED = torch.Tensor, torch.strided


def read_pattern(pattern: Any) -> tuple[tuple[Any, ...], list[torch.Tensor]] | None:
    """Return all that lowering looks at, hashable, and the tensors; None: lower it the long way."""
    structure: list[Any] = []
    tensors: list[torch.Tensor] = []
    if not isinstance(pattern, Pattern):
        return None
    for part in pattern.parts:
        fields = _FIELDS.get(type(part))
        if fields is None:
            return None
        structure.append(type(part))
        for name in fields[0]:
            x = getattr(part, name)
            if type(x) is not _TENSOR or x.layout is not _STRIDED or x.is_neg():
                return None
            tensors.append(x)
            structure += (x.shape, x.stride(), x.dtype, x.device)
        for name in fields[1]:
            value = getattr(part, name)
            if type(value) not in _KINDS:
                return None
            structure.append(value)
    if len(tensors) > 1:  # one tensor in two places is read once, and the same clause dropped
        identities = [id(x) for x in tensors]
        structure += map(identities.index, identities)
    return tuple(structure), tensors


class Recipe(NamedTuple):
    """Clauses described, and which of the pattern's tensors each is."""

    clauses: Clauses  # of `DeviceArray`s without addresses
    sources: tuple[int, ...]


def find_recipe(
    pattern: Pattern, tensors: list[torch.Tensor], problem: Problem, device: int
) -> Recipe | None:
    """Lower `pattern`, known to fit, once more without memory; None if a tensor is converted."""
    twins = {id(x): _without_memory(x) for x in tensors}
    lowered = lower(
        map_arrays(pattern, lambda x: twins[id(x)]), problem, _Elsewhere(problem.device)
    )
    homes = [_storage_of(twins[id(x)]) for x in tensors]
    found = [_storage_of(x) for x in lowered.arrays]
    if not set(found) <= set(homes):
        return None
    described = describe_clauses(lowered, device)
    return Recipe(described, tuple(homes.index(home) for home in found))


def describe_clauses(clauses: Clauses, device: int) -> Clauses:
    """Tensors become `DeviceArray`s without addresses."""
    return clauses.with_arrays(
        DeviceArray(0, tuple(x.shape), x.stride(), dtype_name(x.dtype), device)
        for x in clauses.arrays
    )


def _without_memory(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _storage_of(x: torch.Tensor) -> int:
    """Identity of what a tensor is a view of; a tensor without memory has no address."""
    return int(x.untyped_storage()._cdata)


class _Elsewhere(TorchFramework):
    """Tensors without memory that stand for tensors of a device."""

    def __init__(self, device: str) -> None:
        self._device = device

    def info(self, x: torch.Tensor) -> ArrayInfo:
        """Describe `x` as what it stands for."""
        return super().info(x)._replace(device=self._device)
