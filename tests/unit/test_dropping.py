"""Who is kept, and what gradients reach the scores."""

from fractions import Fraction

import numpy as np
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


def best(scores, k, among, groups):
    """Flags of `top_k_keep` by its words, one sequence of scores at a time; NaN is the highest."""
    flags = torch.zeros(scores.shape, dtype=torch.bool)
    among, groups, k = (x.expand(scores.shape) for x in (among, groups, k))
    for *of, row in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape)).tolist():
        at = (*of, row)
        mine = scores[(*of,)].nan_to_num(nan=torch.inf)
        rivals = among[(*of,)] & (groups[(*of,)] == groups[at])
        ahead = rivals & ((mine > mine[row]) | ((mine == mine[row]) & (torch.arange(9) < row)))
        flags[at] = among[at] & (ahead.sum() < k[at])
    return flags


@pytest.mark.parametrize("seed", range(20))
def test_top_k_among_some_rows_and_in_each_group(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    scores = draw(-2, 3, 2, 3, 9).float()  # many are equal
    scores[draw(0, 9, 2, 3, 9) == 0] = torch.nan
    every, one = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
    shapes = [(2, 3, 9), (2, 1, 9), (3, 9), (9,), (1,)]
    among, groups, k = (shapes[i] for i in draw(0, 5, 3).tolist())
    among, groups, k = draw(0, 2, *among) > 0, draw(-1, 3, *groups), draw(0, 4, *k)
    for limits in ({"among": among}, {"groups": groups}, {"among": among, "groups": groups}, {}):
        right = best(scores, k, limits.get("among", every), limits.get("groups", one))
        assert torch.equal(dropping.top_k_keep(scores, k, **limits), right)


def test_groups_and_flags_of_any_kind():
    scores = torch.tensor([0.3, -torch.inf, 0.9, torch.inf, 0.1])
    for dtype in (torch.uint8, torch.uint64, torch.int32):
        flags = dropping.top_k_keep(scores, 1, groups=torch.tensor([7, 7, 0, 0, 7]).to(dtype))
        assert flags.int().tolist() == [1, 0, 0, 1, 0]
    for dtype in (torch.int8, torch.bfloat16, torch.float64):
        flags = dropping.top_k_keep(scores, 2, among=torch.tensor([0, 2, 1, 0, 0]).to(dtype))
        assert flags.int().tolist() == [0, 1, 1, 0, 0]  # -inf is more than padding
    nothing = torch.zeros(2, 0)
    assert dropping.top_k_keep(nothing, 1, among=nothing, groups=nothing.long()).shape == (2, 0)


def test_more_rows_than_any_sequence_has_keeps_all():
    assert dropping.top_k_keep(torch.zeros(1, 6), 10**30).all()


def test_nan_is_the_highest_score_and_exceeds_no_threshold():
    scores = torch.tensor([torch.inf, torch.nan, 1.0])
    assert dropping.top_k_keep(scores, 1).tolist() == [False, True, False]
    assert dropping.threshold_keep(scores, -torch.inf).tolist() == [True, False, True]


def test_threshold():
    assert dropping.threshold_keep(torch.tensor([-1.0, 0, 2]), 0.0).tolist() == [False, False, True]


@pytest.mark.parametrize("threshold", [Fraction(1, 2), 10**30, -(10**400), np.float32(0.5), 0, 3])
def test_a_threshold_may_be_any_number(threshold):
    for scores in (torch.tensor([-1.0, 0.5, 4.0]), torch.tensor([-1, 0, 4])):
        right = [x > threshold for x in scores.tolist()]
        assert dropping.threshold_keep(scores, threshold).tolist() == right


def test_straight_through_is_exact_forward_and_sigmoid_backward():
    scores = torch.randn(1000, requires_grad=True)
    keep = dropping.threshold_keep(scores)
    gate = dropping.straight_through(keep, scores)
    assert torch.equal(gate, keep.float())
    (slope,) = torch.autograd.grad(gate.sum(), scores)
    s = torch.sigmoid(scores)
    torch.testing.assert_close(slope, s * (1 - s))


def test_a_gate_is_0_or_1_whatever_flags_and_scores_hold():
    scores = torch.tensor([0.5, torch.nan, torch.nan, torch.inf, -torch.inf], requires_grad=True)
    gate = dropping.straight_through(torch.tensor([2.0, -1.0, 0.0, 0.0, 0.5]), scores)
    assert gate.tolist() == [1, 1, 0, 0, 1]
    (slope,) = torch.autograd.grad(gate.sum(), scores)
    assert slope.isnan().tolist() == [False, True, True, False, False]  # nothing is hidden


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


def test_a_threshold_may_be_of_each_head():
    scores = torch.tensor([[[0.5, 1.5], [0.5, 1.5]]])
    flags = dropping.threshold_keep(scores, torch.tensor([0.0, 1.0]).view(1, 2, 1))
    assert flags.tolist() == [[[True, True], [False, True]]]


@pytest.mark.parametrize("nan_score", [False, True])
@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_what_a_dropped_row_or_its_score_holds_reaches_nothing(layout, nan_score):
    generator = torch.Generator().manual_seed(1)
    swap = (lambda x: x.transpose(1, 2)) if layout == "bthd" else (lambda x: x)
    q, k, v = (torch.randn(1, 2, 9, 16, generator=generator) for _ in range(3))
    scores = torch.randn(2, 1, 2, 9, generator=generator)
    scores[:, :, :, 4] = -1
    if nan_score:
        scores[:, :, 0, 4] = torch.nan
    q[:, :, 4] = k[:, :, 4] = v[:, :, 4] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v, *scores.unbind(0))]
    q, k, v, q_scores, k_scores = leaves
    keeps = [dropping.threshold_keep(s) for s in (q_scores, k_scores)]
    gates = {"q_scores": q_scores, "k_scores": k_scores, "layout": layout}
    out = dropping.drop_attention(*(swap(x) for x in (q, k, v)), *keeps, **gates)
    dropped = torch.zeros(1, 2, 9, 1).index_fill(2, torch.tensor(4), torch.nan)
    loss = (out * swap(1 + dropped)).nan_to_num().sum() + (out * swap(dropped)).sum()
    assert loss.isnan()  # as of padding that a loss does not leave out: dout is NaN there
    grads = torch.autograd.grad(loss, leaves)
    assert all(x.isfinite().all() for x in (out, *grads))
    assert not swap(out)[:, :, 4].any()
    assert not any(x[:, :, 4].any() for x in grads)


