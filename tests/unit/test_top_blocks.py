"""The operator ``scfa::top_blocks``: its kernel on fibers and plain torch, beside a sort."""

import ctypes

import host_build
import numpy as np
import pytest
from once import shared_folder
from scfa_core.backends.cupy_raw import choosing, nvrtc

from scfa_core.arrays import DeviceArray

torch = pytest.importorskip("torch", reason="choices are made of tensors (extra 'torch')")

from torch import library  # noqa: E402 - torch may be absent

from scfa_core import torch_choosing  # noqa: E402

SOURCE = f"""
#include "cuda_on_host.hpp"
#include "ptx.cuh"
#include "{choosing.SOURCE}"
extern "C" void run(const TopParams* p, int blocks, int threads, int order) {{
  static_assert(sizeof(TopParams) == {choosing._PARAMS.size}, "as choosing.py packs it");
  host::launch(scfa_top_blocks, *p, blocks, threads, 0, order);
}}
"""


@pytest.fixture
def by_kernel(tmp_path_factory, monkeypatch):
    """The CUDA body of the operator, for tensors of the host; how many launches there were."""
    if host_build.COMPILER is None:
        pytest.skip("no C++ compiler (g++ or clang++) here")
    played = (host_build.HERE / "ptx_on_host.hpp").read_text()
    sources = {**nvrtc.read_sources(), "ptx.cuh": played}
    compiler = host_build.HostCompiler(shared_folder(tmp_path_factory), sources)
    launched = []

    class Played:
        def __init__(self, values):
            self.run = compiler.start(SOURCE, values).result()

        def launch(self, grid, threads, shared, stream, params):
            launched.append(grid[0])
            self.run(params, ctypes.c_int(grid[0]), threads, len(launched) % 3)

    class Framework:
        @staticmethod
        def native(x, memory):
            assert x.is_contiguous()
            return DeviceArray(
                x.data_ptr(), tuple(x.shape), x.stride(), str(x.dtype).removeprefix("torch."), 0
            )

    monkeypatch.setattr(choosing, "_kernel", lambda values, device: Played(values))
    monkeypatch.setattr(torch_choosing, "TORCH_FRAMEWORK", Framework)
    monkeypatch.setattr(torch_choosing, "raw_stream", lambda device: 0)
    served = (*choosing._ELEMENTS, None)
    monkeypatch.setattr(
        torch_choosing,
        "kernel_reason",
        lambda scores, top: (
            None
            if str(scores.dtype).removeprefix("torch.") in served and 1 <= top <= choosing.TOPS[-1]
            else "no"
        ),
    )
    yield lambda *arguments: (torch_choosing._on_cuda(*arguments), len(launched))
    compiler.close()


def wanted(scores, block, first, last, ahead, top):
    """A row at a time."""
    batch, heads, blocks, rows = scores.shape
    ids = np.empty((top, batch, heads, rows), int)
    for b, h, row in np.ndindex(batch, heads, rows):
        own = (first + row) // block
        none = last if ahead and own != last else last + 1
        column = [float(x) for x in scores[b, h, : min(own, blocks), row]]
        order = sorted(range(len(column)), key=lambda n, c=column: (c[n] == c[n], -c[n]))
        found = [n for n in order if column[n] != -np.inf]
        ids[:, b, h, row] = (found + [none] * top)[:top]
    return torch.from_numpy(ids).int()


def drawn(dtype, shape, style):
    generator = torch.Generator().manual_seed(len(style))
    scores = torch.randn(shape, generator=generator)
    if style == "equal":
        scores = scores.round()
    if style == "special":
        scores[torch.rand(shape, generator=generator) < 0.3] = -torch.inf
        scores[torch.rand(shape, generator=generator) < 0.1] = torch.inf
        scores[:, :, 3, ::5] = torch.nan
    return scores.to(dtype)


CASES = [  # rows, keys, block, top, ahead
    *((50, 50, 8, 2, True), (48, 48, 16, 1, True), (300, 300, 7, 9, True), (20, 20, 3, 16, True)),
    *((1, 57, 8, 3, False), (9, 60, 8, 5, False), (5, 5, 1, 3, True)),
]


@pytest.mark.parametrize("style", ["any", "equal", "special"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "keys", "block", "top", "ahead"), CASES)
def test_the_kernel_and_plain_torch(by_kernel, rows, keys, block, top, ahead, dtype, style):
    scores = drawn(dtype, (2, 3, keys // block, rows), style) if keys // block > 3 else None
    if scores is None:
        scores = drawn(dtype, (2, 3, keys // block, rows), "any")
    arguments = (scores, block, keys - rows, (keys - 1) // block, ahead, top)
    right = wanted(*arguments)
    got, launches = by_kernel(*arguments)
    assert launches == 1
    assert torch.equal(got, right)
    before = scores.clone()
    assert torch.equal(torch_choosing.TOP_BLOCKS(*arguments), right)
    assert torch.equal(scores.nan_to_num(7.0), before.nan_to_num(7.0)), "scores are the caller's"


def test_scores_as_views(by_kernel):
    """Every second row of an array, with a lazy minus sign."""
    scores = torch.randn(1, 2, 6, 40)[..., ::2]
    arguments = (torch._neg_view(scores), 5, 10, 5, False, 2)
    assert torch.equal(by_kernel(*arguments)[0], wanted(-scores, 5, 10, 5, False, 2))


@pytest.mark.parametrize(("dtype", "top"), [(torch.float64, 2), (torch.float32, 17)])
def test_what_the_kernel_does_not_read(by_kernel, dtype, top):
    arguments = (torch.randn(1, 1, 6, 20, dtype=dtype), 5, 10, 5, False, top)
    got, launches = by_kernel(*arguments)
    assert launches == 0
    assert torch.equal(got, wanted(*arguments))


def test_reasons():
    assert "float64" in choosing.reason_against("float64", 1, 0)
    assert "top=17" in choosing.reason_against("float32", 17, 0)
    assert "top=0" in choosing.reason_against("float32", 0, 0)


@pytest.mark.parametrize("shape", [(0, 2, 3, 9), (1, 2, 0, 9), (1, 2, 3, 0)])
def test_nothing_to_choose_from(by_kernel, shape):
    arguments = (torch.zeros(shape), 4, 0, 2, True, 2)
    got, _ = by_kernel(*arguments)
    assert torch.equal(got, wanted(*arguments))
    assert torch.equal(torch_choosing.TOP_BLOCKS(*arguments), wanted(*arguments))


def test_every_slice_of_a_mapped_call():
    scores = torch.randn(3, 1, 2, 5, 20)
    sizes = (4, 0, 4, True, 2)
    mapped = torch.func.vmap(lambda x: torch_choosing.TOP_BLOCKS(x, *sizes))(scores)
    assert torch.equal(mapped, torch.stack([wanted(x, *sizes) for x in scores]))
    library.opcheck(torch_choosing.TOP_BLOCKS, (scores[0], *sizes))
