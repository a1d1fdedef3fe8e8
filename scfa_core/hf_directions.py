"""The operator ``scfa::directions``: a layer's hash directions, drawn from a seed and kept.

Drawing is NumPy's, which no graph holds; an operator goes into a graph whole, so that a model may
be compiled before its first call. What is kept outlives the call that made it: another thread makes
it, where neither a memory pool nor a mode of the caller holds. Callers get copies, for a graph may
write over whatever an operator gave it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from scfa_core.hashing import random_directions
from scfa_core.torch_fakes import register_fake

__all__ = ["DIRECTIONS"]

LIBRARY = torch.library.Library("scfa", "FRAGMENT")
LIBRARY.define(
    "directions(int heads, int head_dim, int buckets, int seed, Device device) -> Tensor"
)
DIRECTIONS = torch.ops.scfa.directions.default


@cache
def _kept(heads: int, head_dim: int, buckets: int, seed: int, device: torch.device) -> torch.Tensor:
    """Directions for `angular_hash` on `device`, the same for every caller."""

    def make() -> torch.Tensor:
        drawn = random_directions(heads, head_dim, buckets, seed=seed)
        return torch.from_numpy(drawn).to(device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def _copied(
    heads: int, head_dim: int, buckets: int, seed: int, device: torch.device
) -> torch.Tensor:
    return _kept(heads, head_dim, buckets, seed, device).clone()


def _fake(heads: int, head_dim: int, buckets: int, seed: int, device: torch.device) -> torch.Tensor:
    return torch.empty((1, heads, head_dim, buckets // 2), dtype=torch.float32, device=device)


LIBRARY.impl("directions", _copied, "CompositeExplicitAutograd")
register_fake("directions", _fake, LIBRARY)
