"""How kernels are compiled: for the card, or as plain Python in numba's CUDA simulator.

`SIMULATED` is fixed when numba is imported (NUMBA_ENABLE_CUDASIM=1). Importing this module imports
numba.cuda; only kernels and launches do that.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
from numba import boolean, cuda, float32, float64, int32, int64, uint8, uint16, uint32, void

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
SHARED_LIMIT = 48 * 1024  # bytes; what every card gives a block without asking

LOG2_E = 1.0 / math.log(2.0)
LN_2 = math.log(2.0)
INFINITY = math.inf

Function = Callable[..., Any]
_SIMULATOR = threading.Lock()  # the simulator runs one kernel at a time

_SCALARS = {
    "bool": boolean,
    "float32": float32,
    "float64": float64,
    "int32": int32,
    "int64": int64,
    "uint8": uint8,
    "uint16": uint16,
    "uint32": uint32,
}


def argument_type(name: str) -> Any:
    """Type of a kernel argument: ``"int32"``, or ``"int32:3"`` for an array of rank 3.

    Arrays are of any strides, so that one compilation serves every layout.
    """
    scalar, _, rank = name.partition(":")
    return _SCALARS[scalar][(slice(None),) * int(rank)] if rank else _SCALARS[scalar]


class Queue(NamedTuple):
    """Where a launch goes: device ordinal and raw stream handle."""

    device: int
    stream: int


class Kernel:
    """A kernel with its one signature; compiled at its first launch, and kept on disk."""

    def __init__(
        self,
        function: Function,
        arguments: tuple[str, ...],
        variant: tuple[Any, ...],
        bounds: tuple[int, int] | None,
    ) -> None:
        self.function = function
        self.bounds = bounds
        self.variant = variant
        self.arguments = arguments
        self.signature = void(*(argument_type(name) for name in arguments))
        self._dispatcher: Any = None
        self._entries: dict[int, Any] = {}  # by device
        self._lock = threading.Lock()

    def launch(
        self, grid: int, threads: int, queue: Queue, arguments: tuple[Any, ...], shared: int = 0
    ) -> None:
        """Launch on `queue`, whose device is current; arguments as `views.view` shows them."""
        if SIMULATED:
            with _SIMULATOR:
                cuda.jit(self.function)[grid, threads, 0, shared](*arguments)
            return
        entry = self._entries.get(queue.device) or self._load(queue.device)
        entry.launch(grid, threads, queue.stream, arguments, shared)

    def _load(self, device: int) -> Any:
        from scfa_core.backends.numba_cuda.disk import compile_kernel
        from scfa_core.backends.numba_cuda.driver import Entry

        with self._lock:
            if device not in self._entries:
                if self._dispatcher is None:
                    self._dispatcher = compile_kernel(self)
                (definition,) = self._dispatcher.overloads.values()
                self._entries[device] = Entry(definition, self.arguments, device)
            return self._entries[device]


def kernel(
    *arguments: str, variant: tuple[Any, ...] = (), bounds: tuple[int, int] | None = None
) -> Callable[[Function], Kernel]:
    """Make a `Kernel` of a function.

    `arguments` are named as `argument_type` reads them. `variant` holds the constants that the
    function was built with: with the sources they are its name in the disk cache. `bounds` are the
    threads of a block and the blocks that a multiprocessor should hold at once.
    """
    return lambda function: Kernel(function, arguments, variant, bounds)


def device(function: Function) -> Any:
    """Compile a function that kernels call; in the simulator it stays what it is.

    It must not use the name ``cuda``: the simulator swaps that name in the kernel's module alone.
    """
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)
