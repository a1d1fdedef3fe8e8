"""Sinks: one logit more in every row's softmax, beside dense attention that has it as a key."""

from functools import partial

import numpy as np
import pytest
import watched_verbs

import scfa_core as scfa
from scfa_core.decoding import attention_in_parts
from scfa_core.merging import attention_over
from scfa_core.sinks import sinks_backward

torch = pytest.importorskip("torch", reason="the truth here is torch's autograd (extra 'torch')")

from torch import library  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from scfa_core import torch_union_ops  # noqa: E402
from scfa_core.nn import HashSelfAttention, WindowSelfAttention  # noqa: E402

ROWS, HEADS, SCALE = 23, 4, 0.3
runs = watched_verbs.runs
SINKS = (0.5, -1.0, 3.0, -float("inf"))  # the last head has none
KEPT = torch.arange(ROWS) % 3 > 0
PATTERNS = {
    "causal": scfa.Causal(),
    "window": scfa.SlidingWindow(5),
    "rows that see nothing": scfa.QKSparse(KEPT[None, None], KEPT[None, None])
    & scfa.Causal(include_self=False),
}


def tensors(dtype=torch.float32, layout="bhtd", rows=ROWS):
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, HEADS, rows, 16), (2, 2, rows, 16), (2, 2, rows, 24), (2, HEADS, rows, 24))
    made = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    return [x.transpose(1, 2).contiguous() if layout == "bthd" else x for x in made]


def dense(q, k, v, sinks, mask, layout="bhtd", dtype=torch.float64):
    """Out and lse in torch, the sink as a key of its own."""
    q, k, v, sinks = (x.to(dtype) for x in (q, k, v, sinks))
    q, k, v = (x.transpose(1, 2) if layout == "bthd" else x for x in (q, k, v))
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = (q @ k.mT * SCALE).masked_fill(~mask, -torch.inf)
    sink = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    scores = torch.cat([scores, sink], -1)
    nothing = scores.isneginf().all(-1, keepdim=True)  # whose softmax would be NaN
    scores = scores.where(~nothing, 0.0)
    lse = scores.logsumexp(-1).where(~nothing[..., 0], -torch.inf)
    out = scores.softmax(-1).where(~nothing, 0.0)[..., :-1] @ v
    return (out.transpose(1, 2) if layout == "bthd" else out), lse


def leaves(*inputs):
    return [x.detach().clone().requires_grad_() for x in inputs]


def results(function, inputs, dout):
    inputs = leaves(*inputs)
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


def rms(x):
    return float(x.square().mean().sqrt())


def mask_of(pattern):
    return torch.as_tensor(pattern.mask(ROWS, ROWS))


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_sink_is_a_key_without_value(name, dtype, layout):
    q, k, v, dout = tensors(dtype, layout)
    sinks = torch.tensor(SINKS)
    pattern = PATTERNS[name]
    options = {"softmax_scale": SCALE, "layout": layout}
    truth = partial(dense, mask=mask_of(pattern), layout=layout)
    for backend in ("numba-cpu", "reference"):
        mine = results(
            lambda *x, b=backend: scfa.attention(*x[:3], pattern, sinks=x[3], backend=b, **options),
            (q, k, v, sinks),
            dout,
        )
        right = results(lambda *x: truth(*x)[0], (q, k, v, sinks), dout)
        torchs = results(lambda *x: truth(*x, dtype=dtype)[0], (q, k, v, sinks), dout)
        sizes = [float(x.abs().max()) for x in right[:4]]
        sizes.append(float((dout.double() * right[0]).sum(-1).abs().sum()))  # what is added up
        for x, theirs, true, size in zip(mine, torchs, right, sizes, strict=True):
            error, usual = (rms(y.double() - true.double()) for y in (x, theirs))
            # lse is float32, whatever the inputs: float64 is as exact as that
            assert error <= 2 * usual + (1e-6 if dtype == torch.float64 else 2e-8) * size, backend
    assert mine[4].dtype == torch.float32
    assert mine[4][3] == 0  # of the head that has none


