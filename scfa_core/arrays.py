"""What kind of array is this, and how is it handed to a backend without a copy.

A `Framework` is the little that this package needs from the caller's array library. NumPy's and
CuPy's are here, torch's is in `torch_framework`; `array_kinds` says whose an array is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np

from scfa_core.errors import DeviceError, LayoutError

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
_NUMPY_NAME = {"bfloat16": "uint16"}  # NumPy has no bfloat16: the bits travel as uint16
_NARROW_INTS = ("int8", "int16", "uint8", "uint16")
_WIDE_INTS = ("int32", "int64", "uint32", "uint64")
INT_DTYPES = _NARROW_INTS + _WIDE_INTS
ITEMSIZE = {"bool": 1, "bfloat16": 2} | {
    name: np.dtype(name).itemsize for name in ("float16", "float32", "float64", *INT_DTYPES)
}


class ArrayInfo(NamedTuple):
    """What the door needs to know of an array."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str
    device: str  # "cpu" or "cuda:<ordinal>"


class DeviceArray(NamedTuple):
    """What a CUDA backend receives: raw facts, strides in elements, no framework."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int


class CallContext(Protocol):
    """Where a call runs and where its workspace comes from."""

    device: int  # CUDA ordinal, -1 on the host
    stream: int  # raw stream handle, 0 on the host

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Uninitialised, contiguous workspace in native form, alive until the call returns."""


class Framework(Protocol):
    """The verbs this package needs from an array library."""

    name: str

    def owns(self, x: Any) -> bool:
        """Whether `x` is an array of this library."""

    def info(self, x: Any) -> ArrayInfo:
        """Describe `x`."""

    def swap_heads(self, x: Any) -> Any:
        """View with axes 1 and 2 exchanged."""

    def insert_head(self, x: Any) -> Any:
        """View of a (batch, seqlen) array as (batch, 1, seqlen)."""

    def expand(self, x: Any, shape: tuple[int, ...]) -> Any:
        """View broadcast to `shape` by strides of 0."""

    def cast(self, x: Any, dtype: str) -> Any:
        """Copy of `x` with another integer dtype."""

    def contiguous(self, x: Any) -> Any:
        """Copy of `x` in row-major order."""

    def nonzero(self, x: Any) -> Any:
        """uint8 array, 1 where `x` is not zero; a view if `x` is bool or it is free."""

    def order_uint64(self, x: Any) -> Any:
        """Map uint64 to int64 so that the order stays."""

    def empty(self, shape: tuple[int, ...], dtype: str, device: str) -> Any:
        """Uninitialised contiguous array."""

    def empty_like_order(self, like: Any, shape: tuple[int, ...]) -> Any:
        """Uninitialised array with `like`'s dtype and stride order."""

    def fill(self, x: Any, value: float) -> None:
        """Set every element."""

    def native(self, x: Any, memory: str) -> Any:
        """Hand `x` to a backend: NumPy view for "host", `DeviceArray` for "cuda"."""

    def to_numpy(self, x: Any) -> np.ndarray:
        """Copy to the host (synchronises); for looking, never in the hot path."""

    def context(self, device: str) -> CallContext:
        """Context of the caller's current stream."""


