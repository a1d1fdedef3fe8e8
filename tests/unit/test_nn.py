"""Layers against dense attention under the mask that each promises; state, printing, Reformer."""

import pytest

import scfa_core as scfa

torch = pytest.importorskip("torch", reason="these are torch modules")

from torch import nn as torch_nn  # noqa: E402 - needs torch

from scfa_core import nn  # noqa: E402
from scfa_core.hashing import bucket_balance  # noqa: E402

WIDTH, HEADS, SEQLEN = 64, 4, 45


def by_mask(layer, x, mask):
    """Project as the layer does, attend densely in float64 under a bool mask, project back."""
    q, k, v = (y.double() for y in layer.project(x))
    k, v = (y.repeat_interleave(layer.heads // layer.heads_kv, dim=1) for y in (k, v))
    scale = layer.head_dim**-0.5 if layer.softmax_scale is None else layer.softmax_scale
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    out = torch.softmax(scores, dim=-1).nan_to_num() @ v
    return layer.output(out.float().transpose(1, 2).flatten(2))


def agree(layer, x, mask, **limits):
    mine, right = layer(x, **limits), by_mask(layer, x, mask)
    torch.testing.assert_close(mine, right, rtol=0, atol=2e-5)
    weight = torch.randn(mine.shape, generator=torch.Generator().manual_seed(3))
    parameters = [p for name, p in layer.named_parameters() if "score" not in name]
    grads = (torch.autograd.grad((y * weight).sum(), parameters) for y in (mine, right))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def draw(seed=0, batch=2, seqlen=SEQLEN):
    torch.manual_seed(seed)
    return torch.randn(batch, seqlen, WIDTH)


def triangle(include_self=True):
    return torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).tril(0 if include_self else -1)


@pytest.mark.parametrize("heads_kv", [None, 2, 1])
@pytest.mark.parametrize("include_self", [True, False])
def test_dense(heads_kv, include_self):
    x = draw()
    layer = nn.DenseSelfAttention(WIDTH, HEADS, heads_kv=heads_kv, include_self=include_self)
    agree(layer, x, triangle(include_self))


def test_dense_has_the_parameters_of_any_attention_layer():
    layer = nn.DenseSelfAttention(WIDTH, HEADS, heads_kv=2, head_dim=32, bias=True)
    shapes = {name: tuple(p.shape) for name, p in layer.state_dict().items()}
    assert shapes == {
        "query.weight": (128, 64),
        "query.bias": (128,),
        "key.weight": (64, 64),
        "key.bias": (64,),
        "value.weight": (64, 64),
        "value.bias": (64,),
        "output.weight": (64, 128),
        "output.bias": (64,),
    }


@pytest.mark.parametrize("include_self", [True, False])
def test_window(include_self):
    layer = nn.WindowSelfAttention(WIDTH, HEADS, 7, include_self=include_self)
    mask = triangle(include_self) & ~torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).tril(-7)
    agree(layer, draw(), mask)


