"""Gradients through torch: finite differences for every pattern, and every way to ask for them."""

import pytest

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

from torch.autograd import forward_ad  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import scfa_core as scfa  # noqa: E402
from scfa_core import torch_bridge  # noqa: E402
from scfa_core.merging import attention_over  # noqa: E402
from scfa_core.plan import PlanArrays  # noqa: E402

# torch's own modules warn when torch.func first imports them.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

BATCH, HEADS, HEADS_KV, SEQLEN_Q, SEQLEN_K = 2, 4, 2, 7, 9
BACKEND = "reference"


def integers(high, *shape, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


Q_HASH, K_HASH = integers(3, BATCH, HEADS, SEQLEN_Q), integers(3, BATCH, HEADS_KV, SEQLEN_K)
Q_KEEP, K_KEEP = Q_HASH > 0, K_HASH > 0
START = integers(5, BATCH, HEADS, SEQLEN_Q, seed=1)
PATTERNS = {
    "causal": scfa.Causal(),
    "bottom-right": scfa.Causal(include_self=False, align="bottom-right"),
    "hash": scfa.HashSparse(Q_HASH, K_HASH),
    "far hash": scfa.HashSparse(Q_HASH, K_HASH) & scfa.Causal(lag=7),
    "hash without self": scfa.HashSparse(Q_HASH, K_HASH, include_self=False),
    "keep": scfa.QKSparse(Q_KEEP, K_KEEP),
    "keep floats": scfa.QKSparse(Q_KEEP.float(), K_KEEP.float(), causal=False),
    "documents": scfa.Documents(Q_HASH[:, 0], K_HASH[:, 0], causal=False),
    "window": scfa.SlidingWindow(3),
    "ranges": scfa.KeyRanges(START, START + Q_HASH),
    "hash & keep & window": scfa.HashSparse(Q_HASH, K_HASH)
    & scfa.QKSparse(Q_KEEP[:1], K_KEEP[:, :1])
    & scfa.SlidingWindow(6, causal=False),
}


def tensors(dtype=torch.float64, layout="bhtd", requires_grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    result = []
    for heads, seqlen, dim in (
        (HEADS, SEQLEN_Q, 16),
        (HEADS_KV, SEQLEN_K, 16),
        (HEADS_KV, SEQLEN_K, 24),
    ):
        shape = (BATCH, heads, seqlen, dim) if layout == "bhtd" else (BATCH, seqlen, heads, dim)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        result.append(x.requires_grad_(requires_grad))
    return result


def dense(q, k, v, pattern):
    """out and lse by plain torch from the mask; lse is 0 on blind rows, to be differentiable."""
    mask = torch.from_numpy(
        pattern.mask(q.shape[2], k.shape[2], batch=BATCH, heads=HEADS, heads_kv=HEADS_KV)
    )
    k, v = (x.repeat_interleave(HEADS // HEADS_KV, 1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -1e30)
    sees = mask.any(-1)
    out = torch.softmax(scores, -1).masked_fill(~mask, 0.0) @ v
    return out, torch.where(sees, scores.logsumexp(-1), 0.0), sees


@pytest.fixture(params=["eager", "operator"])
def way(request, monkeypatch):
    """Straight to the backend, or through the operators as tracing and subclasses go."""
    if request.param == "operator":
        monkeypatch.setattr(torch_bridge, "is_plain", lambda *tensors: False)


def attend(q, k, v, pattern=PATTERNS["hash"], backend=BACKEND, **options):
    return scfa.attention(q, k, v, pattern, backend=backend, **options)


def attend_over(q, k, v, pattern, backend):
    return attention_over(q, k, v, [pattern], backend=backend)


def attend_checkpointed(q, k, v, pattern, backend):
    return checkpoint(attend, q, k, v, pattern, backend, use_reentrant=False)


@pytest.mark.parametrize("name", PATTERNS)
def test_gradcheck(name):
    q, k, v = tensors()
    assert torch.autograd.gradcheck(
        lambda *x: attend(*x, PATTERNS[name]), (q, k, v), fast_mode=True
    )


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("name", ["hash", "keep", "ranges"])
@pytest.mark.usefixtures("way")
def test_gradients_of_out_and_lse(name, layout):
    """A loss on both outputs; blind rows carry a NaN gradient into lse, which must not spread."""
    pattern = PATTERNS[name]
    q, k, v = tensors(layout=layout)
    heads_first = [x.transpose(1, 2) if layout == "bthd" else x for x in (q, k, v)]
    right, right_lse, sees = dense(*heads_first, pattern)
    right = right.transpose(1, 2) if layout == "bthd" else right
    weights = torch.randn(right_lse.shape, generator=torch.Generator().manual_seed(3))
    want = torch.autograd.grad((right**2).sum() + (right_lse * weights).sum(), (q, k, v))
    poison = torch.where(sees, weights, torch.nan)
    out, lse = attend(q, k, v, pattern, layout=layout, return_lse=True)
    got = torch.autograd.grad((out, lse), (q, k, v), (2 * out.detach(), poison))
    torch.testing.assert_close(lse[sees].double(), right_lse[sees], rtol=1e-6, atol=1e-6)
    for mine, true in zip(got, want, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-6)  # lse is float32


@pytest.mark.usefixtures("way")
def test_loss_on_lse_alone():
    q, k, v = tensors()
    sees = dense(q, k, v, PATTERNS["causal"])[2]
    want = torch.autograd.grad(dense(q, k, v, PATTERNS["causal"])[1].sum(), (q, k))
    lse = attend(q, k, v, PATTERNS["causal"], return_lse=True)[1]
    got = torch.autograd.grad(lse[sees].sum(), (q, k, v))
    torch.testing.assert_close(got[:2], want, rtol=1e-6, atol=1e-6)
    assert not got[2].any()


def test_incoming_gradients_of_any_strides():
    """``sum().backward()`` sends strides of 0, a transposed loss a strided last axis."""
    q, k, v = tensors()
    out = attend(q, k, v)
    want = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    for loss in (out.sum(), out.mT.contiguous().sum(), out[..., ::2].sum() + out[..., 1::2].sum()):
        got = torch.autograd.grad(loss, (q, k, v), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_only_what_requires_grad_gets_one():
    q, k, v = tensors()
    out = attend(q.detach(), k, v.detach())
    out.sum().backward()
    assert k.grad is not None
    assert q.grad is None
    assert v.grad is None


def test_gradients_have_the_strides_of_their_tensors():
    q, k, v = (x.transpose(1, 2) for x in tensors(layout="bthd"))
    out = attend(q, k, v)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for x, grad in zip((q, k, v), grads, strict=True):
        assert grad.stride() == x.stride()
    assert out.stride() == (SEQLEN_Q * HEADS * 24, 24, HEADS * 24, 1)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("with_plan", [True, False])
def test_checkpointing(use_reentrant, with_plan):
    q, k, v = tensors()
    pattern = PATTERNS["hash"]
    if with_plan:
        pattern = scfa.make_plan(pattern, q, k, backend=BACKEND)
    want = torch.autograd.grad(attend(q, k, v, pattern).sum(), (q, k, v))
    out = checkpoint(attend, q, k, v, pattern, use_reentrant=use_reentrant)
    out.sum().backward()
    assert all(torch.equal(x.grad, true) for x, true in zip((q, k, v), want, strict=True))


def test_own_plan_is_an_activation_and_a_given_one_is_not():
    """Checkpointing and offloading may take what the call made; a shared plan stays where it is."""
    q, k, v = tensors()
    saved = []

    def keep(x):
        saved.append(x.dtype)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attend(q, k, v)
        own = saved.count(torch.int32)
        saved.clear()
        attend(q, k, v, scfa.make_plan(PATTERNS["hash"], q, k, backend=BACKEND))
    assert own == 7
    assert torch.int32 not in saved


@pytest.mark.parametrize("name", PlanArrays._fields[:6])
@pytest.mark.parametrize("how", [attend, attend_over, attend_checkpointed])
def test_a_plan_changed_before_backward_is_noticed(name, how):
    q, k, v = tensors(torch.float32)
    plan = scfa.make_plan(PATTERNS["hash"], q, k, backend="numba-cpu")
    changed = getattr(plan, name)
    changed.copy_(changed.clone())  # before the forward it may change
    out = how(q, k, v, plan, backend="numba-cpu")
    out.sum().backward(retain_graph=True)
    changed.zero_()
    with pytest.raises(scfa.GradientError, match="changed in place after the forward"):
        out.sum().backward()


def test_a_plan_of_inference_mode_serves_training():
    q, k, v = tensors()
    with torch.inference_mode():
        plan = scfa.make_plan(PATTERNS["hash"], q, k, backend=BACKEND)
    want = torch.autograd.grad(attend(q, k, v, PATTERNS["hash"]).sum(), q)
    assert torch.equal(*want, *torch.autograd.grad(attend(q, k, v, plan).sum(), q))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("how", ["pattern", "plan", "union"])
def test_batched_gradients_equal_a_loop(how):
    """``is_grads_batched`` and vectorised Jacobians hand over gradients without memory."""
    q, k, v = tensors(torch.float32)
    pattern = PATTERNS["hash"]
    if how == "union":
        parts = [scfa.SlidingWindow(3), scfa.Causal(lag=3)]
        results = [attention_over(q, k, v, parts, backend="numba-cpu")]
    else:
        given = pattern if how == "pattern" else scfa.make_plan(pattern, q, k, backend=BACKEND)
        out, lse = scfa.attention(q, k, v, given, return_lse=True, backend=BACKEND)
        results = [out, torch.where(torch.isneginf(lse), 0.0, lse)]
    grads = [torch.randn(3, *x.shape) for x in results]
    batch = torch.autograd.grad(results, (q, k, v), grads, is_grads_batched=True, retain_graph=True)
    for at in range(3):
        one = [x[at] for x in grads]
        alone = torch.autograd.grad(results, (q, k, v), one, retain_graph=True)
        for mine, right in zip(batch, alone, strict=True):
            torch.testing.assert_close(mine[at], right, rtol=0, atol=1e-6)


def test_double_backward_says_that_there_is_none():
    q, k, v = tensors()
    (grad,) = torch.autograd.grad(attend(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(scfa.GradientError, match="first derivatives only"):
        grad.sum().backward()


def test_forward_mode_says_that_there_is_none():
    q, k, v = tensors(requires_grad=False)
    with (
        forward_ad.dual_level(),
        pytest.raises(scfa.GradientError, match="no forward-mode derivative"),
    ):
        attend(forward_ad.make_dual(q, q), k, v)
    for transform in (torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(scfa.GradientError, match="no forward-mode derivative"):
            transform(lambda x: attend(x, k, v).sum())(q)


def test_torch_func_grad():
    q, k, v = tensors()
    want = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    q, k, v = (x.detach() for x in (q, k, v))
    got = torch.func.grad(lambda *x: attend(*x).square().sum(), argnums=(0, 1, 2))(q, k, v)
    torch.testing.assert_close(got, want)
    with pytest.raises(scfa.GradientError, match="first derivatives only"):
        torch.func.grad(lambda x: torch.func.grad(lambda y: attend(y, k, v).sum())(x).sum())(q)


@pytest.mark.parametrize("dim", [0, 2, -1])
def test_vmap_equals_a_loop(dim):
    _, k, v = tensors(requires_grad=False)
    qs = torch.stack([tensors(requires_grad=False, seed=seed)[0] for seed in range(3)], dim)
    hashes = torch.stack([Q_HASH, Q_HASH.flip(-1), Q_HASH + 1])

    def one(q, q_hash):
        return attend(q, k, v, scfa.HashSparse(q_hash, K_HASH) & scfa.SlidingWindow(5))

    out = torch.func.vmap(one, in_dims=(dim, 0))(qs, hashes)
    right = [one(q.contiguous(), h) for q, h in zip(qs.unbind(dim), hashes, strict=True)]
    assert torch.equal(out, torch.stack(right))


def test_vmap_over_nothing_is_told():
    q = torch.randn(0, 1, 2, 9, 16)
    with pytest.raises(scfa.ShapeError, match="axis of length 0"):
        torch.func.vmap(lambda x: scfa.attention(x, x, x))(q)


def test_values_that_vmap_hides_are_told():
    q, flags = torch.randn(1, 2, 9, 16), torch.ones(3, 1, 2, 9, dtype=torch.int64)

    def look(keep):
        scfa.validate(scfa.QKSparse(keep, keep), q, q)
        return keep

    with pytest.raises(scfa.DeviceError, match=r"inside torch\.func"):
        torch.func.vmap(look)(flags)


def test_vmap_and_grad_nest_both_ways():
    _, k, v = tensors(requires_grad=False)
    qs = torch.stack([tensors(requires_grad=False, seed=seed)[0] for seed in range(2)])

    def loss(q):
        return attend(q, k, v).square().sum()

    want = torch.stack([torch.func.grad(loss)(q) for q in qs])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(qs), want)
    outer = torch.func.grad(lambda x: torch.func.vmap(loss)(x).sum())(qs)
    torch.testing.assert_close(outer, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Mixed inputs, as models in autocast make them; gradients come in the inputs' dtypes."""
    q, k, v = tensors(torch.float32)
    half_k = k.to(dtype)
    with torch.autocast("cpu", dtype):
        out = attend(q, half_k, v)
        again = attend(q.to(dtype), half_k, v.to(dtype))
    assert out.dtype is dtype
    assert torch.equal(out, again)
    out.float().sum().backward()
    assert q.grad.dtype is torch.float32
    double = tensors()
    with torch.autocast("cpu", dtype):
        assert attend(*double).dtype is torch.float64  # as torch itself does


@pytest.mark.parametrize("way", ["eager", "operator", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_by_hand_in_autocast(dtype, way, monkeypatch):
    """What `attention` takes and gives there: gradients are autograd's, in the inputs' dtypes."""
    backward = scfa.attention_backward
    if way == "compiled":
        backward = torch.compile(backward, backend="eager", fullgraph=True)
    if way == "operator":
        monkeypatch.setattr(torch_bridge, "is_plain", lambda *tensors: False)
    q, k, v = tensors(torch.float32)
    k = k.detach().to(dtype).requires_grad_()
    pattern = PATTERNS["hash"]
    with torch.autocast("cpu", dtype):
        out, lse = attend(q, k, v, return_lse=True)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    want = torch.autograd.grad(out, (q, k, v), dout.to(dtype))
    given = [x.detach() for x in (q, k, v, out, lse)]
    with torch.autocast("cpu", dtype):
        for up in (dout, dout.to(dtype)):
            got = backward(up, *given, pattern, backend=BACKEND)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert [x.dtype for x in got] == [torch.float32, dtype, torch.float32]


def test_backward_by_hand_follows_the_forward_and_not_the_place_of_its_call():
    """What was computed in float32 has gradients of float32, in an autocast region too."""
    q, k, v = (x.detach() for x in tensors(torch.float32))
    out, lse = attend(q, k, v, return_lse=True)
    args = (torch.ones_like(out), q, k, v, out, lse, PATTERNS["hash"])
    want = scfa.attention_backward(*args, backend=BACKEND)
    with torch.autocast("cpu", torch.bfloat16):
        got = scfa.attention_backward(*args, backend=BACKEND)
        double = [x.double() for x in (q, k, v)]
        out, lse = attend(*double, return_lse=True)
        own = scfa.attention_backward(out, *double, out, lse, PATTERNS["hash"], backend=BACKEND)
        with pytest.raises(scfa.DTypeError, match="dout must be float32, got float64"):
            scfa.attention_backward(args[0].double(), *args[1:], backend=BACKEND)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert {x.dtype for x in own} == {torch.float64}


def test_backward_by_hand_equals_autograd():
    q, k, v = tensors()
    out, lse = attend(q, k, v, return_lse=True)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    want = torch.autograd.grad(out, (q, k, v), dout)
    detached = [x.detach() for x in (q, k, v, out, lse)]
    got = scfa.attention_backward(dout, *detached, PATTERNS["hash"], backend=BACKEND)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_backward_runs_on_the_backend_of_the_forward():
    """Autograd may call from another thread, where the context of the forward is unknown."""
    from concurrent.futures import ThreadPoolExecutor

    q, k, v = tensors()
    with scfa.use_backend("reference"):
        out = scfa.attention(q, k, v, PATTERNS["hash"])
    want = torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
    with scfa.use_backend("numba-cpu"), ThreadPoolExecutor(1) as pool:
        got = pool.submit(torch.autograd.grad, out.sum(), (q, k, v)).result()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
