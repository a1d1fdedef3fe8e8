"""What torch builds around a call, on the card: compiled graphs, autocast, checkpoints."""

from functools import partial

import pytest

import scfa_core as scfa

# torch's compiler imports torch.jit; its autograd thread starts without a context, and says so
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]


def inputs(torch, rows=300, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, v = (
        torch.randn(2, heads, rows, 64, device="cuda", generator=generator)
        .bfloat16()
        .requires_grad_()
        for heads in (4, 2, 2)
    )
    q_hash, k_hash = (
        torch.randint(0, 5, (2, heads, rows), device="cuda", generator=generator)
        for heads in (4, 2)
    )
    return q, k, v, q_hash, k_hash


def by_hash(backend):
    def attend(q, k, v, q_hash, k_hash):
        pattern = scfa.Causal()
        pattern &= scfa.HashSparse(q_hash, k_hash)
        return scfa.attention(q, k, v, pattern, backend=backend)

    return attend


def with_gradients(torch, function, arguments):
    out = function(*arguments)
    return out, *torch.autograd.grad(out.float().square().sum(), arguments[:3])


def assert_same(torch, left, right):
    for mine, other in zip(left, right, strict=True):
        assert torch.equal(mine, other)
        assert mine.stride() == other.stride()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(torch, backend, dynamic):
    torch._dynamo.reset()
    attend = by_hash(backend)
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, seed in ((300, 0), (300, 1), (190, 2)):
        arguments = inputs(torch, rows, seed)
        assert_same(
            torch,
            with_gradients(torch, compiled, arguments),
            with_gradients(torch, attend, arguments),
        )


def test_compiled_and_captured(torch, backend):
    """A compiled step in a graph, replayed with other hashes."""
    torch._dynamo.reset()
    attend = by_hash(backend)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    arguments = inputs(torch)
    with torch.no_grad():
        compiled(*arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = compiled(*arguments)
        *_, q_hash, k_hash = inputs(torch, seed=5)
        arguments[3].copy_(q_hash)
        arguments[4].copy_(k_hash)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, attend(*arguments))


def dense_with_sinks(torch, q, k, v, sinks, q_hash, k_hash):
    """The formula step by step in the inputs' dtype; rows that see nothing come out of a sink."""
    k, v, k_hash = (x.repeat_interleave(2, 1) for x in (k, v, k_hash))
    seen = (q_hash[..., None] == k_hash[..., None, :]).tril()
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    sink = sinks.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


def test_sinks_compiled_and_captured(torch, backend):
    """Errors beside float64 are at most twice those of the formula in the same dtype."""
    torch._dynamo.reset()
    *tensors, q_hash, k_hash = inputs(torch)
    sinks = torch.tensor([-1.0, 0.0, 2.0, 0.5], device="cuda", requires_grad=True)

    def attend(q, k, v, sinks, q_hash, k_hash):
        pattern = scfa.HashSparse(q_hash, k_hash)
        return scfa.attention(q, k, v, pattern, sinks=sinks, backend=backend)

    def results(function, leaves, hashes):
        out = function(*leaves, *hashes)
        return out, *torch.autograd.grad(out.double().square().sum(), leaves)

    leaves, hashes = (*tensors, sinks), (q_hash, k_hash)
    mine = results(attend, leaves, hashes)
    dense = partial(dense_with_sinks, torch)
    usual = results(dense, leaves, hashes)
    right = results(dense, [x.detach().double().requires_grad_() for x in leaves], hashes)
    for x, theirs, true in zip(mine, usual, right, strict=True):
        assert (x - true).norm() <= 2 * (theirs - true).norm()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for x, true in zip(results(compiled, leaves, hashes), mine, strict=True):
        assert torch.equal(x, true)
    leaves = tuple(x.detach().requires_grad_() for x in leaves)  # of the stream that captures
    stream = torch.cuda.Stream()  # what a graph captures has run before, on another stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(attend, leaves, hashes)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(attend, leaves, hashes)
    graph.replay()
    torch.cuda.synchronize()
    for x, true in zip(captured, mine, strict=True):
        assert torch.equal(x, true)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast(torch, backend, dtype):
    wide = [x.detach().float().requires_grad_() for x in inputs(torch)[:3]]
    kind, hashes = getattr(torch, dtype), inputs(torch)[3:]
    attend = by_hash(backend)
    with torch.autocast("cuda", kind):
        out = attend(*wide, *hashes)
    assert out.dtype is kind
    grads = torch.autograd.grad(out.float().square().sum(), wide)
    narrow = [x.detach().to(kind).requires_grad_() for x in wide]
    right, *right_grads = with_gradients(torch, attend, (*narrow, *hashes))
    assert torch.equal(out, right)
    for mine, other in zip(grads, right_grads, strict=True):
        assert mine.dtype is torch.float32
        assert torch.equal(mine, other.float())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(torch, backend, use_reentrant):
    from torch.utils.checkpoint import checkpoint

    attend = by_hash(backend)
    arguments = inputs(torch)

    def again(*arguments):
        return checkpoint(attend, *arguments, use_reentrant=use_reentrant)

    def grads(function):
        leaves = [x.detach().requires_grad_() for x in arguments[:3]]
        out = function(*leaves, *arguments[3:])
        out.float().square().sum().backward()
        return out.detach(), *(x.grad for x in leaves)

    assert_same(torch, grads(again), grads(attend))


def test_saved_on_the_host(torch, backend):
    """Hooks that give q, k and v back contiguous: (batch, seqlen, heads, head_dim) transposed."""
    q, k, v, q_hash, k_hash = inputs(torch)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in turned)
    arguments = [*(x.requires_grad_() for x in turned), q_hash, k_hash]
    attend = by_hash(backend)
    plain = with_gradients(torch, attend, arguments)
    with torch.autograd.graph.save_on_cpu():
        out = attend(*arguments)
    saved = (out, *torch.autograd.grad(out.float().square().sum(), arguments[:3]))
    for mine, other in zip(saved, plain, strict=True):
        assert torch.equal(mine, other)
