"""`DropSelfAttention`: padding and other documents change nothing, traced or not."""

import pytest

import scfa_core as scfa

torch = pytest.importorskip("torch", reason="these are torch modules")

from scfa_core.nn import DropSelfAttention  # noqa: E402 - needs torch

WIDTH = 64
LEARNED = pytest.mark.parametrize("how", ["top-k", "threshold"])


def make(how, keep=0.37, seed=0, **options):
    torch.manual_seed(seed)
    return DropSelfAttention(WIDTH, 4, keep, how=how, **options).double()


def close(mine, right):
    torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)


def padded(x, places, seqlen, filling):
    """Rows of x, (batch, rows, width), at their places among `filling`, and the flags of them."""
    at = places[..., None].expand(-1, -1, x.shape[2])
    full = torch.full((x.shape[0], seqlen, x.shape[2]), filling, dtype=x.dtype).scatter(1, at, x)
    return full, torch.zeros(full.shape[:2], dtype=torch.bool).scatter(1, places, True)


@LEARNED
@pytest.mark.parametrize("filling", [0.0, 1e3, -1e3, torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["end", "start", "anywhere"])
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_a_padded_sequence_gives_what_it_gives_alone(how, filling, where, heads_kv):
    layer = make(how, heads_kv=heads_kv)
    for rows, more in ((1, 3), (2, 1), (13, 6), (30, 30)):  # 0.5 of a row among the shares
        x = torch.randn(3, rows, WIDTH, dtype=torch.float64)
        every = torch.arange(rows + more).expand(3, -1)
        places = {
            "end": every[:, :rows],
            "start": every[:, more:],
            "anywhere": torch.rand(3, rows + more).argsort()[:, :rows].sort().values,
        }[where]
        full, keep = padded(x, places, rows + more, filling)
        out = layer(full, keep=keep)
        close(out[keep].view_as(x), layer(x))
        assert not out[~keep].any()
        close(layer(full, keep=keep.double() * 3), out)  # numbers count where nonzero


@LEARNED
def test_sequences_of_a_batch_have_lengths_of_their_own(how):
    layer = make(how, 0.5)
    x = torch.randn(4, 11, WIDTH, dtype=torch.float64)
    lengths = torch.tensor([11, 5, 1, 0])  # round(5.5), round(2.5), round(0.5) are 6, 2, 0
    out = layer(x, keep=torch.arange(11) < lengths[:, None])
    for mine, rows, length in zip(out, x, lengths.tolist(), strict=True):
        close(mine[:length], layer(rows[None, :length])[0])
        assert not mine[length:].any()


@LEARNED
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_document_gives_what_it_gives_alone(how, contiguous):
    layer = make(how, heads_kv=2)
    x = torch.randn(2, 40, WIDTH, dtype=torch.float64)
    documents = torch.randint(-2, 3, (2, 40))
    if contiguous:
        documents = documents.sort(descending=True).values
    keep = torch.rand(2, 40) < 0.8
    x[~keep] = torch.nan
    for limits in ({"documents": documents, "keep": keep}, {"documents": documents}):
        if "keep" not in limits:
            x = x.nan_to_num()
            keep = torch.ones(2, 40, dtype=torch.bool)
        out = layer(x, **limits)
        for b in range(2):
            for document in range(-2, 3):
                rows = keep[b] & (documents[b] == document)
                close(out[b, rows], layer(x[b : b + 1, rows])[0])
        assert not out[~keep].any()


def test_one_row_of_limits_for_the_whole_batch():
    layer = make("top-k")
    x = torch.randn(3, 20, WIDTH, dtype=torch.float64)
    keep, documents = torch.arange(20)[None] < 17, torch.arange(20)[None] // 6
    every = {"keep": keep.expand(3, -1), "documents": documents.expand(3, -1)}
    close(layer(x, keep=keep, documents=documents), layer(x, **every))


def test_patterns_of_a_subclass_are_ranked_within_as_well():
    half, pair = torch.arange(24)[None] // 12, torch.arange(24)[None] % 2
    q_keep, k_keep = torch.arange(24) % 3 > 0, torch.arange(24) % 5 > 0

    class Own(DropSelfAttention):
        def make_patterns(self, q, k):
            flags = scfa.QKSparse(q_keep[None, None], k_keep[None, None])
            return [scfa.Documents(half) & flags]

    torch.manual_seed(0)
    layer = Own(WIDTH, 4, 0.5, how="top-k").double()
    chosen = []
    layer.attend = lambda q, k, v, x, patterns: (
        chosen.extend(
            layer._choose(s(x).transpose(1, 2), patterns[0], side)
            for s, side in ((layer.query_score, "q"), (layer.key_score, "k"))
        )
        or torch.zeros_like(q)
    )
    layer(torch.randn(2, 24, WIDTH, dtype=torch.float64), documents=pair)
    for flags, taking_part in zip(chosen, (q_keep, k_keep), strict=True):
        assert not flags[..., ~taking_part].any()
        for group in range(4):
            rows = taking_part & (2 * half[0] + pair[0] == group)
            assert (flags[..., rows].sum(-1) == round(0.5 * int(rows.sum()))).all()


@LEARNED
def test_gradients_know_nothing_of_padding(how):
    layer = make(how)
    x = torch.randn(2, 15, WIDTH, dtype=torch.float64)
    full, keep = padded(x, torch.arange(15).expand(2, -1), 21, 1e3)
    grads = []
    for out in (layer(x), layer(full, keep=keep)[:, :15]):
        grads.append(torch.autograd.grad(out.square().sum(), list(layer.parameters())))
    torch.testing.assert_close(*grads)
    assert all(x.any() for x in grads[0])


@LEARNED
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_limits_leave_the_length_open(how):
    from torch._dynamo.testing import CompileCounter

    torch.manual_seed(0)
    layer = DropSelfAttention(WIDTH, 4, how=how)

    def draw(batch, seqlen):
        keep = torch.arange(seqlen) < torch.randint(2, seqlen, (batch, 1))
        documents = torch.arange(seqlen).expand(batch, -1) // 7
        return torch.randn(batch, seqlen, WIDTH), {"keep": keep, "documents": documents}

    x, limits = draw(3, 100)
    batch, seqlen = torch.export.Dim("b", min=2, max=64), torch.export.Dim("s", min=4, max=1000)
    sizes = {name: {0: batch, 1: seqlen} for name in ("x", *limits)}
    exported = torch.export.export(layer, (x,), limits, dynamic_shapes=sizes).module()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for batch, seqlen in ((2, 20), (3, 31), (2, 52), (5, 333)):
        x, limits = draw(batch, seqlen)
        for run in (compiled, exported):
            torch.testing.assert_close(run(x, **limits), layer(x, **limits))
    assert counter.frame_count == 1


def test_a_share_of_rows_leaves_the_length_open():
    from torch._dynamo.testing import CompileCounter

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


def test_limits_under_vmap():
    layer = make("top-k")
    x = torch.randn(3, 2, 20, WIDTH, dtype=torch.float64)
    keep, documents = torch.rand(3, 2, 20) < 0.7, torch.arange(20).expand(3, 2, -1) // 6

    def run(x, keep, documents):
        return layer(x, keep=keep, documents=documents)

    right = torch.stack([run(*given) for given in zip(x, keep, documents, strict=True)])
    close(torch.func.vmap(run)(x, keep, documents), right)


@LEARNED
def test_heads_may_be_spread_over_processes(how):
    """One process of one: mixing plain tensors with DTensors fails there as well."""
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("this torch has no distributed package")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    layer = make(how)
    x = torch.randn(2, 20, WIDTH, dtype=torch.float64)
    limits = {"keep": torch.rand(2, 20) < 0.7, "documents": torch.arange(20).expand(2, -1) // 6}
    limits = {name: limit.contiguous() for name, limit in limits.items()}
    right = [layer(x), layer(x, **limits)]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        inward = [name for name, _ in layer.named_children() if name != "output"]
        styles = {name: ColwiseParallel(use_local_output=False) for name in inward}
        parallelize_module(layer, mesh, {**styles, "output": RowwiseParallel()})
        spread = {n: distribute_tensor(y, mesh, [Replicate()]) for n, y in limits.items()}
        for mine, whole in zip((layer(x), layer(x, **spread)), right, strict=True):
            close(mine + 0, whole)
    finally:
        dist.destroy_process_group()
