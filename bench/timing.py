"""How a time is taken: warm, repeated, median and spread, the state of the caches stated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bench.floor import Ceilings


class Timing(NamedTuple):
    """Milliseconds: median, the 20th and 80th percentile, and how many calls."""

    median: float
    low: float
    high: float
    calls: int


def _summary(times: list[float]) -> Timing:
    times = sorted(times)
    last = len(times) - 1
    return Timing(
        statistics.median(times), times[round(0.2 * last)], times[round(0.8 * last)], len(times)
    )


def time_call(run: Callable[[], Any], device: str, budget: float) -> Timing:
    """Repeat `run` for about `budget` seconds (at least 3 calls) after warming up.

    On a GPU by events around each call, L2 flushed before each by writing 256 MB, behind which
    the call is enqueued: the time of the host is `host_microseconds`. On the host by a clock.
    """
    run()
    times: list[float] = []
    if device != "cuda":
        begin = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begin < budget:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return _summary(times)
    scrub = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < budget:
        scrub.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return _summary(times)


def host_microseconds(run: Callable[[], Any], calls: int = 200) -> float:
    """Host time of one asynchronous call, median of batches of 20 with an empty queue."""
    times = []
    for _ in range(max(calls // 20, 1)):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            run()
        times.append((time.perf_counter() - begin) / 20 * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def extra_memory(run: Callable[[], Any], device: str) -> int | None:
    """Bytes that a call holds at its peak beyond what was there before, its results included."""
    if device != "cuda":
        return None
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - before


def measured_ceilings() -> Ceilings:
    """What this card does for torch: a copy of 1 GiB, a bfloat16 product of 8192-squares."""
    source = torch.ones(2**28, dtype=torch.int32, device="cuda")
    copy = time_call(source.clone, "cuda", 0.1).median
    square = torch.randn(8192, 8192, device="cuda").to(torch.bfloat16)
    product = time_call(lambda: square @ square, "cuda", 0.1).median
    return Ceilings(2 * 2**30 / copy / 1e6, 2 * 8192**3 / product / 1e9)
