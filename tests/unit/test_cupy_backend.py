"""Why the cupy backend cannot serve, in words that name the cure."""

import dataclasses
import sys
import threading
import time
import types

import pytest
from scfa_core.backends import cupy_raw
from scfa_core.backends.cupy_raw import BACKEND, loader, nvrtc

from scfa_core.errors import BackendUnavailable
from scfa_core.problem import Problem

PROBLEM = Problem(1, 2, 2, 8, 8, 64, 64, "bfloat16", "cuda:0", 0.125)


class CUDARuntimeError(RuntimeError):
    def __init__(self, status):
        self.status = status
        super().__init__(f"status {status}")


def fake_cupy(devices=1, capability=(9, 0), driver=13000, error=None):
    """A cupy with one runtime that answers, or fails with status `error`."""

    def count():
        if error is not None:
            raise CUDARuntimeError(error)
        return devices

    runtime = types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=count,
        driverGetVersion=lambda: driver,
        deviceGetAttribute=lambda attribute, device: capability[attribute - 75],
    )
    module, cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
    module.cuda, cuda.runtime = cuda, runtime
    return {"cupy": module, "cupy.cuda": cuda}


@pytest.fixture
def install(monkeypatch):
    """Put a fake cupy in place and forget what was learnt of the real one."""

    def install(modules):
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(cupy_raw, "_compiler_reason", lambda: None)

    caches = (cupy_raw._availability, loader.compute_capability, loader._target)
    for cached in caches:
        cached.cache_clear()
    yield install
    for cached in caches:
        cached.cache_clear()


REASONS = {
    "not installed": ({"cupy": None}, "CuPy is not installed: pip install 'scfa-core"),
    "no driver": (fake_cupy(error=35, driver=0), "there is no NVIDIA driver"),
    "old driver": (fake_cupy(error=35, driver=11040), "driver is too old for this CuPy: update"),
    "no device": (fake_cupy(error=100), "no CUDA device is visible"),
    "hidden devices": (fake_cupy(devices=0), "CUDA_VISIBLE_DEVICES"),
    "broken": (fake_cupy(error=999), "cannot start"),
    "old card": (fake_cupy(capability=(7, 5)), r"compute capability 7\.5, the kernels need 8\.0"),
}


@pytest.mark.parametrize("name", REASONS)
def test_every_reason_names_its_cure(install, name):
    modules, words = REASONS[name]
    install(modules)
    reason = BACKEND.availability()
    assert reason is not None
    import re

    assert re.search(words, reason), reason


def test_available_on_an_ampere_card(install):
    install(fake_cupy(capability=(8, 6)))
    assert BACKEND.availability() is None
    assert BACKEND.can_run(PROBLEM) is None


def test_a_surprise_is_a_reason_not_an_exception(install, monkeypatch):
    def surprise():
        raise ValueError("odd")

    monkeypatch.setattr(cupy_raw, "_availability", surprise)
    assert "ValueError: odd" in BACKEND.availability()
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "float64"}, "float16, bfloat16, float32, got float64"),
        ({"head_dim": 12}, "head_dim must be a multiple of 8"),
        ({"head_dim_v": 264}, "head_dim_v must be a multiple of 8"),
    ],
)
def test_what_it_does_not_compute(install, change, words):
    install(fake_cupy())
    assert words in BACKEND.can_run(dataclasses.replace(PROBLEM, **change))


def test_a_second_card_that_is_too_old_is_refused_alone(install):
    modules = fake_cupy(devices=2)
    by_device = {0: (9, 0), 1: (7, 0)}
    modules["cupy.cuda"].runtime.deviceGetAttribute = lambda attribute, device: by_device[device][
        attribute - 75
    ]
    install(modules)
    assert BACKEND.availability() is None
    assert "cuda:1" in BACKEND.can_run(dataclasses.replace(PROBLEM, device="cuda:1"))


@pytest.mark.parametrize(
    ("capability", "suffix", "known", "target"),
    [
        ((9, 0), "", (80, 86, 90), "90"),
        ((9, 0), "a", (80, 86, 90), "90a"),
        ((8, 9), "", (80, 86), "86"),
        ((12, 1), "", (80, 90, 100, 120), "120"),
        ((12, 0), "", (80, 90), None),
        ((10, 0), "", (80, 90, 101), None),
        ((8, 9), "a", (80, 86), None),
    ],
)
def test_target_architecture(install, monkeypatch, capability, suffix, known, target):
    """A cubin runs on later cards of its major number; one with a suffix on its own card only."""
    install(fake_cupy(capability=capability))
    compiler = types.SimpleNamespace(architectures=lambda: known, version=lambda: (12, 4))
    monkeypatch.setattr(nvrtc, "cupy_compiler", lambda: compiler)
    if target is None:
        with pytest.raises(BackendUnavailable, match=r"NVRTC 12\.4 cannot compile"):
            loader._target(0, suffix)
    else:
        assert loader._target(0, suffix) == target


def test_out_of_memory_is_a_memory_error():
    error = types.SimpleNamespace(status=2)
    assert isinstance(loader._cuda_error("while loading x", error), MemoryError)
    assert isinstance(loader._cuda_error("while loading x", ValueError("y")), RuntimeError)


class Driver:
    """CuPy's driver binding with one current context."""

    class CUDADriverError(RuntimeError):
        pass

    def __init__(self, current):
        self.current, self.launches, self.switches = current, [], []

    def ctxGetCurrent(self):  # noqa: N802  CuPy's name
        return self.current

    def ctxSetCurrent(self, context):  # noqa: N802
        self.switches.append(context)
        self.current = context

    def launchKernel(self, function, *arguments):  # noqa: N802
        if arguments[3] > 1024:
            raise self.CUDADriverError("too many threads")
        self.launches.append((self.current, function))


@pytest.mark.parametrize("current", [7, 5, 0], ids=["same", "other card", "new thread"])
def test_a_launch_leaves_the_thread_on_its_card(monkeypatch, current):
    """Launched in the kernel's context, refused or not; no call of the runtime meanwhile."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    kernel, driver = object.__new__(loader.Kernel), Driver(current)
    kernel.name, kernel._function, kernel._context = "scfa_fwd", 11, 7
    kernel._driver, kernel._shared_limit = driver, 48 * 1024
    kernel.launch((1, 1, 1), 128, 0, 0, b"params")
    with pytest.raises(RuntimeError, match="while launching scfa_fwd"):
        kernel.launch((1, 1, 1), 2048, 0, 0, b"params")
    assert driver.launches == [(7, 11)]
    assert driver.current == current
    assert driver.switches == ([] if current == 7 else [7, current] * 2)


def test_threads_that_raise_a_kernels_limit_do_not_lower_it():
    """Of two calls at once the one that wants less comes to the driver last, if it comes at all."""

    class Slow(Driver):
        limit = 0

        def funcSetAttribute(self, function, attribute, value):  # noqa: N802
            asked.set()
            time.sleep(0.2 if value == 60_000 else 0.05)
            self.limit = value

    kernel, driver, asked = object.__new__(loader.Kernel), Slow(7), threading.Event()
    kernel.name, kernel._function, kernel._context = "scfa_plan_sort", 11, 7
    kernel._driver, kernel._shared_limit = driver, 48 * 1024
    calls = [
        threading.Thread(target=kernel.launch, args=((1, 1, 1), 128, shared, 0, b"params"))
        for shared in (60_000, 100_000)
    ]
    calls[0].start()
    assert asked.wait(30)
    calls[1].start()
    for call in calls:
        call.join()
    assert driver.limit == kernel._shared_limit == 100_000
