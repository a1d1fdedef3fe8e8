"""Tensors and patterns that several processes share, and what one of them makes of all."""

import torch

import scfa_core as scfa

SEQLEN = 24


def draw(heads_kv=2, seed=0):
    """Q, k, v and the gradient of out, in float64."""
    generator = torch.Generator().manual_seed(seed)
    heads = (4, heads_kv, heads_kv, 4)
    return [torch.randn((2, h, SEQLEN, 16), generator=generator).double() for h in heads]


def patterns(heads_kv=2):
    """Each kind, arrays for every head or one for all."""
    generator = torch.Generator().manual_seed(7)

    def ints(*shape, most=3):
        return torch.randint(0, most, shape, generator=generator)

    ends = ints(2, 4, SEQLEN, most=SEQLEN + 1)
    return {
        "causal": scfa.Causal(),
        "strict": scfa.Causal(include_self=False),
        "far": scfa.Causal(lag=9),
        "hash": scfa.HashSparse(ints(2, 4, SEQLEN), ints(2, heads_kv, SEQLEN), include_self=False),
        "one hash for all": scfa.HashSparse(ints(1, 1, SEQLEN), ints(1, 1, SEQLEN), causal=False),
        "drop": scfa.QKSparse(ints(2, 4, SEQLEN), ints(2, heads_kv, SEQLEN)),
        "documents": scfa.Documents(torch.arange(SEQLEN).expand(2, -1) // 7),
        "window": scfa.SlidingWindow(5),
        "window both ways": scfa.SlidingWindow(3, causal=False),
        "ranges": scfa.KeyRanges(ends // 2, ends),
        "mixed": scfa.Documents(torch.arange(SEQLEN)[None] // 9)
        & scfa.SlidingWindow(6)
        & scfa.HashSparse(ints(2, 4, SEQLEN, most=2), ints(2, 1, SEQLEN, most=2), causal=False),
    }
