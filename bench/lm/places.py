"""Validation loss by how far into its sequence a token stands: what a long reach is worth."""

from __future__ import annotations

import torch

from bench.lm.train import Trainer

HALVINGS = 4  # of the sequence: its last half, the quarter before, and so on


def ends(seqlen: int) -> list[int]:
    """Where each stretch of a sequence ends: doubling, up to all of it."""
    return sorted({max(seqlen >> n, 1) for n in range(HALVINGS + 1)})


def by_place(trainer: Trainer, batches: int) -> dict[str, list[float]]:
    """Mean loss in nats of the tokens up to each of `ends` (beyond the one before).

    Over the sequences that `Trainer.validate` takes, from the same seeds. Nothing is compiled
    here, and compiled parts may draw other numbers from a seed: only with compile="none" are hashes
    and drops, and so the mean, those of validation. In a tiny model the mean was up to about 0.004
    nats off with compile="model", 0.001 for drop50 with "blocks".

    The first stretch says what tokens cost that see little text; what later ones cost less is what
    the text before gives.
    """
    stops = ends(trainer.config.seqlen)
    means = []
    for batch in trainer.validation_batches(batches):
        with trainer.precision():
            means.append(trainer.model.token_losses(*batch).double().mean(0).cpu())
    mean = torch.stack(means).mean(0)
    stretches = zip([0, *stops[:-1]], stops, strict=True)
    return {"ends": stops, "loss": [float(mean[begin:end].mean()) for begin, end in stretches]}