def test_documents_and_padding():
    x = draw()
    documents = (torch.arange(SEQLEN) // 10).expand(2, -1)
    keep = torch.arange(SEQLEN).expand(2, -1) < torch.tensor([[SEQLEN], [30]])
    mask = (documents[:, :, None] == documents[:, None, :]) & keep[:, None] & keep[:, :, None]
    layer = nn.DenseSelfAttention(WIDTH, HEADS)
    agree(layer, x, (mask & triangle())[:, None], documents=documents, keep=keep)


def test_own_pattern_and_plan():
    x = draw()
    strided = (torch.arange(SEQLEN) % 3).view(1, 1, -1)
    layer = nn.SparseSelfAttention(
        WIDTH, HEADS, pattern=lambda q, k: scfa.HashSparse(strided, strided), softmax_scale=0.3
    )
    agree(layer, x, triangle() & (strided[0] == strided[0].T))
    q, k, _ = layer.project(x)
    plan = scfa.make_plan(scfa.SlidingWindow(3), q, k)
    torch.testing.assert_close(
        layer(x, plan=plan),
        by_mask(layer, x, triangle() & ~torch.ones_like(triangle()).tril(-3)),
        rtol=0,
        atol=2e-5,
    )
    with pytest.raises(scfa.PatternError, match="belong into the plan"):
        layer(x, plan=plan, keep=torch.ones(2, SEQLEN, dtype=torch.bool))
    with pytest.raises(scfa.PatternError, match=r"plan must be a Plan.*got Causal"):
        layer(x, plan=scfa.Causal())


@pytest.mark.parametrize("heads_kv", [4, 2])
@pytest.mark.parametrize("rounds", [1, 2])
def test_hash_sees_the_union_of_its_rounds(heads_kv, rounds):
    x = draw()
    layer = nn.HashSelfAttention(WIDTH, HEADS, 8, rounds=rounds, heads_kv=heads_kv, seed=1)
    q, k, _ = layer.project(x)
    a, b = layer.hash(q, k)
    b = b.repeat_interleave(HEADS // heads_kv, dim=2)
    shared = (a[..., :, None] == b[..., None, :]).any(dim=0)
    agree(layer, x, shared & triangle())


def test_the_layer_of_the_paper():
    x = draw()
    layer = nn.HashSelfAttention(WIDTH, HEADS, 4, shared_qk=True, include_self=False, seed=0)
    q, k, _ = layer.project(x)
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(2, HEADS, SEQLEN))
    assert layer.key is None
    (bucket,) = layer.hash(q)[0]
    agree(layer, x, (bucket[..., :, None] == bucket[..., None, :]) & triangle(False))


def test_directions_travel_with_the_state():
    x = draw()
    one, other = (nn.HashSelfAttention(WIDTH, HEADS, 8) for _ in range(2))
    assert "hash.directions" in one.state_dict()
    assert not torch.equal(one.hash.directions, other.hash.directions)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    torch.manual_seed(5)
    again = nn.HashSelfAttention(WIDTH, HEADS, 8)
    torch.manual_seed(5)
    assert torch.equal(again.hash.directions, nn.HashSelfAttention(WIDTH, HEADS, 8).hash.directions)


def test_redrawn_directions_are_no_state_and_follow_the_generator():
    x = draw()
    layer = nn.HashSelfAttention(WIDTH, HEADS, 8, redraw=True)
    assert "hash.directions" not in layer.state_dict()
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(layer(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_rotary_hook_turns_queries_and_keys():
    x = draw()

    class Double(torch_nn.Module):
        def forward(self, y):
            assert y.shape[1:] == (HEADS, SEQLEN, 16)
            return 2 * y

    layer = nn.DenseSelfAttention(WIDTH, HEADS, rotary=Double())
    plain = nn.DenseSelfAttention(WIDTH, HEADS, softmax_scale=1.0)  # 16**-0.5 * 4
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x))


def test_random_dropping_in_training_only_unless_always():
    x = draw()
    layer = nn.DropSelfAttention(WIDTH, HEADS, 0.5)
    torch.manual_seed(4)
    dropped = layer(x)
    torch.manual_seed(4)
    keeps = [torch.rand(2, HEADS, SEQLEN) < 0.5 for _ in range(2)]
    mask = keeps[0][..., :, None] & keeps[1][..., None, :] & triangle()
    torch.testing.assert_close(dropped, by_mask(layer, x, mask), rtol=0, atol=2e-5)
    layer.eval()
    agree(layer, x, triangle())
    layer.always = True
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("how", ["top-k", "threshold"])
def test_learned_dropping(how):
    x = draw()
    layer = nn.DropSelfAttention(WIDTH, HEADS, 0.4, how=how, heads_kv=2)
    q_scores, k_scores = (s(x).transpose(1, 2) for s in (layer.query_score, layer.key_score))
    if how == "top-k":
        keeps = [s >= s.topk(18, dim=-1).values[..., -1:] for s in (q_scores, k_scores)]
    else:
        keeps = [s > 0 for s in (q_scores, k_scores)]
    k_keep = keeps[1].repeat_interleave(2, dim=1)
    agree(layer, x, keeps[0][..., :, None] & k_keep[..., None, :] & triangle())
    layer(x).square().sum().backward()
    assert layer.query_score.weight.grad.any()
    assert layer.key_score.weight.grad.any()


def test_misfits_raise():
    with pytest.raises(scfa.ShapeError, match="multiple of heads_kv"):
        nn.DenseSelfAttention(WIDTH, 4, heads_kv=3)
    with pytest.raises(scfa.ShapeError, match="divide width"):
        nn.DenseSelfAttention(WIDTH, 5)
    with pytest.raises(scfa.ShapeError, match="shared_qk"):
        nn.HashSelfAttention(WIDTH, 4, 8, heads_kv=2, shared_qk=True)
    with pytest.raises(scfa.PatternError, match="how"):
        nn.DropSelfAttention(WIDTH, 4, how="luck")
    with pytest.raises(scfa.PatternError, match="from 0 to 1"):
        nn.DropSelfAttention(WIDTH, 4, 2.0)
    with pytest.raises(scfa.PatternError, match="even"):
        nn.HashSelfAttention(WIDTH, 4, 7)
    with pytest.raises(scfa.ShapeError, match="chunk"):
        nn.ReformerAttention(WIDTH, 4, 8, 0)


def test_a_pattern_that_would_be_ignored_raises():
    """Each of these ran as if nothing had been asked for."""

    def causal(q, k):
        return scfa.Causal()

    for make in (
        lambda: nn.WindowSelfAttention(WIDTH, 4, 5, pattern=causal),
        lambda: nn.HashSelfAttention(WIDTH, 4, 8, pattern=causal),
        lambda: nn.DropSelfAttention(WIDTH, 4, pattern=causal),
    ):
        with pytest.raises(scfa.OptionError, match="has a pattern of its own"):
            make()
    with pytest.raises(scfa.OptionError, match="build it into yours"):
        nn.SparseSelfAttention(WIDTH, 4, pattern=causal, include_self=False)
    for returned, name in ((None, "NoneType"), ([scfa.Causal()], "list")):
        layer = nn.SparseSelfAttention(WIDTH, 4, pattern=lambda q, k, r=returned: r)
        with pytest.raises(scfa.PatternError, match=f"must return a scfa_core pattern, got {name}"):
            layer(draw())


def test_inputs_that_do_not_fit_raise():
    layer = nn.DenseSelfAttention(WIDTH, 4)
    chunked = nn.ReformerAttention(WIDTH, 4, 8, 8)
    for wrong, error, words in (
        (draw()[0], scfa.ShapeError, r"x must have 3 axes \(batch, seqlen, width\)"),
        (draw()[..., :32], scfa.ShapeError, r"x must be \(batch, seqlen, 64\)"),
        (draw().numpy(), scfa.DTypeError, "x must be a torch tensor .* got ndarray"),
    ):
        for module in (layer, chunked, chunked.coverage):
            with pytest.raises(error, match=words):
                module(wrong)
    for module in (chunked, chunked.coverage):
        with pytest.raises(scfa.ShapeError, match="a row or more"):
            module(draw()[:, :0])
    for name in ("documents", "keep"):
        with pytest.raises(scfa.DTypeError, match=f"{name} must be a torch tensor"):
            layer(draw(), **{name: 3})
        with pytest.raises(scfa.ShapeError, match=f"{name} must have 2 axes"):
            layer(draw(), **{name: torch.ones(SEQLEN, dtype=torch.bool)})
    with pytest.raises(scfa.OptionError, match=r"rotary must be a function, got int$"):
        nn.DenseSelfAttention(WIDTH, 4, rotary=3)
    with pytest.raises(scfa.OptionError, match="rotary must be a function"):
        nn.ReformerAttention(WIDTH, 4, 8, 8, rotary=3)
    with pytest.raises(scfa.ShapeError, match="head_dim must be at least 1"):
        nn.ReformerAttention(WIDTH, 4, 8, 8, head_dim=0)
    with pytest.raises(scfa.ScaleError, match="softmax_scale"):
        nn.ReformerAttention(WIDTH, 4, 8, 8, softmax_scale="x")


def test_what_a_hash_cannot_take_raises():
    for seed in (-1, "x", 0.5):
        with pytest.raises(scfa.PatternError, match="seed"):
            nn.AngularHash(HEADS, 16, 8, seed=seed)
    for own in (nn.AngularHash(HEADS, 16, 8, redraw=redraw) for redraw in (True, False)):
        with pytest.raises(scfa.PatternError, match="got none; pass q"):
            own()
        with pytest.raises(scfa.DTypeError, match="tensor to hash must be a torch tensor"):
            own(None)
        with pytest.raises(scfa.ShapeError, match="tensor to hash must have 4 axes"):
            own(draw())


def test_layers_print_what_they_are():
    layer = nn.HashSelfAttention(WIDTH, HEADS, 8, shared_qk=True, include_self=False)
    text = repr(layer)
    assert "heads=4, head_dim=16, shared_qk=True, include_self=False" in text
    assert "buckets=8, rounds=1, redraw=False" in text
    assert "window=5" in repr(nn.WindowSelfAttention(WIDTH, HEADS, 5))
    assert "how='random', keep=0.5" in repr(nn.DropSelfAttention(WIDTH, HEADS))
    assert "chunk=16" in repr(nn.ReformerAttention(WIDTH, HEADS, 8, 16))


def reformer_mask(layer, x):
    """Pairs that share bucket and neighbouring chunks in some round, from the definition."""
    seqlen = x.shape[1]
    (bucket,) = layer.hash(layer._split(layer.query(x)))
    seen = torch.zeros(*bucket.shape[1:], seqlen, dtype=torch.bool)
    for ids in bucket:
        place = torch.argsort(torch.argsort(ids, dim=-1, stable=True), dim=-1)
        apart = place[..., :, None] // layer.chunk - place[..., None, :] // layer.chunk
        seen |= (ids[..., :, None] == ids[..., None, :]) & (apart >= 0) & (apart <= 1)
    return seen & torch.ones(seqlen, seqlen, dtype=torch.bool).tril(-1)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(("chunk", "seqlen"), [(8, 45), (16, 45), (16, 48), (64, 45), (1, 6)])
def test_reformer_counts_each_visited_pair_once(rounds, chunk, seqlen):
    x = draw(seqlen=seqlen)
    layer = nn.ReformerAttention(WIDTH, HEADS, 4, chunk, rounds=rounds, seed=2)
    seen = reformer_mask(layer, x)
    q, v = (layer._split(p(x)) for p in (layer.query, layer.value))
    k = torch_nn.functional.normalize(q, dim=-1)
    scores = (q @ k.transpose(-1, -2) * 0.25).masked_fill(~seen, -torch.inf)
    out = torch.softmax(scores, dim=-1).nan_to_num() @ v
    right = layer.output(out.transpose(1, 2).flatten(2))
    mine = layer(x)
    torch.testing.assert_close(mine, right, rtol=0, atol=2e-5)
    grads = (torch.autograd.grad(y.square().sum(), layer.parameters()) for y in (mine, right))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
    coverage = layer.coverage(x)
    assert coverage.visited == int(seen.sum())
    assert coverage.causal == 2 * HEADS * seqlen * (seqlen - 1) // 2


def test_coverage_is_full_with_long_chunks_and_falls_with_length():
    layer = nn.ReformerAttention(WIDTH, HEADS, 4, 64, seed=0)
    assert layer.coverage(draw(seqlen=60)).of_colliding == 1.0
    shares = [layer.coverage(draw(seqlen=n)).of_colliding for n in (128, 512, 4096)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.25


@pytest.mark.parametrize("kind", ["dense", "rounds", "shared", "learned", "reformer"])
def test_mixed_precision_stays_near_full(kind):
    layer = {
        "dense": lambda: nn.DenseSelfAttention(WIDTH, HEADS),
        "rounds": lambda: nn.HashSelfAttention(WIDTH, HEADS, 2, rounds=2, seed=0),
        "shared": lambda: nn.HashSelfAttention(WIDTH, HEADS, 2, shared_qk=True, seed=0),
        "learned": lambda: nn.DropSelfAttention(WIDTH, HEADS, 1.0, how="top-k"),
        "reformer": lambda: nn.ReformerAttention(WIDTH, HEADS, 2, 64, seed=0),
    }[kind]()
    x = draw()
    right = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = layer(x)
    assert mine.dtype == torch.bfloat16
    close = (mine - right).abs() < 0.03
    assert close.float().mean() > 0.95  # a query near a bucket's edge may change its bucket
    mine.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("shared_qk", [False, True])
def test_a_centered_hash_spreads_rows_and_sees_no_later_ones(shared_qk):
    options = {"heads_kv": HEADS if shared_qk else 2, "shared_qk": shared_qk, "center": True}
    layer = nn.HashSelfAttention(WIDTH, HEADS, 8, seed=1, **options)
    x = draw() + 4 * draw(seed=9, batch=1, seqlen=1)  # rows with much in common
    q, k, _ = layer.project(x)
    rows = (q,) if shared_qk else (q, k)

    def effective():
        return [bucket_balance(y, 8).effective_buckets for y in layer.hash(*rows)]

    before = effective()
    layer(x)
    first = layer(x)  # a second pass of the same step, as in activation checkpointing
    layer.hash.move_centers()
    assert all(a + 2 < b for a, b in zip(before, effective(), strict=True))
    for y, center in zip(rows, layer.hash.centers, strict=False):
        torch.testing.assert_close(center.place, y.mean((0, 2)), rtol=1e-4, atol=1e-4)
    assert not torch.equal(layer(x), first)

    later = x.clone()
    later[:, 30:] = draw(seed=5, seqlen=15)
    torch.testing.assert_close(layer(later)[:, :30], layer(x)[:, :30])
    copy = nn.HashSelfAttention(WIDTH, HEADS, 8, seed=2, **options)
    copy.load_state_dict(layer.state_dict())
    assert torch.equal(copy(x), layer(x))
    layer.eval()
    mean = layer.hash.centers[0].mean.clone()
    layer(later)
    assert torch.equal(layer.hash.centers[0].mean, mean)


def test_centers_approach_the_mean_and_complain():
    layer = nn.HashSelfAttention(WIDTH, HEADS, 8, center=True)
    for seed in range(3):
        layer(draw(seed))
        layer.hash.move_centers()
    assert layer.hash.centers[1].moves == 3
    (center, mean) = layer.hash.centers[0].place, layer.hash.centers[0].mean
    before = (center - mean).norm()
    layer.hash.move_centers(share=0.5)
    torch.testing.assert_close((center - mean).norm(), before / 2)
    q, k, _ = layer.project(draw())
    with pytest.raises(scfa.PatternError, match="got 3 tensors"):
        layer.hash(q, k, k)
    for share in (3, -0.1, float("nan"), "all", True):
        with pytest.raises(scfa.PatternError, match="share must be a number from 0 to 1"):
            layer.hash.move_centers(share)
    with pytest.raises(scfa.PatternError, match="center=True"):
        nn.HashSelfAttention(WIDTH, HEADS, 8).hash.move_centers()
