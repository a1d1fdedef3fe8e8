"""`scfa verify` where a backend multiplies TF32: held to that rule, and nothing else is.

The backend is the reference's, its factors rounded first, under the name and the setting of cupy.
"""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from scfa_core.backends.cupy_raw import BACKEND as CUPY
from scfa_core.reference.backend import BACKEND

from scfa_core import campaign, campaign_blocks, cli, cli_verify, testing, verify, verify_against
from scfa_core.campaign_blocks import Answers
from scfa_core.campaign_judge import sampled_verdicts
from scfa_core.campaign_long import stretch_verdicts
from scfa_core.errors import BackendUnavailable
from scfa_core.testing import Part, Results, Spec
from scfa_core.verify_against import Rule

HASH = (Part("hash", "uniform", 3),)
SPEC = Spec(1, 2, 1, 150, 140, 32, 32, "float32", parts=HASH, seed=1)


class Rounding:
    """Keeps `bits` bits of each factor's mantissa, whatever it says."""

    name, memory = "cupy", "host"
    availability, can_run, make_plan = BACKEND.availability, BACKEND.can_run, BACKEND.make_plan
    multiplies_tf32 = CUPY.multiplies_tf32

    def __init__(self, bits=10):
        self.bits = bits

    def _rounded(self, arrays):
        unit = 2.0 ** (self.bits + 1)
        for x in arrays:
            mantissa, exponent = np.frexp(x)
            yield np.ldexp(np.rint(mantissa * unit) / unit, exponent)

    def forward(self, problem, plan, q, k, v, *rest):
        BACKEND.forward(problem, plan, *self._rounded((q, k, v)), *rest)

    def backward(self, problem, plan, dout, q, k, v, *rest):
        BACKEND.backward(problem, plan, *self._rounded((dout, q, k, v)), *rest)


@pytest.fixture
def plant(monkeypatch):
    """Put a backend in the place of another."""

    def put(name, backend):
        monkeypatch.setitem(sys.modules["scfa_core.dispatch"]._loaded, name, backend)

    monkeypatch.delenv("SCFA_CUPY_FP32", raising=False)
    put("cupy", Rounding())
    return put


def structured(**options):
    """One problem of the campaign."""
    (finding,) = verify.verify("cupy", deep=True, dtype="float32", count=1, **options)
    return finding


KINDS = {
    "plain": lambda **how: verify.verify_one("cupy", SPEC, **how),
    "dense": lambda **how: structured(seed=7, rows=90, **how),
    "changed": lambda **how: structured(seed=7, rows=90, changed=True, **how),
    "sampled": lambda **how: structured(seed=7, rows=90, **how),
    "long": lambda **how: structured(seed=2, rows=700, long=1, **how),
}


@pytest.fixture(params=KINDS)
def run(request, plant, monkeypatch):
    """Run one problem of each kind that there is."""
    if request.param == "sampled":
        monkeypatch.setattr(campaign, "DENSE_PAIRS", 0)
    return KINDS[request.param]


def test_tf32_is_held_to_its_rule(run, plant, monkeypatch):
    exact = run()
    assert not exact.tf32
    assert any(x.startswith(("out", "dq", "dk", "dv")) for x in exact.complaints)
    monkeypatch.setenv("SCFA_CUPY_FP32", "tf32")
    found = run(repeat=1)
    assert found.tf32
    assert not found.complaints
    assert found.worst > 0.01  # something was rounded
    plant("cupy", Rounding(bits=3))
    assert run().complaints


def test_the_other_backend_is_not(run, plant, monkeypatch):
    """Of two, each has its own rule, and the difference may be what both allow together."""
    monkeypatch.setenv("SCFA_CUPY_FP32", "tf32")
    asked, compare = [], verify.row_verdicts

    def noted(case, one, two, rules):
        asked.append([rule.tf32 for rule in rules])
        return compare(case, one, two, rules)

    monkeypatch.setattr(verify, "row_verdicts", noted)
    found = run(against="reference")
    assert not found.complaints
    assert 0.01 < found.apart <= 1
    assert asked == [[True, False]]
    silent = Rounding()
    silent.multiplies_tf32 = None
    plant("reference", silent)
    complaints = run(against="reference").complaints
    assert complaints
    assert all(x.startswith("reference: ") for x in complaints)


def test_a_difference_that_only_tf32_explains_is_none_of_exact_backends(run):
    complaints = run(against="reference").complaints
    assert any(x.startswith("cupy against reference: ") for x in complaints)


