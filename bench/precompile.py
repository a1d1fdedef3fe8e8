"""Compile what a sweep will time, once and untimed, by several processes that share a cache.

FlexAttention compiles for up to minutes a case. What it leaves in the cache is loaded in seconds
by the sweep that is given the same `--cache`, so that a time limit then holds its timing alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from bench import jit
from bench.cases import SETS, Case, select
from bench.methods import METHODS


def cache_at(folder: Path) -> dict[str, str]:
    """Return the variables that put what torch compiles under one folder.

    Each process compiles by itself: otherwise every one of them would start a pool of workers.
    """
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    where = {name: str(folder.resolve() / name.lower()) for name in names}
    return where | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


def distinct(cases: list[Case]) -> list[Case]:
    """Return the first of all cases that share their compiled code.

    Shapes and element types are compiled in; of patterns only the kind is, and a window's length.
    """
    kept: dict[Any, Case] = {}
    for case in cases:
        pattern = case.pattern if case.kind == "window" else case.kind
        kept.setdefault(dataclasses.replace(case, name="", pattern=pattern), case)
    return list(kept.values())


def main(argv: list[str]) -> int:
    """Compile methods for cases, each shape once; 1 if anything was not compiled."""
    parser = argparse.ArgumentParser(prog="python -m bench precompile", description=__doc__)
    parser.add_argument(
        "--case", nargs="+", required=True, help=f"sets ({', '.join(SETS)}) or names"
    )
    parser.add_argument("--method", nargs="+", default=["flex"], choices=list(METHODS))
    parser.add_argument("--cache", type=Path, required=True, help="folder, made if not there")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, help="seconds of a case")
    args = parser.parse_args(argv)
    args.cache.mkdir(parents=True, exist_ok=True)
    environment = os.environ | cache_at(args.cache)
    begin = time.monotonic()
    missed = 0
    with ThreadPoolExecutor(args.processes) as pool:
        jobs = {
            pool.submit(jit.child, case.name, method, environment, args.limit): (case.name, method)
            for case in distinct(select(args.case))
            for method in args.method
        }
        for job in as_completed(jobs):
            found, (case, method) = job.result(), jobs[job]
            missed += "reason" in found
            words = found.get("reason") or f"{(found['first_ms'] - found['second_ms']) / 1e3:.1f} s"
            at = time.monotonic() - begin
            print(f"{case:22s} {method:16s} {words}  (at {at:.0f} s)", flush=True)
    return int(missed > 0)
