"""Calls of one problem are held against the first, bit by bit."""

from dataclasses import replace

import numpy as np
import pytest

from scfa_core import campaign, cli, testing, verify
from scfa_core.verify_bits import same_bits

SMALL = testing.Spec(seqlen_q=40, seqlen_k=40, dtype="float32", poison=True)


def changing(monkeypatch, module, run, change, at=3):
    """Let call number `at` of numba-cpu be changed."""
    right, calls = getattr(module, run), []

    def wrong(problem, backend):
        got, plan = right(problem, backend)
        calls.append(backend)
        if len(calls) == at:
            change(got, plan)
        return got, plan

    monkeypatch.setattr(module, run, wrong)
    return calls


def next_number(got, plan):
    got.dq[0, 0, 7, 3] = np.nextafter(got.dq[0, 0, 7, 3], np.float32(9))


def other_range(got, plan):
    plan["key_end"].flat[5] += 1


def other_sign(got, plan):
    got.dv[np.isfinite(got.dv) & (got.dv == 0)] *= -1


@pytest.mark.parametrize(
    ("change", "told"), [(next_number, "dq: 1 of 3"), (other_range, "key_end: 1 of 3")]
)
def test_one_call_of_four_that_differs_is_told(monkeypatch, change, told):
    calls = changing(monkeypatch, verify, "run_case", change)
    (complaint,) = verify.verify_one("numba-cpu", SMALL, repeat=3).complaints
    assert complaint.startswith(f"{told} further calls gave other bits, in up to 1 of")
    assert len(calls) == 4


def test_a_zero_of_the_other_sign_is_told(monkeypatch):
    spec = replace(SMALL, parts=(testing.Part("keep"),), seed=4)
    case = testing.build(spec)
    assert (verify.run_case(case, "numba-cpu")[0].dv == 0).any()
    changing(monkeypatch, verify, "run_case", other_sign, at=2)
    (complaint,) = verify.verify_one("numba-cpu", spec, repeat=1).complaints
    assert complaint.startswith("dv: 1 of 1")


def test_one_call_has_nothing_to_differ_from(monkeypatch):
    calls = changing(monkeypatch, verify, "run_case", next_number)
    assert not verify.verify_one("numba-cpu", SMALL).complaints
    assert len(calls) == 1


def test_deep_and_long_problems_are_repeated_too(monkeypatch):
    calls = changing(monkeypatch, campaign, "run", lambda *_: None, at=0)
    options = {"count": 2, "deep": True, "long": 2, "rows": 300, "repeat": 2}
    findings = list(verify.verify("numba-cpu", **options))
    assert [bool(finding.complaints) for finding in findings] == [False, False]
    assert len(calls) == 6


def test_the_command_that_reproduces_repeats(monkeypatch, capsys):
    changing(monkeypatch, verify, "run_case", next_number, at=2)
    arguments = ["--count", "1", "--repeat", "5", "--rows", "30", "--dtype", "float32"]
    monkeypatch.setattr(verify.testing, "random_spec", lambda *_, **__: SMALL)
    assert cli.main(["verify", *arguments]) == 1
    told = capsys.readouterr().out
    assert "dq: 1 of 5 further calls gave other bits" in told
    assert "--repeat 5" in told


def test_nan_is_nan():
    left = np.array([np.nan, 0.0, -0.0, 1.0, np.inf])
    right = np.array([-np.nan, 0.0, 0.0, 1.0, np.inf])
    assert same_bits(left, right).tolist() == [True, True, False, True, True]
    assert same_bits(np.array([1, 2]), np.array([1, 3])).tolist() == [True, False]
