"""The command line: what it prints, what it writes, what it exits with."""

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scfa_core.reference.backend import BACKEND

from scfa_core import cli, environment, testing, verify
from scfa_core.dispatch import BACKEND_NAMES
from scfa_core.errors import BackendUnavailable, ScfaError, UnknownBackend
from scfa_core.terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]


def call(capsys, *arguments):
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_info_names_every_backend_and_its_state(capsys):
    code, out, _ = call(capsys, "info")
    assert code == 0
    states = out[: out.index("package ")].splitlines()
    for name in BACKEND_NAMES:
        (line,) = (row for row in states if row.startswith(f"{name} "))
        assert len(line.split(maxsplit=1)[1]) > 3
    assert re.search(r"^reference +available$", out, re.MULTILINE)
    assert re.search(rf"^numpy +{re.escape(np.__version__)}$", out, re.MULTILINE)


def test_info_names_variables_that_nobody_reads(capsys, monkeypatch):
    monkeypatch.setenv("SCFA_BACKND", "cupy")
    monkeypatch.setenv("SCFA_XYZ", "1")
    monkeypatch.setenv("SCFA_CACHE_DIR", "kernels")
    out = call(capsys, "info")[1]
    assert "$SCFA_BACKND: nobody reads it; is $SCFA_BACKEND meant?\n" in out
    assert "$SCFA_XYZ: nobody reads it\n" in out
    assert "CACHE_DIR" not in out


@pytest.mark.skipif(not (ROOT / "backends").exists(), reason="needs the source tree")
def test_every_variable_that_is_read_is_known():
    sources = [*(ROOT / "scfa_core").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]
    named = {
        name
        for path in sources
        for name in re.findall(r"""["'](SCFA_[A-Z0-9_]*[A-Z0-9])["']""", path.read_text())
    }
    assert named == {*environment.READ, *environment._OF_TESTS}


def test_module_and_script_are_one_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "scfa_core", "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout.startswith("scfa_core ")


