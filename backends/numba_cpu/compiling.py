"""How kernels are compiled: no interpreter lock, cached on disk, one fingerprint of all sources."""

import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

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
        _make_robust(index)
        return dispatcher
    _logger.warning("compiled code is not cached on disk: unknown cache layout of this numba")
    return numba.njit(**_OPTIONS)(function)


def _make_robust(index: Any) -> None:
    """Teach numba's disk cache what a damaged file, a full disk and a race with others mean.

    Unreadable files are compiled anew, failing writes are told and not raised. Every piece of code
    has a file name of its own: numba numbers them, and writes the index before the code, so that
    two processes could find each other's code, or an older version's, under their own index.
    """
    load, save, pattern = index.load, index.save, index._data_name_pattern

    def load_or_none(key: Any) -> Any:
        try:
            return load(key)
        except Exception as error:  # unpickling garbage raises anything
            _logger.warning("damaged compiled code in %s, made anew: %r", index._cache_path, error)
            with suppress(OSError):
                index.flush()
            return None

    def save_if_possible(key: Any, data: Any) -> None:
        index._data_name_pattern = pattern.replace("{", f"{uuid4().hex}.{{")
        try:
            save(key, data)
        except OSError as error:
            _logger.warning("compiled code is not cached on disk: %s", error)

    index.load, index.save = load_or_none, save_if_possible
