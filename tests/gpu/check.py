"""Run the GPU suite, time a few shapes, and write record.json: what `make gpu-check` does.

    python tests/gpu/check.py [--sanitize | --sanitize-only | --times-only]
                              [--sanitize-seconds S] [pytest arguments]

--sanitize-only adds compute-sanitizer's findings to the record of a run of the same sources; what
was not finished after --sanitize-seconds is recorded as such.

Exits with 0 only if every test passed and none was skipped for want of a GPU.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import precompile
import record
import run_sanitizer

SANITIZER_SECONDS = 300.0  # of one tool over one family of calls
PACKAGES = ("torch", "cupy-cuda12x", "cupy-cuda13x", "numba", "numba-cuda", "numpy")


class Recorder:
    """pytest plugin: counts outcomes, keeps the worst error ratios and the times tests noted."""

    def __init__(self) -> None:
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []
        self.skips: list[str] = []
        self.ratios: dict[str, float] = {}
        self.times: dict[str, float] = {}
        self.slowest: list[tuple[float, str]] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take in one phase of one test."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
            if report.failed:
                self.failures.append(report.nodeid)
                print(f"\nfailed: {report.nodeid}", flush=True)  # a run may be cut short
            if report.skipped:
                self.skips.append(f"{report.nodeid}: {report.longrepr[2]}")
        if report.when == "call":
            self.slowest.append((round(report.duration, 2), report.nodeid))
            for kind, (name, value) in report.user_properties:
                if kind == "ratio":
                    self.ratios[name] = max(self.ratios.get(name, 0.0), value)
                if kind == "time":
                    self.times[name] = value


def median_ms(torch: Any, run: Any, repeats: int = 20) -> float:
    """Median time of `run` by events, after a warm-up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def host_us(torch: Any, run: Any, repeats: int = 50) -> float:
    """Least host time of one call, microseconds; the device is left to catch up between rounds."""
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        best = min(best, (time.perf_counter() - start) / repeats)
    torch.cuda.synchronize()
    return best * 1e6


def measure_pattern(torch: Any, pattern: Any, tensors: Any, backend: str) -> dict[str, float]:
    """Times of plan, forward (plan included) and backward (plan given), milliseconds."""
    import scfa_core as scfa

    q, k, v, dout = tensors
    options = {"backend": backend}
    plan = scfa.make_plan(pattern, q, k, **options)
    out, lse = scfa.attention(q, k, v, plan, return_lse=True, **options)

    def backward() -> None:
        scfa.attention_backward(dout, q, k, v, out, lse, plan, **options)

    return {
        "plan": median_ms(torch, lambda: scfa.make_plan(pattern, q, k, **options)),
        "forward, plan included": median_ms(
            torch, lambda: scfa.attention(q, k, v, pattern, **options), 10
        ),
        "backward, plan given": median_ms(torch, backward, 5),
    }


def measure(torch: Any, backend: str) -> dict[str, float]:
    """Times on workload A (batch 4, heads 48, head_dim 64), and the host time of a small call."""
    import scfa_core as scfa

    times: dict[str, float] = {}
    for rows in (8192, 16384):
        shape = (4, 48, rows, 64)
        tensors = [torch.randn(shape, device="cuda").bfloat16() for _ in range(4)]
        hashes = [
            torch.randint(0, 16, shape[:3], device="cuda", dtype=torch.int32) for _ in range(2)
        ]
        keeps = [torch.rand(shape[:3], device="cuda") < 0.5 for _ in range(2)]
        patterns = {
            "hash 16": scfa.HashSparse(*hashes),
            "keep 50%": scfa.QKSparse(*keeps),
            "causal": scfa.Causal(),
        }
        for name, pattern in patterns.items():
            for what, value in measure_pattern(torch, pattern, tensors, backend).items():
                times[f"{backend}, {name}, T={rows}: {what}, ms"] = value
    q, k, v = (torch.randn(1, 2, 128, 64, device="cuda").bfloat16() for _ in range(3))
    plan = scfa.make_plan(scfa.Causal(), q, k, backend=backend)
    times[f"{backend}: host time of one forward, plan given, us"] = host_us(
        torch, lambda: scfa.attention(q, k, v, plan, backend=backend)
    )
    return times


