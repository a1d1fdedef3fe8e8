"""Sweeps: every CPU case runs, what is timed is checked, limits hold, a stop loses nothing."""

import json
import subprocess
import sys
import time

import bench_call
import pytest

from_the_checkout = bench_call.from_the_checkout
bench = bench_call.bench


def test_smoke_resume_report_and_compare(tmp_path):
    path = tmp_path / "smoke.json"
    arguments = ("--case", "smoke", "--method", "scfa-numba-cpu", "--seconds", 0, "--json", path)
    bench(*arguments)
    rows = json.loads(path.read_text())["rows"]
    assert len({row["case"] for row in rows}) == 7
    assert {row["mode"] for row in rows} == {"forward", "backward"}
    assert all(row["ms"] > 0 and row["error"] < 1e-4 for row in rows)

    assert "smoke" not in bench(*arguments), "rows that are there must not be run again"

    table = bench("report", path)
    assert "| smoke-dense |" in table
    assert "scfa-numba-cpu" in table

    assert "0 slower" in bench("compare", path, path)
    slow = json.loads(path.read_text())
    slow["rows"][0]["low"] = slow["rows"][0]["ms"] = 1e6
    slower = tmp_path / "slow.json"
    slower.write_text(json.dumps(slow))
    assert "SLOWER" in bench("compare", path, slower, code=1)


def test_unknown_case_names_the_known_ones():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--case", "nothing"],
        cwd=bench_call.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "smoke" in done.stderr


def test_limit_stops_a_case_and_says_so():
    from bench.limits import OverLimit, limited

    def slow():
        yield 1
        time.sleep(5)
        yield 2

    rows, start = limited(slow(), 0.2), time.monotonic()
    assert next(rows) == 1
    time.sleep(0.3)  # the caller's own time does not count
    with pytest.raises(OverLimit, match=r"0\.2 s"):
        next(rows)
    assert time.monotonic() - start < 3
    assert list(limited(iter("ab"), None)) == ["a", "b"]
    out = bench("--case", "cpu-dense-8k", "--method", "scfa-numba-cpu", "--limit", 0.01)
    assert "not run: over the limit" in out


def test_a_limit_that_a_compiler_wraps_is_a_limit_still(monkeypatch):
    from bench import run
    from bench.limits import OverLimit

    def wraps(inputs):
        try:
            raise OverLimit("over the limit of 1 s for a case")
        except OverLimit:
            raise RuntimeError("compiling failed") from None

    monkeypatch.setitem(run.METHODS, "flex", wraps)
    out = bench("--case", "smoke-dense", "--method", "flex", "naive", "--seconds", 0)
    assert out.count("not run: over the limit of 1 s for a case") == 2
    assert "compiling failed" not in out


def test_floor_by_hand():
    from bench.cases import Case
    from bench.floor import Ceilings, floor_facts

    case = Case("x", 1, 4, 2, 1000, 64, "dense")
    # q and out: 2 * 4000 rows, k and v: 2 * 2000 rows, of 128 bytes; lse: 4000 * 4 bytes
    moved = 12000 * 128 + 16000
    facts = floor_facts(case, "forward", 10, 1.0, Ceilings(1.0, 1.0))
    assert facts["floor_by"] == "bytes"
    assert facts["floor_ms"] == pytest.approx(moved / 1e6)
    assert facts["floor_share"] == pytest.approx(moved / 1e6, abs=1e-4)
    # q, out, dout, dq and k, v, dk, dv
    assert floor_facts(case, "backward", 10, 1.0, Ceilings(1.0, 1.0))["floor_ms"] == pytest.approx(
        (24000 * 128 + 16000) / 1e6
    )
    many = floor_facts(case, "backward", 10**9, 1.0, Ceilings(1000.0, 1.0))
    assert many["floor_by"] == "flops"
    assert many["floor_ms"] == pytest.approx(640.0)
    assert floor_facts(case, "plan", 10, 1.0, Ceilings(1.0, 1.0)) == {}


def test_jit_rows_of_a_method_without_compiling_and_of_one_that_cannot_run():
    from bench import jit

    rows = list(jit.rows("smoke-dense", "naive", 120))
    assert [row["mode"] for row in rows] == list(jit.MODES)
    assert all(row["first_ms"] > 0 and row["second_ms"] > 0 for row in rows)
    (row,) = jit.rows("smoke-hash4", "scfa-numba-cpu", 0.01)
    assert "limit" in row["reason"]


