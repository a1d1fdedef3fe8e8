"""Errors against float64 beside torch's own: measured, stored row by row, made a page."""

import json

import bench_call
import pytest

from_the_checkout = bench_call.from_the_checkout
bench = bench_call.bench


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


def test_accuracy_is_stored_row_by_row_resumed_and_of_one_kind_of_memory(tmp_path, capsys):
    from bench import accuracy

    path = tmp_path / "accuracy.json"

    def run(*arguments):
        small = ("--dtype", "float32", "--seqlen", "48", "--seeds", "1", "--json", str(path))
        assert accuracy.main([*small, *arguments]) == 0
        return capsys.readouterr().out

    assert run("--pattern", "hash", "--budget", "0") == ""
    run("--pattern", "hash", "--commit", "abc123")
    assert json.loads(path.read_text())["machine"]["commit"] == "abc123"
    out = run("--pattern", "hash", "window")
    assert "hash" not in out
    assert "window" in out
    assert [row["pattern"] for row in json.loads(path.read_text())["rows"]] == ["hash", "window"]
    with pytest.raises(SystemExit, match="holds other seeds: 1"):
        run("--seeds", "2")
    with pytest.raises(SystemExit, match="files of their own"):
        run("--backend", "numba-cpu", "cupy")


@pytest.mark.parametrize(("backend", "words"), [("foo", "invalid choice"), ("cupy", "CUDA device")])
def test_a_backend_that_cannot_be_measured_here_is_refused(monkeypatch, capsys, backend, words):
    from bench import accuracy

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        accuracy.main(["--backend", backend])
    assert words in capsys.readouterr().err + str(stop.value)


def test_the_page_of_several_backends_has_a_table_for_each(tmp_path):
    from bench.accuracy_page import markdown

    cell = {"max": 0.5, "norm": 0.25}
    row = {
        "pattern": "hash",
        "dtype": "float16",
        "ours": dict.fromkeys(("out", "lse", "dq", "dk", "dv"), cell),
        "torch": dict.fromkeys(("out", "lse", "dq", "dk", "dv"), cell),
        "of_allowed": 0.5,
    }
    refused = {"pattern": "hash", "dtype": "float64", "backend": "cupy", "reason": "no float64"}
    facts = {"card": "X", "torch": "0", "commit": "abc", "date": "2026-01-01T00:00"}
    text = markdown(
        {
            "machine": facts,
            "sizes": {"seqlen": 48},
            "seeds": 1,
            "rows": [row | {"backend": "cupy"}, row | {"backend": "numba-cuda"}, refused],
        }
    )
    assert "## `cupy`, `numba-cuda`" in text
    assert text.count("| hash | 2.5e-01 / 2.5e-01 |") == 2
    for heading in ("### `cupy`, float16", "### `numba-cuda`, float16"):
        assert heading in text
    assert "float64" not in text
