"""Masks of transformers read as clauses: each equals what transformers itself draws."""

import operator

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
    chunks = theirs.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long))
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
        "packed chunks": (
            and_masks(theirs.remap_positions_for_packed_sequence(chunks, positions), packed),
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
    blocks = theirs.blockwise_overlay(torch.tensor([[-1, 0, 0, -1]]))
    with pytest.raises(scfa.PatternError, match="values of each query"):
        read_mask(1, 4, 4, mask_function=blocks)
    alone = theirs.remap_positions_for_packed_sequence(
        theirs.causal_mask_function, torch.arange(4)[None]
    )
    with pytest.raises(scfa.PatternError, match="positions looked up"):
        read_mask(1, 4, 4, mask_function=alone)


def custom_functions():
    """What a user may pass as ``and_mask_function``, in index arithmetic."""
    flags = torch.arange(16).expand(2, -1) % 5 > 0
    kinds = torch.arange(16).expand(2, -1) % 3
    return {
        "distance": lambda b, h, q, k: abs(q - k) < 4,
        "distance by a method": lambda b, h, q, k: (q - k).abs() < 4,
        "distance the other way": lambda b, h, q, k: q - k + 1 <= 6,
        "diagonal": lambda b, h, q, k: q == k,
        "strict": lambda b, h, q, k: k < q,
        "shifted": lambda b, h, q, k: (k + 2 <= q - 1) & (q < k + 9),
        "at most": lambda b, h, q, k: q >= k - 2,
        "flags": lambda b, h, q, k: flags[b, k],
        "kinds": lambda b, h, q, k: kinds[b, q] == kinds[b, k],
        "other kinds": lambda b, h, q, k: kinds[b, k] + 1 == kinds[b, q],
        "blocks": lambda b, h, q, k: q // 4 == k // 4,
        "blocks of shifted": lambda b, h, q, k: (k - 1) // 4 == (q + 1) // 4,
    }


@pytest.mark.parametrize(("queries", "shift"), [(16, 0), (5, 11)])
@pytest.mark.parametrize("name", custom_functions())
def test_custom_functions_read_as_transformers_draws_them(name, queries, shift):
    function = theirs.and_masks(theirs.causal_mask_function, custom_functions()[name])
    sizes = {
        "batch_size": 2,
        "q_length": queries,
        "kv_length": 16,
        "q_offset": shift,
        "mask_function": function,
    }
    right = theirs.sdpa_mask(**sizes, allow_is_causal_skip=False)
    mask = read_mask(**sizes, use_vmap=True).pattern(torch.device("cpu"))
    mine = torch.from_numpy(mask.mask(queries, 16, batch=2))
    assert torch.equal(mine, right.expand(2, 1, queries, 16))
    assert right.any()


ODD = {
    "union": lambda b, h, q, k: (k <= q) | (k < 3),
    "negation": lambda b, h, q, k: ~(k <= q),
    "decision": lambda b, h, q, k: (k <= q) or (k < 3),
    "other than": lambda b, h, q, k: k != q,
    "prefix": lambda b, h, q, k: k < 3,
    "batch": lambda b, h, q, k: b == 0,
    "head": lambda b, h, q, k: (k <= q) & (h > 0),
    "stride": lambda b, h, q, k: (q - k) % 4 == 0,
    "product": lambda b, h, q, k: 2 * k <= q,
    "function": lambda b, h, q, k: torch.logical_and(k <= q, k > q - 3),
    "tensor at the left": lambda b, h, q, k: torch.tensor(3) <= k,
    "tensor": lambda b, h, q, k: torch.ones((), dtype=torch.bool),
    "number": lambda b, h, q, k: 1,
    "index": lambda b, h, q, k: k,
    "sum of sides": lambda b, h, q, k: q + k <= 5,
    "pairs": lambda b, h, q, k: torch.ones(2, 4, 4, dtype=torch.bool)[b, q, k],
    "flags of queries": lambda b, h, q, k: torch.ones(2, 4, dtype=torch.bool)[b, q],
    "ints for flags": lambda b, h, q, k: torch.ones(2, 4, dtype=torch.int64)[b, k],
    "position at least": lambda b, h, q, k: k >= 2,
    "a float": lambda b, h, q, k: q - k <= 2.5,
    "method": lambda b, h, q, k: (q - k).clamp(0) < 3,
    "as a number": lambda b, h, q, k: operator.index(k) < 3,
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_clause_raises(name):
    function = theirs.and_masks(theirs.causal_mask_function, ODD[name])
    with pytest.raises(scfa.PatternError, match=r"cannot express: .* use attn_implementation"):
        read_mask(2, 4, 4, mask_function=function, use_vmap=True)


def test_a_distance_that_no_pair_has():
    function = theirs.and_masks(theirs.causal_mask_function, lambda b, h, q, k: k - q >= 2)
    mask = read_mask(1, 6, 6, mask_function=function, use_vmap=True)
    assert not mask.pattern(torch.device("cpu")).mask(6, 6).any()


def test_a_short_padding_mask_counts_from_its_own_first_key():
    real = torch.tensor([[1, 1, 1, 0, 1]]).bool()
    mask = read_mask(1, 4, 4, q_offset=2, kv_offset=2, attention_mask=real)
    seen = mask.pattern(torch.device("cpu")).mask(4, 4)[0, 0]
    assert seen.any(0).tolist() == [True, False, True, False]  # of the last nothing is told


def test_packed_ids_that_are_shifted_against_each_other_are_not_packed():
    ids = torch.tensor([[0, 0, 1, 1]])

    def steps(b, h, q, k):
        return (ids[b, q] + 1 == ids[b, k]) & (ids[b, k] <= ids[b, q])

    with pytest.raises(scfa.PatternError, match="looked up"):
        read_mask(1, 4, 4, mask_function=steps, use_vmap=True)


def test_positions_that_a_user_looks_up_are_not_trusted():
    """They need not rise by one within a group; transformers' own packed positions do."""
    positions, ids = torch.tensor([[0, 2, 4, 0]]), torch.tensor([[0, 0, 0, 1]])
    packed = theirs.packed_sequence_mask_function(ids)

    def steps(b, h, q, k):
        return positions[b, k] > positions[b, q] - 3

    for function in (steps, theirs.and_masks(steps, packed)):
        with pytest.raises(scfa.PatternError, match="positions looked up"):
            read_mask(1, 4, 4, mask_function=function, use_vmap=True)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 4, 4), (4,)])
def test_a_padding_mask_of_other_axes_raises(shape):
    with pytest.raises(scfa.PatternError, match="takes a padding mask"):
        read_mask(2, 4, 4, attention_mask=torch.ones(shape, dtype=torch.bool))


def test_a_model_that_adds_its_mask_is_told():
    mask = read_mask(2, 4, 4)
    for add in (lambda: torch.zeros(2, 1, 4, 4) + mask, lambda: mask + torch.zeros(1)):
        with pytest.raises(scfa.OptionError, match="load it with attn_implementation='eager'"):
            add()


def test_a_padding_mask_of_another_batch_raises():
    with pytest.raises(scfa.PatternError, match=r"got shape \(3, 4\) for a batch of 2"):
        read_mask(2, 4, 4, attention_mask=torch.ones(3, 4, dtype=torch.bool))
