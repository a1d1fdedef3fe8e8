"""numba-cuda's disk cache where processes compile at once: nobody loads another variant's code."""

import errno
import importlib.util
import os
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)
if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
    pytest.skip("the CUDA simulator is on: nothing is compiled", allow_module_level=True)

from numba.cuda.dispatcher import CUDACache


def cache_of_a_process(folder, head_dim):
    """The cache of one variant of dq, as a process of its own opens it, in a folder of its own."""
    from scfa_core.backends.numba_cuda.bwd_dq import build_bwd_dq
    from scfa_core.backends.numba_cuda.disk import _NamedCache, entry_name
    from scfa_core.backends.numba_cuda.tiles import choose_shape

    shape = choose_shape("float32", (head_dim,) * 4)
    kernel = build_bwd_dq("float32", head_dim, head_dim, shape)
    cache = _NamedCache(kernel.function, entry_name(kernel))
    cache._cache_file._cache_path = str(folder)
    cache._cache_file._index_path = str(folder / cache._cache_file._index_name)
    return cache


def index_of_a_process(folder, head_dim):
    return cache_of_a_process(folder, head_dim)._cache_file


def work_between_index_and_code(monkeypatch, first, second, name):
    """`first` keeps its code; `second` has read the index before, and keeps its own meanwhile."""
    write, older = first._save_data, {}

    def write_late(place, data):
        monkeypatch.setattr(second, "_load_index", lambda: older)
        second.save(name, f"code of {name}")
        monkeypatch.undo()
        write(place, data)

    monkeypatch.setattr(first, "_save_data", write_late)
    first.save("64", "code of 64")


def test_two_variants_compiled_at_once(tmp_path, monkeypatch):
    first, second = (index_of_a_process(tmp_path, head_dim) for head_dim in (64, 128))
    work_between_index_and_code(monkeypatch, first, second, "128")
    assert index_of_a_process(tmp_path, 128).load("128") == "code of 128"
    assert index_of_a_process(tmp_path, 64).load("64") == "code of 64"  # neither is lost


def test_one_variant_compiled_at_once_for_two_cards(tmp_path, monkeypatch):
    first, second = (index_of_a_process(tmp_path, 64) for _ in range(2))
    work_between_index_and_code(monkeypatch, first, second, "64 of another card")
    third = index_of_a_process(tmp_path, 64)
    assert third.load("64 of another card") == "code of 64 of another card"
    assert third.load("64") in (None, "code of 64")  # the index of the second knows of none


def test_a_later_process_finds_the_code(tmp_path):
    index_of_a_process(tmp_path, 64).save("64", "code of 64")
    index_of_a_process(tmp_path, 128).save("128", "code of 128")
    assert index_of_a_process(tmp_path, 64).load("64") == "code of 64"
    assert index_of_a_process(tmp_path, 128).load("128") == "code of 128"


SIGNATURE = ()
CONTEXT = SimpleNamespace(
    codegen=lambda: SimpleNamespace(magic_tuple=lambda: ("sm_90",)), refresh=lambda: None
)


def keep(index, cache, code):
    key = cache._index_key(SIGNATURE, CONTEXT.codegen())
    index.save(key, code)


@pytest.mark.parametrize("suffix", ["nbc", "nbi"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04"])
def test_damaged_code_is_made_anew(tmp_path, monkeypatch, caplog, suffix, content):
    cache = cache_of_a_process(tmp_path, 64)
    monkeypatch.setattr(cache._impl, "rebuild", lambda context, payload: payload)
    keep(cache._cache_file, cache, "code of 64")
    assert cache.load_overload(SIGNATURE, CONTEXT) == "code of 64"
    for file in tmp_path.glob(f"*.{suffix}"):
        file.write_bytes(content)
    assert cache.load_overload(SIGNATURE, CONTEXT) is None
    assert "damaged compiled code" in caplog.text
    keep(cache._cache_file, cache, "made anew")
    assert cache.load_overload(SIGNATURE, CONTEXT) == "made anew"


def test_a_full_disk_does_not_stop_a_call(tmp_path, monkeypatch, caplog):
    cache = cache_of_a_process(tmp_path, 64)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CUDACache, "save_overload", full)
    cache.save_overload(SIGNATURE, "code of 64")
    assert "not cached on disk" in caplog.text


def test_no_folder_to_write_to(monkeypatch, caplog):
    from scfa_core.backends.numba_cuda import disk

    def nowhere(*_):
        raise RuntimeError("cannot cache function: no locator available")

    made = SimpleNamespace(compile=lambda types: None, disable_compile=lambda: None)
    monkeypatch.setattr(disk, "_NamedCache", nowhere)
    monkeypatch.setattr(disk.cuda, "jit", lambda function, **options: made)
    signature = SimpleNamespace(args=())
    kernel = SimpleNamespace(function=lambda: None, bounds=None, variant=(), signature=signature)
    assert disk.compile_kernel(kernel) is made
    assert "not cached on disk" in caplog.text