def test_more_than_any_signed_number_keeps_all():
    scores = torch.arange(3.0)
    for k in (2**70, torch.tensor(2**64 - 1, dtype=torch.uint64)):
        assert dropping.top_k_keep(scores, k).all()


def test_top_k_under_vmap():
    scores = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0))
    found = torch.func.vmap(lambda s: dropping.top_k_keep(s, 2))(scores)
    assert torch.equal(found, dropping.top_k_keep(scores, 2))
    groups, among = (torch.arange(9) // torch.tensor([[2], [4], [9]]) for _ in range(2))
    k = torch.arange(3)

    def choose(s, k, among, groups):
        return dropping.top_k_keep(s, k, among=among, groups=groups)

    for of in ((0, 0, 0, 0), (None, 0, None, 0), (None, None, 0, None), (0, None, None, 0)):
        given = [x if d == 0 else x[1] for x, d in zip((scores, k, among, groups), of, strict=True)]
        found = torch.func.vmap(choose, in_dims=of)(*given)
        for i in range(3):
            one = [x[i] if d == 0 else x for x, d in zip(given, of, strict=True)]
            assert torch.equal(found[i], choose(*one))


def test_gates_under_vmap_over_flags_alone():
    q, scores = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9)
    keeps = torch.rand(3, 1, 2, 9) < 0.5

    def attend(keep):
        return dropping.drop_attention(q, q, q, keep, keep, q_scores=scores, k_scores=scores)

    torch.testing.assert_close(
        torch.func.vmap(attend)(keeps), torch.stack([attend(x) for x in keeps])
    )
