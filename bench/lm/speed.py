"""Whole training steps timed: variants beside dense attention and the attention-free bound."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import records
from bench.lm import kernels
from bench.lm.config import Config
from bench.lm.data import Corpus
from bench.lm.train import Trainer, World
from bench.machine import machine

BOUND = "none"
MODES = {"no": (False,), "both": (False, True), "only": (True,)}  # whether steps are graphs

_COMPILE = """
import sys, torch, scfa_core as scfa
q = torch.zeros((1, 1, 256, int(sys.argv[1])), dtype=torch.bfloat16, device="cuda")
q.requires_grad_()
bucket = torch.zeros((1, 1, 256), dtype=torch.int32, device="cuda")
for pattern in (
    scfa.HashSparse(bucket, bucket, include_self=False),
    scfa.QKSparse(bucket == 0, bucket == 0),
):
    scfa.attention(q, q, q, pattern).sum().backward()
torch.cuda.synchronize()
"""


def compile_kernels_meanwhile(config: Config, where: World) -> Callable[[], None]:
    """Fill the disk cache of this package's kernels by a process of its own.

    That takes seconds on a new machine, in which the first variants can be compiled here. Returns
    what waits for it.
    """
    if not where.device.startswith("cuda"):
        return lambda: None
    process = subprocess.Popen([sys.executable, "-c", _COMPILE, str(config.head_dim)])

    def wait() -> None:
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    return wait


def step_times(trainer: Trainer, repeats: int) -> tuple[list[float], float]:
    """Milliseconds from step to step, enqueued without waiting, and the last loss."""
    times: list[float] = []
    if not trainer.where.device.startswith("cuda"):
        for _ in range(repeats):
            begin = time.perf_counter()
            loss = trainer.train_step()
            times.append(1e3 * (time.perf_counter() - begin))
        return times, float(loss)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        loss = trainer.train_step()
        event.record()
    torch.cuda.synchronize()
    times += [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return times, float(loss)


def summary(times: list[float]) -> dict[str, float]:
    """What a row says of the steps timed."""
    return {"ms": statistics.median(times), "low": min(times), "mean": statistics.fmean(times)}


def time_steps(trainer: Trainer, warm: int, repeats: int, held: int = 0) -> dict[str, Any]:
    """Steps timed after `warm` others; `held` bytes of memory are another's.

    Of graphs the first step is plain and the second captures, so that `warm` is then 2 or more.
    """
    where = trainer.where
    for _ in range(warm if trainer.static_step is None else max(warm, 2)):
        trainer.train_step()
    where.synchronize()
    facts: dict[str, Any] = {}
    cuda = where.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        trainer.train_step()
        # until all is enqueued; the GPU may run longer
        facts["host_ms"] = 1e3 * (time.perf_counter() - begin)
    times, loss = step_times(trainer, repeats)
    if cuda:
        facts["peak_gib"] = (peak_bytes(trainer) - held) / 2**30
    return {**summary(times), **facts, "loss": loss, "times": times}


def peak_bytes(trainer: Trainer) -> int:
    """Most memory in use; a graph's is reserved for it alone, and in use at every replay."""
    if trainer.static_step is None:
        return torch.cuda.max_memory_allocated()
    return torch.cuda.max_memory_reserved()


def compiled(
    config: Config, corpus: Corpus, where: World, kernels_ready: Callable[[], None]
) -> tuple[Trainer, float]:
    """Trainer of one variant at one length, and how many seconds its compilation took."""
    if config.attention not in ("dense", BOUND):
        kernels_ready()
    begin = time.perf_counter()
    trainer = Trainer(config, corpus, where)
    trainer.warm_up()
    took = time.perf_counter() - begin
    kernels_ready()  # nothing else runs while steps are timed
    return trainer, took


def begin_case(trainer: Trainer, warm: int, repeats: int, held: int = 0) -> dict[str, Any]:
    """The first round of one variant at one length; plain steps, or graphs."""
    config = trainer.config
    return {
        "compile": config.compile,
        **time_steps(trainer, warm, repeats, held),
        "tokens_per_step": config.tokens_per_step,
    }


