"""The words that the variables of cupy take, read at every call; any other is refused."""

import re
from types import SimpleNamespace

import pytest
import recorded_launches
from recorded_launches import (
    PLAN,
    Context,
    backward_arrays,
    float32_arrays,
    forward_arrays,
    problem,
)
from scfa_core.backends.cupy_raw import bound_sm90, launch, launch_sm90, loader

from scfa_core.errors import BackendUnavailable

launched = recorded_launches.launched


def test_the_choice_of_kernels_is_read_at_every_call(launched, monkeypatch):
    for module in (launch, launch_sm90):
        monkeypatch.setattr(module, "compute_capability", lambda device: (9, 0))
    arrays = forward_arrays()
    bound = launch.bind_forward(problem(), *arrays)
    at = tuple(x.pointer for x in arrays)
    for name, kernel in (
        ("auto", "scfa_fwd_sm90"),
        ("sm80", "scfa_fwd"),
        ("sm90", "scfa_fwd_sm90"),
    ):
        monkeypatch.setenv("SCFA_CUPY_KERNELS", name)
        bound(PLAN, at, Context())
        assert launched[-1][0] == kernel
    monkeypatch.setenv("SCFA_CUPY_KERNELS", "fast")
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="SCFA_CUPY_KERNELS must be one of"):
            bound(PLAN, at, Context())


def test_tf32_is_asked_for_at_every_call(launched, monkeypatch):
    """The same bound calls, exact by default; wider heads have no such kernels."""
    kernels = ("fwd", "bwd_dq", "bwd_dkdv")
    for dim in (64, 128):
        arrays = float32_arrays(dim)
        at = tuple(x.pointer for x in arrays)
        sizes = problem(dtype="float32", head_dim=dim, head_dim_v=dim)
        forward = launch.bind_forward(sizes, *arrays[1:6])
        backward = launch.bind_backward(sizes, *arrays)
        for asked in (None, "tf32", "exact", "tf32"):
            if asked is None:
                monkeypatch.delenv("SCFA_CUPY_FP32", raising=False)
            else:
                monkeypatch.setenv("SCFA_CUPY_FP32", asked)
            launched.clear()
            forward(PLAN, at[1:6], Context())
            backward(PLAN, at, Context())
            suffix, element = ("", 3) if asked == "tf32" else ("_fp32", 0)
            assert [x[0] for x in launched] == [f"scfa_{name}{suffix}" for name in kernels]
            assert {x[1]["ELEMENT"] for x in launched} == {element}
    wide = float32_arrays(136)
    sizes = problem(dtype="float32", head_dim=136, head_dim_v=136)
    launch.bind_forward(sizes, *wide[1:6])(PLAN, tuple(x.pointer for x in wide[1:6]), Context())
    assert launched[-1][0] == "scfa_fwd_fp32"


def test_tf32_concerns_float32_alone(launched, monkeypatch):
    arrays = forward_arrays()
    at = tuple(x.pointer for x in arrays)
    bound = launch.bind_forward(problem(), *arrays)
    bound(PLAN, at, Context())
    for asked in ("tf32", "fast"):
        monkeypatch.setenv("SCFA_CUPY_FP32", asked)
        bound(PLAN, at, Context())
        assert launched[-1] == launched[0]


def test_unknown_products_are_refused(launched, monkeypatch):
    arrays = float32_arrays()
    at = tuple(x.pointer for x in arrays)
    sizes = problem(dtype="float32")
    forward = launch.bind_forward(sizes, *arrays[1:6])
    backward = launch.bind_backward(sizes, *arrays)
    monkeypatch.setenv("SCFA_CUPY_FP32", "fast")
    wanted = r"SCFA_CUPY_FP32 must be one of \['exact', 'tf32'\], got 'fast': change or unset it"
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match=wanted):
            forward(PLAN, at[1:6], Context())
        with pytest.raises(BackendUnavailable, match=wanted):
            backward(PLAN, at, Context())
    assert not launched


def call(bind, sizes, arrays):
    bind(sizes, *arrays)(PLAN, tuple(x.pointer for x in arrays), Context())


def call_of_hopper():
    arrays = backward_arrays()
    bound = bound_sm90.bind_backward(problem(), True, *arrays)
    bound(PLAN, tuple(x.pointer for x in arrays), Context())


CALLS = {
    "SCFA_CUPY_KERNELS": lambda: call(launch.bind_backward, problem(), backward_arrays()),
    "SCFA_CUPY_FP32": lambda: call(
        launch.bind_backward, problem(dtype="float32"), float32_arrays()
    ),
    "SCFA_CUPY_BACKWARD": call_of_hopper,
    "SCFA_CUPY_SANITIZE": lambda: loader.get_kernel("n", "n.cu", (), 0, arch_suffix="a"),
}


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(loader, "_cubin", lambda *_: b"")
    monkeypatch.setattr(loader, "_target", lambda device, suffix: f"90{suffix}")
    monkeypatch.setattr(loader, "_kernels", {})
    monkeypatch.setattr(loader, "Kernel", lambda *_: SimpleNamespace())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SCFA_CUPY_KERNELS", ["auto", "sm80", "sm90"]),
        ("SCFA_CUPY_FP32", ["exact", "tf32"]),
        ("SCFA_CUPY_BACKWARD", ["auto", "fused", "split"]),
        ("SCFA_CUPY_SANITIZE", ["0", "1"]),
    ],
)
def test_every_variable_refuses_what_it_does_not_know(
    launched, nothing_compiled, monkeypatch, name, words
):
    """What was expected, what came, what to do; an empty one is none at all."""
    monkeypatch.setenv(name, "Fast")
    wanted = re.escape(f"${name} must be one of {words}, got 'Fast': change or unset it")
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match=wanted):
            CALLS[name]()
    assert not launched
    for value in (words[0], ""):
        monkeypatch.setenv(name, value)
        CALLS[name]()
    monkeypatch.delenv(name)
    CALLS[name]()
    assert launched[: len(launched) // 3] * 3 == launched
