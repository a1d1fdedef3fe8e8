"""Which backend serves a problem: the five verbs, the registry, and the choice with its reasons."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, cast

from scfa_core.environment import Variable
from scfa_core.errors import BackendUnavailable, UnknownBackend

if TYPE_CHECKING:
    from scfa_core.arrays import CallContext, DeviceArray
    from scfa_core.lowering import Clauses
    from scfa_core.plan import Plan, PlanAddresses, PlanArrays
    from scfa_core.problem import Problem

logger = logging.getLogger("scfa_core")

ENVIRONMENT_VARIABLE = "SCFA_BACKEND"
AUTO = "auto"
_HOMES = {
    "cupy": "scfa_core.backends.cupy_raw",
    "numba-cuda": "scfa_core.backends.numba_cuda",
    "numba-cpu": "scfa_core.backends.numba_cpu",
    "reference": "scfa_core.reference.backend",
}
BACKEND_NAMES = tuple(_HOMES)
# `reference` is never chosen by itself: it is the truth, not a way to run.
_AUTO_ORDER = {"cpu": ("numba-cpu",), "cuda": ("cupy", "numba-cuda")}


class Backend(Protocol):
    """What a backend must do; arrays come in native form (`memory`), see docs/backends.md."""

    name: str
    memory: str  # "host": NumPy arrays (bfloat16 as uint16); "cuda": arrays.DeviceArray

    def availability(self) -> str | None:
        """None if it can run on this machine, else the reason and the cure; never raises."""

    def can_run(self, problem: Problem) -> str | None:
        """None if it serves `problem`, else the reason."""

    def make_plan(
        self, problem: Problem, clauses: Clauses, plan: PlanArrays, ctx: CallContext
    ) -> None:
        """Fill the arrays of `plan`."""

    def forward(
        self,
        problem: Problem,
        plan: PlanArrays,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        ctx: CallContext,
    ) -> None:
        """Write every element of `out` and `lse`."""

    def backward(
        self,
        problem: Problem,
        plan: PlanArrays,
        dout: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        dq: Any,
        dk: Any,
        dv: Any,
        ctx: CallContext,
    ) -> None:
        """Write every element of `dq`, `dk` and `dv`."""


class Bound(Protocol):
    """A verb of which all but addresses is settled."""

    def __call__(self, plan: PlanAddresses, arrays: tuple[int, ...], ctx: CallContext, /) -> None:
        """Run it on a plan and on arrays at these addresses, with their device current."""


class BindingBackend(Backend, Protocol):
    """A backend on GPUs that settles a call's facts once; optional, it saves host time only.

    Arrays are described as for the verb of the same name, and their addresses do not count; the
    bound verb takes addresses in the same order (those of clauses in that of `Clauses.arrays`).
    """

    def bind_make_plan(self, problem: Problem, clauses: Clauses, device: int) -> Bound:
        """Settle `make_plan` on a CUDA device."""

    def bind_forward(self, problem: Problem, *arrays: DeviceArray) -> Bound:
        """Settle `forward` for q, k, v, out, lse."""

    def bind_backward(self, problem: Problem, *arrays: DeviceArray) -> Bound:
        """Settle `backward` for dout, q, k, v, out, lse, dq, dk, dv."""


_variable = Variable(ENVIRONMENT_VARIABLE)
_requested: ContextVar[str | None] = ContextVar("scfa_backend", default=None)
_loaded: dict[str, Backend | str] = {}


def check_name(name: str) -> str:
    """Return `name` if it is ``auto`` or a backend; raise `UnknownBackend` otherwise."""
    if not isinstance(name, str) or (name != AUTO and name not in _HOMES):
        raise UnknownBackend(f"backend must be one of {(AUTO, *BACKEND_NAMES)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend for all calls in this context (of this thread or task), in a ``with``.

    >>> with use_backend("reference"):
    ...     pass

    Parameters
    ----------
    name : str
        ``"auto"``, ``"cupy"``, ``"numba-cuda"``, ``"numba-cpu"`` or ``"reference"``.

    Raises
    ------
    UnknownBackend
        No such name. That it cannot serve is found at the call.
    """
    token = _requested.set(check_name(name))
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend(argument: str | None = None) -> str:
    """The name in force: argument, then `use_backend`, then $SCFA_BACKEND, then ``auto``."""
    if argument is not None:
        return check_name(argument)
    from_context = _requested.get()
    if from_context is not None:
        return from_context
    from_environment = _variable.get()
    if not from_environment:
        return AUTO
    if from_environment != AUTO and from_environment not in _HOMES:
        raise UnknownBackend(
            f"${ENVIRONMENT_VARIABLE} must be one of {(AUTO, *BACKEND_NAMES)}, "
            f"got {from_environment!r}"
        )
    return from_environment


