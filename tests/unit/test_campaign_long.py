"""Long problems: the blockwise truth is the dense one, and no far end of it is out of sight."""

from types import SimpleNamespace

import numpy as np
import pytest

import scfa_core as scfa
from scfa_core import campaign, campaign_blocks, cli, cli_verify, testing, verify
from scfa_core import campaign_long as long
from scfa_core.patterns.base import map_arrays
from scfa_core.testing import Case, Results, Spec

DTYPES = ("float32", "float64", "float16", "bfloat16")


def numbers_of(library, dtype):
    if library == "torch":
        pytest.importorskip("torch", reason="needs the extra torch")
    device, tf32 = "numpy" if library == "numpy" else "cpu", dtype == "tf32"
    numbers = campaign_blocks.numbers_on(device, "float32" if tf32 else dtype, tf32=tf32)
    numbers.pairs = 2000  # several blocks, and blocks of a few rows
    return numbers


def answers_of(case, numbers):
    pattern = map_arrays(case.pattern, numbers.integers)
    counts, seen = campaign_blocks.count_visible(numbers, pattern, case.spec)
    return counts, seen, campaign_blocks.evaluate(numbers, case, pattern)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", [*DTYPES, "tf32"])
def test_blocks_add_up_to_the_dense_truth(library, dtype, monkeypatch):
    """Counts, truth and sizes are the dense ones; the plain formula rounds as much as the dense."""
    monkeypatch.setattr(campaign_blocks, "ROWS", 40)
    for seed in range(7):
        stored = "float32" if dtype == "tf32" else dtype
        case = campaign.draw(seed, most_rows=90, dtypes=(stored,)).case
        counts, seen, answers = answers_of(case, numbers_of(library, dtype))
        np.testing.assert_array_equal(counts, case.mask.sum(axis=-1))
        heads_kv = case.spec.heads_kv
        by_key = case.mask.reshape(case.spec.batch, heads_kv, -1, case.spec.seqlen_k)
        np.testing.assert_array_equal(seen, by_key.any(axis=2))
        true, sizes = testing.truth(case), testing.magnitudes(case)
        plain = testing.baseline(case, tf32=dtype == "tf32")
        for name in Results._fields:
            mine, right = getattr(answers.true, name), getattr(true, name)
            np.testing.assert_allclose(mine, right, rtol=1e-10, atol=1e-12)
            size = getattr(sizes, name)
            np.testing.assert_allclose(getattr(answers.size, name), size, rtol=1e-3, atol=1e-6)
            some = np.isfinite(right)
            rounding, dense = (
                np.linalg.norm(getattr(x, name)[some] - right[some]) for x in (answers.plain, plain)
            )
            if dtype in ("float16", "bfloat16", "tf32"):
                assert 0.9 * dense - 1e-12 <= rounding <= 1.1 * dense + 1e-12
            else:  # sums in another order
                terms = 16 if dtype == "float64" else 1  # as in the rule
                allowed = terms * testing.ROUNDOFF[dtype] * np.linalg.norm(size)
                assert rounding <= 4 * dense + allowed


def hash_case(seqlen_q, seqlen_k, dtype="float32", head_dim=16, buckets=4):
    """Hashes, causally; one head."""
    rng = np.random.default_rng(0)
    spec = Spec(1, 1, 1, seqlen_q, seqlen_k, head_dim, head_dim, dtype, seed=11)
    q_hash, k_hash = (rng.integers(0, buckets, (1, 1, rows)) for rows in (seqlen_q, seqlen_k))
    lengths = (seqlen_q, seqlen_k, seqlen_k, seqlen_q)
    arrays = [
        testing.narrow(rng.standard_normal((1, 1, rows, head_dim)), dtype) for rows in lengths
    ]
    return Case(spec, *arrays, scfa.HashSparse(q_hash, k_hash), np.zeros((0,), bool))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5003, 300), (300, 5003)])
def test_five_thousand_rows_are_those_of_the_reference(seqlen_q, seqlen_k):
    case = hash_case(seqlen_q, seqlen_k)
    mask = case.pattern.mask(seqlen_q, seqlen_k)
    true = testing.truth(Case(*[getattr(case, x) for x in list(case.__match_args__)[:-1]], mask))
    _, _, answers = answers_of(case, campaign_blocks.numbers_on("numpy", "float32"))
    for mine, right in zip(answers.true, true, strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-9, atol=1e-12)


def run_with(case, plan):
    """Results of numba-cpu by a plan that may be wrong."""
    q, k, v, dout = (
        testing.as_numpy_kind(x, case.spec.dtype) for x in (case.q, case.k, case.v, case.dout)
    )
    options = {"backend": "numba-cpu"}
    out, lse = scfa.attention(q, k, v, plan, return_lse=True, **options)
    grads = scfa.attention_backward(dout, q, k, v, out, lse, plan, **options)
    return Results(*(x.astype(np.float64) for x in (out, lse, *grads)))


