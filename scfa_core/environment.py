"""Environment variables at the price of a dict look-up.

``os.environ.get`` encodes the name and catches an exception at every call, a microsecond that an
attention call would pay for each variable it honours.
"""

from __future__ import annotations

import os


class Variable:
    """One environment variable; its value is read anew at every call."""

    __slots__ = ("_key", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        encode = getattr(os.environ, "encodekey", None)
        self._key = encode(name) if encode else name

    def get(self) -> str | None:
        """Return the value in force, or None."""
        environment = os.environ
        try:
            value = environment._data.get(self._key)  # type: ignore[attr-defined]
        except AttributeError:  # somebody put a plain dict in its place
            return environment.get(self.name)
        if value is None:
            return None
        return str(environment.decodevalue(value))
