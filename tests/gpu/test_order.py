"""Ranges that the host does not know to be in order: the card finds out where they are."""

import pytest

import scfa_core as scfa

LENGTH, WIDTH = 5000, 640  # an average pair's tile visits 700 keys: fused at head_dim 128 as well
HEADS, HEADS_KV = 4, 2
pytestmark = pytest.mark.parametrize("head_dim", [64, 128])


@pytest.fixture
def gradients(torch, backend, monkeypatch, head_dim):
    """Gradients by a plan of the pattern and a way of the backward."""
    if backend != "cupy" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only cupy on a Hopper card has two ways")
    generator = torch.Generator("cuda").manual_seed(3)

    def rows(heads):
        shape = (2, heads, LENGTH, head_dim)
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    q, dout, k, v = rows(HEADS), rows(HEADS), rows(HEADS_KV), rows(HEADS_KV)

    def run(pattern, way="auto"):
        monkeypatch.setenv("SCFA_CUPY_BACKWARD", way)
        call = {"backend": "cupy"}
        plan = scfa.make_plan(pattern, q, k, **call)
        out, lse = scfa.attention(q, k, v, plan, return_lse=True, **call)
        return scfa.attention_backward(dout, q, k, v, out, lse, plan, **call)

    return run


def window(torch):
    """Starts and ends of a window, (1, HEADS, LENGTH)."""
    row = torch.arange(LENGTH, device="cuda").expand(1, HEADS, -1)
    return (row - WIDTH + 1).clamp(min=0), row + 1


def same_heads(torch, got, want, key_heads=slice(None)):
    """Compare bits of these key heads and of their query heads."""
    for a, b in zip(got, want, strict=True):
        a, b = (x.reshape(2, HEADS_KV, -1)[:, key_heads] for x in (a, b))
        assert torch.equal(a, b)


def test_a_window_as_ranges_gets_the_bits_of_the_window(torch, gradients):
    ranges = scfa.KeyRanges(*window(torch))
    got = gradients(ranges)
    same_heads(torch, got, gradients(scfa.SlidingWindow(WIDTH)))
    split = gradients(ranges, "split")
    assert not torch.equal(got[0], split[0]), "the ways round alike: this test sees nothing"
    for _ in range(5):
        same_heads(torch, gradients(ranges), got)


def test_a_key_head_of_which_one_list_is_out_of_order_is_split(torch, gradients):
    start, end = window(torch)
    in_order = gradients(scfa.KeyRanges(start, end))
    start = start.clone()
    start[:, HEADS - 1, 1::2] = (start[:, HEADS - 1, 1::2] - 300).clamp(min=0)
    ranges = scfa.KeyRanges(start, end)
    got = gradients(ranges)
    same_heads(torch, got, in_order, slice(0, 1))
    same_heads(torch, got, gradients(ranges, "split"), slice(1, 2))
