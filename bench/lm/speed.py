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


def time_steps(trainer: Trainer, warm: int, repeats: int) -> dict[str, Any]:
    """Milliseconds from step to step, enqueued without waiting, after `warm` steps.

    Of graphs the first step is plain and the second captures, so that `warm` is then 2 or more.
    """
    where = trainer.where
    for _ in range(warm if trainer.static_step is None else max(warm, 2)):
        loss = trainer.train_step()
    where.synchronize()
    if not where.device.startswith("cuda"):
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            loss = trainer.train_step()
            times.append(1e3 * (time.perf_counter() - begin))
        return {"ms": statistics.median(times), "low": min(times), "loss": float(loss)}
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    loss = trainer.train_step()
    host = 1e3 * (time.perf_counter() - begin)  # until all is enqueued; the GPU may run longer
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        loss = trainer.train_step()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return {
        "ms": statistics.median(times),
        "low": min(times),
        "mean": statistics.fmean(times),
        "host_ms": host,
        "peak_gib": peak_bytes(trainer) / 2**30,
        "loss": float(loss),
    }


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


def one_case(trainer: Trainer, warm: int, repeats: int, profiled: bool) -> dict[str, Any]:
    """Measurements of one variant at one length; plain steps, or graphs."""
    config = trainer.config
    row: dict[str, Any] = {
        "compile": config.compile,
        **time_steps(trainer, warm, repeats),
        "tokens_per_step": config.tokens_per_step,
    }
    row["steps"] = trainer.step
    if profiled and trainer.where.device.startswith("cuda"):
        row["profile"] = kernels.profile_steps(trainer.train_step)
    if config.buckets:
        row["bucket_cost"] = trainer.bucket_cost()
    return row


def cases(
    config: Config,
    corpus: Corpus,
    where: World,
    kernels_ready: Callable[[], None],
    *,
    graph: str,
    warm: int,
    repeats: int,
    profiled: bool,
) -> Iterator[dict[str, Any]]:
    """Rows of one variant at one length; one trainer takes plain steps first, then graphs."""
    trainer: Trainer | None = None
    for as_graph in MODES[graph]:
        row: dict[str, Any] = {"seqlen": config.seqlen, "variant": config.attention}
        row["graph"] = as_graph
        try:
            if trainer is None:
                trainer, row["compile_seconds"] = compiled(config, corpus, where, kernels_ready)
            if as_graph:
                trainer.use_graph()
            row |= one_case(trainer, warm, repeats, profiled)
        except Exception as error:
            row["error"] = f"{error!r:.300}"
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
        if shares and variant != BOUND:
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
    profiled: Sequence[int] = (),
    graph: str = "no",
    budget: float = float("inf"),
    json_path: Path | None = None,
    commit: str | None = None,
) -> list[dict[str, Any]]:
    """Time every variant at every length; start no case once `budget` seconds have passed.

    A case that fails says why in its row, and the others go on. The file is written after each.
    `graph` is one of `MODES`: steps as they are enqueued, replays of CUDA graphs, or both. `commit`
    names the sources where git cannot tell.
    """
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
    for seqlen in lengths:
        for variant in variants:
            if time.monotonic() - begin > budget:
                print(f"T={seqlen:6d} {variant:16s} not begun: the budget is spent", flush=True)
                continue
            config = dataclasses.replace(
                base,
                attention=variant,
                seqlen=seqlen,
                micro_batch=max(base.tokens_per_step // seqlen, 1),
                steps=10**6,
            )
            for row in cases(
                config,
                corpus,
                where,
                kernels_ready,
                graph=graph,
                warm=warm,
                repeats=repeats,
                profiled=seqlen in profiled,
            ):
                rows.append(row)
                print("\n".join(describe(row)), flush=True)
                if json_path is not None:
                    records.write(json_path, record)
            gc.collect()
            if where.device.startswith("cuda"):
                torch.cuda.empty_cache()
    print("\n".join(table([rows])), flush=True)
    return rows
