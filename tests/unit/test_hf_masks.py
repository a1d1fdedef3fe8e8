"""Masks of transformers read as clauses: each equals what transformers itself draws."""

import pytest

import scfa_core as scfa

torch = pytest.importorskip("torch", reason="transformers needs torch")
pytest.importorskip("transformers", reason="needs transformers: pip install scfa-core[hf]")

from transformers import masking_utils as theirs  # noqa: E402 - may be absent

from scfa_core.hf_masks import StructuredMask, read_mask  # noqa: E402


def and_masks(*pieces):
    return theirs.and_masks(*pieces)


def mask_functions():
    """Name, function, and whether it needs as many keys as queries."""
    ids = torch.tensor([[0] * 6 + [1] * 10, [0] * 2 + [1] * 3 + [2] * 11])
    rows = torch.arange(16)
    positions = torch.stack([(rows - (row == x).nonzero()[0]) for row in ids for x in row])
    positions = torch.stack([positions[n * 16 + rows, rows] for n in range(2)])
    causal, left = theirs.causal_mask_function, torch.tensor([3, 0])
    packed = theirs.packed_sequence_mask_function(ids)
    window = theirs.sliding_window_causal_mask_function(4)
    return {
        "causal": (causal, False),
        "window": (window, False),
        "window of 1": (theirs.sliding_window_causal_mask_function(1), False),
        "bidirectional": (theirs.bidirectional_mask_function, False),
        "window both ways": (theirs.sliding_window_bidirectional_mask_function(3), False),
        "chunked": (theirs.chunked_causal_mask_function(5, left), False),
        "lower bound alone": (theirs.sliding_window_overlay(4), False),
        "packed": (
            and_masks(theirs.remap_positions_for_packed_sequence(causal, positions), packed),
            True,
        ),
        "packed window": (
            and_masks(theirs.remap_positions_for_packed_sequence(window, positions), packed),
            True,
        ),
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "q_offset", "kv_offset"),
    [(16, 16, 0, 0), (5, 16, 11, 0), (1, 16, 15, 0), (5, 24, 11, 0), (4, 9, 12, 7), (6, 6, 9, 9)],
)
@pytest.mark.parametrize("name", mask_functions())
def test_masks_read_as_transformers_draws_them(name, queries, keys, q_offset, kv_offset, padded):
    function, square = mask_functions()[name]
    if square and (queries, keys) != (16, 16):
        queries, keys, q_offset, kv_offset = 16, 16, 0, 0
    real = torch.arange(16).expand(2, -1) >= torch.tensor([[3], [0]]) if padded else None
    for offset in (q_offset, torch.tensor(q_offset)):
        sizes = {
            "batch_size": 2,
            "q_length": queries,
            "kv_length": keys,
            "q_offset": offset,
            "kv_offset": kv_offset,
            "mask_function": function,
            "attention_mask": real,
        }
        right = theirs.sdpa_mask(**sizes, allow_is_causal_skip=False)
        mask = read_mask(**sizes)
        mine = mask.pattern(torch.device("cpu")).mask(queries, keys, batch=2)
        assert torch.equal(torch.from_numpy(mine), right.expand(2, 1, queries, keys))
        assert mask.shape == (2, 1, queries, keys)
        assert isinstance(mask, StructuredMask)


def test_unknown_mask_functions_raise():
    odd = theirs.or_masks(theirs.causal_mask_function, lambda b, h, q, k: k < 3)
    with pytest.raises(scfa.PatternError, match="or_mask"):
        read_mask(1, 4, 4, mask_function=odd)
    chunked = theirs.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long))
    packed = theirs.remap_positions_for_packed_sequence(chunked, torch.arange(4)[None])
    with pytest.raises(scfa.PatternError, match="in packed sequences"):
        read_mask(1, 4, 4, mask_function=packed)
