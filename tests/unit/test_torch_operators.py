"""The operators themselves: torch's own battery of checks, strides, aliases, encoded patterns."""

import pytest

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

from torch._subclasses import FakeTensorMode  # noqa: E402

import scfa_core as scfa  # noqa: E402
from scfa_core.hf_directions import DIRECTIONS  # noqa: E402
from scfa_core.lowering import is_monotone  # noqa: E402
from scfa_core.torch_ops import BACKWARD, FORWARD, MAKE_PLAN  # noqa: E402
from scfa_core.torch_patterns import decode, encode  # noqa: E402

BACKEND = "reference"
IDS = torch.arange(4 * 8).reshape(1, 4, 8) % 3
Q_HASH, K_HASH = IDS[..., :7].expand(2, 4, 7), IDS[:, :2].expand(2, 2, 8)
PATTERN = scfa.HashSparse(Q_HASH, K_HASH) & scfa.SlidingWindow(5)
# name: layout, then how (batch, heads, seqlen, dim) tensors lie in memory
MEMORY = {
    "bhtd": ("bhtd", lambda x: x),
    "bthd": ("bthd", lambda x: x.transpose(1, 2).contiguous()),
    "bhtd from bthd": ("bhtd", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "bthd from bhtd": ("bthd", lambda x: x.transpose(1, 2)),
    "heads slowest": ("bhtd", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "rows of wider": ("bhtd", lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]]),
    "expanded": ("bhtd", lambda x: x[:1].expand(x.shape)),
}


def tensors(arrange, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 7, 16), (2, 2, 8, 16), (2, 2, 8, 24))
    return [
        arrange(torch.randn(shape, generator=generator)).requires_grad_(requires_grad)
        for shape in shapes
    ]


def forward_arguments(memory, requires_grad=True):
    layout, arrange = MEMORY[memory]
    q, k, v = tensors(arrange, requires_grad)
    plan = scfa.make_plan(PATTERN, q, k, layout=layout, backend=BACKEND)
    return (q, k, v, *plan.arrays, plan.monotone, None, True, layout, BACKEND)


@pytest.mark.parametrize("memory", ["bhtd", "bhtd from bthd", "bthd", "expanded"])
def test_opcheck(memory):
    """Schema, autograd registration, fake tensors, AOT dispatch with dynamic shapes."""
    arguments = forward_arguments(memory)
    torch.library.opcheck(FORWARD, arguments)
    text, arrays, ints = encode(PATTERN)
    torch.library.opcheck(MAKE_PLAN, (*arguments[:2], text, arrays, ints, *arguments[-2:]))
    out, lse = FORWARD(*arguments)
    saved = [x.detach() for x in (*arguments[:3], out, lse)]
    for dlse in (None, torch.ones_like(lse)):
        torch.library.opcheck(BACKWARD, (torch.ones_like(out), dlse, *saved, *arguments[3:]))


