"""Run one kernel on several threads that draw tiles from a shared counter.

Kernels release the interpreter lock, so plain Python threads run them side by side. Unlike numba's
own parallel layers this may be called from many threads at once, survives `fork`, adds no second
OpenMP runtime beside torch's, and compiles in a fraction of the time. No result depends on which
thread draws which tile.
"""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import numba
import numpy as np
from numba.core.compiler_lock import global_compiler_lock

__all__ = ["run_tiles", "thread_count"]

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def thread_count() -> int:
    """Threads of one call: NUMBA_NUM_THREADS (default: usable cores), torch's limit if lower."""
    count = int(numba.config.NUMBA_NUM_THREADS)
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        count = min(count, torch.get_num_threads())
    return max(count, 1)


def _start_afresh() -> None:
    """Begin again in a forked child, where the threads of the parent do not exist."""
    global _pool, _pool_size, _lock
    _pool, _pool_size, _lock = None, 0, threading.Lock()
    global_compiler_lock.release()


if hasattr(os, "register_at_fork"):
    # A child that is forked while another thread compiles would find numba's lock held for ever and
    # numba's tables half written: the fork waits for it. Who compiles may fork, the lock is his.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=_start_afresh,
    )


def _start(helpers: list[Future[None]], job: list[Callable[[], Any]]) -> None:
    """Ask the pool to run the one `job` once for each helper.

    Where no more threads are to be had, or the interpreter is shutting down, some helpers stay
    pending: the threads that there are do it all.
    """
    global _pool, _pool_size
    count = len(helpers)
    with _lock, suppress(RuntimeError):
        if _pool is None or _pool_size < count:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="scfa"), count
        for helper in helpers:
            _pool.submit(_help, helper, job)


def _help(helper: Future[None], job: list[Callable[[], Any]]) -> None:
    """Run the one `job`, unless its caller is done, has taken it back and has cancelled `helper`.

    Not by the pool's own futures: a pool that fails to start a thread has queued the work, and
    gives no future to cancel it by.
    """
    if not helper.set_running_or_notify_cancel():
        return
    try:
        job[0]()
    except BaseException as error:  # for the thread that waits
        helper.set_exception(error)
    else:
        helper.set_result(None)


def _errors_of(begun: list[Future[None]]) -> list[BaseException]:
    """What helpers raised, once all have ended.

    Ctrl-C and what other signals raise do not cut the wait short, and are errors like theirs:
    helpers are amid a tile, and what they read and write is freed when the call is left.
    """
    errors: list[BaseException] = []
    for helper in begun:
        ended = False
        while not ended:
            try:
                wait([helper])
                ended = True
            except BaseException as error:
                errors.append(error)
    found = (helper.exception() for helper in begun)
    return errors + [error for error in found if error is not None]


def run_tiles(
    kernel: Callable[..., Any], tiles: int, *arguments: Any, helpers: bool = True
) -> None:
    """Call ``kernel(counter, *arguments)`` on as many threads as are useful, and wait.

    Every call of the kernel takes numbers from the int64 `counter` until it has reached `tiles`.
    What one of them raises is raised once all have ended.
    """
    counter = np.zeros(8, np.int64)  # a cache line of its own

    def work() -> None:
        kernel(counter, *arguments)

    count = min(thread_count(), tiles) - 1 if helpers else 0
    futures: list[Future[None]] = [Future() for _ in range(count)]
    job: list[Callable[[], Any]] = [work]
    if futures:
        _start(futures, job)
    try:
        work()
    finally:
        counter[0] += tiles  # after an error: nobody starts another tile
        errors = _errors_of([future for future in futures if not future.cancel()])
        job.clear()  # a pool that lacks threads may hold its queue, and so the arrays, for long
        if errors:
            raise errors[0]
