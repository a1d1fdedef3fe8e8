"""Runs that end by time: at the seconds asked for, and on all processes at the same step."""

import hashlib
import json
import os
import sys
import types
from pathlib import Path

import bench_call
import pytest
from ranks import run_ranks

torch = pytest.importorskip("torch", reason="the language model needs torch (extra 'torch')")
if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
from_the_checkout = bench_call.from_the_checkout

RANKS = 2
TICKS = (0.1, 0.25)  # seconds of a step by the clock of each rank
TINY = "--preset tiny --layers 1 --seqlen 32 --tokens-per-step 128"
# Command and the step at which it ends by the clock of rank 0.
CASES = {
    "seconds": ("train --seconds 1.95 --attention dense --out {folder}/seconds", [20]),
    "minutes": ("train --minutes 0.0325 --attention dense --out {folder}/minutes", [20]),
    "steps": ("train --seconds 9 --steps 12 --attention dense --out {folder}/steps", [12]),
    "quality": ("quality --seconds 1.95 --variants dense none --budget 5", [20, 20]),
    "budget": ("quality --variants dense none --budget 1.5", [20]),
}


def counted(patch, tick):
    """Trainers, as they take a first step; with every step all clocks go `tick` seconds on.

    What rank 1 reads as its loss is no number, which is not for it to stop at.
    """
    from bench.lm import __main__ as command
    from bench.lm import quality, train

    now, trainers = [100 * tick], []
    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    step = train.Trainer.train_step

    def slow(self):
        if self not in trainers:
            trainers.append(self)
        loss = step(self)
        now[0] += tick
        return loss * torch.nan if self.where.rank else loss

    for module in (command, quality, train):
        patch.setattr(module, "time", clock)
    patch.setattr(train.Trainer, "train_step", slow)
    return trainers


def command_line(name, folder):
    """The arguments of one case."""
    words = f"{CASES[name][0]} {TINY} --text {folder}/text.py".format(folder=folder)
    if not words.startswith("train"):
        words += f" --json {folder}/{name}.json --points 2"
    return ["bench.lm", *words.split(), *([] if "--steps" in words else ["--steps", "400"])]


def weights(trainer):
    """All of a trainer's weights in a word."""
    content = b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())
    return hashlib.sha256(content).hexdigest()


def work(rank, folder):
    """One process: every case, in one group; writes where its trainers ended.

    A group for each case, taken down after it, left a process waiting for good once in a while.
    """
    from bench.lm import __main__ as command
    from bench.lm import train

    found = {}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    store = torch.distributed.FileStore(f"{folder}/store", RANKS)
    train.dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    with pytest.MonkeyPatch.context() as patch:
        trainers = counted(patch, TICKS[rank])
        patch.setattr(train.dist, "init_process_group", lambda backend: None)
        patch.setattr(train.dist, "destroy_process_group", lambda: None)
        for name in CASES:
            trainers.clear()
            patch.setattr(sys, "argv", command_line(name, folder))
            command.main()
            found[name] = [(trainer.step, weights(trainer)) for trainer in trainers]
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))
    train.dist.barrier()  # both leave together


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.py").write_text("def f(x):\n    return x + 1\n" * 400)
    return tmp_path


@pytest.mark.slow
def test_the_leading_clock_is_everybodys(folder):
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    run_ranks(__file__, RANKS, folder, timeout=300, **environment)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS))
    assert {name: [step for step, _ in ends] for name, ends in first.items()} == {
        name: steps for name, (_, steps) in CASES.items()
    }
    assert first == second, "ranks ended elsewhere or with other weights"


@pytest.mark.parametrize("name", ["seconds", "minutes"])
def test_train_ends_with_its_time(folder, monkeypatch, name):
    from bench.lm import __main__ as command

    trainers = counted(monkeypatch, TICKS[0])
    words = command_line(name, folder)
    words[words.index("--tokens-per-step") + 1] = "64"
    monkeypatch.setattr(sys, "argv", words)
    command.main()
    assert [trainer.step for trainer in trainers] == CASES[name][1]


def test_alone_a_value_is_its_own(monkeypatch):
    from bench.lm.train import World

    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_: pytest.fail("no one is there"))
    assert World(0, 1, "cpu").agree(0.1) == 0.1


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
    os._exit(0)  # a thread of gloo that wants the GIL while Python finalizes aborts the process
