"""Sittings of the language model: failures are kept, budgets hold, stopped runs go on."""

import dataclasses
import json
import time
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the language model needs torch (extra 'torch')")
ROOT = Path(__file__).parents[2]


class Bench:
    """Modules of the bench, a small corpus, and a configuration of a few thousand parameters."""

    def __init__(self, folder):
        from bench.lm import quality, train
        from bench.lm.config import PRESETS
        from bench.lm.data import load_corpus

        self.quality, self.train = quality, train
        self.config = dataclasses.replace(
            PRESETS["tiny"], seqlen=32, tokens_per_step=64, layers=1, steps=40
        )
        text = folder / "text.py"
        text.write_text("def f(x):\n    return x + 1\n" * 200)
        self.corpus = load_corpus(text)
        self.json = folder / "runs.json"

    def sit(self, **options):
        """One sitting; returns the runs that its file then holds."""
        options = {"variants": ["dense"], "seeds": [0], "points": 4} | options
        here = self.train.World(0, 1, "cpu")
        self.quality.run(self.config, self.corpus, here, json_path=self.json, **options)
        return json.loads(self.json.read_text())["runs"] if self.json.exists() else []


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    return Bench(tmp_path)


def test_what_fails_is_kept_with_its_error_and_tried_again(bench, monkeypatch):
    runs = bench.sit(variants=["nonsense", "dense"], commit="abc1234")
    assert [(x["config"]["attention"], x["done"]) for x in runs] == [
        ("nonsense", False),
        ("dense", True),
    ]
    assert "no such attention: 'nonsense'" in runs[0]["error"]
    assert "error" not in runs[1]
    assert [x["machine"]["commit"] for x in runs] == ["abc1234"] * 2

    step = bench.train.Trainer.train_step
    broken = lambda self: step(self) * (torch.nan if self.step > 25 else 1)  # noqa: E731
    monkeypatch.setattr(bench.train.Trainer, "train_step", broken)
    (failed,) = [x for x in bench.sit(seeds=[1]) if x["config"]["seed"] == 1]
    assert "training loss is nan at step 30" in failed["error"]
    assert [point["step"] for point in failed["curve"]] == [10, 20]
    monkeypatch.undo()
    (again,) = [x for x in bench.sit(seeds=[1]) if x["config"]["seed"] == 1]
    assert again["done"]
    assert "error" not in again


@pytest.mark.parametrize(
    ("attention", "packed"),
    [("dense", False), ("drop50", False), ("reformer4", False), ("hash4e,window8x1", True)],
)
def test_losses_by_place_are_those_of_validation(bench, attention, packed):
    from bench.lm.places import by_place, ends

    assert ends(4) == [1, 2, 4]
    config = dataclasses.replace(
        bench.config, seqlen=128, tokens_per_step=256, attention=attention, packed=packed
    )
    trainer = bench.train.Trainer(config, bench.corpus, bench.train.World(0, 1, "cpu"))
    for _ in range(3):
        trainer.train_step()
    found = by_place(trainer, batches=3)
    assert found["ends"] == [8, 16, 32, 64, 128]
    first, *others = found["loss"]
    mean = first / 16 + sum(loss / 2**n for n, loss in zip((4, 3, 2, 1), others, strict=True))
    assert mean == pytest.approx(trainer.validate(3), rel=1e-5)


def test_a_checkpoint_from_before_a_field_has_its_default(bench, tmp_path):
    def trainer(**options):
        config = dataclasses.replace(bench.config, **options)
        return bench.train.Trainer(config, bench.corpus, bench.train.World(0, 1, "cpu"))

    path, first = tmp_path / "checkpoint.pt", trainer()
    first.train_step()
    first.save(path)
    state = torch.load(path, weights_only=True)
    del state["config"]["packed"]
    torch.save(state, path)
    with pytest.raises(SystemExit, match=r"of another run: {'packed': False}"):
        trainer(packed=True).resume(path)
    second = trainer()
    second.resume(path)
    assert second.step == 1


def test_no_run_begins_that_would_not_end_in_the_budget(bench, capsys):
    bench.config = dataclasses.replace(bench.config, seconds=5.0)
    assert bench.sit(budget=4.0) == []
    assert "not begun, the budget is spent" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_stops_with_the_budget_and_a_checkpoint_takes_it_up(
    bench, monkeypatch, tmp_path, kept
):
    folder = tmp_path / "checkpoints" if kept else None
    whole = bench.sit(seeds=[0])[0]["curve"]
    bench.json.unlink()

    step, clock = bench.train.Trainer.train_step, [0.0]
    steady = types.SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(bench.quality, "time", steady)

    def slow(self):
        clock[0] += 6.0 * (self.step == 20)  # step 30 is where the clock is looked at next
        return step(self)

    monkeypatch.setattr(bench.train.Trainer, "train_step", slow)
    (stopped,) = bench.sit(budget=5.0, checkpoints=folder)
    assert not stopped["done"]
    assert stopped["stopped"] == "the budget was spent"
    assert [point["step"] for point in stopped["curve"]] == [10, 20, 30]

    begun = []
    monkeypatch.setattr(
        bench.train.Trainer, "train_step", lambda self: (begun.append(self.step), step(self))[1]
    )
    (ended,) = bench.sit(checkpoints=folder)
    assert begun[0] == (30 if kept else 0)
    assert ended["done"]
    assert [point["step"] for point in ended["curve"]] == [10, 20, 30, 40]
    same = [(a["validation"], b["validation"]) for a, b in zip(whole, ended["curve"], strict=True)]
    assert all(a == b for a, b in same), same
    if kept:
        assert list(folder.iterdir()) == [], "a finished run leaves its checkpoint behind"
