"""The deep campaign: masks are the definitions, the sampled judge sees what a dense one does."""

import numpy as np
import pytest
from scfa_core.reference.masks import dense_mask

from scfa_core import campaign, cli, cli_verify, verify
from scfa_core.campaign_judge import sampled_verdicts, visible

FLOAT = ("float32",)


def small(seed, dtypes=FLOAT):
    return campaign.draw(seed, most_rows=90, dtypes=dtypes)


def test_every_family_and_view_is_drawn():
    problems = [small(seed) for seed in range(70)]
    assert {p.case.spec.parts[0].kind for p in problems} == set(campaign.FAMILIES)
    assert {view for p in problems for view in p.views} == set(campaign.VIEWS_OF_DOUT)
    assert {len(p.case.spec.parts) for p in problems} == {1, 2, 3, 4}


def test_nothing_is_visible_only_where_that_is_meant():
    """Four clauses at once easily hide everything from everyone."""
    for seed in range(140):
        case = small(seed).case
        assert case.mask.any() or case.spec.parts[0].kind == "empty", seed


@pytest.mark.parametrize("seed", range(28))
def test_rows_of_a_mask_are_rows_of_the_dense_mask(seed):
    case = small(seed).case
    spec = case.spec
    sizes = (spec.batch, spec.heads, spec.heads_kv, spec.seqlen_q, spec.seqlen_k)
    mask = dense_mask(case.pattern, *sizes)
    for b, h in np.ndindex(mask.shape[:2]):
        rows = np.arange(spec.seqlen_q)[::3]
        np.testing.assert_array_equal(visible(case.pattern, spec, b, h, rows), mask[b, h, rows])


@pytest.mark.parametrize("seed", range(14))
def test_problems_are_computed_right(seed):
    dtypes = ("float32", "float64", "float16", "bfloat16")
    finding = campaign.verify_deep("reference", seed, most_rows=90, dtypes=dtypes)
    assert not finding.complaints


@pytest.mark.parametrize("seed", [56308, 64044, 101872])
def test_gradients_that_hang_on_one_query(seed):
    """Its delta decides all of dq or dk: a matter of luck, however many entries these have."""
    finding = campaign.verify_deep("numba-cpu", seed, most_rows=4096, dtypes=verify.HOST_DTYPES)
    assert not finding.complaints
    assert finding.spec.seqlen_q in (297, 636, 257)


def test_the_longest_are_judged_by_samples(monkeypatch):
    monkeypatch.setattr(campaign, "DENSE_PAIRS", 0)
    for seed in range(14):
        finding = campaign.verify_deep("reference", seed, most_rows=90, dtypes=FLOAT)
        assert not finding.complaints


@pytest.mark.parametrize("seed", range(7))
def test_torch_tensors_in_the_same_views_give_the_same_bits(seed):
    pytest.importorskip("torch", reason="needs the extra torch")
    problem = small(seed)
    ways = campaign._torch_ways("cpu"), campaign._numpy_ways()
    results = []
    for way, numpy in zip(ways, (False, True), strict=True):
        got, plan = campaign.run_in(problem, "reference", *way, numpy=numpy)
        results.append((*got, *plan.values()))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv", "key_end"])
def test_the_sampled_judge_sees_an_error(name, monkeypatch):
    """One element of the last row that has any, off by a thousandth."""
    monkeypatch.setattr(campaign, "DENSE_PAIRS", 0)
    problem = next(
        p
        for p in map(small, range(0, 700, 7))
        if len(p.case.spec.parts) == 1  # lengths
    )
    got, plan = campaign.run(problem, "reference")
    assert all(v.ok for v in sampled_verdicts(problem.case, got, plan))
    if name == "key_end":
        plan[name] = plan[name] + 1
    else:
        changed = getattr(got, name) * 1.001 + 0.001
        got = got._replace(**{name: changed})
    wrong = {v.name for v in sampled_verdicts(problem.case, got, plan) if not v.ok}
    assert wrong == {"plan" if name == "key_end" else name}


def test_command_line(capsys):
    options = ["verify", "--deep", "--backend", "reference", "--count", "3", "--rows", "40"]
    assert cli.main([*options, "--dtype", "float32"]) == 0
    assert "3 problems from seed 0, 0 failed" in capsys.readouterr().out
    parsed = cli.build_parser().parse_args(["verify", "--deep"])
    assert cli_verify.reproduction(parsed, 5).endswith("--seed 5 --count 1 --deep")


def test_a_failure_is_reported_with_its_views(monkeypatch):
    monkeypatch.setattr(campaign, "run", lambda *_: 1 / 0)
    (finding,) = verify.verify("reference", count=1, rows=40, deep=True)
    assert "ZeroDivisionError" in finding.complaints[0]
    assert "views of q, k, v, dout" in finding.complaints[0]
