"""Seeds spread over processes: a GPU answers at once, the float64 truth takes a core its time.

Every process draws, runs and judges problems of its own, with one BLAS thread and, on a GPU, with
its own context; kernels that one has compiled the others find on disk.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from scfa_core.errors import ScfaError

S = TypeVar("S")
T = TypeVar("T")

AHEAD = 64  # seeds given out for each process: one that compiles must not stop the others
LOOK_EVERY = 0.1  # seconds between two looks whether Ctrl-C has come
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


def _begin() -> None:
    """What each process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the parent ends the others
    # Compilers make very many objects that live on: looking for garbage among them takes long.
    gc.set_threshold(100_000, 50, 100)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed tells nobody: what it had given out would be computed to the end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Pool(NamedTuple):
    """Processes, started as work comes, and how many there may be."""

    executor: ProcessPoolExecutor
    workers: int


@contextmanager
def _ctrl_c_as(event: threading.Event) -> Iterator[None]:
    """An exception amid the locks of a pool could leave one held, and the pool would never end."""
    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not raises or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def processes(workers: int) -> Iterator[Pool]:
    """Processes to be used by `in_processes`, several times if need be."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    try:
        yield Pool(executor, workers)
    except KeyboardInterrupt:  # nobody waits for what they are at
        for process in list((executor._processes or {}).values()):
            process.terminate()
        executor.shutdown()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def in_processes(
    task: Callable[[S], T],
    seeds: Iterable[S],
    pool: Pool,
    deadline: float | None = None,
    what: str = "seeds",
) -> Iterator[T]:
    """Yield ``task(seed)`` of every seed, in order, computed by the processes of `pool`.

    Parameters
    ----------
    task : callable
        Of a kind that can be pickled.
    deadline : float, optional
        Of ``time.monotonic()``: seeds not begun by then, the last ones, are left out.
    what : str
        What a message calls seeds.

    Raises
    ------
    ScfaError
        A process died; the message names the seeds among which the cause is.
    KeyboardInterrupt
        Ctrl-C has come while a result was waited for.
    """
    interrupted = threading.Event()
    remaining = iter(seeds)
    waiting: deque[tuple[S, Future[T]]] = deque()
    try:
        while True:
            left = LOOK_EVERY if deadline is None else max(deadline - time.monotonic(), 0.0)
            with _ctrl_c_as(interrupted), _one_thread_each():
                while len(waiting) < AHEAD * pool.workers:
                    seed = next(remaining, None)
                    if seed is None:
                        break
                    waiting.append((seed, pool.executor.submit(task, seed)))
                first = [future for _, future in waiting][:1]
                done = wait(first, min(left, LOOK_EVERY)).done
            if interrupted.is_set():
                raise KeyboardInterrupt
            if not waiting:
                return
            if done:
                yield first[0].result()
                waiting.popleft()
            elif left < LOOK_EVERY:
                remaining, deadline = iter(()), None
                waiting = deque(entry for entry in waiting if not entry[1].cancel())
    except BrokenProcessPool as error:
        if interrupted.is_set():
            raise KeyboardInterrupt from None
        begun = [seed for seed, future in waiting if not future.done() or future.exception()]
        where = f"while it had nothing to do, after some of the {what}"
        if begun:
            where = (
                f"at one of the {what} {begun[0]} to {begun[: 3 * pool.workers][-1]}: run these "
                "without workers to see at which"
            )
        raise ScfaError(f"a process died {where} ({error})") from error
    finally:
        if not interrupted.is_set():  # an executor that ends trips over cancelled ones
            for _, future in waiting:
                future.cancel()
