"""Tensors that are not ordinary ones: none reaches a pointer, nested ones are told to be packed."""

import pytest

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

from torch import nn  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

import scfa_core as scfa  # noqa: E402
from scfa_core import torch_bridge  # noqa: E402
from scfa_core.merging import attention_over  # noqa: E402

DRAWN = torch.Generator().manual_seed(0)
Q, K, V = (
    torch.randn(2, heads, 8, dim, generator=DRAWN) for heads, dim in ((4, 16), (2, 16), (2, 24))
)


def test_subclasses_and_views_take_the_operator():
    """Whatever is not an ordinary tensor in memory never reaches a pointer."""
    negative = torch._neg_view(Q)  # a minus sign that is not in memory
    want = scfa.attention(-Q, K, V, backend="reference")
    assert torch.equal(scfa.attention(negative, K, V, backend="reference"), want)
    parameter = torch.nn.Parameter(Q)
    assert torch.equal(
        scfa.attention(parameter, K, V, backend="reference"),
        scfa.attention(Q, K, V, backend="reference"),
    )
    assert not torch_bridge.is_plain(parameter, K, V)
    assert not torch_bridge.is_plain(negative, K, V)
    assert torch_bridge.is_plain(Q, K, V)


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as DTensors and tracers are."""

    seen = None

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        cls.seen.append(str(op))
        bare = tree_map_only(Wrapper, lambda x: x.held, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Wrapper, op(*bare[0], **bare[1]))


class Named(torch.Tensor):
    """An ordinary tensor by another name."""


@pytest.mark.parametrize("backend", ["reference", "numba-cpu"])
@pytest.mark.parametrize("kind", [Wrapper, lambda x: x.as_subclass(Named), nn.Parameter])
def test_what_a_pattern_holds_takes_the_operator_if_it_is_not_plain(kind, backend):
    """Q, k and v are plain: a plan made of addresses would read memory that is none."""
    rows = torch.arange(8).expand(2, 4, -1) % 3, torch.arange(8).expand(2, 2, -1) % 2
    patterns = {
        "hash": (scfa.HashSparse, [rows[0], rows[1]]),
        "keep": (scfa.QKSparse, [rows[0] > 0, (rows[1] > 0).float()]),
        "documents": (scfa.Documents, [rows[0][:, 0]]),
        "ranges": (scfa.KeyRanges, [rows[0], rows[0] + 2]),
    }
    grads = torch.ones(2, 4, 8, 24)
    for pattern, arrays in patterns.values():
        arrays = [x.contiguous() for x in arrays]
        plain = pattern(*arrays) & scfa.SlidingWindow(6)
        if kind is nn.Parameter:
            odd = pattern(*(kind(x, requires_grad=False) for x in arrays)) & scfa.SlidingWindow(6)
        else:
            odd = pattern(*(kind(x) for x in arrays)) & scfa.SlidingWindow(6)
        Wrapper.seen = []
        out, lse = scfa.attention(Q, K, V, plain, return_lse=True, backend=backend)
        right = scfa.attention_backward(grads, Q, K, V, out, lse, plain, backend=backend)
        plan = scfa.make_plan(odd, Q, K, backend=backend)
        for given in (odd, plan):
            mine = scfa.attention(Q, K, V, given, backend=backend)
            assert torch.equal(held(mine), out)
            own = scfa.attention_backward(grads, Q, K, V, out, lse, given, backend=backend)
            assert all(torch.equal(held(x), y) for x, y in zip(own, right, strict=True))
            leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
            mine = scfa.attention(*leaves, given, backend=backend)
            dout = Wrapper(grads) if kind is Wrapper else grads
            own = torch.autograd.grad(mine, leaves, dout)
            assert all(torch.equal(held(x), y) for x, y in zip(own, right, strict=True))
        if kind is Wrapper:
            assert {"scfa.make_plan.default", "scfa.forward.default"} <= set(Wrapper.seen)


@pytest.mark.parametrize("backend", ["reference", "numba-cpu"])
@pytest.mark.parametrize("negative", [False, True])
def test_flags_and_ids_in_any_memory_are_read_as_what_they_say(negative, backend):
    """bfloat16, which NumPy lacks, and a minus sign that torch has put off."""

    def stored(x):
        return torch._neg_view(-x) if negative else x

    flags = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0]).expand(2, 4, 8)
    ids = torch.arange(8).expand(2, 4, 8) % 3
    plain = scfa.QKSparse(flags > 0, flags[:, :2] > 0) & scfa.HashSparse(ids, ids[:, :2])
    keep = scfa.QKSparse(stored(flags.bfloat16()), stored(flags[:, :2].double() * 1e-60))
    odd = keep & scfa.HashSparse(stored(ids), stored(ids[:, :2]))
    sizes = {"batch": 2, "heads": 4, "heads_kv": 2}
    right = plain.mask(8, 8, **sizes)
    assert (odd.mask(8, 8, **sizes) == right).all()
    assert (scfa.make_plan(odd, Q, K, backend=backend).to_dense() == right).all()
    scfa.validate(scfa.QKSparse(stored(flags.bfloat16()), flags[:, :2].half()), Q, K)
    wrong = scfa.QKSparse(stored(flags.bfloat16() * 3), flags[:, :2])
    with pytest.raises(scfa.PatternError, match=r"must be 0 or 1, got 3\.0"):
        scfa.validate(wrong, Q, K)


def held(x):
    return x.held if isinstance(x, Wrapper) else x.as_subclass(torch.Tensor)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize(
    ("pattern", "given"),
    [
        (scfa.Documents, lambda nested: (nested,)),
        (scfa.Documents, lambda nested: (torch.zeros(2, 8), nested)),
        (scfa.HashSparse, lambda nested: (nested, nested)),
        (scfa.QKSparse, lambda nested: (nested, nested)),
        (scfa.KeyRanges, lambda nested: (nested, nested)),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_a_pattern_of_nested_tensors_says_what_to_pass(pattern, given, layout):
    nested = torch.nested.nested_tensor([torch.zeros(5), torch.zeros(3)], layout=layout)
    with pytest.raises(scfa.PatternError, match=rf"{pattern.__name__}: .* Documents\(ids\)"):
        pattern(*given(nested))


def test_packing_a_nested_tensor_as_the_error_says():
    parts = [torch.randn(rows, 4, 16, generator=DRAWN) for rows in (5, 3)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    documents = scfa.Documents.from_cu_seqlens(nested.offsets(), 8)  # as the message says
    packed = nested.values()[None]
    out = scfa.attention(packed, packed, packed, documents, layout="bthd")
    alone = [scfa.attention(x[None], x[None], x[None], layout="bthd")[0] for x in parts]
    torch.testing.assert_close(out[0], torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", [scfa.SlidingWindow(2**63), scfa.Causal(lag=2**80)])
def test_numbers_beyond_64_bits_can_be_traced(pattern):
    x = torch.randn(2, 1, 1, 6, 16, generator=torch.Generator().manual_seed(0))
    right = torch.stack([scfa.attention(y, y, y, pattern) for y in x])
    assert torch.equal(torch.func.vmap(lambda y: scfa.attention(y, y, y, pattern))(x), right)


class Tagged(scfa.HashSparse):
    """Slots in one word."""

    __slots__ = "tag"


class Cached(scfa.QKSparse):
    """A slot that is not set, below two classes that have some."""

    __slots__ = ("cache",)


class Deeper(Cached):
    """Nothing of its own."""

    __slots__ = ()


class Open(scfa.KeyRanges):
    """Any attribute at all."""


@pytest.mark.parametrize("kind", [None, Wrapper, lambda x: x.as_subclass(Named)])
@pytest.mark.parametrize("derived", [Tagged, Cached, Deeper, Open])
def test_patterns_with_slots_of_their_own(derived, kind):
    """Only the fields of this package's class are read, and all of them: also for odd tensors."""
    Wrapper.seen = []
    rows = torch.arange(8).expand(2, 4, -1) % 3, torch.arange(8).expand(2, 2, -1) % 3
    if derived is Open:
        rows = rows[0], rows[0] + 2
    plain = derived.__mro__[-3](*rows)
    right = scfa.attention(Q, K, V, plain)
    mine = derived(*(x if kind is None else kind(x.contiguous()) for x in rows))
    assert torch.equal(held(scfa.attention(Q, K, V, mine)), right)
    assert torch.equal(held(attention_over(Q, K, V, [mine])), right)
    assert torch_bridge.holds_plain(mine) is (kind is None)
    plan = scfa.make_plan(mine, Q, K)
    assert torch.equal(held(scfa.attention(Q, K, V, plan)), right)
    assert (kind is Wrapper) == bool(Wrapper.seen)
    if kind is None:
        theirs = scfa.attention(
            *(x.numpy() for x in (Q, K, V)), derived(*(x.numpy() for x in rows))
        )
        assert (theirs == right.numpy()).all()
