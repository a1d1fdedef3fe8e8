"""The bench runs every CPU recipe, checks what it times, resumes, compares and reports."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch):
    """`bench` is not installed: it is imported from the root of the checkout."""
    monkeypatch.syspath_prepend(str(ROOT))


def bench(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


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
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "smoke" in done.stderr


def test_accuracy_is_measured_and_becomes_a_page(tmp_path):
    path, page = tmp_path / "accuracy.json", tmp_path / "accuracy.md"
    small = ("--pattern", "hash", "ranges", "--dtype", "float32", "--seqlen", 80, "--seeds", 1)
    bench("accuracy", *small, "--json", path)
    rows = json.loads(path.read_text())["rows"]
    assert [row["pattern"] for row in rows] == ["hash", "ranges"]
    for row in rows:
        for side in ("ours", "torch"):
            assert 0 < row[side]["dq"]["norm"] < 1e-5
            assert 0 < row[side]["out"]["max"] < 1e-5
        assert 0 < row["of_allowed"] <= 1
    bench("report", path, "--page", page)
    assert "| hash | " in page.read_text()


def test_accuracy_counts_a_wrong_or_infinite_entry():
    import numpy as np

    from bench.accuracy import TENSORS, errors
    from scfa_core.testing import Results

    true = Results(*(np.array([1.0, -np.inf]) for _ in TENSORS))
    assert errors(true, true)["out"] == {"max": 0.0, "norm": 0.0}
    off = true._replace(dq=np.array([1.5, -np.inf]), dk=np.array([1.0, 0.0]))
    assert errors(off, true)["dq"] == {"max": 0.5, "norm": 0.5}
    assert errors(off, true)["dk"]["max"] == np.inf


def timed(case, method, ms, density=0.5, mode="forward"):
    spread = {"ms": ms, "low": ms, "high": ms, "density": density}
    return {"case": case, "method": method, "mode": mode, **spread}


def test_crossover_and_growth_are_where_the_lines_say():
    from bench.plots import by_length, crossover, exponent, speedups

    rows = []
    for case, density, ms in (
        ("cpu-dense-4k", 0.5, 200),
        ("cpu-hash2-4k", 0.25, 100 * 2**0.5),
        ("cpu-hash8-4k", 0.0625, 100 / 2**0.5),
        ("cpu-hash32-4k", 0.015625, 10),
    ):
        rows += [timed(case, "scfa-numba-cpu", ms, density), timed(case, "sdpa-flash", 100)]
    ((name, points),) = speedups({"rows": rows}, "forward").items()
    assert "hash, T=4096" in name
    assert [round(row["speedup"], 2) for _, row in points] == [10, 1.41, 0.71, 0.5]
    assert abs(crossover(points) - 0.25) < 1e-3
    assert crossover(points[:2]) is None

    grown = [timed(f"growth-{n}k", "scfa-cupy", 2.0 * n) for n in (64, 128)]
    ((_, points),) = by_length({"rows": grown}, "forward", growth=True).items()
    assert abs(exponent(points) - 1) < 1e-9
    assert not by_length({"rows": grown}, "forward", growth=False)


def test_report_draws_both_themes_and_fills_only_its_section(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import report

    rows = [timed(f"cpu-hash16-{n}k", "scfa-numba-cpu", n) for n in (1, 4)]
    facts = {
        "card": "none",
        "torch": "0",
        "commit": "abc",
        "date": "2026-01-01T00:00",
        "threads": 1,
    }
    path = tmp_path / "few.json"
    path.write_text(json.dumps({"machine": facts, "rows": rows}))
    page = tmp_path / "page.md"
    report.main([str(path), "--plots", str(tmp_path / "img"), "--page", str(page)])
    for theme in ("light", "dark"):
        assert (tmp_path / "img" / f"few-length-{theme}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"img/few-length-{theme}.png" in page.read_text()

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_readme("| new |", readme)
    assert readme.read_text() == f"before\n{report.BEGIN}\n| new |\n{report.END}\nafter\n"


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


def synthetic_h100():
    """Rows of invented times, which every plot and table of a card's page can be drawn from."""
    rows = []
    for seqlen in (8, 16, 32):
        for case, method, rate in (
            (f"A-hash16-{seqlen}k", "scfa-cupy", 1.0),
            (f"A-dense-{seqlen}k", "sdpa-cudnn", 4.0),
        ):
            for mode, factor in (("forward", 1.0), ("backward", 2.5)):
                rows.append(
                    timed(case, method, rate * factor * seqlen, 0.1, mode)
                    | {"tflops": 100.0, "floor_ms": 0.5, "floor_by": "bytes", "floor_share": 0.5}
                    | {"floor_bytes_share": 0.5, "floor_flops_share": 0.25}
                    | {"extra_bytes": 2**31, "host_us": None, "pairs": 100}
                    | {"tile_pairs": 150 if method == "scfa-cupy" else None}
                )
    rows += [timed("growth-64k", "scfa-cupy", 10.0), timed("growth-128k", "scfa-cupy", 21.0)]
    rows.append(timed("A-hash16-1k", "scfa-cupy", 0.1, mode="planned") | {"host_us": 31.4})
    rows.append(timed("A-hash16-16k", "scfa-cupy", 9000.0, mode="jit-cold"))
    rows.append({"case": "A-hash16-16k", "method": "original", "mode": "-", "reason": "no file"})
    facts = {"card": "SYNTHETIC", "torch": "0", "commit": "abc", "date": "2026-01-01T00:00"}
    return {"machine": facts, "rows": rows}


