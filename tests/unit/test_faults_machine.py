"""Faults of the machine around the CPU backend: signals, threads, processes, disks. Each ends in a
right answer or a clear error, and the next call is right."""

import errno
import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

import numba
import numpy as np
import pytest
from scfa_core.backends.numba_cpu import compiling, threads
from scripts import python

from scfa_core.testing import Part, Spec, build, run_numpy


def case_of(part, seqlen):
    return build(Spec(heads=4, heads_kv=2, seqlen_q=seqlen, seqlen_k=seqlen, parts=(part,)))


# Threads, signals, processes ----------------------------------------------------------------


def test_an_error_on_a_helper_thread_alone_is_raised(monkeypatch):
    monkeypatch.setattr(threads, "thread_count", lambda: 3)
    started = threading.Event()

    def kernel(counter):
        if threading.current_thread() is threading.main_thread():
            assert started.wait(10)
            return
        started.set()
        raise ZeroDivisionError("on a helper")

    with pytest.raises(ZeroDivisionError, match="on a helper"):
        threads.run_tiles(kernel, 10)


def amid_a_tile(done):
    """A kernel whose caller's own thread is done first; each helper that ends appends to `done`."""
    started = threading.Event()

    def kernel(counter):
        if threading.current_thread() is threading.main_thread():
            assert started.wait(10)
            return
        started.set()
        time.sleep(0.2)
        done.append(1)

    return kernel


def test_a_call_waits_for_its_helpers(monkeypatch):
    """Results are complete when it returns, also where the caller's own thread is done first."""
    monkeypatch.setattr(threads, "thread_count", lambda: 2)
    done: list[int] = []
    threads.run_tiles(amid_a_tile(done), 10)
    assert done == [1]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
@pytest.mark.parametrize("raised", [KeyboardInterrupt, TimeoutError, SystemExit])
def test_a_signal_while_helpers_are_amid_a_tile_is_raised_when_they_have_ended(monkeypatch, raised):
    """What they work on is the caller's, who may free it."""
    monkeypatch.setattr(threads, "thread_count", lambda: 3)
    done, all_started = [], threading.Barrier(3)

    def kernel(counter):
        all_started.wait(10)
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.4)
            done.append(1)

    def interrupt(*_):
        raise raised

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(raised):
            threads.run_tiles(kernel, 10)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert done == [1, 1]


def test_an_error_on_one_helper_is_raised_when_the_others_have_ended(monkeypatch):
    monkeypatch.setattr(threads, "thread_count", lambda: 5)
    number, done, all_started = itertools.count(), [], threading.Barrier(5)

    def kernel(counter):
        first = threading.current_thread() is not threading.main_thread() and next(number) == 0
        all_started.wait(10)
        if first:
            raise ZeroDivisionError("on a helper")
        time.sleep(0.2)
        done.append(1)

    with pytest.raises(ZeroDivisionError, match="on a helper"):
        threads.run_tiles(kernel, 10)
    assert len(done) == 4


def test_helpers_are_awaited_where_no_more_threads_are_to_be_had(monkeypatch):
    """Of two helpers one has a thread. The other must neither run later nor hide the first."""
    monkeypatch.setattr(threads, "thread_count", lambda: 3)
    monkeypatch.setattr(threads, "_pool", None)
    monkeypatch.setattr(threads, "_pool_size", 0)
    start, attempts = threading.Thread.start, itertools.count()
    ran: list[int] = []

    def limited(thread):
        if next(attempts):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as limit:
        limit.setattr(threading.Thread, "start", limited)
        threads.run_tiles(amid_a_tile(ran), 10)
    assert ran == [1]
    threads._pool.shutdown()  # the one thread ends when it has met all that is queued
    assert ran == [1]


def test_arrays_are_let_go_of_where_no_thread_is_to_be_had(monkeypatch):
    """The pool has queued what no thread of it will ever take."""
    monkeypatch.setattr(threads, "thread_count", lambda: 3)
    monkeypatch.setattr(threads, "_pool", None)
    monkeypatch.setattr(threads, "_pool_size", 0)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    class Rows(np.ndarray):
        pass

    rows = np.zeros(8).view(Rows)
    alive = weakref.ref(rows)
    with monkeypatch.context() as limit:
        limit.setattr(threading.Thread, "start", refuse)
        threads.run_tiles(lambda counter, rows: None, 10, rows)
    del rows
    assert alive() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see the timer
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
def test_keyboard_interrupt_in_a_call(monkeypatch):
    """Wherever it strikes: it is raised, no helper goes on, and the next call is right."""
    monkeypatch.setattr(threads, "thread_count", lambda: 3)
    case = case_of(Part("causal"), 300)
    before, _ = run_numpy(case, "numba-cpu")

    def interrupt(*_):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in (0.001, 0.003, 0.007, 0.013, 0.021):
            interrupted = False
            try:
                # Repeated: Python drops an exception raised inside of a destructor.
                signal.setitimer(signal.ITIMER_REAL, delay, 0.5)
                until = time.monotonic() + 30
                while time.monotonic() < until:
                    run_numpy(case, "numba-cpu")
            except KeyboardInterrupt:
                signal.setitimer(signal.ITIMER_REAL, 0)
                interrupted = True
            assert interrupted
            after, _ = run_numpy(case, "numba-cpu")
            for a, b in zip(before, after, strict=True):
                np.testing.assert_array_equal(a, b)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


