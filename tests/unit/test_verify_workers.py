"""Seeds in several processes: the same findings in the same order, and a dead process is told."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest

from scfa_core import campaign, cli, verify
from scfa_core.errors import ScfaError
from scfa_core.verify_findings import Finding
from scfa_core.verify_workers import ONE_THREAD, Pool, in_processes, processes


@pytest.fixture(autouse=True)
def ctrl_c_as_python_has_it():
    """Who ignores SIGINT, as background jobs of a shell do, has children that ignore it too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def pool():
    with processes(2) as pool:
        yield pool


def test_two_processes_find_what_one_finds():
    options = {"count": 9, "rows": 40, "dtype": "float32", "deep": True}
    alone = list(verify.verify("reference", **options))
    shared = list(verify.verify("reference", **options, workers=2))
    assert [x.seed for x in shared] == list(range(9))
    assert shared == alone


def test_results_come_in_order_and_variables_stay(monkeypatch, pool):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    assert list(in_processes(abs, range(-300, 0), pool)) == list(range(300, 0, -1))
    assert {name: os.environ.get(name) for name in ONE_THREAD} == before


def test_workers_have_one_thread(pool):
    (found,) = in_processes(os.getenv, ["OMP_NUM_THREADS"], pool)
    assert found == "1"


def test_seeds_not_begun_in_time_are_the_last_ones(pool):
    done = list(in_processes(abs, range(10**6), pool, time.monotonic()))
    assert done == list(range(len(done)))
    assert len(done) < 128


def test_a_pool_serves_again_after_it_ran_out_of_time(pool):
    for _ in in_processes(abs, range(10**6), pool, time.monotonic()):
        pass
    assert list(in_processes(abs, range(-3, 0), pool)) == [3, 2, 1]


def test_a_dead_process_is_told_with_its_seeds(pool):
    with pytest.raises(ScfaError, match="a process died at one of the seeds 5 to 6"):
        list(in_processes(os._exit, range(5, 7), pool))


def test_a_process_that_died_between_seeds_is_told():
    def submit(*_):
        raise BrokenProcessPool("terminated")

    with pytest.raises(ScfaError, match="died while it had nothing to do, after some of the seeds"):
        list(in_processes(abs, range(3), Pool(SimpleNamespace(submit=submit), 1)))


def test_an_error_of_a_task_is_raised(pool):
    with pytest.raises(ValueError, match="math domain error"):
        list(in_processes(math.sqrt, range(-1, 3), pool))


def broken_torch(message):
    def synchronize():
        raise RuntimeError(f"{message}\nmore of it")

    return SimpleNamespace(
        cuda=SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    )


@pytest.mark.parametrize("deep", [False, True])
def test_nothing_is_run_in_a_broken_context(monkeypatch, deep):
    def fail(*_):
        monkeypatch.setitem(sys.modules, "torch", broken_torch("an illegal access"))
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(verify, "run_case", fail)
    monkeypatch.setattr(campaign, "run", fail)
    options = {"count": 5, "rows": 40, "dtype": "float32", "deep": deep}
    (finding,) = verify.verify("reference", **options)
    assert finding.fatal
    assert "unspecified launch failure" in finding.complaints[0]
    assert finding.complaints[1].endswith("with it: an illegal access")


def test_an_error_that_leaves_the_context_whole_stops_nothing(monkeypatch):
    monkeypatch.setattr(campaign, "run", lambda *_: 1 / 0)
    findings = list(verify.verify("reference", count=3, rows=40, deep=True))
    assert len(findings) == 3
    assert not any(finding.fatal for finding in findings)


