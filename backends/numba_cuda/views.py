"""Arrays as kernels see them: numba device arrays over the caller's memory, nothing copied.

16-bit floats are shown as uint16. In the simulator arrays are NumPy's and are shared likewise.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from numba import cuda
from scfa_core.backends.numba_cuda.compiling import SIMULATED, Queue
from scfa_core.backends.numba_cuda.convert import as_storage
from scfa_core.backends.numba_cuda.fragments import STATIC_SHARED

from scfa_core.arrays import CallContext

if SIMULATED:
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray


def view(x: Any) -> Any:
    """Show one native array to kernels: `DeviceArray` as it is, NumPy wrapped for the simulator."""
    return FakeCUDAArray(as_storage(x)) if SIMULATED else x


def queue_of(ctx: CallContext) -> Queue:
    """The caller's device and stream."""
    return Queue(ctx.device, ctx.stream)


def device_of(ctx: CallContext) -> AbstractContextManager[Any]:
    """Make the caller's device current for a while."""
    return contextlib.nullcontext() if SIMULATED else cuda.gpus[ctx.device]


@cache
def multiprocessors(device: int) -> int:
    """Multiprocessors of a device."""
    return 1 if SIMULATED else int(cuda.gpus[device].MULTIPROCESSOR_COUNT)


@cache
def compute_capability(device: int) -> tuple[int, int]:
    """Compute capability of a device; the simulator does whatever kernels ask for."""
    return (99, 0) if SIMULATED else tuple(cuda.gpus[device].compute_capability)


@cache
def shared_limit(device: int) -> int:
    """Bytes of dynamic shared memory that a block may ask for on a device."""
    if SIMULATED:
        return 1 << 30
    return int(cuda.gpus[device].MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) - STATIC_SHARED
