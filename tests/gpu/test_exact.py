"""Every kernel against the float64 truth by the error rule, on memory full of NaN."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from scfa_core import testing
from scfa_core.strategies import specs
from scfa_core.testing import Part, Spec

DTYPES = ("bfloat16", "float16", "float32")
HASH = (Part("hash", "uniform", 5),)
PATTERNS = {
    "causal": (Part("causal", number=0),),
    "bottom-right": (Part("causal", number=1),),
    "far keys": (Part("causal", number=70),),
    "far keys, bottom-right": (Part("causal", number=5),),
    "far keys of a bucket": (Part("causal", number=70), Part("hash", "uniform", 3)),
    "hash": HASH,
    "hash, not causal": (Part("hash", "zipf", 5, causal=False),),
    "one bucket": (Part("hash", "single"),),
    "tiny buckets": (Part("hash", "distinct"),),
    "tile edges": (Part("hash", "tile-edges"),),
    "extreme ids": (Part("hash", "extreme"),),
    "keep half": (Part("keep", "uniform", 50),),
    "keep none": (Part("keep", "none"),),
    "documents": (Part("documents", "uniform", 4),),
    "window": (Part("window", number=70),),
    "ranges": (Part("ranges", "random"),),
    "sorted ranges": (Part("ranges", "sorted"),),
    "ranges beyond the keys": (Part("ranges", "outside"),),
    "all together": (
        Part("hash", "uniform", 3),
        Part("keep", "uniform", 80),
        Part("window", number=90),
    ),
}


def check(call, hold, spec):
    case = testing.build(spec)
    got, _, _ = call(case)
    hold(case, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(kernels, call, hold, name, dtype):
    spec = Spec(1, 4, 2, 270, 200, 64, 64, dtype, parts=PATTERNS[name], poison=True, seed=11)
    check(call, hold, spec)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_of_wide_rows_in_one_pass(call, hold, backend, monkeypatch, name, dtype):
    """The fused backward at head_dim 128, with room for one group of heads at a time."""
    if backend != "cupy":
        pytest.skip("only cupy has a fused backward")
    from scfa_core.backends.cupy_raw import launch_sm90

    monkeypatch.setenv("SCFA_CUPY_BACKWARD", "fused")
    monkeypatch.setattr(launch_sm90, "_sum_slots", lambda problem: problem.group_size)
    spec = Spec(2, 4, 2, 430, 600, 128, 128, dtype, parts=PATTERNS[name], poison=True, seed=13)
    check(call, hold, spec)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [("bfloat16", dim) for dim in range(16, 257, 8)]
    + [("float16", dim) for dim in (16, 40, 64, 96, 128, 192, 256)]
    + [("float32", dim) for dim in (16, 64, 128, 256)],
)
def test_head_dims(kernels, call, hold, head_dim, dtype):
    parts = (Part("hash", "uniform", 3),)
    check(call, hold, Spec(1, 2, 2, 270, 270, head_dim, head_dim, dtype, parts=parts, seed=2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [40, 64, 128, 192, 256])
def test_weights_that_outgrow_what_came_before(call, hold, head_dim, dtype):
    """Maxima of later blocks far above those of the first: sums and outputs shrink on the way."""
    sizes = (1, 5, 1, 1030, 1030, head_dim, head_dim, dtype)
    parts = (Part("causal", number=0),)
    check(call, hold, Spec(*sizes, softmax_scale=4.0, parts=parts, poison=True, seed=6))


@pytest.mark.parametrize("name", ["causal", "window", "keep half", "ranges"])
@pytest.mark.parametrize("head_dim", [16, 32, 40, 80, 96, 112, 192, 256])
def test_rows_narrower_than_their_tiles(call, hold, head_dim, name):
    """Hopper's tiles have 64, 128, 192 or 256 columns; several tiles and grouped heads."""
    sizes = (1, 4, 2, 300, 330, head_dim, head_dim, "bfloat16")
    check(call, hold, Spec(*sizes, parts=PATTERNS[name], poison=True, seed=12))


@pytest.mark.parametrize("style", ["random", "narrow", "reversed"])
@pytest.mark.parametrize(
    ("head_dim", "seqlen_q", "seqlen_k"),
    [(64, 4300, 4200), (96, 700, 500), (128, 4100, 300), (128, 330, 6500), (256, 500, 700)],
)
def test_ranges_in_any_order(call, hold, head_dim, seqlen_q, seqlen_k, style):
    """On Hopper the split kernels, even where "auto" would take the fused one or ask the GPU."""
    sizes = (1, 2, 1, seqlen_q, seqlen_k, head_dim, head_dim, "bfloat16")
    check(call, hold, Spec(*sizes, parts=(Part("ranges", style),), poison=True, seed=14))


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 128), (128, 64), (24, 256), (192, 128)])
def test_values_of_another_width(call, hold, head_dim, head_dim_v):
    spec = Spec(1, 2, 1, 200, 260, head_dim, head_dim_v, "bfloat16", parts=HASH, seed=3)
    check(call, hold, spec)


@pytest.mark.parametrize("seqlen", [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257])
def test_edges_of_tiles(kernels, call, hold, seqlen):
    parts = (Part("causal", number=0),)
    check(call, hold, Spec(1, 1, 1, seqlen, seqlen, 64, 64, "bfloat16", parts=parts, seed=seqlen))
    check(call, hold, Spec(1, 1, 1, 100, seqlen, 128, 128, "float16", parts=HASH, seed=seqlen))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6, 4.0])