def test_the_sampled_formula_errs_as_the_dense_one(monkeypatch):
    """Twice its own error is allowed, and nothing for luck: the dense one is at the half of it."""
    monkeypatch.setattr(testing, "SMALL", 0)
    monkeypatch.setattr(testing, "FEW", 0)
    case = testing.build(SPEC)
    plan = verify.reference_fields(case)
    got = testing.baseline(case, tf32=True)
    found = {v.name: v for v in sampled_verdicts(case, got, plan, tf32=True)}
    assert found.pop("plan").ok
    assert sorted(found) == sorted(Results._fields)
    for verdict in found.values():
        assert 0.4 < verdict.norm_ratio <= 0.5 + 0.05, verdict


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("judge", ["sampled", "stretches"])
def test_luck_is_that_of_tf32(judge, tf32):
    """Of few entries: beyond twice the error of the formula, within four roundings of the terms."""
    case = testing.build(replace(SPEC, head_dim=16, head_dim_v=16))
    numbers = campaign_blocks.numbers_on("numpy", "float32", tf32=tf32)
    answers = campaign_blocks.evaluate(numbers, case, case.pattern)
    off = 0.8 * testing.ROUNDOFF["tf32"]
    pairs = zip(answers.true, answers.size, strict=True)
    got = Results(*(np.where(np.isfinite(x), x + off * size, x) for x, size in pairs))
    if judge == "sampled":
        found = sampled_verdicts(case, got, verify.reference_fields(case), tf32=tf32)
    else:
        found = stretch_verdicts(case, got, answers, {}, tf32=tf32)
    assert {v.name for v in found if not v.ok} == (set() if tf32 else set(Results._fields))


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_two_rules_allow_their_sum(name):
    """Of one row; twice the one rule's allowance, or the other's, where both have the same."""
    case = testing.build(SPEC)
    rules = []
    for tf32 in (False, True):
        answers = verify_against.allowances_of(case, "numpy", tf32=tf32)
        plain = testing.baseline(case, tf32=tf32)
        np.testing.assert_array_equal(getattr(answers.plain, name), getattr(plain, name))
        row = [Results(*(x[:1, :1, 70:71] for x in results)) for results in answers]
        rules.append(Rule(Answers(*row), tf32))
    true = getattr(rules[0].answers.true, name)

    def allowed(*rules):
        found = verify_against._worst_row(name, case, true + 1e-3, true, rules)
        return np.array([1e-3 / found.max_ratio, 1 / found.norm_ratio])

    exact, tf32 = rules
    both = (allowed(exact, exact) + allowed(tf32, tf32)) / 2
    np.testing.assert_allclose(allowed(exact, tf32), both)
    np.testing.assert_allclose(allowed(tf32, exact), both)
    assert (allowed(tf32, tf32) > 100 * allowed(exact, exact)).all()


def test_other_dtypes_and_wide_heads_are_exact(monkeypatch):
    says = CUPY.multiplies_tf32
    for value in (None, "", "exact"):
        if value is None:
            monkeypatch.delenv("SCFA_CUPY_FP32", raising=False)
        else:
            monkeypatch.setenv("SCFA_CUPY_FP32", value)
        assert not says("float32", 64, 64)
    monkeypatch.setenv("SCFA_CUPY_FP32", "tf32")
    assert says("float32", 64, 128)
    assert not says("float32", 64, 136)
    assert not says("float32", 136, 64)
    assert not says("bfloat16", 64, 64)
    monkeypatch.setenv("SCFA_CUPY_FP32", "fast")
    with pytest.raises(BackendUnavailable, match="SCFA_CUPY_FP32 must be one of"):
        says("float32", 64, 64)


def test_a_wrong_word_is_a_finding_of_its_seed(plant, monkeypatch):
    monkeypatch.setenv("SCFA_CUPY_FP32", "fast")
    finding = verify.verify_one("cupy", SPEC, "reference")
    (complaint,) = finding.complaints
    assert complaint.startswith("raised BackendUnavailable: $SCFA_CUPY_FP32 must be one of")
    assert complaint.endswith("(on cupy)")


def test_what_is_printed_and_written_says_so(plant, monkeypatch, tmp_path, capsys):
    path = tmp_path / "found.json"
    options = ["verify", "--backend", "cupy", "--count", "3", "--rows", "40"]
    options += ["--json", str(path)]
    monkeypatch.setenv("SCFA_CUPY_FP32", "tf32")
    assert cli.main([*options, "--dtype", "float32"]) == 0
    assert "cupy: 3 problems from seed 0, 0 failed" in (told := capsys.readouterr().out)
    assert told.strip().endswith("; 3 held to the rule for TF32")
    written = json.loads(path.read_text())
    assert written["held to the rule for TF32"] == 3
    assert list(written["dtypes"]) == ["tf32"]
    assert written["command"].startswith("SCFA_CUPY_FP32=tf32 scfa verify --backend cupy ")
    assert cli.main([*options, "--dtype", "float64"]) == 1  # rounded all the same
    told = capsys.readouterr().out
    assert "TF32" not in told.splitlines()[-1]
    assert "reproduce: SCFA_CUPY_FP32=tf32 scfa verify --backend cupy --seed" in told
    assert json.loads(path.read_text())["held to the rule for TF32"] == 0


def test_settings_of_cupy_concern_cupy_alone(monkeypatch):
    monkeypatch.setenv("SCFA_CUPY_FP32", "tf32")
    parsed = cli.build_parser().parse_args(["verify", "--backend", "reference"])
    assert cli_verify.reproduction(parsed, 3).startswith("scfa verify --backend reference")
    parsed = cli.build_parser().parse_args(
        ["verify", "--backend", "numba-cuda", "--against", "cupy"]
    )
    monkeypatch.setenv("SCFA_CUPY_BACKWARD", "a b")
    line = cli_verify.reproduction(parsed, 3)
    assert line.startswith("SCFA_CUPY_BACKWARD='a b' SCFA_CUPY_FP32=tf32 scfa verify")
