"""Merging parts equals attending at once: results, gradients, empty rows, layouts."""

from itertools import pairwise

import numpy as np
import pytest
from scfa_core.reference.attention import attention as dense_attention

import scfa_core as scfa
from scfa_core.merging import attention_over, merge_attention


def problem(seed=0, shape=(2, 4, 30, 16), heads_kv=2):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal(shape)
    k, v = rng.standard_normal((2, shape[0], heads_kv, *shape[2:]))
    return q, k, v


def cuts(q, *edges, module=np):
    """Disjoint key ranges under the causal triangle; the last rows of a part may be empty."""
    ones = module.ones(q.shape[:3], dtype=module.int64)
    return [scfa.KeyRanges(ones * a, ones * b) & scfa.Causal() for a, b in pairwise(edges)]


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_numpy_parts_merge_to_the_whole(layout):
    q, k, v = problem()
    right, right_lse = dense_attention(q, k, v, np.tri(30, dtype=bool)[None, None], 0.25)
    patterns = cuts(q, 0, 0, 7, 19, 30)
    if layout == "bthd":
        q, k, v, right = (x.swapaxes(1, 2) for x in (q, k, v, right))
    options = {"layout": layout, "backend": "reference", "return_lse": True}
    out, lse = attention_over(q, k, v, patterns, **options)
    assert out.dtype == q.dtype
    np.testing.assert_allclose(out, right, rtol=0, atol=2e-6)  # lse and so weights are float32
    np.testing.assert_allclose(lse, right_lse, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["numba-cpu", "reference"])
@pytest.mark.parametrize("size", [1.0, 30.0])  # scores of units, and weights far from each other
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_parts_under_the_merged_lse_add_up(dtype, size, backend):
    q, k, v = (x.astype(dtype) for x in problem())
    q *= size
    dout = np.random.default_rng(1).standard_normal(q.shape).astype(dtype)
    patterns = cuts(q, 0, 7, 19, 30)
    parts = [scfa.attention(q, k, v, x, return_lse=True, backend=backend) for x in patterns]
    out, lse = merge_attention(*zip(*parts, strict=True))
    grads = [scfa.attention_backward(dout, q, k, v, out, lse, x, backend=backend) for x in patterns]
    whole = scfa.attention(q, k, v, return_lse=True, backend="reference")
    right = scfa.attention_backward(dout, q, k, v, *whole, backend="reference")
    for mine, want in zip(map(sum, zip(*grads, strict=True)), right, strict=True):
        np.testing.assert_allclose(mine, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("backend", ["numba-cpu", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("other", [np.inf, -np.inf, 4e-4])
def test_a_given_lse_is_taken_as_it_is(dtype, other, backend):
    """Infinite where another part has an infinite score or this one sees nothing."""
    q, k, v, dout = np.random.default_rng(0).standard_normal((4, 1, 1, 20, 16)).astype(dtype)
    out, lse = scfa.attention(q, k, v, return_lse=True, backend=backend)
    moved = lse.copy()
    moved[0, 0, 5] = other if np.isinf(other) else lse[0, 0, 5] + other
    grads = [
        scfa.attention_backward(dout, q, k, v, out, x, backend=backend)[0][0, 0, 5]
        for x in (lse, moved)
    ]
    if np.isinf(other):
        assert grads[0].any()
        assert not grads[1].any()
    else:
        np.testing.assert_allclose(grads[1], grads[0] * np.exp(-other), rtol=3e-5)


def test_float64_gradients_need_more_digits_than_lse_has():
    q, k, v = problem()
    dout = np.random.default_rng(1).standard_normal(q.shape)
    out, lse = scfa.attention(q, k, v, return_lse=True, backend="numba-cpu")
    mine = scfa.attention_backward(dout, q, k, v, out, lse, backend="numba-cpu")
    right = scfa.attention_backward(dout, q, k, v, out, lse, backend="reference")
    for x, y in zip(mine, right, strict=True):
        assert np.abs(y).max() > 1
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)


def test_float64_gradients_where_lse_is_beyond_float32():
    """Scores are powers of 2, exact in any order: elsewhere one rounding of them is a weight."""
    q, k, v = problem()
    dout = np.random.default_rng(1).standard_normal(q.shape)
    q[:], k[:] = 0, 0
    q[..., 0], k[..., 0] = 2.0**70, 2.0 ** (60 + np.arange(30))  # each row sees itself alone
    out, lse = scfa.attention(q, k, v, return_lse=True, backend="numba-cpu")
    assert np.isposinf(lse).all()
    np.testing.assert_array_equal(out, v.repeat(2, axis=1))
    _, _, dv = scfa.attention_backward(dout, q, k, v, out, lse, backend="numba-cpu")
    np.testing.assert_allclose(dv, dout[:, ::2] + dout[:, 1::2], rtol=1e-14)


def test_rows_that_no_part_sees_are_zero():
    q, k, v = problem()
    nothing = cuts(q, 5, 6, 9)
    out, lse = attention_over(q, k, v, nothing, return_lse=True, backend="reference")
    assert not out[:, :, :5].any()
    assert np.isneginf(lse[:, :, :5]).all()
    assert np.isfinite(lse[:, :, 5:]).all()


def test_misfits_raise():
    out, lse = np.zeros((1, 2, 3, 16)), np.zeros((1, 2, 3), np.float32)
    with pytest.raises(scfa.PatternError, match="an lse for each out"):
        merge_attention([out], [])
    with pytest.raises(scfa.PatternError, match="an lse for each out"):
        merge_attention([], [])
    with pytest.raises(scfa.ShapeError, match="each lse"):
        merge_attention([out, out], [lse, lse[:, :1]])
    with pytest.raises(scfa.PatternError, match="at least one"):
        attention_over(out, out, out, [])
    with pytest.raises(scfa.PatternError, match="DLPack"):
        merge_attention([memoryview(out)], [memoryview(lse)])
    for outs, lses in ((None, None), ([out], None), (3, [lse])):
        with pytest.raises(scfa.PatternError, match="must be a list"):
            merge_attention(outs, lses)
    with pytest.raises(scfa.PatternError, match="got NoneType"):
        merge_attention([out], [None])
    with pytest.raises(scfa.ShapeError, match="each out of the list must have 4 axes"):
        merge_attention(out, lse)
    whole = out.astype(np.int64)
    for outs, lses, name in (([whole], [lse], "outs"), ([out], [lse > 0], "lses")):
        with pytest.raises(scfa.DTypeError, match=f"{name} must be floating-point"):
            merge_attention(outs, lses)
    with pytest.raises(scfa.ShapeError, match="4 axes"):
        merge_attention([out[0]], [lse[0]])
    for patterns, got in ((None, "NoneType"), ([None], "NoneType"), ([scfa.Causal(), out], "nd")):
        with pytest.raises(scfa.PatternError, match=f"patterns must be a list.*got .*{got}"):
            attention_over(out, out, out, patterns)


def test_libraries_do_not_mix():
    torch = pytest.importorskip("torch", reason="a second library beside NumPy")
    out, lse = np.zeros((1, 2, 3, 16), np.float32), np.zeros((1, 2, 3), np.float32)
    parts = ([torch.from_numpy(out), out], [torch.from_numpy(lse)] * 2)
    with pytest.raises(scfa.PatternError, match="one library, got Tensor and ndarray"):
        merge_attention(*parts)


def torch_problem(dtype="float64"):
    torch = pytest.importorskip("torch", reason="gradients need torch")
    tensors = [torch.from_numpy(x).to(getattr(torch, dtype)).requires_grad_() for x in problem()]
    return torch, tensors


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("through_lse", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("numba-cpu", "float32"), ("numba-cpu", "float64"), ("reference", "float32")],
)
def test_torch_gradients_equal_those_of_one_call(layout, through_lse, backend, dtype):
    torch, tensors = torch_problem(dtype)
    patterns = cuts(tensors[0], 0, 4, 4, 21, 30, module=torch)
    if layout == "bthd":
        tensors = [x.detach().transpose(1, 2).requires_grad_() for x in tensors]
    options = {"layout": layout, "backend": backend, "return_lse": through_lse}
    mine = attention_over(*tensors, patterns, **options)
    right = scfa.attention(*tensors, scfa.Causal(), **options)
    if not through_lse:
        cheap = (backend, dtype) == ("numba-cpu", "float32")
        assert ("_Union" in type(mine.grad_fn).__name__) == cheap
        mine, right = (mine,), (right,)
    torch.testing.assert_close(mine, right, rtol=0, atol=2e-6)
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in right]
    grads = (torch.autograd.grad(x, tensors, weights) for x in (mine, right))
    torch.testing.assert_close(*grads, rtol=0, atol=1e-5)


