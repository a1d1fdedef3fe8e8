"""Every error raised on purpose: a child of `ScfaError` and of the builtin one would expect."""

from __future__ import annotations


class ScfaError(Exception):
    """Base of all errors raised by scfa_core; catch this to catch them all."""


class ShapeError(ScfaError, ValueError):
    """A rank, size or head count does not fit."""


class DTypeError(ScfaError, TypeError):
    """An array has an element type that the operation does not take."""


class DeviceError(ScfaError, ValueError):
    """Arrays live on different devices, or on one that is not supported."""


class LayoutError(ScfaError, ValueError):
    """An unknown layout name, or an array whose last axis is not contiguous."""


class PatternError(ScfaError, ValueError):
    """A pattern is built or combined in a way that has no meaning."""


class ScaleError(ScfaError, ValueError):
    """`softmax_scale` is not a finite number."""


class OptionError(ScfaError, TypeError):
    """An option is of a kind that it cannot be, such as a word for a flag."""


class GradientError(ScfaError, RuntimeError):
    """A gradient was asked for that this package does not compute."""


class BackendUnavailable(ScfaError, RuntimeError):  # noqa: N818 - reads as what it says
    """The chosen backend cannot serve here; the message says why and what to do."""


class UnknownBackend(ScfaError, ValueError):  # noqa: N818 - likewise
    """No backend has this name."""
