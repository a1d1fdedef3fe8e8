"""The language-model trainer: variants take steps, resumed runs are the same, results are kept."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import bench_call
import pytest

torch = pytest.importorskip("torch", reason="the language model needs torch (extra 'torch')")
ROOT = Path(__file__).parents[2]

SCRIPT = """
import dataclasses, pathlib, sys, torch
from bench.lm.config import PRESETS
from bench.lm.data import as_words, load_corpus
from bench.lm.model import Mix
from bench.lm.train import Trainer, World
from scfa_core.hashing import angular_hash

folder = pathlib.Path(sys.argv[1])
text = folder / "text.py"
text.write_text("def f(x):\\n    return x + 1\\n" * 400)
corpus = load_corpus(text)
tiny = dataclasses.replace(PRESETS["tiny"], seqlen=64, tokens_per_step=128, steps=4)
here = World(0, 1, "cpu")
names = "dense hash4 hash4c hash4w hash4r hash4e drop50 window16 hash4+window16 naive reformer4"
names += " none hash4r,window16x1 hash4+window16,window8x1 dense,window16x1 hash4r,blocks16x1"
names += " densek window16k drop50k blocks16 blocks16k denseo window16o drop50o"
names += " hash4+window16o hash4,window16ox1 hash4ek hash4rk,blocks16x1 chosen16x2 chosen16x2k"
for name in names.split():
    trainer = Trainer(dataclasses.replace(tiny, attention=name), corpus, here)
    assert trainer.train_step() < 6.0, name
    assert trainer.validate(1) < 6.0, name
    least = 0.2 if name.partition(",")[0].endswith("k") else 1.0  # apart they may miss each other
    assert (trainer.bucket_cost() >= least) == ("hash" in name), name
costs = {}
for name in ("hash4", "hash4c", "hash4w", "hash4r", "hash4e"):
    config = dataclasses.replace(tiny, attention=name, layers=4, seqlen=256, tokens_per_step=512)
    trainer = Trainer(dataclasses.replace(config, steps=40, learning_rate=3e-3), corpus, here)
    for _ in range(25):
        trainer.train_step()
    costs[name] = trainer.bucket_cost()
assert max(costs["hash4w"], costs["hash4c"], costs["hash4r"]) < 0.9 * costs["hash4"], costs
assert costs["hash4e"] < costs["hash4r"], costs
short = corpus._replace(validation=corpus.validation[:40])  # less than one sequence
assert Trainer(dataclasses.replace(tiny, attention="hash4"), short, here).bucket_cost() >= 1.0
packed = dataclasses.replace(tiny, attention="hash4", packed=True)
trainer = Trainer(packed, corpus, here)
assert trainer.train_step() < 6.0
model, hashed = trainer.model, []
directions, to_hash = model.directions(), Mix.rows_to_hash
model.directions = lambda: directions
Mix.rows_to_hash = lambda self, *rows: (hashed.append(to_hash(self, *rows)), hashed[-1])[1]
model.states(torch.tensor([list(b"ab\\0cde\\0f" * 8)]))
seen = list(model.queries(torch.tensor([list(b"ab\\0cde\\0f" * 8)]), directions))
assert len(seen) == tiny.layers
for mine, true in zip(seen, hashed):
    assert torch.equal(mine, true)  # packed as they are trained
Mix.rows_to_hash = to_hash

for name in ("hash4", "hash4r"):
    whole = Trainer(dataclasses.replace(tiny, attention=name), corpus, here)
    losses = [whole.train_step() for _ in range(4)]
    first = Trainer(whole.config, corpus, here)
    first.warm_up()
    assert [first.train_step() for _ in range(2)] == losses[:2]
    first.save(folder / "checkpoint.pt")
    second = Trainer(whole.config, corpus, here)
    second.resume(folder / "checkpoint.pt")
    assert [second.train_step() for _ in range(2)] == losses[2:]
    assert losses[-1] < losses[0]
    assert second.seconds > 0
halves = dataclasses.replace(whole.config, micro_batch=1)
torch_loss = float(Trainer(halves, corpus, here).train_step())
assert abs(torch_loss - float(losses[0])) < 0.05  # other sequences of the same text

