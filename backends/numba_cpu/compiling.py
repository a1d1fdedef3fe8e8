"""How kernels are compiled: no interpreter lock, cached on disk, one fingerprint of all sources."""

import hashlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numba
from numba.core.compiler_lock import global_compiler_lock

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
    dispatcher = _cached(function)
    if hasattr(dispatcher, "_compile_for_args"):  # what its first call of each kind goes through
        dispatcher._compile_for_args = _out_of_reach(dispatcher._compile_for_args)
    return dispatcher


def _cached(function: Callable[..., Any]) -> Any:
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


def _out_of_reach(compile_for: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on a thread that no signal interrupts: Python handles them on the main one.

    Ctrl-C amid numba's and llvmlite's own bookkeeping could leave an object of LLVM that two owners
    free: the process crashed, seldom. Now it is raised at once, and the compilation goes on.
    """

    def compile_aside(*arguments: Any, **named: Any) -> Any:
        def compile_here() -> Any:
            return compile_for(*arguments, **named)

        aside = threading.current_thread() is threading.main_thread()
        if not aside or global_compiler_lock.is_locked():  # by this thread: another would wait
            return compile_here()
        compiled: Future[Any] = Future()

        def compile_there() -> None:
            try:
                compiled.set_result(compile_here())
            except BaseException as error:
                compiled.set_exception(error)

        try:
            threading.Thread(target=compile_there, name="scfa-compile").start()
        except RuntimeError:  # no thread to be had
            return compile_here()
        return compiled.result()

    return compile_aside


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
