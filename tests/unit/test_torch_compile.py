"""torch.compile: whole graphs, one compilation for all batches, the eager numbers."""

from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.utils.checkpoint import (  # noqa: E402
    checkpoint,
    create_selective_checkpoint_contexts,
)

import scfa_core as scfa  # noqa: E402
from scfa_core import array_kinds  # noqa: E402
from scfa_core.merging import merge_attention  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
BACKEND = "reference"


def batch(seed, seqlen=9, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, heads, seqlen, dim, generator=generator).requires_grad_(requires_grad)
        for heads, dim in ((4, 16), (2, 16), (2, 24))
    )
    q_hash = torch.randint(0, 3, (2, 4, seqlen), generator=generator)
    k_hash = torch.randint(0, 3, (2, 2, seqlen), generator=generator)
    return q, k, v, q_hash, k_hash


def counted(function, dynamic=None, backend="aot_eager"):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


def same(compiled, eager, arguments):
    """Compare results and gradients of both."""
    inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    results = []
    for function in (compiled, eager):
        out = function(*arguments)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for mine, true in zip(*results, strict=True):
        torch.testing.assert_close(mine, true)
        assert mine.stride() == true.stride()


def everything(q, k, v, q_hash, k_hash):
    pattern = (
        scfa.HashSparse(q_hash, k_hash)
        & scfa.QKSparse(q_hash > -1, k_hash < 2)
        & scfa.SlidingWindow(6)
        & scfa.Causal(align="bottom-right")
        & scfa.Documents(q_hash[:, 0] * 0)
        & scfa.KeyRanges(q_hash, q_hash + 7)
    )
    return scfa.attention(q, k, v, pattern, backend=BACKEND)


def test_pattern_made_inside_compiles_once_for_all_batches():
    compiled, counter = counted(everything, dynamic=False)
    for seed in range(3):
        same(compiled, everything, batch(seed))
    assert counter.frame_count == 1


def test_patterns_may_be_joined_one_by_one():
    def attend(q, k, v, q_hash, k_hash):
        pattern = scfa.Causal()
        for part in (scfa.HashSparse(q_hash, k_hash), scfa.SlidingWindow(6)):
            pattern &= part
        return scfa.attention(q, k, v, pattern, backend=BACKEND)

    compiled, _ = counted(attend)
    same(compiled, attend, batch(0))


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)])
def test_lengths_can_be_dynamic(dynamic, graphs):
    """dynamic=None is torch's default: a second length makes the size symbolic, and that is all."""
    compiled, counter = counted(everything, dynamic=dynamic)
    for seed, seqlen in enumerate((9, 13, 17, 30)):
        same(compiled, everything, batch(seed, seqlen))
    assert counter.frame_count == graphs


