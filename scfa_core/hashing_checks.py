"""What hashing is given: arrays of one library and device, and integers."""

from __future__ import annotations

from typing import Any

from scfa_core.array_kinds import adopt, framework_of, is_torch_tensor
from scfa_core.arrays import INT_DTYPES
from scfa_core.errors import DeviceError, DTypeError

__all__ = ["check_integers", "of_one_library"]


def of_one_library(**given: Any) -> list[Any]:
    """Arrays of one library and device, those of Numba and DLPack as CuPy's or NumPy's.

    What is None is left out, but for the first two.
    """
    named = {n: adopt(x) for i, (n, x) in enumerate(given.items()) if i < 2 or x is not None}
    first, *_ = named
    if not all(is_torch_tensor(x) for x in named.values()):
        for name, x in named.items():
            if framework_of(name, x) is not framework_of(first, named[first]):
                raise DeviceError(
                    f"{name} must come from the library of {first}, {_kind(named[first])}, got "
                    f"{_kind(x)}; convert one of them (torch.from_numpy, cupy.asarray)"
                )
    place = getattr(named[first], "device", None)
    for name, x in named.items():
        if getattr(x, "device", None) != place:
            raise DeviceError(
                f"{name} must be on the device of {first}, {place}, got {x.device}; move one of "
                "them"
            )
    return list(named.values())


def _kind(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__name__}"


def check_integers(name: str, x: Any) -> None:
    """Refuse buckets that are no integers."""
    kind = str(x.dtype).removeprefix("torch.")
    if kind not in INT_DTYPES:
        raise DTypeError(f"{name} must hold integers, as angular_hash returns them, got {kind}")
