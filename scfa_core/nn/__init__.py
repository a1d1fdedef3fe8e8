"""Modules for torch models: self-attention with each pattern, the hash, and a Reformer baseline.

>>> from scfa_core.nn import HashSelfAttention
>>> HashSelfAttention(64, heads=4, buckets=8)(torch.randn(2, 30, 64)).shape
torch.Size([2, 30, 64])
"""

from scfa_core.extras import missing

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise missing("scfa_core.nn", "torch", error) from error

import scfa_core.torch_hashing
import scfa_core.torch_union_ops  # noqa: F401  (both register operators: loaded programs need them)
from scfa_core.nn.attention import (
    DenseSelfAttention,
    SparseSelfAttention,
    WindowSelfAttention,
)
from scfa_core.nn.dropping import DropSelfAttention
from scfa_core.nn.hash_attention import HashSelfAttention
from scfa_core.nn.hashing import AngularHash, move_centers
from scfa_core.nn.reformer import Coverage, ReformerAttention

__all__ = [
    "AngularHash",
    "Coverage",
    "DenseSelfAttention",
    "DropSelfAttention",
    "HashSelfAttention",
    "ReformerAttention",
    "SparseSelfAttention",
    "WindowSelfAttention",
    "move_centers",
]
