"""numba-cuda's disk cache where processes compile at once: nobody loads another variant's code."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)
if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
    pytest.skip("the CUDA simulator is on: nothing is compiled", allow_module_level=True)


def index_of_a_process(folder, head_dim):
    """The cache of one variant of dq, as a process of its own opens it, in a folder of its own."""
    from scfa_core.backends.numba_cuda.bwd_dq import build_bwd_dq
    from scfa_core.backends.numba_cuda.disk import _NamedCache, entry_name
    from scfa_core.backends.numba_cuda.tiles import choose_shape

    shape = choose_shape("float32", (head_dim,) * 4)
    kernel = build_bwd_dq("float32", head_dim, head_dim, shape)
    index = _NamedCache(kernel.function, entry_name(kernel))._cache_file
    index._cache_path = str(folder)
    index._index_path = str(folder / index._index_name)
    return index


def test_two_variants_compiled_at_once(tmp_path, monkeypatch):
    """The second process works between the first one's index and the first one's code."""
    first, second = (index_of_a_process(tmp_path, head_dim) for head_dim in (64, 128))
    assert first._index_path == second._index_path
    write, older = first._save_data, {}

    def write_late(name, data):
        monkeypatch.setattr(second, "_load_index", lambda: older)  # read before the first wrote
        second.save("128", "code of 128")
        monkeypatch.undo()
        write(name, data)

    monkeypatch.setattr(first, "_save_data", write_late)
    first.save("64", "code of 64")
    third = index_of_a_process(tmp_path, 64)
    assert third.load("128") == "code of 128"
    assert third.load("64") in (None, "code of 64")  # the index of the second knows of none


def test_a_later_process_finds_the_code(tmp_path):
    index_of_a_process(tmp_path, 64).save("64", "code of 64")
    index_of_a_process(tmp_path, 128).save("128", "code of 128")
    third = index_of_a_process(tmp_path, 64)
    assert third.load("64") == "code of 64"
    assert third.load("128") == "code of 128"
