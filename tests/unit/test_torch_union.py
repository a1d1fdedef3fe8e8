"""Attention over disjoint patterns under tracing: one forward and one backward call a part."""

import io
from functools import partial

import pytest
import watched_verbs

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

from torch import library  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils.checkpoint import (  # noqa: E402
    checkpoint,
    create_selective_checkpoint_contexts,
)

import scfa_core as scfa  # noqa: E402
from scfa_core.merging import attention_over, merge_attention  # noqa: E402
from scfa_core.torch_union_ops import (  # noqa: E402
    ATTEND_UNION,
    ATTEND_UNION_BACKWARD,
    add_gradients,
    merge_in_place,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]
BACKEND = "numba-cpu"
runs = watched_verbs.runs
WINDOW = 5
HASHES = torch.randint(0, 3, (2, 2, 64), generator=torch.Generator().manual_seed(7))


def tensors(layout="bhtd", seqlen=23, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seqlen)
    shapes = ((2, 4, seqlen, 16), (2, 2, seqlen, 16), (2, 2, seqlen, 24))
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    swapped = [x.transpose(1, 2).contiguous() if layout == "bthd" else x for x in made]
    return [x.requires_grad_() for x in swapped]


def near_and_far(seqlen, parts=2):
    """The window; the keys of a bucket before it; a third part that no query sees."""
    k_hash = HASHES[..., :seqlen]
    q_hash = k_hash.repeat_interleave(2, 1)
    far = scfa.HashSparse(q_hash, k_hash) & scfa.Causal(lag=WINDOW)
    nothing = scfa.Causal(lag=64)
    return [scfa.SlidingWindow(WINDOW), far, nothing][:parts]


def attend(q, k, v, layout="bhtd", parts=2, **options):
    patterns = near_and_far(q.shape[1 if layout == "bthd" else 2], parts)
    return attention_over(q, k, v, patterns, layout=layout, backend=BACKEND, **options)


def gradients(function, inputs):
    return torch.autograd.grad(function(*inputs).float().square().sum(), inputs)


def compiled(function, backend="aot_eager", dynamic=None):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic), counter


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_compiled_equals_eager_at_one_call_a_part(runs, layout, parts):
    function = partial(attend, layout=layout, parts=parts, softmax_scale=0.3)
    inputs = tensors(layout)
    right, right_grads = function(*inputs), gradients(function, inputs)
    whole, counter = compiled(lambda *x: function(*x))
    out = whole(*inputs)
    runs.clear()
    grads = gradients(whole, inputs)
    assert runs == ["forward"] * parts + ["backward"] * parts
    assert counter.frame_count == 1
    for mine, true in zip((out, *grads), (right, *right_grads), strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-6)
        assert mine.stride() == true.stride()


def test_compiled_equals_attention_at_once():
    """A truth that no union has a part in."""
    q, k, v = tensors()
    k_hash = HASHES[..., :23].repeat_interleave(2, 1)
    near = torch.ones(23, 23).tril() - torch.ones(23, 23).tril(-WINDOW)
    same = k_hash[..., :, None] == k_hash[..., None, :]
    mask = near.bool() | (same & torch.ones(23, 23).tril(-WINDOW).bool())

    def dense(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    whole, _ = compiled(attend)
    torch.testing.assert_close(whole(q, k, v), dense(q, k, v), rtol=0, atol=2e-6)
    mine, right = gradients(whole, (q, k, v)), gradients(dense, (q, k, v))
    torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)


def test_lengths_can_be_dynamic():
    whole, counter = compiled(attend, dynamic=True)
    for seqlen in (23, 40, 11):
        inputs = tensors(seqlen=seqlen)
        torch.testing.assert_close(gradients(whole, inputs), gradients(attend, inputs))
    assert counter.frame_count == 1


