"""Patterns as operator arguments: a string for the structure, lists for tensors and integers.

`torch.compile` traces `encode` (which must stay plain Python over attributes) and the operator
decodes and lowers at run time, where tensors are real and every check has its own message.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

import scfa_core.patterns as patterns
from scfa_core.errors import DeviceError, PatternError
from scfa_core.patterns import Intersection, KeyRanges, Pattern
from scfa_core.patterns.base import PATTERN_OR_PLAN, kind_of, no_pattern

_FURTHEST = 2**62  # keys: an operator's integers have 64 bits, and no sequence is as long


def encode(pattern: Pattern) -> tuple[str, list[torch.Tensor], list[int]]:
    """Flatten a pattern: ``"SlidingWindow(causal=True,window=#0)"``, its tensors, its integers."""
    if not isinstance(pattern, Pattern):
        raise no_pattern(PATTERN_OR_PLAN, pattern)
    tensors: list[torch.Tensor] = []
    ints: list[int] = []
    parts = []
    for part in pattern.parts:
        fields: list[str] = []
        kind = kind_of(part)
        names: tuple[str, ...] = kind.__slots__
        for field in names:
            value = getattr(part, field)
            if isinstance(value, torch.Tensor):
                # One tensor in two places is passed once: a compiler would copy it for each.
                known = [at for at in range(len(tensors)) if tensors[at] is value]
                if not known:
                    known = [len(tensors)]
                    tensors.append(value)
                fields.append(f"{field}=@{known[0]}")
            elif isinstance(value, (bool, str)):
                fields.append(f"{field}={value}")
            elif isinstance(value, (int, torch.SymInt)):
                fields.append(f"{field}=#{len(ints)}")
                ints.append(min(value, _FURTHEST))
            else:
                raise DeviceError(
                    f"{kind.__name__}.{field} must be a torch tensor like q, "
                    f"got {type(value).__name__}"
                )
        parts.append(f"{kind.__name__}({','.join(fields)})")
    return "&".join(parts), tensors, ints


def is_monotone(pattern: Pattern) -> bool:
    """What `Clauses.monotone` will say, before lowering."""
    return not any(isinstance(part, KeyRanges) for part in pattern.parts)


@lru_cache(maxsize=256)
def _parse(text: str) -> tuple[tuple[type[Pattern], tuple[tuple[str, str], ...]], ...]:
    """Split an encoded pattern into (class, ((field, value), ...)) per part."""
    parts = []
    for part in text.split("&") if text else ():  # of no parts: every query sees every key
        name, _, fields = part.partition("(")
        cls = getattr(patterns, name, None) if name in patterns.__all__ else None
        if cls is None or not fields.endswith(")"):
            raise PatternError(f"not an encoded pattern: {part!r}")
        pairs = [field.partition("=") for field in fields[:-1].split(",")]
        parts.append((cls, tuple((field, value) for field, _, value in pairs)))
    return tuple(parts)


def decode(text: str, tensors: list[torch.Tensor], ints: list[int]) -> Pattern:
    """Rebuild the pattern that `encode` flattened."""
    parts = []
    for cls, fields in _parse(text):
        arguments: dict[str, Any] = {}
        for field, value in fields:
            if value[0] == "@":
                arguments[field] = tensors[int(value[1:])]
            elif value[0] == "#":
                arguments[field] = ints[int(value[1:])]
            else:
                arguments[field] = {"True": True, "False": False}.get(value, value)
        parts.append(cls(**arguments))
    return parts[0] if len(parts) == 1 else Intersection(*parts)
