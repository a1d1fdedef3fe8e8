"""The cubin cache: whole or absent, checked, and never the reason why a call fails."""

import errno
import logging
import os
import threading
from functools import partial

import pytest
from scfa_core.backends.cupy_raw import disk_cache, loader, nvrtc

from scfa_core.errors import BackendUnavailable


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SCFA_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def test_what_is_stored_comes_back(folder):
    assert disk_cache.load("key") is None
    assert disk_cache.store("key", b"cubin")
    assert disk_cache.load("key") == b"cubin"
    assert [path.name for path in folder.iterdir()] == ["key.cubin"]


def test_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SCFA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk_cache.cache_dir() == tmp_path / "scfa_core"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert disk_cache.cache_dir() == tmp_path / "home" / ".cache" / "scfa_core"


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "only a digest"])
def test_damage_is_noticed_and_repaired(folder, caplog, damage):
    disk_cache.store("key", b"a long enough cubin")
    path = folder / "key.cubin"
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncate": whole[:-3],
            "flip": whole[:40] + bytes([whole[40] ^ 1]) + whole[41:],
            "empty": b"",
            "only a digest": whole[:32],
        }[damage]
    )
    assert disk_cache.load("key") is None
    assert "damaged" in caplog.text
    assert disk_cache.store("key", b"a long enough cubin")
    assert disk_cache.load("key") == b"a long enough cubin"