def test_scales(call, hold, scale):
    spec = Spec(1, 2, 2, 150, 150, 64, 64, "bfloat16", softmax_scale=scale, parts=HASH, seed=4)
    check(call, hold, spec)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_parts_under_the_merged_lse_add_up(torch, backend, dtype):
    if (backend, dtype) == ("cupy", "float64"):
        pytest.skip("cupy takes no float64")
    import scfa_core as scfa
    from scfa_core.merging import merge_attention

    shape, kind = (4, 2, 3, 300, 64), getattr(torch, dtype)
    q, k, v, dout = torch.randn(shape, device="cuda", dtype=kind)
    parts, options = (scfa.SlidingWindow(9), scfa.Causal(lag=9)), {"backend": backend}
    results = [scfa.attention(q, k, v, x, return_lse=True, **options) for x in parts]
    out, lse = merge_attention(*zip(*results, strict=True))
    grads = [scfa.attention_backward(dout, q, k, v, out, lse, x, **options) for x in parts]
    whole = scfa.attention(q, k, v, return_lse=True, **options)
    right = scfa.attention_backward(dout, q, k, v, *whole, **options)
    for near, far, want in zip(*grads, right, strict=True):
        assert float((near + far - want).abs().max()) < 2e-5 * float(want.abs().max())


@pytest.mark.parametrize(("heads", "heads_kv"), [(8, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_grouped_heads(kernels, call, hold, heads, heads_kv, dtype):
    check(call, hold, Spec(2, heads, heads_kv, 190, 210, 64, 64, dtype, parts=HASH, seed=5))


@pytest.mark.parametrize("strides", ["bhtd", "bthd"])
@pytest.mark.parametrize("gap", [0, 8, 1], ids=["dense", "sliced", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(call, hold, strides, gap, dtype):
    case = testing.build(Spec(2, 3, 1, 130, 140, 64, 64, dtype, parts=HASH, seed=6, poison=True))
    got, _, _ = call(case, strides=strides, gap=gap)
    hold(case, got)


def test_large_scores(call, hold):
    """Scores of thousands leave finite results; what infinities do: test_faults_cuda.py."""
    case = testing.build(Spec(1, 1, 1, 140, 140, 64, 64, "float32", parts=HASH, seed=7))
    case.q[...] *= 300.0
    got, _, _ = call(case)
    assert np.isfinite(got.out).all()
    assert np.isfinite(got.lse[case.mask.any(-1)]).all()


@pytest.mark.parametrize("seed", range(40))
def test_random_problems(kernels, call, hold, seed):
    options = {"most_rows": 200, "dtypes": DTYPES, "head_dims": (16, 64, 128)}
    check(call, hold, testing.random_spec(seed, **options))


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(spec=specs(most_rows=200, dtypes=DTYPES, head_dims=(16, 64, 128)))
def test_problems_of_hypothesis(kernels, call, hold, arena, spec):
    """Those shrink to the smallest that fails; `scfa verify` draws many more from seeds."""
    arena.held.clear()
    arena.rooms.clear()
    case = testing.build(spec)
    got, _, _ = call(case, strides=spec.layout)
    hold(case, got)


def test_not_deterministic_is_as_exact(kernels, call, hold):
    case = testing.build(Spec(2, 4, 2, 300, 300, 64, 64, "bfloat16", parts=HASH, seed=8))
    got, _, _ = call(case, deterministic=False)
    hold(case, got)


# torch's autograd thread starts without a CUDA context and says so
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_thousands_of_rows_against_torch_on_the_card(
    kernels, torch, backend, request, head_dim, dtype
):
    """The rule at its word: twice the error of torch's own evaluation in the same dtype."""
    import scfa_core as scfa

    generator = torch.Generator("cuda").manual_seed(head_dim)
    kind = getattr(torch, dtype)
    shape = (1, 4, 2500, head_dim)

    def draw():
        return torch.randn(shape, device="cuda", generator=generator).to(kind)

    q, k, v, dout = draw(), draw(), draw(), draw()
    q_hash, k_hash = (
        torch.randint(0, 4, shape[:3], device="cuda", generator=generator) for _ in range(2)
    )
    row = torch.arange(2500, device="cuda")
    mask = (q_hash[..., :, None] == k_hash[..., None, :]) & (row[:, None] >= row[None, :])
    blind = ~mask.any(-1, keepdim=True)

    def formula(wide):
        x, y, z = (t.to(wide).requires_grad_() for t in (q, k, v))
        scores = (x @ y.transpose(-1, -2)) * head_dim**-0.5
        scores = scores.masked_fill(~mask, float("-inf")).masked_fill(blind, 0.0)
        out = torch.softmax(scores, -1).masked_fill(blind, 0.0) @ z
        return (out.detach(), *torch.autograd.grad(out, (x, y, z), dout.to(wide)))

    truth, plain = formula(torch.float64), formula(kind)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = scfa.attention(*leaves, scfa.HashSparse(q_hash, k_hash), backend=backend)
    mine = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    for name, got, other, true in zip(("out", "dq", "dk", "dv"), mine, plain, truth, strict=True):
        error, allowed = (got.double() - true).abs(), (other.double() - true).abs()
        worst = max(
            float(error.max() / (2 * allowed.max())), float(error.norm() / (2 * allowed.norm()))
        )
        request.node.user_properties.append(("ratio", (f"torch {dtype}/{name}", worst)))
        assert worst <= 1.0, name
