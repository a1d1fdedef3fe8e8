"""The way of GPU tensors, walked with host memory: a backend gets addresses, and nothing is stale.

CPU tensors play cuda:0, and the reference computes on the arrays that addresses lead to.
"""

import contextlib
import ctypes
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

from scfa_core.reference.backend import BACKEND as REFERENCE  # noqa: E402

import scfa_core as scfa  # noqa: E402
from scfa_core import (  # noqa: E402
    dispatch,
    torch_bridge,
    torch_calls,
    torch_framework,
    torch_plans,
    torch_storage,
)
from scfa_core.arrays import DeviceArray  # noqa: E402

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
    backend = request.param()

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
    want, grads = truth(q, k, v, same or pattern, layout)
    out = scfa.attention(q, k, v, pattern, layout=layout)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    if q.requires_grad:
        got = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        for mine, true in zip(got, grads, strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=1e-3, atol=1e-4)


def patterns():
    q_hash, k_hash = hashes()
    flags = [x.bool() for x in hashes(seed=4)]
    documents = ids(1, ROWS).sort(-1).values[:, 0]
    start = ids(HEADS, ROWS, top=4)
    return {
        "causal": scfa.Causal(),
        "window": scfa.SlidingWindow(3) & scfa.Causal(include_self=False),
        "int32": scfa.HashSparse(q_hash, k_hash),
        "int64": scfa.HashSparse(q_hash.long(), k_hash, causal=False),
        "int16": scfa.HashSparse(q_hash.short(), k_hash.byte()),
        "broadcast": scfa.HashSparse(q_hash[:, :1], k_hash[:1]),
        "strided": scfa.HashSparse(q_hash.mT.contiguous().mT, k_hash.flip(0)),
        "keep": scfa.QKSparse(*flags),
        "keep numbers": scfa.QKSparse(flags[0].float() - 2, flags[1]),
        "documents": scfa.Documents(documents),
        "ranges": scfa.KeyRanges(start, start + 4),
        "many": scfa.HashSparse(q_hash, k_hash) & scfa.QKSparse(*flags) & scfa.Documents(documents),
    }


@pytest.mark.parametrize("name", patterns())
def test_every_kind_of_clause(device, name):
    pattern = patterns()[name]
    for seed in (0, 1):  # found out, then remembered
        assert_right(*tensors(seed=seed), pattern)
        assert_right(*tensors(seed=seed, requires_grad=False), pattern)
    assert device.seen.count("make_plan") == 4


def test_a_minus_that_is_not_in_memory(device):
    q, k, v = tensors(requires_grad=False)
    q_hash, k_hash = hashes()
    minus, same = torch._neg_view(q_hash), scfa.HashSparse(-q_hash, k_hash.sub(2))
    assert_right(q, k, v, scfa.HashSparse(minus, k_hash.sub(2)), same=same)
    assert_right(q, k, v, scfa.HashSparse(minus, k_hash.sub(2).short()), same=same)


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_layouts_and_dtypes(device, layout):
    q, k, v = tensors(layout)
    assert_right(q, k, v, scfa.HashSparse(*hashes()), layout)
    half = [x.detach().bfloat16() for x in (q, k, v)]
    out = scfa.attention(*half, layout=layout)
    want, _ = truth(*half, scfa.Causal(), layout)
    assert out.stride() == scfa.attention(q, k, v, layout=layout).stride()
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("device", [Binding], indirect=True)
def test_facts_are_told_once(device):
    """Three calls of the same facts: a binding backend binds each verb once."""
    for seed in range(3):
        q, k, v = tensors(seed=seed)
        scfa.attention(q, k, v, scfa.HashSparse(*hashes(seed=seed))).sum().backward()
    assert device.bound == ["make_plan", "forward", "backward"]
    assert device.seen == ["make_plan", "forward", "backward"] * 3


def test_new_values_and_new_tensors_count(device):
    """Structure is remembered; values, addresses and identities are not."""
    q, k, v = tensors(requires_grad=False)
    for seed in range(3):
        assert_right(q, k, v, scfa.HashSparse(*hashes(seed=seed)))
    q_hash, k_hash = hashes()
    pattern = scfa.HashSparse(q_hash, k_hash)
    assert_right(q, k, v, pattern)
    q_hash.copy_(hashes(seed=5)[0])
    assert_right(q, k, v, pattern)


