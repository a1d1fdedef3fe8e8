"""Exact sparse causal flash attention: patterns per head and sequence, forward and backward.

>>> import scfa_core as scfa
>>> sorted(scfa.backends())
['cupy', 'numba-cpu', 'numba-cuda', 'reference']

Importing this package imports no GPU library and neither torch nor numba.
"""

from typing import TYPE_CHECKING

from scfa_core.api import attention, attention_backward, make_plan
from scfa_core.dispatch import use_backend
from scfa_core.errors import (
    BackendUnavailable,
    DeviceError,
    DTypeError,
    GradientError,
    LayoutError,
    OptionError,
    PatternError,
    ScaleError,
    ScfaError,
    ShapeError,
    UnknownBackend,
)
from scfa_core.patterns import (
    Causal,
    Documents,
    HashSparse,
    Intersection,
    KeyRanges,
    Pattern,
    QKSparse,
    SlidingWindow,
)
from scfa_core.plan import Plan
from scfa_core.validation import validate

if TYPE_CHECKING:
    from scfa_core.dispatch import backends
else:  # the package answers the call too: see its docstring
    try:
        from scfa_core import backends
    except ImportError as error:  # docs/decisions/0001-packaging.md
        raise ImportError(
            f"{__path__[0]} is a source checkout, which hides the installed package and has no "
            "backends inside: install it by `pip install -e .` (as README.md says), or run Python "
            "in another folder or with -P"
        ) from error

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Causal",
    "DTypeError",
    "DeviceError",
    "Documents",
    "GradientError",
    "HashSparse",
    "Intersection",
    "KeyRanges",
    "LayoutError",
    "OptionError",
    "Pattern",
    "PatternError",
    "Plan",
    "QKSparse",
    "ScaleError",
    "ScfaError",
    "ShapeError",
    "SlidingWindow",
    "UnknownBackend",
    "__version__",
    "attention",
    "attention_backward",
    "backends",
    "make_plan",
    "use_backend",
    "validate",
]