def test_a_folder_that_cannot_be_made_is_told_not_raised(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SCFA_CACHE_DIR", str(tmp_path / "file"))
    assert not disk_cache.store("key", b"cubin")
    assert "cannot be written" in caplog.text
    assert disk_cache.load("key") is None


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert not disk_cache.store("key", b"cubin")
    assert "No space left" in caplog.text
    assert list(folder.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        disk_cache.store("key", b"cubin")
    assert list(folder.iterdir()) == []
    assert disk_cache.load("key") is None


def test_many_writers_and_readers_at_once(folder):
    """A reader sees nothing or a whole cubin, whoever writes meanwhile."""
    body, seen = os.urandom(200_000), []

    def write():
        for _ in range(20):
            assert disk_cache.store("key", body)

    def read():
        for _ in range(60):
            seen.append(disk_cache.load("key"))

    threads = [threading.Thread(target=job) for job in (write, write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) <= {None, body}
    assert disk_cache.load("key") == body
    assert [path.name for path in folder.iterdir()] == ["key.cubin"]


def test_the_key_tells_builds_apart(monkeypatch):
    base = ("fwd.cu", (("HEAD_DIM", 64),), "90a", (12, 9))
    keys = {loader.cache_key(*base)}
    assert loader.cache_key(*base) in keys
    keys.add(loader.cache_key("bwd_dq.cu", *base[1:]))
    keys.add(loader.cache_key("fwd.cu", (("HEAD_DIM", 128),), *base[2:]))
    keys.add(loader.cache_key(*base[:2], "90", (12, 9)))
    keys.add(loader.cache_key(*base[:3], (13, 0)))
    monkeypatch.setattr(loader, "_package_version", lambda: "9.9")
    keys.add(loader.cache_key(*base))
    monkeypatch.undo()
    sources = dict(nvrtc.read_sources())
    header = next(name for name in sources if name.endswith(".cuh"))
    monkeypatch.setattr(nvrtc, "read_sources", lambda: {**sources, header: sources[header] + "\n"})
    loader._sources_digest.cache_clear()
    keys.add(loader.cache_key(*base))
    monkeypatch.undo()
    loader._sources_digest.cache_clear()
    assert len(keys) == 7


class FakeCompiler:
    """Counts compilations."""

    def __init__(self):
        self.count = 0

    def version(self):
        return (12, 9)

    def compile(self, name, source, headers, options):
        self.count += 1
        return nvrtc.Compiled(b"cubin of " + name.encode(), "")


def test_compiled_once_then_read(folder, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "scfa_core")
    compiler = FakeCompiler()
    monkeypatch.setattr(nvrtc, "cupy_compiler", lambda: compiler)
    request = ("plan_sort.cu", (("K", 3),), "80")
    assert loader._cubin(*request) == b"cubin of plan_sort.cu"
    assert "compiling plan_sort.cu (sm_80, K=3), about 5 s, once per machine" in caplog.text
    assert loader._cubin(*request) == b"cubin of plan_sort.cu"
    assert compiler.count == 1


def test_an_interrupted_compilation_leaves_nothing(folder, monkeypatch):
    class Interrupted(FakeCompiler):
        def compile(self, *_):
            raise KeyboardInterrupt

    monkeypatch.setattr(nvrtc, "cupy_compiler", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        loader._cubin("plan_sort.cu", (), "80")
    assert not folder.exists() or list(folder.iterdir()) == []
    compiler = FakeCompiler()
    monkeypatch.setattr(nvrtc, "cupy_compiler", lambda: compiler)
    assert loader._cubin("plan_sort.cu", (), "80") == b"cubin of plan_sort.cu"


def test_threads_share_one_compilation(folder, monkeypatch):
    """Eight threads ask for one kernel: one compiles and loads, all get the same object."""
    compiler = FakeCompiler()
    monkeypatch.setattr(nvrtc, "cupy_compiler", lambda: compiler)
    monkeypatch.setattr(loader, "_target", lambda device, suffix: "80")
    monkeypatch.setattr(loader, "_kernels", {})
    monkeypatch.setattr(loader, "Kernel", lambda name, cubin, device: object())
    got = []
    threads = [
        threading.Thread(target=lambda: got.append(loader.get_kernel("n", "plan_sort.cu", (), 0)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiler.count == 1
    assert len(got) == 8
    assert len(set(map(id, got))) == 1


def test_the_build_for_the_sanitizer_is_another_kernel(monkeypatch):
    """A constant more for Hopper's kernels, none for others; a wrong word is refused."""
    asked = []

    def compile_nothing(source, constants, arch):
        asked.append((arch, constants))
        return b""

    monkeypatch.setattr(loader, "_cubin", compile_nothing)
    monkeypatch.setattr(loader, "_target", lambda device, suffix: f"90{suffix}")
    monkeypatch.setattr(loader, "_kernels", {})
    monkeypatch.setattr(loader, "Kernel", lambda name, cubin, device: object())
    got = []
    for value in ("0", "1"):
        monkeypatch.setenv("SCFA_CUPY_SANITIZE", value)
        for suffix in ("", "a", "a"):
            got.append(loader.get_kernel("n", "n.cu", (("K", 3),), 0, arch_suffix=suffix))
    portable, shipped, again, portable_too, watched, watched_again = got
    assert portable is portable_too
    assert shipped is again
    assert watched is watched_again
    assert watched is not shipped
    plain = (("K", 3),)
    assert asked == [("90", plain), ("90a", plain), ("90a", (*plain, ("SANITIZE", 1)))]
    monkeypatch.setenv("SCFA_CUPY_SANITIZE", "yes")
    with pytest.raises(BackendUnavailable, match=r"SCFA_CUPY_SANITIZE must be one of .* got 'yes'"):
        loader.get_kernel("n", "n.cu", (), 0)


def test_kernels_are_made_side_by_side_and_once():
    meeting = threading.Barrier(3, timeout=30)
    made = []

    def maker(name):
        meeting.wait()  # breaks unless all three are under way
        made.append(name)

    for _ in range(2):
        loader.side_by_side("three of a test", [partial(maker, i) for i in range(3)])
    assert sorted(made) == [0, 1, 2]


def test_a_kernel_that_was_not_made_is_asked_for_again():
    asked = []

    def maker(fails):
        asked.append(fails)
        if fails:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        loader.side_by_side("one that fails", [partial(maker, True), partial(maker, False)])
    loader.side_by_side("one that fails", [partial(maker, False)])
    assert asked.count(False) == 2


def test_kernels_are_made_where_no_further_thread_is_to_be_had(monkeypatch):
    made, start = [], threading.Thread.start
    started = []

    def refuse(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    loader.side_by_side("four, one thread", [partial(made.append, i) for i in range(4)])
    assert set(made) == {0, 1, 2, 3}
    monkeypatch.setattr(threading.Thread, "start", lambda thread: refuse(None))
    made.clear()
    loader.side_by_side("four, no thread", [partial(made.append, i) for i in range(4)])
    assert made == [0, 1, 2, 3]