def test_fake_directions_have_the_real_dtype_whatever_the_default_is():
    before = torch.get_default_dtype()
    arguments = (2, 16, 8, 0, torch.device("cpu"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            fake = DIRECTIONS(*arguments)
        assert fake.dtype is DIRECTIONS(*arguments).dtype is torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("memory", MEMORY)
def test_fake_results_have_the_real_strides(memory):
    arguments = forward_arguments(memory, requires_grad=False)
    q, k, v = arguments[:3]
    out, lse = FORWARD(*arguments)
    grads = BACKWARD(out, None, q, k, v, out, lse, *arguments[3:])
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        fake_out, fake_lse = FORWARD(*fakes)
        fake_grads = BACKWARD(fake_out, None, *fakes[:3], fake_out, fake_lse, *fakes[3:])
    for real, fake in zip((out, lse, *grads), (fake_out, fake_lse, *fake_grads), strict=True):
        facts = [(x.shape, x.stride(), x.dtype, x.device) for x in (real, fake)]
        assert facts[0] == facts[1]
    storages = [x.untyped_storage().data_ptr() for x in (*arguments[:10], out, lse, *grads)]
    assert len(set(storages) - {0}) == len([p for p in storages if p])  # nothing shares memory


@pytest.mark.parametrize("memory", MEMORY)
def test_any_strides_give_the_same_numbers(memory):
    layout, arrange = MEMORY[memory]
    q, k, v = tensors(arrange)
    plain = [
        (x.transpose(1, 2) if layout == "bthd" else x).detach().contiguous().requires_grad_()
        for x in (q, k, v)
    ]
    right = scfa.attention(*plain, PATTERN, backend=BACKEND)
    out = scfa.attention(q, k, v, PATTERN, layout=layout, backend=BACKEND)
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    want = torch.autograd.grad(right.square().sum(), plain)
    for mine, true in zip((out, *got), (right, *want), strict=True):
        assert torch.equal(mine.transpose(1, 2) if layout == "bthd" else mine, true)


PATTERNS = {
    "causal": scfa.Causal(include_self=False, align="bottom-right"),
    "hash": scfa.HashSparse(Q_HASH, K_HASH, causal=False),
    "keep": scfa.QKSparse(Q_HASH > 0, K_HASH > 0),
    "documents": scfa.Documents(Q_HASH[:, 0]),
    "window": scfa.SlidingWindow(3, causal=False),
    "ranges": scfa.KeyRanges(Q_HASH, Q_HASH + 2),
    "all": scfa.Causal()
    & PATTERN
    & scfa.QKSparse(Q_HASH > 0, K_HASH > 0)
    & scfa.KeyRanges(Q_HASH, Q_HASH + 2),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_encoded_patterns_come_back(name):
    """Every field of every pattern survives."""
    pattern = PATTERNS[name]
    again = decode(*encode(pattern))
    assert len(again.parts) == len(pattern.parts)
    for old, new in zip(pattern.parts, again.parts, strict=True):
        assert type(old) is type(new)
        for field in type(old).__slots__:
            mine, true = getattr(new, field), getattr(old, field)
            assert mine is true if isinstance(true, torch.Tensor) else mine == true
    assert is_monotone(pattern) == (name not in ("ranges", "all"))


def test_every_pattern_can_be_encoded():
    """A pattern added to the package must be added here, and so to the operators."""
    known = {type(part).__name__ for pattern in PATTERNS.values() for part in pattern.parts}
    assert known == set(scfa.patterns.__all__) - {"Pattern", "Intersection"}


def test_rubbish_is_refused_and_reads_nothing():
    arguments = list(forward_arguments("bhtd", requires_grad=False))
    with pytest.raises(scfa.PatternError, match="not an encoded pattern"):
        MAKE_PLAN(*arguments[:2], "os(system=@0)", [], [], "bhtd", BACKEND)
    for place, wrong, error, text in (
        (3, arguments[3][:, :3], scfa.ShapeError, "q_index must have shape"),
        (5, arguments[5].long(), scfa.DTypeError, "k_index must be int32"),
        (7, arguments[7].mT.contiguous().mT, scfa.LayoutError, "key_start must be contiguous"),
    ):
        broken = [*arguments[:place], wrong, *arguments[place + 1 :]]
        with pytest.raises(error, match=text):
            FORWARD(*broken)
    out, lse = FORWARD(*arguments)
    q, k, v = arguments[:3]
    with pytest.raises(scfa.ShapeError, match="dout must have shape"):
        BACKWARD(out[:, :1], None, q, k, v, out, lse, *arguments[3:])
    with pytest.raises(scfa.DTypeError, match="lse must be float32"):
        BACKWARD(out, None, q, k, v, out, lse.double(), *arguments[3:])


def test_meta_tensors_give_shapes():
    q, k, v = (x.to("meta") for x in tensors(lambda x: x))
    out, lse = scfa.attention(q, k, v, return_lse=True)
    assert (out.shape, out.is_meta, lse.dtype) == ((2, 4, 7, 24), True, torch.float32)
