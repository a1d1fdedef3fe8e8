"""The soak run: little of it, and that each thing it watches for would be seen."""

import importlib.util
import json
from contextlib import contextmanager
from types import SimpleNamespace

import numba
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra torch")

import torch
from scfa_core.reference.backend import BACKEND

from scfa_core import cli, dispatch, soak
from scfa_core.errors import BackendUnavailable, UnknownBackend
from scfa_core.soak_memory import ALLOWED, Marks


def test_a_short_run_holds_still():
    found = soak.soak("numba-cpu", steps=120, rows=40)
    assert found["complaints"] == []
    assert found["steps"] == 120
    assert set(found["patterns"]) == set(soak.PATTERNS)
    assert found["pairs of lengths"] > 60
    assert found["fixed problems"] == {"compared": 12, "changed": 0}
    assert found["kernels"]["after the warm-up"] > 0
    assert found["memory"]["host objects"]["last"] > 0
    assert "graph" not in found


def test_the_command_writes_what_was_seen(tmp_path, capsys):
    path = tmp_path / "soak.json"
    options = ["--steps", "60", "--rows", "20", "--json", str(path)]
    assert cli.main(["soak", "--backend", "reference", *options]) == 0
    assert "reference: 60 steps" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["steps"] == 60
    assert not written["interrupted"]
    assert written["versions"]["torch"]


class Drifting:
    """The reference, whose forward is off by one bit from some call on."""

    name, memory = "reference", "host"
    availability, can_run = BACKEND.availability, BACKEND.can_run
    make_plan, backward = BACKEND.make_plan, BACKEND.backward
    calls = 0

    def forward(self, *arguments):
        BACKEND.forward(*arguments)
        self.calls += 1
        if self.calls > 106:  # 48 to warm up, 4 fixed ones, 50 steps, 4 fixed ones
            arguments[6].view("int32")[0, 0, 0] ^= 1  # lse


def test_one_bit_that_changes_is_seen(monkeypatch, capsys):
    monkeypatch.setitem(dispatch._loaded, "reference", Drifting())
    options = ["soak", "--backend", "reference", "--steps", "60", "--rows", "20"]
    assert cli.main(options) == 1
    assert "FAILED 4 of 8 results of fixed problems changed" in capsys.readouterr().out


def test_kernels_that_come_later_are_seen(monkeypatch):
    counts = iter((7, 9))
    monkeypatch.setattr(soak, "compiled_kernels", lambda _: next(counts))
    found = soak.soak("reference", steps=2, rows=8)
    assert found["complaints"] == ["2 kernels more than the 7 after the warm-up"]


def test_every_specialisation_counts():
    soak.soak("numba-cpu", steps=1, rows=8)
    before = soak.compiled_kernels("numba-cpu")
    assert before >= 5  # lists, ranges, forward, dq, dk and dv

    def extra(x):
        return x + 1

    extra.__module__ = "scfa_core.backends.numba_cpu.extra"
    compiled = numba.njit(extra)
    for count, kind in enumerate((np.float32, np.float64), 1):
        compiled(kind(1))
        assert soak.compiled_kernels("numba-cpu") == before + count


