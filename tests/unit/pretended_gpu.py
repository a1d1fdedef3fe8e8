"""A pretended GPU for tests of the torch bridge: what a backend gets are addresses of host memory.

CPU tensors play cuda:0, and the reference computes on the arrays that addresses lead to.
"""

import ctypes
import weakref

import numpy as np
import pytest
import torch
from scfa_core.reference.backend import BACKEND as REFERENCE

import scfa_core as scfa
from scfa_core import (
    dispatch,
    torch_bridge,
    torch_calls,
    torch_framework,
    torch_plans,
    torch_storage,
)
from scfa_core.arrays import DeviceArray

MODULES = (torch_bridge, torch_calls, torch_framework, torch_plans, torch_storage)
STREAM = 77


def at_address(x):
    """NumPy view of a `DeviceArray`."""
    name = {"bfloat16": "uint16"}.get(x.dtype, x.dtype)
    dtype = np.dtype(name)
    last = sum((n - 1) * step for n, step in zip(x.shape, x.strides, strict=True))
    if 0 in x.shape:
        return np.empty(x.shape, dtype)
    memory = (ctypes.c_char * ((last + 1) * dtype.itemsize)).from_address(x.pointer)
    strides = [step * dtype.itemsize for step in x.strides]
    return np.ndarray(x.shape, dtype, memory, 0, strides)


class Describing:
    """A CUDA backend of the five verbs; the reference computes."""

    name = "cupy"
    memory = "cuda"

    def __init__(self):
        self.seen = []
        self.before_forward = lambda plan: None

    def availability(self):
        return None

    def can_run(self, problem):
        return None

    def note(self, verb, ctx):
        assert (ctx.device, ctx.stream) == (0, STREAM)
        ctx.empty((3,), "float32")
        self.seen.append(verb)

    def make_plan(self, problem, clauses, plan, ctx):
        self.note("make_plan", ctx)
        host = clauses.with_arrays(map(at_address, clauses.arrays))
        REFERENCE.make_plan(problem, host, self.host_plan(plan), ctx)

    def forward(self, problem, plan, *arrays_and_ctx):
        *arrays, ctx = arrays_and_ctx
        self.note("forward", ctx)
        self.before_forward(plan)
        REFERENCE.forward(problem, self.host_plan(plan), *map(at_address, arrays), ctx)

    def backward(self, problem, plan, *arrays_and_ctx):
        *arrays, ctx = arrays_and_ctx
        self.note("backward", ctx)
        REFERENCE.backward(problem, self.host_plan(plan), *map(at_address, arrays), ctx)

    @staticmethod
    def host_plan(plan):
        return type(plan)(*map(at_address, plan[:-1]), monotone=plan.monotone)


class Binding(Describing):
    """The same, told facts once and addresses afterwards."""

    def __init__(self):
        super().__init__()
        self.bound = []

    def bind_make_plan(self, problem, clauses, device):
        assert device == 0
        return self.bind("make_plan", problem, clauses.arrays, clauses)

    def bind_forward(self, problem, *arrays):
        return self.bind("forward", problem, arrays)

    def bind_backward(self, problem, *arrays):
        return self.bind("backward", problem, arrays)

    def bind(self, verb, problem, facts, clauses=None):
        self.bound.append(verb)
        shapes = torch_storage.plan_storage(problem, "cuda").facts

        def bound(plan, addresses, ctx):
            arrays = [x._replace(pointer=at) for x, at in zip(facts, addresses, strict=True)]
            lists = [DeviceArray(at, *f, "int32", 0) for at, f in zip(plan, shapes, strict=False)]
            native = torch_calls.PlanArrays(*lists, monotone=plan.monotone)
            if clauses is not None:
                self.make_plan(problem, clauses.with_arrays(arrays), native, ctx)
            else:
                getattr(self, verb)(problem, native, *arrays, ctx)

        return bound


@pytest.fixture
def allocated():
    """Weak references to everything allocated on the pretended GPU."""
    return []


@pytest.fixture(params=[Describing, Binding])
def device(request, monkeypatch, allocated):
    return pretend(request.param(), monkeypatch, allocated)


def pretend(backend, monkeypatch, allocated):
    """Let CPU tensors play cuda:0 from now on, and `backend` serve it."""

    def empty(shape, strides, dtype):
        x = torch.empty_strided(shape, strides, dtype=dtype)
        x.view(torch.uint8).fill_(0xA5) if x.is_contiguous() else x.fill_(-7)
        allocated.append(weakref.ref(x))
        return x

    pretended = {
        "device_name": lambda place: "cuda:0" if place.type == "cpu" else str(place),
        "current_device": lambda: 0,
        "raw_stream": lambda ordinal: STREAM,
        "empty_cuda": empty,
    }
    for module in MODULES:
        for name, pretence in pretended.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, pretence)
    # What is remembered of calls before is of the host: their tensors have the same device in name.
    monkeypatch.setattr(torch_calls, "_calls", {})
    monkeypatch.setitem(dispatch._loaded, "cupy", backend)
    return backend


BATCH, HEADS, HEADS_KV, ROWS, KEYS = 2, 4, 2, 9, 9


def tensors(layout="bhtd", keys=KEYS, seed=0, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, ROWS, 16), (HEADS_KV, keys, 16), (HEADS_KV, keys, 24))
    found = [torch.randn(BATCH, *shape, generator=generator).to(dtype) for shape in shapes]
    if layout == "bthd":
        found = [x.transpose(1, 2) for x in found]
    return [x.requires_grad_(**options) for x in found]


def ids(heads, rows, top=3, dtype=torch.int32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, (BATCH, heads, rows), generator=generator).to(dtype)


def hashes(dtype=torch.int32, seed=0, keys=KEYS):
    return ids(HEADS, ROWS, dtype=dtype, seed=seed), ids(HEADS_KV, keys, dtype=dtype, seed=seed + 1)


def truth(q, k, v, pattern, layout="bhtd"):
    """Out and gradients by the reference, from NumPy."""
    dense = torch.from_numpy(
        pattern.mask(ROWS, k.shape[2 if layout == "bhtd" else 1], batch=BATCH, heads=HEADS,
                     heads_kv=HEADS_KV)
    )  # fmt: skip
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    rows = [x.transpose(1, 2) if layout == "bthd" else x for x in leaves]
    keys, values = (x.repeat_interleave(HEADS // HEADS_KV, 1) for x in rows[1:])
    scores = (rows[0] @ keys.mT / 4).masked_fill(~dense, float("-inf"))
    out = torch.nan_to_num(scores.softmax(-1)) @ values
    out = out.transpose(1, 2) if layout == "bthd" else out
    out.sum().backward()
    return out.detach(), [torch.nan_to_num(x.grad) for x in leaves]


def assert_right(q, k, v, pattern, layout="bhtd", same=None):
    """Hold the answers to `pattern` against the truth of it, or of another spelled out."""
    want, grads = truth(q, k, v, pattern if same is None else same, layout)
    out = scfa.attention(q, k, v, pattern, layout=layout)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    if q.requires_grad:
        got = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        for mine, true in zip(got, grads, strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=1e-3, atol=1e-4)
