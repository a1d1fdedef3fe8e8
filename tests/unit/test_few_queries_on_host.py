"""The kernels for few queries on fibers (portable_host.py) against the truth."""

import dataclasses

import host_build
import numpy as np
import portable_host
import pytest
from portable_host import Machine
from scfa_core.backends.cupy_raw import few_queries, variants

import scfa_core as scfa
from scfa_core import testing
from scfa_core.problem import Problem
from scfa_core.testing import Case, Part, Results, Spec

pytestmark = host_build.NEEDS_COMPILER
kernels = portable_host.kernels

HASH = (Part("hash", "uniform", 3, causal=False),)
KEEP = (Part("keep", "uniform", 60, causal=False),)
RANGES = (Part("ranges", "random"),)


class Few(Machine):
    """Runs forward as few_queries.py would, for any number of chunks."""

    def __init__(self, kernels, case, splits=None, sharing=None, **how):
        super().__init__(kernels, case, **how)
        self.sharing = sharing  # blocks of a tile
        self.splits = few_queries.chunks(self.problem.seqlen_k) if splits is None else splits
        self.few = few_queries.variant_of(
            self.problem, aligned=self.layout != "unaligned", limit=self.shared_limit
        )
        self.merge = self.few._replace(
            name="scfa_fwd_few_merge",
            source="fwd_few_merge.cu",
            constants=few_queries.merge_constants(self.few),
        )

    def results(self):
        problem = self.problem
        rows = problem.batch * problem.heads * problem.seqlen_q
        outs = host_build.aligned_copy(
            np.full((self.splits, rows, problem.head_dim_v), np.nan, np.float32)
        )
        lses = np.full((self.splits, rows), np.nan, np.float32)
        packed = self.packed()
        packed += few_queries._TAIL.pack(outs.ctypes.data, lses.ctypes.data, self.splits, 0)
        tiles = -(-problem.group_size * problem.seqlen_q // few_queries.ROWS)
        first, second = self.kernels.kernel(self.few), self.kernels.kernel(self.merge)
        blocks = problem.batch * problem.heads_kv * tiles
        left = first.result()(
            packed,
            blocks,
            self.sharing or self.splits,
            self.few.threads,
            self.few.shared_bytes,
            self.order,
        )
        assert left == 0, f"{left} threads end with copies under way"
        if self.splits > 1:
            second.result()(packed, rows, 1, few_queries.MERGE_THREADS, 0, self.order)
        _, _, _, out, lse, *_ = self.arrays
        none = testing.widen(out, self.case.spec.dtype)
        return Results(none, lse, None, None, None)


def check(kernels, case, **how):
    if isinstance(case, Spec):
        case = testing.build(case)
    got = Few(kernels, case, **how).results()
    bad = [v for v in judge(case, got) if not v.ok]
    assert not bad, f"{case.spec}: {bad}"


def judge(case, got):
    """Of out and lse."""
    right = testing.truth(case)
    got = Results(got.out, got.lse, right.dq, right.dk, right.dv)
    return testing.judge(case, got)


@pytest.mark.parametrize("splits", [1, 3, 32])
@pytest.mark.parametrize("parts", [HASH, KEEP, RANGES], ids=["hash", "keep", "ranges"])
def test_patterns(kernels, parts, splits):
    """Rows of a tile that see other keys each, and chunks that some rows see nothing of."""
    spec = Spec(1, 8, 2, 3, 700, 64, 64, "bfloat16", parts=parts, poison=True, seed=1)
    check(kernels, spec, splits=splits)


@pytest.mark.parametrize(
    ("heads", "heads_kv", "seqlen_q"), [(4, 4, 1), (3, 1, 11), (2, 2, 17), (20, 1, 3)]
)
def test_tiles(kernels, heads, heads_kv, seqlen_q):
    """One row, two tiles, a tile that begins within a head."""
    spec = Spec(
        2, heads, heads_kv, seqlen_q, 600, 64, 64, "bfloat16", parts=HASH, poison=True, seed=2
    )
    check(kernels, spec)


@pytest.mark.parametrize("seqlen_k", [1, 63, 64, 65, 127, 128, 129, 257, 1031])
def test_lengths(kernels, seqlen_k):
    spec = Spec(1, 4, 1, 2, seqlen_k, 64, 64, "bfloat16", parts=KEEP, poison=True, seed=3)
    check(kernels, spec, splits=4)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "dtype", "card"),
    [
        *((16, 16, "float16", 90), (72, 24, "bfloat16", 90), (128, 128, "float16", 90)),
        *((128, 40, "bfloat16", 86), (40, 256, "bfloat16", 90), (256, 256, "float16", 86)),
    ],
)
def test_head_dims(kernels, head_dim, head_dim_v, dtype, card):
    spec = Spec(1, 4, 2, 5, 300, head_dim, head_dim_v, dtype, parts=HASH, poison=True, seed=4)
    check(kernels, spec, splits=2, shared_limit=variants.SHARED_LIMITS[card])


@pytest.mark.parametrize("sharing", [1, 2, 7])
def test_blocks_that_take_several_chunks(kernels, sharing):
    """Of which the last ones have no keys, and some rows none of a chunk."""
    spec = Spec(1, 6, 2, 2, 1200, 64, 64, "bfloat16", parts=HASH, poison=True, seed=11)
    check(kernels, spec, splits=16, sharing=sharing)


