"""Heads that see blocks of neighbours beside heads that hash, in one call."""

import pytest

import scfa_core as scfa

torch = pytest.importorskip("torch", reason="these are torch modules")

from scfa_core import nn  # noqa: E402 - needs torch
from scfa_core.nn.near import near_groups, with_near_heads  # noqa: E402

WIDTH, SEQLEN = 96, 70


def made(**options):
    return nn.HashSelfAttention(WIDTH, 6, 4, seed=1, head_dim=16, **options)


def expected(layer, x):
    """Attention in float64 under a mask written out head by head, projected back."""
    q, k, v = (y.double() for y in layer.project(x))
    each, hashed = layer.heads // layer.heads_kv, layer.heads_kv - layer.near_heads
    parts = (q[:, : hashed * each].float(), k[:, :hashed].float())
    buckets = [y[0] for y in layer.hash(*parts)]
    if layer.shared_qk:
        buckets[1] = buckets[0]
    row = torch.arange(x.shape[1])
    mask = torch.zeros(*q.shape[:3], x.shape[1], dtype=torch.bool)
    for head in range(layer.heads):
        kv = head // each
        if kv < hashed:
            seen = buckets[0][:, head, :, None] == buckets[1][:, kv, None, :]
        else:
            shift = (kv - hashed) * layer.near_block // layer.near_heads
            block = (row + shift) // layer.near_block
            seen = block[:, None] == block
        mask[:, head] = seen & (row[:, None] - row >= (0 if layer.include_self else 1))
    k, v = (y.repeat_interleave(each, dim=1) for y in (k, v))
    scores = (q @ k.mT * layer.head_dim**-0.5).masked_fill(~mask, -torch.inf)
    out = torch.softmax(scores, -1).nan_to_num() @ v
    return layer.output(out.float().transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "options",
    [
        {"near_heads": 1, "near_block": 8},
        {"near_heads": 5, "near_block": 7, "adapt": "even"},
        {"near_heads": 2, "near_block": 1},
        {"near_heads": 2, "near_block": 1000},
        {"near_heads": 1, "near_block": 9, "heads_kv": 3, "adapt": "past"},
        {"near_heads": 2, "near_block": 16, "shared_qk": True, "include_self": False},
    ],
)
def test_each_head_sees_what_it_should(options):
    layer = made(**options)
    x = torch.randn(2, SEQLEN, WIDTH, generator=torch.Generator().manual_seed(2))
    got, want = layer(x), expected(layer, x)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    parameters = [p for p in layer.parameters() if p.requires_grad]
    grads = (torch.autograd.grad((y * weight).sum(), parameters) for y in (got, want))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_blocks_begin_elsewhere_in_each_head():
    groups = near_groups(20, 4, 8, torch.zeros(1, dtype=torch.int32))
    assert groups.dtype == torch.int32
    starts = [[row for row in range(1, 20) if head[row] != head[row - 1]] for head in groups]
    assert starts == [[8, 16], [6, 14], [4, 12], [2, 10, 18]]
    bucket = torch.zeros(3, 2, 20, dtype=torch.int64)
    grouped = with_near_heads(bucket, 2, 8, group_size=2)
    assert grouped.shape == (3, 6, 20)
    assert torch.equal(grouped[:, 2], grouped[:, 3])
    assert not torch.equal(grouped[:, 3], grouped[:, 4])


@pytest.mark.parametrize("block", [2**31 - 1, 2**31, 2**33, 2**70])
def test_blocks_longer_than_any_sequence_hold_all_rows(block):
    groups = near_groups(5, 3, block, torch.zeros(1, dtype=torch.int32))
    assert groups.dtype == torch.int32
    assert torch.equal(groups, torch.zeros_like(groups))


def test_documents_and_padding_end_blocks_too():
    layer = made(near_heads=2, near_block=32)
    x = torch.randn(1, 40, WIDTH, generator=torch.Generator().manual_seed(4))
    documents = (torch.arange(40) >= 20).int()[None]
    other = x.clone()
    other[:, :20] = 3.0
    assert not torch.equal(layer(x)[:, 20:], layer(other)[:, 20:])
    assert torch.equal(*(layer(y, documents=documents)[:, 20:] for y in (x, other)))
    keep = documents == 1
    assert torch.equal(*(layer(y, keep=keep)[:, 20:] for y in (x, other)))
    torch.testing.assert_close(
        layer(x, documents=documents)[:, :20], layer(x[:, :20]), rtol=0, atol=1e-5
    )


def test_a_later_row_changes_nothing_before_it():
    layer = made(near_heads=3, near_block=16, adapt="even")
    x = torch.randn(1, SEQLEN, WIDTH, generator=torch.Generator().manual_seed(5))
    other = x.clone()
    other[:, 40:] = 3.0
    torch.testing.assert_close(layer(x)[:, :40], layer(other)[:, :40], rtol=0, atol=1e-6)


def test_one_graph():
    torch._dynamo.reset()
    layer = made(near_heads=2, near_block=16)
    x = torch.randn(2, SEQLEN, WIDTH)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-5)


def test_printed_and_stored():
    layer = made(near_heads=2, near_block=16)
    assert "near_heads=2, near_block=16" in repr(layer)
    assert "near_" not in repr(made())
    assert layer.hash.directions.shape == (1, 4, 16, 2)
    made(near_heads=2, near_block=16).load_state_dict(layer.state_dict())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"near_heads": 6}, "near_heads must leave a key head to hash, got near_heads=6 of 6"),
        ({"near_heads": 3, "heads_kv": 3}, "got near_heads=3 of 3"),
        ({"near_heads": -1}, "near_heads must be at least 0, got -1"),
        ({"near_heads": 1.0}, "near_heads must be an int"),
        ({"near_heads": 1, "near_block": 0}, "near_block must be at least 1, got 0"),
        ({"near_heads": 1, "rounds": 2}, "one round of hashing, got rounds=2"),
    ],
)
def test_held_wrong(options, told):
    with pytest.raises(scfa.PatternError, match=told):
        made(**options)


def test_heads_on_several_ranks_are_refused():
    q = torch.randn(1, 6, 8, 16)
    q.device_mesh = "as DTensors have one"
    with pytest.raises(scfa.OptionError, match="near_heads of DTensors are not served"):
        made(near_heads=1).make_patterns(q, q)
