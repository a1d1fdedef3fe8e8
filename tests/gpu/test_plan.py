"""The device planner equals the reference planner, entry by entry."""

import dataclasses

import numpy as np
import pytest
from scfa_core.reference.planner import plan_lists

import scfa_core as scfa
from scfa_core import testing
from scfa_core.array_kinds import framework_of
from scfa_core.dispatch import load_backend
from scfa_core.lowering import Clauses, lower
from scfa_core.plan import PlanArrays, plan_shapes
from scfa_core.problem import Problem

NAMES = PlanArrays._fields[:6]


def repeated(x, copies):
    """`x` as often along the batch, in memory of its own."""
    return np.ascontiguousarray(np.concatenate([x] * copies))


@pytest.fixture
def equal(torch, backend):
    """Plan NumPy clauses on the card and compare with the reference, over a batch of copies."""
    from scfa_core.torch_framework import TORCH_FRAMEWORK

    def native(x):
        return TORCH_FRAMEWORK.native(x, "cuda")

    def equal(problem, clauses, copies=1):
        sizes = (problem.batch, problem.heads, problem.heads_kv, problem.seqlen_q, problem.seqlen_k)
        right = plan_lists(clauses, *sizes)
        problem = dataclasses.replace(problem, batch=copies * problem.batch)
        moved = [torch.from_numpy(repeated(x, copies)).cuda() for x in clauses.arrays]
        on_card = clauses.with_arrays(map(native, moved))
        arrays = [
            torch.full(shape, -7, dtype=torch.int32, device="cuda")
            for shape in plan_shapes(problem, "cuda")
        ]
        plan = PlanArrays(*map(native, arrays), clauses.monotone)
        load_backend(backend).make_plan(problem, on_card, plan, TORCH_FRAMEWORK.context("cuda:0"))
        for name, got, want in zip(NAMES, arrays, right, strict=False):
            np.testing.assert_array_equal(got.cpu().numpy(), repeated(want, copies), err_msg=name)

    return equal


def problem_of(batch, heads, heads_kv, seqlen_q, seqlen_k):
    return Problem(batch, heads, heads_kv, seqlen_q, seqlen_k, 64, 64, "bfloat16", "cuda:0", 1.0)


def random_groups(rng, problem, number, dtype=np.int32):
    q_shape = (problem.batch, problem.heads, problem.seqlen_q)
    k_shape = (problem.batch, problem.heads_kv, problem.seqlen_k)
    return rng.integers(-1, number, q_shape, dtype), rng.integers(-1, number, k_shape, dtype)


@pytest.mark.parametrize("seqlen", [1, 31, 32, 33, 1000, 1025, 4097, 16384, 40000, 70001])
@pytest.mark.parametrize("number", [1, 16, 3000])
def test_lengths(equal, seqlen, number):
    problem = problem_of(1, 2, 1, seqlen, max(seqlen - 5, 1))
    q_group, k_group = random_groups(np.random.default_rng(seqlen), problem, number)
    equal(problem, Clauses((q_group,), (k_group,), hi_offset=1))


@pytest.mark.parametrize("seqlen", [1, 33, 4097, 16383, 16384, 16385, 40000, 70001])
@pytest.mark.parametrize(("number", "share"), [(60, 1.0), (60, 0.7), (200, 1.0), (200, 0.7)])
def test_as_many_keys_as_queries(equal, seqlen, number, share):
    """Lists of one pass: by one block each, by several, or (nine bits) left to plan_sort."""
    rng = np.random.default_rng(seqlen)
    problem = problem_of(1, 4, 2, seqlen, seqlen)
    q_group, k_group = random_groups(rng, problem, number)
    keeps = [(rng.random(x.shape) < share).astype(np.uint8) for x in (q_group, k_group)]
    equal(problem, Clauses((q_group,), (k_group,), *((x,) for x in keeps), None, 1))


def test_many_very_long_lists(equal):
    """Of 65537 rows, more of them than half a card's multiprocessors; some left to plan_sort."""
    rng = np.random.default_rng(2)
    problem = problem_of(1, 4, 2, 65_537, 65_537)
    q_group, k_group = random_groups(rng, problem, 100)
    q_group[0, 1] *= 7
    keeps = [(rng.random(x.shape) < 0.9).astype(np.uint8) for x in (q_group, k_group)]
    clauses = Clauses((q_group,), (k_group,), *((x,) for x in keeps), None, 1)
    equal(problem, clauses, copies=20)


@pytest.mark.parametrize("style", testing.GROUP_STYLES)
def test_styles_of_ids(equal, style):
    parts = (testing.Part("hash", style, 16), testing.Part("keep", "uniform", 50))
    case = testing.build(testing.Spec(2, 4, 2, 700, 900, 16, 16, "float32", parts=parts, seed=3))
    problem = problem_of(2, 4, 2, 700, 900)
    host = dataclasses.replace(problem, device="cpu")
    equal(problem, lower(case.pattern, host, framework_of("q", case.q)))


