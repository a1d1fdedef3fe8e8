"""Run sanitize.py under the tools of compute-sanitizer, each family of calls by itself.

    python tests/gpu/run_sanitizer.py [--tool racecheck ...] [--family hopper ...] [--seconds 90]
                                      [--total 600] [--jobs 16] [--json findings.json]
                                      [--logs FOLDER]

All tools and all families by default, side by side on one GPU, kernels compiled beforehand. What
has not ended after `--seconds`, or when `--total` seconds are over, is stopped and said to be not
finished: nothing is called clean that did not run to its end. Exits with 0 only if all is clean.

Racecheck and initcheck look at Hopper kernels built for them ($SCFA_CUPY_SANITIZE): as shipped, but
made of what these tools can follow. Synccheck and memcheck look at what is shipped.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

TOOLS = ("racecheck", "initcheck", "synccheck", "memcheck")  # the slowest first
FAMILIES = (
    *("planner", "long-lists", "portable", "float32", "hopper", "fused", "tf32", "parts", "few"),
)
HOPPER_FAMILIES = ("hopper", "fused")
CUPY_FAMILIES = (*HOPPER_FAMILIES, "tf32", "parts", "few")  # only cupy has them
OWN_BUILD = ("racecheck", "initcheck")  # tools with a build of their own, kSanitize in mbarrier.cuh
TARGET = Path(__file__).parent / "sanitize.py"
FOUND = 9  # exit code for "the tool found something"
FIRST_PORT, PORTS_EACH = 49_152, 100  # of the tool's talk with its target
COMPILE_SECONDS = 300
# Nothing but our kernels is looked at, which torch's would slow down; initcheck must see who wrote
# the inputs.
OURS = "kns=scfa_"
MARK = "========="
# Bindings for Python ask the driver for every function they know, by name; that it lacks one is no
# fault of a call.
LOOK_UP = re.compile(r"Program hit .* on CUDA API call to cuGetProcAddress(_v2)?\.")


class Run(NamedTuple):
    """One tool over one family of calls of one backend, begun."""

    backend: str
    tool: str
    family: str
    process: Any
    log: Path
    begin: float


def find_program() -> str | None:
    """compute-sanitizer, if it is installed."""
    for place in (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"):
        if place and Path(place).exists():
            return place
    return None


def filter_options(program: str) -> list[str]:
    """How this version is told which kernels to look at."""
    told = subprocess.run([program, "--help"], capture_output=True, text=True, check=False).stdout
    for name in ("--kernel-name", "--kernel-regex"):
        if f"{name} " in told:
            return [name, OURS]
    return []


def build_of(tool: str) -> str:
    """$SCFA_CUPY_SANITIZE under a tool."""
    return str(int(tool in OWN_BUILD))


def command_of(program: str, tool: str, family: str, number: int, only: list[str]) -> list[str]:
    """Command line of one run."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "100"]
    options += ["--port", str(FIRST_PORT + PORTS_EACH * number), "--launch-timeout", "120"]
    return [
        program,
        *options,
        *(only if tool != "initcheck" else ()),
        sys.executable,
        str(TARGET),
        family,
    ]


