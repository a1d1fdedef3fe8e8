"""Arrays as kernels see them: numba device arrays over the caller's memory, nothing copied.

16-bit floats are shown as uint16. In the simulator arrays are NumPy's and are shared likewise.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda
from scfa_core.backends.numba_cuda.compiling import SIMULATED
from scfa_core.backends.numba_cuda.convert import as_storage

from scfa_core.arrays import CallContext

if SIMULATED:
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

_STORAGE = {"float16": np.dtype(np.uint16), "bfloat16": np.dtype(np.uint16)}


def view(x: Any) -> Any:
    """Show one native array (NumPy in the simulator, else `DeviceArray`) to kernels."""
    if SIMULATED:
        return FakeCUDAArray(as_storage(x))
    dtype = _STORAGE.get(x.dtype) or np.dtype(x.dtype)
    interface = {
        "version": 3,
        "shape": tuple(x.shape),
        "strides": tuple(stride * dtype.itemsize for stride in x.strides),
        "typestr": dtype.str,
        "data": (x.pointer, False),
    }
    return cuda.from_cuda_array_interface(interface, sync=False)


@lru_cache(maxsize=64)
def _external_stream(device: int, handle: int) -> Any:
    return cuda.external_stream(handle)


def stream_of(ctx: CallContext) -> Any:
    """The caller's stream as numba names it; its device is current."""
    return 0 if SIMULATED else _external_stream(ctx.device, ctx.stream)


def device_of(ctx: CallContext) -> AbstractContextManager[Any]:
    """Make the caller's device current for a while."""
    return contextlib.nullcontext() if SIMULATED else cuda.gpus[ctx.device]


def multiprocessors() -> int:
    """Multiprocessors of the current device."""
    return 1 if SIMULATED else int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


def compute_capability() -> tuple[int, int]:
    """Compute capability of the current device; the simulator does whatever kernels ask for."""
    return (99, 0) if SIMULATED else tuple(cuda.get_current_device().compute_capability)


def shared_limit() -> int:
    """Bytes of shared memory that a block may ask for on the current device."""
    if SIMULATED:
        return 1 << 30
    return int(cuda.get_current_device().MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
