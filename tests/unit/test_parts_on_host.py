"""Kernels that make parts one, compiled as host C++ and run on fibers, against float64."""

import ctypes
import weakref
from contextlib import nullcontext

import host_build
import numpy as np
import pytest
from once import shared_folder
from scfa_core.backends.cupy_raw import nvrtc, parts

import scfa_core as scfa
from scfa_core.arrays import DeviceArray
from scfa_core.merging import attention_over

SOURCE = """
#include "cuda_on_host.hpp"
#include "ptx.cuh"
#include "{name}.cu"
extern "C" void run(const {params}* p, int blocks, int threads, int order) {{
  static_assert(sizeof({params}) == {size}, "as parts.py packs it");
  host::launch(scfa_{name}, *p, blocks, threads, 0, order);
}}
"""
PARAMS = {
    "parts_merge": ("MergeParams", parts._MERGE.size),
    "parts_add": ("AddParams", parts._ADD.size),
    "sinks_gradient": ("SinkParams", parts._SINKS.size),
}
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

pytestmark = host_build.NEEDS_COMPILER


@pytest.fixture
def on_host(tmp_path_factory, monkeypatch):
    """Launches go to fibers; `order` says who goes first. Names that were launched."""
    played = (host_build.HERE / "ptx_on_host.hpp").read_text()
    sources = {**nvrtc.read_sources(), "ptx.cuh": played}
    compiler = host_build.HostCompiler(shared_folder(tmp_path_factory), sources)
    launched = []

    class Played:
        def __init__(self, name, values):
            params, size = PARAMS[name]
            source = SOURCE.format(name=name, params=params, size=size)
            self.name, self.run = name, compiler.start(source, values).result()

        def launch(self, grid, threads, shared, stream, params):
            assert grid[1:] == (1, 1)
            assert shared == 0
            launched.append(self.name)
            self.run(params, ctypes.c_int(grid[0]), threads, len(launched) % 3)

    monkeypatch.setattr(parts, "_kernel", lambda name, values, device: Played(name, values))
    yield launched
    compiler.close()


