"""The patterns, one a file; each is a conjunction of group, keep and interval clauses."""

from scfa_core.patterns.base import Intersection, Pattern
from scfa_core.patterns.causal import Causal
from scfa_core.patterns.documents import Documents
from scfa_core.patterns.hash_sparse import HashSparse
from scfa_core.patterns.key_ranges import KeyRanges
from scfa_core.patterns.qk_sparse import QKSparse
from scfa_core.patterns.sliding_window import SlidingWindow

__all__ = [
    "Causal",
    "Documents",
    "HashSparse",
    "Intersection",
    "KeyRanges",
    "Pattern",
    "QKSparse",
    "SlidingWindow",
]
