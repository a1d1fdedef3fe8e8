"""Rows that the tensor engine fetches: the same bits as rows by index, whatever holds them."""

import pytest

import scfa_core as scfa

PATTERNS = {
    "causal": lambda torch, rows: scfa.Causal(),
    "window": lambda torch, rows: scfa.SlidingWindow(170),
    "documents": lambda torch, rows: scfa.Documents(
        (torch.arange(rows, device="cuda") // 210).expand(2, rows)
    ),
    "one row dropped": lambda torch, rows: scfa.QKSparse(
        *2 * [(torch.arange(rows, device="cuda") != 3 * rows // 4).expand(2, 3, rows)]
    ),
}


@pytest.fixture
def hopper(torch, backend, monkeypatch):
    if backend != "cupy" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only cupy on a Hopper card has a tensor engine to ask")
    monkeypatch.setenv("SCFA_CUPY_BACKWARD", "fused")  # which is the one that asks it


def in_rows_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def between_others(x):
    """Rows that lie between rows of NaN, columns between columns of NaN."""
    batch, heads, rows, columns = x.shape
    buffer = x.new_full((batch, heads, 2 * rows + 2, columns + 16), float("nan"))
    view = buffer[:, :, 1 : 2 * rows + 1 : 2, 8 : columns + 8]
    return view.copy_(x)


HOLDERS = {
    "contiguous": lambda x: x.contiguous(),
    "rows first": in_rows_first,
    "between others": between_others,
}


def described(x):
    from scfa_core.arrays import DeviceArray

    return DeviceArray(x.data_ptr(), tuple(x.shape), x.stride(), "bfloat16", 0)


@pytest.mark.parametrize("broadcast", [(2, 1), (1, 3)], ids=["heads", "batch"])
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("rows", [33, 191, 500, 1501])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, "bfloat16"), (64, "float16"), (128, "bfloat16"), (16, "bfloat16"), (96, "bfloat16")],
)
def test_the_same_bits(torch, hopper, head_dim, dtype, name, rows, holder, broadcast):
    from scfa_core.backends.cupy_raw.tensor_maps import tensor_maps

    generator = torch.Generator("cuda").manual_seed(rows)
    options = {"device": "cuda", "dtype": getattr(torch, dtype), "generator": generator}
    batch, heads = broadcast  # of what is there: 2, 3 by rows of one axis, which differ
    one = [torch.randn(batch, heads, rows, head_dim, **options) for _ in range(4)]
    pattern = PATTERNS[name](torch, rows)

    def results(hold):
        dout, q, k, v = (hold(x.expand(2, 3, -1, -1)) for x in one)
        assert (tensor_maps(described(q), described(k)) is None) == (hold is as_it_is)
        out, lse = scfa.attention(q, k, v, pattern, return_lse=True, backend="cupy")
        grads = scfa.attention_backward(dout, q, k, v, out, lse, pattern, backend="cupy")
        return out, lse, *grads

    def as_it_is(x):  # an axis that is broadcast has no map
        return x

    for mapped, by_index in zip(results(HOLDERS[holder]), results(as_it_is), strict=True):
        assert torch.isfinite(mapped.float()).all() or name == "one row dropped"
        assert torch.equal(mapped, by_index)


def test_lists_that_stop_being_runs(torch, hopper):
    """Half of the rows hashed, half in order: runs in one half of each list, none in the other."""
    rows = 4000
    generator = torch.Generator("cuda").manual_seed(1)
    options = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    one = [torch.randn(1, 1, rows, 64, **options) for _ in range(4)]
    ids = torch.randint(0, 9, (2, 3, rows), device="cuda", generator=generator)
    ids[..., 1500:] = 9
    pattern = scfa.HashSparse(ids, ids)

    def results(hold):
        dout, q, k, v = (hold(x.expand(2, 3, -1, -1)) for x in one)
        out, lse = scfa.attention(q, k, v, pattern, return_lse=True, backend="cupy")
        return out, lse, *scfa.attention_backward(dout, q, k, v, out, lse, pattern, backend="cupy")

    for mapped, by_index in zip(
        results(lambda x: x.contiguous()), results(lambda x: x), strict=True
    ):
        assert torch.equal(mapped, by_index)


def test_maps_go_with_the_tensors_of_a_call(torch, hopper):
    """One bound launch, other tensors each time, in a graph too: no map of an earlier call."""
    shape = (1, 2, 700, 64)
    causal, call = scfa.Causal(), {"backend": "cupy"}

    def everything(dout, q, k, v):
        out, lse = scfa.attention(q, k, v, causal, return_lse=True, **call)
        return out, *scfa.attention_backward(dout, q, k, v, out, lse, causal, **call)

    given = []
    for seed in range(3):
        torch.manual_seed(seed)
        tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        given.append((tensors, everything(*tensors)))
    for tensors, eager in given:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = everything(*tensors)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(again, eager, strict=True))
        dout, *leaves = (x.clone().requires_grad_() for x in tensors)
        want = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
        grads = torch.autograd.grad(want, leaves, dout.detach())
        for got, right in zip(again, (want, *grads), strict=True):
            assert (got - right).abs().max() < 0.05 * right.abs().max()
