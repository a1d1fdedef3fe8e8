"""Real text on every machine: the source of Python's standard library, or the user's own."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

from scfa_core.errors import ScfaError

MOST_BYTES = 6_000_000
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def read_text(path: str | None, seed: int = 0) -> tuple[bytes, str]:
    """Return up to `MOST_BYTES` bytes of text and a description of where they come from.

    Files of a folder are taken whole, in an order drawn from `seed`: any stretch is a fair sample.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [file for file in sorted(root.rglob("*.py")) if not LEFT_OUT & set(file.parts)]
        name = "the Python standard library's source"
    else:
        root = Path(path)
        if not root.exists():
            raise ScfaError(f"--text {path}: no such file or folder")
        found = [root] if root.is_file() else [f for f in sorted(root.rglob("*")) if f.is_file()]
        name = str(path)
    random.Random(seed).shuffle(found)
    chunks: list[bytes] = []
    total = 0
    for file in found:
        chunk = file.read_bytes()
        if b"\0" in chunk[:1024]:  # not text
            continue
        chunks.append(chunk)
        total += len(chunk)
        if total >= MOST_BYTES:
            break
    text = b"".join(chunks)[:MOST_BYTES]
    if not text:
        raise ScfaError(f"--text {path}: no text there; give a text file, or a folder with some")
    return text, f"{name}: {len(text) / 1e6:.1f} MB from {len(chunks)} files"
