"""What is made once in a run of the tests, by whichever process of pytest-xdist comes first."""

import contextlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

try:
    import fcntl
except ImportError:  # Windows: each process makes its own (shared_folder)
    fcntl = None

Made = TypeVar("Made")


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """Folder of this run of the tests that all of its processes have."""
    base = factory.getbasetemp()
    return base.parent if fcntl and "PYTEST_XDIST_WORKER" in os.environ else base


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let nobody else, thread or process, make what will lie at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Made]) -> Made:
    """What ``make(folder)`` returns, of whichever process came first."""
    folder = shared_folder(factory) / name
    result = folder / "made.pickle"
    with locked(folder):
        if not result.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            result.write_bytes(pickle.dumps(make(folder)))
    return pickle.loads(result.read_bytes())
