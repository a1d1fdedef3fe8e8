"""Strong and weak scaling of attention and the paper's model; the longest sequence that fits.

`alone` is one process: every rank runs it at the same time without a word to the others, so that
each row has its baseline from the same cards in the same minutes. Times are medians, of the slowest
rank. Communication is timed by its collectives alone, with the same bytes and nothing to compute;
in a step some of it may overlap, so its share is an upper bound of what it costs.

Strong: time alone / (ranks * time), at the same sequence. Weak: time alone at 1 / ranks of the
sequence and of the buckets (the same work for each rank, as buckets keep their size) / time.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import scfa_core as scfa
from bench import records
from bench.distributed import group
from bench.distributed.models import Paper, rows_of, ways_for
from bench.lm.config import Config
from bench.lm.train import World
from scfa_core import distributed
from scfa_core.distributed_exchange import _all_gather, _reduce_scatter
from scfa_core.terminal import Terminal

BUCKET = {"cuda": 1024, "cpu": 16}  # tokens in one, where buckets grow in number with the sequence
SECONDS = {"cuda": 1.5, "cpu": 0.1}  # of repeats of one case, about
HEADROOM = 0.97  # of the memory free on the fullest card, for tensors
PASSES = 3  # exchanges forward, again when recomputed, and backward
SHARES = {"attention": 0.25, "model": 0.45, "longest": 0.3}  # of the budget
MEMORY = "out of memory"
ALONE, DATA = "alone", "data parallel"

Row = dict[str, Any]


def equal_memory(where: World) -> float:
    """Give all ranks the same memory, so that what does not fit fails on all at the same tensor.

    A rank that ran out alone would leave the others waiting in a collective. In GiB; 0 on a CPU.
    """
    if not where.device.startswith("cuda"):
        return 0.0
    dist.barrier()  # the transport has its buffers by now
    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved()
    least = -group.largest(-float(free + held), where) * HEADROOM
    torch.cuda.set_per_process_memory_fraction(min(least / total, 1.0))
    return least / 2**30


def timed(call: Callable[[], object], where: World, warm: int = 1) -> Row:
    """Milliseconds of the slowest rank: median, and lowest and highest of the repeats."""
    for _ in range(warm):
        call()
    where.synchronize()
    dist.barrier()
    begin = time.perf_counter()
    call()
    where.synchronize()
    once = group.largest(time.perf_counter() - begin, where)
    repeats = max(3, min(20, int(SECONDS[where.device.partition(":")[0]] / max(once, 1e-9))))
    times = []
    if where.device.startswith("cuda"):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    else:
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    low, middle, high = min(times), statistics.median(times), max(times)
    return {
        "ms": group.largest(middle, where),
        "low": group.largest(low, where),
        "high": group.largest(high, where),
        "repeats": repeats,
    }


def collectives(
    way: str, shape: tuple[int, ...], dtype: torch.dtype, layers: int, weights: int, where: World
) -> Callable[[], None]:
    """Return what only communicates, as one step of `way` does with q of `shape` on each rank.

    `layers` of a model exchange forward, again when recomputed, and backward, then the gradients of
    `weights` float32 weights are summed; attention alone (0 weights) is not recomputed.
    """
    forwards = PASSES - 1 if weights else 1
    gradient = torch.zeros(weights, device=where.device)

    def buffer(tensors: int) -> Tensor:
        return torch.zeros((tensors, *shape), dtype=dtype, device=where.device).flatten()

    one, two, three = buffer(1), buffer(2), buffer(3)
    all_two = buffer(2 * where.size if way == "all-gather" else 0)
    received = torch.empty_like(three)

    def step() -> None:
        for _ in range(layers):
            if way == "all-to-all":  # q, k and v, then out, and the gradients of each
                for _ in range(forwards + 1):
                    dist.all_to_all_single(received, three)
                    dist.all_to_all_single(received[: len(one)], one)
            elif way == "all-gather":  # k and v, and their gradients
                for _ in range(forwards):
                    _all_gather(all_two, two)
                _reduce_scatter(two, all_two)
        if weights:
            dist.all_reduce(gradient)

    return step


@dataclasses.dataclass
class Bench:
    """One sitting: settings, rows so far, time left."""

    where: World
    config: Config
    seconds: float
    json_path: Path | None
    record: Row
    began: float = dataclasses.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.cuda = self.where.device.startswith("cuda")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.known: dict[tuple[Any, ...], float] = {}

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.seconds - (time.monotonic() - self.began)

    def keep(self, row: Row) -> None:
        """Add a row to the file, and say it."""
        self.record["rows"].append(row)
        if not self.where.leads:
            return
        print(describe(row), flush=True)
        if self.json_path is not None:
            records.write(self.json_path, self.record)

    def clear(self) -> None:
        """Free what a case held."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def attempt(self, work: Callable[[], Row]) -> Row:
        """Run a case; one that does not fit, or fails otherwise, says so on every rank."""
        found: Row = {}
        self.clear()
        with group.guard():
            try:
                found = work()
            except torch.OutOfMemoryError:
                found = {"error": MEMORY}
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"[:300]}
                print(f"rank {self.where.rank}: {found['error']}", flush=True)
            self.clear()
            if group.anywhere("error" in found, self.where):
                found = {"error": found.get("error", "failed on another rank")}
        return found

    def case(self, what: str, way: str, seqlen: int, buckets: int) -> Row | None:
        """Time one case once; None where the budget is spent."""
        key = (what, way, seqlen, buckets)
        if key in self.known:
            return None
        if not group.told(self.left > 0, self.where):
            self.record["not_begun"] = self.record.get("not_begun", 0) + 1
            return None
        build = self._attention if what == "attention" else self._model
        row = {"what": what, "way": way, "seqlen": seqlen, "buckets": buckets}
        row |= self.attempt(lambda: self._measure(build, way, seqlen, buckets))
        if "ms" in row:
            self.known[key] = row["ms"]
            tokens = seqlen * (self.where.size if way == DATA else 1)
            row["tokens_per_s"] = 1e3 * tokens / row["ms"]
            row |= self._efficiency(what, way, seqlen, buckets, row["ms"])
        self.keep(row)
        return row

    def _measure(self, build: Callable[..., Any], way: str, seqlen: int, buckets: int) -> Row:
        call, communicate = build(way, seqlen, buckets)
        row = timed(call, self.where)
        if self.cuda:
            row["peak_gib"] = group.largest(torch.cuda.max_memory_allocated() / 2**30, self.where)
        if communicate is not None:
            row["comm_ms"] = timed(communicate(), self.where)["ms"]
            row["comm_share"] = row["comm_ms"] / row["ms"]
        return row

    def _efficiency(self, what: str, way: str, seqlen: int, buckets: int, ms: float) -> Row:
        ranks, found = self.where.size, {}
        if way == ALONE:
            return {}
        strong = self.known.get((what, ALONE, seqlen, buckets))
        if way == DATA:  # each rank has a sequence of its own: weak scaling
            return {} if strong is None else {"weak": strong / ms}
        weak = self.known.get((what, ALONE, seqlen // ranks, buckets // ranks))
        if strong is not None:
            found["strong"] = strong / (ranks * ms)
        if weak is not None and buckets % ranks == 0:
            found["weak"] = weak / ms
        return found

    def _attention(self, way: str, seqlen: int, buckets: int) -> tuple[Any, Any]:
        """Forward and backward of hash attention, even buckets, one sequence."""
        config, where = self.config, self.where
        generator = torch.Generator(where.device).manual_seed(0)
        whole = (1, config.heads, seqlen)
        bucket = torch.randint(
            0, buckets, whole, generator=generator, device=where.device, dtype=torch.int32
        )
        pattern = scfa.HashSparse(bucket, bucket, include_self=False)
        rows = None if way == ALONE else rows_of(way, seqlen, where.device)
        shape = (1, config.heads, seqlen if rows is None else len(rows), config.head_dim)
        q, k, v, dout = (
            torch.randn(shape, generator=generator, device=where.device, dtype=self.dtype)
            for _ in range(4)
        )
        tensors = [x.requires_grad_() for x in (q, k, v)]

        def step() -> None:
            if rows is None:
                out = scfa.attention(q, k, v, pattern, backend=config.backend)
            elif way == "all-to-all":
                out = distributed.ulysses_attention(q, k, v, pattern, backend=config.backend)
            else:
                out = distributed.gathered_attention(
                    q, k, v, pattern, rows=rows, backend=config.backend
                )
            torch.autograd.grad(out, tensors, dout)

        if rows is None:
            return step, None
        return step, lambda: collectives(way, shape, self.dtype, 1, 0, where)

    def _model(self, way: str, seqlen: int, buckets: int) -> tuple[Any, Any]:
        """Whole training steps of the paper's model, optimiser included, one sequence a step."""
        where = self.where
        name = f"hash{buckets}r" if buckets else "dense"
        config = dataclasses.replace(self.config, attention=name, seqlen=seqlen)
        sharded = way not in (ALONE, DATA)
        rows = rows_of(way, seqlen, where.device) if sharded else None
        torch.manual_seed(0)
        with torch.device(where.device):
            model = Paper(config, rows, way if sharded else None)
        run: nn.Module = model if way == ALONE else DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        local = seqlen if rows is None else len(rows)
        generator = torch.Generator(where.device).manual_seed(where.rank if way == DATA else 0)
        # Ids as frequent as words are: of rank r about 1 / r.
        drawn = torch.rand(seqlen + 1, generator=generator, device=where.device)
        text = (config.vocabulary**drawn).long().clamp(max=config.vocabulary) - 1
        at = torch.arange(seqlen, device=where.device) if rows is None else rows
        before, after = text[at][None], text[at + 1][None]
        state = {"step": 0}

        def step() -> None:
            state["step"] += 1
            torch.manual_seed(state["step"])  # the hash's directions, the same on all ranks
            with torch.autocast(where.device.partition(":")[0], torch.bfloat16, enabled=self.cuda):
                loss: Tensor = run(before, after)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if way == ALONE:
            return step, None
        position = model.inner.embed.position.weight.numel() if sharded else 0
        weights = sum(p.numel() for p in model.parameters()) - position
        shape = (1, config.heads, local, config.head_dim)
        layers = config.layers
        return step, lambda: collectives(way, shape, self.dtype, layers, weights, where)

    def longest(self, way: str, first: int, most: int) -> None:
        """Double the sequence until a training step does not fit, the budget ends or `most`."""
        seqlen, fits, why, took = first, 0, "limit", 0.0
        while seqlen <= most:
            if not group.told(self.left > 3 * took, self.where):
                why = "time"
                break
            begin, buckets = time.monotonic(), self.buckets_of(seqlen, 0)

            def once(seqlen: int = seqlen, buckets: int = buckets) -> Row:
                step, _ = self._model(way, seqlen, buckets)
                step()
                step()  # with the optimiser's state there
                self.where.synchronize()
                peak = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0
                return {"peak_gib": group.largest(peak, self.where)}

            found = self.attempt(once)
            took = time.monotonic() - begin
            if "error" in found:
                why = "memory" if found["error"] == MEMORY else found["error"]
                break
            fits, peak, seqlen = seqlen, found["peak_gib"], 2 * seqlen
        row = {"what": "longest", "way": way, "seqlen": fits, "stopped_by": why}
        self.keep(row | ({"peak_gib": peak} if fits else {}))

    def buckets_of(self, seqlen: int, asked: int) -> int:
        """Return `asked`, or for 0 an even number that keeps buckets at the same size."""
        return asked or max(2, seqlen // self.record["bucket_size"] // 2 * 2)


def describe(row: Row) -> str:
    """One row in words, as it is made."""
    if row["what"] == "longest":
        return f"longest sequence, {row['way']}: {row['seqlen']} (ended by {row['stopped_by']})"
    text = f"{row['what']:9s} {row['way']:13s} T={row['seqlen']:7d} hash{row['buckets']:<4d}"
    if "error" in row:
        return f"{text} {row['error']}"
    text += f" {row['ms']:9.2f} ms {row['tokens_per_s']:12,.0f} tokens/s"
    for name in ("strong", "weak", "comm_share"):
        if name in row:
            text += f"  {name.replace('_', ' ')} {100 * row[name]:.0f} %"
    return text


def run(
    where: World,
    config: Config,
    *,
    lengths: list[int],
    buckets: list[int],
    parts: list[str],
    most: int,
    budget: float,
    json_path: Path | None,
    commit: str | None,
) -> int:
    """Time every case in order of weight, until the budget is spent; return 0 if any was timed."""
    record = group.head("distributed-scale", where, commit)
    record["config"] = dataclasses.asdict(config)
    record["bucket_size"] = BUCKET[where.device.partition(":")[0]]
    bench = Bench(where, config, budget, json_path, record)
    record["memory_gib"] = equal_memory(where)
    ways = ways_for(config.heads, where.size)
    baselines = [x // where.size for x in lengths]
    shares = [SHARES[part] for part in parts]
    for nth, what in enumerate(parts):
        bench.seconds = budget * sum(shares[: nth + 1]) / sum(shares)
        if what == "longest":
            for way in [ways[0], ALONE] if where.size > 1 else [ALONE]:
                bench.longest(way, max(lengths), most)
            continue
        # Buckets of one size first: each length is then the next one's weak baseline.
        for asked in sorted(buckets):
            for seqlen in sorted({*lengths, *(baselines if asked == 0 else ())}):
                count = bench.buckets_of(seqlen, asked)
                bench.case(what, ALONE, seqlen, count)
                if seqlen not in lengths or where.size == 1:
                    continue
                for way in ways:
                    bench.case(what, way, seqlen, count)
                if what == "model" and asked == 0:
                    bench.case(what, DATA, seqlen, count)
    rows = [row for row in record["rows"] if "ms" in row]
    if where.leads:
        Terminal().table(
            ["what", "way", "T", "buckets", "ms", "tokens/s", "strong", "weak", "comm"],
            [
                [
                    row["what"], row["way"], row["seqlen"], row["buckets"], f"{row['ms']:.2f}",
                    f"{row['tokens_per_s']:.0f}",
                    *(f"{100 * row[x]:.0f} %" if x in row else "-"
                      for x in ("strong", "weak", "comm_share")),
                ]
                for row in rows
            ],
        )  # fmt: skip
        if record.get("not_begun"):
            print(f"{record['not_begun']} cases not begun: the budget is spent")
        if json_path is not None:
            records.write(json_path, record)
    return 0 if rows or "longest" in parts else 1
