"""How kernels are compiled: for the card, or as plain Python in numba's CUDA simulator.

`SIMULATED` is fixed when numba is imported (NUMBA_ENABLE_CUDASIM=1). Importing this module imports
numba.cuda; only kernels and launches do that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
from numba import boolean, cuda, float32, float64, int32, int64, uint8, uint16, uint32, void

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
SHARED_LIMIT = 48 * 1024  # bytes; what every card gives a block without asking

LEAST_GRID = 1 if SIMULATED else 128  # numba warns of fewer, at every new shape of a launch

LOG2_E = 1.0 / math.log(2.0)
LN_2 = math.log(2.0)
INFINITY = math.inf

Function = Callable[..., Any]

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
        self.signature = void(*(argument_type(name) for name in arguments))
        self._dispatcher: Any = None
        self._shared: dict[int, int] = {}  # device -> bytes granted

    def launch(
        self, grid: int, threads: int, stream: Any, arguments: tuple[Any, ...], shared: int = 0
    ) -> None:
        """Launch at least `grid` blocks on the current device; kernels ignore those beyond."""
        if self._dispatcher is None:
            self._dispatcher = self._compile()
        if shared > SHARED_LIMIT and not SIMULATED:
            self._grant(shared)
        self._dispatcher[max(grid, LEAST_GRID), threads, stream, shared](*arguments)

    def _compile(self) -> Any:
        if SIMULATED:
            return cuda.jit(self.function)
        from scfa_core.backends.numba_cuda.disk import compile_kernel

        return compile_kernel(self.function, self.signature, self.variant, self.bounds)

    def _grant(self, shared: int) -> None:
        """Ask the driver for more than 48 KiB of shared memory, once per device."""
        device = cuda.get_current_device().id
        if self._shared.get(device, 0) >= shared:
            return
        from scfa_core.backends.numba_cuda.driver import grant_shared_memory

        (definition,) = self._dispatcher.overloads.values()
        grant_shared_memory(definition, device, shared)
        self._shared[device] = shared


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