both = dataclasses.replace(tiny, attention="hash4+window16")
model = Trainer(both, corpus, here).model
q, v = (torch.randn(2, 2, 64, 32) for _ in range(2))
k = torch.nn.functional.normalize(q, dim=-1)
directions = model.directions()[0]
bucket = angular_hash(q, directions)[0]
ago = torch.arange(64)[:, None] - torch.arange(64)
same = (bucket[..., :, None] == bucket[..., None, :]) & (ago > 0)
seen = ((ago >= 0) & (ago < 16)) | same
wanted = torch.softmax((q @ k.mT * 32**-0.5).masked_fill(~seen, -torch.inf), -1) @ v
got = model.blocks[0].mix.attend(q, k, v, q, directions, None, None)
torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
assert bool((same & (ago >= 16)).any()) and bool((~same & (ago > 0) & (ago < 16)).any())

mixed = dataclasses.replace(tiny, attention="hash4,window16x1")
model = Trainer(mixed, corpus, here).model
directions = model.directions()[0]
bucket = angular_hash(q[:, :1], directions)[0]
seen = torch.cat(
    (
        (bucket[..., :, None] == bucket[..., None, :]) & (ago > 0),
        ((ago >= 0) & (ago < 16)).expand(2, 1, 64, 64),
    ),
    dim=1,
)
scores = (q @ k.mT * 32**-0.5).masked_fill(~seen, -torch.inf)
wanted = torch.softmax(scores, -1).nan_to_num(0.0) @ v
got = model.blocks[0].mix.attend(q, k, v, q[:, :1], directions, None, None)
torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)

wide = dataclasses.replace(tiny, attention="hash4,blocks24x3", heads=4, head_dim=16)
model = Trainer(wide, corpus, here).model
directions = model.directions()[0]
q, v = (torch.randn(2, 4, 64, 16) for _ in range(2))
k = torch.nn.functional.normalize(q, dim=-1)
bucket = angular_hash(q[:, :1], directions)[0]
block = (torch.arange(64) + torch.tensor([0, 8, 16])[:, None]) // 24
assert block[1].tolist() == [0] * 16 + [1] * 24 + [2] * 24
group = torch.cat((bucket, block.expand(2, 3, 64)), dim=1)
seen = (group[..., :, None] == group[..., None, :]) & (ago > 0)
scores = (q @ k.mT * 16**-0.5).masked_fill(~seen, -torch.inf)
wanted = torch.softmax(scores, -1).nan_to_num(0.0) @ v
got = model.blocks[0].mix.attend(q, k, v, q[:, :1], directions, None, None)
torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)

words = as_words(corpus, 1000)
assert words.train.max() < 1000 and len(words.train) < len(corpus.train)
assert len(set(words.train[:7].tolist())) == len({"def", " ", "f", "(", "x", ")", ":"})
print("resumed run is the same run")
"""

GRAPHS = """
import dataclasses, pathlib
from torch._dynamo.testing import CompileCounterWithBackend
from bench.lm.config import PRESETS
from bench.lm.data import load_corpus
from bench.lm.train import Trainer, World

corpus = load_corpus(pathlib.Path("bench/lm/model.py"))
tiny = dataclasses.replace(PRESETS["tiny"], seqlen=64, tokens_per_step=128, layers=2)
for scope, graphs in (("blocks", 3), ("model", 1)):
    names = "hash4 hash4w hash4r,window8x1 hash4e,blocks8x1 drop50 hash4+window16"
    for name in names.split():
        layers = 2 if scope == "blocks" else 1
        config = dataclasses.replace(tiny, attention=name, compile=scope, layers=layers)
        trainer = Trainer(config, corpus, World(0, 1, "cpu"))
        counter = CompileCounterWithBackend("aot_eager")
        model = trainer.model
        for part in [model] if scope == "model" else model.parts():
            part.compile(fullgraph=True, dynamic=False, backend=counter)
        trainer.warm_up()
        trainer.train_step()
        trainer.validate(1)
        wanted = graphs + (scope == "blocks" and model.moments is not None)
        assert counter.frame_count == wanted, (scope, name, counter.frame_count)
