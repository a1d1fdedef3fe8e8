"""Steps on inputs that stay in place are the ordinary steps; all of a graph but its capture."""

import contextlib
import dataclasses
import json
from pathlib import Path

import bench_call
import pytest

torch = pytest.importorskip("torch", reason="the language model needs torch (extra 'torch')")
ROOT = Path(__file__).parents[2]
VARIANTS = ["none", "dense", "hash4r", "hash4+window16", "drop50", "reformer4"]


def addresses(trainer):
    """Where everything lies that a graph of this trainer's step would know."""
    state = [
        x for one in trainer.optimizer.state.values() for _, x in sorted(one.items())
    ]  # a new tensor after `load_state_dict`
    known = [*trainer.model.parameters(), *trainer.model.buffers(), *state, trainer.rate]
    known += [x for batch in trainer.static_step.inputs for x in batch]
    return [x.data_ptr() for x in known]


class Lm:
    """The trainer, a small corpus, and graphs that a CPU can replay: they run the step again."""

    def __init__(self, folder):
        from bench.lm import graph, quality, speed, train
        from bench.lm.config import PRESETS
        from bench.lm.data import load_corpus

        self.graph, self.quality, self.speed, self.train = graph, quality, speed, train
        self.config = dataclasses.replace(
            PRESETS["tiny"], seqlen=64, tokens_per_step=128, micro_batch=1, steps=20
        )
        text = folder / "text.py"
        text.write_text("def f(x):\n    return x + 1\n" * 400)
        self.corpus = load_corpus(text)
        self.captures = captures = []

        class Replay:
            """What a graph does: the same step at the same addresses, its loss always in one."""

            def __init__(self, step, trainer):
                self.step, self.trainer, self.known = step, trainer, addresses(trainer)

            def replay(self):
                assert addresses(self.trainer) == self.known, "a graph would write elsewhere"
                self.step.loss.copy_(self.step.advance(self.step.inputs))

        class Emulated(graph.GraphStep):
            """A graph's order of events on a CPU."""

            @staticmethod
            def new_stream():
                return None

            def run_beside(self):
                assert self.graph is None
                return self.advance(self.inputs)

            def capture(self):
                trainer = self.advance.__self__
                assert trainer._began is None, "the clock runs while a step is captured"
                assert all(group["capturable"] for group in trainer.optimizer.param_groups)
                assert all(x.grad is None for x in trainer.model.parameters())
                captures.append(trainer.step)
                self.graph, self.due = Replay(self, trainer), False
                self.loss = torch.full((), torch.nan)

        self.Emulated = Emulated

    def trainer(self, attention, step=None, **options):
        config = dataclasses.replace(self.config, attention=attention, **options)
        trainer = self.train.Trainer(config, self.corpus, self.train.World(0, 1, "cpu"))
        if step is not None:
            trainer.static_step = step(trainer.advance)
        return trainer


