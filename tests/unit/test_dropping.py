"""Who is kept, and what gradients reach the scores."""

import pytest

import scfa_core as scfa

torch = pytest.importorskip("torch", reason="dropping works on torch tensors")

from scfa_core import dropping  # noqa: E402 - needs torch


def test_random_keep_has_its_rate_and_seed():
    calls = [
        dropping.random_keep((2, 4, 4096), 0.3, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(calls[0], calls[1])
    assert not torch.equal(calls[0], calls[2])
    assert calls[0].float().mean() == pytest.approx(0.3, abs=0.02)
    assert dropping.random_keep((100,), 1.0).all()
    assert not dropping.random_keep((100,), 0.0).any()
    with pytest.raises(scfa.PatternError, match="from 0 to 1"):
        dropping.random_keep((3,), 1.2)


@pytest.mark.parametrize("k", [0, 1, 7, 20, 50])
def test_top_k_keeps_k_of_each_head(k):
    scores = torch.randn(2, 3, 20)
    flags = dropping.top_k_keep(scores, k)
    assert (flags.sum(-1) == min(k, 20)).all()
    if 0 < k < 20:
        lowest_kept = scores.masked_fill(~flags, torch.inf).amin(-1)
        assert (lowest_kept > scores.masked_fill(flags, -torch.inf).amax(-1)).all()


def test_ties_go_to_the_earlier_row():
    flags = dropping.top_k_keep(torch.zeros(1, 6), 2)
    assert flags.int().tolist() == [[1, 1, 0, 0, 0, 0]]
    with pytest.raises(scfa.PatternError, match="at least 0"):
        dropping.top_k_keep(torch.zeros(1, 6), -1)


def test_threshold():
    assert dropping.threshold_keep(torch.tensor([-1.0, 0, 2]), 0.0).tolist() == [False, False, True]


def test_straight_through_is_exact_forward_and_sigmoid_backward():
    scores = torch.randn(1000, requires_grad=True)
    keep = dropping.threshold_keep(scores)
    gate = dropping.straight_through(keep, scores)
    assert torch.equal(gate, keep.float())
    (slope,) = torch.autograd.grad(gate.sum(), scores)
    s = torch.sigmoid(scores)
    torch.testing.assert_close(slope, s * (1 - s))
    with pytest.raises(scfa.ShapeError, match="one shape"):
        dropping.straight_through(keep[:3], scores)


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("include_self", [True, False])
def test_scores_change_nothing_and_get_the_gradient_of_a_soft_gate(layout, include_self):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = draw(2, 4, 25, 16), draw(2, 2, 25, 16), draw(2, 2, 25, 16)
    q_scores, k_scores = draw(2, 4, 25), draw(2, 2, 25)
    q_keep, k_keep = (dropping.threshold_keep(s) for s in (q_scores, k_scores))
    swap = (lambda x: x.transpose(1, 2)) if layout == "bthd" else (lambda x: x)
    out = swap(
        dropping.drop_attention(
            *(swap(x) for x in (q, k, v)),
            q_keep,
            k_keep,
            q_scores=q_scores,
            k_scores=k_scores,
            include_self=include_self,
            layout=layout,
        )
    )
    pattern = scfa.QKSparse(q_keep, k_keep) & scfa.Causal(include_self=include_self)
    assert torch.equal(out, scfa.attention(q, k, v, pattern))
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    dv, dq_scores, dk_scores = torch.autograd.grad(out, (v, q_scores, k_scores), dout)
    for scores, keep, dgate, mine in (
        (q_scores, q_keep, (out * dout).sum(-1), dq_scores),
        (k_scores, k_keep, (v * dv).sum(-1), dk_scores),
    ):
        s = torch.sigmoid(scores)
        torch.testing.assert_close(mine, s * (1 - s) * dgate, rtol=0, atol=1e-10)
        assert not mine[~keep].any()
        assert mine[keep].any()


def test_learned_scores_find_the_useful_keys():
    # Odd keys carry the target, even ones its opposite; half may stay: the odd ones do in the end.
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, 16, 16)
    v = (torch.arange(16) % 2 * 2.0 - 1).view(1, 1, 16, 1).expand(1, 1, 16, 16).contiguous()
    scores = (0.01 * torch.randn(1, 1, 16)).requires_grad_()
    every = torch.ones(1, 1, 16, dtype=torch.bool)
    step = torch.optim.SGD([scores], lr=5.0)
    for _ in range(30):
        keep = dropping.top_k_keep(scores, 8)
        out = dropping.drop_attention(q, k, v, every, keep, k_scores=scores, causal=False)
        step.zero_grad()
        ((out - 1) ** 2).mean().backward()
        step.step()
    assert dropping.top_k_keep(scores, 8)[0, 0, 1::2].all()


def test_self_cannot_be_left_out_without_causality():
    x = torch.zeros(1, 1, 4, 16)
    keep = torch.ones(1, 1, 4, dtype=torch.bool)
    with pytest.raises(scfa.PatternError, match="needs causal"):
        dropping.drop_attention(x, x, x, keep, keep, causal=False, include_self=False)


SCORES = torch.zeros(1, 2, 4)
ROWS = torch.zeros(1, 2, 4, 16)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dropping.random_keep(5, 0.5), scfa.ShapeError, "sequence of sizes, got 5"),
        (lambda: dropping.random_keep((2, -3), 0.5), scfa.ShapeError, "at least 0, got -3"),
        (lambda: dropping.random_keep((2, 1.5), 0.5), scfa.ShapeError, "an int, got 1.5"),
        (lambda: dropping.top_k_keep(SCORES.numpy(), 2), scfa.DTypeError, "got ndarray"),
        (lambda: dropping.top_k_keep(SCORES[0, 0, 0], 2), scfa.ShapeError, "single number"),
        (lambda: dropping.threshold_keep([1.0]), scfa.DTypeError, "got list"),
        (lambda: dropping.threshold_keep(SCORES, None), scfa.PatternError, "got None"),
        (lambda: dropping.straight_through(SCORES.numpy() > 0, SCORES), scfa.DTypeError, "keep"),
        (lambda: dropping.straight_through(SCORES > 0, None), scfa.DTypeError, "scores"),
        (
            lambda: dropping.straight_through(SCORES > 0, SCORES.long()),
            scfa.DTypeError,
            "floating-point numbers, which have gradients; got torch.int64",
        ),
        (
            lambda: dropping.drop_attention(
                ROWS, ROWS, ROWS, SCORES > 0, SCORES > 0, pattern=scfa.SlidingWindow(3)
            ),
            scfa.OptionError,
            "takes no other",
        ),
    ],
)
def test_what_is_held_wrong_is_told(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_threshold_may_be_of_each_head():
    scores = torch.tensor([[[0.5, 1.5], [0.5, 1.5]]])
    flags = dropping.threshold_keep(scores, torch.tensor([0.0, 1.0]).view(1, 2, 1))
    assert flags.tolist() == [[[True, True], [False, True]]]


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_what_a_dropped_row_holds_reaches_no_score(layout):
    generator = torch.Generator().manual_seed(1)
    swap = (lambda x: x.transpose(1, 2)) if layout == "bthd" else (lambda x: x)
    q, k, v = (torch.randn(1, 2, 9, 16, generator=generator) for _ in range(3))
    scores = torch.randn(2, 1, 2, 9, generator=generator)
    scores[:, :, :, 4] = -1
    q[:, :, 4] = k[:, :, 4] = v[:, :, 4] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v, *scores.unbind(0))]
    q, k, v, q_scores, k_scores = leaves
    keeps = [dropping.threshold_keep(s) for s in (q_scores, k_scores)]
    gates = {"q_scores": q_scores, "k_scores": k_scores, "layout": layout}
    out = dropping.drop_attention(*(swap(x) for x in (q, k, v)), *keeps, **gates)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert all(x.isfinite().all() for x in (out, *grads))
    assert not any(x[:, :, 4].any() for x in grads)


def test_top_k_under_vmap():
    scores = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0))
    found = torch.func.vmap(lambda s: dropping.top_k_keep(s, 2))(scores)
    assert torch.equal(found, dropping.top_k_keep(scores, 2))


def test_a_share_of_rows_leaves_the_length_open():
    from torch._dynamo.testing import CompileCounter

    from scfa_core.nn import DropSelfAttention

    torch.manual_seed(0)
    layer = DropSelfAttention(32, 2, how="top-k")
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    open_length = {"x": {1: torch.export.Dim("s", min=4, max=1000)}}
    exported = torch.export.export(layer, (torch.randn(2, 100, 32),), dynamic_shapes=open_length)
    for seqlen in (20, 31, 52, 333):
        x = torch.randn(2, seqlen, 32)
        for run in (compiled, exported.module()):
            torch.testing.assert_close(run(x), layer(x))
    assert counter.frame_count == 1