def end_case(row: dict[str, Any], trainer: Trainer, profiled: bool) -> None:
    """Add what is measured once all is timed."""
    config = trainer.config
    row |= summary(row.pop("times"))
    row["steps"] = trainer.step
    if profiled and trainer.where.device.startswith("cuda"):
        row["profile"] = kernels.profile_steps(trainer.train_step)
    if config.buckets:
        row["bucket_cost"] = trainer.bucket_cost()


Make = Callable[[Config], tuple[Trainer, float]]  # a variant's trainer, seconds of compiling


@dataclasses.dataclass(frozen=True)
class Timing:
    """What is timed of each variant: see `run`."""

    graph: str
    warm: int
    repeats: int
    rounds: int
    profiled: bool


def cases(config: Config, make: Make, how: Timing) -> Iterator[dict[str, Any]]:
    """Rows of one variant at one length; one trainer takes plain steps first, then graphs."""
    trainer: Trainer | None = None
    for as_graph in MODES[how.graph]:
        row: dict[str, Any] = {"seqlen": config.seqlen, "variant": config.attention}
        row["graph"] = as_graph
        try:
            if trainer is None:
                trainer, row["compile_seconds"] = make(config)
            if as_graph:
                trainer.use_graph()
            row |= begin_case(trainer, how.warm, how.repeats)
            end_case(row, trainer, how.profiled)
        except Exception as error:
            row["error"] = f"{error!r:.300}"
        yield row


def cases_in_turn(configs: list[Config], make: Make, how: Timing) -> Iterator[dict[str, Any]]:
    """Rows of several variants at one length, timed in turn; all are in memory meanwhile.

    A card's clock falls as it warms: what is timed minutes later is slower by what two variants may
    differ by. So a first round of each, right after it was compiled, tells its memory, but the
    times kept are of rounds that begin once all are compiled.
    """
    (as_graph,) = MODES[how.graph]
    under_way: list[tuple[dict[str, Any], Trainer]] = []
    for config in configs:
        row: dict[str, Any] = {"seqlen": config.seqlen, "variant": config.attention}
        row |= {"graph": as_graph, "rounds": how.rounds}
        held = torch.cuda.memory_reserved() if as_graph else torch.cuda.memory_allocated()
        try:
            trainer, row["compile_seconds"] = make(config)
            if as_graph:
                trainer.use_graph()
            row |= begin_case(trainer, how.warm, how.repeats, held) | {"times": []}
            under_way.append((row, trainer))
        except Exception as error:
            yield row | {"error": f"{error!r:.300}"}
    for _ in range(how.rounds):
        for row, trainer in under_way:
            trainer.train_step()  # the first one after another variant's
            times, row["loss"] = step_times(trainer, how.repeats)
            row["times"] += times
    for row, trainer in under_way:
        end_case(row, trainer, how.profiled)
        yield row


def label(row: dict[str, Any]) -> str:
    """Variant, and whether its steps were graphs."""
    return f"{row['variant']} (graph)" if row.get("graph") else str(row["variant"])


def describe(row: dict[str, Any]) -> list[str]:
    """One row in words, as it is made."""
    name = f"T={row['seqlen']:6d} {label(row):16s}"
    if "error" in row:
        return [f"{name} failed: {row['error']}"]
    host = f", host {row['host_ms']:.1f}" if "host_ms" in row else ""
    cost = f", bucket cost {row['bucket_cost']:.3f}" if "bucket_cost" in row else ""
    took = f", compile {row['compile_seconds']:.1f} s" if "compile_seconds" in row else ""
    text = f"{name} {row['ms']:8.2f} ms/step (low {row['low']:.2f}{host}){took}{cost}"
    return [text, *(kernels.lines(row["profile"]) if "profile" in row else [])]


