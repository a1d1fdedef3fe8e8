"""Gradients through lse in float16: a key's is a mean of rows that have no float16 themselves."""

import pytest

torch = pytest.importorskip("torch", reason="gradients are torch's")

import scfa_core as scfa  # noqa: E402
from scfa_core import torch_calls  # noqa: E402
from scfa_core.decoding import attention_in_parts  # noqa: E402

LARGEST = 65504.0


def draw(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, heads, rows, 32, generator=generator).half().requires_grad_()
        for heads, rows in sizes
    ]


def formula(q, k):
    """Return lse of all pairs in float64, each key head shared by two heads of queries."""
    return (q @ k.repeat_interleave(2, 1).mT * 32**-0.5).logsumexp(-1)


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("size", [1e-5, 1.0, 2e5])
def test_gradients_of_lse(size, layout):
    q, k = draw((4, 70), (2, 150))
    right = [x.detach().double().requires_grad_() for x in (q, k)]
    want = torch.autograd.grad(formula(*right).sum() * size, right)
    assert size < 2 or q.abs().max() * size * 32**-0.5 > LARGEST
    given = [x.transpose(1, 2) if layout == "bthd" else x for x in (q, k)]
    _, lse = scfa.attention(
        given[0], given[1], given[1], scfa.Intersection(), layout=layout, return_lse=True
    )
    got = torch.autograd.grad(lse, (q, k), torch.full_like(lse, size))
    for mine, true in zip(got, want, strict=True):
        assert true.abs().max() < LARGEST
        allowed = 2**-10 * true.abs().max() + 2**-23  # twice the least step of float16
        assert (mine.double() - true).abs().max() <= allowed


def test_a_key_that_all_heads_of_a_group_see_alone():
    """Its gradient is the sum of all their rows, the most that it can be."""
    q, k = torch.full((1, 16, 60, 32), 0.5).half(), torch.zeros(1, 1, 1, 32).half()
    q, k = q.requires_grad_(), k.requires_grad_()
    _, lse = scfa.attention(q, k, k, scfa.Intersection(), return_lse=True)
    (got,) = torch.autograd.grad(lse, k, torch.full_like(lse, 100.0))
    true = 16 * 60 * 100.0 * 0.5 * 32**-0.5
    torch.testing.assert_close(got.double(), torch.full_like(got, true).double(), rtol=1e-3, atol=0)


def test_parts_that_merge_by_lse_lose_no_gradient():
    q, k, v = draw((4, 64), (4, 256), (4, 256))
    with torch.no_grad():
        v[:, :, 128:] += 4  # results of the parts differ, so that their lse matters
    parts = [(k[:, :, at], v[:, :, at], None) for at in (slice(128), slice(128, None))]
    dout = 2e4 * torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    whole = scfa.attention(q, k, v, scfa.Intersection())
    want = torch.autograd.grad(whole, (q, k, v), dout.half())
    got = torch.autograd.grad(attention_in_parts(q, parts), (q, k, v), dout.half())
    for mine, right in zip(got, want, strict=True):
        assert right.isfinite().all()
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, right, rtol=0, atol=0.002 * float(right.abs().max()))


def test_what_is_not_finite_spoils_its_own_sequence_alone():
    """As an infinite gradient would; the power of 2 of the other sequence is its own."""
    x = 1e6 * torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    x[0, 0, 1] = torch.inf
    scaled = torch.ldexp(x, -torch_calls._room_in_float16(x, 3))
    assert scaled.isfinite().sum() == x.numel() - 4
    most = 3 * scaled.where(x.isfinite(), 0).abs().amax((1, 2, 3))
    assert ((most <= LARGEST) & (most > LARGEST / 8)).all()
