"""Few queries on many keys, as when decoding: this package beside torch's kernels.

    python -m bench decode
    python -m bench decode --device cpu

Keys and values are a cache's: the queries are the last rows. On a GPU calls are captured in a CUDA
graph, as whoever decodes does, and timed by its replay, so that no time of the host is in it; calls
take one cache after the other, more than L2 holds. On the host the fastest call counts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

import scfa_core as scfa
from bench.limits import progress
from bench.machine import machine
from bench.records import read, writable, write
from scfa_core.decoding import at_end

KIND = "decode"
CACHE_BYTES = 2**28  # of all caches that take turns, at least
CALLS = 16  # of one graph
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # as in bench.inputs
DENSE = {  # torch's kernels: name -> SDPBackend
    "sdpa-cudnn": "CUDNN_ATTENTION",
    "sdpa-flash": "FLASH_ATTENTION",
}


class Step(NamedTuple):
    """Sizes of one call."""

    batch: int
    heads: int
    heads_kv: int
    head_dim: int
    keys: int
    queries: int = 1

    @property
    def words(self) -> str:
        """For a table."""
        return (
            f"batch {self.batch}, heads {self.heads} / {self.heads_kv}, head_dim {self.head_dim}, "
            f"{self.queries} on {self.keys}"
        )


STEPS = {
    "cuda": (
        Step(1, 32, 8, 128, 8192),
        Step(1, 32, 8, 128, 131072),
        Step(16, 32, 8, 128, 8192),
        Step(64, 32, 8, 128, 8192),
        Step(1, 12, 12, 64, 16384),
        Step(16, 12, 12, 64, 16384),
        Step(8, 32, 8, 128, 32768, 4),
    ),
    "cpu": (Step(1, 8, 8, 64, 8192), Step(1, 32, 8, 128, 8192), Step(1, 8, 8, 64, 8192, 4)),
}


class Cache(NamedTuple):
    """What one call reads."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    hashes: tuple[torch.Tensor, torch.Tensor]


def make_cache(step: Step, device: str, dtype: torch.dtype) -> Cache:
    """Random normal rows, 16 buckets."""

    def rows(heads: int, count: int) -> torch.Tensor:
        shape = (step.batch, heads, count, step.head_dim)
        return torch.randn(shape, device=device, dtype=dtype)

    q = rows(step.heads, step.queries)
    k, v = (rows(step.heads_kv, step.keys) for _ in range(2))
    q_hash, k_hash = (
        torch.randint(0, 16, x.shape[:3], device=device, dtype=torch.int32) for x in (q, k)
    )
    return Cache(q, k, v, (q_hash, k_hash))


def pattern_of(name: str, cache: Cache) -> scfa.Pattern:
    """What the queries at the end see."""
    if name == "dense":
        return scfa.Causal(align="bottom-right")
    if name == "window1024":
        return at_end(scfa.SlidingWindow(1024), cache.q, cache.k)
    return at_end(scfa.HashSparse(*cache.hashes), cache.q, cache.k)


def check(out: torch.Tensor, cache: Cache, pattern: scfa.Pattern) -> None:
    """Hold one sequence's first head to float64."""
    mask = pattern.mask(
        *(cache.q.shape[2], cache.k.shape[2]),
        batch=cache.q.shape[0], heads=cache.q.shape[1], heads_kv=cache.k.shape[1],
    )[-1, 0]  # fmt: skip
    q, k, v = (x[-1, 0].double().cpu() for x in cache[:3])
    scores = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~torch.from_numpy(mask), -torch.inf)
    want = torch.softmax(scores, -1).nan_to_num(0.0) @ v
    error = (out[-1, 0].double().cpu() - want).norm() / want.norm()
    if not error <= TOLERANCE[out.dtype]:
        raise AssertionError(f"relative error {float(error):.2e}")


Calls = list[Callable[[], torch.Tensor]]