def test_wide_ids_many_clauses_long_lists(equal):
    """Several passes that go back and forth between both buffers, with dropped rows at the end."""
    rng = np.random.default_rng(0)
    for seqlen in (3000, 66000):
        problem = problem_of(1, 1, 1, seqlen, seqlen)
        groups = [random_groups(rng, problem, top, np.int64) for top in (5, 2**62, 40)]
        groups[1] = tuple(x // 2**57 * 2**57 for x in groups[1])
        keeps = [(rng.random((1, 1, seqlen)) < 0.7).astype(np.uint8) for _ in range(2)]
        q_groups, k_groups = zip(*groups, strict=True)
        equal(problem, Clauses(q_groups, k_groups, (keeps[0],), (keeps[1],), -900, 1))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_keeps(equal, share):
    rng = np.random.default_rng(1)
    problem = problem_of(2, 4, 2, 5000, 4000)
    q_keep = (rng.random((2, 4, 5000)) < share).astype(np.uint8)
    k_keep = (rng.random((2, 2, 4000)) < share).astype(np.uint8)
    equal(problem, Clauses(q_keeps=(q_keep,), k_keeps=(k_keep,), hi_offset=1))


def test_ranges(equal):
    rng = np.random.default_rng(2)
    problem = problem_of(1, 2, 2, 3000, 2500)
    bounds = rng.integers(-10, 2600, (2, 1, 2, 3000))
    equal(problem, Clauses(starts=(bounds[0],), ends=(bounds[1],)))
    q_group, k_group = random_groups(rng, problem, 6)
    equal(problem, Clauses((q_group,), (k_group,), starts=(bounds[0],), ends=(bounds[1],)))


@pytest.mark.parametrize("seqlen", [64, 65, 4097, 20000, 66000])
def test_queries_are_sorted_by_ranges(equal, seqlen):
    rng = np.random.default_rng(seqlen)
    problem = problem_of(1, 2, 1, seqlen, 50000)
    shape = (1, 2, seqlen)
    start = rng.integers(-99, 50000, shape)
    row = np.broadcast_to(np.arange(seqlen), shape)
    groups = random_groups(rng, problem, 5)
    keep = ((rng.random(shape) < 0.7).astype(np.uint8),)
    anywhere, wide = start + 640, rng.choice([-(2**63), 9, 1024, 49999, 2**63 - 1], shape)
    equal(problem, Clauses(starts=(start,), ends=(anywhere,)), copies=3)
    equal(problem, Clauses(starts=(row,), ends=(row + 40,)))
    equal(problem, Clauses(starts=(row // 900,), ends=(wide,), q_keeps=keep))
    equal(problem, Clauses(starts=(start, row - 9), ends=(wide, anywhere), hi_offset=3))
    equal(problem, Clauses(*((x,) for x in groups), starts=(start,), ends=(anywhere,)))


def test_broadcast_and_strided_ids(torch, backend):
    """Ids shared by all heads (stride 0) and ids that lie transposed."""
    ids = torch.randint(0, 9, (2, 1, 600), device="cuda")
    strided = torch.randint(0, 9, (2, 600, 3), device="cuda").transpose(1, 2)
    q = torch.zeros(2, 3, 600, 64, device="cuda", dtype=torch.bfloat16)
    for q_hash, k_hash in ((ids, strided), (strided, ids)):
        plan = scfa.make_plan(scfa.HashSparse(q_hash, k_hash), q, q, backend=backend)
        host = scfa.HashSparse(q_hash.cpu(), k_hash.cpu())
        right = scfa.make_plan(host, q.cpu().float(), q.cpu().float(), backend="reference")
        for name in NAMES:
            assert torch.equal(getattr(plan, name).cpu(), getattr(right, name)), name


def test_the_same_every_time(torch, backend):
    q = torch.zeros(4, 48, 4096, 64, device="cuda", dtype=torch.bfloat16)
    q_hash, k_hash = (torch.randint(0, 16, (4, 48, 4096), device="cuda") for _ in range(2))
    pattern = scfa.HashSparse(q_hash, k_hash)
    first = scfa.make_plan(pattern, q, q, backend=backend)
    for _ in range(10):
        again = scfa.make_plan(pattern, q, q, backend=backend)
        for name in NAMES:
            assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 64), (64, 0)])
def test_empty_lists(equal, seqlen_q, seqlen_k):
    problem = problem_of(2, 2, 1, seqlen_q, seqlen_k)
    equal(problem, Clauses(hi_offset=1))
    q_group, k_group = random_groups(np.random.default_rng(3), problem, 4)
    equal(problem, Clauses((q_group,), (k_group,)))
