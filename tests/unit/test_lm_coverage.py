"""Pairs that the Reformer keeps: the closed count is that of its own meter and of a plain loop."""

import dataclasses
import json
from pathlib import Path

import bench_call
import pytest

torch = pytest.importorskip("torch", reason="the language model needs torch (extra 'torch')")
ROOT = Path(__file__).parents[2]
from_the_checkout = bench_call.from_the_checkout


def by_pairs(bucket, chunk):
    """Count pair by pair, in sorted order."""
    order = sorted(range(len(bucket)), key=lambda row: (bucket[row], row))
    chunk_of = {row: place // chunk for place, row in enumerate(order)}
    kept = pairs = 0
    for i in range(len(bucket)):
        for j in range(i):
            same = bucket[i] == bucket[j]
            pairs += same
            kept += same and 0 <= chunk_of[i] - chunk_of[j] <= 1
    return kept, pairs


@pytest.mark.parametrize("seqlen", [1, 7, 64, 93])
@pytest.mark.parametrize("chunk", [1, 8, 20, 200])
def test_pairs_are_those_of_a_plain_loop(seqlen, chunk):
    from bench.lm.coverage import covered_pairs

    torch.manual_seed(seqlen)
    bucket = (torch.randn(3, seqlen).abs() * 2).int()  # uneven
    found = [by_pairs(row, chunk) for row in bucket.tolist()]
    assert covered_pairs(bucket, chunk) == tuple(map(sum, zip(*found, strict=True)))


def test_pairs_are_those_of_the_layers_own_meter():
    from bench.lm.coverage import covered_pairs
    from scfa_core.nn import ReformerAttention

    torch.manual_seed(3)
    layer = ReformerAttention(32, 2, buckets=4, chunk=24, seed=1)
    x = torch.randn(2, 150, 32) + 0.5
    meter = layer.coverage(x)
    (bucket,) = layer.hash(layer._split(layer.query(x)))
    assert covered_pairs(bucket, 24) == (meter.visited, meter.colliding)
    assert meter.visited < meter.colliding


def test_command_measures_random_and_real_queries(tmp_path):
    from bench.lm import coverage
    from bench.lm.config import PRESETS
    from bench.lm.data import load_corpus
    from bench.lm.train import World

    text = tmp_path / "text.py"
    text.write_text((ROOT / "bench" / "lm" / "model.py").read_text())
    kept = tmp_path / "coverage.json"
    for attention in ("hash4", "reformer4"):
        config = dataclasses.replace(
            PRESETS["tiny"], attention=attention, steps=2, tokens_per_step=128, micro_batch=1
        )
        coverage.run(
            config,
            load_corpus(text),
            World(0, 1, "cpu"),
            lengths=[64, 128],
            buckets=[4, 8],
            chunks=[coverage.TWICE, 8],
            draws=2,
            json_path=kept,
        )
        record = json.loads(kept.read_text())
        rows = record["coverage"]
        assert len(rows) == 3 * 2 * 2 * 2
        assert {row["queries"] for row in rows} == {"normal", "untrained", "trained"}
        assert record["loss"] < 6.0
        assert [len(row["by_layer"]) for row in rows[:8]] == [1] * 8
        assert [len(row["by_layer"]) for row in rows[8:]] == [2] * 16
        for row in rows:
            assert 0 < row["coverage"] <= 1
            assert row["bucket_cost"] >= 1
            expected = 8 if row["rule"] == "8" else 2 * row["seqlen"] // row["buckets"]
            assert row["chunk"] == expected
        fixed = {(r["queries"], r["seqlen"]): r["coverage"] for r in rows if r["rule"] == "8"}
        assert fixed["normal", 128] < fixed["normal", 64]
        queries = [r for r in rows if r["queries"] != "normal" and r["rule"] == "8"]
        assert queries[2]["by_layer"] != queries[6]["by_layer"], "training changed no query"
