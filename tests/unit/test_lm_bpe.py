"""Byte-pair tokens: they give the text back, are kept by corpus, and results know their bytes."""

import json
import sys

import bench_call
import numpy as np
import pytest

pytest.importorskip("torch", reason="the language model needs torch (extra 'torch')")
from_the_checkout = bench_call.from_the_checkout


@pytest.fixture
def folder(tmp_path):
    """Sixty files, one of them long, with signs of several bytes."""
    home = tmp_path / "text"
    home.mkdir()
    for nth in range(60):
        (home / f"{nth}.py").write_text(f"def number_{nth}(x):\n    return x + {nth}  # größer\n")
    (home / "long.py").write_text("value = value + 1\n" * 8000)
    (home / "line.txt").write_text("no end of line " * 6000)
    return home


def test_tokens_give_the_text_back_and_are_kept(folder, tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers", reason="byte-pair tokens need tokenizers")
    from bench.lm import bpe
    from bench.lm.data import load_corpus

    corpus = load_corpus(folder)
    found = bpe.as_bpe(corpus, 300, tmp_path / "kept")
    (saved,) = (tmp_path / "kept").glob("*.json")
    model = tokenizers.Tokenizer.from_file(str(saved))
    for tokens, data in ((found.train, corpus.train), (found.validation, corpus.validation)):
        texts = data.tobytes().decode().split("\0")
        ends = np.flatnonzero(tokens == 0)
        documents = [model.decode(part.tolist()) for part in np.split(tokens, ends)]
        assert documents == texts
        assert tokens.max() < 300
    assert found.unit == "token"
    assert found.bytes_per_token == len(corpus.validation) / len(found.validation)
    assert found.bytes_per_token > 1.5
    assert found.sha256 != corpus.sha256

    monkeypatch.setattr(bpe, "_train", lambda *_: pytest.fail("trained again"))
    again = bpe.as_bpe(corpus, 300, tmp_path / "kept")
    assert np.array_equal(again.train, found.train)
    with pytest.raises(SystemExit, match="at least 257, got 100"):
        bpe.as_bpe(corpus, 100, tmp_path / "kept")


def test_the_name_of_a_separator_in_a_text_is_text(folder, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers", reason="byte-pair tokens need tokenizers")
    from bench.lm import bpe
    from bench.lm.data import load_corpus

    def older(corpus, kept):
        """As made when the name could stand in a text."""
        with monkeypatch.context() as patch:
            patch.setattr(bpe, "SEPARATOR_TOKEN", "<separator>")
            return bpe.as_bpe(corpus, 300, kept)

    plain = load_corpus(folder)
    before, now = older(plain, tmp_path / "older"), bpe.as_bpe(plain, 300, tmp_path / "new")
    assert np.array_equal(before.train, now.train)
    assert np.array_equal(before.validation, now.validation)
    assert before.sha256 == now.sha256 == f"{plain.sha256}-bpe300"

    for nth in range(60):
        (folder / f"named_{nth}.py").write_text(f"token_{nth} = '<separator>' or '\\0'\n")
    corpus = load_corpus(folder)
    wrong, kept = older(corpus, tmp_path / "named"), tmp_path / "named"
    again = bpe.as_bpe(corpus, 300, kept)  # what is kept has boundaries that the text has not
    for split in ("train", "validation"):
        documents = (getattr(corpus, split) == 0).sum()
        assert (getattr(wrong, split) == 0).sum() > documents
        assert (getattr(again, split) == 0).sum() == documents
    monkeypatch.setattr(bpe, "_train", lambda *_: pytest.fail("trained again"))
    assert np.array_equal(bpe.as_bpe(corpus, 300, kept).train, again.train)


def test_without_the_package_the_error_says_so(folder, tmp_path, monkeypatch):
    from bench.lm import bpe
    from bench.lm.data import load_corpus

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SystemExit, match="pip install tokenizers"):
        bpe.as_bpe(load_corpus(folder), 300, tmp_path)


def test_quality_by_tokens_is_told_in_bits_a_byte(folder, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers", reason="byte-pair tokens need tokenizers")
    from bench.lm import __main__ as command
    from bench.lm.curves import end_table

    kept = tmp_path / "quality.json"
    words = f"bench.lm quality --preset tiny --text {folder} --seqlen 32 --tokens-per-step 64 "
    words += f"--steps 10 --vocabulary 300 --variants dense --json {kept} --tokens bpe"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit, match="needs --bpe-folder"):
        command.main()
    monkeypatch.setattr(sys, "argv", [*words.split(), "--bpe-folder", str(tmp_path / "kept")])
    command.main()
    (run,) = json.loads(kept.read_text())["runs"]
    assert run["done"], run.get("error")
    assert run["config"]["vocabulary"] == 300
    assert run["by_place"]["ends"] == [2, 4, 8, 16, 32]
    head, _, row = end_table([run])
    assert "bits a token | bits a byte" in head
    bits = run["curve"][-1]["validation"] / np.log(2)
    assert f"| {bits:.4f} | {bits / run['bytes_per_token']:.4f} |" in row
