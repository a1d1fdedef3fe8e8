"""The simulator's side of `plan_warp`: votes of a warp among any number of warps of a block."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

LANES = 32
_PATIENCE = 60.0  # seconds until a warp some of whose lanes never come is an error


class _Warp:
    """Where the lanes of one warp meet."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(LANES, timeout=_PATIENCE)
        self.boards = [[False] * LANES for _ in range(2)]  # lanes may still read the last one


def _meet(condition: Any) -> list[bool]:
    """Every lane's condition, once all lanes have come."""
    thread: Any = threading.current_thread()
    number, lane = divmod(int(thread.threadIdx.x), LANES)
    warps: dict[int, _Warp] = vars(thread._manager).setdefault("warps", {})  # of one block
    warp = warps.get(number) or warps.setdefault(number, _Warp())
    thread.votes = getattr(thread, "votes", 0) + 1
    board = warp.boards[thread.votes % 2]
    board[lane] = bool(condition)
    warp.barrier.wait()
    return board


def ballot(condition: Any) -> np.uint32:
    """Bit of every lane in which the condition holds."""
    return np.uint32(sum(vote << lane for lane, vote in enumerate(_meet(condition))))


def warp_barrier() -> None:
    """What any lane wrote before is seen by all lanes after."""
    _meet(False)
