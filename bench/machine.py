"""What a number depends on, and how a file of numbers is begun and gone on with."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import scfa_core
from bench.records import read, times

# Distributions whose version is noted where they are installed.
LIBRARIES = (
    "cupy-cuda12x",
    "cupy-cuda13x",
    "numba",
    "numba-cuda",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cudnn-frontend",
    "xformers",
)


def machine(device: str, commit: str | None = None) -> dict[str, Any]:
    """Card or processor, driver, versions, commit (as given, where git cannot tell), date."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scfa_core": scfa_core.__version__,
        "libraries": libraries(),
        "commit": commit or _output("git", "rev-parse", "--short", "HEAD"),
        # Of a commit that was only said nobody knows.
        "changed": None if commit else bool(_output("git", "status", "--porcelain", "-uno")),
    }
    if device == "cuda":
        query = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu"
        facts["card"] = torch.cuda.get_device_name()
        facts["nvidia_smi"] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["l2"] = "flushed before each call"
    else:
        facts["card"] = _processor()
        facts["threads"] = torch.get_num_threads()
        facts["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "")
        facts["l2"] = "left as the call before it left it"
    return facts


def libraries() -> dict[str, str]:
    """Versions of the backends' libraries and of peers, of those that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def clocks() -> str:
    """Clock of the multiprocessors and power of every card at this moment, as nvidia-smi says."""
    return _output("nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")


def resumed(path: Path | None, begun: dict[str, Any]) -> dict[str, Any]:
    """Return the record that `path` holds, this sitting noted in it, or the one just begun.

    Rows that only say why something did not run are dropped: it is tried again.
    """
    if path is None or not path.exists():
        return begun
    record = read(path) if begun.get("kind") else times(path)
    if record.get("kind") != begun.get("kind"):
        kinds = [x.get("kind", "times") for x in (record, begun)]
        raise SystemExit(f"{path} holds {kinds[0]}, this run makes {kinds[1]}: name another file")
    now = begun["machine"]
    if record["machine"]["card"] != now["card"]:
        raise SystemExit(f"{path} is of {record['machine']['card']}, this is {now['card']}")
    record["rows"] = [row for row in record["rows"] if "reason" not in row]
    sitting = {key: now[key] for key in ("date", "commit", "changed")}
    record["machine"].setdefault("resumed", []).append(sitting)
    return record
