"""Who runs compute-sanitizer: what counts as clean, and that nothing else does."""

import importlib.util
import json
import signal
import stat
import sys
import time
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "gpu" / "run_sanitizer.py"
BANNER = "========= COMPUTE-SANITIZER\n"
CALLS = "call 1 of 2: a\ncall 2 of 2: b\n"
HAZARD = (
    "========= Error: Race reported between Write access at scfa_fwd and Read access\n"
    "=========     at scfa_fwd+0x10\n"
)
LOOK_UP = (
    '========= Program hit CUDA_ERROR_INVALID_VALUE (error 1) due to "invalid argument" on CUDA '
    "API call to cuGetProcAddress_v2.\n=========     Saved host backtrace\n========= \n"
)


def summary(errors):
    return f"all calls done\n========= ERROR SUMMARY: {errors} errors\n"


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("run_sanitizer", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("output", "code", "begins"),
    [
        (f"{BANNER}{CALLS}all calls done\n========= ERROR SUMMARY: 0 errors\n", 0, "clean"),
        (f"{BANNER}{CALLS}========= ERROR SUMMARY: 0 errors\n", 0, "did not run its calls"),
        (
            f"{BANNER}all calls done\n========= ERROR SUMMARY: 0 errors\n",
            0,
            "did not run its calls",
        ),
        (f"{BANNER}{CALLS}{HAZARD}all calls done\n", 9, "found (in call 2 of 2): 1 lines"),
        (f"{BANNER}{CALLS}{HAZARD}all calls done\n", 0, "found (in call 2 of 2): 1 lines"),
        (f"{BANNER}{LOOK_UP * 3}{CALLS}{summary(3)}", 9, "clean"),
        (f"{BANNER}{LOOK_UP * 3}{CALLS}{summary(4)}", 9, "found (in call 2 of 2): nothing"),
        (f"{BANNER}{LOOK_UP}{CALLS}{HAZARD}{summary(2)}", 9, "found (in call 2 of 2): 1 lines"),
        (f"{BANNER}{LOOK_UP}{CALLS}{HAZARD}{summary(1)}", 9, "found (in call 2 of 2): 1 lines"),
        (f"{BANNER}{LOOK_UP.replace('_v2', 'X')}{CALLS}{summary(1)}", 9, "found (in call 2 of 2)"),
        (f"{BANNER}{LOOK_UP}{CALLS}boom\n", 1, "failed with exit code 1"),
        (f"{BANNER}call 1 of 2: a\n", None, "not finished after 5 s (in call 1 of 2; nothing"),
        (f"{BANNER}{CALLS}{HAZARD}", None, "not finished after 5 s (in call 2 of 2; 1 lines, the"),
        (BANNER, None, "not finished after 5 s (no call begun"),
        (f"{BANNER}{CALLS}boom\n", 1, "failed with exit code 1 (in call 2 of 2): boom"),
        ("", -11, "failed with exit code -11 (no call begun): no output"),
        ("========= Error: Target application terminated\n", 255, "failed with exit code 255"),
    ],
)
def test_only_a_run_that_ended_without_a_word_is_clean(runner, output, code, begins):
    assert runner.state_of(output, code, 5.0).startswith(begins)


PROGRAM = f"""#!{sys.executable}
import os, sys, time
arguments = sys.argv[1:]
if arguments == ["--help"]:
    print("  --kernel-name arg  which kernels")
    sys.exit()
tool = arguments[arguments.index("--tool") + 1]
family = arguments[-1]
assert ("--kernel-name" in arguments) == (tool != "initcheck"), arguments
own_build = tool in ("racecheck", "initcheck")
assert os.environ["SCFA_CUPY_SANITIZE"] == str(int(own_build)), tool
print("{BANNER.strip()}")
print("call 1 of 1: x", flush=True)
if tool == "racecheck":
    time.sleep(60)
if family == "float32":
    print("========= Error: something")
    sys.exit(9)
print("all calls done")
"""


