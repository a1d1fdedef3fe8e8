"""Whose array is this: torch's, NumPy's or CuPy's; those of Numba and DLPack are viewed as such.

Nothing is imported that the caller has not imported already, but for CuPy, which reads arrays that
other libraries have on a GPU.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np

from scfa_core.arrays import ITEMSIZE, CupyFramework, Framework, NumpyFramework
from scfa_core.errors import DeviceError, DTypeError, LayoutError

_TENSORS = (("torch", "Tensor"), ("torch.nn.parameter", "Parameter"))


@cache
def _numpy_framework() -> NumpyFramework:
    return NumpyFramework()


@cache
def _cupy_framework() -> CupyFramework:
    return CupyFramework()


def is_torch_tensor(x: Any) -> bool:
    """Whether `x` is a torch tensor, without importing torch.

    Not by ``sys.modules``: torch.compile would walk through every module of the process, and fails
    if one is imported meanwhile. It cannot walk through the bases of Parameter, either.
    """
    kind = type(x)
    if (kind.__module__, kind.__name__) in _TENSORS:
        return True
    return any(base.__module__ == "torch" and base.__name__ == "Tensor" for base in kind.__mro__)


def check_dense(name: str, x: Any) -> None:
    """Refuse torch tensors that are no arrays: nested and sparse ones.

    Raises
    ------
    LayoutError
        `x` is one; of such tensors even the shape or the strides may raise.
    """
    if not is_torch_tensor(x):
        return
    if x.is_nested:
        raise LayoutError(
            f"{name} must be one array, and nested tensors have no batch axis: pack the sequences "
            "into one, (1, heads, rows of all, head_dim), with Documents(ids), ids the sequence of "
            "each row"
        )
    import torch

    if x.layout is not torch.strided:
        raise LayoutError(f"{name} must be dense (torch.strided), got {x.layout}; call .to_dense()")


def dtype_name(x: Any) -> str:
    """NumPy's spelling of an array's dtype, whatever its library."""
    return getattr(x.dtype, "name", None) or str(x.dtype).removeprefix("torch.")


def is_numba_device_array(x: Any) -> bool:
    """Whether `x` is one of numba-cuda's device arrays, without importing it."""
    return type(x).__module__.startswith(("numba.cuda", "numba_cuda")) and hasattr(
        x, "__cuda_array_interface__"
    )


def _is_symbolic(x: Any) -> bool:
    """Whether `x` comes from torch.fx's symbolic tracing, and so has every attribute there is."""
    return type(x).__module__ == "torch.fx.proxy"


def _on_cuda(x: Any) -> bool:
    return hasattr(x, "__cuda_array_interface__") or (
        hasattr(x, "__dlpack_device__") and x.__dlpack_device__()[0] == 2
    )


def framework_of(name: str, x: Any) -> Framework:
    """Return the framework that owns `x` once `adopt` has seen it.

    Raises
    ------
    DTypeError, LayoutError
        `x` is no array that this package can read.
    """
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise DTypeError(
                f"{name} must be a plain array, got a masked one, whose mask would be lost: say by "
                "a pattern who sees what, and give .filled() or .data"
            )
        return _numpy_framework()
    if is_torch_tensor(x):
        check_dense(name, x)
        from scfa_core.torch_bridge import TORCH_FRAMEWORK

        return TORCH_FRAMEWORK
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return _cupy_framework()
    if _is_symbolic(x):
        raise DTypeError(
            f"{name} is a torch.fx.Proxy, which stands for no array yet: have the function that "
            "calls attention wrapped by torch.fx.wrap, or take torch.export or torch.compile"
        )
    raise DTypeError(
        f"{name} must be an array (torch, NumPy, CuPy, Numba, or anything with DLPack), "
        f"got {type(x).__name__}"
    )


def adopt(x: Any) -> Any:
    """View a Numba or plain DLPack array as CuPy (on a GPU) or NumPy (on the host); others as is.

    Raises
    ------
    DeviceError
        A GPU array of a foreign library, and CuPy is not installed.
    DTypeError
        A host array that NumPy cannot hold.
    """
    if x is None or isinstance(x, np.ndarray) or is_torch_tensor(x):
        return x
    loaded = sys.modules.get("cupy")
    if loaded is not None and isinstance(x, loaded.ndarray):
        return x
    if not (hasattr(x, "__dlpack__") or hasattr(x, "__cuda_array_interface__")):
        return x
    if _is_symbolic(x):
        return x
    if _on_cuda(x):
        try:
            import cupy
        except ImportError as error:
            raise DeviceError(
                f"a {type(x).__name__} on a GPU is read through CuPy, which is not installed: "
                "pip install 'scfa-core[cuda13]' (or cuda12)"
            ) from error
        if is_numba_device_array(x):
            return cupy.asarray(x)
        return cupy.from_dlpack(x)
    return _on_host(x)


def _on_host(x: Any) -> np.ndarray:
    """View a DLPack array as NumPy's; bfloat16, of which NumPy's DLPack knows nothing, as its own.

    Libraries that have it, such as JAX, make it an array of ml_dtypes.bfloat16 when asked by NumPy.
    """
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError) as error:
        seen = np.asarray(x) if hasattr(x, "__array__") else None
        if seen is not None and seen.dtype.name in ITEMSIZE:
            return seen
        raise DTypeError(
            f"NumPy cannot read this {type(x).__module__}.{type(x).__name__} of dtype "
            f"{getattr(x, 'dtype', 'unknown')} through DLPack ({error}); convert it to float32, or "
            "give bfloat16 as torch tensors or as NumPy arrays of ml_dtypes.bfloat16"
        ) from error


def restore_kind(x: Any, like: Any) -> Any:
    """Turn a result back into the caller's kind: Numba for Numba, otherwise what it is."""
    if is_numba_device_array(like):
        from numba import cuda

        return cuda.as_cuda_array(x)
    return x
