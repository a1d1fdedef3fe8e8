"""Few queries on many keys: one tile for heads that share keys, and keys shared among blocks."""

import numpy as np
import pytest

import scfa_core as scfa
from scfa_core import testing
from scfa_core.decoding import at_end
from scfa_core.testing import Part, Spec

HASH = (Part("hash", "uniform", 3, causal=False),)
PATTERNS = {
    "hash": HASH,
    "skewed": (Part("hash", "zipf", 5, causal=False),),
    "all differ": (Part("hash", "distinct", causal=False),),
    "keep half": (Part("keep", "uniform", 50, causal=False),),
    "keep none": (Part("keep", "none", causal=False),),
    "ranges": (Part("ranges", "random"),),
    "ranges beyond the keys": (Part("ranges", "outside"),),
    "empty ranges": (Part("ranges", "empty"),),
    "documents": (Part("documents", "uniform", 4, causal=False),),
    "causal": (Part("causal", number=1),),
    "all together": (
        Part("hash", "uniform", 2, causal=False),
        Part("keep", "uniform", 80, causal=False),
        Part("causal", number=1),
    ),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(kernels, call, hold, name, dtype):
    spec = Spec(2, 8, 2, 4, 2300, 64, 64, dtype, parts=PATTERNS[name], poison=True, seed=21)
    case = testing.build(spec)
    hold(case, call(case)[0])


@pytest.mark.parametrize("seqlen_k", [1, 511, 512, 513, 1023, 1024, 1025, 4099, 16_411])
@pytest.mark.parametrize("seqlen_q", [1, 2, 5])
def test_lengths(call, hold, seqlen_q, seqlen_k):
    spec = Spec(1, 6, 2, seqlen_q, seqlen_k, 64, 64, "bfloat16", parts=HASH, seed=22)
    case = testing.build(spec)
    hold(case, call(case)[0])


@pytest.mark.parametrize(("heads", "heads_kv", "seqlen_q"), [(3, 3, 16), (16, 1, 4), (6, 2, 9)])
def test_several_tiles(call, hold, heads, heads_kv, seqlen_q):
    spec = Spec(2, heads, heads_kv, seqlen_q, 1100, 128, 128, "float16", parts=HASH, seed=23)
    case = testing.build(spec)
    hold(case, call(case)[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", range(16, 257, 24))
def test_head_dims(call, hold, head_dim, dtype):
    spec = Spec(1, 4, 2, 3, 1500, head_dim, 272 - head_dim, dtype, parts=HASH, poison=True, seed=24)
    case = testing.build(spec)
    hold(case, call(case)[0])


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize(("strides", "gap"), [("bhtd", 0), ("bthd", 8), ("bhtd", 3)])
def test_strides_and_scales(call, hold, strides, gap, scale):
    spec = Spec(2, 6, 3, 2, 1300, 64, 40, "bfloat16", softmax_scale=scale, parts=HASH, seed=25)
    case = testing.build(spec)
    hold(case, call(case, strides=strides, gap=gap)[0])


def test_the_same_bits_whatever_else_is_in_the_batch(torch, backend):
    """Blocks share chunks in another way, chunks are the same."""
    torch.manual_seed(0)
    q = torch.randn(40, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 40, 2, 9000, 64, device="cuda", dtype=torch.bfloat16)
    hashes = [torch.randint(0, 4, x.shape[:3], device="cuda") for x in (q, k)]

    def run(rows):
        pattern = scfa.HashSparse(*(x[rows] for x in hashes), causal=False)
        return scfa.attention(q[rows], k[rows], v[rows], pattern, return_lse=True, backend=backend)

    whole, one = run(slice(None)), run(slice(7, 8))
    for all_of_them, alone in zip(whole, one, strict=True):
        assert torch.equal(all_of_them[7:8], alone)


def test_row_by_row_is_what_all_rows_at_once_are(torch, backend):
    """Decoding under `at_end`, in a CUDA graph that is replayed on other values."""
    torch.manual_seed(1)
    rows, heads, heads_kv = 1040, 6, 2
    q = torch.randn(1, heads, rows, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, heads_kv, rows, 64, device="cuda", dtype=torch.bfloat16)
    hashes = [torch.randint(0, 3, x.shape[:3], device="cuda") for x in (q, k)]
    for pattern, of_row in (
        (scfa.SlidingWindow(700), lambda row: scfa.SlidingWindow(700)),
        (
            scfa.HashSparse(*hashes),
            lambda row: scfa.HashSparse(hashes[0][..., row : row + 1], hashes[1][..., : row + 1]),
        ),
    ):
        whole = scfa.attention(q, k, v, pattern, backend=backend).double()
        for row in (600, 1039):
            rest = (q[:, :, row : row + 1], k[:, :, : row + 1], v[:, :, : row + 1])
            moved = at_end(of_row(row), *rest[:2])
            call = lambda rest=rest, moved=moved: scfa.attention(  # noqa: E731
                *rest, moved, backend=backend
            )
            call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = call()
            graph.replay()
            gap = (out[:, :, 0].double() - whole[:, :, row]).abs().max()
            assert gap <= 2**-7 * whole[:, :, row].abs().max()


def test_a_key_that_one_head_sees(torch, backend):
    """NaN and infinity reach the heads whose buckets they are in, and no other of the tile."""
    torch.manual_seed(2)
    q = torch.randn(1, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 1, 3000, 64, device="cuda", dtype=torch.bfloat16)
    q_hash = torch.arange(4, device="cuda").view(1, 4, 1)
    k_hash = torch.randint(0, 3, (1, 1, 3000), device="cuda")
    v[0, 0, (k_hash[0, 0] == 0).nonzero()[5]] = float("nan")
    k[0, 0, (k_hash[0, 0] == 1).nonzero()[900]] = float("nan")
    v[0, 0, (k_hash[0, 0] == 2).nonzero()[-1]] = float("inf")
    pattern = scfa.HashSparse(q_hash, k_hash, causal=False)
    out, lse = scfa.attention(q, k, v, pattern, return_lse=True, backend=backend)
    assert out[0, 0].isnan().all()
    assert out[0, 1].isnan().all()
    assert out[0, 2].isposinf().all()
    assert (out[0, 3] == 0).all()
    assert np.isfinite(lse[0, [0, 2], 0].cpu().numpy()).all()
    assert lse[0, 1, 0].isnan()
    assert lse[0, 3, 0] == -float("inf")
