"""The way of GPU tensors, walked with host memory: right answers, and none that are stale."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

import pretended_gpu  # noqa: E402
from pretended_gpu import (  # noqa: E402
    BATCH,
    HEADS,
    HEADS_KV,
    KEYS,
    ROWS,
    Binding,
    assert_right,
    hashes,
    ids,
    tensors,
    truth,
)

import scfa_core as scfa  # noqa: E402

allocated, device = pretended_gpu.allocated, pretended_gpu.device


def patterns():
    q_hash, k_hash = hashes()
    flags = [x.bool() for x in hashes(seed=4)]
    documents = ids(1, ROWS).sort(-1).values[:, 0]
    start = ids(HEADS, ROWS, top=4)
    return {
        "causal": scfa.Causal(),
        "window": scfa.SlidingWindow(3) & scfa.Causal(include_self=False),
        "far": scfa.HashSparse(q_hash, k_hash) & scfa.Causal(lag=2),
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


def test_calls_of_the_host_do_not_count(monkeypatch, allocated):
    """Nor does the order of the tests: some call the host with tensors of these very sizes."""
    assert_right(*tensors(), scfa.HashSparse(*hashes()))
    backend = pretended_gpu.pretend(Binding(), monkeypatch, allocated)
    assert_right(*tensors(), scfa.HashSparse(*hashes()))
    assert backend.seen == ["make_plan", "forward", "backward"]


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


@pytest.mark.parametrize("kind", ["HashSparse", "QKSparse", "Documents"])
def test_one_tensor_for_both_sides_is_not_two_tensors(device, kind):
    """What is remembered of (a, a) must not serve (a, b), nor the other way round."""
    q, k, v = tensors(keys=ROWS, requires_grad=False)
    a, b = (ids(1, ROWS, top=3, seed=seed) for seed in (1, 2))
    if kind == "Documents":
        a, b = (x[:, 0].contiguous() for x in (a, b))
    for pair in ((a, a), (a, b), (b, b), (b, a), (a, a)):
        assert_right(q, k, v, getattr(scfa, kind)(*pair))


def test_a_plan_whose_memory_has_moved(device):
    """Addresses are remembered for a plan as long as they are its own."""
    q, k, v = tensors(requires_grad=False)
    plan = scfa.make_plan(scfa.HashSparse(*hashes()), q, k)
    scfa.attention(q, k, v, plan)
    other = scfa.make_plan(scfa.Causal(), q, k)
    for mine, new in zip(plan.arrays, other.arrays, strict=True):
        mine.set_(new.clone())
    want = truth(q, k, v, scfa.Causal())[0]
    out = scfa.attention(q, k, v, plan)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)


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


def test_no_rows_no_kernels(device):
    q, k, v = tensors(requires_grad=False)
    nothing = scfa.HashSparse(*(x[:0] for x in hashes()))
    assert scfa.attention(q[:0], k[:0], v[:0], nothing).shape == (0, HEADS, ROWS, 24)
    out, lse = scfa.attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert not out.any()
    assert torch.isneginf(lse).all()
    assert "forward" not in device.seen
