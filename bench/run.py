"""Time named cases by chosen methods, each held to float64 before; JSON out, resumable."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import scfa_core
from bench import jit, records
from bench.cases import DENSE_ONLY, SETS, Case, select
from bench.floor import Ceilings, floor_facts, useful_flops
from bench.inputs import (
    TOLERANCE,
    Inputs,
    as_dense,
    make_inputs,
    sampled_error,
    sampled_key_error,
    tile_pairs,
    visible_pairs,
)
from bench.limits import Budget, OverLimit, limited, progress
from bench.machine import clocks, machine, resumed
from bench.methods import METHODS, CannotRun, Timed, installed_peers, original
from bench.precompile import cache_at
from bench.timing import extra_memory, host_microseconds, measured_ceilings, time_call

MODES = {
    "forward": "the whole call, from raw hashes, flags or ids to out in the user's order",
    "backward": "from dout to dq, dk and dv; plan, out and lse given",
    "both": "a training step's attention: the whole forward, then backward",
    "plan": "the plan alone (FlexAttention: its block mask)",
    "planned": "forward with the plan given",
    "jit": "first use in a new process, with an empty cache and with the one it left",
}
OTHERS = {
    "bench accuracy": "errors against float64, beside torch's own",
    "bench decode": "few queries on many keys, beside torch",
    "bench precompile": "compile what a sweep will time, beforehand",
    "bench compare OLD NEW": "what became slower beyond the spread, or no longer runs",
    "bench report FILES": "tables and plots of stored results",
    "bench pages": "the README's table and every page of docs/perf (make report)",
    "bench.lm speed": "a training step of the paper's language model",
    "bench.distributed check": "many processes equal one; `scale`: how they scale",
}
SMOKE_ROWS = 256
RESULTS = Path(__file__).parent / "results"


def check(inputs: Inputs, name: str, timed: Timed, modes: list[str]) -> float:
    """Run the very calls that will be timed and hold them against float64; return the error."""
    out = timed.forward()
    error = sampled_error(inputs, out)
    for mode in ("backward", "both"):
        run = getattr(timed, mode)
        if mode in modes and run is not None:
            dq, dk, dv = run()
            error = max(error, sampled_error(inputs, out, dq))
            lse = timed.lse() if timed.lse else None
            error = max(error, sampled_key_error(inputs, lse, out, dk, dv))
    if "planned" in modes and timed.planned:
        error = max(error, sampled_error(inputs, timed.planned()))
    if not error <= TOLERANCE[inputs.case.dtype]:
        raise AssertionError(f"{inputs.case.name}, {name}: relative error {error:.2e}")
    return error


def measure(
    inputs: Inputs,
    name: str,
    method: Any,
    modes: list[str],
    budget: float,
    ceilings: Ceilings | None = None,
) -> Iterator[dict[str, Any]]:
    """Time one method on one case; yield a row per mode."""
    case = inputs.case
    timed = method(inputs)
    # A dense kernel beside a sparse case is what the user would run instead: held to dense truth.
    error = check(as_dense(inputs) if name in DENSE_ONLY else inputs, name, timed, modes)
    pairs = visible_pairs(inputs)
    # Only this package's own rows follow the plan that is looked at here.
    in_tiles = None
    if name.startswith("scfa-"):
        in_tiles = tile_pairs(scfa_core.make_plan(inputs.pattern, inputs.q, inputs.k))
    for mode in modes:
        run = getattr(timed, mode)
        if run is None:
            continue
        timing = time_call(run, case.device, budget)
        flops = useful_flops(case, mode, pairs)
        yield {
            "case": case.name,
            "method": name,
            "mode": mode,
            "ms": round(timing.median, 4),
            "low": round(timing.low, 4),
            "high": round(timing.high, 4),
            "calls": timing.calls,
            "tflops": round(flops / timing.median / 1e9, 2),
            "pairs": pairs,
            "tile_pairs": in_tiles,
            "density": pairs / (case.rows * case.seqlen),
            "extra_bytes": extra_memory(run, case.device),
            "host_us": round(host_microseconds(run), 1) if _host_matters(case, mode) else None,
            "error": error,
            "clocks": clocks() if case.device == "cuda" and mode == modes[0] else None,
            "load": round(os.getloadavg()[0], 2),
            **floor_facts(case, mode, pairs, timing.median, ceilings),
        }


def _host_matters(case: Case, mode: str) -> bool:
    return case.device == "cuda" and mode == "planned" and case.seqlen <= 4096


def sweep(
    args: argparse.Namespace,
    done: set[tuple[str, str, str]],
    started: Callable[[str], None] = lambda name: None,
) -> Iterator[dict[str, Any]]:
    """Go through cases and methods; what is in `done` is not run again.

    The sweep ends with its budget. Compiling is timed last: it takes long and explains least.
    """
    methods = dict(METHODS)
    if args.original:
        methods["original"] = original(args.original)
    modes = [mode for mode in args.mode if mode != "jit"]
    budget = Budget(args.budget)
    cases = chosen(args)
    for number, case in enumerate(cases):
        if budget.spent():
            print(f"budget of {args.budget:g} s spent: {len(cases) - number} cases not reached")
            return
        started(case.name)
        names = args.method or default_methods(case, bool(args.original))
        left = {name: _missing(case.name, name, modes, done) for name in names}
        left = {name: missing for name, missing in left.items() if missing}
        if left:
            yield from _timed_rows(case, methods, left, args, budget)
    if "jit" not in args.mode:
        return
    for case in cases:
        for name in args.method or default_methods(case, False):
            if budget.spent():
                return
            if _missing(case.name, name, list(jit.MODES), done):
                yield from jit.rows(case.name, name, budget.left(args.limit))


def chosen(args: argparse.Namespace) -> list[Case]:
    """Return the cases asked for, cut to a few rows for a smoke run."""
    cases = select(args.case)
    if args.smoke:
        cases = [replace(case, seqlen=min(case.seqlen, SMOKE_ROWS)) for case in cases]
    return cases


def _missing(case: str, name: str, modes: list[str], done: set[tuple[str, str, str]]) -> list[str]:
    """Modes of a method that have no row yet; only methods that plan have a plan to time."""
    plans = name.startswith("scfa-") or name.startswith("flex")
    asked = [mode for mode in modes if plans or mode not in ("plan", "planned")]
    return [mode for mode in asked if (case, name, mode) not in done]


def _timed_rows(
    case: Case,
    methods: dict[str, Any],
    left: dict[str, list[str]],
    args: argparse.Namespace,
    budget: Budget,
) -> Iterator[dict[str, Any]]:
    """Rows of one case, within its time limit; a method that was not reached says so."""
    waiting = list(left)
    try:
        rows = _rows_of(case, methods, left, args, waiting)
        yield from limited(rows, budget.left(args.limit))
    except OverLimit as reason:
        words = "the budget was spent" if budget.spent() else str(reason)
        for name in waiting:
            yield {"case": case.name, "method": name, "mode": "-", "reason": words}
    if case.device == "cuda":
        torch.cuda.empty_cache()


def _rows_of(
    case: Case,
    methods: dict[str, Any],
    left: dict[str, list[str]],
    args: argparse.Namespace,
    waiting: list[str],
) -> Iterator[dict[str, Any]]:
    """Rows of one case; a method leaves `waiting` when it is done.

    A method that fails, wrong results included, costs its own rows and no others.
    """
    ceilings = Ceilings(args.gbps, args.tflops) if case.device == "cuda" and args.gbps else None
    inputs = make_inputs(case)
    for name, modes in left.items():
        row = {"case": case.name, "method": name, "mode": "-"}
        try:
            yield from measure(inputs, name, methods[name], modes, args.seconds, ceilings)
        except (CannotRun, torch.OutOfMemoryError) as reason:
            yield row | {"reason": _first_line(reason)}
        except OverLimit:
            raise
        except Exception as reason:  # a peer may raise anything
            over = _wrapped(reason, OverLimit)
            if over is not None:
                raise over from reason
            words = f"{type(reason).__name__}: {_first_line(reason)}"
            yield row | {"reason": words, "failed": True}
        waiting.remove(name)


def _wrapped(error: BaseException | None, kind: type[Exception]) -> Exception | None:
    """The error of a kind that another stands for, as compilers wrap whatever stops them."""
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None


def _first_line(reason: Exception) -> str:
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0][:200]


def default_methods(case: Case, with_original: bool) -> list[str]:
    """Return who is timed on a case unless the user says."""
    if case.device == "cpu":
        return ["scfa-numba-cpu", "sdpa-flash"] + (["naive"] if case.seqlen <= 1024 else [])
    names = ["scfa-cupy", "sdpa-cudnn", "scfa-numba-cuda", "sdpa-flash"]
    names += ["original"] if with_original and case.kind in ("hash", "qk") else []
    names += installed_peers()
    return names + (["flash-varlen"] if case.kind == "samehash" else [])


def show(row: dict[str, Any]) -> None:
    """Print one row as it comes."""
    head = f"{row['case']:22s} {row['method']:26s} {row['mode']:9s}"
    if "reason" in row:
        print(f"{head} not run: {row['reason']}", flush=True)
        return
    error = "" if row["error"] is None else f"  error {row['error']:.1e}"
    print(
        f"{head} {row['ms']:9.3f} ms [{row['low']:.3f}, {row['high']:.3f}] "
        f"{row['tflops']:7.1f} TFLOP/s{error}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    """Write one JSON file, row by row, so that a stop loses nothing; 1 if ours failed a case."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", nargs="+", default=["cpu"], help="sets or names, see below (cpu)")
    parser.add_argument(
        "--method",
        nargs="+",
        choices=[*METHODS, "original"],
        metavar="METHOD",
        help="who is timed, of those named below; by default this package and what is installed",
    )
    parser.add_argument(
        "--mode",
        nargs="+",
        default=["forward", "backward"],
        choices=MODES,
        metavar="MODE",
        help="see below (forward backward)",
    )
    parser.add_argument(
        "--seconds", type=records.seconds, default=1.0, help="of repeats, per row (1)"
    )
    parser.add_argument(
        "--json",
        type=records.writable,
        help="written row by row; rows already there are kept, not run again",
    )
    parser.add_argument(
        "--limit", type=records.seconds, help="seconds for a case, all its methods together"
    )
    parser.add_argument(
        "--budget", type=records.seconds, help="seconds for the whole sweep, then it ends"
    )
    parser.add_argument("--smoke", action="store_true", help="every case once, at 256 rows")
    parser.add_argument("--cache", type=Path, help="what `precompile` filled")
    parser.add_argument("--gbps", type=float, help="ceiling of memory, 1e9 bytes/s, else measured")
    parser.add_argument("--tflops", type=float, help="ceiling of arithmetic, 1e12 flops/s")
    parser.add_argument("--commit", help="name of the sources, where git cannot tell")
    parser.add_argument("--original", help="path of the original's Triton file, to time it too")
    args = parser.parse_args(argv)
    if bool(args.gbps) != bool(args.tflops):
        raise SystemExit("the floor needs both ceilings: --gbps and --tflops")
    if "original" in (args.method or ()) and (not args.original or "jit" in args.mode):
        raise SystemExit("the original needs its path (--original), and has no --mode jit")
    if args.smoke and args.json:
        raise SystemExit("a smoke run times nothing worth keeping: leave --json out")
    if args.smoke:
        args.seconds = 0.0
    if args.cache:
        os.environ.update(cache_at(args.cache))
    cases = chosen(args)
    if any(case.device == "cuda" for case in cases) and not torch.cuda.is_available():
        raise SystemExit("these cases need a CUDA device, and torch sees none")
    record = resumed(args.json, {"machine": machine(cases[0].device, args.commit), "rows": []})
    if cases[0].device == "cuda" and not args.gbps and args.mode != ["jit"]:
        args.gbps, args.tflops = (round(x, 1) for x in measured_ceilings())
    if args.gbps:
        record["machine"].setdefault("ceilings", {"gbps": args.gbps, "tflops": args.tflops})
    done = {(row["case"], row["method"], row["mode"]) for row in record["rows"]}
    try:
        with progress(len(cases)) as started:
            for row in sweep(args, done, started):
                show(row)
                record["rows"].append(row)
                if args.json:
                    records.write(args.json, record)
    except KeyboardInterrupt:
        kept = f"; the same command goes on from {args.json}" if args.json else ""
        print(f"stopped{kept}")
        return 130
    failed = [row for row in record["rows"] if row.get("failed")]
    return int(any(row["method"].startswith("scfa-") for row in failed))


def _epilog() -> str:
    """List what else there is, every mode, method and case."""

    def listed(name: str, words: str) -> str:
        return textwrap.fill(f"{name}: {words}", 98, initial_indent="  ", subsequent_indent="    ")

    lines = ["besides timing (each has --help):"]
    lines += [listed(f"python -m {name}", words) for name, words in OTHERS.items()]
    lines += ["", "modes:", *(listed(name, words) for name, words in MODES.items())]
    lines += ["", "methods (a peer that is not installed says so and costs its own rows only):"]
    lines.append(listed("any of", " ".join([*METHODS, "original"])))
    lines += ["", "sets and their cases:"]
    lines += [listed(name, " ".join(case.name for case in make())) for name, make in SETS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
