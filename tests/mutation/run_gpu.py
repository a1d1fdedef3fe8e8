"""Plant each fault of faults_gpu.py and see whether a test fails on this GPU.

    python tests/mutation/run_gpu.py [--workers N] [NAME ...]

Faults are planted side by side, each in a copy of the sources, and written to results_gpu.json with
the card. Tests that failed must pass on clean sources on the same card. What survives is a fence
that this card does not need, or a hole in the tests: results_gpu.json is read by test_list.py,
which wants a reason (`faults_gpu.NOT_SEEN`) for each. Exit code 1: one survived.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fault import Fault
from faults_gpu import FAULTS
from run import HERE, Copy, check_on_clean_sources, judge

RESULTS = HERE / "results_gpu.json"
LIMIT = 240.0  # seconds of one fault, compiling included; a kernel that hangs is a failure too


def plant(fault: Fault) -> dict[str, str]:
    """Judge one fault in a copy of its own."""
    with tempfile.TemporaryDirectory(prefix="scfa-fault-") as folder:
        result = judge(Copy(Path(folder), LIMIT), fault)
    print(f"{result['outcome']:9}{fault.name:28}{result['caught_by']}", flush=True)
    return result


def main() -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="faults to plant (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="faults at a time")
    options = parser.parse_args()
    unknown = set(options.names) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    import torch

    if not torch.cuda.is_available():
        print("these faults show on an NVIDIA GPU that torch can use; there is none here")
        return 2
    if torch.cuda.get_device_capability() != (9, 0):
        print(f"these faults are in kernels for Hopper; this is {torch.cuda.get_device_name()}")
        return 2
    os.environ["SCFA_REQUIRE"], os.environ["SCFA_GPU_BACKENDS"] = "gpu", "cupy"
    chosen = [fault for fault in FAULTS if not options.names or fault.name in options.names]
    with ThreadPoolExecutor(options.workers) as pool:
        results = list(pool.map(plant, chosen))
    with tempfile.TemporaryDirectory(prefix="scfa-clean-") as folder:
        trusted = check_on_clean_sources(Copy(Path(folder), 2 * LIMIT), results)
    known = json.loads(RESULTS.read_text())["faults"] if options.names and RESULTS.exists() else []
    rows = {row["name"]: row for row in known} | {
        fault.name: {"file": fault.file, "breaks": fault.breaks} | result
        for fault, result in zip(chosen, results, strict=True)
    }
    entry = {
        "date": datetime.date.today().isoformat(),
        "card": torch.cuda.get_device_name(),
        "faults": [rows[fault.name] for fault in FAULTS if fault.name in rows],
    }
    RESULTS.write_text(json.dumps(entry, indent=1) + "\n")
    survivors = [result["name"] for result in results if result["outcome"] == "survived"]
    print(f"{len(results)} faults, {len(survivors)} survived", *survivors)
    return 0 if trusted and not survivors else 1


if __name__ == "__main__":
    sys.exit(main())
