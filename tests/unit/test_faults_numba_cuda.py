"""An interrupt while numba-cuda compiles or keeps a kernel: the next call has the right code."""

import importlib.util
import os
import threading
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)
if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
    pytest.skip("the CUDA simulator is on: nothing is compiled", allow_module_level=True)

from scfa_core.backends.numba_cuda import compiling, disk

QUEUE = compiling.Queue(0, 0)


@pytest.fixture
def launched(monkeypatch):
    """What reached the driver; its entry points are a pretence, there may be no card."""
    from scfa_core.backends.numba_cuda import driver

    seen = []

    class Entry:
        def __init__(self, definition, arguments, device):
            self.definition = definition

        def launch(self, *what):
            seen.append(self.definition)

    monkeypatch.setattr(driver, "Entry", Entry)
    return seen


def a_kernel():
    return compiling.kernel("int32:1", variant=(1,))(lambda x: None)


def test_an_interrupted_compilation_is_begun_anew(launched, monkeypatch):
    tries = []

    def compiled(kernel):
        tries.append(kernel)
        if len(tries) == 1:
            raise KeyboardInterrupt
        return SimpleNamespace(overloads={"signature": "code"})

    monkeypatch.setattr(disk, "compile_kernel", compiled)
    kernel = a_kernel()
    with pytest.raises(KeyboardInterrupt):
        kernel.launch(1, 32, QUEUE, ())
    assert not launched
    threads = [threading.Thread(target=kernel.launch, args=(1, 32, QUEUE, ())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "a lock was left behind"
    assert launched == ["code"] * 4
    assert len(tries) == 2  # threads that ask at once wait for one compilation


def test_an_interrupt_while_code_is_written_leaves_nothing_wrong(tmp_path, monkeypatch):
    """numba writes the index first: a later process finds an entry without its code."""
    context = SimpleNamespace(
        codegen=lambda: SimpleNamespace(magic_tuple=lambda: ("sm_90",)), refresh=lambda: None
    )

    def process():
        cache = disk._NamedCache(a_kernel().function, ("a name",))
        cache._cache_file._cache_path = str(tmp_path)
        cache._cache_file._index_path = str(tmp_path / cache._cache_file._index_name)
        monkeypatch.setattr(cache._impl, "rebuild", lambda context, payload: payload)
        return cache, cache._cache_file, cache._index_key((), context.codegen())

    cache, files, key = process()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "_save_data", interrupted)
        with pytest.raises(KeyboardInterrupt):
            files.save(key, "code")
    assert list(tmp_path.glob("*.nbi"))
    assert not list(tmp_path.glob("*.nbc"))
    cache, files, key = process()
    assert cache.load_overload((), context) is None
    files.save(key, "made anew")
    cache, *_ = process()
    assert cache.load_overload((), context) == "made anew"