def ours(name: str, caches: list[Cache], *, planned: bool) -> Calls:
    """One call for each cache, checked."""
    patterns = [pattern_of(name, cache) for cache in caches]
    check(scfa.attention(*caches[0][:3], patterns[0]), caches[0], patterns[0])
    seen: list[Any] = list(patterns)
    if planned:
        seen = [scfa.make_plan(p, c.q, c.k) for p, c in zip(patterns, caches, strict=True)]
    return [
        lambda cache=cache, what=what: scfa.attention(*cache[:3], what)
        for cache, what in zip(caches, seen, strict=True)
    ]


def torchs(kernel: str | None, caches: list[Cache]) -> Calls:
    """The same of torch's dense attention, by one of its kernels or by its own choice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    grouped = caches[0].q.shape[1] != caches[0].k.shape[1]
    several = caches[0].q.shape[2] > 1  # a few rows more or less that they see do not matter

    def run(cache: Cache) -> torch.Tensor:
        return functional.scaled_dot_product_attention(*cache[:3], enable_gqa=grouped)

    def held(cache: Cache) -> torch.Tensor:
        if kernel is None:
            return run(cache)
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return run(cache)

    if not several:
        check(held(caches[0]), caches[0], scfa.Causal(align="bottom-right"))
    return [lambda cache=cache: held(cache) for cache in caches]


def microseconds(calls: Calls, device: str, seconds: float) -> float:
    """Of one call: the median of a graph's replays, or the fastest on the host."""
    turns = itertools.cycle(calls)
    for call in calls:
        call()
    times: list[float] = []
    begin = time.perf_counter()
    if device == "cpu":
        while len(times) < 5 or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            next(turns)()
            times.append(1e6 * (time.perf_counter() - start))
        return min(times)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            next(turns)()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / CALLS)
    return statistics.median(times)


def measure(step: Step, device: str, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """A row of the table: microseconds by name, None where a kernel does not serve."""
    torch.manual_seed(0)
    one = 2 * step.batch * step.heads_kv * step.keys * step.head_dim * dtype.itemsize
    count = 1 if device == "cpu" else max(1, min(CALLS, -(-CACHE_BYTES // one)))
    caches = [make_cache(step, device, dtype) for _ in range(count)]
    found: dict[str, float | None] = {}
    peers = DENSE if device == "cuda" else {"torch": None}
    with torch.no_grad():
        for name, kernel in peers.items():
            try:
                found[name] = microseconds(torchs(kernel, caches), device, seconds)
            except RuntimeError:  # it takes no such call
                found[name] = None
        for name in ("dense", "window1024", "hash16"):
            found[name] = microseconds(ours(name, caches, planned=False), device, seconds)
        found["hash16, plan given"] = microseconds(
            ours("hash16", caches, planned=True), device, seconds
        )
    rounded = {name: None if us is None else round(us, 1) for name, us in found.items()}
    return {**step._asdict(), "bytes": one, "us": rounded}


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    rows = record["rows"]
    names = list(rows[0]["us"])
    lines = ["| sizes | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        step = Step(**{name: row[name] for name in Step._fields})
        cells = ["-" if row["us"][name] is None else f"{row['us'][name]:.0f}" for name in names]
        lines.append(f"| {step.words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Time, print a table, write a record."""
    parser = argparse.ArgumentParser(
        prog="python -m bench decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each number")
    parser.add_argument("--json", type=writable, help="file for the record")
    parser.add_argument("--table", type=Path, help="print the table of such a file, time nothing")
    parser.add_argument("--commit", help="of the sources, where git cannot tell")
    options = parser.parse_args(argv)
    if options.table:
        print(table(read(options.table)))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --device cpu times the host")
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    record: dict[str, Any] = {
        "kind": KIND,
        "machine": machine(options.device, options.commit),
        "unit": "microseconds of a call",
        "dtype": str(dtype).removeprefix("torch."),
        "rows": [],
    }
    steps = STEPS[options.device]
    with progress(len(steps)) as started:
        for step in steps:
            started(step.words)
            record["rows"].append(measure(step, options.device, dtype, options.seconds))
    print(table(record))
    if options.json:
        write(options.json, record)
    return 0