def marks_of(values, name="host bytes", steps=30_000, cuda=False):
    at = [(i + 1) * steps // len(values) for i in range(len(values))]
    return Marks(cuda, at, {name: list(values)})


def test_growth_is_seen_and_a_sawtooth_is_none():
    leak = [1000 * step for step in range(0, 120_000, 100)]
    assert marks_of(leak).complaints() == [
        "host bytes grew by 40000000 in the last 10000 steps",
    ]
    assert marks_of([i % 70 << 20 for i in range(600)]).complaints() == []
    assert marks_of([min(i, 100) << 20 for i in range(600)]).complaints() == []
    assert marks_of(leak, steps=5_000).complaints() == []
    assert marks_of(leak, cuda=True).complaints() == []
    assert len(marks_of(leak, cuda=True, steps=60_000).complaints()) == 1


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_every_kind_of_memory_has_its_limit(name):
    limit = ALLOWED[name]
    assert marks_of([0, 0, limit], name).complaints() == []
    assert len(marks_of([0, 0, limit + 1], name).complaints()) == 1


def test_no_step_after_the_time():
    found = soak.soak("reference", steps=10**6, rows=8, seconds=0.1)
    assert 0 <= found["steps"] < 10**5


def test_steps_have_the_time_that_replays_leave(monkeypatch):
    """On a GPU replays come first, and end after a fifth of the time."""
    calls = []

    class Run:
        cuda, rows, torch = (
            True,
            8,
            SimpleNamespace(cuda=SimpleNamespace(get_device_name=lambda: "a card")),
        )

        def run_graph(self, replays, deadline):
            calls.append(("replays", deadline))
            self.graph = {"replays": replays, "complaints": ["one replay differs"]}

        def run_steps(self, steps, deadline):
            calls.append(("steps", deadline))
            self.done = steps

        def seen(self):
            return {"steps": self.done, "complaints": []}

    monkeypatch.setattr(soak, "Soak", lambda *_: Run())
    monkeypatch.setattr(soak.time, "monotonic", lambda: 1000.0)
    found = soak.soak("cupy", seconds=50)
    assert calls == [("replays", 1010.0), ("steps", 1050.0)]
    assert (found["steps"], found["graph"]) == (100_000, {"replays": 10_000})
    assert found["complaints"] == ["one replay differs"]


@pytest.mark.parametrize("stale", [False, True])
def test_replays_are_held_against_eager_calls(monkeypatch, stale):
    """With a graph that computes anew, or that has kept the hashes it was captured with."""
    run = soak.Soak("reference", rows=16)
    real, current = run._fixed, []

    def fixed(*problem):
        call = real(*problem)

        def noted():
            results = call()
            if current:
                kept = [x.clone() for x in results]
                current[0].replay = lambda: [
                    x.copy_(y) for x, y in zip(results, kept if stale else call(), strict=True)
                ]
            return results

        return noted

    @contextmanager
    def graph(captured):
        current.append(captured)
        yield
        current.clear()

    monkeypatch.setattr(run, "_fixed", fixed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    run.run_graph(5, float("inf"))
    found = run.graph
    assert found["replays"] == 5
    assert found["different from eager"] == (5 if stale else 0)
    assert found["complaints"] == (["5 of 5 replays differ from eager"] if stale else [])


@pytest.mark.parametrize("at", [0, 10, 48 + 57])
def test_ctrl_c_writes_what_was_seen(monkeypatch, tmp_path, capsys, at):
    """At the first step, while warming up, and at the 57th step of the run."""
    step, calls = soak.Soak.step, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) > at:
            raise KeyboardInterrupt
        step(self, *arguments)

    monkeypatch.setattr(soak.Soak, "step", interrupted)
    path = tmp_path / "soak.json"
    options = ["--steps", "60", "--rows", "20", "--json", str(path)]
    assert cli.main(["soak", "--backend", "reference", *options]) == 130
    assert capsys.readouterr().out.endswith("interrupted: this is what was done until then\n")
    written = json.loads(path.read_text())
    done = max(0, at - 48)
    assert written["interrupted"]
    assert (written["steps"], sum(written["patterns"].values())) == (done, done)
    assert written["fixed problems"]["compared"] == (4 if done >= 50 else 0)
    assert written["complaints"] == []


def test_what_cannot_run_is_refused(monkeypatch):
    with pytest.raises(UnknownBackend, match="auto"):
        soak.soak("auto")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name)
    )
    with pytest.raises(BackendUnavailable, match=r"scfa-core\[torch\]"):
        soak.soak("reference")
    monkeypatch.setattr(BACKEND.__class__, "availability", lambda self: "not today")
    with pytest.raises(BackendUnavailable, match="not today"):
        soak.soak("reference")