def sanitize(backends: list[str], total: float) -> dict[str, str]:
    """Run small calls of every kernel under each tool of compute-sanitizer; name -> state."""
    tools, families = list(run_sanitizer.TOOLS), list(run_sanitizer.FAMILIES)
    jobs = os.cpu_count() or 4
    found = run_sanitizer.check(backends, tools, families, SANITIZER_SECONDS, jobs, total)
    return {name: state["state"] for name, state in sorted(found.items())}


def versions() -> dict[str, str]:
    """Versions of the libraries that shape what runs."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def card(torch: Any) -> dict[str, str]:
    """The card and its driver."""
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        driver = "unknown"
    return {
        "name": torch.cuda.get_device_name(),
        "compute capability": capability,
        "driver": driver.splitlines()[0] if driver else "unknown",
        "CUDA of torch": str(torch.version.cuda),
    }


def write_record(torch: Any, seen: Recorder, backends: list[str], found: dict[str, Any]) -> None:
    """Write record.json; sources of backends that were not run keep their older entry."""
    sources = record.read_record().get("sources", {})
    for name in backends:
        files = record.source_digests(name)
        sources[name] = {"digest": record.whole_digest(files), "files": files}
    entry = {
        "date": datetime.date.today().isoformat(),
        "card": card(torch),
        "versions": versions(),
        **seen.outcomes,
        "skips": sorted(seen.skips),
        "worst error over allowed error": {
            name: round(value, 3) for name, value in sorted(seen.ratios.items())
        },
        **found,
        "sources": sources,
    }
    record.RECORD.write_text(json.dumps(entry, indent=1) + "\n")


def add_findings(findings: dict[str, str], backends: list[str]) -> int:
    """Put the sanitizer's findings into the record, if it speaks of these very sources."""
    entry = record.read_record()
    if not entry or any(record.stale_files(name, entry) for name in backends):
        print("record.json is not of these sources: the findings are not recorded")
        return 1
    entry["sanitizer"] = entry.get("sanitizer", {}) | findings
    record.RECORD.write_text(json.dumps(entry, indent=1) + "\n")
    return int(any(state != "clean" for state in findings.values()))


def main() -> int:
    """Run everything; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--sanitize", action="store_true", help="also run compute-sanitizer")
    parser.add_argument("--sanitize-only", action="store_true", help="nothing but that")
    parser.add_argument("--sanitize-seconds", type=float, default=float("inf"), help="of all of it")
    parser.add_argument("--times-only", action="store_true", help="no tests, no record")
    options, rest = parser.parse_known_args()

    import pytest
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU that torch can use; there is none here")
        return 2
    backends = os.environ.setdefault("SCFA_GPU_BACKENDS", "cupy").split(",")
    os.environ["SCFA_REQUIRE"] = "gpu"
    if options.sanitize_only:
        return add_findings(sanitize(backends, options.sanitize_seconds), backends)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of NumPy in each of the workers of -n
    seen = Recorder()
    if not options.times_only:
        start = time.time()
        if "cupy" in backends:
            precompile.compile_side_by_side()
            print(f"compiled in {time.time() - start:.0f} s", flush=True)
        common = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:benchmark"]
        code = pytest.main([*common, *rest, str(record.HERE)], plugins=[seen])
        if not code and any(x.startswith("-n") for x in rest):  # workers leave these out
            code = pytest.main([*common, "-m", "alone", str(record.HERE)], plugins=[seen])
        print(f"suite: {seen.outcomes} in {time.time() - start:.0f} s")
        for name, value in sorted(seen.ratios.items()):
            print(f"  worst {name}: {value:.3f} of the allowed error")
        for duration, name in sorted(seen.slowest, reverse=True)[:5]:
            print(f"  slowest {duration:.1f} s {name}")
        if code:
            print("failed: " + " ".join(seen.failures))
            return 1
    found: dict[str, Any] = {"times": dict(seen.times)}
    for name in backends:
        found["times"] |= measure(torch, name)
    found["times"] = {name: round(value, 4) for name, value in found["times"].items()}
    for name, value in found["times"].items():
        print(f"  {name}: {value}")
    if options.sanitize:
        findings = sanitize(backends, options.sanitize_seconds)
        if any(state != "clean" for state in findings.values()):
            return 1
        found["sanitizer"] = findings
    if options.times_only:
        return 0
    write_record(torch, seen, backends, found)
    stale = [path for name in backends for path in record.stale_files(name, record.read_record())]
    idle = [w.files for w in record.read_pending() if not any(record.matches(w, p) for p in stale)]
    if idle:
        print(f"now take these entries out of tests/gpu/pending.toml: {', '.join(idle)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
