"""Fake implementations of operators, registered without a look at every module of the process.

torch asks `inspect` which module registers, and `inspect` goes through ``sys.modules`` for the
answer: whatever imports itself when looked at is imported then (pytest, for one, by CuPy).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import library

__all__ = ["register_fake"]

# File to module, where `inspect` looks before it goes through all; undocumented, so it may be gone.
_MODULES_BY_FILE: dict[str, str] = getattr(inspect, "modulesbyfile", {})


def register_fake(name: str, fake: Callable[..., Any], of: library.Library) -> None:
    """Give the operator ``scfa::name`` of a library its fake implementation."""
    _MODULES_BY_FILE.setdefault(inspect.getabsfile(register_fake), __name__)
    library.register_fake(f"scfa::{name}", fake, lib=of)