def test_paper_figure_adds_forward_and_backward_at_its_shape_only():
    from bench.plots import paper

    record = synthetic_h100()
    for case in ("B-dense-16k", "A-hash2-16k"):  # another shape, and one length alone
        record["rows"] += [timed(case, "scfa-cupy", 1.0, mode=m) for m in ("forward", "backward")]
    series = paper(record, "forward")
    assert set(series) == {"scfa-cupy, hash16", "sdpa-cudnn, dense"}
    assert [(x, row["ms"]) for x, row in series["scfa-cupy, hash16"]] == [
        (8192, 28.0),
        (16384, 56.0),
        (32768, 112.0),
    ]
    assert paper(record, "backward") == {}


def test_page_of_a_card_has_every_plot_and_table(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import report

    path, page = tmp_path / "card.json", tmp_path / "page.md"
    path.write_text(json.dumps(synthetic_h100()))
    report.main([str(path), "--plots", str(tmp_path / "img"), "--page", str(page)])
    text = page.read_text()
    for name in ("length", "paper", "rate", "floor", "memory"):
        for theme in ("light", "dark"):
            assert (tmp_path / "img" / f"card-{name}-{theme}.png").exists(), name
            assert f"img/card-{name}-{theme}.png" in text
    assert "| A-hash16-32k | scfa-cupy | forward | 100 | 150 | 0.5 | bytes | 50 | 25 |" in text
    assert "| A-dense-32k | sdpa-cudnn | forward | 100 | - | 0.5 | bytes | 50 | 25 |" in text
    assert "| scfa-cupy | forward | 64k | 128k | 2.10x |" in text
    # 4 * 48 * 32768 rows of 128 bytes are 768 MiB: 2048 MiB less one result forward
    assert "| A-hash16-32k | scfa-cupy | forward | 1280.0 | 213.3 |" in text
    assert "| A-hash16-8k | scfa-cupy | backward | 1472.0 | 981.3 |" in text
    assert "| A-hash16-1k | scfa-cupy | planned | 31 |" in text
    assert "| A-hash16-16k | scfa-cupy | jit-cold | 9.00 |" in text
    assert "- original: no file (A-hash16-16k)" in text


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


def test_a_peer_that_raises_costs_only_its_own_rows(monkeypatch):
    import argparse

    from bench import run

    def broken(inputs):
        raise ZeroDivisionError("of a peer\nmore")

    monkeypatch.setitem(run.METHODS, "flex", broken)
    options = {"original": None, "mode": ["forward"], "budget": None, "case": ["smoke-dense"]}
    options |= {"method": ["flex", "naive"], "limit": None, "seconds": 0.0}
    options |= {"gbps": None, "tflops": None}
    first, second = run.sweep(argparse.Namespace(**options), set())
    assert first["reason"] == "ZeroDivisionError: of a peer"
    assert first["failed"]
    assert second["method"] == "naive"
    assert second["ms"] > 0


def test_a_file_that_is_not_the_original_says_why(tmp_path):
    from bench.cases import Case
    from bench.inputs import Inputs
    from bench.methods import CannotRun, original

    case = Case("x", 1, 2, 2, 128, 64, "hash4")
    inputs = Inputs(case, None, None, None, None, None, None, None)
    empty, broken = tmp_path / "empty.py", tmp_path / "broken.py"
    empty.write_text("")
    broken.write_text("raise ValueError('old triton')")
    for path, words in (
        (tmp_path / "none.py", "no Python file"),
        (empty, "no dynamic_sparse_attention"),
        (broken, "does not import: old triton"),
    ):
        with pytest.raises(CannotRun, match=words):
            original(str(path))(inputs)


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


@pytest.fixture
def flex_on_host(monkeypatch):
    """FlexAttention without its compiler and, as it has none on a CPU, without a backward."""
    import torch

    from bench import flex, timed

    def forward_only(inputs, run):
        return timed.Timed(lambda: run(inputs.q, inputs.k, inputs.v))

    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    monkeypatch.setattr(flex, "autograd", forward_only)
    return flex.flex


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_sorts_builds_and_permutes_in_the_timed_call(flex_on_host):
    from bench.cases import Case
    from bench.inputs import make_inputs, sampled_error

    inputs = make_inputs(Case("x", 1, 2, 2, 256, 32, "hash4", "float32", "cpu"))
    timed = flex_on_host(inputs)
    assert sampled_error(inputs, timed.forward()) < 1e-4
    inputs.q_ids.copy_(inputs.q_ids.flip(-1))  # a new pattern must reach the next whole call
    assert sampled_error(inputs, timed.forward()) < 1e-4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pattern", ["dense", "samehash4", "qk50", "window64", "docs3", "ranges64"])
def test_flex_serves_every_recipe(flex_on_host, pattern):
    from bench.cases import Case
    from bench.inputs import make_inputs, sampled_error

    inputs = make_inputs(Case("x", 2, 2, 2, 256, 32, pattern, "float32", "cpu"))
    timed = flex_on_host(inputs)
    assert sampled_error(inputs, timed.forward()) < 1e-4
    assert (timed.plan is None) == (pattern in ("dense", "window64"))


def test_varlen_on_sorted_rows_against_float64(monkeypatch):
    import types

    import torch
    from torch.nn import functional

    from bench import methods
    from bench.cases import Case
    from bench.inputs import make_inputs, sampled_error

    def by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        ends = cu_seqlens_q.tolist()
        parts = []
        for i, j in itertools.pairwise(ends):
            assert j - i <= max_seqlen_q
            part = (x[i:j].transpose(0, 1) for x in (q, k, v))
            out = functional.scaled_dot_product_attention(*part, is_causal=causal)
            parts.append(out.transpose(0, 1))
        return torch.cat(parts)

    peer = types.SimpleNamespace(flash_attn_varlen_func=by_sequence)
    monkeypatch.setattr(methods, "_import", lambda module: peer)
    inputs = make_inputs(Case("x", 2, 2, 2, 256, 32, "samehash4", "float32", "cpu"))
    timed = methods.flash_varlen(inputs)
    out, (dq, _, _) = timed.forward(), timed.backward()
    assert sampled_error(inputs, out, dq) < 1e-4
