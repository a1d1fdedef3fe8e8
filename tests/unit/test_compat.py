"""The original's functions against the definitions of its modes, written out here in float64."""

import pytest

import scfa_core as scfa

torch = pytest.importorskip("torch", reason="the original's functions take torch tensors")

from scfa_core import compat  # noqa: E402 - needs torch


def by_definition(q, k, v, visible, scale):
    """Dense attention; visible is (batch, heads, seqlen_q, seqlen_k), tensors are (b, n, h, d)."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights.nan_to_num(), v)


def draw(batch=2, seqlen_q=37, seqlen_k=37, heads=3, head_dim=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, heads, head_dim) for n in (seqlen_q, seqlen_k, seqlen_k)]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def pairs(q_idx, k_idx):
    """(batch, heads, seqlen_q, 1) and (batch, heads, 1, seqlen_k) views of indices (b, n, h)."""
    return q_idx.transpose(1, 2)[..., :, None], k_idx.transpose(1, 2)[..., None, :]


def causal(seqlen_q, seqlen_k, strict=False):
    i, j = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)[None, :]
    return j < i if strict else j <= i


def same_with_gradients(mine, right, tensors, tolerance=1e-10):
    torch.testing.assert_close(mine, right, rtol=0, atol=tolerance)
    seed = torch.randn(mine.shape, generator=torch.Generator().manual_seed(9), dtype=mine.dtype)
    for a, b in zip(
        torch.autograd.grad(mine, tensors, seed, retain_graph=True),
        torch.autograd.grad(right, tensors, seed, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(37, 37), (20, 45), (45, 20), (1, 1)])
@pytest.mark.parametrize("sm_scale", [None, 0.5, 0.0])
def test_hash_mode(seqlen_q, seqlen_k, sm_scale):
    q, k, v = draw(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    q_idx = torch.randint(0, 4, q.shape[:3], dtype=torch.int32)
    k_idx = torch.randint(0, 4, k.shape[:3], dtype=torch.int32)
    out = compat.dynamic_sparse_attention(q, k, v, q_idx, k_idx, sm_scale)
    a, b = pairs(q_idx, k_idx)
    scale = 0.25 if sm_scale is None else sm_scale
    right = by_definition(q, k, v, (a == b) & causal(seqlen_q, seqlen_k), scale)
    same_with_gradients(out, right, (q, k, v))


@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.int64])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(37, 37), (20, 45)])
def test_qk_mode(kind, seqlen_q, seqlen_k):
    q, k, v = draw(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    q_keep, k_keep = (torch.rand(x.shape[:3]) > 0.4 for x in (q, k))
    out = compat.dynamic_sparse_attention(
        q, k, v, q_keep.to(kind), k_keep.to(kind), sparsity_mode="qk"
    )
    a, b = pairs(q_keep, k_keep)
    right = by_definition(q, k, v, a & b & causal(seqlen_q, seqlen_k), 0.25)
    same_with_gradients(out, right, (q, k, v))
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert not out[~q_keep].any()
    assert not dq[~q_keep].any()
    assert not dk[~k_keep].any()
    assert not dv[~k_keep].any()


def test_gradients_where_buckets_cluster_in_time():
    # Each stretch uses two buckets, chosen apart for q and k: where the original loses gradients.
    q, k, v = draw(batch=1, seqlen_q=512, seqlen_k=512, heads=2, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    choice = torch.randint(0, 32, (2, 1, 8, 2, 2), generator=generator)
    pick = torch.randint(0, 2, (2, 1, 512, 2), generator=generator)
    spread = choice.repeat_interleave(64, dim=2)
    q_idx, k_idx = torch.gather(spread, -1, pick[..., None])[..., 0].int()
    out = compat.hash_sparse_attention(q, k, v, q_idx, k_idx)
    a, b = pairs(q_idx, k_idx)
    right = by_definition(q, k, v, (a == b) & causal(512, 512), 0.25)
    same_with_gradients(out, right, (q, k, v), tolerance=2e-5)


@pytest.mark.parametrize("mode", ["hash", "qk"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_as_a_dense_evaluation_of_its_own(dtype, mode):
    tensors = draw(dtype=dtype)
    q_idx, k_idx = (torch.randint(0, 3, x.shape[:3], dtype=torch.int32) for x in tensors[:2])
    a, b = pairs(q_idx, k_idx)
    visible = ((a == b) if mode == "hash" else (a > 0) & (b > 0)) & causal(37, 37)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    runs = [
        (compat.dynamic_sparse_attention(*tensors, q_idx, k_idx, None, mode), tensors),
        (by_definition(*tensors, visible, 0.25), tensors),
        (by_definition(*wide, visible, 0.25), wide),
    ]
    results = [(out, *torch.autograd.grad(out.square().sum(), x)) for out, x in runs]
    for mine, dense, right in zip(*results, strict=True):
        assert mine.dtype == dtype
        assert (mine - right).abs().max() <= 2 * (dense - right).abs().max()


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(1, 1), (5, 20), (16, 3), (100, 64)])
@pytest.mark.parametrize("sm_scale", [None, 0.3])
def test_any_head_dim(head_dim, head_dim_v, sm_scale):
    q, k, _ = draw(head_dim=head_dim)
    v = draw(head_dim=head_dim_v, seed=1)[2]
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    q_idx, k_idx = (torch.randint(0, 3, x.shape[:3], dtype=torch.int32) for x in (q, k))
    a, b = pairs(q_idx, k_idx)
    for mode, visible in (("hash", a == b), ("qk", (a > 0) & (b > 0))):
        out = compat.dynamic_sparse_attention(q, k, v, q_idx, k_idx, sm_scale, mode)
        right = by_definition(q, k, v, visible & causal(37, 37), scale)
        same_with_gradients(out, right, (q, k, v))
        arrays = [x.detach().numpy() for x in (q, k, v)] + [q_idx.numpy(), k_idx.numpy()]
        mine = compat.dynamic_sparse_attention(*arrays, sm_scale, mode)
        torch.testing.assert_close(torch.from_numpy(mine), out.detach(), rtol=0, atol=1e-10)
    odd = [x.detach().transpose(1, 2) for x in (q, k, v)]
    assert compat.hash_attention_fn(*odd).shape == odd[2].shape


def test_head_dims_that_no_padding_helps_raise():
    index = torch.zeros(1, 2, 1, dtype=torch.int32)
    for head_dim, words in ((0, "from 16 to 256, got 0"), (257, "256 at most, got 257")):
        x = torch.zeros(1, 2, 1, head_dim)
        with pytest.raises(scfa.ShapeError, match=words):
            compat.dynamic_sparse_attention(x, x, x, index, index)
    with pytest.raises(scfa.DTypeError, match="must be an array"):
        compat.dynamic_sparse_attention([1.0], [1.0], [1.0], index, index)


@pytest.mark.parametrize("dims", [(20, 24), (24, 20), (5, 16), (16, 32)])
def test_padding_does_not_hide_head_dims_that_differ(dims):
    q, k = (torch.zeros(1, 2, 1, dim) for dim in dims)
    with pytest.raises(scfa.ShapeError, match=f"{dims[0]}.*{dims[1]}"):
        compat.qk_sparse_attention(q, k, k, *torch.ones(2, 1, 2, 1))


def test_unknown_mode_and_flat_indices_raise():
    q, k, v = draw()
    with pytest.raises(scfa.PatternError, match="sparsity_mode"):
        compat.dynamic_sparse_attention(q, k, v, q[..., 0], k[..., 0], sparsity_mode="bloom")
    with pytest.raises(scfa.ShapeError, match="q_hash must be an array"):
        compat.hash_sparse_attention(q, k, v, torch.zeros(37), torch.zeros(37))


def test_indices_of_other_axes_are_refused_in_the_order_of_the_call():
    x = torch.zeros(2, 20, 4, 16)
    index = torch.zeros(2, 20, 4, dtype=torch.int32)
    for mode, name in (("hash", "q_idx"), ("qk", "q_idx")):
        words = rf"{name} must be \(batch, seqlen, heads\) = \(2, 20, 4\) as q is.*\(2, 4, 20\)"
        with pytest.raises(scfa.ShapeError, match=words):
            compat.dynamic_sparse_attention(x, x, x, index.mT, index, sparsity_mode=mode)
    with pytest.raises(scfa.ShapeError, match=r"k_keep must be .* as k is.*\(2, 19, 4\)"):
        compat.qk_sparse_attention(x, x, x, index, index[:, :19])
    for shared in (index[:1], index[:, :, :1]):  # one for all sequences, one for all heads
        out = compat.hash_sparse_attention(x, x, x, shared, shared)
        assert torch.equal(out, compat.hash_sparse_attention(x, x, x, index, index))


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_compact_keeps_order_and_scatters_back(kept):
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand((2, 19, 3), generator=generator) < kept
    x = torch.randn((2, 19, 3, 4), generator=generator, requires_grad=True)
    rows, index, count = compat.compact(keep.float(), x)
    assert rows.shape == (2, int(keep.sum(1).max()), 3, 4)
    padded = compat.pad_index(index, count, pad_idx=1e9)
    assert padded.dtype == torch.int32
    for b in range(2):
        for h in range(3):
            kept_rows = keep[b, :, h].nonzero().flatten()
            n = len(kept_rows)
            assert padded[b, :n, h].tolist() == kept_rows.tolist()
            assert (padded[b, n:, h] == 10**9).all()
            torch.testing.assert_close(rows[b, :n, h], x[b, kept_rows, h])
    again, same_index, none = compat.compact(keep.float(), x, index)
    assert none is None
    assert same_index is index
    assert torch.equal(again, rows)
    (dx,) = torch.autograd.grad(rows.sum(), x)
    assert (dx[keep] == 1).all()


def buckets_by_definition(x, directions):
    """argmax over [xR, -xR]; x (batch, heads, seqlen, head_dim)."""
    turned = x @ directions
    return torch.cat([turned, -turned], dim=-1).argmax(dim=-1)


@pytest.mark.parametrize("heads_kv", [4, 2])
@pytest.mark.parametrize("hashes_per_head", [False, True])
def test_hash_attention_fn_is_what_the_paper_defines(hashes_per_head, heads_kv):
    q = draw(heads=4, dtype=torch.float32)[0]
    k, v = draw(heads=heads_kv, dtype=torch.float32, seed=1)[1:]
    out = compat.hash_attention_fn(
        *(x.transpose(1, 2) for x in (q, k, v)),
        nb_hash=6,
        hashes_per_head=hashes_per_head,
        generator=torch.Generator().manual_seed(3),
    )
    drawn = torch.randn(
        (1, heads_kv if hashes_per_head else 1, 16, 3), generator=torch.Generator().manual_seed(3)
    )
    directions = drawn / drawn.norm(dim=2, keepdim=True)
    leaves = (q, k, v)
    k, v = (x.repeat_interleave(4 // heads_kv, dim=2) for x in (k, v))
    own = directions.shape[1]
    q_hash, k_hash = (
        buckets_by_definition(x.transpose(1, 2), directions.repeat_interleave(4 // own, dim=1))
        for x in (q, k)
    )
    visible = (q_hash[..., :, None] == k_hash[..., None, :]) & causal(37, 37, strict=True)
    assert visible.any(dim=-1)[:, :, 1:].float().mean() > 0.5
    right = by_definition(q, k, v, visible, 0.25)
    same_with_gradients(out.transpose(1, 2), right, leaves, tolerance=2e-5)


def test_qk_attention_fn_is_what_the_paper_defines():
    q, k, v = draw(dtype=torch.float32)
    out = compat.qk_attention_fn(q, k, v, 0.3, generator=torch.Generator().manual_seed(3))
    again = torch.Generator().manual_seed(3)
    q_keep, k_keep = (torch.rand(x.shape[:3], generator=again) >= 0.3 for x in (q, k))
    a, b = pairs(q_keep, k_keep)
    unit = k / k.norm(dim=-1, keepdim=True)
    right = by_definition(q, unit, v, a & b & causal(37, 37), 0.25)
    same_with_gradients(out, right, (q, k, v), tolerance=2e-5)


def test_hash_attention_fn_is_strict_and_seeded():
    q, _, v = (x.transpose(1, 2) for x in draw(dtype=torch.float32))
    k = torch.nn.functional.normalize(q, dim=-1)
    calls = [
        compat.hash_attention_fn(
            q, k, v, nb_hash=4, hashes_per_head=True, generator=torch.Generator().manual_seed(s)
        )
        for s in (0, 0, 1)
    ]
    assert torch.equal(calls[0], calls[1])
    assert not torch.equal(calls[0], calls[2])
    assert not calls[0][:, :, 0].any()  # nothing comes before the first position
    assert calls[0].shape == q.shape
    # Two buckets of opposite vectors: whatever the directions, only parallel keys share a bucket.
    line = torch.ones(1, 1, 6, 16) * torch.tensor([1.0, -1, 1, 1, -1, -1]).view(1, 1, 6, 1)
    out = compat.hash_attention_fn(line, line, line, nb_hash=2)
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([0.0, 0, 1, 1, -1, -1]))


def test_hash_attention_fn_refuses_odd_buckets():
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(scfa.PatternError, match="even"):
        compat.hash_attention_fn(q, q, q, nb_hash=5)


def test_qk_attention_fn_drops_its_share_whatever_torch_s_default():
    q = torch.ones(8, 500, 16, 16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        out = compat.qk_attention_fn(q, q, q, 1e-3, generator=torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(before)
    dropped = (out == 0).all(-1)[:, 50:].float().mean()
    assert 0.0006 < dropped < 0.0014


def test_qk_attention_fn_without_and_with_dropping():
    q, k, v = draw(dtype=torch.float32)
    out = compat.qk_attention_fn(q, k, v, sparsity=0.0)
    unit = torch.nn.functional.normalize(k, dim=-1)
    right = by_definition(q, unit, v, causal(37, 37).expand(2, 3, -1, -1), 0.25)
    same_with_gradients(out, right, (q, k, v), tolerance=1e-5)
    assert not compat.qk_attention_fn(q, k, v, sparsity=1.0).any()
    seeds = [torch.Generator().manual_seed(s) for s in (3, 3)]
    halves = [compat.qk_attention_fn(q, k, v, generator=g) for g in seeds]
    assert torch.equal(*halves)
    gone = (halves[0] == 0).all(dim=-1).float().mean()
    assert 0.3 < gone < 0.75
    with pytest.raises(scfa.PatternError, match="from 0 to 1"):
        compat.qk_attention_fn(q, k, v, sparsity=1.5)


def test_numpy_arrays_pass_through():
    import numpy as np

    x = np.random.default_rng(0).standard_normal((1, 9, 2, 16)).astype(np.float32)
    ids = np.zeros((1, 9, 2), np.int32)
    out = compat.dynamic_sparse_attention(x, x, x, ids, ids)
    assert out.shape == x.shape
    assert isinstance(out, np.ndarray)


ROWS = torch.zeros(2, 5, 3, 16)  # (batch, seqlen, heads, head_dim)
FLAGS = torch.ones(2, 5, 3)
INDEX = torch.zeros(2, 4, 3, dtype=torch.int64)
COUNT = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "words"),
    [
        ("compact", (FLAGS, ROWS[0]), scfa.ShapeError, r"x must have 4 axes .*\(5, 3, 16\)"),
        (
            "compact",
            (FLAGS[:, :3], ROWS),
            scfa.ShapeError,
            r"each row and head of x, got \(2, 3, 3",
        ),
        ("compact", (FLAGS[..., :1], ROWS), scfa.ShapeError, "each row and head of x"),
        ("compact", (FLAGS.numpy(), ROWS), scfa.DTypeError, "must be a torch tensor .*got ndarray"),
        ("compact", (FLAGS, ROWS, INDEX.int()), scfa.DTypeError, "int64, as compact returns it"),
        ("compact", (FLAGS, ROWS, INDEX[..., :1]), scfa.ShapeError, r"rows, 3\) for x.shape"),
        ("compact", (FLAGS, ROWS, INDEX - 1), scfa.PatternError, r"rows 0 to 4 of .* got -1; what"),
        ("compact", (FLAGS, ROWS, INDEX + 5), scfa.PatternError, r"rows 0 to 4 of .* got 5; what"),
        ("compact", (FLAGS, ROWS[:, :0], INDEX), scfa.PatternError, "rows 0 to -1 of .* got 0"),
        ("compact", (FLAGS, ROWS, INDEX.float()), scfa.DTypeError, "int64, .* got torch.float32"),
        ("compact", (FLAGS, ROWS, INDEX.numpy()), scfa.DTypeError, "index must be a torch tensor"),
        ("compact", (FLAGS, ROWS, INDEX.to("meta")), scfa.DeviceError, "on cpu like x, got meta"),
        ("compact", (FLAGS.to("meta"), ROWS), scfa.DeviceError, "on cpu like x, got meta"),
        ("pad_index", (INDEX[0], COUNT), scfa.ShapeError, "index must have 3 axes"),
        ("pad_index", (INDEX, COUNT[:1]), scfa.ShapeError, r"\(2, 3\) for .*got \(1, 3\)"),
        ("pad_index", (INDEX, COUNT[0]), scfa.ShapeError, "indices_per_head must have 2 axes"),
        ("pad_index", (INDEX, COUNT, "x"), scfa.OptionError, "whole number of 32 bits, got 'x'"),
        ("pad_index", (INDEX, COUNT, 1e12), scfa.OptionError, "whole number of 32 bits"),
        ("pad_index", (INDEX, COUNT, 10**400), scfa.OptionError, "whole number of 32 bits"),
        ("pad_index", (INDEX, COUNT, 0.5), scfa.OptionError, "whole number of 32 bits"),
        ("hash_attention_fn", [ROWS[0]] * 3, scfa.ShapeError, "Q must have 4 axes"),
        ("hash_attention_fn", [ROWS.numpy()] * 3, scfa.DTypeError, "Q must be a torch tensor"),
        ("hash_attention_fn", (ROWS, ROWS[..., :8], ROWS), scfa.ShapeError, "one head_dim"),
        ("qk_attention_fn", [ROWS[0]] * 3, scfa.ShapeError, "q must have 4 axes"),
        ("qk_attention_fn", (ROWS, ROWS.numpy(), ROWS), scfa.DTypeError, "k must be a torch"),
    ],
)
def test_what_is_held_wrong_is_told(function, arguments, error, words):
    with pytest.raises(error, match=words):
        getattr(compat, function)(*arguments)


def test_compact_by_an_index_compiles_and_traces_without_a_look_at_it():
    x, index = torch.randn(2, 5, 3, 16), torch.randint(0, 5, (2, 4, 3))

    def call(x, index):
        return compat.compact(FLAGS, x, index)[0]

    right = call(x, index)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(x, index), right)
    assert torch.equal(torch.func.vmap(call)(x[None], index[None])[0], right)
    assert call(x.to("meta"), index.to("meta")).shape == right.shape


def test_rows_named_twice_are_taken_twice():
    x = torch.randn(2, 5, 3, 16, requires_grad=True)
    rows, _, count = compat.compact(FLAGS, x, INDEX + 4)
    assert count is None
    assert torch.equal(rows, x[:, 4:].expand(2, 4, 3, 16))
    rows.sum().backward()
    assert torch.equal(x.grad[:, 4], torch.full((2, 3, 16), 4.0))


@pytest.mark.slow
@pytest.mark.parametrize("attend", ["hash", "qk"])
def test_attention_fns_compile_for_any_length(attend):
    torch._dynamo.reset()

    def call(x):
        if attend == "hash":
            return compat.hash_attention_fn(x, x, x, 2)
        return compat.qk_attention_fn(x, x, x, 0.0)  # none is dropped

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 4, 20, 16), (2, 4, 33, 16)):
        x = torch.ones(shape)  # all in one bucket
        torch.testing.assert_close(compiled(x), call(x))