@pytest.fixture(scope="module")
def far():
    """A problem of 5003 rows, its answers, and its right plan on numba-cpu."""
    case = hash_case(5003, 5003, "bfloat16", 32, buckets=2)
    _, _, answers = answers_of(case, campaign_blocks.numbers_on("numpy", "bfloat16"))
    q = testing.as_numpy_kind(case.q, "bfloat16")
    return case, answers, scfa.make_plan(case.pattern, q, q, backend="numba-cpu")


_OF_OUT = {}  # by case: computed once


def verdicts(case, got, answers):
    if id(case) not in _OF_OUT:
        numbers = campaign_blocks.numbers_on("numpy", case.spec.dtype)
        _OF_OUT[id(case)] = case, campaign_blocks.stored_out_sizes(numbers, case, case.pattern)
    return list(long.stretch_verdicts(case, got, answers, _OF_OUT[id(case)][1]))


def wrong(case, got, answers):
    return {v.name for v in verdicts(case, got, answers) if not v.ok}


def test_what_is_right_passes(far):
    case, answers, plan = far
    assert wrong(case, run_with(case, plan), answers) == set()


def test_a_tile_dropped_at_the_far_end_is_seen(far):
    """The last 64 keys of 40 rows of 5003: nothing to the whole tensor, all to its last stretch."""
    case, answers, plan = far
    arrays = {name: getattr(plan, name).copy() for name in ("key_start", "key_end")}
    for row in range(4960, 5000):
        place = int(np.flatnonzero(plan.q_index[0, 0] == row)[0])
        arrays["key_end"][0, 0, place] -= 64
    others = (plan.q_index, plan.q_count, plan.k_index, plan.k_count)
    broken = scfa.Plan(*others, *arrays.values(), plan.work, False, "numba-cpu", "cpu")
    got = run_with(case, broken)
    assert {"out", "dq", "dk", "dv"} <= wrong(case, got, answers)
    whole = [
        testing.judge_tensor(name, getattr(got, name), *(getattr(x, name) for x in answers), case)
        for name in ("out", "dq")
    ]
    assert all(verdict.ok for verdict in whole)


@pytest.mark.parametrize("name", Results._fields)
def test_one_wrong_row_is_seen(far, name):
    case, answers, plan = far
    got = run_with(case, plan)
    getattr(got, name)[0, 0, 4711] *= 1.5
    assert wrong(case, got, answers) == {name}


def test_a_leaked_nan_is_seen(far):
    case, answers, plan = far
    got = run_with(case, plan)
    got.dv[0, 0, 5002, 3] = np.nan
    assert wrong(case, got, answers) == {"dv"}


def test_keys_are_counted_for_every_query(far):
    case, _, plan = far
    spec = case.spec
    counts, _ = campaign_blocks.count_visible(
        campaign_blocks.numbers_on("numpy", spec.dtype), case.pattern, spec
    )
    fields = {name: getattr(plan, name).astype(np.int64) for name in verify.PLAN_FIELDS}
    assert long.count_verdict(case, fields, counts).ok
    fields["key_start"][0, 0, 17] -= 1
    verdict = long.count_verdict(case, fields, counts)
    assert not verdict.ok
    assert verdict.detail.startswith("1 queries")


def test_draws_are_long_various_and_bounded():
    options = {"most_rows": 17_000, "most_pairs": 2**22, "dtypes": DTYPES}
    problems = [long.draw(seed, **options) for seed in range(20)]
    specs = [problem.case.spec for problem in problems]
    assert {spec.parts[0].kind for spec in specs} == set(long.FAMILIES)
    assert max(spec.seqlen_q for spec in specs) > 16_000
    assert max(long.LENGTHS) == long.LONG_ROWS
    assert {spec.heads for spec in specs} == {1, 2, 3}
    for problem, spec in zip(problems, specs, strict=True):
        pairs = long._estimated_pairs(spec, problem.case.pattern)
        assert pairs <= 2**22
        assert pairs > 0 or spec.parts[0].kind == "empty"
    sinks = [p.case for p in problems if p.case.spec.parts[-1].kind == "sinks"]
    assert 2 < len(sinks) < 12
    for case in sinks:
        q, k, *_ = case.wide()
        scores = case.softmax_scale * q[0, 0, 5] @ k[0, 0].T
        assert scores[:: long.SINK_EVERY].min() > 5
        assert np.median(scores) < 1
    again = long.draw(5, **options).case
    np.testing.assert_array_equal(again.q, problems[5].case.q)
    assert str(again.spec) == str(specs[5])


@pytest.mark.parametrize("seed", range(10))
def test_problems_are_computed_right(seed):
    finding = long.verify_long("reference", seed, most_rows=600, dtypes=DTYPES)
    assert not finding.complaints