def load_backend(name: str) -> Backend | str:
    """Import a backend once; a string is the reason why it cannot be imported."""
    if name not in _loaded:
        try:
            _loaded[name] = cast(Backend, importlib.import_module(_HOMES[name]).BACKEND)
        except Exception as error:  # a broken install of one must not break another
            _loaded[name] = f"cannot be imported: {type(error).__name__}: {error}"
    return _loaded[name]


def unavailable_reason(name: str) -> str | None:
    """None if backend `name` can run on this machine, otherwise why not."""
    backend = load_backend(name)
    return backend if isinstance(backend, str) else backend.availability()


def backends() -> dict[str, str]:
    """Every backend and whether it can run on this machine.

    Returns
    -------
    dict of str to str
        Name to ``"available"`` or the reason why not, with the cure.
    """
    return {name: unavailable_reason(name) or "available" for name in BACKEND_NAMES}


def _reason_against(name: str, problem: Problem) -> str | None:
    """Why `name` cannot serve `problem`, device and all, or None."""
    reason = unavailable_reason(name)
    if reason is not None:
        return reason
    backend = cast(Backend, load_backend(name))
    kind = "cuda" if problem.device.startswith("cuda") else "cpu"
    if problem.device != "cpu" and kind != "cuda":
        return f"no backend serves arrays on {problem.device}"
    wanted = "cpu" if backend.memory == "host" else "cuda"
    if kind != wanted:
        return f"it works on {wanted} arrays, got arrays on {problem.device}"
    return backend.can_run(problem)


def choose_backend(problem: Problem, requested: str) -> Backend:
    """Return the backend that serves `problem`.

    Raises
    ------
    BackendUnavailable
        `requested` cannot serve, or under ``auto`` none can; every reason is listed.
    """
    if requested != AUTO:
        reason = _reason_against(requested, problem)
        if reason is not None:
            raise BackendUnavailable(f"backend {requested!r} cannot serve this call: {reason}")
        return cast(Backend, load_backend(requested))
    reasons: dict[str, str] = {}
    kind = "cuda" if problem.device.startswith("cuda") else "cpu"
    for name in _AUTO_ORDER[kind]:
        reason = _reason_against(name, problem)
        if reason is None:
            level = logging.WARNING if reasons else logging.DEBUG
            logger.log(level, "auto chose backend %s for %s%s", name, problem, reasons or "")
            return cast(Backend, load_backend(name))
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendUnavailable(
        f"no backend can serve this call on {problem.device}: {listed}. "
        "`python -m scfa_core info` shows the state of each"
    )


def choose_for_plan(plan: Plan, problem: Problem, requested: str) -> Backend:
    """Choose the backend for a plan that exists: its maker, unless told otherwise.

    Host plans are all alike; on a GPU the work list belongs to the backend that made it.
    """
    chosen = choose_backend(problem, plan.backend if requested == "auto" else requested)
    maker = load_backend(plan.backend)
    if chosen.name != plan.backend and not (
        chosen.memory == "host" and getattr(maker, "memory", None) == "host"
    ):
        raise BackendUnavailable(
            f"the plan was made by backend {plan.backend!r} and its work list is not for "
            f"{chosen.name!r}; make it with make_plan(..., backend={chosen.name!r})"
        )
    return chosen
