"""Merging, sums of gradients and the gradient of sinks: kernels beside plain torch and float64."""

import pytest

from scfa_core.sinks import sinks_backward


@pytest.fixture
def ops(torch):
    from scfa_core import torch_parts, torch_union_ops

    reason = torch_parts.kernel_reason(torch.zeros(1, 1, 1, 16, device="cuda"))
    if reason is not None:
        pytest.skip(f"kernels of parts: {reason}")
    return torch_union_ops


@pytest.fixture
def plain(ops, monkeypatch):
    """Run something without these kernels."""
    from scfa_core import torch_parts

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(torch_parts, "kernel_reason", lambda x: "asked not to")
            return function()

    return run


def rows(torch, shape, dtype, layout, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    batch, heads, seqlen, size = shape
    room = torch.randn(batch, heads, seqlen, size + 8, device="cuda", generator=generator)
    x = room.to(getattr(torch, dtype))
    if layout == "anywhere":
        return x[..., 3 : 3 + size]
    x = x[..., :size].contiguous()
    return x.transpose(1, 2).contiguous() if layout == "bthd" else x


SHAPES = [(2, 3, 1000, 64), (1, 2, 300, 16), (2, 2, 257, 72), (1, 1, 5, 256), (1, 70000, 3, 16)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layout", ["bhtd", "bthd", "anywhere"])
@pytest.mark.parametrize(
    ("count", "has_sinks"), [(1, True), (2, False), (4, True), (16, True), (17, True)]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merging(torch, ops, plain, shape, count, has_sinks, layout, dtype):
    swap = layout == "bthd"
    outs = [rows(torch, shape, dtype, layout, seed) for seed in range(count)]
    lses = 5 * torch.randn(count, *shape[:3], device="cuda")
    lses[:, 0, 0, 1] = lses[0, :, -1] = -torch.inf
    for out, lse in zip(outs, lses, strict=True):
        (out.transpose(1, 2) if swap else out)[lse.isneginf()] = 0
    sinks = torch.linspace(-3, 3, shape[1], device="cuda") if has_sinks else None

    def merged(wide=False):
        own = [x.double() if wide else x.clone(memory_format=torch.preserve_format) for x in outs]
        if layout == "anywhere" and not wide:
            own = [torch.nn.functional.pad(x, (3, 5))[..., 3:-5] for x in own]
        logits = list(lses.double()) if wide else list(lses)
        out, lse = ops.merge_in_place(own, logits, swap, sinks)
        assert out is own[0]
        return out.double(), lse.double()

    mine, usual = merged(), plain(merged)
    right = plain(lambda: merged(wide=True))
    for own, other, true in zip(mine, usual, right, strict=True):
        hidden = true.isneginf()
        assert torch.equal(own.isneginf(), hidden)
        own, other, true = (x.masked_fill(hidden, 0) for x in (own, other, true))
        assert (own - true).norm() <= 2 * (other - true).norm() + 1e-6 * true.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
def test_gradients_are_added_as_in_float32(torch, ops, plain, count, layout, dtype):
    shapes = [(2, 4, 333, 64), (2, 2, 290, 64), (2, 2, 290, 24)]
    grads = [
        tuple(rows(torch, shape, dtype, layout, 10 * at + i) for i, shape in enumerate(shapes))
        for at in range(count)
    ]

    def added():
        return ops.add_gradients((tuple(x.clone() for x in part) for part in grads), count)

    for mine, usual in zip(added(), plain(added), strict=True):
        assert mine.dtype is usual.dtype
        assert torch.equal(mine, usual)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layout", ["bhtd", "bthd", "anywhere"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_sinks(torch, ops, plain, shape, layout, dtype):
    dout, out = (rows(torch, shape, dtype, layout, seed) for seed in (1, 2))
    name = "bthd" if layout == "bthd" else "bhtd"
    sinks = torch.linspace(-3, 2, shape[1], device="cuda")
    lse = 2 + 3 * torch.rand(shape[:3], device="cuda")
    if shape[1] > 1:
        sinks[0] = lse[0, 0, 0] = -torch.inf

    def gradient():
        return ops.SINKS_BACKWARD(dout, out, lse, sinks, name)

    mine, usual = gradient(), plain(gradient)
    wide = [x.double() for x in (dout, out, lse, sinks)]
    right = sinks_backward(*wide, layout=name)
    assert torch.equal(mine, gradient())
    # beside the sum of what the terms come to without their signs, which float32 rounds
    terms = -sinks_backward(*(x.abs() for x in wide[:2]), *wide[2:], layout=name)
    assert (mine - right).norm() <= 2 * (usual - right).norm() + 1e-6 * terms.norm()
    broadcast = dout[:, :, :1].expand_as(dout)
    again = ops.SINKS_BACKWARD(broadcast, out, lse, sinks, name)
    torch.testing.assert_close(
        again,
        plain(lambda: ops.SINKS_BACKWARD(broadcast, out, lse, sinks, name)),
        rtol=1e-3,
        atol=1e-3,
    )