@pytest.mark.parametrize("backend", ["numba-cpu", "reference"])
def test_lse_has_the_sink_and_a_gradient(backend):
    q, k, v, dout = tensors()
    sinks = torch.tensor(SINKS)
    pattern = PATTERNS["rows that see nothing"]
    mask = mask_of(pattern)

    def loss(out, lse):
        seen = ~lse.isneginf()
        return (out * dout).sum() + lse.where(seen, 0.0).sin().sum()

    mine, right = leaves(q, k, v, sinks), leaves(q, k, v, sinks)
    out, lse = scfa.attention(
        *mine[:3], pattern, sinks=mine[3], softmax_scale=SCALE, return_lse=True, backend=backend
    )
    true_out, true_lse = dense(*right, mask)
    empty = ~mask.any(-1)[0, 0]
    assert (lse[:, 2, empty] == 3.0).all()  # the row's only score
    assert lse[:, 3, empty].isneginf().all()
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=2e-6)
    grads = torch.autograd.grad(loss(out, lse), mine)
    right_grads = torch.autograd.grad(loss(true_out, true_lse), right)
    torch.testing.assert_close(grads, right_grads, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["numba-cpu", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numpy_calls_and_gradients_by_name(dtype, backend):
    q, k, v, dout = (x.double().numpy().astype(dtype) for x in tensors())
    sinks = np.array(SINKS, dtype)
    pattern = scfa.SlidingWindow(5)
    options = {"softmax_scale": SCALE, "backend": backend}
    out, lse = scfa.attention(q, k, v, pattern, sinks=sinks, return_lse=True, **options)
    grads = scfa.attention_backward(dout, q, k, v, out, lse, pattern, **options)
    grads = (*grads, sinks_backward(dout, out, lse, sinks))
    right = results(
        lambda *x: dense(*x, mask_of(pattern))[0],
        [torch.from_numpy(x) for x in (q, k, v, sinks)],
        torch.from_numpy(dout),
    )
    for mine, true in zip((out, *grads), right, strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(mine, true, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [1, 200, 2**30])
def test_pieces_that_are_widened_do_not_matter(size, monkeypatch):
    monkeypatch.setattr("scfa_core.sinks._CHUNK", size)
    _, _, _, dout = tensors()
    out = dout * 0.5 + 1
    lse, sinks = torch.randn(2, HEADS, ROWS), torch.tensor(SINKS)
    right = -(torch.exp(sinks[:, None] - lse) * (dout * out).sum(-1)).sum((0, 2))
    torch.testing.assert_close(sinks_backward(dout, out, lse, sinks), right)
    turned = (x.transpose(1, 2) for x in (dout, out))
    torch.testing.assert_close(sinks_backward(*turned, lse, sinks, layout="bthd"), right)


def test_one_call_each_way_and_none_where_only_sinks_learn(runs):
    q, k, v, dout = tensors()
    sinks = torch.nn.Parameter(torch.tensor(SINKS))
    attend = partial(scfa.attention, pattern=scfa.SlidingWindow(5), backend="numba-cpu")
    *_, right = results(lambda *x: attend(*x[:3], sinks=x[3]), (q, k, v, sinks), dout)
    assert runs == ["forward", "backward"]
    runs.clear()
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        (grad,) = torch.autograd.grad(function(q, k, v, sinks=sinks), sinks, dout)
        torch.testing.assert_close(grad, right)
        assert runs == ["forward"]
        runs.clear()


def test_sinks_count_once_over_several_patterns_and_pieces():
    q, k, v, dout = tensors()
    sinks = torch.tensor(SINKS)
    right = results(lambda *x: scfa.attention(*x[:3], sinks=x[3]), (q, k, v, sinks), dout)
    for parts in (2, 3):
        edges = [0, 5, 9][:parts]
        patterns = [
            scfa.Causal(lag=a) & scfa.SlidingWindow(b)
            for a, b in zip(edges, [*edges[1:], ROWS], strict=True)
        ]
        mine = results(
            lambda *x, p=patterns: attention_over(*x[:3], p, sinks=x[3]), (q, k, v, sinks), dout
        )
        torch.testing.assert_close(mine, right, rtol=0, atol=5e-6)

    def in_parts(q, k, v, sinks):
        below = scfa.Causal(align="bottom-right")
        first = scfa.KeyRanges(torch.zeros(1, 1, ROWS).int(), torch.arange(1, ROWS + 1)[None, None])
        pieces = [(k[:, :, :9], v[:, :, :9], first), (k[:, :, 9:], v[:, :, 9:], below)]
        return attention_in_parts(q, pieces, sinks=sinks)

    mine = results(in_parts, (q, k, v, sinks), dout)
    torch.testing.assert_close(mine, right, rtol=0, atol=5e-6)


@pytest.mark.parametrize("way", ["compiled", "functional", "checkpointed", "by slices"])
def test_ways_that_torch_goes(way):
    q, k, v, dout = tensors()
    inputs = (q, k, v, torch.tensor(SINKS))

    def attend(q, k, v, sinks):
        return scfa.attention(q, k, v, scfa.SlidingWindow(5), sinks=sinks)

    right = results(attend, inputs, dout)
    if way == "functional":
        _, vjp = torch.func.vjp(attend, *inputs)
        mine = [attend(*inputs), *vjp(dout)]
    elif way == "by slices":
        each = torch.func.vmap(lambda *x: attend(*(y[None] for y in x[:3]), x[3])[0])
        mine = [each(q, k, v, torch.stack([inputs[3]] * 2))]
    elif way == "checkpointed":
        mine = results(lambda *x: checkpoint(attend, *x, use_reentrant=False), inputs, dout)
    else:
        whole = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
        mine = results(whole, inputs, dout)
    torch.testing.assert_close(mine, right[: len(mine)], rtol=0, atol=5e-6)


def test_no_keys_and_no_rows():
    q, k, v, _ = tensors()
    sinks = torch.tensor(SINKS)
    out, lse = scfa.attention(q, k[:, :, :0], v[:, :, :0], sinks=sinks, return_lse=True)
    assert not out.any()
    assert torch.equal(lse, sinks[:, None].expand(2, HEADS, ROWS))
    sinks.requires_grad_()
    out = scfa.attention(q[:, :, :0], k, v, sinks=sinks)
    out.sum().backward()
    assert not sinks.grad.any()


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_opcheck(layout):
    *_, out = tensors(torch.float16, layout)
    arguments = (torch.ones_like(out), out, torch.randn(2, HEADS, ROWS), torch.zeros(HEADS), layout)
    library.opcheck(torch_union_ops.SINKS_BACKWARD, arguments)


def test_second_derivatives_are_refused():
    q, k, v, dout = tensors()
    sinks = torch.tensor(SINKS, requires_grad=True)
    out = scfa.attention(q, k, v, sinks=sinks)
    (grad,) = torch.autograd.grad(out, sinks, dout.requires_grad_(), create_graph=True)
    with pytest.raises(scfa.GradientError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("sinks", "error", "words"),
    [
        (torch.zeros(2), scfa.ShapeError, r"one logit a head, \(4,\).*got \(2,\)"),
        (torch.zeros(4, 1), scfa.ShapeError, r"got \(4, 1\)"),
        (torch.zeros(4, dtype=torch.int32), scfa.DTypeError, "floating-point, got torch.int32"),
        (torch.zeros(4, device="meta"), scfa.DeviceError, "on cpu like q, got meta"),
        (np.zeros(4), scfa.DeviceError, "one library"),
        (0.0, scfa.DTypeError, "sinks must be an array"),
    ],
)
def test_sinks_that_do_not_fit(sinks, error, words):
    q, k, v, _ = tensors()
    for call in (
        lambda: scfa.attention(q, k, v, sinks=sinks),
        lambda: attention_in_parts(q, [(k, v, None)], sinks=sinks),
    ):
        with pytest.raises(error, match=words):
            call()


def test_what_else_is_wrong_is_told_as_without_sinks():
    q, k, v, _ = tensors()
    sinks = torch.zeros(HEADS)
    with pytest.raises(scfa.PatternError, match="pattern"):
        scfa.attention(q, k, v, "causal", sinks=sinks)
    with pytest.raises(scfa.ShapeError, match="must have 4 axes"):
        scfa.attention(q[0], k, v, sinks=sinks)
    with pytest.raises(scfa.OptionError, match="sinks="):
        scfa.attention(q, k, v, s_aux=sinks)
    with pytest.raises(scfa.ShapeError, match=r"lse must be \(2, 4, 23\)"):
        sinks_backward(q, q, torch.zeros(2, 4, 22), sinks)
    with pytest.raises(scfa.ShapeError, match="dout must be like out"):
        sinks_backward(q[:1], q, torch.zeros(2, 4, 23), sinks)


@pytest.mark.parametrize("kind", [HashSelfAttention, WindowSelfAttention])
def test_layers_learn_theirs(kind):
    torch.manual_seed(0)
    layer = kind(64, heads=4, **({"buckets": 4} if kind is HashSelfAttention else {"window": 5}),
                 sinks=True)  # fmt: skip
    assert layer.sinks.shape == (4,)
    assert not layer.sinks.any()
    assert "sinks=True" in repr(layer)
    x = torch.randn(1, ROWS, 64)
    layer(x).square().sum().backward()
    assert layer.sinks.grad.all()
    with torch.no_grad():
        layer.sinks.fill_(50.0)
    assert layer(x).abs().max() < 1e-10
    assert "sinks" not in kind(64, 4, 4).state_dict()


def test_flops_are_those_without(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    from scfa_core.torch_flops import register

    register()
    q, k, v, dout = tensors()
    counts = []
    for sinks in (None, torch.tensor(SINKS)):
        with FlopCounterMode(display=False) as counter:
            results(lambda *x, s=sinks: scfa.attention(*x, sinks=s), (q, k, v), dout)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