def test_counts_are_written_as_json(tmp_path, monkeypatch, capsys):
    right = verify.verify_seed

    def wrong_at_4(seed, **options):
        found = right(seed, **options)
        return found if seed != 4 else Finding(4, found.spec, 2.0, ("dv: 2.00",))

    monkeypatch.setattr(verify, "verify_seed", wrong_at_4)
    path = tmp_path / "found.json"
    options = ["--deep", "--backend", "reference", "--rows", "40", "--dtype", "float32"]
    code = cli.main(["verify", *options, "--seed", "2", "--count", "8", "--json", str(path)])
    assert code == 1
    assert "8 problems from seed 2, 1 failed" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["problems"] == 8
    assert not written["interrupted"]
    assert written["seeds"] == [2, 9]
    assert [x["seed"] for x in written["failed"]] == [4]
    assert written["dtypes"]["float32"]["passed"] == 7
    assert sum(x["passed"] for x in written["patterns"].values()) == 7
    assert 0 < written["largest error of the allowed"] <= 1
    assert 0 < written["longest seqlen"] <= 40
    assert written["card"] is None
    assert written["versions"]["numpy"]
    assert written["command"].startswith("scfa verify --backend reference --seed 2 --count 8")


def states():
    """State and group of every process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group, *_ = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        yield int(path.parent.name), state, int(group)


def runs(pid):
    """Whether a process is there, and is not merely waiting for somebody to ask how it ended."""
    return any(number == pid and state != "Z" for number, state, _ in states())


def of_group(group):
    """Processes of a group that run."""
    return [number for number, state, other in states() if other == group and state != "Z"]


@pytest.mark.parametrize("seed", [2, 5])
def test_ctrl_c_writes_what_was_found(tmp_path, monkeypatch, capsys, seed):
    right = verify.verify_seed

    def interrupted_at(at, **options):
        if at == seed:
            raise KeyboardInterrupt
        return right(at, **options)

    monkeypatch.setattr(verify, "verify_seed", interrupted_at)
    path = tmp_path / "found.json"
    options = ["--backend", "reference", "--rows", "40", "--dtype", "float32"]
    code = cli.main(["verify", *options, "--seed", "2", "--count", "8", "--json", str(path)])
    out = capsys.readouterr().out
    assert code == 130
    assert f"{seed - 2} problems from seed 2, 0 failed" in out
    assert out.endswith("interrupted: this is what was done until then\n")
    written = json.loads(path.read_text())
    assert written["interrupted"]
    assert written["problems"] == seed - 2


def test_ctrl_c_while_a_result_is_waited_for_ends_the_processes():
    """An exception amid the locks of a pool left one held now and then, and it never ended."""

    def wait_for_ten_minutes():
        with processes(1) as pool:
            threading.Timer(2.0, signal.raise_signal, [signal.SIGINT]).start()
            list(in_processes(time.sleep, [600, 600], pool))

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wait_for_ten_minutes()
    assert time.monotonic() - start < 60


def test_ctrl_c_is_python_s_between_results(pool):
    results = in_processes(abs, range(3), pool)
    assert next(results) == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    results.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("everywhere", [False, True])
def test_ctrl_c_ends_the_processes_too(tmp_path, everywhere):
    """As ``kill`` sends it, to one process, and as a terminal does, to all."""
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "scfa_core", "verify", "--backend", "reference", "--deep"]
    command += ["--count", "1000000", "--workers", "2", "--rows", "40", "--json", str(path)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        assert run.stdout.readline().startswith("verify reference")  # a line of progress
        if everywhere:
            os.killpg(run.pid, signal.SIGINT)
        else:
            run.send_signal(signal.SIGINT)
        try:
            out, errors = run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == 130, errors
    assert errors == ""
    assert out.endswith("interrupted: this is what was done until then\n")
    written = json.loads(path.read_text())
    assert written["interrupted"]
    assert written["problems"] > 0
    end = time.monotonic() + 30
    while of_group(run.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not of_group(run.pid)


ENDLESS = """
import os
import time
from scfa_core.verify_workers import in_processes, processes

if __name__ == "__main__":
    with processes(2) as pool:
        print(os.getpid(), *{x.result() for x in [pool.executor.submit(os.getpid)]}, flush=True)
        list(in_processes(time.sleep, [600] * 4, pool))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        pid, *workers = map(int, parent.stdout.readline().split())
        assert pid == parent.pid
        assert len(workers) >= 1
        assert all(map(runs, workers))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        end = time.monotonic() + 30
        while any(map(runs, workers)) and time.monotonic() < end:
            time.sleep(0.1)
    assert not any(map(runs, workers))