def start(
    program: str, job: tuple[str, str, str], number: int, only: list[str], folder: Path
) -> Run:
    """Begin one run, its output in a file."""
    backend, tool, family = job
    log = folder / f"{backend}-{tool}-{family}.txt"
    # Every tensor an allocation of its own: else the tool sees one block and no end of any tensor.
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "SCFA_GPU_BACKENDS": backend,
        "SCFA_CUPY_SANITIZE": build_of(tool),
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as file:
        process = subprocess.Popen(
            command_of(program, tool, family, number, only),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return Run(backend, tool, family, process, log, time.monotonic())


def state_of(output: str, code: int | None, seconds: float) -> str:
    """Say how a run ended; `code` None: it was stopped. Only "clean" is good."""
    lines = [line for line in output.splitlines() if line.startswith(f"{MARK} ")]
    heads = [line.removeprefix(f"{MARK} ") for line in lines if not line.startswith(f"{MARK}  ")]
    told = [x for x in heads if x and "COMPUTE-SANITIZER" not in x and "SUMMARY" not in x]
    found = [x for x in told if not LOOK_UP.fullmatch(x)]
    looked_up = len(told) - len(found)
    if f"ERROR SUMMARY: {looked_up} error" in output and code == FOUND:
        code = 0  # the tool counts what was looked up, and nothing else
    calls = re.findall(r"^call (\d+) of (\d+)", output, re.MULTILINE)
    reached = "no call begun" if not calls else f"in call {calls[-1][0]} of {calls[-1][1]}"
    first = f"{len(found)} lines, the first: {found[0][:200]}" if found else "nothing found so far"
    if code is None:
        return f"not finished after {seconds:.0f} s ({reached}; {first})"
    if code == 0 and not found:
        return "clean" if calls and "all calls done" in output else "did not run its calls"
    if code in (0, FOUND):
        return f"found ({reached}): {first}"
    last = output.strip().splitlines()[-1:] or ["no output"]
    return f"failed with exit code {code} ({reached}): {last[0][:300]}"


def finish(run: Run, limit: float, deadline: float) -> str | None:
    """The state of a run that has ended or used up its time; None while it may go on."""
    code = run.process.poll()
    seconds = time.monotonic() - run.begin
    if code is None:
        if seconds < limit and time.monotonic() < deadline:
            return None
        kill(run)
    return state_of(run.log.read_text(errors="replace"), code, seconds)


def kill(run: Run) -> None:
    """End a run and whatever it has started."""
    with suppress(ProcessLookupError):  # it has ended meanwhile
        os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()


@contextmanager
def ended(running: list[Run]) -> Iterator[None]:
    """End the runs that are left, by Ctrl-C for one: in sessions of their own they would go on."""
    try:
        yield
    finally:
        for run in running:
            kill(run)


def run_all(
    jobs: list[tuple[str, str, str]],
    seconds: float,
    most: int,
    program: str,
    deadline: float = float("inf"),
    logs: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Run (backend, tool, family) jobs, `most` at once; name -> state and seconds.

    What the tools printed in runs that are not clean is copied to the folder `logs`.
    """
    only = filter_options(program)
    waiting = list(enumerate(jobs))
    running: list[Run] = []
    states: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="scfa-sanitizer-") as temporary, ended(running):
        while waiting or running:
            if time.monotonic() >= deadline:
                states |= {
                    ", ".join(job): {"state": "not begun", "seconds": 0.0} for _, job in waiting
                }
                waiting.clear()
            while waiting and len(running) < most:
                number, job = waiting.pop(0)
                running.append(start(program, job, number, only, Path(temporary)))
            for run in list(running):
                state = finish(run, seconds, deadline)
                if state is None:
                    continue
                running.remove(run)
                if logs and state != "clean":
                    shutil.copy(run.log, logs)
                took = round(time.monotonic() - run.begin, 1)
                name = f"{run.backend}, {run.tool}, {run.family}"
                states[name] = {"state": state, "seconds": took}
                print(f"sanitizer {name}: {state} ({took} s)", flush=True)
            time.sleep(0.1)
    return states


def compile_beforehand(backends: list[str], tools: list[str], families: list[str]) -> None:
    """Leave the kernels on disk: compiling under a tool would take its time."""
    begin = time.monotonic()
    for backend in backends:
        several = backend == "cupy" and set(families) & set(HOPPER_FAMILIES)
        for build in sorted({build_of(tool) for tool in tools}) if several else ["0"]:
            subprocess.run(
                [sys.executable, str(TARGET), "--compile", *families],
                env=os.environ | {"SCFA_GPU_BACKENDS": backend, "SCFA_CUPY_SANITIZE": build},
                timeout=COMPILE_SECONDS,
                check=True,
            )
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)


def jobs_of(
    backends: list[str], tools: list[str], families: list[str]
) -> list[tuple[str, str, str]]:
    """Every run; only cupy has kernels for Hopper."""
    return [
        (backend, tool, family)
        for tool in tools
        for backend in backends
        for family in families
        if backend == "cupy" or family not in CUPY_FAMILIES
    ]


def check(
    backends: list[str],
    tools: list[str],
    families: list[str],
    seconds: float,
    most: int,
    total: float = float("inf"),
    logs: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Compile, run everything, and return the states."""
    deadline = time.monotonic() + total
    program = find_program()
    jobs = jobs_of(backends, tools, families)
    if program is None:
        missing = {"state": "compute-sanitizer is not installed", "seconds": 0.0}
        return {", ".join(job): missing for job in jobs}
    compile_beforehand(backends, tools, families)
    return run_all(jobs, seconds, most, program, deadline, logs)


def main() -> int:
    """Run as the command line says; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seconds", type=float, default=90.0, help="of each run (%(default)s)")
    parser.add_argument("--total", type=float, default=600.0, help="seconds of all (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 4, help="runs at once")
    parser.add_argument("--json", type=Path, help="write the states there")
    parser.add_argument("--logs", type=Path, help="folder for what the tools found")
    options = parser.parse_args()
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
    backends = os.environ.get("SCFA_GPU_BACKENDS", "cupy").split(",")
    limits = (options.seconds, options.jobs, options.total, options.logs)
    states = check(backends, options.tool, options.family, *limits)
    if options.json:
        options.json.write_text(json.dumps(states, indent=1) + "\n")
    wrong = [name for name, found in states.items() if found["state"] != "clean"]
    print(f"{len(states) - len(wrong)} of {len(states)} clean")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
