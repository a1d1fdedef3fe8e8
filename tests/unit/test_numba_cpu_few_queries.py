"""Few queries of heads that share keys: one tile of numba-cpu takes them all."""

import numpy as np
import pytest
from scfa_core.backends.numba_cpu import launch

import scfa_core as scfa
from scfa_core import testing
from scfa_core.testing import Part, Spec

HASH = (Part("hash", "uniform", 3, causal=False),)
PATTERNS = {
    "hash": HASH,
    "keep": (Part("keep", "uniform", 60, causal=False),),
    "keep none": (Part("keep", "none", causal=False),),
    "ranges": (Part("ranges", "random"),),
    "causal": (Part("causal", number=1),),
}


@pytest.fixture
def packs(monkeypatch):
    """How many calls were packed."""
    found = []
    packed = launch._forward_of_packs

    def noted(problem, *arguments):
        found.append(problem.group_size * problem.seqlen_q)
        packed(problem, *arguments)

    monkeypatch.setattr(launch, "_forward_of_packs", noted)
    return found


def check(spec):
    case = testing.build(spec)
    got, _ = testing.run_numpy(case, "numba-cpu")
    bad = [v for v in testing.judge(case, got) if not v.ok]
    assert not bad, f"{spec}: {bad}"


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(packs, name, dtype, layout):
    parts = PATTERNS[name]
    check(Spec(2, 8, 2, 3, 300, 32, 40, dtype, layout, parts=parts, poison=True, seed=31))
    assert packs == [12]


@pytest.mark.parametrize(
    ("heads", "heads_kv", "seqlen_q", "packed"),
    [(8, 1, 8, True), (8, 1, 9, False), (4, 4, 1, False), (64, 1, 1, True), (6, 2, 0, False)],
)
def test_which_calls(packs, heads, heads_kv, seqlen_q, packed):
    check(Spec(1, heads, heads_kv, seqlen_q, 130, 16, 16, "float32", parts=HASH, seed=32))
    assert bool(packs) is packed


@pytest.mark.parametrize("gap", [0, 3])
def test_results_in_memory_of_the_caller(packs, gap):
    """Rows of one head and heads of one sequence that are no one axis, and a window of a cache."""
    rng = np.random.default_rng(33)
    q = rng.standard_normal((2, 6, 2 + gap, 16), np.float32)[:, :, :2]
    k, v = rng.standard_normal((2, 2, 3, 400, 16), np.float32)[:, :, :, 50:350]
    pattern = scfa.Causal(align="bottom-right")
    out, lse = scfa.attention(q, k, v, pattern, return_lse=True, backend="numba-cpu")
    want, want_lse = scfa.attention(q, k, v, pattern, return_lse=True, backend="reference")
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    assert packs == [4]


def test_heads_after_rows_in_memory(packs):
    """(batch, rows, heads, head_dim): of several rows results are copied to where they belong."""
    rng = np.random.default_rng(36)
    q = rng.standard_normal((2, 3, 6, 16), np.float32)
    k, v = rng.standard_normal((2, 2, 300, 2, 16), np.float32)
    hashes = [rng.integers(3, size=(2, n, m)) for n, m in ((6, 3), (2, 300))]
    pattern = scfa.HashSparse(*hashes, causal=False)
    options = {"layout": "bthd", "return_lse": True}
    out, lse = scfa.attention(q, k, v, pattern, backend="numba-cpu", **options)
    want, want_lse = scfa.attention(q, k, v, pattern, backend="reference", **options)
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    assert packs == [9]


def test_what_no_head_of_the_pack_sees_or_another_one_does(packs):
    """NaN reaches the head in whose bucket it is."""
    rng = np.random.default_rng(34)
    q, k, v = (
        rng.standard_normal((1, n, m, 16), np.float32) for n, m in ((3, 1), (1, 500), (1, 500))
    )
    k_hash = rng.integers(4, size=(1, 1, 500))
    v[0, 0, np.flatnonzero(k_hash[0, 0] == 1)[40]] = np.nan
    k[0, 0, np.flatnonzero(k_hash[0, 0] == 3)] = np.nan
    pattern = scfa.HashSparse(np.array([[[0], [1], [2]]]), k_hash, causal=False)
    out, lse = scfa.attention(q, k, v, pattern, return_lse=True, backend="numba-cpu")
    assert np.isfinite(lse).all()
    assert np.isfinite(out[0, [0, 2]]).all()
    assert np.isnan(out[0, 1]).all()
    assert packs == [3]


def test_what_else_is_in_the_batch_changes_no_bit():
    rng = np.random.default_rng(35)
    q, k, v = (
        rng.standard_normal((3, n, m, 32), np.float32) for n, m in ((8, 1), (2, 700), (2, 700))
    )
    hashes = [rng.integers(5, size=x.shape[:3]) for x in (q, k)]

    def run(rows):
        pattern = scfa.HashSparse(*(x[rows] for x in hashes), causal=False)
        return scfa.attention(q[rows], k[rows], v[rows], pattern, backend="numba-cpu")

    np.testing.assert_array_equal(run(slice(None))[1:2], run(slice(1, 2)))
