"""What `import scfa_core` offers: exactly `__all__`, each of it documented."""

import builtins
import doctest
import importlib
import inspect
import pkgutil
import types

import pytest

import scfa_core

PUBLIC = [name for name in scfa_core.__all__ if name != "__version__"]
FUNCTIONS = [n for n in PUBLIC if isinstance(getattr(scfa_core, n), types.FunctionType)]
CLASSES = [n for n in PUBLIC if isinstance(getattr(scfa_core, n), type)]
ERRORS = [n for n in CLASSES if issubclass(getattr(scfa_core, n), Exception)]


def test_all_is_what_there_is():
    modules = {name for _, name, _ in pkgutil.iter_modules(scfa_core.__path__)}
    modules |= {"backends", "reference", "TYPE_CHECKING"}
    seen = {name for name in vars(scfa_core) if not name.startswith("_")} - modules
    assert seen | {"backends", "__version__"} == set(scfa_core.__all__)
    assert len(scfa_core.__all__) == len(set(scfa_core.__all__))


def test_backends_stays_the_function_when_the_folder_is_imported():
    importlib.import_module("scfa_core.backends")
    assert callable(scfa_core.backends)
    assert set(scfa_core.backends()) == {"cupy", "numba-cuda", "numba-cpu", "reference"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_documented(name):
    function = getattr(scfa_core, name)
    documentation = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters:
        assert parameter in documentation, f"{name} says nothing of {parameter}"


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_documented(name):
    documented = getattr(scfa_core, name)
    assert documented.__doc__
    if name in ERRORS or name in ("Pattern", "Intersection", "Plan"):
        return
    for parameter in inspect.signature(documented).parameters:
        assert parameter in documented.__doc__, f"{name} says nothing of {parameter}"


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_also_the_builtin_a_caller_expects(name):
    error = getattr(scfa_core, name)
    assert issubclass(error, scfa_core.ScfaError)
    if name != "ScfaError":
        ours = {scfa_core.ScfaError, error}
        theirs = [c for c in error.__mro__ if c not in ours and c is not Exception]
        assert any(getattr(builtins, c.__name__, None) is c for c in theirs[:1])


WITH_EXAMPLES = ["", ".api", ".dispatch", ".validation"]
WITH_EXAMPLES += [f".patterns.{name}" for name in ("causal", "documents", "sliding_window")]


@pytest.mark.parametrize("module", [f"scfa_core{name}" for name in WITH_EXAMPLES])
def test_examples_in_docstrings_run(module):
    found = importlib.import_module(module)
    names = dict(vars(scfa_core))
    result = doctest.testmod(found, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0
