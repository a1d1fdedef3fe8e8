"""How kernels are compiled: no interpreter lock, cached on disk, one fingerprint of all sources."""

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba

__all__ = ["device_function", "kernel"]

_logger = logging.getLogger("scfa_core.numba_cpu")

# Products may be fused with sums. Nothing is reordered, and NaN and infinity keep their meaning.
_OPTIONS = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}


@cache
def _fingerprint() -> str:
    """Hash of every source file of this backend: numba's own stamp sees the kernel's file only."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def device_function(function: Callable[..., Any]) -> Any:
    """Compile a function that only kernels call; it is part of their cached code."""
    return numba.njit(**_OPTIONS)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile an entry point on its first call and keep the machine code on disk where possible."""
    try:
        dispatcher = numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError as error:  # numba found no folder it may write to
        _logger.warning("compiled code is not cached on disk: %s", error)
        return numba.njit(**_OPTIONS)(function)
    index = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if index is not None and hasattr(index, "_source_stamp"):
        index._source_stamp = (index._source_stamp, _fingerprint())
        return dispatcher
    _logger.warning("compiled code is not cached on disk: unknown cache layout of this numba")
    return numba.njit(**_OPTIONS)(function)
