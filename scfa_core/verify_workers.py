"""Seeds spread over processes: a GPU answers at once, the float64 truth takes a core its time.

Every process draws, runs and judges problems of its own, with one BLAS thread and, on a GPU, with
its own context; kernels that one has compiled the others find on disk.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from scfa_core.errors import ScfaError

T = TypeVar("T")

AHEAD = 64  # seeds given out for each process: one that compiles must not stop the others
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started in here use one thread: libraries read these variables when they load."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def in_processes(
    task: Callable[[int], T], seeds: range, workers: int, deadline: float | None = None
) -> Iterator[T]:
    """Yield ``task(seed)`` of every seed, in order, computed by `workers` processes.

    Parameters
    ----------
    task : callable
        Of a kind that can be pickled.
    deadline : float, optional
        Of ``time.monotonic()``: seeds not begun by then, the last ones, are left out.

    Raises
    ------
    ScfaError
        A process died; the message names the seeds among which the cause is.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    remaining = iter(seeds)
    waiting: deque[tuple[int, Future[T]]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        while True:
            with _one_thread_each():
                while len(waiting) < AHEAD * workers:
                    seed = next(remaining, None)
                    if seed is None:
                        break
                    waiting.append((seed, pool.submit(task, seed)))
            if not waiting:
                return
            future = waiting[0][1]
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if wait([future], left).done:
                yield future.result()
                waiting.popleft()
            else:
                remaining, deadline = iter(()), None
                waiting = deque(entry for entry in waiting if not entry[1].cancel())
    except BrokenProcessPool as error:
        begun = [seed for seed, future in waiting if not future.done() or future.exception()]
        raise ScfaError(
            f"a process died at one of the seeds {begun[0]} to {begun[: 3 * workers][-1]}: run "
            f"these without workers to see at which ({error})"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
