"""What a module says where the library that it is about is not installed."""

from __future__ import annotations

from scfa_core.versions import version_of

__all__ = ["missing"]


def missing(module: str, extra: str, error: ImportError, wanted: str = "") -> ImportError:
    """The error of a module whose library is not there, or is there and too old: with the cure.

    Parameters
    ----------
    module : str
        Who needs it, for the message.
    extra : str
        Extra of this package that brings it.
    error : ImportError
        What importing the library raised.
    wanted : str
        The library, with its oldest version that serves; by default what was not found.
    """
    library = wanted or error.name or "a library"
    name = library.split()[0]
    if isinstance(error, ModuleNotFoundError) and error.name == name:
        words = (
            f"{module} needs {library}, which is not installed; pip install 'scfa-core[{extra}]'"
        )
        return ModuleNotFoundError(words, name=name)
    return ImportError(
        f"{module} needs {library}, and what is installed, {version_of(name)}, does not serve "
        f"({error}); pip install --upgrade 'scfa-core[{extra}]'",
        name=error.name,
    )
