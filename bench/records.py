"""Files of results: read with a reason where they are none, written whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

WANTED = "want a file that `python -m bench ... --json FILE` wrote"


def read(path: Path) -> dict[str, Any]:
    """Return the record that a file holds, or end with what is wrong with the file."""
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; {WANTED}") from None
    except ValueError as error:
        raise SystemExit(f"{path} is not JSON ({error}); {WANTED}") from None
    if not isinstance(record, dict) or not isinstance(record.get("rows"), list):
        raise SystemExit(f"{path} has no rows; {WANTED}")
    return record


def times(path: Path) -> dict[str, Any]:
    """Return a record of times, or end: records of other kinds have no case, method and mode."""
    record = read(path)
    if any(not {"case", "method", "mode"} <= set(row) for row in record["rows"]):
        kind = record.get("kind", "other rows")
        raise SystemExit(f"{path} holds {kind}, not times of cases; {WANTED}")
    return record


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record beside its file, then put it there: a kill leaves the old or the new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(path)


def writable(text: str) -> Path:
    """Type of an argument: a file to write, in a folder that is there, before anything is timed."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"want a file in a folder that exists, got {text}")
    return path


def seconds(text: str) -> float:
    """Type of an argument: a number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"want seconds, 0 or more, got {text}")
    return value
