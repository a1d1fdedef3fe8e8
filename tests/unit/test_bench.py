"""The bench runs every CPU recipe, checks what it times, resumes, compares and reports."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