@pytest.mark.parametrize("layout", ["bthd", "unaligned"])
def test_layouts(kernels, layout):
    spec = Spec(2, 6, 2, 4, 300, 64, 64, "bfloat16", parts=HASH, poison=True, seed=5)
    check(kernels, spec, splits=2, layout=layout)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
def test_scales(kernels, scale):
    spec = Spec(1, 6, 2, 4, 300, 64, 64, "bfloat16", softmax_scale=scale, parts=HASH, seed=6)
    check(kernels, spec, splits=2)


@pytest.mark.parametrize("order", [1, 2])
def test_no_barrier_is_missing(kernels, order):
    spec = Spec(1, 6, 2, 4, 500, 64, 64, "bfloat16", parts=HASH, poison=True, seed=7)
    check(kernels, spec, splits=2, order=order)


def test_scores_that_grow_along_the_keys(kernels):
    """References move in every tile, of each warp and chunk in another way."""
    case = testing.build(Spec(1, 4, 1, 2, 600, 64, 64, "float16", seed=8, softmax_scale=1.0))
    steps = np.linspace(-30, 30, 600).astype(np.float16)[:, None]
    k = np.zeros_like(case.k)
    k[..., 0] = steps[:, 0]
    q = np.zeros_like(case.q)
    q[..., 0] = np.array([1, -1], np.float16)
    ends = scfa.KeyRanges(np.zeros((1, 1, 2), int), np.full((1, 1, 2), 600))
    case = dataclasses.replace(case, q=q, k=k, pattern=ends, mask=np.ones((1, 4, 2, 600), bool))
    check(kernels, case, splits=4)


@pytest.mark.parametrize("splits", [1, 3])
def test_nan_reaches_only_those_who_see_it(kernels, splits):
    """A key that one head of a pack sees, a query of NaN, an infinite value: no other row knows."""
    rng = np.random.default_rng(9)
    spec = Spec(1, 4, 1, 2, 500, 32, 32, "bfloat16", seed=9)
    q_hash, k_hash = rng.integers(3, size=(1, 4, 2)), rng.integers(3, size=(1, 1, 500))
    q_hash[0, :, 0], q_hash[0, :, 1] = [0, 1, 2, 0], [1, 1, 2, 5]
    pattern = scfa.HashSparse(q_hash, k_hash, causal=False)
    built = testing.build(spec)
    case = dataclasses.replace(
        built, pattern=pattern, mask=pattern.mask(2, 500, heads=4, heads_kv=1)
    )
    members = [np.flatnonzero(k_hash[0, 0] == bucket) for bucket in range(3)]
    case.v[0, 0, members[0][7]] = 0x7FC0  # NaN, for the heads 0 and 3
    case.k[0, 0, members[1][90]] = 0x7FC0  # NaN: for row 0 of head 1, row 1 of heads 0 and 1
    case.v[0, 0, members[2][3]] = 0x7F80  # Inf, for head 2
    case.q[0, 1, 1] = 0x7FC0
    got, right = Few(kernels, case, splits=splits).results(), testing.truth(case)
    for name in ("out", "lse"):
        want, have = getattr(right, name), getattr(got, name)
        finite = np.isfinite(want)
        np.testing.assert_array_equal(np.isnan(have), np.isnan(want), name)
        np.testing.assert_allclose(have[finite], want[finite], rtol=0.02, atol=0.02)
    np.testing.assert_array_equal(np.isinf(got.out), np.isinf(right.out))
    assert (got.out[0, 3, 1] == 0).all()
    assert got.lse[0, 3, 1] == -np.inf


def test_what_else_is_in_the_batch_changes_no_bit(kernels):
    both = testing.build(Spec(2, 4, 2, 3, 700, 64, 64, "bfloat16", parts=HASH, seed=10))
    hashes = [getattr(both.pattern, x) for x in ("q_hash", "k_hash")]
    one = Case(
        dataclasses.replace(both.spec, batch=1),
        *(x[1:] for x in (both.q, both.k, both.v, both.dout)),
        scfa.HashSparse(*(x[1:] for x in hashes), causal=both.pattern.causal),
        both.mask[1:],
    )
    whole, alone = (Few(kernels, case, splits=3).results() for case in (both, one))
    np.testing.assert_array_equal(whole.out[1:], alone.out)
    np.testing.assert_array_equal(whole.lse[1:], alone.lse)


@pytest.mark.parametrize(
    ("served", "seqlen_q", "seqlen_k", "heads", "dtype"),
    [
        *((True, 1, 512, 64, "float16"), (True, 16, 4096, 1, "bfloat16")),
        *((True, 16, 4096, 4, "float16"), (False, 9, 4096, 8, "float16")),
        *((False, 1, 511, 8, "float16"), (False, 17, 4096, 1, "bfloat16")),
        *((False, 0, 4096, 8, "float16"), (False, 1, 4096, 8, "float32")),
    ],
)
def test_which_calls(served, seqlen_q, seqlen_k, heads, dtype):
    problem = Problem(1, heads, 1, seqlen_q, seqlen_k, 64, 64, dtype, "cuda:0", 1.0)
    assert few_queries.serves(problem) is served


def test_chunks():
    assert [few_queries.chunks(n) for n in (256, 1023, 1024, 8192, 2**20)] == [1, 1, 2, 16, 32]
