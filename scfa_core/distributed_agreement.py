"""What one rank refuses, all refuse: else the others wait for it until the process group gives up.

Ranks tell each other of errors and of the sizes they hold before they exchange rows. On a GPU that
would wait for the device at every call, so there it is done where torch debugs distributed work
(``TORCH_DISTRIBUTED_DEBUG``), on the host always.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scfa_core import errors
from scfa_core.distributed_exchange import Group, gather
from scfa_core.errors import OptionError, ScfaError, ShapeError
from scfa_core.torch_framework import DTYPES, dtype_name

__all__ = ["agreed", "is_checked"]

_DTYPES = (*DTYPES, "another dtype")
_DEVICES = ("cpu", "cuda", "meta", "another device")
_SIZES = 4
_FACTS = _SIZES + 3  # of a tensor: sizes (-1 where it has fewer axes), dtype, device, gradient
_ABSENT = [-1] * _FACTS


def is_checked(q: Any, group: Group) -> bool:
    """Whether ranks tell each other: the same on all of them but where one has q elsewhere.

    Raises
    ------
    OptionError
        This process is not in the group.
    """
    if torch.compiler.is_compiling() or not dist.is_initialized():
        return False
    ranks = dist.get_world_size(group)
    if ranks < 1:
        raise OptionError(
            f"rank {dist.get_rank()} is not in the group that was given; only its members may call"
        )
    if ranks == 1:
        return False
    if dist.get_debug_level() is not dist.DebugLevel.OFF:
        return True
    backend = str(dist.get_backend(group))
    if backend in ("gloo", "cpu:gloo"):  # which goes through the host whatever the device
        return True
    known = backend == "undefined" or "gloo" in backend  # others may have nothing for the host
    return known and getattr(getattr(q, "device", None), "type", "cpu") == "cpu"


@contextmanager
def agreed(group: Group, checked: bool, **tensors: Any) -> Iterator[None]:
    """Raise on every rank what one of them raises in here, and refuse shares that are not equal.

    The shares are `tensors` of 4 axes at most, or None. Without `checked`, a rank raises alone.
    What is told is read on the host, so that no CUDA graph can hold it.
    """
    if not checked:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    facts = [int(error is not None)]
    for x in tensors.values():
        facts += _ABSENT if error or x is None else _facts(x)
    backend = str(dist.get_backend(group))
    place = "cuda" if "nccl" in backend and "gloo" not in backend else "cpu"
    held = gather(torch.tensor([facts], device=place), 0, group).tolist()
    if any(of_rank[0] for of_rank in held):
        _raise_on_all(error, group)
    for rank, of_rank in enumerate(held):
        if of_rank != held[0]:
            first, other = _told(held[0], of_rank, tensors), _told(of_rank, held[0], tensors)
            raise ShapeError(
                f"ranks must hold equal shares, got {first} on rank 0 and {other} on rank {rank}; "
                "fill the sequence up to a multiple of the number of ranks, and keep what was "
                "added from being seen by QKSparse or Documents; what one rank gives or "
                "differentiates all must"
            )


def _facts(x: Tensor) -> list[int]:
    """What a rank tells of a tensor."""
    sizes = [*x.shape, *[-1] * (_SIZES - x.ndim)]
    tracked = torch.is_grad_enabled() and x.requires_grad
    return [
        *sizes,
        _number(_DTYPES, dtype_name(x.dtype)),
        _number(_DEVICES, x.device.type),
        int(tracked),
    ]


def _number(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else len(names) - 1


def _raise_on_all(error: Exception | None, group: Group) -> None:
    """Raise this rank's own error, or that of the first rank that has one."""
    told: list[Any] = [None] * dist.get_world_size(group)
    own = None if error is None else (type(error).__name__, str(error))
    dist.all_gather_object(told, own, group=group)
    if error is not None:
        raise error
    rank, (name, text) = next((rank, x) for rank, x in enumerate(told) if x is not None)
    kind = getattr(errors, name, None)
    if kind is None:
        kind, text = ScfaError, f"{name}: {text}"
    raise kind(f"rank {rank} of {len(told)} cannot go on, and so none can: {text}")


def _told(facts: list[int], others: list[int], tensors: dict[str, Tensor]) -> str:
    """What one rank holds, as it has sent it; what it lacks if another rank has it."""
    words = []
    for at, name in enumerate(tensors):
        begin = 1 + at * _FACTS
        *sizes, dtype, device, tracked = facts[begin : begin + _FACTS]
        if dtype < 0:
            words += [f"no {name}"] if others[begin : begin + _FACTS] != _ABSENT else []
            continue
        shape = tuple(size for size in sizes if size >= 0)
        where = f" on {_DEVICES[device]}" if device else ""
        words.append(f"{name} {shape} {_DTYPES[dtype]}{where}{', grad' if tracked else ''}")
    return ", ".join(words)
