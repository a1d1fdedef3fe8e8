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
    # A run within a test has the variable as well, but a folder of its own.
    mine = base.name == f"popen-{os.environ.get('PYTEST_XDIST_WORKER')}"
    return base.parent if fcntl and mine else base


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let nobody else, thread or process, make what will lie at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if fcntl:  # closed is not enough: a fork made meanwhile holds it open
                fcntl.flock(lock, fcntl.LOCK_UN)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Made]) -> Made:
    """What ``make(folder)`` returns, of whichever process came first."""
    folder = shared_folder(factory) / name
    result = folder / "made.pickle"
    with locked(folder):
        if not result.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            part = folder / "made.part"
            part.write_bytes(pickle.dumps(make(folder)))
            part.replace(result)  # whole or not there, should this process be killed
    return pickle.loads(result.read_bytes())
