"""What every GPU test shares: backends, reasons to skip, guarded memory, the worst errors seen."""

import math
import os
import sys

import numpy as np
import pytest

from scfa_core import testing

BACKENDS = tuple(os.environ.get("SCFA_GPU_BACKENDS", "cupy").split(","))
REQUIRED = "gpu" in os.environ.get("SCFA_REQUIRE", "").split(",")
MOST_KEPT = 2**29  # bytes of torch's cache that a test leaves to the next
GUARD = 512  # elements before and after every tensor
MARGIN = 1024  # bytes before and after plans, lse and workspace; keeps their 512-byte alignment
MARGIN_BYTE, UNWRITTEN_BYTE = 0xA5, 0xFF  # the latter makes NaN and -1


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item):
    if item.get_closest_marker("alone") and "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("takes much of the card's memory, which other workers need: runs without -n")


def pytest_runtest_teardown(item):
    """Stop the session where a kernel broke the CUDA context: nothing after it could run."""
    torch = sys.modules.get("torch")
    if item.path.parent.name != "gpu" or torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        item.session.shouldstop = f"{item.nodeid} broke the CUDA context: {first_line}"
        return
    if torch.cuda.memory_reserved() > MOST_KEPT:
        torch.cuda.empty_cache()  # workers share the card


def missing(reason):
    """Skip with `reason`, or fail where $SCFA_REQUIRE names gpu."""
    if REQUIRED:
        pytest.fail(f"SCFA_REQUIRE=gpu, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def torch():
    torch = pytest.importorskip("torch") if not REQUIRED else __import__("torch")
    if not torch.cuda.is_available():
        missing("torch sees no CUDA device")
    return torch


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request, torch):
    """Name of a backend that can run here."""
    from scfa_core.dispatch import unavailable_reason

    reason = unavailable_reason(request.param)
    if reason is not None:
        missing(f"backend {request.param} cannot run here: {reason}")
    return request.param


@pytest.fixture(params=["auto", "sm80", "fused"])
def kernels(request, backend, monkeypatch):
    """What the card gets, the portable kernels, and the fused backward where the card has it."""
    if request.param != "auto" and backend != "cupy":
        pytest.skip("only cupy has kernels of one card's own")
    fused = request.param == "fused"
    monkeypatch.setenv("SCFA_CUPY_KERNELS", "auto" if fused else request.param)
    monkeypatch.setenv("SCFA_CUPY_BACKWARD", "fused" if fused else "auto")
    return request.param


@pytest.fixture
def hold(request):
    """Judge results by the error rule, and note the worst ratio for the record."""

    def hold(case, got, right=None, *, tf32=False):
        verdicts = testing.judge(case, got, right, tf32=tf32)
        for verdict in verdicts:
            worst = max(verdict.max_ratio, verdict.norm_ratio)
            name = f"{'tf32' if tf32 else case.spec.dtype}/{verdict.name}"
            request.node.user_properties.append(("ratio", (name, worst)))
        bad = [
            f"{v.name}: {v.max_ratio:.2f} {v.norm_ratio:.2f} {v.detail}"
            for v in verdicts
            if not v.ok
        ]
        assert not bad, f"{case.spec}: {bad}"

    return hold


class Arena:
    """Tensors inside buffers of noise: what a kernel must not touch is seen to be untouched."""

    def __init__(self, torch):
        self.torch = torch
        self.held = []
        self.rooms = []

    def tensor(self, shape, dtype, *, strides="bhtd", values=None, gap=0):
        """View of `shape` in a guarded buffer; without `values` it starts as NaN.

        `strides` is the memory order "bhtd" or "bthd"; `gap` elements follow each row. Buffers
        begin on 16-byte boundaries; an odd gap moves rows off them.
        """
        torch = self.torch
        batch, heads, rows, width = shape
        pitch = width + gap
        if strides == "bhtd":
            steps = (heads * rows * pitch, rows * pitch, pitch, 1)
        else:
            steps = (rows * heads * pitch, pitch, heads * pitch, 1)
        size = batch * heads * rows * pitch
        buffer = torch.full(
            (size + 2 * GUARD,), float("nan"), dtype=getattr(torch, dtype), device="cuda"
        )
        view = buffer.as_strided(shape, steps, GUARD)
        if values is not None:
            view.copy_(testing.as_torch(values, dtype, "cuda"))
        self.held.append((buffer, view, values is None))
        return view

    def words(self, shape, dtype):
        """Contiguous tensor of NaN or -1 between margins: plans, lse, workspace."""
        torch = self.torch
        size = math.prod(shape) * dtype.itemsize
        room = torch.full((size + 2 * MARGIN,), MARGIN_BYTE, dtype=torch.uint8, device="cuda")
        inside = room[MARGIN : MARGIN + size].fill_(UNWRITTEN_BYTE)
        self.rooms.append((room, size))
        return inside.view(dtype).view(shape)

    def check(self):
        """Raise unless everything outside of the tensors is what it was."""
        for room, size in self.rooms:
            margins = (room[:MARGIN], room[MARGIN + size :])
            touched = sum(int((x != MARGIN_BYTE).sum()) for x in margins)
            assert touched == 0, f"{touched} bytes beside a tensor of {size} bytes were written"
        for buffer, view, _ in self.held:
            rest = buffer.clone()
            rest.as_strided(view.shape, view.stride(), GUARD).fill_(float("nan"))
            touched = int((~rest.isnan()).sum())
            assert touched == 0, (
                f"{touched} elements outside of a {tuple(view.shape)} tensor were written"
            )


