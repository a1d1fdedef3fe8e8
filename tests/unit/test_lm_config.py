"""What a configuration of the language model says: names of attention, the schedule."""

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the language model needs torch (extra 'torch')")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hash4,window16", "after a comma comes what the last heads see"),
        ("hash4,window16x12", "of 12 heads, got 'hash4,window16x12'"),
        ("hash4,blocks0x1", "after a comma"),
        ("dense,blocks16x1", "blocks are groups beside those of a hash"),
        ("hash4+window8,blocks16x1", "blocks are groups"),
    ],
)
def test_heads_of_two_kinds_held_wrong(name, told, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.lm.attend import attend_for
    from bench.lm.config import Config

    with pytest.raises(SystemExit, match=told):
        attend_for(Config(attention=name))


def test_rates_of_learning(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.lm.config import Config
    from bench.lm.train import learning_rate

    cosine = Config(learning_rate=1.0, warmup=10, steps=110)
    rates = [learning_rate(cosine, step) for step in (0, 9, 10, 60, 110, 500)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1, 0.1])
    flat = Config(learning_rate=1.0, warmup=10, steps=110, schedule="trapezoid", seconds=50.0)
    assert learning_rate(flat, 89) == 1.0
    assert learning_rate(flat, 100) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(flat, 20, seconds=45.0) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(flat, 20, seconds=99.0) == pytest.approx(0.1)
    with pytest.raises(SystemExit, match="schedule must be"):
        learning_rate(Config(schedule="flat"), 200)
