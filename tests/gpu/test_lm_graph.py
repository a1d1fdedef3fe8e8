"""The language model's training step as one CUDA graph: losses of plain steps, new data each."""

import dataclasses
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 10
VARIANTS = ["none", "dense", "hash16r", "hash16r+window128", "hash16w", "drop50", "reformer16"]
# torch's compiler, optimiser and the mode that forbids waiting warn as their versions please
pytestmark = pytest.mark.filterwarnings("default")


class Lm:
    """Trainers of a small model on text whose lines differ."""

    def __init__(self, torch, backend, folder):
        from bench.lm.config import PRESETS
        from bench.lm.data import load_corpus
        from bench.lm.train import Trainer, World

        self.torch, self.new, self.here = torch, Trainer, World(0, 1, "cuda:0")
        text = folder / "text.py"
        text.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n" for i in range(6000)))
        self.corpus = load_corpus(text)
        self.config = dataclasses.replace(
            PRESETS["tiny"], heads=4, head_dim=64, seqlen=1024, tokens_per_step=4096
        )
        self.config = dataclasses.replace(self.config, backend=backend)

    def trainer(self, attention, graph, **options):
        config = dataclasses.replace(self.config, attention=attention, graph=graph, **options)
        trainer = self.new(config, self.corpus, self.here)
        trainer.warm_up()
        return trainer

    def losses(self, trainer, count=STEPS):
        """Read after the last step, so that none is overwritten by a later one."""
        return self.torch.stack([trainer.train_step() for _ in range(count)]).tolist()


@pytest.fixture
def lm(torch, backend, monkeypatch, tmp_path):
    """With sums in one order: torch's compiler adds up an embedding's gradient by atomics."""
    monkeypatch.syspath_prepend(str(ROOT))
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield Lm(torch, backend, tmp_path)
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


def assert_same_run(graph, plain):
    """Every bit of every loss, of a run that learns."""
    assert graph == plain
    moves = [abs(a - b) for a, b in itertools.pairwise(plain)]
    assert max(moves) > 0.05, "losses that hardly move would hide a replay of old data"


@pytest.mark.parametrize("attention", VARIANTS)
def test_replayed_losses_are_those_of_plain_steps(lm, attention):
    trainer = lm.trainer(attention, graph=True)
    graph = lm.losses(trainer)
    assert trainer.static_step.graph is not None
    assert_same_run(graph, lm.losses(lm.trainer(attention, graph=False)))


@pytest.mark.parametrize("attention", ["hash16r", "drop50"])
def test_compiled_blocks_are_captured(lm, attention):
    graph, plain = (
        lm.losses(lm.trainer(attention, graph=kind, compile="blocks")) for kind in (True, False)
    )
    assert_same_run(graph, plain)


@pytest.mark.parametrize(("attention", "differ"), [("hash16", 4), ("drop50", 4), ("dense", 1)])
def test_hashes_and_drops_are_drawn_anew(lm, attention, differ, monkeypatch):
    """On one batch, with weights that stand."""
    found = []
    for kind in (True, False):
        trainer = lm.trainer(attention, graph=kind, learning_rate=0.0)
        batch = trainer._batch(0)
        monkeypatch.setattr(trainer, "_batch", lambda draw, batch=batch: batch)
        found.append(lm.losses(trainer, 4))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert len(set(found[0])) == differ


def test_a_run_goes_on_from_a_checkpoint(lm, tmp_path):
    first = lm.trainer("hash16r", graph=True)
    lm.losses(first, 5)
    first.validate(1)
    first.bucket_cost()
    first.save(tmp_path / "checkpoint.pt")
    second = lm.trainer("hash16r", graph=True)
    lm.losses(second, 3)  # its graph is of another optimiser's state
    second.resume(tmp_path / "checkpoint.pt")
    assert_same_run(lm.losses(second), lm.losses(first))


@pytest.mark.parametrize("graph", [False, True])
def test_a_step_does_not_wait_for_the_gpu(lm, torch, graph):
    trainer = lm.trainer("hash16r", graph=graph)
    lm.losses(trainer, 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
