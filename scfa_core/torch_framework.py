"""torch as a `Framework`: tensors reach a backend without a copy, memory is torch's allocator's.

Nothing here may see a tensor without storage (fake, functional, batched): those stop at the
operators' fake implementations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from scfa_core.array_kinds import check_dense
from scfa_core.arrays import (
    FLOAT_DTYPES,
    INT_DTYPES,
    ArrayInfo,
    CallContext,
    DeviceArray,
    HostContext,
    cuda_ordinal,
    stride_order,
    strides_in_order,
)
from scfa_core.errors import DeviceError
from scfa_core.torch_counters import WORDS, take_counters

Shape = tuple[int, ...]

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("bool", *FLOAT_DTYPES, *INT_DTYPES)
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ONE = (1,)
_SIGN_BIT = torch.iinfo(torch.int64).min


def dtype_name(dtype: torch.dtype) -> str:
    """NumPy's spelling of a torch dtype."""
    return _NAMES.get(dtype) or str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """Name a device: "cpu", "cuda:0", ...; the ordinal always where there can be several."""
    return device.type if device.index is None or device.type == "cpu" else str(device)


def host_view(x: torch.Tensor) -> np.ndarray:
    """NumPy view of a CPU tensor's memory; bfloat16 as uint16.

    ``Tensor.numpy`` shares memory as DLPack does, in a third of its time and writable.
    """
    if x.requires_grad:
        x = x.detach()
    view: np.ndarray = (x.view(torch.uint16) if x.dtype is torch.bfloat16 else x).numpy()
    return view


def _public_raw_stream(ordinal: int) -> int:
    return int(torch.cuda.current_stream(ordinal).cuda_stream)


# Handle of torch's current stream on one GPU; the private getter is what compiled torch code calls,
# and builds no Stream object. CPU builds of torch lack it.
raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", _public_raw_stream
)


# Ordinal of torch's current GPU; only asked where there are CUDA tensors, so CUDA is initialised.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def empty_cpu(shape: Shape, strides: Shape, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised tensor on the host."""
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


def _public_empty_cuda(shape: Shape, strides: Shape, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# Uninitialised tensor on the current GPU; again the one that compiled torch code calls, which
# passes by the dispatcher and takes half the time.
empty_cuda: Callable[[Shape, Shape, torch.dtype], torch.Tensor] = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None),
    "_empty_strided_cuda",
    _public_empty_cuda,
)


class TorchContext:
    """Current stream and torch's allocator; workspace lives as long as the context.

    Made and used with its device current.
    """

    __slots__ = ("_kept", "device", "stream")

    def __init__(self, ordinal: int, stream: int) -> None:
        self.device = ordinal
        self.stream = stream
        self._kept: list[torch.Tensor] = []

    def empty(self, shape: Shape, dtype: str) -> DeviceArray:
        """Uninitialised contiguous workspace; freed in stream order by torch's allocator."""
        strides = _ONE if len(shape) == 1 else strides_in_order(shape, tuple(range(len(shape))))
        x = empty_cuda(shape, strides, DTYPES[dtype])
        self._kept.append(x)
        return DeviceArray(x.data_ptr(), shape, strides, dtype, self.device)

    def counters(self) -> int:
        """Address of two int32 that are 0 and nobody else's, for one launch or two."""
        if self.stream == 0:
            address, memory = take_counters(self.device)
        else:
            memory = empty_cuda((WORDS,), _ONE, torch.int32).zero_()
            address = memory.data_ptr()
        self._kept.append(memory)
        return address


class TorchFramework:
    """torch tensors on the host or a GPU."""

    name = "torch"

    def owns(self, x: Any) -> bool:
        """Whether `x` is a tensor."""
        return isinstance(x, torch.Tensor)

    def info(self, x: torch.Tensor) -> ArrayInfo:
        """Describe `x`."""
        check_dense("each tensor", x)
        return ArrayInfo(tuple(x.shape), x.stride(), dtype_name(x.dtype), device_name(x.device))

    def swap_heads(self, x: torch.Tensor) -> torch.Tensor:
        """View with axes 1 and 2 exchanged."""
        return x.transpose(1, 2)

    def insert_head(self, x: torch.Tensor) -> torch.Tensor:
        """View of a (batch, seqlen) tensor as (batch, 1, seqlen)."""
        return x.unsqueeze(1)

    def expand(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """View broadcast to `shape` by strides of 0."""
        return x.expand(shape)

    def cast(self, x: torch.Tensor, dtype: str) -> torch.Tensor:
        """Copy of `x` with another integer dtype."""
        return x.to(DTYPES[dtype])

    def contiguous(self, x: torch.Tensor) -> torch.Tensor:
        """Copy of `x` in row-major order."""
        return x.contiguous()

    def nonzero(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 tensor, 1 where `x` is not zero; a view if `x` is bool."""
        if x.dtype in (torch.uint16, torch.uint32, torch.uint64):
            x = x.view(DTYPES[dtype_name(x.dtype)[1:]])  # torch compares signed integers only
        return (x if x.dtype is torch.bool else x != 0).view(torch.uint8)

    def order_uint64(self, x: torch.Tensor) -> torch.Tensor:
        """Map uint64 to int64 so that the order stays."""
        return x.view(torch.int64) ^ _SIGN_BIT

    def empty(self, shape: tuple[int, ...], dtype: str, device: str) -> torch.Tensor:
        """Uninitialised contiguous tensor."""
        return torch.empty(shape, dtype=DTYPES[dtype], device=device)

    def empty_like_order(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Uninitialised tensor with `like`'s dtype and stride order."""
        strides = strides_in_order(shape, stride_order(like.stride()))
        return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)

    def fill(self, x: torch.Tensor, value: float) -> None:
        """Set every element."""
        x.fill_(value)

    def native(self, x: torch.Tensor, memory: str) -> Any:
        """NumPy view for "host", `DeviceArray` for "cuda"."""
        if memory == "host":
            if x.device.type != "cpu":
                raise DeviceError(
                    f"this backend runs on host arrays, got a tensor on {x.device}: use "
                    "backend='auto', or .cpu() to bring it to the host"
                )
            return host_view(x)
        shape, strides, dtype, device = self.info(x)
        if not device.startswith("cuda"):
            raise DeviceError(
                f"this backend runs on CUDA tensors, got one on {device}: call .cuda() or "
                "choose backend='numba-cpu'"
            )
        return DeviceArray(x.data_ptr(), shape, strides, dtype, cuda_ordinal(device))

    def to_numpy(self, x: torch.Tensor) -> np.ndarray:
        """Copy to the host (synchronises); bfloat16 as float32, for NumPy knows values alone so."""
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            raise DeviceError(
                "values are read here, and inside torch.func (vmap, grad) a tensor has none to "
                "read: look at it outside"
            )
        x = x.detach().cpu().resolve_neg()
        return host_view(x.float() if x.dtype is torch.bfloat16 else x)

    def context(self, device: str) -> CallContext:
        """Context of torch's current stream; to be used with `device` current."""
        if device == "cpu":
            return HostContext()
        ordinal = cuda_ordinal(device)
        return TorchContext(ordinal, raw_stream(ordinal))


TORCH_FRAMEWORK = TorchFramework()
