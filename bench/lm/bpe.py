"""Byte-pair tokens instead of bytes: a tokeniser trained on the corpus itself, kept in a folder.

Only training text decides the merges. Loss by token depends on the tokeniser, so a corpus made here
knows how many bytes a token stands for, and results are told in bits a byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.lm.data import SEPARATOR, Corpus

VOCABULARY = 8192
SEPARATOR_TOKEN = chr(SEPARATOR)  # gets id 0, which is `SEPARATOR`; no document holds it
TRAINING_BYTES = 20_000_000  # merges are learnt from about so much text
PIECE = 1 << 16  # bytes encoded at once; nothing is merged across pieces
PIECES_AT_ONCE = 256


def _tokenizers() -> Any:
    """The package, or what to do without it."""
    try:
        import tokenizers
    except ImportError:
        raise SystemExit(
            "--tokens bpe needs the package tokenizers (pip install tokenizers); --tokens byte "
            "needs nothing"
        ) from None
    return tokenizers


def _pieces(document: bytes) -> Iterator[str]:
    """A document in stretches that end with a line, where there is a line end."""
    begin = 0
    while begin < len(document):
        end = begin + PIECE
        if end < len(document):
            line = document.rfind(b"\n", begin, end)
            end = end if line < begin else line + 1
        yield document[begin:end].decode(errors="replace")
        begin = end


def _train(data: np.ndarray, vocabulary: int) -> Any:
    """A byte-level tokeniser from documents spread evenly over the text."""
    tokenizers = _tokenizers()
    documents = data.tobytes().split(bytes([SEPARATOR]))
    every = max(len(data) // TRAINING_BYTES, 1)
    if len(documents) < 2 * every:  # one long text: take its beginning
        documents, every = [documents[0][:TRAINING_BYTES]], 1
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR_TOKEN],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (piece for document in documents[::every] for piece in _pieces(document))
    model.train_from_iterator(texts, trainer)
    return model


def _encode(model: Any, data: np.ndarray) -> np.ndarray:
    """Ids of a split, a separator between documents."""
    parts: list[np.ndarray] = []
    waiting: list[str | None] = []  # None is a separator

    def flush() -> None:
        encoded = iter(model.encode_batch([x for x in waiting if x is not None]))
        for piece in waiting:
            ids = [SEPARATOR] if piece is None else next(encoded).ids
            parts.append(np.array(ids, np.int32))
        waiting.clear()

    for nth, document in enumerate(data.tobytes().split(bytes([SEPARATOR]))):
        if nth:
            waiting.append(None)
        waiting.extend(_pieces(document))
        if len(waiting) >= PIECES_AT_ONCE:
            flush()
    flush()
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _separators(*splits: np.ndarray) -> list[int]:
    """How many there are in each split, by bytes or by tokens."""
    return [int((split == SEPARATOR).sum()) for split in splits]


def _kept(path: Path, corpus: Corpus) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens of both splits as stored, unless there are none or they have other documents.

    Once the separator had a name that could stand in a text, and such text became a boundary.
    """
    if not path.exists():
        return None
    with np.load(path) as arrays:
        train, validation = arrays["train"], arrays["validation"]
    same = _separators(train, validation) == _separators(corpus.train, corpus.validation)
    return (train, validation) if same else None


def as_bpe(corpus: Corpus, vocabulary: int, folder: Path) -> Corpus:
    """The same text by tokens of a byte-pair tokeniser with `vocabulary` ids.

    `folder` keeps the tokeniser and the ids under the hash of the corpus, and a later call reads
    them instead of making them anew.
    """
    tokenizers = _tokenizers()
    smallest = len(tokenizers.pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocabulary < smallest:
        raise SystemExit(
            f"a byte-level tokeniser needs a vocabulary of at least {smallest}, got {vocabulary}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{corpus.sha256[:16]}-bpe{vocabulary}"
    kept = folder / f"{name}.npz"
    found = _kept(kept, corpus)
    if found is None:
        model = _train(corpus.train, vocabulary)
        model.save(str(folder / f"{name}.json"))
        found = _encode(model, corpus.train), _encode(model, corpus.validation)
        partial = folder / f"{name}.{os.getpid()}.npz"  # other processes may make the same
        np.savez(partial, train=found[0], validation=found[1])
        partial.replace(kept)
    train, validation = found
    return corpus._replace(
        train=train,
        validation=validation,
        sha256=f"{corpus.sha256}-bpe{vocabulary}",
        unit="token",
        bytes_per_token=len(corpus.validation) / max(len(validation), 1),
    )