class GuardedContext:
    """A backend's context whose workspace is garbage between margins."""

    def __init__(self, context, arena):
        self.context, self.arena = context, arena
        self.asked = 0

    def __getattr__(self, name):  # device, stream, counters
        return getattr(self.context, name)

    def empty(self, shape, dtype):
        from scfa_core.torch_framework import DTYPES, TORCH_FRAMEWORK

        self.asked += 1
        return TORCH_FRAMEWORK.native(self.arena.words(shape, DTYPES[dtype]), "cuda")


@pytest.fixture
def arena(torch):
    return Arena(torch)


def as_float64(x):
    return x.detach().double().cpu().numpy()


@pytest.fixture
def call(torch, backend, arena):
    """Run a `testing.Case` on guarded, NaN-filled memory by the backend's own verbs."""
    from scfa_core.dispatch import load_backend
    from scfa_core.lowering import lower
    from scfa_core.patterns.base import map_arrays
    from scfa_core.plan import PlanArrays, plan_shapes
    from scfa_core.problem import Problem
    from scfa_core.torch_framework import TORCH_FRAMEWORK

    def call(case, *, strides="bhtd", gap=0, deterministic=True):
        spec = case.spec
        engine = load_backend(backend)
        sizes = (spec.batch, spec.heads, spec.heads_kv, spec.seqlen_q, spec.seqlen_k)
        widths = (spec.head_dim, spec.head_dim_v)
        scale = case.softmax_scale
        problem = Problem(*sizes, *widths, spec.dtype, "cuda:0", scale, deterministic)
        assert engine.can_run(problem) is None
        native = lambda x: TORCH_FRAMEWORK.native(x, "cuda")  # noqa: E731
        context = GuardedContext(TORCH_FRAMEWORK.context("cuda:0"), arena)
        pattern = map_arrays(
            case.pattern, lambda x: torch.from_numpy(np.ascontiguousarray(x)).cuda()
        )
        clauses = lower(pattern, problem, TORCH_FRAMEWORK)
        clauses_native = clauses.with_arrays(map(native, clauses.arrays))
        arrays = [arena.words(shape, torch.int32) for shape in plan_shapes(problem, "cuda")]
        plan = PlanArrays(*map(native, arrays), clauses.monotone)
        engine.make_plan(problem, clauses_native, plan, context)

        options = {"strides": strides, "gap": gap}
        q, k, v, dout = (
            arena.tensor(x.shape, spec.dtype, values=x, **options)
            for x in (case.q, case.k, case.v, case.dout)
        )
        out = arena.tensor((*q.shape[:3], spec.head_dim_v), spec.dtype, **options)
        lse = arena.words(q.shape[:3], torch.float32)
        engine.forward(problem, plan, *map(native, (q, k, v, out, lse)), context)
        grads = [arena.tensor(x.shape, spec.dtype, **options) for x in (q, k, v)]
        inputs = map(native, (dout, q, k, v, out, lse))
        engine.backward(problem, plan, *inputs, *map(native, grads), context)
        torch.cuda.synchronize()
        assert context.asked, "no workspace went through the margins"
        arena.check()
        plan_arrays = [x.cpu().numpy() for x in arrays[:6]]
        return testing.Results(*map(as_float64, (out, lse, *grads))), plan_arrays, clauses

    return call
