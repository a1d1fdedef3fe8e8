"""Launches of bound calls as they would reach the driver, and addresses to bind them to."""

from types import SimpleNamespace

import played_driver
import pytest
from scfa_core.backends.cupy_raw import bound_sm90, launch, launch_sm90, planner, tensor_maps

from scfa_core.arrays import DeviceArray
from scfa_core.plan import PlanAddresses
from scfa_core.problem import Problem

PLAN = PlanAddresses(*(0x7F00_0000_0000 + (i << 20) for i in range(7)), monotone=True)
WORKSPACE = 0x7E00_0000_1000
STREAM = 77


class Context:
    """Workspace from one address on; keeps what was asked for."""

    device, stream = 0, STREAM

    def __init__(self):
        self.asked = []

    def empty(self, shape, dtype):
        at = WORKSPACE + (len(self.asked) << 20)
        self.asked.append((shape, dtype))
        return DeviceArray(at, shape, (1,), dtype, 0)


@pytest.fixture
def launched(monkeypatch):
    """Every launch of any kernel: name, constants, grid, block, shared memory, stream, params."""
    found = []

    def get_kernel(name, source, constants, device, *, arch_suffix=""):
        def enqueue(*arguments):
            found.append((name, dict(constants), *arguments))

        def bind(*settled):
            return lambda stream, params: enqueue(*settled, stream, params)

        return SimpleNamespace(name=name, launch=enqueue, bind=bind)

    for module in (launch, launch_sm90, planner):
        monkeypatch.setattr(module, "get_kernel", get_kernel)
    monkeypatch.setattr(planner, "_kernel", lambda name, device: get_kernel(name, "", (), device))
    for cached in ("_kernel", "_choose_kernel", "_envelope_kernel"):
        monkeypatch.setattr(launch_sm90, cached, getattr(launch_sm90, cached).__wrapped__)
    for module in (bound_sm90, launch_sm90, planner):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(launch_sm90, "_zero", lambda *arguments: found.append(("zero", *arguments)))
    for module in (launch, planner):
        monkeypatch.setattr(module, "shared_limit", lambda device: 232_448)
    for module in (launch, launch_sm90):
        monkeypatch.setattr(module, "compute_capability", lambda device: (8, 0))
    monkeypatch.setattr(tensor_maps, "_encode", lambda: played_driver.encode)
    launch._remembered.clear()
    yield found
    launch._remembered.clear()


def problem(**changes):
    sizes = dict.fromkeys(("batch", "heads_kv"), 2) | {"heads": 4, "seqlen_q": 90, "seqlen_k": 90}
    sizes |= {"head_dim": 64, "head_dim_v": 64, "dtype": "bfloat16", "device": "cuda:0"}
    return Problem(**{**sizes, "softmax_scale": 0.125, **changes})


def rows(at, heads=4, dtype="bfloat16", dim=64):
    return DeviceArray(at, (2, heads, 90, dim), (heads * 90 * dim, 90 * dim, dim, 1), dtype, 0)


def forward_arrays(shift=0, dim=64):
    at = [0x10_0000 * i + shift for i in range(1, 5)]
    lse = DeviceArray(0x90_0004, (2, 4, 90), (360, 90, 1), "float32", 0)
    q, k, v, out = (rows(x, heads, dim=dim) for x, heads in zip(at, (4, 2, 2, 4), strict=True))
    return (q, k, v, out, lse)


def backward_arrays(dim=64):
    q, k, v, out, lse = forward_arrays(dim=dim)
    at = zip((0xA0_0000, 0xB0_0000, 0xC0_0000, 0xD0_0000), (4, 2, 2, 4), strict=True)
    *grads, dout = (rows(x, heads, dim=dim) for x, heads in at)
    return (dout, q, k, v, out, lse, *grads)


def float32_arrays(dim=64):
    """dout, q, k, v, out, lse, dq, dk, dv."""
    lse = backward_arrays()[5]
    at = iter(range(0x100_0000, 0x1000_0000, 0x100_0000))

    def one(heads):
        return rows(next(at), heads, "float32", dim)

    return (one(4), one(4), one(2), one(2), one(4), lse, one(4), one(2), one(2))
