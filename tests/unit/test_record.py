"""The record of the last GPU run belongs to the sources in the tree, or says what is waiting."""

import importlib.util
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[1] / "gpu" / "record.py"
_SPEC = importlib.util.spec_from_file_location("gpu_record", _PATH)
record = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(record)

BACKENDS = [name for name, folder in record.FOLDERS.items() if (record.ROOT / folder).exists()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_source_was_run_or_is_named_as_pending(backend, capsys):
    waiting = record.read_pending()
    unexplained = []
    for path in record.stale_files(backend, record.read_record()):
        reasons = [entry.why for entry in waiting if record.matches(entry, path)]
        if reasons:
            with capsys.disabled():
                print(f"\n  waiting for a GPU run: {path} ({reasons[0]})", end="")
        else:
            unexplained.append(path)
    assert not unexplained, (
        f"changed since the recorded GPU run: {', '.join(unexplained)}; {record.RENEW}, "
        "or name the file and the reason in tests/gpu/pending.toml"
    )


def test_pending_names_only_what_waits():
    stale = [path for name in BACKENDS for path in record.stale_files(name, record.read_record())]
    for entry in record.read_pending():
        assert entry.why.strip(), f"pending.toml: {entry.files} needs a reason"
        assert any(record.matches(entry, path) for path in stale), (
            f"pending.toml: nothing is waiting under {entry.files!r} any more; take the entry out"
        )


def test_recorded_run_was_green():
    found = record.read_record()
    if not found:
        pytest.skip("no GPU run is recorded yet; pending.toml says why")
    assert found["failed"] == 0
    assert found["passed"] > 0
    for name, sources in found["sources"].items():
        assert sources["digest"] == record.whole_digest(sources["files"]), name


@pytest.mark.parametrize("change", ["edit", "add", "remove"])
def test_a_changed_source_is_noticed(monkeypatch, change):
    before = {"a.cu": "1", "b.cuh": "2"}
    after = {
        "edit": {"a.cu": "9", "b.cuh": "2"},
        "add": {**before, "c.py": "3"},
        "remove": {"a.cu": "1"},
    }
    monkeypatch.setattr(record, "source_digests", lambda backend: after[change])
    kept = {"sources": {"cupy": {"files": before}}}
    expected = {"edit": ["a.cu"], "add": ["c.py"], "remove": ["b.cuh"]}[change]
    assert record.stale_files("cupy", kept) == expected


def test_patterns_reach_into_folders():
    entry = record.Waiting("backends/cupy_raw/*", "why")
    assert record.matches(entry, "backends/cupy_raw/cuda/fwd.cu")
    assert not record.matches(entry, "backends/numba_cuda/fwd.py")
