"""How the CPU backend lives in a process: imports, threads, forks, caches, memory."""

import logging
import os
import platform
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scfa_core.backends.numba_cpu import threads
from scripts import python

import scfa_core as scfa

BACKEND = "numba-cpu"


def problem(seqlen=300, heads=3):
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, 1, heads, seqlen, 32)).astype(np.float32)


def results(seqlen=300):
    q, k, v = problem(seqlen)
    out, lse = scfa.attention(q, k, v, return_lse=True, backend=BACKEND)
    return out, lse, *scfa.attention_backward(v, q, k, v, out, lse, scfa.Causal(), backend=BACKEND)


def test_importing_the_backend_does_not_import_numba():
    code = (
        "import sys, scfa_core.backends.numba_cpu as home;"
        "assert home.BACKEND.availability() is None;"
        "print('numba' in sys.modules, 'torch' in sys.modules)"
    )
    assert python(code).split() == ["False", "False"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_thread_count_does_not_change_a_bit(count, monkeypatch):
    monkeypatch.setattr(threads, "thread_count", lambda: 3)
    before = results()
    monkeypatch.setattr(threads, "thread_count", lambda: count)
    for a, b in zip(before, results(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_thread_count_follows_numba_and_torch(monkeypatch):
    code = (
        "from scfa_core.backends.numba_cpu.threads import thread_count;"
        "import sys, types; first = thread_count();"
        "sys.modules['torch'] = types.SimpleNamespace(get_num_threads=lambda: 1);"
        "print(first, thread_count())"
    )
    assert python(code, NUMBA_NUM_THREADS="3").split() == ["3", "1"]


def test_many_callers_at_once():
    right = results()
    failures = []

    def call():
        for _ in range(5):
            for a, b in zip(right, results(), strict=True):
                if not np.array_equal(a, b):
                    failures.append(1)

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_works_in_a_forked_child_after_use():
    code = """if True:
        import os, warnings
        import numpy as np
        import scfa_core as scfa
        from scfa_core.backends.numba_cpu import threads
        threads.thread_count = lambda: 3
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads
        x = np.ones((1, 2, 300, 16), np.float32)
        before = scfa.attention(x, x, x, backend="numba-cpu")
        child = os.fork()
        if child == 0:
            same = np.array_equal(before, scfa.attention(x, x, x, backend="numba-cpu"))
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert np.array_equal(before, scfa.attention(x, x, x, backend="numba-cpu"))
    """
    python(code)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_works_in_a_child_forked_while_another_thread_compiles(tmp_path):
    """Numba's lock of compilation would be held there by a thread that does not exist."""
    code = """if True:
        import os, signal, threading, time, warnings
        import numpy as np
        import scfa_core as scfa
        from numba.core.compiler_lock import global_compiler_lock
        # A fork would find half imported what the thread imports: Python's own hazard.
        from scfa_core.backends.numba_cpu import launch
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads
        x = np.ones((1, 2, 300, 16), np.float32)
        plans = []
        def make_plan():
            plans.append(scfa.make_plan(scfa.Causal(), x, x, backend="numba-cpu"))
        def compiles():
            free = global_compiler_lock._lock.acquire(blocking=False)
            if free:
                global_compiler_lock._lock.release()
            return not free
        thread = threading.Thread(target=make_plan)
        thread.start()
        while not compiles():
            assert thread.is_alive(), "everything was compiled before"
            time.sleep(0.01)
        child = os.fork()
        if child == 0:
            signal.alarm(100)
            make_plan()
            os._exit(0 if (plans[0].key_end[0, 0] == np.arange(1, 301)).all() else 1)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended == 0, f"the child ended with {ended}"
        thread.join()
        assert (plans[0].key_end[0, 0] == np.arange(1, 301)).all()
    """
    python(code, NUMBA_CACHE_DIR=str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_thread_that_compiles_may_fork():
    code = """if True:
        import os, signal, threading, warnings
        from numba.core.compiler_lock import global_compiler_lock
        from scfa_core.backends.numba_cpu import threads
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads
        signal.alarm(60)
        def is_free():
            def probe():
                found.append(global_compiler_lock._lock.acquire(blocking=False))
            found = []
            prober = threading.Thread(target=probe)
            prober.start()
            prober.join()
            return found[0]
        with global_compiler_lock:
            child = os.fork()
            assert not is_free()
        fine = is_free()
        if child == 0:
            os._exit(0 if fine else 1)
        assert fine
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    python(code)


def no_thread(_):
    raise RuntimeError("can't start new thread")


def test_kernels_compile_where_no_signal_strikes(monkeypatch):
    """Signals are handled by the main thread, which waits; where it must, it compiles itself."""
    from numba.core.compiler_lock import global_compiler_lock
    from scfa_core.backends.numba_cpu import backward, compiling, forward, plan

    kernels = [forward.forward_tiles, backward.dq_tiles, backward.dkdv_tiles]
    for kernel in (*kernels, plan.sort_lists, plan.key_ranges):
        assert kernel._compile_for_args.__name__ == "compile_aside"

    def compile_for(x, *, by):
        return threading.current_thread().name, 1 // x, by

    call = compiling._out_of_reach(compile_for)
    here = threading.main_thread().name
    assert call(1, by=2) == ("scfa-compile", 1, 2)
    with pytest.raises(ZeroDivisionError):
        call(0, by=2)
    with ThreadPoolExecutor(1, "other") as pool:
        assert pool.submit(call, 1, by=2).result()[0].startswith("other")
    with global_compiler_lock:
        assert call(1, by=2)[0] == here
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    assert call(1, by=2)[0] == here


def test_error_in_a_kernel_thread_is_raised(monkeypatch):
    monkeypatch.setattr(threads, "thread_count", lambda: 3)

    def broken(counter):
        raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        threads.run_tiles(broken, 10)


def test_without_a_cache_folder_it_compiles_and_says_so(monkeypatch, caplog):
    import numba
    from scfa_core.backends.numba_cpu import compiling

    plain = numba.njit

    def refuse(*functions, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return plain(*functions, **options)

    monkeypatch.setattr(compiling.numba, "njit", refuse)
    with caplog.at_level(logging.WARNING, "scfa_core.numba_cpu"):
        add = compiling.kernel(lambda x: x + 1)
    assert add(1) == 2
    assert "not cached on disk" in caplog.text


def test_second_process_compiles_nothing(tmp_path):
    """The disk cache is hit, and a change of any source of the backend is a miss."""
    (tmp_path / "probe.py").write_text(
        "from scfa_core.backends.numba_cpu.compiling import kernel\n\n\n"
        "@kernel\ndef add_one(x):\n    return x + 1\n"
    )
    code = """if True:
        from scfa_core.backends.numba_cpu import compiling
        CHANGE
        import probe
        assert probe.add_one(1) == 2
        print(sum(probe.add_one.stats.cache_hits.values()))
    """
    home = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    same = code.replace("CHANGE", "")
    assert python(same, **home).split() == ["0"]
    assert python(same, **home).split() == ["1"]
    changed = code.replace("CHANGE", "compiling._fingerprint = lambda: 'another source'")
    assert python(changed, **home).split() == ["0"]


def test_memory_does_not_grow_with_the_square():
    """32768 rows: scores would be 4 GiB; beyond inputs and results less than 32 MiB is used."""
    code = """if True:
        import resource
        import numpy as np
        import scfa_core as scfa
        rng = np.random.default_rng(0)
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        def run(rows):
            q, k, v = rng.standard_normal((3, 1, 1, rows, 16), np.float32)
            hashes = rng.integers(0, 128, (2, 1, 1, rows))
            pattern = scfa.HashSparse(*hashes)
            plan = scfa.make_plan(pattern, q, k, backend="numba-cpu")
            out, lse = scfa.attention(q, k, v, plan, return_lse=True, backend="numba-cpu")
            scfa.attention_backward(v, q, k, v, out, lse, plan, backend="numba-cpu")
            return 10 * q.nbytes / 2**20
        run(64)
        before = peak()
        arrays = run(32768)
        print(peak() - before - arrays)
    """
    assert float(python(code)) < 32


def test_without_compilation_it_is_unavailable_with_the_cure(monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    x = np.ones((1, 1, 8, 16), np.float32)
    with pytest.raises(scfa.BackendUnavailable, match="NUMBA_DISABLE_JIT"):
        scfa.attention(x, x, x, backend=BACKEND)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 feature names")
@pytest.mark.parametrize(
    ("features", "width"), [("+avx,+avx2,+fma", 32), ("+sse2", 16)], ids=["avx2", "sse2"]
)
def test_narrower_vector_registers(features, width):
    """The same answers from code for older processors."""
    code = f"""if True:
        import numpy as np
        import scfa_core as scfa
        from scfa_core.testing import Part, Spec, build, judge, run_numpy
        from scfa_core.backends.numba_cpu import vector
        assert vector.REGISTER_BYTES == {width}
        case = build(Spec(heads=2, seqlen_q=130, seqlen_k=97, parts=(Part("hash", "zipf", 3),)))
        verdicts = judge(case, run_numpy(case, "numba-cpu")[0])
        assert all(verdict.ok for verdict in verdicts), verdicts
    """
    python(code, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=features)