def table(sittings: list[list[dict[str, Any]]]) -> list[str]:
    """Milliseconds, speed-up over dense and share of the bound, by length, as a Markdown table.

    Rows are compared within their sitting, graphs with graphs; the table holds medians over
    sittings.
    """
    found: dict[tuple[int, str], list[tuple[float, float, float]]] = {}  # ms, speed-up, share
    names: dict[str, str] = {}  # of labels
    for rows in sittings:
        timed = {(row["seqlen"], label(row)): row for row in rows if "ms" in row}
        for (seqlen, shown), row in timed.items():
            dense, bound = (
                timed.get((seqlen, label(row | {"variant": name})), {}).get("ms", math.nan)
                for name in ("dense", BOUND)
            )
            ms, names[shown] = row["ms"], row["variant"]
            found.setdefault((seqlen, shown), []).append((ms, dense / ms, bound / ms))
    lengths = sorted({seqlen for seqlen, _ in found})
    lines = ["| ms per step | " + " | ".join(f"T={x}" for x in lengths) + " |"]
    lines.append("|" + "---|" * (len(lengths) + 1))
    for shown, variant in names.items():
        cells = [_cell(variant, found.get((seqlen, shown), [])) for seqlen in lengths]
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return lines


def _cell(variant: str, found: list[tuple[float, float, float]]) -> str:
    """One variant at one length."""
    if not found:
        return "-"
    times, speedups, shares = (
        [x for x in column if not math.isnan(x)] for column in zip(*found, strict=True)
    )
    facts = []
    if speedups and variant != "dense":
        facts.append(f"{statistics.median(speedups):.2f}x")
    if shares and variant not in ("dense", BOUND):
        facts.append(f"{100 * statistics.median(shares):.0f} %")
    return f"{statistics.median(times):.1f}" + (f" ({', '.join(facts)})" if facts else "")


def run(
    base: Config,
    corpus: Corpus,
    where: World,
    *,
    lengths: list[int],
    variants: list[str],
    warm: int = 3,
    repeats: int = 8,
    rounds: int = 1,
    profiled: Sequence[int] = (),
    graph: str = "no",
    budget: float = float("inf"),
    json_path: Path | None = None,
    commit: str | None = None,
) -> list[dict[str, Any]]:
    """Time every variant at every length; start no case once `budget` seconds have passed.

    A case that fails says why in its row, and the others go on. The file is written after each.
    `graph` is one of `MODES`: steps as they are enqueued, replays of CUDA graphs, or both. With two
    or more `rounds` the variants of a length are in memory together and timed in turn, `repeats`
    steps at a time; one that fails once all are compiled ends the run. `commit` names the sources
    where git cannot tell.
    """
    if rounds > 1 and len(MODES[graph]) > 1:
        raise SystemExit("variants timed in turn take plain steps or graphs: --graph only, or none")
    if any(MODES[graph]):
        Trainer.check_graph(where)
    begin = time.monotonic()
    head = machine("cuda" if where.device.startswith("cuda") else "cpu", commit)
    record: dict[str, Any] = {
        "machine": head,
        "corpus": corpus.sha256,
        "config": dataclasses.asdict(base),
        "rows": [],
    }
    rows: list[dict[str, Any]] = record["rows"]
    kernels_ready = compile_kernels_meanwhile(base, where)

    def make(config: Config) -> tuple[Trainer, float]:
        return compiled(config, corpus, where, kernels_ready)

    for seqlen in lengths:
        configs = [
            dataclasses.replace(
                base,
                attention=variant,
                seqlen=seqlen,
                micro_batch=max(base.tokens_per_step // seqlen, 1),
                steps=10**6,
            )
            for variant in variants
        ]
        for together in [configs] if rounds > 1 else [[config] for config in configs]:
            if time.monotonic() - begin > budget:
                names = ", ".join(config.attention for config in together)
                print(f"T={seqlen:6d} {names:16s} not begun: the budget is spent", flush=True)
                continue
            how = Timing(graph, warm, repeats, rounds, seqlen in profiled)
            found = (
                cases_in_turn(together, make, how) if rounds > 1 else cases(*together, make, how)
            )
            for row in found:
                rows.append(row)
                print("\n".join(describe(row)), flush=True)
                if json_path is not None:
                    records.write(json_path, record)
            gc.collect()
            if where.device.startswith("cuda"):
                torch.cuda.empty_cache()
    print("\n".join(table([rows])), flush=True)
    return rows
