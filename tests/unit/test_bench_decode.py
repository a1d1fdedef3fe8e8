"""The table of few queries on many keys: checked calls, a record, a kernel that does not serve."""

import json

import bench_call
import pytest

torch = pytest.importorskip("torch", reason="needs the extra torch")

from_the_checkout = bench_call.from_the_checkout


@pytest.fixture
def decode(from_the_checkout, monkeypatch):
    """The module, with two small steps."""
    from bench import decode

    steps = (decode.Step(1, 4, 2, 16, 300), decode.Step(2, 2, 2, 32, 200, 3))
    monkeypatch.setattr(decode, "STEPS", {"cpu": steps})
    return decode


def test_a_record_and_its_table(decode, tmp_path):
    target = tmp_path / "found.json"
    arguments = ("decode", "--device", "cpu", "--seconds", 0, "--json", target)
    printed = bench_call.bench(*arguments)
    record = json.loads(target.read_text())
    assert [row["keys"] for row in record["rows"]] == [300, 200]
    for row in record["rows"]:
        names = ["torch", "dense", "window1024", "hash16", "hash16, plan given"]
        assert list(row["us"]) == names
        assert all(us > 0 for us in row["us"].values())
    assert "| batch 1, heads 4 / 2, head_dim 16, 1 on 300 |" in printed
    assert bench_call.bench("decode", "--table", target).strip() in printed


def test_a_wrong_result_is_not_timed(decode, monkeypatch):
    attention = decode.scfa.attention
    monkeypatch.setattr(decode.scfa, "attention", lambda *a, **k: attention(*a, **k) * 1.01)
    with pytest.raises(AssertionError, match="relative error"):
        decode.main(["--device", "cpu", "--seconds", "0"])


def test_a_kernel_that_does_not_serve_is_a_dash(decode, monkeypatch):
    def refuses(kernel, caches):
        raise RuntimeError("no available kernel")

    monkeypatch.setattr(decode, "torchs", refuses)
    row = decode.measure(decode.STEPS["cpu"][0], "cpu", torch.float32, 0.0)
    assert row["us"]["torch"] is None
    assert "| - |" in decode.table({"rows": [row]})


def test_without_a_gpu(decode, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu"):
        decode.main([])


def test_the_page_shows_what_was_measured(from_the_checkout):
    from bench import decode

    root = bench_call.ROOT
    page = (root / "docs" / "perf" / "decoding.md").read_text()
    stored = sorted((root / "bench" / "results").glob("decode-*.json"))
    assert stored
    for path in stored:
        record = json.loads(path.read_text())
        assert decode.table(record) in page
        assert f"commit {record['machine']['commit']}" in page