@pytest.mark.parametrize("arguments", [["nonsense"], [], ["verify", "--count", "0"], ["show"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: scfa" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "--json", "{}/none/a.json"], "there is no folder"),
        (["soak", "--json", "{}"], "is a folder"),
        (["show", "qk", "--keep", "7"], "must be from 0 to 1"),
        (["show", "qk", "--keep", "nan"], "must be from 0 to 1"),
        (["show", "hash", "--buckets", "9" * 30], "must be at most"),
        (["show", "ranges", "--window", "9" * 30], "must be at most"),
    ],
)
def test_wrong_values_are_told_before_the_work(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([argument.format(tmp_path) for argument in arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_picture_without_an_ending_is_a_png(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    code, out, _ = call(capsys, "show", "causal", "--out", str(tmp_path / "mask"))
    assert code == 0
    assert f"wrote {tmp_path / 'mask.png'}" in out
    assert (tmp_path / "mask.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "{}"], "no text there"),
        (["--out", "{}/file/pictures"], "cannot be made a folder"),
        (["--backend", "cupy"], "--backend cupy: "),
    ],
)
def test_demo_says_what_is_wrong_before_it_trains(arguments, words, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    if "cupy" in arguments and torch.cuda.is_available():
        pytest.skip("a GPU can run it")
    if "--text" not in arguments:
        (tmp_path / "file").write_text("no folder")
    code, _, err = call(capsys, "demo", *(argument.format(tmp_path) for argument in arguments))
    assert code == 2
    assert words in err


def test_verify_passes_on_the_reference(capsys):
    options = ("--backend", "reference", "--dtype", "float32", "--count", "8", "--rows", "40")
    code, out, _ = call(capsys, "verify", *options)
    assert code == 0
    assert "reference: 8 problems from seed 0, 0 failed" in out


class Broken:
    """The reference with one wrong number in dv."""

    name, memory = "reference", "host"
    availability, can_run = BACKEND.availability, BACKEND.can_run
    make_plan, forward = BACKEND.make_plan, BACKEND.forward

    def backward(self, *arguments):
        BACKEND.backward(*arguments)
        dv = arguments[10]
        dv[..., -1, -1] += 1


def test_a_failure_prints_the_line_that_reproduces_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules["scfa_core.dispatch"]._loaded, "reference", Broken())
    options = ("--backend", "reference", "--seed", "7", "--count", "3", "--rows", "30")
    code, out, _ = call(capsys, "verify", *options)
    assert code == 1
    assert "3 failed" in out
    assert "dv: " in out
    (line, *_) = re.findall(r"reproduce: (scfa verify .*)", out)
    assert line == "scfa verify --backend reference --seed 7 --count 1 --rows 30"
    again, text, _ = call(capsys, *shlex.split(line)[1:])
    assert again == 1
    assert "1 problems from seed 7, 1 failed" in text


def test_a_wrong_plan_is_found(monkeypatch):
    class Shifted(Broken):
        backward = BACKEND.backward

        def make_plan(self, problem, clauses, plan, ctx):
            BACKEND.make_plan(problem, clauses, plan, ctx)
            if plan.key_end.size and plan.key_end[0, 0, 0] > plan.key_start[0, 0, 0]:
                plan.key_end[0, 0, 0] -= 1

    case = testing.build(testing.Spec(parts=(testing.Part("window", number=3),), seqlen_q=20))
    right = testing.run_numpy(case, "reference")[1]
    fields = {name: getattr(right, name).copy() for name in verify.PLAN_FIELDS}
    assert verify.plan_differences(case, fields) == []
    fields["key_end"][0, 0, 3] -= 1
    assert verify.plan_differences(case, fields) == ["plan.key_end: 1 of 20 entries differ"]
    monkeypatch.setitem(sys.modules["scfa_core.dispatch"]._loaded, "reference", Shifted())
    assert verify.verify_one("reference", case.spec).complaints


def test_a_crash_is_a_finding_with_its_seed(monkeypatch):
    def crash(*_):
        raise RuntimeError("no such tile")

    monkeypatch.setattr(Broken, "backward", crash)
    monkeypatch.setitem(sys.modules["scfa_core.dispatch"]._loaded, "reference", Broken())
    finding = verify.verify_one("reference", testing.random_spec(3, most_rows=20))
    assert finding.seed == 3
    assert finding.complaints == ("raised RuntimeError: no such tile",)


def test_verify_stops_at_its_time_budget():
    findings = list(verify.verify("reference", count=10_000, rows=30, time_budget=0.2))
    assert 0 < len(findings) < 10_000


def test_verify_refuses_what_cannot_run(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules["scfa_core.dispatch"]._loaded, "cupy", "cannot be imported: x")
    code, _, err = call(capsys, "verify", "--backend", "cupy")
    assert code == 2
    assert err.startswith("scfa verify: backend 'cupy' cannot be imported")
    with pytest.raises(UnknownBackend):
        verify.drawn_dtypes("auto")
    monkeypatch.setattr(BACKEND.__class__, "availability", lambda self: "not today")
    with pytest.raises(BackendUnavailable, match="not today"):
        next(verify.verify("reference"))


@pytest.mark.parametrize("name", cli.PATTERN_NAMES)
def test_show_draws_every_pattern_as_text(name, capsys):
    code, out, _ = call(capsys, "show", name, "--seqlen", "20")
    assert code == 0
    assert "visible pairs, density" in out
    assert re.search("[▀▄█]", out)


def test_show_draws_intersections_exactly(capsys):
    _, out, _ = call(capsys, "show", "window", "causal", "--window", "1", "--seqlen", "4")
    assert out.splitlines()[0] == (
        "SlidingWindow(1, causal=True) & Causal(include_self=True, align='top-left')"
    )
    assert out.splitlines()[2:] == ["▀▄", "  ▀▄"]


def test_show_refuses_what_would_not_fit_in_memory(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["show", "causal", "--seqlen", "8193"])
    assert "--seqlen: must be at most 8192, got 8193" in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_info", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "scfa info: interrupted\n"


def test_show_writes_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    path = tmp_path / "pattern.png"
    code, out, _ = call(capsys, "show", "hash", "qk", "--seqlen", "200", "--out", str(path))
    assert code == 0
    assert f"wrote {path}" in out
    assert path.read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = call(capsys, "show", "hash", "--out", str(tmp_path / "x.png"))
    assert code == 2
    assert "pip install 'scfa-core[plot]'" in err


def test_demo_without_torch_names_the_extra(capsys, monkeypatch):
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *a: None if name == "torch" else find(name))
    code, _, err = call(capsys, "demo")
    assert code == 2
    assert "pip install 'scfa-core[torch]'" in err


def test_demo_trains_compares_and_draws(tmp_path, capsys):
    pytest.importorskip("torch", reason="needs the extra torch")
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    options = ("--seqlen", "96", "--steps", "12", "--out", str(tmp_path))
    code, out, _ = call(capsys, "demo", *options)
    assert code == 0
    assert "backend   numba-cpu" in out
    for name in ("hash", "dense", "qk-drop"):
        losses = re.search(rf"^{name} +([\d. ]+)$", out, re.MULTILINE).group(1).split()
        assert float(losses[-2]) < float(losses[0]) - 0.5, "the loss does not fall"
    gap = float(re.search(r"differ by at most (\S+)", out).group(1))
    assert gap < 1e-4, "dense attention is not torch's"
    assert float(re.search(r"largest deviation of all: (\S+)", out).group(1)) < 1e-4
    for name in ("losses.png", "pattern.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_demo_learns_from_a_given_text(tmp_path, capsys):
    pytest.importorskip("torch", reason="needs the extra torch")
    (tmp_path / "text.txt").write_text("abcd" * 5000)
    options = ("--text", str(tmp_path / "text.txt"), "--seqlen", "64", "--steps", "10")
    code, out, _ = call(capsys, "demo", *options, "--out", str(tmp_path))
    assert code == 0
    assert "0.0 MB from 1 files" in out
    code, _, err = call(capsys, "demo", "--text", str(tmp_path / "none.txt"))
    assert code == 2
    assert "no such file" in err
    (tmp_path / "text.txt").write_text("short")
    code, _, err = call(capsys, "demo", *options)
    assert code == 2
    assert "Give more text" in err


def test_plain_tables_line_up():
    stream = io.StringIO()
    Terminal(stream).table(("name", "speed"), [("a", "1.5x"), ("longer", "12x")])
    assert stream.getvalue().splitlines() == [
        "name    speed",
        "------  -----",
        "a        1.5x",
        "longer    12x",
    ]


def test_rich_draws_the_same_content():
    pytest.importorskip("rich", reason="needs the extra cli")
    stream = io.StringIO()
    terminal = Terminal(stream, plain=False)
    terminal.table(("name", "value"), [("float32[1, 2]", "3")])
    with terminal.progress("work", 2) as progress:
        progress.advance("first [1]")
        progress.advance("second")
    assert "float32[1, 2]" in stream.getvalue()


def test_plain_progress_ends_with_the_count(capsys):
    with Terminal(plain=True).progress("work", 3) as progress:
        for _ in range(3):
            progress.advance("note")
    assert re.fullmatch(r"work  3/3  0 s  note\n", capsys.readouterr().out)


def test_a_failing_block_is_not_hidden_by_progress():
    with pytest.raises(ScfaError), Terminal(io.StringIO(), plain=True).progress("x", 1):
        raise ScfaError("inside")
