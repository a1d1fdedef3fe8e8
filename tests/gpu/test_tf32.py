"""$SCFA_CUPY_FP32=tf32: float32 by tensor cores, as exact as torch's attention in TF32."""

import pytest
from gpu_calls import everything, inputs

import scfa_core as scfa
from scfa_core import testing
from scfa_core.testing import Part, Spec

HASH = (Part("hash", "uniform", 5),)
PATTERNS = {
    "causal": (Part("causal", number=0),),
    "far keys": (Part("causal", number=70),),
    "hash": HASH,
    "one bucket": (Part("hash", "single"),),
    "tile edges": (Part("hash", "tile-edges"),),
    "keep half": (Part("keep", "uniform", 50),),
    "keep none": (Part("keep", "none"),),
    "documents": (Part("documents", "uniform", 4),),
    "window": (Part("window", number=70),),
    "ranges": (Part("ranges", "random"),),
    "ranges beyond the keys": (Part("ranges", "outside"),),
}
DTYPE = "float32"


@pytest.fixture(autouse=True)
def tf32(backend, monkeypatch):
    if backend != "cupy":
        pytest.skip("only cupy multiplies float32 as TF32")
    monkeypatch.setenv("SCFA_CUPY_FP32", "tf32")


def check(call, hold, spec, **how):
    case = testing.build(spec)
    got, _, _ = call(case, **how)
    hold(case, got, tf32=True)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(call, hold, name, head_dim):
    sizes = (1, 4, 2, 270, 200, head_dim, head_dim, DTYPE)
    check(call, hold, Spec(*sizes, parts=PATTERNS[name], poison=True, seed=11))


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(16, 16), (24, 24), (64, 128), (80, 80), (128, 16)]
)
def test_head_dims(call, hold, head_dim, head_dim_v):
    spec = Spec(1, 2, 2, 270, 270, head_dim, head_dim_v, DTYPE, parts=HASH, seed=2)
    check(call, hold, spec)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen", [1, 2, 63, 64, 65, 127, 128, 129, 257])
def test_edges_of_tiles(call, hold, seqlen, head_dim):
    parts = (Part("causal", number=0),)
    sizes = (1, 1, 1, seqlen, seqlen, head_dim, head_dim, DTYPE)
    check(call, hold, Spec(*sizes, parts=parts, seed=seqlen))


@pytest.mark.parametrize(("heads", "heads_kv"), [(8, 1), (6, 2)])
def test_grouped_heads(call, hold, heads, heads_kv):
    check(call, hold, Spec(2, heads, heads_kv, 190, 210, 64, 64, DTYPE, parts=HASH, seed=5))


@pytest.mark.parametrize("scale", [0.0, -0.3, 4.0])
def test_scales(call, hold, scale):
    spec = Spec(1, 2, 2, 150, 150, 64, 64, DTYPE, softmax_scale=scale, parts=HASH, seed=4)
    check(call, hold, spec)


@pytest.mark.parametrize("strides", ["bhtd", "bthd"])
@pytest.mark.parametrize("gap", [0, 8, 1], ids=["dense", "sliced", "unaligned"])
def test_strides(call, hold, strides, gap):
    spec = Spec(2, 3, 1, 130, 140, 64, 64, DTYPE, parts=HASH, seed=6, poison=True)
    check(call, hold, spec, strides=strides, gap=gap)


@pytest.mark.parametrize("seed", range(30))
def test_random_problems(call, hold, seed):
    check(call, hold, testing.random_spec(seed, most_rows=200, head_dims=(16, 64, 128)))


def draw(torch, shape, heads_kv=None):
    return inputs(torch, shape, heads_kv, torch.float32)


def same(torch, left, right):
    return [torch.equal(x, y) for x, y in zip(left, right, strict=True)]


# torch's autograd thread starts without a CUDA context and says so
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_thousands_of_rows_against_torch_on_the_card(torch, backend, request, head_dim):
    """The rule at its word: twice the error of torch's own evaluation with TF32 products."""
    rows = 2500
    (q, k, v, dout), (q_hash, k_hash) = draw(torch, (1, 4, rows, head_dim))
    row = torch.arange(rows, device="cuda")
    mask = (q_hash[..., :, None] == k_hash[..., None, :]) & (row[:, None] >= row[None, :])
    blind = ~mask.any(-1, keepdim=True)

    def formula(wide, products):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(products)
        try:
            x, y, z = (t.to(wide).requires_grad_() for t in (q, k, v))
            scores = (x @ y.transpose(-1, -2)) * head_dim**-0.5
            scores = scores.masked_fill(~mask, float("-inf")).masked_fill(blind, 0.0)
            out = torch.softmax(scores, -1).masked_fill(blind, 0.0) @ z
            return (out.detach(), *torch.autograd.grad(out, (x, y, z), dout.to(wide)))
        finally:
            torch.set_float32_matmul_precision(before)

    truth, plain = formula(torch.float64, "highest"), formula(torch.float32, "high")
    exact = formula(torch.float32, "highest")
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = scfa.attention(*leaves, scfa.HashSparse(q_hash, k_hash), backend=backend)
    mine = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    names = ("out", "dq", "dk", "dv")
    for name, got, other, fine, true in zip(names, mine, plain, exact, truth, strict=True):
        error, allowed = (got.double() - true).abs(), (other.double() - true).abs()
        assert allowed.norm() > 20 * (fine.double() - true).norm(), "torch did not take TF32"
        worst = max(
            float(error.max() / (2 * allowed.max())), float(error.norm() / (2 * allowed.norm()))
        )
        request.node.user_properties.append(("ratio", (f"torch TF32/{name}", worst)))
        assert worst <= 1.0, name