def test_budget_ends_a_sweep_and_a_resumed_one_goes_on(tmp_path):
    from bench.limits import Budget

    assert Budget(None).left(7.0) == 7.0
    assert not Budget(None).spent()
    assert Budget(0.0).spent()
    assert Budget(100.0).left(7.0) == 7.0
    assert 90 < Budget(100.0).left() <= 100

    path = tmp_path / "some.json"
    arguments = ("--case", "smoke", "--method", "naive", "--seconds", 0, "--json", path)
    out = bench(*arguments, "--budget", 0)
    assert "7 cases not reached" in out
    bench(*arguments)
    assert len({row["case"] for row in json.loads(path.read_text())["rows"]}) == 7


def test_gpu_set_begins_with_the_goals():
    from bench.cases import SETS, select

    names = [case.name for case in select(["gpu"])]
    assert names[:6] == [case.name for case in SETS["goal"]()]
    assert len(set(names)) == len(names)


def test_tile_pairs_by_hand():
    import torch

    import scfa_core as scfa
    from bench.inputs import tile_pairs

    q = torch.zeros(1, 1, 256, 16)
    # Rows of 64: the first two stretches see keys of one block of 128, the others of both.
    assert tile_pairs(scfa.make_plan(scfa.Causal(), q, q)) == (1 + 1 + 2 + 2) * 64 * 128
    none = torch.zeros(1, 1, 256, dtype=torch.bool)
    assert tile_pairs(scfa.make_plan(scfa.QKSparse(none, none), q, q)) == 0


def test_every_cpu_case_runs():
    from bench.cases import every_case

    names = [case.name for case in every_case().values() if case.device == "cpu"]
    modes = ("forward", "backward", "both", "plan", "planned")
    line = ("--case", *names, "--method", "scfa-numba-cpu", "--mode", *modes)
    out = bench(*line, "--smoke")
    assert "not run" not in out
    shown = {tuple(row.split()[:3]) for row in out.splitlines() if " ms " in row}
    assert shown == {(name, "scfa-numba-cpu", mode) for name in names for mode in modes}


def test_a_smoke_run_is_not_stored_and_a_cache_is_set_before_compiling(tmp_path, monkeypatch):
    import os

    from bench import run

    path = tmp_path / "smoke.json"
    with pytest.raises(SystemExit, match="leave --json out"):
        run.main(["--case", "smoke", "--smoke", "--json", str(path)])
    assert not path.exists()

    monkeypatch.setattr(os, "environ", dict(os.environ))
    line = ["--case", "smoke-dense", "--method", "naive", "--smoke", "--cache", str(tmp_path / "c")]
    assert run.main(line) == 0
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path / "c"))