print("no graph too many")
"""


def lm(*arguments):
    limit = torch._dynamo.config.recompile_limit  # which the trainer sets
    with torch._dynamo.config.patch(recompile_limit=limit):
        return bench_call.bench(*arguments, module="bench.lm")


def run(*arguments, folder):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_variant_steps_and_a_resumed_run_is_the_same(tmp_path):
    assert "the same run" in run("-c", SCRIPT, str(tmp_path), folder=tmp_path)


def test_layers_share_a_graph_and_validation_needs_none(tmp_path):
    assert "no graph too many" in run("-c", GRAPHS, folder=tmp_path)


def test_commands_keep_their_results_and_the_page_is_made_of_them(tmp_path):
    text = tmp_path / "text.py"
    text.write_text("def f(x):\n    return x + 1\n" * 2000)
    tiny = ["--preset", "tiny", "--text", str(text), "--seqlen", "64", "--tokens-per-step", "128"]
    kept = tmp_path / "quality.json"
    quality = ["quality", *tiny, "--variants", "dense", "hash4"]
    quality += ["--points", "2", "--steps", "12", "--json", str(kept)]
    first = lm(*quality)
    assert first.count("step     12") == 2
    assert "step" not in lm(*quality), "finished runs are trained again"
    assert "seed 1" in lm(*quality, "--seeds", "0", "1")
    runs = json.loads(kept.read_text())["runs"]
    assert [(x["config"]["attention"], x["config"]["seed"], x["done"]) for x in runs] == [
        ("dense", 0, True),
        ("hash4", 0, True),
        ("dense", 1, True),
        ("hash4", 1, True),
    ]
    assert all(x["curve"][-1]["step"] == 12 and len(x["curve"]) > 1 for x in runs)

    timed = tmp_path / "speed.json"
    speed = ["speed", "--preset", "tiny", "--text", str(text), "--warm", "1"]
    speed += ["--repeats", "2", "--lengths", "128", "--tokens-per-step", "128"]
    said = lm(
        *speed,
        "--variants",
        "dense",
        "none",
        "hash4",
        "hash3",
        "--json",
        str(timed),
    )
    assert "hash3            failed" in said
    rows = json.loads(timed.read_text())["rows"]
    assert [("ms" in row, "error" in row) for row in rows] == [(True, False)] * 3 + [(False, True)]
    # The one that also starts as a program.
    assert "budget is spent" in run("-m", "bench.lm", *speed, "--budget", "-1", folder=tmp_path)

    page = tmp_path / "page.md"
    pytest.importorskip("matplotlib", reason="the page has plots (extra 'plot')")
    report = ["report", str(timed), str(kept), "--page", str(page)]
    lm(*report, "--plots", str(tmp_path / "img"))
    text = page.read_text()
    assert text.count("**Not from a GPU.**") == 2
    assert f"| dense | {rows[0]['ms']:.1f} |" in text
    assert "| hash4 | 2 | 12 |" in text
    for theme in ("light", "dark"):
        assert (tmp_path / "img" / f"lm-quality-0-{theme}.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("variant", "adapt"),
    [
        ("hash8", "none"),
        ("hash8c", "center"),
        ("hash8w", "whiten"),
        ("hash8r", "past"),
        ("hash8e", "even"),
    ],
)
def test_the_model_hashes_as_the_public_module_does(variant, adapt, monkeypatch):
    """Same queries, same draws: the variants of the page are `AngularHash(adapt=...)`."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.lm.config import PRESETS
    from bench.lm.model import LanguageModel
    from scfa_core.hashing import angular_hash
    from scfa_core.nn import AngularHash

    config = dataclasses.replace(PRESETS["tiny"], attention=variant, seqlen=96)
    torch.manual_seed(0)
    model = LanguageModel(config)
    sizes = (config.heads, config.head_dim, config.buckets)
    own = [AngularHash(*sizes, adapt=adapt) for _ in model.blocks]
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        text = torch.randint(0, 256, (2, 96), generator=generator)
        torch.manual_seed(10 + step)
        model(text, text)
        torch.manual_seed(10 + step)
        for layer, q in enumerate(model.queries(text, model.directions())):
            own[layer](q)
        model.adapt(max(1 / (step + 1), 0.5))
        if adapt != "none":
            for one in own:
                one.move_centers(0.5)
    torch.manual_seed(2)
    directions = model.directions()
    torch.manual_seed(2)
    drawn = torch.randn(directions.shape)
    drawn = drawn / drawn.norm(dim=3, keepdim=True)
    for layer, q in enumerate(model.queries(text, directions)):
        own[layer].directions.copy_(drawn[layer])
        own_directions, center = model._hash_of(layer, directions)
        mine, _ = model.blocks[layer].mix.buckets(q, own_directions, center)
        public = own[layer].eval()(q)[0][0]
        assert (mine == public).float().mean() > 0.999  # moments are summed in another order
        plain = angular_hash(q, drawn[layer])[0]
        assert torch.equal(mine, plain) is (adapt == "none")