def stride_order(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Axes from slowest to fastest, the last always fastest; ties keep their order.

    Broadcast axes (stride 0) go first: innermost they would scatter every row of a result.
    """
    last = len(strides) - 1
    # As bools, which have an order: while shapes are traced a comparison is symbolic.
    key = {axis: (bool(strides[axis] != 0), -strides[axis]) for axis in range(last)}
    return (*sorted(key, key=key.__getitem__), last)


def strides_in_order(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Dense strides, in elements, of an array of `shape` laid out in `order`."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def cuda_ordinal(device: str) -> int:
    """Ordinal of "cuda:N"; -1 for "cpu"."""
    return -1 if device == "cpu" else int(device.removeprefix("cuda:"))


class HostContext:
    """Workspace from NumPy."""

    device = -1
    stream = 0

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Uninitialised NumPy array; bfloat16 as uint16."""
        return np.empty(shape, _NUMPY_NAME.get(dtype, dtype))


class _ArrayModule:
    """What NumPy and CuPy have in common; `xp` is the module."""

    name: str
    xp: Any

    def owns(self, x: Any) -> bool:
        """Whether `x` is an array of this library."""
        return isinstance(x, self.xp.ndarray)

    def _device(self, x: Any) -> str:
        return "cpu"

    def _on_device_of(self, x: Any) -> AbstractContextManager[Any]:
        """Where work on `x` has to be done."""
        return nullcontext()

    def info(self, x: Any) -> ArrayInfo:
        """Describe `x`."""
        size = x.dtype.itemsize
        strides = tuple(s // size for s in x.strides)
        name: str = x.dtype.name  # the same in either byte order, of which kernels read one
        dtype = name if x.dtype.isnative else f"byte-swapped {name}"
        return ArrayInfo(x.shape, strides, dtype, self._device(x))

    def swap_heads(self, x: Any) -> Any:
        """View with axes 1 and 2 exchanged."""
        return x.swapaxes(1, 2)

    def insert_head(self, x: Any) -> Any:
        """View with an axis of 1 after the batch."""
        return x[:, None]

    def expand(self, x: Any, shape: tuple[int, ...]) -> Any:
        """View broadcast to `shape`."""
        return x if x.shape == shape else self.xp.broadcast_to(x, shape)

    def cast(self, x: Any, dtype: str) -> Any:
        """Copy with another dtype."""
        with self._on_device_of(x):
            return x.astype(dtype)

    def contiguous(self, x: Any) -> Any:
        """Copy in row-major order."""
        with self._on_device_of(x):
            return x.copy(order="C")

    def nonzero(self, x: Any) -> Any:
        """uint8 flags."""
        if x.dtype.name == "bool":
            return x.view("uint8")
        with self._on_device_of(x):
            return (x != 0).view("uint8")

    def order_uint64(self, x: Any) -> Any:
        """Flip the top bit."""
        with self._on_device_of(x):
            return (x ^ self.xp.uint64(1 << 63)).view("int64")

    def empty(self, shape: tuple[int, ...], dtype: str, device: str) -> Any:
        """Uninitialised array."""
        return self.xp.empty(shape, dtype)

    def empty_like_order(self, like: Any, shape: tuple[int, ...]) -> Any:
        """Uninitialised array in the stride order of `like`."""
        order = stride_order(like.strides)
        with self._on_device_of(like):
            base = self.xp.empty(tuple(shape[axis] for axis in order), like.dtype)
        return base.transpose(np.argsort(order).tolist())

    def fill(self, x: Any, value: float) -> None:
        """Set every element."""
        with self._on_device_of(x):
            x[...] = value


class NumpyFramework(_ArrayModule):
    """NumPy arrays, ml_dtypes.bfloat16 among the dtypes."""

    name = "numpy"
    xp = np

    def owns(self, x: Any) -> bool:
        """Whether `x` is an array of NumPy's, without a mask that would be lost."""
        return isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray)

    def native(self, x: np.ndarray, memory: str) -> np.ndarray:
        """Hand `x` over, or say why this memory cannot be served."""
        if memory != "host":
            raise DeviceError(
                "this backend runs on CUDA arrays, got NumPy arrays: move them to the GPU "
                "(cupy.asarray, tensor.cuda()) or choose backend='numba-cpu'"
            )
        return x.view(np.uint16) if x.dtype.name == "bfloat16" else x

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        """Bring to the host."""
        return x

    def context(self, device: str) -> HostContext:
        """Where and how the call runs."""
        return HostContext()


class CupyFramework(_ArrayModule):
    """CuPy arrays; memory from CuPy's pool, work on CuPy's current stream."""

    name = "cupy"

    def __init__(self) -> None:
        import cupy

        self.xp = cupy

    def _device(self, x: Any) -> str:
        return f"cuda:{x.device.id}"

    def info(self, x: Any) -> ArrayInfo:
        """Describe `x`, or refuse strides that kernels cannot count in elements.

        Raises
        ------
        LayoutError
            Such strides, as a field of records has them.
        """
        size = x.dtype.itemsize
        if any(s % size for s, n in zip(x.strides, x.shape, strict=True) if n > 1):
            raise LayoutError(
                f"strides must be whole elements of {size} bytes, got {x.strides} bytes for shape "
                f"{x.shape}; call .copy()"
            )
        return super().info(x)

    def _on_device_of(self, x: Any) -> AbstractContextManager[Any]:
        """CuPy works on the current device, whichever one its arrays are on."""
        device: AbstractContextManager[Any] = x.device
        return device

    def empty(self, shape: tuple[int, ...], dtype: str, device: str) -> Any:
        """Uninitialised array."""
        with self.xp.cuda.Device(cuda_ordinal(device)):
            return self.xp.empty(shape, dtype)

    def native(self, x: Any, memory: str) -> Any:
        """Hand `x` over, or say why this memory cannot be served."""
        if memory != "cuda":
            raise DeviceError(
                "this backend runs on host arrays, got CuPy arrays: use backend='cupy', or "
                "x.get() to bring them to the host"
            )
        shape, strides, dtype, device = self.info(x)
        return DeviceArray(x.data.ptr, shape, strides, dtype, cuda_ordinal(device))

    def to_numpy(self, x: Any) -> np.ndarray:
        """Bring to the host."""
        host: np.ndarray = x.get()
        return host

    def context(self, device: str) -> CallContext:
        """Where and how the call runs."""
        return _CupyContext(self, device)


class _CupyContext:
    """Workspace from CuPy's pool; blocks are kept until the context dies."""

    def __init__(self, framework: CupyFramework, device: str) -> None:
        self._framework = framework
        self._name = device
        self._kept: list[Any] = []
        self.device = cuda_ordinal(device)
        with framework.xp.cuda.Device(self.device):
            self.stream = framework.xp.cuda.get_current_stream().ptr

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """Uninitialised array."""
        x = self._framework.empty(shape, _NUMPY_NAME.get(dtype, dtype), self._name)
        self._kept.append(x)
        array: DeviceArray = self._framework.native(x, "cuda")
        return array._replace(dtype=dtype)
