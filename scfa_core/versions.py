"""Which libraries are installed here, and in which version, without importing them."""

from __future__ import annotations

from importlib import metadata

PACKAGES = (
    "numpy",
    "numba",
    "llvmlite",
    "torch",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "numba-cuda",
    "matplotlib",
    "rich",
    "transformers",
)


def version_of(package: str) -> str:
    """Version of `package`, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
