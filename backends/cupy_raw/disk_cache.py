"""Cubins on disk: written whole or not at all, checked on reading, never needed for an answer."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

_LOG = logging.getLogger("scfa_core")
_DIGEST_BYTES = 32


def cache_dir() -> Path:
    """Return $SCFA_CACHE_DIR, or ``scfa_core`` in the user's cache folder."""
    chosen = os.environ.get("SCFA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "scfa_core"


def load(key: str) -> bytes | None:
    """Return the cubin stored under `key`; None if there is none, or none that can be trusted."""
    path = cache_dir() / f"{key}.cubin"
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOG.warning("kernel cache %s cannot be read (%s): compiling again", path, error)
        return None
    digest, cubin = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    if not cubin or hashlib.sha256(cubin).digest() != digest:
        _LOG.warning("kernel cache %s is damaged: compiling again", path)
        return None
    return cubin


def store(key: str, cubin: bytes) -> bool:
    """Write `cubin` under `key`, whole or not at all, and return whether that worked."""
    folder = cache_dir()
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{key[:40]}-")
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(cubin).digest() + cubin)
        os.replace(temporary, folder / f"{key}.cubin")
        temporary = None
    except OSError as error:
        _LOG.warning(
            "kernel cache %s cannot be written (%s): this process keeps its kernels in memory; "
            "set SCFA_CACHE_DIR to a writable folder",
            folder,
            error,
        )
        return False
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return True
