"""All arrays of a plan in one allocation: what an eager call on a GPU makes for itself.

A plan that the caller sees has tensors of its own; this one is seen by kernels, and saved for the
backward pass.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from scfa_core.arrays import strides_in_order
from scfa_core.errors import ShapeError
from scfa_core.plan import PlanAddresses, plan_shapes
from scfa_core.problem import Problem
from scfa_core.torch_framework import empty_cuda

_ALIGNMENT = 64  # words between the beginnings of arrays are a multiple: 256 bytes

Shape = tuple[int, ...]


class PlanStorage(NamedTuple):
    """Where each array of a plan is, in int32 words."""

    words: int
    offsets: tuple[int, ...]
    facts: tuple[tuple[Shape, Shape], ...]  # shape and strides of each

    def allocate(self) -> torch.Tensor:
        """Uninitialised memory on the current GPU."""
        return empty_cuda((self.words,), (1,), torch.int32)

    def check(self, storage: torch.Tensor, device: torch.device) -> None:
        """Raise unless hooks on saved tensors (offloading, ...) gave back what was saved."""
        if (
            storage.shape != (self.words,)
            or storage.dtype is not torch.int32
            or storage.device != device
            or not storage.is_contiguous()
        ):
            raise ShapeError(
                f"a hook on saved tensors must give a plan back as it was, {self.words} int32 on "
                f"{device}, got {tuple(storage.shape)} {storage.dtype} on {storage.device}"
            )

    def addresses(self, storage: torch.Tensor, monotone: bool) -> PlanAddresses:
        """Where the arrays are in `storage`, which has to live until kernels are enqueued."""
        at = storage.data_ptr()
        q_index, q_count, k_index, k_count, start, end, work = self.offsets
        return PlanAddresses(
            at + 4 * q_index,
            at + 4 * q_count,
            at + 4 * k_index,
            at + 4 * k_count,
            at + 4 * start,
            at + 4 * end,
            at + 4 * work,
            monotone,
        )

    def tensors(self, storage: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The arrays as views of `storage`."""
        parts = zip(self.facts, self.offsets, strict=True)
        return tuple(storage[at : at + prod(shape)].view(shape) for (shape, _), at in parts)


@lru_cache(1024)
def plan_storage(problem: Problem, memory: str) -> PlanStorage:
    """Lay out the plan of a problem in the kind of memory that a backend works on."""
    offsets, facts, words = [], [], 0
    for shape in plan_shapes(problem, memory):
        facts.append((shape, strides_in_order(shape, tuple(range(len(shape))))))
        offsets.append(words)
        words += -(-prod(shape) // _ALIGNMENT) * _ALIGNMENT
    return PlanStorage(words, tuple(offsets), tuple(facts))
