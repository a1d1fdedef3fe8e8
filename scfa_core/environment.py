"""Environment variables at the price of a dict look-up.

``os.environ.get`` encodes the name and catches an exception at every call, a microsecond that an
attention call would pay for each variable it honours.
"""

from __future__ import annotations

import os

from scfa_core.errors import BackendUnavailable

READ = (  # what this package reads; tests read three more
    "SCFA_BACKEND",
    "SCFA_CACHE_DIR",
    "SCFA_CUPY_BACKWARD",
    "SCFA_CUPY_FP32",
    "SCFA_CUPY_KERNELS",
    "SCFA_CUPY_SANITIZE",
)
_OF_TESTS = ("SCFA_GPU_BACKENDS", "SCFA_HYPOTHESIS", "SCFA_REQUIRE")


def strangers() -> dict[str, str]:
    """Variables that look like ours and that nobody reads, each with what may be meant, or ""."""
    from difflib import get_close_matches

    known = (*READ, *_OF_TESTS)
    names = sorted(name for name in os.environ if name.startswith("SCFA_") and name not in known)
    return {name: "".join(get_close_matches(name, READ, n=1)) for name in names}


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


class Choice(Variable):
    """A variable of a backend that is one of a few words: the first, where it is unset or empty."""

    __slots__ = ("words",)

    def __init__(self, name: str, *words: str) -> None:
        super().__init__(name)
        self.words = words

    def word(self, value: str | None) -> str:
        """Return the word that `value`, what `get` returned, stands for.

        Raises
        ------
        BackendUnavailable
            It is none of them.
        """
        if not value:
            return self.words[0]
        if value not in self.words:
            raise BackendUnavailable(
                f"${self.name} must be one of {list(self.words)}, got {value!r}: change or unset it"
            )
        return value
