"""Images as sequences of pixels, row by row, predicted one after the other, as in the paper.

The paper took MNIST. Here are the digits that ship with scikit-learn (8x8 pixels, 17 grey levels),
or the images of a file. Sequences longer than an image hold many images, drawn at random, one after
the other; nothing but their pixels tells where one ends.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.lm.data import VALIDATION_SHARE, Corpus, Split
from bench.lm.train import Trainer

START = 0  # stands before the first pixel; grey level v is token v + 1
SPLIT_SEED = 0
SAMPLES = 16  # images drawn by a trained model


class Images(NamedTuple):
    """Pixels as tokens, and how to show them."""

    corpus: Corpus
    name: str
    height: int
    width: int
    levels: int


class ImageSplit(Split):
    """Images (count, pixels) of one split; a sequence is whole images at random."""

    def holds(self, seqlen: int) -> bool:
        """Images may repeat, so any length can be filled."""
        return True

    def batch(
        self, seqlen: int, sequences: int, seed: int, draw: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (sequences, seqlen); every target is a pixel."""
        count, pixels = self.data.shape
        if seqlen % pixels:
            raise SystemExit(f"seqlen={seqlen} must be a multiple of the {pixels} pixels")
        shape = (sequences, seqlen // pixels)
        chosen = np.random.default_rng([seed, draw]).integers(0, count, shape)
        rows = torch.from_numpy(chosen)
        if self.data.is_cuda:  # a copy of pageable memory would wait until the GPU is idle
            rows = rows.pin_memory().to(self.data.device, non_blocking=True)
        target = self.data[rows].flatten(1).long()
        start = torch.full_like(target[:, :1], START)
        return torch.cat([start, target[:, :-1]], dim=1), target


def _digits() -> np.ndarray:
    """The handwritten digits of scikit-learn: 1797 images of 8x8, values 0 to 16."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit(
            "the digits are part of scikit-learn (pip install scikit-learn); or pass --data FILE, "
            "an .npz whose array 'images' is (count, height, width) of small whole numbers"
        ) from None
    return load_digits().images.astype(np.uint8)


def load_images(path: Path | None = None) -> Images:
    """Images of an .npz file, by default scikit-learn's digits, one in twenty for validation."""
    if path is None:
        name, images = "scikit-learn's digits", _digits()
    else:
        with np.load(path) as arrays:
            if "images" not in arrays:
                raise SystemExit(f"{path} has no array 'images', only {sorted(arrays)}")
            name, images = path.stem, arrays["images"]
    if images.ndim != 3 or images.dtype.kind not in "iu" or images.min() < 0 or images.max() > 255:
        raise SystemExit(
            "images must be (count, height, width) of whole numbers from 0 to 255, got "
            f"{images.shape} {images.dtype}"
        )
    count, height, width = images.shape
    held = max(count // VALIDATION_SHARE, 1)
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    tokens = images.reshape(count, -1)[order].astype(np.int32) + 1
    digest = hashlib.sha256(repr(images.shape).encode() + tokens.tobytes()).hexdigest()
    corpus = Corpus(tokens[held:], tokens[:held], digest, count, unit="pixel", reader=ImageSplit)
    return Images(corpus, name, height, width, int(images.max()) + 1)


@torch.no_grad()
def sample(trainer: Trainer, pixels: int, count: int = SAMPLES, seed: int = 0) -> list[list[int]]:
    """Grey levels of `count` images that the model draws pixel by pixel, from the start token."""
    torch.manual_seed(seed)
    device = trainer.where.device
    text = torch.full((count, 1), START, dtype=torch.long, device=device)
    for _ in range(pixels):
        with trainer.precision():
            logits = trainer.model.next_logits(text)
        logits[:, START] = -torch.inf
        drawn = torch.multinomial(torch.softmax(logits, dim=-1), 1)
        text = torch.cat([text, drawn], dim=1)
    levels: list[list[int]] = (text[:, 1:] - 1).tolist()
    return levels


def facts(images: Images, trainer: Trainer) -> dict[str, Any]:
    """What a finished run keeps beside its curve: images that it drew, and a few real ones."""
    real = images.corpus.validation[:SAMPLES] - 1
    return {
        "images": images.name,
        "shape": [images.height, images.width],
        "levels": images.levels,
        "samples": sample(trainer, images.height * images.width),
        "real": real.tolist(),
    }
