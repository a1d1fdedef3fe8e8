"""Compile one signature of a kernel through a disk cache whose names are the same in every process.

numba-cuda's own cache names an entry by the pickled closure of the kernel. Ours hold intrinsics,
which pickle differently in every process, so it would never find anything again. Here the name is
the variant's constants and a hash of all sources of this package: after an edit of any of them
kernels are compiled anew.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any
from uuid import uuid4

from numba import cuda
from numba.cuda.dispatcher import CUDACache
from scfa_core.backends.numba_cuda.compiling import Kernel

logger = logging.getLogger("scfa_core")


@cache
def source_fingerprint() -> str:
    """Hash of every source file of this package."""
    digest = hashlib.sha256()
    for source in sorted(files(__package__).iterdir(), key=lambda file: file.name):
        if source.name.endswith(".py"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


class _NamedCache(CUDACache):
    """A cache whose entries are named by us."""

    def __init__(self, function: Callable[..., Any], name: tuple[Any, ...]) -> None:
        self._entry_name = name
        super().__init__(function)
        # numba has one index for all variants of a function, read, changed and written back whole:
        # of two processes that compile at once, one would lose its entry, and code is compiled
        # again. It also numbers the files of code and writes the index before them: processes
        # that compile one variant for different cards would find each other's code.
        index = self._cache_file
        digest = hashlib.sha256(repr(name).encode()).hexdigest()[:16]
        stem = index._index_name.removesuffix(".nbi") + f"-{digest}"
        index._index_name = f"{stem}.nbi"
        index._index_path = os.path.join(index._cache_path, index._index_name)
        index._data_name_pattern = f"{stem}.{uuid4().hex}.{{number:d}}.nbc"

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        """Name of an entry: types, target and compiler versions, and what we call it."""
        return (sig, codegen.magic_tuple(), version("numba-cuda"), self._entry_name)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Load compiled code; None, so that it is made anew, if what lies there is damaged."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # unpickling garbage raises anything
            logger.warning("damaged compiled code of numba-cuda, made anew: %r", error)
            with suppress(OSError):
                self._cache_file.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep compiled code; a full disk is told, the code is there all the same."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            logger.warning("compiled code is not cached on disk: %s", error)


def entry_name(kernel: Kernel) -> tuple[Any, ...]:
    """What a kernel is called in the cache, beside its types and the target."""
    return repr(kernel.variant), kernel.bounds, source_fingerprint()


def compile_kernel(kernel: Kernel) -> Any:
    """Compile a kernel for the current device, or load it; returns numba's dispatcher."""
    options: dict[str, Any] = {"lto": False}
    if kernel.bounds and "launch_bounds" in inspect.signature(cuda.jit).parameters:
        options["launch_bounds"] = kernel.bounds
    dispatcher = cuda.jit(kernel.function, **options)
    try:
        dispatcher._cache = _NamedCache(kernel.function, entry_name(kernel))
    except RuntimeError as error:  # numba found no folder it may write to
        logger.warning("compiled code is not cached on disk: %s", error)
    logger.debug("numba-cuda: compiling or loading %s%s", kernel.function.__name__, kernel.variant)
    dispatcher.compile(tuple(kernel.signature.args))
    dispatcher._specialized = True  # one signature: launches need not look at types
    dispatcher.disable_compile()
    return dispatcher