def test_a_changed_pattern_counts(device):
    q, k, v = tensors(requires_grad=False)
    pattern = scfa.HashSparse(*hashes())
    assert_right(q, k, v, pattern)
    pattern.causal = False
    assert_right(q, k, v, pattern)
    pattern.q_hash = pattern.q_hash.long()
    assert_right(q, k, v, pattern)
    pattern.q_hash = pattern.q_hash.mT.contiguous().mT
    assert_right(q, k, v, pattern)
    window = scfa.SlidingWindow(2)
    assert_right(q, k, v, window)
    window.window = 5
    assert_right(q, k, v, window)
    bottom = scfa.Causal()
    q, k, v = tensors(keys=12, requires_grad=False)
    assert_right(q, k, v, bottom)
    bottom.align = "bottom-right"
    assert_right(q, k, v, bottom)


def test_which_tensors_are_one_counts(device):
    """The same clause twice is one; two clauses of equal shape are two."""
    q, k, v = tensors(requires_grad=False)
    (a, b), (c, d) = hashes(), hashes(seed=7)
    first = scfa.HashSparse(a, b)
    for other in ((a, b), (c, d), (a, d), (c, b), (a, b)):
        assert_right(q, k, v, first & scfa.HashSparse(*other))


@pytest.mark.parametrize("tracked", [False, True])
def test_a_plan_lives_until_kernels_are_enqueued(device, allocated, tracked):
    """Bare addresses keep nothing alive; the allocator must not have given the memory away."""
    checked = []

    def before_forward(plan):
        living = [x for x in (reference() for reference in allocated) if x is not None]
        for array in plan[:-1]:
            homes = [
                x
                for x in living
                if x.data_ptr() <= array.pointer < x.data_ptr() + x.untyped_storage().nbytes()
            ]
            assert homes, "the plan's memory is gone"
        checked.append(True)

    device.before_forward = before_forward
    q, k, v = tensors(requires_grad=tracked)
    pattern = scfa.HashSparse(*hashes())
    out, lse = scfa.attention(q, k, v, pattern, return_lse=True)
    assert checked
    if tracked:
        return
    grads = scfa.attention_backward(torch.ones_like(out), q, k, v, out, lse, pattern)
    for mine, true in zip(grads, truth(q, k, v, pattern)[1], strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-3, atol=1e-4)


def test_workspace_and_plan_are_freed(device, allocated):
    """Nothing but what the caller holds outlives a call."""
    q, k, v = tensors(requires_grad=False)
    out = scfa.attention(q, k, v, scfa.HashSparse(*hashes()))
    assert [x() for x in allocated if x() is not None] == [out]
    assert len(allocated) == 5  # plan, out, lse and workspace of two verbs


def test_saved_plans_may_travel(device):
    """Hooks that offload saved tensors give back other memory; one that spoils a plan is told."""
    q, k, v = tensors()
    pattern = scfa.HashSparse(*hashes())
    right = torch.autograd.grad(scfa.attention(q, k, v, pattern).sum(), (q, k, v))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        out = scfa.attention(q, k, v, pattern)
    for mine, true in zip(torch.autograd.grad(out.sum(), (q, k, v)), right, strict=True):
        assert torch.equal(mine, true)

    def spoil(x):
        return x.long() if x.dtype is torch.int32 else x

    with torch.autograd.graph.saved_tensors_hooks(torch.clone, spoil):
        out = scfa.attention(q, k, v, pattern)
    with pytest.raises(scfa.ShapeError, match="must give a plan back as it was"):
        out.sum().backward()


def test_second_derivatives_are_refused(device):
    """The operator that says so gets a plan's seven tensors."""
    q, k, v = tensors()
    out = scfa.attention(q, k, v, scfa.HashSparse(*hashes()))
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    right = truth(q, k, v, scfa.HashSparse(*hashes()))[1][0]
    torch.testing.assert_close(dq.detach().double(), right, rtol=1e-3, atol=1e-4)
    with pytest.raises(scfa.GradientError, match="first derivatives only"):
        dq.sum().backward()


def test_plans_given(device):
    q, k, v = tensors()
    pattern = scfa.HashSparse(*hashes())
    plan = scfa.make_plan(pattern, q, k)
    np.testing.assert_array_equal(
        plan.to_dense(), pattern.mask(ROWS, KEYS, batch=BATCH, heads=HEADS, heads_kv=HEADS_KV)
    )
    out = scfa.attention(q, k, v, plan)
    want, grads = truth(q, k, v, pattern)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for mine, true in zip(got, grads, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-3, atol=1e-4)
    assert device.seen == ["make_plan", "forward", "backward"]


