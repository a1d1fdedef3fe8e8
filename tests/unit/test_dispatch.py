"""Who serves a call: argument over context over environment over auto, never silently another."""

import os
import threading

import numpy as np
import pytest

import scfa_core as scfa
from scfa_core import dispatch
from scfa_core.environment import Variable

X = np.random.default_rng(0).standard_normal((1, 1, 4, 16))


def test_order_of_precedence(monkeypatch):
    monkeypatch.delenv("SCFA_BACKEND", raising=False)
    assert dispatch.requested_backend() == "auto"
    monkeypatch.setenv("SCFA_BACKEND", "numba-cpu")
    assert dispatch.requested_backend() == "numba-cpu"
    with scfa.use_backend("reference"):
        assert dispatch.requested_backend() == "reference"
        with scfa.use_backend("auto"):
            assert dispatch.requested_backend() == "auto"
        assert dispatch.requested_backend("cupy") == "cupy"
    assert dispatch.requested_backend() == "numba-cpu"


def test_context_is_of_the_thread(monkeypatch):
    monkeypatch.delenv("SCFA_BACKEND", raising=False)
    seen = []
    with scfa.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv("SCFA_BACKEND", "gpu")
    with pytest.raises(scfa.UnknownBackend, match="SCFA_BACKEND"):
        scfa.attention(X, X, X)


def test_every_backend_is_listed():
    states = scfa.backends()
    assert set(states) == set(dispatch.BACKEND_NAMES)
    assert states["reference"] == "available"
    assert states["numba-cpu"] == "available"


def test_auto_on_the_host_is_numba_cpu_and_never_the_reference(monkeypatch):
    monkeypatch.delenv("SCFA_BACKEND", raising=False)
    assert scfa.make_plan(scfa.Causal(), X, X).backend == "numba-cpu"
    monkeypatch.setitem(dispatch._loaded, "numba-cpu", "cannot be imported: planted")
    with pytest.raises(scfa.BackendUnavailable, match="planted"):
        scfa.attention(X, X, X)


def test_host_plans_serve_every_host_backend():
    plan = scfa.make_plan(scfa.Causal(), X, X, backend="reference")
    out = scfa.attention(X, X, X, plan, backend="numba-cpu")
    np.testing.assert_allclose(out, scfa.attention(X, X, X, backend="reference"), atol=1e-14)


def test_broken_backend_does_not_break_another(monkeypatch):
    monkeypatch.delitem(dispatch._loaded, "cupy", raising=False)
    monkeypatch.setitem(dispatch._HOMES, "cupy", "scfa_core.no_such_module")
    assert "cannot be imported" in scfa.backends()["cupy"]
    assert scfa.attention(X, X, X, backend="reference").shape == X.shape
    monkeypatch.delitem(dispatch._loaded, "cupy", raising=False)


def test_environment_variables_are_read_at_every_call(monkeypatch):
    variable = Variable("SCFA_TEST_VARIABLE")
    assert variable.get() is None
    monkeypatch.setenv("SCFA_TEST_VARIABLE", "é")
    assert variable.get() == "é"
    monkeypatch.setenv("SCFA_TEST_VARIABLE", "")
    assert variable.get() == ""
    monkeypatch.setattr(os, "environ", {"SCFA_TEST_VARIABLE": "other"})
    assert variable.get() == "other"
