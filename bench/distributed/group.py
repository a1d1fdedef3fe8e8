"""The processes of one run: join, agree, and never hang; a rank that fails ends the whole run."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from bench.lm.train import World
from bench.machine import machine

PATIENCE = 120.0  # seconds that one check or case may take


@contextlib.contextmanager
def join(device: str | None = None) -> Iterator[World]:
    """Join torchrun's group, or make one of this process alone.

    An exception ends the process at once: to tear the group down would wait for ranks that wait in
    a collective, and torchrun ends those as soon as one is gone. Call `leave` at the very end.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    patience = datetime.timedelta(seconds=PATIENCE)
    store = None if "RANK" in os.environ else dist.HashStore()
    own = None
    if kind == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(own)
    dist.init_process_group(
        "nccl" if own else "gloo", store=store, rank=rank, world_size=size, timeout=patience,
        device_id=own,
    )  # fmt: skip
    where = World(rank, size, str(own or "cpu"))
    try:
        yield where
        where.synchronize()
        dist.barrier()  # all ranks are done with each other
    except BaseException as error:
        traceback.print_exception(error)
        leave(1)
    dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process without finalizing Python.

    Gloo's threads may still hold tensors then; one that wants the GIL for them while Python
    finalizes is unwound, and the process aborts (exit code -6).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def guard(seconds: float = PATIENCE) -> Iterator[None]:
    """Print every thread's stack and end the process if the body takes longer."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def largest(value: float, where: World) -> float:
    """Return the largest of all ranks' values, on every rank."""
    held = torch.tensor([value], dtype=torch.float64, device=where.device)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return float(held)


def anywhere(value: bool, where: World) -> bool:
    """Whether `value` holds on any rank."""
    return largest(float(value), where) > 0


def told(value: bool, where: World) -> bool:
    """Return what the first rank says, on every rank."""
    held = torch.tensor([float(value)], device=where.device)
    dist.broadcast(held, 0)
    return bool(held.item())


def head(kind: str, where: World, commit: str | None) -> dict[str, Any]:
    """Begin a record: what it is of, every rank's card, versions, commit."""
    cards: list[Any] = [None] * where.size
    cuda = where.device.startswith("cuda")
    dist.all_gather_object(cards, torch.cuda.get_device_name() if cuda else "cpu")
    facts = machine("cuda" if cuda else "cpu", commit)
    facts.pop("l2", None)  # whole steps: nothing is flushed in between
    if cuda:
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "kind": kind, "machine": facts, "ranks": where.size, "cards": cards,
        "transport": dist.get_backend(), "rows": [],
    }  # fmt: skip
