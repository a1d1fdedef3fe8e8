"""Real text with no download: the Python standard library and installed packages, or a file given.

Files are deduplicated by content and split by file: validation shares none with training.
Sequences cross file boundaries (a separator byte 0 stands between files), as in the paper; with
`packed` the model is also told which document each byte belongs to.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
VALIDATION_SHARE = 20  # one file in so many
OWN = "scfa_core"  # changes from one sitting to the next, which would change the corpus
SEPARATOR = 0
READERS = 16  # threads; reading many small files is waiting
FILES_AT_ONCE = 512


class Split:
    """Tokens of one split on the training device, and any batch of them."""

    def __init__(self, data: np.ndarray, device: str) -> None:
        self.data = torch.from_numpy(data.copy()).to(device)

    def holds(self, seqlen: int) -> bool:
        """Whether there is text for a sequence of this length."""
        return len(self.data) >= seqlen + 2

    def batch(
        self, seqlen: int, sequences: int, seed: int, draw: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (sequences, seqlen), a function of (seed, draw) alone.

        Slices, so that nothing is copied to a GPU: a plain copy waits until the GPU is idle.
        """
        size = len(self.data)
        if not self.holds(seqlen):
            raise SystemExit(f"the text has {size} tokens; seqlen={seqlen} needs {seqlen + 2}")
        starts = np.random.default_rng([seed, draw]).integers(0, size - seqlen - 1, sequences)
        rows = [self.data[start : start + seqlen + 1] for start in starts.tolist()]
        text = torch.stack(rows).long()
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()


class Corpus(NamedTuple):
    """Tokens of both splits and the hash by which a result names its data."""

    train: np.ndarray
    validation: np.ndarray
    sha256: str
    files: int
    unit: str = "byte"  # what one token is: byte, token (of a tokeniser) or pixel
    bytes_per_token: float = 1.0
    reader: type[Split] = Split  # makes sequences of a split


def _paths(folders: list[Path]) -> Iterator[Path]:
    """Text files in a fixed order, each once though folders may lie in one another.

    This package's own are left out, among them what an editable installation makes for it.
    """
    seen: set[str] = set()
    for folder in folders:
        for root, below, names in os.walk(folder):
            if root in seen:
                below.clear()
                continue
            seen.add(root)
            below[:] = sorted(name for name in below if OWN not in name)
            texts = (name for name in sorted(names) if name.endswith(SUFFIXES) and OWN not in name)
            yield from (Path(root, name) for name in texts)


def _read(path: Path) -> tuple[str, bytes]:
    """Content and its hash; nothing for what cannot be read or is no text."""
    try:
        content = path.read_bytes()
    except OSError:
        return "", b""
    if SEPARATOR in content:
        return "", b""
    return hashlib.sha256(content).hexdigest(), content


def _unique_files(folders: list[Path], limit: int) -> dict[str, bytes]:
    """Text files by content hash, in a fixed order, up to `limit` bytes in all."""
    found: dict[str, bytes] = {}
    size = 0
    paths = _paths(folders)
    with ThreadPoolExecutor(READERS) as pool:
        while chunk := [path for path, _ in zip(paths, range(FILES_AT_ONCE), strict=False)]:
            for key, content in pool.map(_read, chunk):
                if content and key not in found:
                    found[key] = content
                    size += len(content)
                if size >= limit:
                    return found
    return found


def load_corpus(path: Path | None = None, limit: int = 200_000_000) -> Corpus:
    """Read `path` (a file or folder), by default the standard library and installed packages.

    A single file (enwik8, WikiText, ...) is split at 95 % of its length. What is installed of this
    package is no part of the corpus, so that other versions of it train on the same text.
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


def as_words(corpus: Corpus, vocabulary: int) -> Corpus:
    """The same text by words and signs, each hashed to an id below `vocabulary`.

    Nothing can be generated from such ids; they have the frequencies of a tokeniser's, which decide
    how even hash buckets are, and need no tokeniser. For timing.
    """

    def ids(data: np.ndarray) -> np.ndarray:
        words = re.findall(rb" ?\w+| ?[^\w\s]+|\s+", data.tobytes())
        return np.array([zlib.crc32(word) % vocabulary for word in words], np.int32)

    return corpus._replace(train=ids(corpus.train), validation=ids(corpus.validation))


def document_ids(text: torch.Tensor) -> torch.Tensor:
    """Document of each byte (batch, seqlen) int32: how many separators there are up to it.

    Itself counted, so that a separator begins the document after it.
    """
    return (text == SEPARATOR).cumsum(-1, dtype=torch.int32)