@pytest.fixture
def lm(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    return Lm(tmp_path)


@pytest.fixture
def graphs_run_here(lm, monkeypatch):
    monkeypatch.setattr(lm.train, "GraphStep", lm.Emulated)
    monkeypatch.setattr(lm.train, "refusal", lambda *_: None)


def steps(trainer, count):
    """Losses of some steps, read after the last: none may be overwritten by a later one."""
    losses = [trainer.train_step() for _ in range(count)]
    return [float(loss) for loss in losses]


@pytest.mark.parametrize("attention", VARIANTS)
@pytest.mark.parametrize("kind", ["StaticStep", "Emulated"])
def test_static_steps_are_the_ordinary_ones_and_go_on_from_a_checkpoint(
    lm, tmp_path, attention, kind
):
    step = lm.graph.StaticStep if kind == "StaticStep" else lm.Emulated
    plain = lm.trainer(attention)
    right = steps(plain, 6)
    assert len(set(right)) == 6

    static = lm.trainer(attention, step)
    static.warm_up()
    assert steps(static, 3) == right[:3]
    assert lm.captures == ([1] if kind == "Emulated" else [])
    static.validate(1)
    static.bucket_cost()
    static.save(tmp_path / "checkpoint.pt")
    assert steps(static, 3) == right[3:]
    assert static.validate(2) == plain.validate(2)

    other = lm.trainer(attention, step)
    other.resume(tmp_path / "checkpoint.pt")
    assert steps(other, 3) == right[3:]
    static.resume(tmp_path / "checkpoint.pt")  # a graph of before would not serve
    assert steps(static, 3) == right[3:]
    assert lm.captures == ([1, 4, 4] if kind == "Emulated" else [])
    for mine, theirs in zip(other.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_replay_sees_that_the_optimiser_moved(lm, tmp_path):
    """The emulation would notice a graph kept too long."""
    trainer = lm.trainer("dense", lm.Emulated)
    steps(trainer, 3)
    trainer.save(tmp_path / "checkpoint.pt")
    kept = trainer.static_step
    trainer.resume(tmp_path / "checkpoint.pt")
    trainer.static_step = kept
    with pytest.raises(AssertionError, match="write elsewhere"):
        trainer.train_step()


@pytest.mark.parametrize("attention", [*VARIANTS, "hash4w"])
def test_a_step_reads_no_value_of_a_tensor(lm, attention):
    """What would make the host wait cannot be captured."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket._qualified_op_name)
            return function(*args, **(kwargs or {}))

    trainer = lm.trainer(attention, lm.graph.StaticStep)
    steps(trainer, 2)
    with Watch():
        trainer.advance(trainer.static_step.inputs)
    assert "aten::_fused_adamw_" in seen
    waits = {"_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "equal", "masked_select"}
    assert not waits & {name.removeprefix("aten::") for name in seen}
    if attention != "reformer4":  # it assigns a number to a slice, which is a fill
        assert "aten::lift_fresh" not in seen, "data of the host would be copied to the GPU"


def test_random_numbers_of_a_replay_are_new_and_those_of_the_seed(lm, monkeypatch):
    """On one batch with weights that stand, losses differ by hashes and drops alone."""
    for attention, differ in (("hash4", True), ("drop50", True), ("dense", False)):
        found = []
        for step in (None, lm.Emulated):
            trainer = lm.trainer(attention, step, learning_rate=0.0)
            batch = trainer._batch(0)
            monkeypatch.setattr(trainer, "_batch", lambda draw, batch=batch: batch)
            found.append(steps(trainer, 4))
        assert found[0] == found[1]
        assert len(set(found[0])) == (4 if differ else 1), attention


def test_streams_about_a_capture(lm, monkeypatch):
    """The real `GraphStep`, with a recorder in place of `torch.cuda`."""
    did, current = [], ["default"]

    class Stream:
        def wait_stream(self, other):
            did.append(("wait", self.name, other.name))

        def __init__(self, name="side"):
            self.name = name

    default = Stream("default")

    @contextlib.contextmanager
    def on(stream):
        current[:] = [stream.name]
        yield
        current[:] = ["default"]

    @contextlib.contextmanager
    def capturing(graph, stream):
        current[:] = [stream.name, "captures"]
        yield  # as torch's own, which does not return where the capture failed
        current[:] = ["default"]

    class Graph:
        def replay(self):
            did.append(("replay", *current))

    def set_stream(stream):
        current[:] = [stream.name]

    for name, fake in (
        ("Stream", Stream),
        ("stream", on),
        ("graph", capturing),
        ("CUDAGraph", Graph),
        ("current_stream", lambda: default),
        ("set_stream", set_stream),
        ("empty_cache", lambda: did.append(("empty", *current))),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    fails = [True]

    def advance(batches):
        did.append(("advance", *current))
        if "captures" in current and fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        return batches[0][0].sum()

    step = lm.graph.GraphStep(advance)
    ones = [(torch.ones(2), torch.ones(2))]
    assert not step.due
    assert step(ones) == 2
    plain = [
        ("empty", "default"),
        ("wait", "side", "default"),
        ("advance", "side"),
        ("wait", "default", "side"),
    ]
    assert did == plain
    assert step.due
    with pytest.raises(RuntimeError, match="not permitted"):
        step.capture()
    assert current == ["default"]
    assert step.due
    fails.clear()
    did.clear()
    step.capture()
    assert did == [("advance", "side", "captures")]
    assert not step.due
    step.inputs[0][0].fill_(7)
    assert step(ones) == 2
    assert step.inputs[0][0].tolist() == [1, 1]
    assert did[1:] == [("replay", "default")]


def test_batches_of_another_shape_are_refused(lm):
    trainer = lm.trainer("dense", lm.graph.StaticStep)
    steps(trainer, 1)
    text, target = trainer._batch(0)
    with pytest.raises(ValueError, match=r"one shape, \(1, 64\), got \(1, 32\)"):
        trainer.static_step([(text[:, :32], target[:, :32])] * 2)


def test_where_steps_cannot_be_captured(lm):
    config = dataclasses.replace(lm.config, graph=True)
    for where, reason in (
        (lm.train.World(0, 1, "cpu"), "this runs on cpu; leave graph out"),
        (lm.train.World(1, 2, "cuda:1"), "one GPU, and there are 2 processes"),
    ):
        with pytest.raises(SystemExit, match=reason):
            lm.train.Trainer(config, lm.corpus, where)
    assert lm.graph.refusal("cuda:0", 1) is None


def test_commands_refuse_graphs_on_a_cpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which takes graphs")
    text = tmp_path / "text.py"
    text.write_text("def f(x):\n    return x + 1\n" * 400)
    common = ["--preset", "tiny", "--text", text, "--graph"]
    reason = "graph=True captures CUDA graphs, and this runs on cpu; leave graph out"
    for command in (["speed"], ["train", "--out", tmp_path / "out"]):
        bench_call.bench(*command, *common, module="bench.lm", code=reason)
    kept = tmp_path / "quality.json"
    command = ["quality", *common, "--variants", "dense", "--json", kept]
    assert reason in bench_call.bench(*command, module="bench.lm")
    (run,) = json.loads(kept.read_text())["runs"]
    assert reason in run["error"]
    assert not run["done"]


@pytest.mark.usefixtures("graphs_run_here")
def test_speed_reports_both_kinds_of_steps(lm, tmp_path, capsys):
    kept = tmp_path / "speed.json"
    options = {"lengths": [64], "variants": ["dense", "none", "hash3"], "warm": 1, "repeats": 2}
    here = lm.train.World(0, 1, "cpu")
    lm.speed.run(lm.config, lm.corpus, here, graph="both", json_path=kept, **options)
    rows = json.loads(kept.read_text())["rows"]
    assert [(row["variant"], row["graph"], "ms" in row) for row in rows] == [
        ("dense", False, True),
        ("dense", True, True),
        ("none", False, True),
        ("none", True, True),
        ("hash3", False, False),
        ("hash3", True, False),
    ]
    # of the same trainer: 1 + 2 plain steps; then one plain, one captured, both not timed
    assert [row["steps"] for row in rows[:4]] == [3, 7, 3, 7]
    assert lm.captures == [4, 4]
    said = capsys.readouterr().out
    times = {(row["variant"], row["graph"]): row.get("ms") for row in rows}
    ratio = times["dense", True] / times["none", True]
    assert f"| none (graph) | {times['none', True]:.1f} ({ratio:.2f}x) |" in said
    assert f"| none | {times['none', False]:.1f} " in said
    assert "hash3 (graph)    failed" in said

    lm.captures.clear()
    (row,) = lm.speed.run(
        lm.config, lm.corpus, here, graph="only", **options | {"variants": ["dense"]}
    )
    assert (row["graph"], row["steps"], lm.captures) == (True, 4, [1])


@pytest.mark.usefixtures("graphs_run_here")
@pytest.mark.parametrize("graph", ["no", "only"])
def test_variants_of_a_length_are_timed_in_turn(lm, monkeypatch, graph):
    options = {"lengths": [64], "variants": ["dense", "hash3", "none"], "warm": 2, "repeats": 2}
    here = lm.train.World(0, 1, "cpu")
    began, step = [], lm.train.Trainer.train_step
    timed, end = {}, lm.speed.end_case

    def ended(row, *rest):
        timed[row["variant"]] = len(row["times"])
        end(row, *rest)

    def counted(self):
        began.append(self.config.attention)
        return step(self)

    monkeypatch.setattr(lm.train.Trainer, "train_step", counted)
    monkeypatch.setattr(lm.speed, "end_case", ended)
    rows = lm.speed.run(lm.config, lm.corpus, here, graph=graph, rounds=3, **options)
    assert [(row["variant"], "ms" in row) for row in rows] == [
        ("hash3", False),
        ("dense", True),
        ("none", True),
    ]
    first, later = ["dense"] * 4 + ["none"] * 4, ["dense"] * 3 + ["none"] * 3
    assert began == [*first, *later, *later, *later]
    assert timed == {"dense": 6, "none": 6}, "what was timed before all were compiled is kept"
    assert all(row["low"] <= row["ms"] and "times" not in row for row in rows[1:])
    assert [(row["steps"], row["graph"]) for row in rows[1:]] == [(13, graph == "only")] * 2
    with pytest.raises(SystemExit, match="--graph only, or none"):
        lm.speed.run(lm.config, lm.corpus, here, graph="both", rounds=2, **options)


@pytest.mark.usefixtures("graphs_run_here")
def test_a_sitting_with_graphs_has_the_same_curve(lm, tmp_path):
    from bench.lm.curves import merge

    here, kept = lm.train.World(0, 1, "cpu"), tmp_path / "runs.json"
    options = {"variants": ["hash4r"], "seeds": [0], "points": 2, "json_path": kept}
    lm.quality.run(lm.config, lm.corpus, here, **options)
    record = json.loads(kept.read_text())
    del record["runs"][0]["config"]["graph"]  # as runs of before there were graphs
    kept.write_text(json.dumps(record))
    lm.quality.run(lm.config, lm.corpus, here, **options)
    graphs = dataclasses.replace(lm.config, graph=True)
    lm.quality.run(graphs, lm.corpus, here, checkpoints=tmp_path / "kept", **options)
    runs = json.loads(kept.read_text())["runs"]
    assert [(run["config"]["graph"], run["done"]) for run in runs] == [(False, True), (True, True)]
    assert lm.captures == [1]
    losses = [[(x["step"], x["train"], x["validation"]) for x in run["curve"]] for run in runs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert len(merge([*runs, *record["runs"]])) == 2, "graphs and plain steps share a table"