def test_poison_goes_where_nobody_looks():
    problem = next(
        p
        for p in (
            long.draw(s, most_rows=600, most_pairs=2**20, dtypes=("float32",)) for s in range(40)
        )
        if p.case.spec.poison and p.case.spec.parts[0].kind == "drops"
    )
    case = problem.case
    numbers = campaign_blocks.numbers_on("numpy", "float32")
    counts, seen = campaign_blocks.count_visible(numbers, case.pattern, case.spec)
    bad = long.poisoned(case, counts, seen)
    np.testing.assert_array_equal(~np.isfinite(bad.q).all(axis=-1), counts == 0)
    np.testing.assert_array_equal(~np.isfinite(bad.v).all(axis=-1), ~seen)
    assert np.isfinite(case.q).all()


def test_command_line(capsys):
    options = ["verify", "--deep", "--long", "2", "--backend", "reference", "--rows", "300"]
    assert cli.main([*options, "--count", "4", "--dtype", "float32"]) == 0
    assert "4 problems from seed 0, 0 failed" in capsys.readouterr().out
    parsed = cli.build_parser().parse_args(options)
    assert cli_verify.reproduction(parsed, 6).endswith(
        "--seed 6 --count 1 --deep --long 2 --rows 300"
    )
    assert cli.main(["verify", "--long", "2", "--backend", "reference"]) == 2
    assert "--deep" in capsys.readouterr().err


def test_every_nth_seed_is_long(monkeypatch):
    seen = []
    found = SimpleNamespace(fatal=False)
    monkeypatch.setattr(long, "verify_long", lambda _, seed, **options: seen.append(seed) or found)
    monkeypatch.setattr(campaign, "verify_deep", lambda *_, **options: found)
    assert len(list(verify.verify("reference", seed=5, count=9, deep=True, long=4))) == 9
    assert seen == [8, 12]


def test_a_failure_is_reported_with_its_views(monkeypatch):
    monkeypatch.setattr(campaign, "run", lambda *_: 1 / 0)
    (finding,) = verify.verify("reference", count=1, rows=100, deep=True, long=1)
    assert "ZeroDivisionError" in finding.complaints[0]
    assert "views of q, k, v, dout" in finding.complaints[0]


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_reach_of_a_rounded_out_is_the_dense_one(library, monkeypatch):
    monkeypatch.setattr(campaign_blocks, "ROWS", 40)
    for seed in range(7):
        case = campaign.draw(seed, most_rows=90, dtypes=("bfloat16",)).case
        numbers = numbers_of(library, "bfloat16")
        pattern = map_arrays(case.pattern, numbers.integers)
        mine = campaign_blocks.stored_out_sizes(numbers, case, pattern)
        for name, right in testing.stored_out_sizes(case).items():
            np.testing.assert_allclose(mine[name], right, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def dominated(request):
    """1100 queries whose first key has all but 4e-5 of the weight: case, answers, arguments."""
    spec = Spec(1, 1, 1, 1100, 1100, 32, 32, request.param, seed=12)
    rng = np.random.default_rng(0)
    tensors = [rng.standard_normal((1, 1, 1100, 32), np.float32) for _ in range(4)]
    long._add_sinks(spec, tensors[0], tensors[1])
    arrays = [testing.narrow(x, spec.dtype) for x in tensors]
    case = Case(spec, *arrays, scfa.Causal(), np.zeros((0,), bool))
    _, _, answers = answers_of(case, campaign_blocks.numbers_on("numpy", spec.dtype))
    q, k, v, dout = (testing.as_numpy_kind(x, spec.dtype) for x in arrays)
    out, lse = scfa.attention(q, k, v, case.pattern, return_lse=True, backend="numba-cpu")
    return case, answers, (dout, q, k, v, out, lse)


def refused(dominated, out):
    """Gradients that are refused when `out` is what the backward reads."""
    case, answers, (dout, q, k, v, right, lse) = dominated
    grads = scfa.attention_backward(dout, q, k, v, out, lse, case.pattern, backend="numba-cpu")
    return wrong(case, Results(*(x.astype(np.float64) for x in (right, lse, *grads))), answers)


def test_the_rounding_of_out_reaches_delta_and_no_more(dominated):
    """What any flash backward reads is accepted; eight roundings up or down are a fault."""
    case, _, (*_, out, _) = dominated
    signs = np.random.default_rng(1).choice([-1, 1], out.shape)
    moved = out.astype(np.float32) * (1 + 8 * testing.ROUNDOFF[case.spec.dtype] * signs)
    assert refused(dominated, out) == set()
    assert refused(dominated, moved.astype(out.dtype)) == {"dq", "dk"}


def test_a_dominated_gradient_that_is_lost_is_refused(dominated):
    """Two queries of 1100 whose gradients lose the leading key."""
    case, answers, (dout, q, k, v, out, lse) = dominated
    grads = scfa.attention_backward(dout, q, k, v, out, lse, case.pattern, backend="numba-cpu")
    got = Results(*(x.astype(np.float64) for x in (out, lse, *grads)))
    got.dv[0, 0, 0] -= case.wide()[3][0, 0, [700, 701]].sum(axis=0)
    assert wrong(case, got, answers) == {"dv"}