def test_every_case_that_is_promised_exists():
    from bench.cases import SETS, every_case

    cases = {case for case in every_case().values() if case.device == "cuda"}
    a = [case for case in cases if (case.batch, case.heads, case.head_dim) == (4, 48, 64)]
    assert {case.number for case in a if case.kind == "hash"} == {2, 4, 8, 16, 32, 64, 128}
    assert {case.number for case in a if case.kind == "qk"} == {10, 30, 50, 70, 90}
    assert {case.seqlen // 1024 for case in cases} == {1, 2, 4, 8, 16, 32, 64, 128}
    assert {case.head_dim for case in cases} == {64, 128, 256}
    assert any(case.heads > case.heads_kv for case in cases)
    assert {"ranges", "docs", "window", "samehash"} < {case.kind for case in cases}
    assert {case.dtype for case in cases} == {"bfloat16", "float16"}
    model = list(SETS["language-model"]())
    assert {case.batch * case.seqlen for case in model} == {32768}
    assert {(case.heads, case.head_dim) for case in model} == {(12, 64)}
    assert all(case.device == "cpu" for name in SETS if "cpu" in name for case in SETS[name]())


def test_help_names_every_set_case_method_and_mode(capsys):
    from bench.cases import SETS, every_case
    from bench.methods import METHODS
    from bench.run import MODES, OTHERS, main

    with pytest.raises(SystemExit):
        main(["--help"])
    words = capsys.readouterr().out
    flat = "".join(words.split())
    assert all(f"{name}:" in words for name in SETS)
    assert all(name in flat for name in (*every_case(), *METHODS, *MODES))
    assert all(f"python-m{name.replace(' ', '')}" in flat for name in OTHERS)


def test_a_record_says_what_it_depends_on_and_is_of_one_machine(tmp_path):
    from bench.machine import machine, resumed

    facts = machine("cpu")
    assert facts["libraries"]["numba"]
    assert {"card", "torch", "python", "commit", "changed", "l2", "date"} < set(facts)
    given = machine("cpu", "abc123")
    assert (given["commit"], given["changed"]) == ("abc123", None), "nobody looked"

    path = tmp_path / "record.json"
    begun = {"machine": given, "rows": []}
    assert resumed(path, begun) is begun
    of = {"case": "smoke-dense", "method": "naive", "mode": "forward"}
    rows = [of | {"ms": 1.0}, of | {"reason": "over the limit"}]
    old = {"machine": {"card": given["card"]}, "rows": rows}
    path.write_text(json.dumps(old))
    again = resumed(path, begun)
    assert again["rows"] == rows[:1], "what did not run is tried again"
    assert again["machine"]["resumed"][0]["commit"] == "abc123"
    path.write_text(json.dumps(old | {"machine": {"card": "another"}}))
    with pytest.raises(SystemExit, match="is of another"):
        resumed(path, begun)
    path.write_text(json.dumps({"kind": "accuracy", "machine": given, "rows": []}))
    with pytest.raises(SystemExit, match="holds accuracy, this run makes times"):
        resumed(path, begun)


def test_a_stop_amid_writing_leaves_the_record_that_was_there(tmp_path, monkeypatch):
    from bench import records

    path = tmp_path / "record.json"
    records.write(path, {"rows": [1]})
    monkeypatch.setattr(records.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        records.write(path, {"rows": [1, 2]})
    assert records.read(path) == {"rows": [1]}


def test_ctrl_c_keeps_what_is_there_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    from bench import run

    path = tmp_path / "some.json"
    rows = run.sweep

    def stopped(*args):
        yield next(rows(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "sweep", stopped)
    line = ["--case", "smoke", "--method", "naive", "--seconds", "0", "--json", str(path)]
    assert run.main(line) == 130
    assert f"goes on from {path}" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["rows"]) == 1


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("--json", "no/such/folder/x.json", "a folder that exists"),
        ("--json", ".", "a folder that exists"),
        ("--seconds", "-1", "want seconds, 0 or more, got -1"),
        ("--limit", "soon", "want seconds, 0 or more, got soon"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_timed(capsys, option, value, why):
    from bench import run

    with pytest.raises(SystemExit):
        run.main(["--case", "smoke", f"{option}={value}"])
    assert why in capsys.readouterr().err


def test_an_unknown_subcommand_names_the_known_ones():
    from bench import __main__ as entry

    with pytest.raises(SystemExit, match=r"want one of bench accuracy.*got 'compere'"):
        entry.main(["compere"])


def test_both_is_a_forward_and_a_backward():
    from bench.cases import Case
    from bench.floor import least_bytes, useful_flops

    case = Case("x", 1, 4, 2, 1000, 64, "dense")
    parts = ("forward", "backward")
    assert least_bytes(case, "both") == sum(least_bytes(case, mode) for mode in parts)
    assert useful_flops(case, "both", 7) == sum(useful_flops(case, mode, 7) for mode in parts)


def test_true_lse_and_key_gradients_without_the_methods_own():
    import torch

    from bench.cases import Case
    from bench.inputs import make_inputs, rows_seen, sampled_key_error, true_lse
    from bench.methods import METHODS

    inputs = make_inputs(Case("x", 1, 4, 2, 128, 32, "hash4", "float32", "cpu"))
    rows = torch.arange(128)
    scores = (inputs.q[0, 3].double() @ inputs.k[0, 1].double().T) * 32**-0.5
    scores[~rows_seen(inputs, 0, 3, rows)] = float("-inf")
    assert torch.equal(true_lse(inputs, 3, rows).isinf(), scores.isinf().all(-1))
    torch.testing.assert_close(true_lse(inputs, 3, rows), scores.logsumexp(-1))
    timed = METHODS["naive"](inputs)
    _, dk, dv = timed.both()
    assert sampled_key_error(inputs, None, timed.forward(), dk, dv) < 1e-4
    assert sampled_key_error(inputs, None, timed.forward(), dk, 1.1 * dv) > 0.01