@pytest.mark.parametrize("head_dim", [64, 128])
def test_same_bits_every_time(torch, backend, head_dim):
    tensors, hashes = draw(torch, (2, 8, 1500, head_dim), heads_kv=2)
    pattern = scfa.HashSparse(*hashes)
    first = everything(backend, tensors, pattern)
    for _ in range(50):
        assert all(same(torch, first, everything(backend, tensors, pattern)))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_default_is_exact_and_stays_what_it_was(torch, backend, monkeypatch, head_dim):
    """The switch is read at every call, and leaves no trace in calls without it."""
    tensors, hashes = draw(torch, (1, 4, 700, head_dim), heads_kv=2)
    pattern = scfa.HashSparse(*hashes)
    found = {}
    for asked in ("tf32", None, "exact", "tf32 again", "exact again"):
        if asked is None:
            monkeypatch.delenv("SCFA_CUPY_FP32")
        else:
            monkeypatch.setenv("SCFA_CUPY_FP32", asked.removesuffix(" again"))
        found[asked] = everything(backend, tensors, pattern)
    for asked in ("exact", "exact again"):
        assert all(same(torch, found[None], found[asked]))
    assert all(same(torch, found["tf32"], found["tf32 again"]))
    assert not any(same(torch, found["tf32"], found["exact"]))


@pytest.mark.parametrize(("head_dim", "dtype"), [(256, "float32"), (64, "bfloat16")])
def test_wider_heads_and_other_types_do_not_look(torch, backend, monkeypatch, head_dim, dtype):
    tensors, hashes = inputs(torch, (1, 2, 300, head_dim), dtype=getattr(torch, dtype))
    pattern = scfa.HashSparse(*hashes)
    asked = everything(backend, tensors, pattern)
    monkeypatch.delenv("SCFA_CUPY_FP32")
    assert all(same(torch, asked, everything(backend, tensors, pattern)))


def test_another_value_is_refused_and_survived(torch, backend, monkeypatch):
    tensors, hashes = draw(torch, (1, 2, 300, 64))
    pattern = scfa.HashSparse(*hashes)
    right = everything(backend, tensors, pattern)
    monkeypatch.setenv("SCFA_CUPY_FP32", "fast")
    for _ in range(2):
        with pytest.raises(scfa.BackendUnavailable, match=r"SCFA_CUPY_FP32 must .* got 'fast'"):
            everything(backend, tensors, pattern)
    monkeypatch.setenv("SCFA_CUPY_FP32", "tf32")
    assert all(same(torch, right, everything(backend, tensors, pattern)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its compiler imports torch.jit
def test_a_compiled_model_is_asked_anew(torch, backend, monkeypatch):
    """The switch is no part of what torch.compile traces: nothing compiles again."""
    torch._dynamo.reset()
    (q, k, v, _), (q_hash, k_hash) = draw(torch, (1, 2, 300, 64))

    def attend(q, k, v, q_hash, k_hash):
        return scfa.attention(q, k, v, scfa.HashSparse(q_hash, k_hash), backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    arguments = (q, k, v, q_hash, k_hash)
    results = {}
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for asked in ("tf32", "exact", "tf32"):
            monkeypatch.setenv("SCFA_CUPY_FP32", asked)
            results[asked] = compiled(*arguments)
            assert torch.equal(results[asked], attend(*arguments))
    assert not torch.equal(results["tf32"], results["exact"])


def test_a_captured_graph_keeps_what_it_was_captured_with(torch, backend, monkeypatch):
    tensors, hashes = draw(torch, (1, 2, 300, 64))
    pattern = scfa.HashSparse(*hashes)
    right = everything(backend, tensors, pattern)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(backend, tensors, pattern)
    monkeypatch.setenv("SCFA_CUPY_FP32", "exact")
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(same(torch, right, captured))