@pytest.mark.parametrize("variant", ["hash4c", "hash4w", "hash4r"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_query_does_not_stay_in_the_moments(monkeypatch, variant, bad):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.lm.config import PRESETS
    from bench.lm.model import Mix
    from bench.lm.moments import Moments, gather

    config = dataclasses.replace(PRESETS["tiny"], attention=variant, seqlen=96)
    mix, found = Mix(config), Moments(config)
    torch.manual_seed(0)
    start = torch.zeros(config.heads, config.head_dim)

    def moments(*layers):
        directions = torch.randn(1, config.heads, config.head_dim, 2)
        follows = variant.endswith("r")
        about = [mix.buckets(q, directions, start)[1] if follows else None for q in layers]
        found(*gather(list(zip(layers, about, strict=True))), 1)
        return found.mean.clone(), found.square.clone()

    q, other = torch.randn(2, 2, config.heads, 96, config.head_dim)
    whole, right = moments(q, other), moments(q[1:], other[1:])
    moments(q, other)
    q[0, 1, 70, 3] = bad
    for mine, of_both, of_second in zip(moments(q, other), whole, right, strict=True):
        torch.testing.assert_close(mine[0, 0], of_both[0, 0])
        torch.testing.assert_close(mine[1], of_both[1])  # nor does another layer know of it
        torch.testing.assert_close(mine[0, 1], of_second[0, 1])  # the sequence does not count
    q[1, 1, 5] = bad
    for mine, of_second in zip(moments(q, other), right, strict=True):
        torch.testing.assert_close(mine[0, 1], of_second[0, 1])  # as before: none is finite


@pytest.mark.parametrize("name", ["hash4", "hash4w", "hash4r", "hash4e", "hash4ek"])
def test_no_bucket_knows_a_later_token(monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.lm.config import PRESETS
    from bench.lm.model import LanguageModel

    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], attention=name, seqlen=200)
    model = LanguageModel(config)
    text = torch.randint(256, (2, 200))
    for _ in range(3):
        model(text, text)
        model.adapt(0.5)
    model.requires_grad_(False)
    other = torch.cat((text[:, :150], torch.randint(256, (2, 50))), dim=1)

    def buckets(tokens):
        torch.manual_seed(1)
        directions = model.directions()
        found = []
        for layer, q in enumerate(model.queries(tokens, directions)):
            drawn, center = model._hash_of(layer, directions)
            found.append(model.blocks[layer].mix.buckets(q, drawn, center)[0])
        return torch.stack(found)

    first, second = buckets(text), buckets(other)
    assert torch.equal(first[..., :150], second[..., :150])
    assert not torch.equal(first, second)


def test_kernels_are_summed_by_part_of_the_step(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from torch.autograd import DeviceType

    from bench.lm import kernels

    class Event:
        def __init__(self, key, microseconds, count, device=DeviceType.CUDA):
            self.key, self.count, self.device_type = key, count, device
            self.self_device_time_total = microseconds

    class Record:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def key_averages(self):
            return [
                Event("scfa_fwd_sm90", 4000, 24),
                Event("nvjet_sm90_tst_128x256", 30000, 100),
                Event("triton_poi_fused_gelu", 6000, 24),
                Event("Memset (Device)", 10, 48),
                Event("aten::mm", 5, 7, DeviceType.CPU),
                Event("scfa_bwd_dq_sm90", 8000, 24),
            ]

    monkeypatch.setattr(kernels, "profile", lambda **_: Record())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    steps = []
    facts = kernels.profile_steps(lambda: steps.append(1), steps=2)
    assert len(steps) == 2
    assert facts["groups"] == pytest.approx(
        {"scfa": 6.0, "matrix products": 15.0, "compiled pointwise": 3.0, "memory": 0.005}
    )
    assert facts["kernels"][0] == ("nvjet_sm90_tst_128x256", 15.0, 50)
    said = kernels.lines(facts)
    assert said[0].startswith("  GPU busy 24.0 ms a step: matrix products 15.00, scfa 6.00")
    assert "4.000 ms     12 x  scfa_bwd_dq_sm90" in said[2]