@pytest.fixture
def program(tmp_path):
    """A program with compute-sanitizer's face."""
    path = tmp_path / "compute-sanitizer"
    path.write_text(PROGRAM)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_runs_side_by_side_end_or_are_stopped(runner, program):
    jobs = runner.jobs_of(["cupy"], ["racecheck", "initcheck"], ["planner", "float32"])
    states = runner.run_all(jobs, 4.0, 4, program)
    assert set(states) == {", ".join(job) for job in jobs}
    told = {name.removeprefix("cupy, "): found["state"] for name, found in states.items()}
    assert told["initcheck, planner"] == "clean"
    assert told["initcheck, float32"].startswith("found")
    for family in ("planner", "float32"):
        assert told[f"racecheck, {family}"].startswith("not finished after 4 s (in call 1 of 1")


def test_when_the_time_of_all_is_over_the_rest_is_not_begun(runner, program):
    jobs = runner.jobs_of(["cupy"], ["racecheck"], ["planner", "float32"])
    states = runner.run_all(jobs, 60.0, 1, program, time.monotonic() + 1.5)
    assert states["cupy, racecheck, planner"]["state"].startswith("not finished after ")
    assert states["cupy, racecheck, float32"]["state"] == "not begun"


def test_no_run_goes_on_where_ctrl_c_ends_them_all(runner, program, monkeypatch):
    begun = []

    def start(*arguments, own=runner.start):
        begun.append(own(*arguments))
        return begun[-1]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "start", start)
    monkeypatch.setattr(runner.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run_all(runner.jobs_of(["cupy"], ["racecheck"], ["planner"]), 60.0, 1, program)
    assert [run.process.poll() for run in begun] == [-signal.SIGKILL]


def test_command_line_writes_the_states(runner, program, tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(runner, "find_program", lambda: program)
    monkeypatch.setattr(runner, "compile_beforehand", lambda *names: compiled.append(names))
    monkeypatch.setenv("SCFA_GPU_BACKENDS", "numba-cuda")
    path = tmp_path / "found.json"
    line = ["run_sanitizer.py", "--tool", "synccheck", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", line)
    assert runner.main() == 1
    written = json.loads(path.read_text())
    assert set(written) == {
        f"numba-cuda, synccheck, {family}"
        for family in ("planner", "long-lists", "portable", "float32")
    }
    assert written["numba-cuda, synccheck, planner"]["state"] == "clean"
    assert compiled == [(["numba-cuda"], ["synccheck"], list(runner.FAMILIES))]
    assert "3 of 4 clean" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*line, "--family", "planner", "portable"])
    assert runner.main() == 0


def test_without_the_program_nothing_is_clean(runner, monkeypatch):
    monkeypatch.setattr(runner, "find_program", lambda: None)
    states = runner.check(["cupy"], ["memcheck"], ["planner"], 1.0, 1)
    assert states["cupy, memcheck, planner"]["state"] == "compute-sanitizer is not installed"


def test_families_are_those_of_the_calls(runner):
    spec = importlib.util.spec_from_file_location("sanitize", SOURCE.with_name("sanitize.py"))
    pytest.importorskip("torch", reason="needs the extra torch")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.is_hopper = lambda device: True
    assert tuple(module.families_of("cupy", "cuda")) == runner.FAMILIES


def test_kernels_are_compiled_before_any_tool(runner, monkeypatch):
    seen = []
    monkeypatch.setattr(
        runner.subprocess, "run", lambda line, **options: seen.append((line, options["env"]))
    )
    runner.compile_beforehand(["cupy"], list(runner.TOOLS), ["planner"])
    ((line, environment),) = seen
    assert line[1:] == [str(SOURCE.with_name("sanitize.py")), "--compile", "planner"]
    assert environment["SCFA_GPU_BACKENDS"] == "cupy"


@pytest.mark.parametrize(
    ("tools", "builds"),
    [
        (["racecheck", "initcheck"], ["1"]),
        (["synccheck", "memcheck"], ["0"]),
        (["racecheck", "memcheck"], ["0", "1"]),
    ],
)
def test_each_tool_finds_its_build_of_the_hopper_kernels(runner, monkeypatch, tools, builds):
    seen = []
    monkeypatch.setattr(
        runner.subprocess,
        "run",
        lambda line, **options: seen.append(options["env"]["SCFA_CUPY_SANITIZE"]),
    )
    runner.compile_beforehand(["cupy"], tools, ["planner", "fused"])
    assert seen == builds
    assert sorted({runner.build_of(tool) for tool in tools}) == builds
