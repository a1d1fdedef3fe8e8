"""A clock for what makes rows, and a bar that shows how far a sweep is."""

from __future__ import annotations

import importlib.util
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Row = TypeVar("Row")


class OverLimit(Exception):  # noqa: N818 - a reason, not an error
    """A case took longer than the user allows."""


def limited(rows: Iterator[Row], seconds: float | None) -> Iterator[Row]:
    """Pass rows on, and raise OverLimit once making them has taken `seconds`.

    The alarm is set only while a row is being made, never while the caller stores one. A native
    call that runs ends first.
    """
    left = seconds
    while True:
        start = time.monotonic()
        try:
            with _alarm(left, seconds):
                row = next(rows)
        except StopIteration:
            return
        if left is not None:
            left = max(left - (time.monotonic() - start), 1e-6)
        yield row


class Budget:
    """Seconds of a whole sweep, from now; None never ends."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    def left(self, limit: float | None = None) -> float | None:
        """Seconds that a case may take: its limit, or less where the budget ends before."""
        if self.end is None:
            return limit
        left = max(self.end - time.monotonic(), 1e-6)
        return left if limit is None else min(left, limit)

    def spent(self) -> bool:
        """Whether nothing may begin any more."""
        return self.end is not None and time.monotonic() >= self.end


@contextmanager
def _alarm(left: float | None, seconds: float | None) -> Iterator[None]:
    if left is None:
        yield
        return

    def stop(*_: Any) -> None:
        raise OverLimit(f"over the limit of {seconds:g} s for a case")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Give a function to call at the start of each case; a bar on a terminal that has rich."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda name: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), transient=True) as bar:
        task = bar.add_task("", total=total)
        started = 0

        def start(name: str) -> None:
            nonlocal started
            bar.update(task, description=name, completed=started)
            started += 1

        yield start
