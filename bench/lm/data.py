"""Real text with no download: the Python standard library and installed packages, or a file given.

Files are deduplicated by content and split by file: validation shares none with training.
Sequences cross file boundaries (a separator byte 0 stands between files), as in the paper; with
`packed` the model is also told which document each byte belongs to.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
VALIDATION_SHARE = 20  # one file in so many
SEPARATOR = 0


class Corpus(NamedTuple):
    """Bytes of both splits and the hash by which a result names its data."""

    train: np.ndarray
    validation: np.ndarray
    sha256: str
    files: int


def _unique_files(folders: list[Path], limit: int) -> dict[str, bytes]:
    """Text files by content hash, in a fixed order, up to `limit` bytes in all."""
    found: dict[str, bytes] = {}
    size = 0
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix not in SUFFIXES or not path.is_file():
                continue
            content = path.read_bytes()
            if SEPARATOR in content or not content:
                continue
            key = hashlib.sha256(content).hexdigest()
            if key not in found:
                found[key] = content
                size += len(content)
            if size >= limit:
                return found
    return found


def load_corpus(path: Path | None = None, limit: int = 200_000_000) -> Corpus:
    """Read `path` (a file or folder), by default the standard library and installed packages.

    A single file (enwik8, WikiText, ...) is split at 95 % of its length.
    """
    if path is not None and path.is_file():
        data = np.frombuffer(path.read_bytes()[:limit], np.uint8)
        cut = len(data) - len(data) // VALIDATION_SHARE
        digest = hashlib.sha256(data.tobytes()).hexdigest()
        return Corpus(data[:cut], data[cut:], digest, 1)
    paths = sysconfig.get_paths()
    folders = [Path(paths["stdlib"]), Path(paths["purelib"])] if path is None else [path]
    files = _unique_files(folders, limit)
    splits: tuple[list[bytes], list[bytes]] = ([], [])
    for key, content in files.items():
        splits[int(key, 16) % VALIDATION_SHARE == 0].append(content)
    separator = bytes([SEPARATOR])
    train, validation = (np.frombuffer(separator.join(x), np.uint8) for x in splits)
    digest = hashlib.sha256("".join(files).encode()).hexdigest()
    return Corpus(train, validation, digest, len(files))


def batch_at(
    data: np.ndarray, seqlen: int, sequences: int, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and target bytes (sequences, seqlen) of one step; a function of (seed, step) alone."""
    if len(data) < seqlen + 2:
        raise SystemExit(f"the text has {len(data)} bytes; seqlen={seqlen} needs {seqlen + 2}")
    draw = np.random.default_rng([seed, step])
    starts = draw.integers(0, len(data) - seqlen - 1, sequences)
    rows = np.stack([data[start : start + seqlen + 1] for start in starts]).astype(np.int64)
    text = torch.from_numpy(rows)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def document_ids(text: torch.Tensor) -> torch.Tensor:
    """Document of each byte (batch, seqlen) int32: how many separators stand before it."""
    return (text == SEPARATOR).cumsum(-1, dtype=torch.int32)
