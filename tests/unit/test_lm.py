"""The language-model trainer: every variant takes a step, and a resumed run is the same run."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import dataclasses, pathlib, sys
from bench.lm.config import PRESETS
from bench.lm.data import load_corpus
from bench.lm.train import Trainer, World

folder = pathlib.Path(sys.argv[1])
text = folder / "text.py"
text.write_text("def f(x):\\n    return x + 1\\n" * 400)
corpus = load_corpus(text)
tiny = dataclasses.replace(PRESETS["tiny"], seqlen=64, tokens_per_step=128, steps=4)
here = World(0, 1, "cpu")
names = "dense hash4 drop50 window16 hash4+window16 naive reformer4 none"
for name in names.split():
    trainer = Trainer(dataclasses.replace(tiny, attention=name), corpus, here)
    assert trainer.train_step() < 6.0, name
    assert trainer.validate(1) < 6.0, name
packed = dataclasses.replace(tiny, attention="hash4", packed=True)
assert Trainer(packed, corpus, here).train_step() < 6.0

whole = Trainer(dataclasses.replace(tiny, attention="hash4"), corpus, here)
losses = [whole.train_step() for _ in range(4)]
first = Trainer(whole.config, corpus, here)
assert [first.train_step() for _ in range(2)] == losses[:2]
first.save(folder / "checkpoint.pt")
second = Trainer(whole.config, corpus, here)
second.resume(folder / "checkpoint.pt")
assert [second.train_step() for _ in range(2)] == losses[2:]
assert losses[-1] < losses[0]
print("resumed run is the same run")
"""


def test_every_variant_steps_and_a_resumed_run_is_the_same(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same run" in done.stdout