def device_array(x, dtype):
    strides = tuple(s // x.itemsize for s in x.strides)
    return DeviceArray(x.ctypes.data if x.size else 0, x.shape, strides, dtype, 0)


def narrow(x, dtype):
    """Array of `dtype` (bfloat16 as bits) and what it holds as float64."""
    if dtype != "bfloat16":
        y = x.astype(dtype)
        return y, y.astype(np.float64)
    bits = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, wide(bits, dtype)


def wide(x, dtype):
    if dtype != "bfloat16":
        return x.astype(np.float64)
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def laid_out(x, layout):
    """The same array (batch, heads, rows, head_dim) in another order of memory."""
    if layout == "bthd":
        return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
    room = np.zeros((*x.shape[:3], x.shape[3] + 3), x.dtype)  # rows that begin anywhere
    room[..., 3:] = x
    return x.copy() if layout == "bhtd" else room[..., 3:]


def merged(outs, lses, sinks):
    """Out and lse in float64."""
    logits = np.stack([*lses.astype(np.float64), *sinks])
    most = np.maximum(logits.max(0), -1e30)
    weights = np.exp(logits - most)
    total = weights.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(total > 0, weights / total, 0)[: len(outs)]
        return (shares[..., None] * outs).sum(0), np.where(total > 0, most + np.log(total), -np.inf)


@pytest.mark.parametrize("layout", ["bhtd", "bthd", "anywhere"])
@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize(
    ("shape", "count", "has_sinks"),
    [
        ((2, 3, 70, 64), 2, False),
        ((1, 2, 300, 16), 1, True),
        ((2, 1, 5, 256), 16, True),
        ((1, 2, 130, 72), 3, False),  # threads that have no columns
    ],
)
def test_merging(on_host, shape, count, has_sinks, dtype, layout):
    rng = np.random.default_rng(0)
    given, exact = zip(
        *(narrow(rng.standard_normal(shape), dtype) for _ in range(count)), strict=True
    )
    outs = [laid_out(x, layout) for x in given]
    lses = (9 * rng.standard_normal((count, *shape[:3]))).astype(np.float32)
    lses[0, 0, 0] = lses[:, -1, -1, 2:4] = -np.inf
    exact = np.where(np.isneginf(lses)[..., None], 0, exact)
    for x, lse in zip(outs, lses, strict=True):
        x[np.isneginf(lse)] = 0
    sinks = np.linspace(-4, 5, shape[1]).astype(np.float32)
    sinks[-1] = -np.inf
    lse = np.full(shape[:3], np.nan, np.float32)
    native = [device_array(x, dtype) for x in outs]
    parts.run_merge(
        native,
        [device_array(x, "float32") for x in lses],
        device_array(sinks, "float32") if has_sinks else None,
        *(native[0], device_array(lse, "float32"), 0),
    )
    of_rows = [np.broadcast_to(sinks[:, None], shape[:3]).astype(np.float64)] * has_sinks
    right, right_lse = merged(np.array(exact), lses, of_rows)
    np.testing.assert_allclose(wide(outs[0], dtype), right, rtol=EPSILON[dtype], atol=1e-6)
    np.testing.assert_allclose(lse, right_lse, rtol=1e-6, atol=1e-6)
    assert on_host == ["parts_merge"]


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("count", [1, 3, 16])
def test_adding(on_host, count, dtype):
    rng = np.random.default_rng(0)
    shape = (2, 3, 33, 24)
    given, exact = zip(
        *(narrow(rng.standard_normal(shape), dtype) for _ in range(count)), strict=True
    )
    own = [x.copy() for x in given]
    before = rng.standard_normal(shape).astype(np.float32)
    total = before.copy()
    arrays = [device_array(x, dtype) for x in own]
    parts.run_add(arrays, None, arrays[0], 0)
    right = np.sum(exact, 0)
    np.testing.assert_allclose(wide(own[0], dtype), right, rtol=EPSILON[dtype], atol=1e-5)
    own[0][...] = given[0]
    held = device_array(total, "float32")
    parts.run_add(arrays, held, arrays[0] if dtype == "float32" else held, 0)
    got = own[0] if dtype == "float32" else total
    np.testing.assert_allclose(got, before + right, rtol=1e-5, atol=1e-5)
    if dtype != "float32":
        np.testing.assert_array_equal(own[0], given[0])  # a wide sum leaves the parts alone
        parts.run_add(arrays, device_array(before, "float32"), arrays[-1], 0)
        tolerance = {"rtol": EPSILON[dtype], "atol": 1e-5}
        np.testing.assert_allclose(wide(own[-1], dtype), before + right, **tolerance)


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("layout", ["bhtd", "bthd", "anywhere"])
@pytest.mark.parametrize("shape", [(2, 3, 70, 64), (1, 2, 700, 16), (1, 1, 1, 256), (2, 1, 90, 72)])
def test_gradient_of_sinks(on_host, shape, layout, dtype):
    rng = np.random.default_rng(0)
    (dout, exact_dout), (out, exact_out) = (narrow(rng.standard_normal(shape), dtype) for _ in "ab")
    sinks = np.linspace(-3, 2, shape[1]).astype(np.float32)
    lse = (rng.random(shape[:3]) * 4 + 2).astype(np.float32)
    if shape[1] > 1:
        sinks[0], lse[0, 0, 0] = -np.inf, -np.inf  # no sink, and a row without keys
    tiles = parts.tiles_of(shape[2], shape[3], parts.GRADIENT_ROUNDS)
    partial_sums = np.full((*shape[:2], tiles), np.nan, np.float32)
    floats = (device_array(x, "float32") for x in (lse, sinks, partial_sums))
    held = [laid_out(x, layout) for x in (dout, out)]
    rows = [device_array(x, dtype) for x in held]
    parts.run_sinks_gradient(*rows, *floats, 0)
    with np.errstate(invalid="ignore"):
        weights = np.where(np.isneginf(sinks)[:, None], 0, np.exp(sinks[:, None] - lse * 1.0))
    right = -(weights * (exact_dout * exact_out).sum(-1)).sum((0, 2))
    scale = (weights * np.abs(exact_dout * exact_out).sum(-1)).sum((0, 2))
    assert (np.abs(partial_sums.sum((0, 2)) - right) <= 1e-5 * scale).all()


def test_rows_that_need_no_launch(on_host):
    empty = device_array(np.zeros((2, 0, 5, 16), np.float32), "float32")
    parts.run_merge([empty], [empty], None, empty, empty, 0)
    parts.run_add([empty], None, empty, 0)
    parts.run_sinks_gradient(*[empty] * 5, 0)
    assert on_host == []


@pytest.mark.parametrize(
    ("dtype", "head_dim", "word"),
    [("float64", 64, "float64"), ("bfloat16", 20, "got 20"), ("float32", 264, "got 264")],
)
def test_what_kernels_do_not_read_is_told(dtype, head_dim, word):
    assert word in parts.reason_against(dtype, head_dim, 0)


def test_grids_beyond_the_largest_are_refused():
    long = DeviceArray(0, (2**10, 2**10, 2**20, 256), (0, 0, 0, 1), "float32", 0)
    with pytest.raises(ValueError, match="blocks, at most"):
        parts.run_merge([long], [long], None, long, long, 0)


@pytest.fixture
def glue(on_host, monkeypatch):
    """The torch side, as if tensors of the host were on a GPU; with it what was launched."""
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    from scfa_core import torch_parts, torch_union_ops

    class Framework:
        @staticmethod
        def native(x, memory):
            assert memory == "cuda"
            dtype = str(x.dtype).removeprefix("torch.")
            return DeviceArray(x.data_ptr(), tuple(x.shape), x.stride(), dtype, 0)

    monkeypatch.setattr(torch_parts, "TORCH_FRAMEWORK", Framework)
    monkeypatch.setattr(torch_parts, "raw_stream", lambda device: 0)
    monkeypatch.setattr(torch_parts, "kernel_reason", lambda x: None)

    def plain(function):
        with monkeypatch.context() as patch:
            patch.setattr(torch_parts, "kernel_reason", lambda x: "asked not to")
            return function()

    return torch, torch_union_ops, plain


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("count", "has_sinks"), [(1, True), (3, False), (2, True)])
def test_torch_merges_by_the_kernel(glue, on_host, count, has_sinks, swap):
    torch, ops, plain = glue
    outs = torch.randn(count, 2, 3, 40, 16).bfloat16()
    lses = torch.randn(count, *((2, 40, 3) if swap else (2, 3, 40)))
    sinks = torch.randn(lses.shape[2]).bfloat16() if has_sinks else None
    mine, own = [x.clone() for x in outs], [x.clone() for x in outs]
    out, lse = ops.merge_in_place(mine, list(lses), swap, sinks)
    assert out is mine[0]
    right, right_lse = plain(lambda: ops.merge_in_place(own, list(lses), swap, sinks))
    torch.testing.assert_close(out.float(), right.float(), rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(lse, right_lse)
    assert on_host == ["parts_merge"]


def test_torch_merges_by_itself_what_the_kernel_does_not_take(glue, on_host):
    torch, ops, _ = glue
    lses = list(torch.zeros(17, 1, 2, 5))
    ops.merge_in_place(list(torch.randn(17, 1, 2, 5, 16)), lses, False)
    uneven = [torch.randn(1, 2, 5, 16), torch.randn(1, 5, 2, 16).transpose(1, 2)]
    ops.merge_in_place(uneven, lses[:2], False)
    assert on_host == []


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
def test_torch_adds_by_the_kernel(glue, on_host, count):
    torch, ops, plain = glue
    grads = [
        (torch.randn(2, 4, 9, 16).half(), torch.randn(2, 2, 7, 24).half()) for _ in range(count)
    ]

    def added():
        return ops.add_gradients((tuple(x.clone() for x in part) for part in grads), count)

    for mine, right in zip(added(), plain(added), strict=True):
        assert torch.equal(mine, right)
    launches = 0 if count < 3 else 2 if count <= 4 else 2 * -(-count // 2)
    assert on_host == ["parts_add"] * launches


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_torch_makes_the_gradient_of_sinks_by_the_kernel(glue, on_host, layout):
    torch, ops, plain = glue
    dout, out = torch.randn(2, 2, 40, 3, 16)
    dout = dout[..., :1].expand_as(dout)  # one number a row: its last axis has no step
    lse = 3 + torch.rand(2, *((40, 3) if layout == "bhtd" else (3, 40)))
    sinks = torch.linspace(-1, 1, lse.shape[1]).bfloat16()
    mine = ops.SINKS_BACKWARD(dout, out, lse, sinks, layout)
    assert mine.dtype is torch.bfloat16
    right = plain(lambda: ops.SINKS_BACKWARD(dout, out, lse, sinks, layout))
    torch.testing.assert_close(mine.float(), right.float(), rtol=2**-7, atol=1e-5)
    assert on_host == ["sinks_gradient"]


@pytest.mark.parametrize(
    ("dtype", "count", "most"), [("half", 3, 3), ("half", 4, 4), ("half", 9, 2), ("float", 4, 3)]
)
def test_gradients_take_no_more_memory_than_a_wide_sum_and_two(glue, dtype, count, most):
    """In units of one of them; counted by what is alive when a launch begins."""
    torch, ops, _ = glue
    alive, seen = [], []

    def gradients():
        for _ in range(count):
            made = torch.ones(1, 2, 8, 16).to(getattr(torch, dtype))
            alive.append(weakref.ref(made))
            seen.append(sum(x() is not None for x in alive))
            yield (made,)
            del made

    (total,) = ops.add_gradients(gradients(), count)
    assert (total == count).all()
    assert max(seen) <= most


def three_windows(q, k, v, **options):
    patterns = [
        scfa.SlidingWindow(3),
        scfa.Causal(lag=3) & scfa.SlidingWindow(6),
        scfa.Causal(lag=6),
    ]
    return attention_over(q, k, v, patterns, backend="numba-cpu", **options)


@pytest.mark.parametrize("has_sinks", [False, True])
def test_gradients_without_memory_of_their_own_are_left_to_torch(glue, on_host, has_sinks):
    torch, _, plain = glue
    q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, requires_grad=True) if has_sinks else None
    out = three_windows(q, k, v, sinks=sinks)
    leaves = [x for x in (q, k, v, sinks) if x is not None]
    douts = torch.randn(3, *out.shape)
    batch = torch.autograd.grad(out, leaves, douts, is_grads_batched=True, retain_graph=True)
    for at in range(3):
        right = plain(lambda at=at: torch.autograd.grad(out, leaves, douts[at], retain_graph=True))
        for mine, own in zip(batch, right, strict=True):
            torch.testing.assert_close(mine[at], own, rtol=0, atol=1e-5)
    assert "parts_add" not in on_host


def test_gradients_of_a_derived_class_are_left_to_torch(glue, on_host):
    torch, _, plain = glue
    from torch.testing._internal.two_tensor import TwoTensor

    q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))
    out = three_windows(q, k, v)
    dout = torch.randn_like(out)
    (pair,) = torch.autograd.grad(out, q, TwoTensor(dout, dout.clone()), retain_graph=True)
    (right,) = plain(lambda: torch.autograd.grad(out, q, dout))
    torch.testing.assert_close(pair.a, right)
    assert "parts_add" not in on_host


def test_sinks_with_a_lazy_minus_sign(glue):
    torch, _, _ = glue
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    sinks = torch._neg_view(torch.tensor([1.0, 3.0]))
    out = three_windows(q, k, v, sinks=sinks)
    torch.testing.assert_close(out, three_windows(q, k, v, sinks=sinks.resolve_neg()))


@pytest.mark.parametrize("heads", [1, 2, 7])
def test_sinks_of_other_heads_are_not_read(glue, on_host, heads):
    torch, ops, _ = glue
    outs, lses = torch.randn(2, 1, 4, 5, 16), torch.randn(2, 1, 4, 5)
    with nullcontext() if heads == 1 else pytest.raises(RuntimeError, match="size"):
        ops.merge_in_place(list(outs), list(lses), False, torch.zeros(heads))
    assert on_host == []