PLAN_CODE = """if True:
    import signal, sys, threading
    import numpy as np
    import scfa_core as scfa
    x = np.zeros((1, 2, 90, 16), np.float32)
    pattern = scfa.HashSparse(*np.random.default_rng(0).integers(0, 5, (2, 1, 2, 90)))
    right = pattern.mask(90, 90, heads=2)
    def plan():
        return scfa.make_plan(pattern, x, x, backend="numba-cpu").to_dense()
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
def test_keyboard_interrupt_while_compiling_then_threads_compile_at_once(tmp_path):
    code = (
        PLAN_CODE
        + """
    from scfa_core.backends.numba_cpu import launch  # imported; nothing is compiled yet
    def interrupt(*_):
        raise KeyboardInterrupt
    signal.signal(signal.SIGALRM, interrupt)
    # Again if need be: raised in a finaliser or a callback, an interrupt is swallowed.
    signal.setitimer(signal.ITIMER_REAL, 0.3, 0.2)
    try:
        plan()
    except KeyboardInterrupt:
        print("interrupted")
    signal.setitimer(signal.ITIMER_REAL, 0)
    wrong = []
    def call():
        if not np.array_equal(plan(), right):
            wrong.append(1)
    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers: caller.start()
    for caller in callers: caller.join()
    print("wrong" if wrong else "right")
    """
    )
    assert python(code, NUMBA_CACHE_DIR=str(tmp_path)).split() == ["interrupted", "right"]


def digest():
    """Hash of all results of one problem."""
    got, _ = run_numpy(case_of(Part("hash", "zipf", 4), 200), "numba-cpu")
    return hashlib.sha256(b"".join(x.tobytes() for x in got)).hexdigest()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_finds_the_same_bits():
    mine = digest()
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads
        child = os.fork()
    if child == 0:
        os.write(write, digest().encode())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.read(read, 200).decode() == mine
    os.close(read)
    os.close(write)


def test_another_process_finds_the_same_bits():
    """With other hashes of strings and another number of threads."""
    code = f"""if True:
        import sys
        sys.path.append({str(Path(__file__).parent)!r})
        import test_faults_machine
        print(test_faults_machine.digest())
    """
    assert python(code, PYTHONHASHSEED="7", NUMBA_NUM_THREADS="1").split() == [digest()]


# The cache of compiled code -----------------------------------------------------------------


def add_one(x):
    return x + 1


class Processes:
    """Fresh dispatchers of one function on one folder, as processes one after another have them."""

    def __init__(self, folder):
        self.folder = folder

    def run(self, x=1):
        """Call it; whether its code came from the disk."""
        compiled = compiling.kernel(add_one)
        assert compiled(x) == x + 1
        return bool(sum(compiled.stats.cache_hits.values()))

    def files(self, pattern):
        return set(self.folder.rglob(pattern))


@pytest.fixture
def processes(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return Processes(tmp_path)


@pytest.mark.parametrize("what", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage"])
def test_damaged_compiled_code_is_made_anew(processes, what, damage, caplog):
    assert [processes.run(), processes.run()] == [False, True]
    (path,) = processes.files(what)
    whole = path.read_bytes()
    path.write_bytes(
        {"truncate": whole[: len(whole) // 2], "empty": b"", "garbage": b"\x93" * 200}[damage]
    )
    assert [processes.run(), processes.run()] == [False, True]
    assert "damaged compiled code" in caplog.text


def test_a_full_disk_does_not_stop_a_call(processes, monkeypatch, caplog):
    """The code has been compiled and runs; only keeping it failed."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert not processes.run()
    assert "No space left" in caplog.text
    assert not processes.files("*.nb*")
    assert [processes.run(), processes.run()] == [False, True]


def test_code_of_older_sources_is_never_loaded(processes, monkeypatch):
    """Not even by a process that comes between another's new index and its new code."""
    processes.run()
    old = processes.files("*.nbc")
    monkeypatch.setattr(compiling, "_fingerprint", lambda: "another source")
    assert not processes.run()
    (new,) = processes.files("*.nbc") - old
    new.unlink()  # the moment between index and code
    assert [processes.run(), processes.run()] == [False, True]


def test_code_of_another_dtype_is_never_loaded(processes):
    """Two processes that find an empty cache at once, each with arguments of its own type."""
    assert not processes.run(1)
    (index,) = processes.files("*.nbi")
    of_first = index.read_bytes()
    index.unlink()
    assert not processes.run(1.5)
    assert len(processes.files("*.nbc")) == 2
    index.write_bytes(of_first)  # the first one's index was written last
    assert processes.run(1)
    assert not processes.run(1.5)


def test_many_processes_fill_one_cache(tmp_path):
    (tmp_path / "probe.py").write_text(
        "from scfa_core.backends.numba_cpu.compiling import kernel\n\n\n"
        "@kernel\ndef add_one(x):\n    return x + 1\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    home = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": path}
    code = "import probe; print(probe.add_one(1), sum(probe.add_one.stats.cache_hits.values()))"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | home,
            cwd=Path(__file__).parent,  # as in `python`
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in running:
        output, _ = process.communicate(timeout=240)
        assert (process.returncode, output.split()[0]) == (0, "2")
    assert python(code, **home).split() == ["2", "1"]
    assert not list(tmp_path.rglob("*.tmp.*"))


def test_the_fingerprint_sees_every_source(tmp_path, monkeypatch):
    home = tmp_path / "numba_cpu"
    shutil.copytree(Path(compiling.__file__).parent, home)
    monkeypatch.setattr(compiling, "__file__", str(home / "compiling.py"))
    seen = {compiling._fingerprint.__wrapped__()}
    sources = sorted(home.glob("*.py"))
    assert len(sources) >= 10
    for path in sources:
        path.write_text(path.read_text() + "\n")
        seen.add(compiling._fingerprint.__wrapped__())
    assert len(seen) == 1 + len(sources)
