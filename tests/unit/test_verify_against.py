"""Two backends on one problem: the comparison sees what the truth, as it is asked, does not."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from scfa_core import campaign, cli, cli_verify, testing, verify, verify_against
from scfa_core.campaign_blocks import Answers
from scfa_core.errors import BackendUnavailable, UnknownBackend
from scfa_core.verify_against import Rule

CAUSAL = testing.Spec(
    heads=2,
    heads_kv=2,
    seqlen_q=700,
    seqlen_k=700,
    head_dim=64,
    head_dim_v=64,
    dtype="float16",
)


def planted(monkeypatch, module, run, change):
    """Let numba-cpu's answers be changed after `run`."""
    right = getattr(module, run)

    def wrong(problem, backend):
        got, plan = right(problem, backend)
        return change(got, plan) if backend == "numba-cpu" else (got, plan)

    monkeypatch.setattr(module, run, wrong)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "tf32", "float64"])
def test_a_row_is_judged_as_a_tensor_of_its_own(dtype):
    """Against the truth, so that one of the two allowances is not needed: half of the ratio."""
    tf32 = dtype == "tf32"
    dtype = "float32" if tf32 else dtype
    spec = replace(CAUSAL, heads_kv=1, seqlen_q=70, seqlen_k=70, dtype=dtype, poison=True)
    case = testing.build(spec)
    answers = verify_against.allowances_of(case, "numpy", tf32=tf32)
    rng = np.random.default_rng(0)
    for name, true, plain, size in zip(testing.Results._fields, *answers, strict=True):
        mine = true + 3e-3 * rng.standard_normal(true.shape)
        for row in (0, true.shape[2] // 2, true.shape[2] - 1):
            part = [x[:1, :1, row : row + 1] for x in (mine, true, plain, size)]
            right = testing.judge_tensor(name, *part, case, tf32=tf32)
            of_row = Answers(*(only(name, x) for x in part[1:]))
            found = verify_against._worst_row(name, case, *part[:2], [Rule(of_row, tf32)] * 2)
            assert found.max_ratio == pytest.approx(right.max_ratio / 2)
            assert found.norm_ratio == pytest.approx(right.norm_ratio / 2)


def only(name, tensor):
    """Results of which one is there."""
    return testing.Results(**dict.fromkeys(testing.Results._fields) | {name: tensor})


@pytest.mark.parametrize(("name", "kept"), [("out", 0.97), ("dq", 0.97), ("dk", 0.9), ("dv", 0.9)])
def test_a_small_row_is_seen_by_the_comparison_alone(monkeypatch, name, kept):
    """The last of 700 rows: its entries are small beside those of the first ones."""

    def change(got, plan):
        getattr(got, name)[0, 1, -1] *= kept
        return got, plan

    assert not verify.verify_one("numba-cpu", CAUSAL, "reference").complaints
    planted(monkeypatch, verify, "run_case", change)
    assert not verify.verify_one("numba-cpu", CAUSAL).complaints
    finding = verify.verify_one("numba-cpu", CAUSAL, "reference")
    (complaint,) = finding.complaints
    assert complaint.startswith(f"numba-cpu against reference: {name}: ")
    assert "batch 0, head 1, row 699" in complaint
    assert finding.worst <= 1 < finding.apart


@pytest.mark.parametrize("name", testing.Results._fields)
def test_rows_that_are_not_sampled_are_compared(monkeypatch, name):
    """Beyond the dense truth, one head is sampled: a row of another one is wrong."""
    monkeypatch.setattr(campaign, "DENSE_PAIRS", 0)
    seed = next(
        seed
        for seed in range(0, 700, 7)
        if campaign.draw(seed, most_rows=90, dtypes=("float32",)).case.spec.heads_kv == 3
    )
    options = {"most_rows": 90, "dtypes": ("float32",)}
    assert not campaign.verify_deep("numba-cpu", seed, **options, against="reference").complaints
    spec = campaign.draw(seed, **options).case.spec
    sampled = np.random.default_rng(spec.seed)
    b, h = int(sampled.integers(spec.batch)), int(sampled.integers(spec.heads))
    other = (b, (h // (spec.heads // spec.heads_kv) + 1) % 3)
    if name in ("out", "lse", "dq"):
        other = (b, (h + 1) % spec.heads)

    def change(got, plan):
        x = getattr(got, name)[other]
        x[np.isfinite(x)] += 0.1
        return got, plan

    planted(monkeypatch, campaign, "run", change)
    assert not campaign.verify_deep("numba-cpu", seed, **options).complaints
    (complaint,) = campaign.verify_deep(
        "numba-cpu", seed, **options, against="reference"
    ).complaints
    assert complaint.startswith(f"numba-cpu against reference: {name}: ")
    assert "views of q, k, v, dout" in complaint


def test_entries_that_only_one_of_the_two_knows():
    case = testing.build(CAUSAL)
    rules = [Rule(verify_against.allowances_of(case, "numpy"))] * 2
    got = testing.run_numpy(case, "reference")[0]
    bad = got.dk.copy()
    bad[0, 0, 5, 3] = np.nan
    found = verify_against.row_verdicts(case, got, got._replace(dk=bad), rules)
    assert [v.name for v in found if not v.ok] == ["dk"]
    both = got._replace(dk=bad)
    assert all(v.ok for v in verify_against.row_verdicts(case, both, both, rules))
    short = got._replace(dv=got.dv[:, :, 1:])
    found = verify_against.row_verdicts(case, got, short, rules)
    assert [v.name for v in found if not v.ok] == ["dv"]
    assert found[-1].detail == "shapes (1, 2, 700, 64) and (1, 2, 699, 64)"


def test_plans_are_compared_entry_by_entry(monkeypatch):
    def change(got, plan):
        plan["k_index"] = plan["k_index"].copy()
        plan["k_index"][0, 0, :2] = plan["k_index"][0, 0, 1::-1]
        return got, plan

    planted(monkeypatch, verify, "run_case", change)
    assert verify.verify_one("numba-cpu", CAUSAL, "reference").complaints == (
        "numba-cpu: plan.k_index: 2 of 1400 entries differ",
        "numba-cpu against reference: plan.k_index: 2 of 1400 entries differ",
    )
    one = {"k_index": np.zeros((1, 1, 3), int)}
    two = {"k_index": np.zeros((1, 1, 4), int)}
    assert verify_against.differing_entries(one, two) == [
        "plan.k_index: shapes (1, 1, 3) and (1, 1, 4)"
    ]


def test_what_is_wrong_in_one_is_told_of_that_one(monkeypatch):
    def fail(case, backend):
        if backend == "reference":
            raise RuntimeError("no such tile")
        return right(case, backend)

    right = verify.run_case
    monkeypatch.setattr(verify, "run_case", fail)
    (complaint,) = verify.verify_one("numba-cpu", CAUSAL, "reference").complaints
    assert complaint == "raised RuntimeError: no such tile (on reference)"


@pytest.mark.parametrize("workers", [1, 2])
def test_deep_and_long_problems(workers):
    options = {"count": 6, "rows": 300, "dtype": "float32", "deep": True, "long": 3}
    findings = list(verify.verify("numba-cpu", against="reference", workers=workers, **options))
    assert [x.seed for x in findings] == list(range(6))
    assert not any(x.complaints for x in findings)
    assert any(x.apart > 0 for x in findings)


def test_dtypes_are_those_that_both_are_given(monkeypatch):
    kinds = {"cupy": SimpleNamespace(memory="cuda"), "reference": SimpleNamespace(memory="host")}
    monkeypatch.setattr(verify, "load_backend", kinds.get)
    assert verify.drawn_dtypes("reference") == verify.HOST_DTYPES
    assert verify.drawn_dtypes("reference", "cupy") == verify.CUDA_DTYPES


def test_command_line(tmp_path, capsys):
    path = tmp_path / "found.json"
    options = ["--against", "reference", "--count", "3", "--rows", "40", "--dtype", "float32"]
    assert cli.main(["verify", *options, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "numba-cpu against reference: 3 problems from seed 0, 0 failed" in out
    assert "largest difference 0." in out
    written = json.loads(path.read_text())
    assert (written["backend"], written["against"]) == ("numba-cpu", "reference")
    assert 0 < written["largest difference of the allowed"] <= 1
    assert " --backend numba-cpu --against reference --seed 0 " in written["command"]
    parsed = cli.build_parser().parse_args(["verify", *options])
    assert "--against reference --seed 7 --count 1" in cli_verify.reproduction(parsed, 7)


def test_a_second_backend_that_cannot_serve_is_refused(capsys, monkeypatch):
    assert cli.main(["verify", "--backend", "reference", "--against", "reference"]) == 2
    assert "backend 'reference' always agrees with itself" in capsys.readouterr().err
    with pytest.raises(UnknownBackend, match="'auto'"):
        next(verify.verify("reference", against="auto"))
    monkeypatch.setattr(
        verify, "unavailable_reason", lambda name: "no GPU" if name == "cupy" else None
    )
    kinds = {"cupy": SimpleNamespace(memory="cuda"), "reference": SimpleNamespace(memory="host")}
    monkeypatch.setattr(verify, "load_backend", kinds.get)
    with pytest.raises(BackendUnavailable, match="'cupy' cannot run here: no GPU"):
        next(verify.verify("reference", against="cupy"))
