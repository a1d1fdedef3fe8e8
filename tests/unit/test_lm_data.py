"""The corpus: files once each, none in both splits, the same whatever version is installed."""

import bench_call
import pytest

pytest.importorskip("torch", reason="the language model needs torch (extra 'torch')")
from_the_checkout = bench_call.from_the_checkout


def test_files_count_once_and_are_in_one_split(tmp_path):
    from bench.lm.data import load_corpus

    for nth in range(80):
        (tmp_path / f"{nth}.py").write_text(f"number = {nth % 70}\n")
    (tmp_path / "binary.py").write_bytes(b"a\0b")
    (tmp_path / "picture.png").write_text("no text")
    corpus = load_corpus(tmp_path)
    splits = [data.tobytes().split(b"\0") for data in (corpus.train, corpus.validation)]
    assert corpus.files == len(splits[0]) + len(splits[1]) == 70
    assert not set(splits[0]) & set(splits[1])
    assert sorted(splits[0] + splits[1]) == sorted(f"number = {x}\n".encode() for x in range(70))
    (tmp_path / "new.py").write_text("number = 70\n")
    assert load_corpus(tmp_path).sha256 != corpus.sha256


def test_this_package_is_no_part_of_the_corpus(tmp_path, monkeypatch):
    from bench.lm import data

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.py").write_text("a = 1\n")
    paths = {"stdlib": str(tmp_path / "none"), "purelib": str(tmp_path)}
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: paths)
    before = data.load_corpus()
    for folder in ("scfa_core", "scfa_core-1.dist-info"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.txt").write_text("of this version\n")
    (tmp_path / "__editable___scfa_core_1_finder.py").write_text("where = 'a checkout'\n")
    assert data.load_corpus().sha256 == before.sha256
    assert before.files == 1


def test_a_separator_begins_the_document_after_it():
    import torch

    from bench.lm.data import document_ids

    text = torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 5, 6, 7, 8, 9, 9]])
    assert document_ids(text).tolist() == [[0, 0, 1, 1, 2, 3, 3], [1] * 7]
