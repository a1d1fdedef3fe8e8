"""The one driver call that numba-cuda does not make for us: more than 48 KiB of shared memory."""

from __future__ import annotations

from typing import Any


def grant_shared_memory(definition: Any, device: int, size: int) -> None:
    """Allow `size` bytes of dynamic shared memory to a compiled kernel on `device`."""
    from cuda.bindings import driver

    function = definition._codelibrary.get_cufunc()
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuKernelSetAttribute(
        attribute, size, driver.CUkernel(int(function.handle)), driver.CUdevice(device)
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the driver refused {size} bytes of shared memory: {error}")
