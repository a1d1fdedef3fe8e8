"""Documents and padding of a layer's call, as patterns that its own are intersected with."""

from __future__ import annotations

import torch
from torch import Tensor

from scfa_core.errors import ShapeError
from scfa_core.patterns import Documents, Pattern, QKSparse
from scfa_core.torch_checks import broadcasts, check_tensor


def limits_of(x: Tensor, documents: Tensor | None, keep: Tensor | None) -> list[Pattern]:
    """What every pattern of a call is intersected with, from (batch, seqlen) ids and flags."""
    for name, given in (("documents", documents), ("keep", keep)):
        if given is None:
            continue
        got, rows = check_tensor(name, given, "batch", "seqlen").shape, x.shape[:2]
        # compared in a graph, open lengths would be tied to each other and kept from being 1
        if not torch.compiler.is_compiling() and not broadcasts(got, rows):
            raise ShapeError(
                f"{name} must be (batch, seqlen) = {tuple(rows)} like x, got "
                f"{name}.shape={tuple(got)}"
            )
    limits: list[Pattern] = []
    if documents is not None:
        limits.append(Documents(documents, causal=False))
    if keep is not None:
        limits.append(QKSparse(keep[:, None], keep[:, None], causal=False))
    return limits


def narrowed(pattern: Pattern, limits: list[Pattern]) -> Pattern:
    """Intersect a pattern with each limit."""
    for limit in limits:
        pattern = pattern & limit
    return pattern
