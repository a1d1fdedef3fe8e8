"""The CPU table: this package on `numba-cpu` against torch's CPU attention, as Markdown.

Both sides are timed in turn within one process, and the fastest call of each counts: on a shared
machine noise only ever adds. Forward includes planning; backward reuses the plan. Peak memory is
measured in a process of its own.

    python bench/cpu_table.py --lengths 1024 4096 8192 32768
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 32768])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--buckets", type=int, default=16)
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="per cell of the table, at least"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--memory", type=int, default=0, help="only print peak MiB at this length")
    return parser.parse_args()


def fastest(calls: list[Callable[[], Any]], seconds: float) -> list[float]:
    """Milliseconds of the fastest call of each, called in turn, at least three times."""
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    begin, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - begin < seconds:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], (time.perf_counter() - start) * 1e3)
        rounds += 1
    return best


def measure(options: argparse.Namespace, length: int) -> list[tuple[str, str, float, float]]:
    """Rows (pattern, direction, torch ms, ours ms) of one length."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    import scfa_core as scfa

    torch.manual_seed(0)
    shape = (1, options.heads, length, options.head_dim)
    q, k, v, dout = (torch.randn(shape, dtype=getattr(torch, options.dtype)) for _ in range(4))
    hashes = (torch.randint(0, options.buckets, shape[:3]) for _ in range(2))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out_torch = scaled_dot_product_attention(*leaves, is_causal=True)

    def torch_forward() -> Any:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def torch_backward() -> Any:
        return torch.autograd.grad(out_torch, leaves, dout, retain_graph=True)

    patterns = {"dense causal": scfa.Causal(), f"hash {options.buckets}": scfa.HashSparse(*hashes)}
    forwards, backwards = [torch_forward], [torch_backward]
    for pattern in patterns.values():
        plan = scfa.make_plan(pattern, q, k, backend="numba-cpu")
        out, lse = scfa.attention(q, k, v, plan, return_lse=True, backend="numba-cpu")
        if isinstance(pattern, scfa.Causal):
            torch.testing.assert_close(out, out_torch.detach())
        forwards.append(lambda p=pattern: scfa.attention(q, k, v, p, backend="numba-cpu"))
        backwards.append(
            lambda out=out, lse=lse, plan=plan: scfa.attention_backward(
                dout, q, k, v, out, lse, plan, backend="numba-cpu"
            )
        )
    rows = []
    for direction, calls in (("forward", forwards), ("backward", backwards)):
        reference, *ours = fastest(calls, options.seconds)
        rows += [(name, direction, reference, t) for name, t in zip(patterns, ours, strict=True)]
    return rows


def peak_memory(options: argparse.Namespace) -> None:
    """Print MiB of arrays and MiB beyond them at their peak, over all three verbs; Linux only."""
    import scfa_core as scfa

    def used(name: str) -> float:
        status = Path("/proc/self/status").read_text()
        return next(int(x.split()[1]) for x in status.splitlines() if x.startswith(name)) / 2**10

    def run(length: int) -> float:
        rng = np.random.default_rng(0)
        shape = (1, options.heads, length, options.head_dim)
        q, k, v, dout = (rng.standard_normal(shape, np.float32) for _ in range(4))
        hashes = rng.integers(0, options.buckets, (2, *shape[:3]))
        plan = scfa.make_plan(scfa.HashSparse(*hashes), q, k, backend="numba-cpu")
        out, lse = scfa.attention(q, k, v, plan, return_lse=True, backend="numba-cpu")
        grads = scfa.attention_backward(dout, q, k, v, out, lse, plan, backend="numba-cpu")
        arrays = (q, k, v, dout, hashes, out, lse, *grads)
        return sum(x.nbytes for x in arrays) / 2**20 + plan.nbytes() / 2**20

    run(64)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = used("VmRSS")
    arrays = run(options.memory)
    print(f"{arrays:.0f} {used('VmHWM') - before - arrays:.0f}")


def processor() -> str:
    """Model name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    options = parse()
    if options.memory:
        peak_memory(options)
        return
    import numba
    import torch

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(
        f"{processor()}, {os.cpu_count()} cores, load {load:.1f} at the start; "
        f"torch {torch.__version__}, numba {numba.__version__}; "
        f"batch 1, heads {options.heads}, head_dim {options.head_dim}, {options.dtype}"
    )
    print("\n| T | pattern | direction | torch dense, ms | numba-cpu, ms | ratio |")
    print("|---|---|---|---|---|---|")
    for length in options.lengths:
        for name, direction, theirs, ours in measure(options, length):
            print(
                f"| {length} | {name} | {direction} | {theirs:.1f} | {ours:.1f} "
                f"| {theirs / ours:.2f} |",
                flush=True,
            )
    command = [sys.executable, __file__, "--memory", str(max(options.lengths))]
    command += ["--heads", str(options.heads), "--head-dim", str(options.head_dim)]
    arrays, extra = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.split()
    scores = options.heads * max(options.lengths) ** 2 * 4 / 2**20
    print(
        f"\nPeak memory, hash {options.buckets}, T={max(options.lengths)}, float32, plan + forward "
        f"+ backward: arrays and plan {arrays} MiB, beyond them {extra} MiB "
        f"(scores would be {scores:.0f} MiB)"
    )


if __name__ == "__main__":
    main()
