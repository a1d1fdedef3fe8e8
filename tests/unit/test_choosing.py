"""Blocks chosen by their mean keys, beside a mask that is made row by row."""

import pytest

import scfa_core as scfa

torch = pytest.importorskip("torch", reason="choices are made of tensors (extra 'torch')")

from scfa_core.choosing import chosen_blocks  # noqa: E402 - torch may be absent
from scfa_core.merging import attention_over  # noqa: E402
from scfa_core.nn import SparseSelfAttention  # noqa: E402


def tensors(rows=50, heads=4, heads_kv=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    shapes = ((2, heads, rows, 16), (2, heads_kv, rows, 16), (2, heads_kv, rows, 16))
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


def mask_of(q, k, block, top):
    """Who sees whom, a query at a time."""
    batch, heads, rows, _ = q.shape
    seen = torch.zeros(batch, heads, rows, rows, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h // (heads // k.shape[1])]
            for i in range(rows):
                own = i // block
                score = [float(q[b, h, i] @ keys[n * block : (n + 1) * block].mean(0))
                         for n in range(own)]  # fmt: skip
                best = sorted(range(own), key=lambda n, s=score: -s[n])[:top]
                for n in best:
                    seen[b, h, i, n * block : (n + 1) * block] = True
                seen[b, h, i, own * block : i + 1] = True
    return seen


@pytest.mark.parametrize(
    ("rows", "block", "top"),
    [(50, 8, 2), (48, 16, 1), (33, 4, 20), (7, 8, 3), (20, 5, 0), (1, 1, 1)],
)
def test_what_is_seen_and_gradients(rows, block, top):
    q, k, v = (x.requires_grad_() for x in tensors(rows))
    patterns = chosen_blocks(q, k, block=block, top=top)
    masks = [p.mask(rows, rows, batch=2, heads=4, heads_kv=2).astype(int) for p in patterns]
    seen = torch.from_numpy(sum(masks))
    assert seen.max() == 1  # no pair twice
    right = mask_of(q.detach(), k.detach(), block, top)
    assert torch.equal(seen.bool(), right)
    scfa.validate(patterns, q, k)
    out = attention_over(q, k, v, patterns)
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    true = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=right)
    torch.testing.assert_close(out, true, rtol=0, atol=1e-6)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, true)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "block"), [(64, 8), (61, 8), (10, 16)])
def test_no_more_numbers_than_blocks(rows, block):
    q, k, _ = tensors(rows)
    blocks = -(-rows // block)
    for pattern in chosen_blocks(q, k, block=block, top=3):
        hashed = pattern.parts[0]
        ids = torch.cat([x.reshape(-1) for x in (hashed.q_hash, hashed.k_hash)])
        assert ids.unique().numel() <= max(blocks, 2)


def test_scores_of_minus_infinity_choose_nothing():
    """Also in the last block, which sees keys of its own already."""
    q, k, _ = (torch.full_like(x, 300, dtype=torch.float16) for x in tensors(40))
    q[:, :, ::2] *= -1
    patterns = chosen_blocks(q, k, block=8, top=2)
    masks = [p.mask(40, 40, batch=2, heads=4, heads_kv=2).astype(int) for p in patterns]
    seen = torch.from_numpy(sum(masks))
    row = torch.arange(40)
    own = (row[:, None] // 8 == row // 8) & (row <= row[:, None])
    assert torch.equal(seen[0, 0, ::2], own[::2].long())
    assert seen.max() == 1
    assert (seen[0, 0, 1::2].sum(1) == own[1::2].sum(1) + 8 * (row[1::2] // 8).clamp(max=2)).all()


def test_rows_beside_a_cache_choose_as_in_the_whole():
    q, k, v = tensors(45)
    whole = attention_over(q, k, v, chosen_blocks(q, k, block=8, top=2))
    for begin, end in ((0, 17), (17, 18), (18, 45)):
        new, seen = q[:, :, begin:end], (k[:, :, :end], v[:, :, :end])
        out = attention_over(new, *seen, chosen_blocks(new, seen[0], block=8, top=2))
        torch.testing.assert_close(out, whole[:, :, begin:end], rtol=0, atol=1e-6)


def test_no_choice_depends_on_a_later_row():
    q, k, v = tensors(50)
    before = attention_over(q, k, v, chosen_blocks(q, k, block=8, top=2))
    for x in (q, k, v):
        x[:, :, 30:] = torch.randn(2, x.shape[1], 20, 16, dtype=x.dtype)
    after = attention_over(q, k, v, chosen_blocks(q, k, block=8, top=2))
    assert torch.equal(before[:, :, :30], after[:, :, :30])


def test_a_layer_is_one_graph():
    class Moba(SparseSelfAttention):
        def make_patterns(self, q, k):
            return chosen_blocks(q, k, block=8, top=2)

    torch.manual_seed(0)
    layer, x = Moba(64, heads=4, heads_kv=2), torch.randn(2, 50, 64)
    right = layer(x)
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(whole(x), right)
    whole(x).sum().backward()
    assert layer.query.weight.grad.any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"block": 0}, scfa.ShapeError, "block must be at least 1, got 0"),
        ({"top": -1}, scfa.ShapeError, "top must be at least 0, got -1"),
        ({"block": 2.5}, scfa.ShapeError, "block must be an int"),
        ({"q": torch.zeros(2, 4, 51, 16)}, scfa.ShapeError, "at most as many as keys"),
        ({"q": torch.zeros(2, 3, 50, 16)}, scfa.ShapeError, "multiple of heads_kv"),
        ({"q": torch.zeros(2, 4, 16)}, scfa.ShapeError, "q must have 4 axes"),
        ({"k": None}, scfa.DTypeError, "k must be a torch tensor"),
    ],
)
def test_what_does_not_fit(change, error, words):
    q, k, _ = tensors(50)
    with pytest.raises(error, match=words):
        chosen_blocks(**({"q": q, "k": k, "block": 8, "top": 2} | change))