def test_strides_of_dout_are_told(device):
    q, k, v = tensors()
    out = scfa.attention(q, k, v)
    dout = torch.arange(out.numel(), dtype=torch.float32).view(out.shape) / out.numel()
    right = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    turned = dout.transpose(1, 2).contiguous().transpose(1, 2)
    assert turned.stride() != dout.stride()
    got = torch.autograd.grad(out, (q, k, v), turned)
    for mine, true in zip(got, right, strict=True):
        assert torch.equal(mine, true)


MISTAKES = {
    "float hashes": (
        scfa.DTypeError,
        "q_hash must be an integer array",
        lambda q_hash, k_hash: scfa.HashSparse(q_hash.float(), k_hash),
    ),
    "shape": (
        scfa.ShapeError,
        "k_hash must broadcast to",
        lambda q_hash, k_hash: scfa.HashSparse(q_hash, k_hash[:, :, 1:]),
    ),
    "NumPy": (
        scfa.DeviceError,
        "q_hash must be a torch array like q",
        lambda q_hash, k_hash: scfa.HashSparse(q_hash.numpy(), k_hash),
    ),
    "elsewhere": (
        scfa.DeviceError,
        "must be on cuda:0 like q, got meta",
        lambda q_hash, k_hash: scfa.HashSparse(q_hash.to("meta"), k_hash),
    ),
    "sparse": (
        scfa.LayoutError,
        "to_dense",
        lambda q_hash, k_hash: scfa.HashSparse(q_hash.to_sparse(), k_hash),
    ),
    "no pattern": (scfa.PatternError, "scfa_core pattern", lambda q_hash, k_hash: "causal"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_say_what_to_do(device, mistake):
    error, text, make = MISTAKES[mistake]
    q, k, v = tensors()
    assert_right(q, k, v, scfa.HashSparse(*hashes()))
    for _ in range(2):  # nothing wrong is remembered
        with pytest.raises(error, match=text):
            scfa.attention(q, k, v, make(*hashes()))


def test_a_call_on_another_card_makes_it_current(device, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def current(ordinal):
        entered.append(ordinal)
        pretend(ordinal)
        yield
        pretend(1)

    def pretend(ordinal):
        for module in (torch_calls, torch_plans):
            monkeypatch.setattr(module, "current_device", lambda: ordinal)

    monkeypatch.setattr(torch.cuda, "device", current)
    pretend(1)
    q, k, v = tensors()
    pattern = scfa.HashSparse(*hashes())
    assert_right(q, k, v, pattern)
    assert entered == [0, 0, 0]  # plan, forward, backward
    scfa.make_plan(pattern, q, k)
    assert entered == [0] * 4


def test_threads_at_once(device):
    """Threads that find out and remember the same things at once get their own answers."""
    q, k, v = tensors(requires_grad=False)
    cases = [scfa.HashSparse(*hashes(seed=seed)) for seed in range(6)]
    right = [truth(q, k, v, pattern)[0] for pattern in cases]

    def work(first):
        for at in range(first, first + 12):
            pattern, want = cases[at % 6], right[at % 6]
            out = scfa.attention(q, k, v, pattern)
            torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_memory_of_structures_is_bounded(device, monkeypatch):
    for module in (torch_calls, torch_plans):
        monkeypatch.setattr(module, "MAX_REMEMBERED_CALLS", 4)
    q, k, v = tensors(requires_grad=False)
    for window in range(12):
        assert_right(q, k, v, scfa.SlidingWindow(window))
        assert len(torch_plans._recipes) <= 4
        assert len(torch_plans._bound) <= 4


def test_bound_verbs_of_a_call_are_bounded(device, monkeypatch):
    monkeypatch.setattr(torch_calls, "MAX_BOUND_VERBS", 2)
    q, k, v = tensors(seed=3)
    out = scfa.attention(q, k, v)
    for step in range(24, 30):
        dout = torch.ones(BATCH, HEADS, ROWS, step)[..., :24]
        torch.autograd.grad(out, q, dout, retain_graph=True)
    call = torch_calls.find_call(q, k, v, None, "bhtd", True, "auto")
    assert 1 <= len(call.bound) <= 2


def test_no_rows_no_kernels(device):
    q, k, v = tensors(requires_grad=False)
    nothing = scfa.HashSparse(*(x[:0] for x in hashes()))
    assert scfa.attention(q[:0], k[:0], v[:0], nothing).shape == (0, HEADS, ROWS, 24)
    out, lse = scfa.attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert not out.any()
    assert torch.isneginf(lse).all()
    assert "forward" not in device.seen
