"""Zeroed words for kernels that count tiles: one memset serves thousands of launches.

Words of a block are taken once and never again, and only on the default stream: its handle is never
another stream's, it cannot be captured into a graph that is replayed, and what is enqueued on it
runs in order.

A block outlives the call that makes it, so it must not lie in a pool of the caller's
(`torch.cuda.use_mem_pool`): servers that sleep unmap pools whose memory is in use, and wake with
other contents. A pool holds for the thread that chose it; blocks are made in another one.
"""

from __future__ import annotations

from itertools import count
from threading import Thread

import torch

TICKETS = 2048  # of a block
WORDS = 2  # of a ticket


class _Block:
    """Zeroed memory of the current GPU, handed out from front to back."""

    __slots__ = ("address", "memory", "tickets")

    def __init__(self) -> None:
        self.memory = torch.zeros(WORDS * TICKETS, dtype=torch.int32, device="cuda")
        self.address = self.memory.data_ptr()
        self.tickets = count()  # `next` of it gives no two threads the same


_blocks: dict[int, _Block] = {}


def _new_block(ordinal: int) -> _Block:
    """Make a block of GPU `ordinal` outside every pool."""
    made: list[_Block | BaseException] = []

    def make() -> None:
        try:
            with torch.cuda.device(ordinal):
                made.append(_Block())
        except BaseException as error:  # for the thread that waits
            made.append(error)

    thread = Thread(target=make, name="scfa-counters")
    thread.start()
    thread.join()
    if isinstance(made[0], BaseException):
        raise made[0]
    return made[0]


def take_counters(ordinal: int) -> tuple[int, torch.Tensor]:
    """Return the address of two zeroed int32, and their memory, to be kept until the launch.

    GPU `ordinal` is current, and so is its default stream.
    """
    block = _blocks.get(ordinal)
    ticket = TICKETS if block is None else next(block.tickets)
    if block is None or ticket >= TICKETS:
        block = _blocks[ordinal] = _new_block(ordinal)
        ticket = next(block.tickets)
    return block.address + 4 * WORDS * ticket, block.memory