def test_gradients_through_lse_take_the_other_way(runs):
    def function(q, k, v):
        out, lse = attend(q, k, v, return_lse=True)
        return out * lse.sigmoid().unsqueeze(-1)

    inputs = tensors()
    whole, _ = compiled(function)
    torch.testing.assert_close(gradients(whole, inputs), gradients(function, inputs))
    with torch.no_grad():
        runs.clear()
        out, lse = compiled(partial(attend, return_lse=True))[0](*inputs)
    assert runs == ["forward"] * 2
    right, right_lse = attend(*inputs, return_lse=True)
    torch.testing.assert_close((out, lse), (right, right_lse), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_backends_that_compute_lse_anew_take_the_other_way(dtype):
    backend = BACKEND if dtype == torch.float64 else "reference"

    def function(q, k, v):
        return attention_over(q, k, v, near_and_far(23), backend=backend)

    inputs = tensors(dtype=dtype)
    whole, _ = compiled(function)
    mine = gradients(whole, inputs)
    torch.testing.assert_close(mine, gradients(function, inputs))
    graph = make_fx(function)(*(x.detach() for x in inputs)).graph
    names = {str(node.target) for node in graph.nodes}
    assert "scfa.forward.default" in names
    assert "scfa.attend_union.default" not in names


def test_autocast():
    def function(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return attend(q, k, v)

    inputs = tensors()
    whole, _ = compiled(function)
    assert whole(*inputs).dtype is torch.bfloat16
    mine = gradients(whole, inputs)
    assert {x.dtype for x in mine} == {torch.float32}
    torch.testing.assert_close(mine, gradients(function, inputs))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_checkpointing(runs, keeps, traced):
    """Parts run again, or not where a policy keeps what the operator returns."""
    operators = [ATTEND_UNION, torch.ops.scfa.make_plan.default]
    policy = partial(create_selective_checkpoint_contexts, operators if keeps else [])

    def step(q, k, v):
        return checkpoint(attend, q, k, v, use_reentrant=False, context_fn=policy)

    inputs = tensors()
    right = gradients(attend, inputs)
    step = compiled(step)[0] if traced else step
    runs.clear()
    mine = gradients(step, inputs)
    assert runs == ["forward"] * (2 if keeps else 4) + ["backward"] * 2
    torch.testing.assert_close(mine, right)


def test_plans_passed_in_and_changed():
    q, k, v = tensors()
    plans = [scfa.make_plan(p, q, k, backend=BACKEND) for p in near_and_far(23)]

    def function(q, k, v, plans):
        return attention_over(q, k, v, plans)

    whole, counter = compiled(function)
    mine = gradients(lambda *x: whole(*x, plans), (q, k, v))
    torch.testing.assert_close(mine, gradients(attend, (q, k, v)))
    for run, error in ((function, scfa.GradientError), (whole, RuntimeError)):
        out = run(q, k, v, plans)
        plans[1].key_end.add_(0)
        with pytest.raises(error, match=r"in.?place"):
            out.sum().backward()
    assert counter.frame_count == 1


def test_plans_of_several_backends():
    """Each part is run by the backend that made its plan."""
    q, k, v = tensors()
    near, far = near_and_far(23)
    plans = [
        scfa.make_plan(near, q, k, backend=BACKEND),
        scfa.make_plan(far, q, k, backend="reference"),
    ]
    whole, _ = compiled(lambda q, k, v: attention_over(q, k, v, plans))
    mine = gradients(whole, (q, k, v))
    torch.testing.assert_close(mine, gradients(attend, (q, k, v)), rtol=0, atol=1e-5)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, q, k, v, q_hash, k_hash):
        far = scfa.HashSparse(q_hash, k_hash) & scfa.Causal(lag=WINDOW)
        parts = [scfa.SlidingWindow(WINDOW), far]
        return attention_over(q * self.scale, k, v, parts, backend=BACKEND)


def example(seqlen):
    k_hash = HASHES[..., :seqlen]
    inputs = [x.detach() for x in tensors(seqlen=seqlen)]
    return (*inputs, k_hash.repeat_interleave(2, 1), k_hash.clone())


def test_export_and_training_of_what_was_stored(runs):
    layer = Layer()
    sizes = tuple({2: torch.export.Dim("seqlen", min=2, max=64)} for _ in range(5))
    program = torch.export.export(layer, example(23), dynamic_shapes=sizes)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("scfa.attend_union.default") == 1
    assert "scfa.forward.default" not in names
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    inputs = example(40)
    out, right = loaded(*inputs), layer(*inputs)
    torch.testing.assert_close(out, right, rtol=0, atol=1e-6)
    runs.clear()
    out.square().sum().backward()
    assert runs == ["backward"] * 2
    right.square().sum().backward()
    torch.testing.assert_close(loaded.scale.grad, layer.scale.grad)


def operator_arguments(layout, sinks=None):
    inputs = tensors(layout)
    how = {"layout": layout, "backend": BACKEND}
    plans = [scfa.make_plan(p, *inputs[:2], **how) for p in near_and_far(23)]
    arrays = [x for plan in plans for x in plan.arrays]
    return (*inputs, sinks, arrays, [int(p.monotone) for p in plans], None, True, layout, BACKEND)


@pytest.mark.parametrize("sinks", [None, torch.zeros(4, requires_grad=True)])
@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_opcheck(layout, sinks):
    arguments = operator_arguments(layout, sinks)
    library.opcheck(ATTEND_UNION, arguments)
    out, lse = ATTEND_UNION(*arguments)
    assert out.requires_grad
    assert not lse.requires_grad
    saved = [x.detach() for x in (*arguments[:3], out, lse)]
    library.opcheck(ATTEND_UNION_BACKWARD, (torch.ones_like(out), *saved, *arguments[4:]))


def by_operator(q, k, v):
    return ATTEND_UNION(q, k, v, *operator_arguments("bhtd")[3:])[0]


@pytest.mark.parametrize("function", [attend, by_operator])
def test_there_are_no_second_derivatives(function):
    inputs = tensors()
    grads = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
    with pytest.raises(scfa.GradientError, match="first derivatives only"):
        grads[0].sum().backward()


def test_operators_refuse_what_does_not_fit():
    q, k, v, sinks, arrays, *rest = operator_arguments("bhtd")
    with pytest.raises(scfa.ShapeError, match="k_index must have shape"):
        ATTEND_UNION(q, k, v, sinks, [*arrays[:9], arrays[9][:, :1], *arrays[10:]], *rest)
    out, lse = (x.detach() for x in ATTEND_UNION(q, k, v, sinks, arrays, *rest))
    with pytest.raises(scfa.ShapeError, match="dout must have shape"):
        ATTEND_UNION_BACKWARD(out[:, :1], q, k, v, out, lse, arrays, *rest)


def test_functorch():
    """`torch.func` around plain calls, and inside compiled functions."""
    inputs = [x.detach() for x in tensors()]

    def loss(*x):
        return attend(*x).square().sum()

    right = gradients(attend, [x.requires_grad_() for x in tensors()])
    by_grad = torch.func.grad(loss, argnums=(0, 1, 2))
    torch.testing.assert_close(by_grad(*inputs), right, rtol=0, atol=1e-5)
    stacked = [torch.stack([x, -x]) for x in inputs]
    each = torch.func.vmap(attend)(*stacked)
    torch.testing.assert_close(each[0], attend(*inputs), rtol=0, atol=1e-6)


def test_vmap_rule():
    q, k, v, *rest = operator_arguments("bhtd")
    q, k, v = (x.detach() for x in (q, k, v))
    out, _ = torch.func.vmap(lambda x: ATTEND_UNION(x, k, v, *rest))(torch.stack([q, 2 * q]))
    for mine, true in zip(out, (q, 2 * q), strict=True):
        torch.testing.assert_close(mine, ATTEND_UNION(true, k, v, *rest)[0])


def test_the_profiler_sees_one_operator_a_call():
    inputs = [x.detach() for x in tensors()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(*inputs)
    assert [e.name for e in profile.events()].count("scfa::attend_union") == 1


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_merging_in_place_rounds_as_merging_does(dtype, parts, layout):
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(parts, 2, 3, 5, 8, generator=generator).to(dtype)
    lses = 9 * torch.randn(parts, 2, 3, 5, generator=generator)
    lses[0, 0, 0] = lses[:, 1, 2, 3] = -torch.inf
    outs[lses.isneginf()] = 0
    if layout == "bthd":
        outs = outs.transpose(2, 3).contiguous()
    right, right_lse = merge_attention(list(outs), list(lses), layout=layout)
    mine = [x.clone() for x in outs]
    out, lse = merge_in_place(mine, list(lses), layout == "bthd")
    assert out is mine[0]
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(out, right, rtol=bound, atol=1e-6)
    torch.testing.assert_close(lse, right_lse)


def test_narrow_gradients_are_rounded_once():
    generator = torch.Generator().manual_seed(0)
    for parts in (1, 2, 5):
        grads = torch.randn(parts, 3, 200, generator=generator).bfloat16()
        right = grads.float().sum(0).bfloat16()
        mine = add_gradients((tuple(x.clone()) for x in grads), parts)
        torch.testing.assert_close(torch.stack(mine), right, rtol=2**-8, atol=0)
        assert (torch.stack(mine) == right).float().mean() > 0.99


class Attending(torch.nn.Module):
    """A module, as torch.jit.trace and a saved program have it."""

    def __init__(self, patterns, **options):
        super().__init__()
        self.patterns, self.options = patterns, options

    def forward(self, q, k, v):
        return attention_over(q, k, v, self.patterns(q, k), backend=BACKEND, **self.options)


def by_sign(q, k):
    """Hashes of what is given: ranges of any order and others, made while tracing."""
    bucket = [(x[..., 0] > 0).long() for x in (q, k)]
    rows = torch.arange(q.shape[2], device=q.device).view(1, 1, -1)
    near = scfa.KeyRanges(rows - 2, rows + 1)
    return [near, scfa.HashSparse(*bucket) & scfa.Causal(lag=3)]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("wants_lse", [False, True])
def test_jit_trace_keeps_all_parts(wants_lse):
    """The program, after saving and loading too, gives the values and gradients of eager calls."""
    module = Attending(by_sign, return_lse=wants_lse)
    inputs, others = tensors(), [x.detach().flip(2).requires_grad_() for x in tensors()]
    with torch.no_grad():
        traced = torch.jit.trace(module, tuple(inputs))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for program in (traced, torch.jit.load(file)):
        for given in (inputs, others):
            got, right = program(*given), module(*given)
            got, right = (got, right) if wants_lse else ((got,), (right,))
            torch.testing.assert_close(got, right, rtol=0, atol=1e-6)
            both = [torch.autograd.grad(x[0].square().sum(), given) for x in (got, right)]
            torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)
    assert str(traced.inlined_graph).count("scfa::attend_union") == 1