OF_LENGTH = {
    "window": lambda n: scfa.SlidingWindow(n),
    "half": lambda n: scfa.SlidingWindow(n // 2),
    "both ways": lambda n: scfa.SlidingWindow(n // 4, causal=False),
    "lag": lambda n: scfa.Causal(lag=n // 3),
    "far": lambda n: scfa.SlidingWindow(n // 2) & scfa.Causal(False, lag=n // 8),
}


@pytest.mark.parametrize("name", OF_LENGTH)
def test_windows_may_depend_on_the_length(name):
    """The number stays open with the length: there is one graph for all."""

    def attend(q, k, v, *_):
        pattern = OF_LENGTH[name](q.shape[2])
        return scfa.attention(q, k, v, pattern, backend=BACKEND)

    compiled, counter = counted(attend, dynamic=True)
    for seed, seqlen in enumerate((9, 13, 17, 30)):
        same(compiled, attend, batch(seed, seqlen))
    assert counter.frame_count == 1


def test_lengths_can_be_dynamic_where_heads_are_broadcast():
    """Which strides are 0 is then a question to the guards."""

    def broadcast(q, k, v, q_hash, k_hash):
        q, k, v = q[:, :1].expand_as(q), k[:, :1].expand_as(k), v[:1].expand_as(v)
        return everything(q, k, v, q_hash, k_hash)

    compiled, counter = counted(broadcast, dynamic=True)
    for seqlen in (9, 13):
        same(compiled, broadcast, batch(0, seqlen))
    assert counter.frame_count == 1


def test_an_intersection_of_nothing_shows_everything():
    def dense(q, k, v):
        return scfa.attention(q, k, v, scfa.Intersection(), backend=BACKEND)

    same(counted(dense)[0], dense, batch(0)[:3])


def with_pattern(q, k, v, pattern):
    return scfa.attention(q, k, v, pattern, backend=BACKEND)


def test_pattern_and_plan_passed_in():
    q, k, v, q_hash, k_hash = batch(0)
    pattern = scfa.HashSparse(q_hash, k_hash)
    for given in (pattern, scfa.make_plan(pattern, q, k, backend=BACKEND)):
        compiled, counter = counted(with_pattern)
        same(compiled, with_pattern, (q, k, v, given))
        assert counter.frame_count == 1


def test_plans_from_batch_to_batch_do_not_recompile():
    compiled, counter = counted(with_pattern, dynamic=False)
    for seed in range(3):
        q, k, v, q_hash, k_hash = batch(seed)
        plan = scfa.make_plan(scfa.HashSparse(q_hash, k_hash), q, k, backend=BACKEND)
        same(compiled, with_pattern, (q, k, v, plan))
    assert counter.frame_count == 1


def test_plan_closed_over():
    q, k, v, q_hash, k_hash = batch(0)
    plan = scfa.make_plan(scfa.HashSparse(q_hash, k_hash), q, k, backend=BACKEND)

    def function(q, k, v):
        return scfa.attention(q, k, v, plan)

    compiled, _ = counted(function)
    same(compiled, function, (q, k, v))


def two_layers(q, k, v, q_hash, k_hash):
    plan = scfa.make_plan(scfa.HashSparse(q_hash, k_hash), q, k, backend=BACKEND)
    first = scfa.attention(q, k, v, plan)
    return scfa.attention(first[..., :16], k, v, plan, softmax_scale=0.3)


def test_plan_made_inside_and_used_twice():
    compiled, counter = counted(two_layers)
    same(compiled, two_layers, batch(0))
    assert counter.frame_count == 1


def test_plan_made_inside_can_be_returned():
    q, k, v, q_hash, k_hash = batch(0)

    def function(q, k, q_hash, k_hash):
        return scfa.make_plan(scfa.HashSparse(q_hash, k_hash), q, k, backend=BACKEND)

    compiled, _ = counted(function)
    plan = compiled(q, k, q_hash, k_hash)
    assert isinstance(plan, scfa.Plan)
    right = function(q, k, q_hash, k_hash)
    assert all(torch.equal(a, b) for a, b in zip(plan.arrays, right.arrays, strict=True))
    assert (plan.monotone, plan.backend, plan.device) == (True, BACKEND, "cpu")
    assert torch.equal(scfa.attention(q, k, v, plan), scfa.attention(q, k, v, right))


def lse_too(q, k, v, q_hash, k_hash):
    pattern = scfa.HashSparse(q_hash, k_hash, causal=False) & scfa.SlidingWindow(4)
    out, lse = scfa.attention(q, k, v, pattern, return_lse=True, backend=BACKEND)
    return out * torch.sigmoid(lse).unsqueeze(-1)


def test_loss_on_lse():
    compiled, _ = counted(lse_too)
    same(compiled, lse_too, batch(0))


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_inductor_keeps_permuted_strides(layout):
    """The default compiler, with views only around the operator so that it has no code to build."""

    def function(q, k, v):
        swapped = [x.transpose(1, 2) for x in (q, k, v)]
        return scfa.attention(*swapped, layout=layout, backend=BACKEND).transpose(1, 2)

    q, k, v, _, _ = batch(0)
    if layout == "bhtd":
        q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v))
    compiled, _ = counted(function, backend="inductor")
    same(compiled, function, (q, k, v))


def test_autocast_inside():
    def function(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return scfa.attention(q, k.bfloat16(), v, backend=BACKEND)

    compiled, _ = counted(function)
    arguments = batch(0)[:3]
    assert compiled(*arguments).dtype is torch.bfloat16
    same(compiled, function, arguments)


def test_backend_is_settled_at_tracing(monkeypatch):
    """Argument, context and environment are read when the function is traced, and kept."""
    seen = []
    from scfa_core import torch_calls

    remembered = torch_calls.run_forward

    def watch(call, *arguments):
        seen.append(call.backend.name)
        return remembered(call, *arguments)

    monkeypatch.setattr("scfa_core.torch_ops.run_forward", watch)

    def function(q, k, v):
        return scfa.attention(q, k, v)

    q, k, v = (x.detach() for x in batch(0)[:3])
    compiled, _ = counted(function)
    with scfa.use_backend("reference"):
        compiled(q, k, v)
    compiled(q, k, v)
    monkeypatch.setenv("SCFA_BACKEND", "reference")
    compiled, _ = counted(function)
    compiled(q, k, v)
    assert seen == ["reference"] * 3


def test_mistakes_keep_their_message():
    """Values and sizes are checked where tensors are real: inside the operator, at run time."""
    q, k, v, q_hash, k_hash = (x.detach() for x in batch(0))
    compiled, _ = counted(with_pattern)
    with pytest.raises(scfa.ShapeError, match=r"HashSparse.q_hash must broadcast to"):
        compiled(q, k, v, scfa.HashSparse(q_hash[:, :3], k_hash))
    with pytest.raises(Exception, match="must be one of"):
        torch.compile(lambda: scfa.attention(q, k, v, backend="cuda"), fullgraph=True)()


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, q_hash, k_hash):
            return everything(q, k, v, q_hash, k_hash)

    arguments = tuple(x.detach() for x in batch(0))
    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    shapes = tuple({2: seqlen} for _ in arguments)
    program = torch.export.export(Layer(), arguments, dynamic_shapes=shapes)
    longer = tuple(x.detach() for x in batch(1, seqlen=21))
    torch.testing.assert_close(program.module()(*longer), everything(*longer))


def test_tensors_are_known_without_the_list_of_modules(monkeypatch):
    """Traced, that list would be walked through whole, and a process may import meanwhile."""
    monkeypatch.delattr(array_kinds, "sys")
    for x in (torch.zeros(2), torch.nn.Parameter(torch.zeros(2)), torch.zeros(2, device="meta")):
        assert array_kinds.is_torch_tensor(x)
    for x in (np.zeros(2), None, torch.float32, [torch.zeros(2)]):
        assert not array_kinds.is_torch_tensor(x)
    function, counter = counted(attention_over_halves)
    x = torch.randn(1, 1, 8, 16)
    right = scfa.attention(x, x, x, scfa.SlidingWindow(8, causal=False), backend=BACKEND)
    torch.testing.assert_close(function(x), right)
    assert counter.frame_count == 1


def attention_over_halves(x):
    halves = x[:, :, :4], x[:, :, 4:]
    everything = scfa.SlidingWindow(8, causal=False)
    parts = [
        scfa.attention(x, half, half, everything, return_lse=True, backend=BACKEND)
        for half in halves
    ]
    return merge_attention(*zip(*parts, strict=True))[0]


def test_patterns_made_of_numbers_that_change():
    """From the second number on a compiler holds a symbol, which has fewer attributes than 3."""

    def run(x, n):
        return scfa.attention(x, x, x, scfa.SlidingWindow(n) & scfa.Causal(lag=n - 1))

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    x = torch.randn(1, 2, 9, 16)
    for n in (2, 3, 5):
        assert torch.equal(compiled(x, n), run(x, n))


def test_one_hash_for_queries_and_keys_is_passed_once():
    """Also traced: q_hash and k_hash that are one tensor reach the planner as one."""
    from scfa_core.torch_patterns import decode, encode

    hashes = torch.randint(0, 3, (1, 2, 30))
    pattern = scfa.HashSparse(hashes, hashes) & scfa.HashSparse(hashes, hashes.clone())
    text, tensors, ints = encode(pattern)
    assert len(tensors) == 2
    again = decode(text, tensors, ints)
    assert [part.q_hash is part.k_hash for part in again.parts] == [True, False]

    q = torch.randn(1, 2, 30, 16)

    def run(q, hashes):
        return scfa.attention(q, q, q, scfa.HashSparse(hashes, hashes, include_self=False))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, hashes), run(q, hashes))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_checkpointing_may_keep_what_operators_return(monkeypatch, keeps, compiled):
    """A policy that names the operators: hashing, planning and attention run once."""
    from scfa_core import torch_bridge, torch_ops
    from scfa_core.nn import HashSelfAttention

    runs = []
    for module in (torch_bridge, torch_ops):
        plain = module.run_forward
        monkeypatch.setattr(module, "run_forward", lambda *a, f=plain: runs.append(1) or f(*a))
    torch.manual_seed(0)
    layer = HashSelfAttention(64, heads=4, buckets=4, seed=0, backend=BACKEND)
    x = torch.randn(2, 20, 64)
    right = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    operators = torch.ops.scfa
    kept = [f.default for f in (operators.angular_hash, operators.make_plan, operators.forward)]
    policy = partial(create_selective_checkpoint_contexts, kept if keeps else [])

    def step(x):
        return checkpoint(layer, x, use_reentrant=False, context_fn=policy)

    if compiled:
        step, _ = counted(step)
    runs.clear()
    mine = torch.autograd.grad(step(x).square().sum(), list(layer.parameters()))
    assert len(runs) == (1 if keeps else 2)
    torch.testing.assert_close(mine, right)