def test_merge_alone_is_differentiable_and_safe_on_empty_rows():
    torch, _ = torch_problem()
    outs = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 1, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: merge_attention(a, b), (outs, lses))
    blind = lses.detach().clone()
    blind[0, 0, 0] = blind[:, 0, 1, 2] = -torch.inf
    blind.requires_grad_()
    out, lse = merge_attention(outs, blind)
    assert torch.isneginf(lse[0, 1, 2])
    assert not out[0, 1, 2].any()
    finite = torch.where(torch.isneginf(lse), 0.0, lse)
    grads = torch.autograd.grad(out.sum() + finite.sum(), (outs, blind))
    assert all(g.isfinite().all() for g in grads)


def test_narrow_results_keep_their_dtype():
    torch, tensors = torch_problem("bfloat16")
    out = attention_over(*tensors, cuts(tensors[0], 0, 15, 30, module=torch))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    right = scfa.attention(*(x.detach().double() for x in tensors))
    assert (out - right).abs().max() < 0.03
    assert all(x.grad.dtype == torch.bfloat16 for x in tensors)


def test_mixed_precision_narrows_as_attention_does():
    torch, tensors = torch_problem("float32")
    patterns = cuts(tensors[0], 0, 15, 30, module=torch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_over(*tensors, patterns)
    assert out.dtype == torch.bfloat16
    mine = torch.autograd.grad(out.float().square().sum(), tensors)
    right = torch.autograd.grad(scfa.attention(*tensors).square().sum(), tensors)
    for a, b in zip(mine, right, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.slow
def test_compiled_as_one_graph():
    torch, tensors = torch_problem("float32")
    patterns = cuts(tensors[0], 0, 15, 30, module=torch)

    def loss(q, k, v):
        return attention_over(q, k, v, patterns).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    mine = torch.autograd.grad(compiled(*tensors), tensors)
    torch.testing.assert_close(mine, torch.autograd.grad(loss(*tensors), tensors))
