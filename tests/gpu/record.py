"""What the last GPU run proved: which sources it ran, byte for byte, and what is still waiting."""

import fnmatch
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings it there
    import tomli as tomllib

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORD, PENDING = HERE / "record.json", HERE / "pending.toml"
FOLDERS = {"cupy": "backends/cupy_raw", "numba-cuda": "backends/numba_cuda"}
SUFFIXES = (".py", ".cu", ".cuh")
RENEW = "run `make gpu-check` on a machine with an NVIDIA GPU and commit tests/gpu/record.json"


class Waiting(NamedTuple):
    """An entry of pending.toml."""

    files: str  # pattern over paths from the root of the repository
    why: str


def source_digests(backend: str) -> dict[str, str]:
    """Return path -> SHA-256 of every source of `backend` that shapes what runs on a GPU."""
    folder = ROOT / FOLDERS[backend]
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    return {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def whole_digest(files: dict[str, str]) -> str:
    """Return one digest of all files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def read_record() -> dict[str, Any]:
    """Return the record, or {} where there has been no run yet."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def read_pending() -> list[Waiting]:
    """Return the entries of pending.toml."""
    entries = tomllib.loads(PENDING.read_text()).get("pending", [])
    return [Waiting(entry["files"], entry["why"]) for entry in entries]


def stale_files(backend: str, record: dict[str, Any]) -> list[str]:
    """Return the sources of `backend` that the recorded run has not seen in their present form."""
    recorded = record.get("sources", {}).get(backend, {}).get("files", {})
    present = source_digests(backend)
    changed = [path for path, digest in present.items() if recorded.get(path) != digest]
    return changed + sorted(set(recorded) - set(present))


def matches(waiting: Waiting, path: str) -> bool:
    """Whether an entry speaks of `path`."""
    return fnmatch.fnmatchcase(path, waiting.files)
