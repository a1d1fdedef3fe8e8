"""torch's own attention computed here: the registry, what is served, what goes on to torch."""

import logging

import pytest

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")
attention = pytest.importorskip("torch.nn.attention")
if not hasattr(attention, "register_flash_attention_impl"):
    pytest.skip("this torch has no registry of flash attention", allow_module_level=True)

import scfa_core as scfa  # noqa: E402
from scfa_core import torch_flash  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
sdpa = torch.nn.functional.scaled_dot_product_attention
CUDA_FORWARD = "_scaled_dot_product_flash_attention"


def counting(function, calls):
    """`function`, whose name is noted in `calls` each time."""

    def counted(*arguments, **options):
        calls.append(function.__name__)
        return function(*arguments, **options)

    return counted


@pytest.fixture
def served(monkeypatch):
    """Calls that reach this package, one entry each."""
    calls = []
    for name in ("attention", "attention_backward"):
        monkeypatch.setattr(torch_flash, name, counting(getattr(torch_flash, name), calls))
    return calls


@pytest.fixture
def active(served):
    """The package in place of torch's kernels, for one test."""
    torch_flash.register()
    attention.activate_flash_attention_impl("scfa")
    yield served
    attention.restore_flash_attention_impl()


def draw(layout="bhtd", heads_kv=4, dtype=torch.float32, seqlen=37, seed=0):
    """q, k, v of (2, 4, seqlen, 16), as a leaf or as views of one packed leaf."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "packed":
        packed = torch.randn(2, seqlen, 3, 4, 16, generator=generator).to(dtype)
        return [x.transpose(1, 2) for x in packed.requires_grad_().unbind(2)]
    shapes = [(2, heads, seqlen, 16) for heads in (4, heads_kv, heads_kv)]
    if layout == "bthd":
        shapes = [(b, t, h, d) for b, h, t, d in shapes]
    leaves = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    return [x.transpose(1, 2) if layout == "bthd" else x for x in leaves]


def results(inputs, **options):
    out = sdpa(*inputs, **options)
    return out, *torch.autograd.grad(out.square().sum(), inputs)


def own_and_ours(inputs, **options):
    """Results by torch's kernels, then by whatever is active after `register`."""
    own = results(inputs, **options)
    torch_flash.register()
    attention.activate_flash_attention_impl("scfa")
    try:
        return own, results(inputs, **options)
    finally:
        attention.restore_flash_attention_impl()


def truth(inputs, **options):
    """Results by the formula, in float64; torch's fast kernel gives NaN where the scale is 0."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        return results(wide, **options)


@pytest.mark.parametrize("layout", ["bhtd", "bthd", "packed"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"scale": 0.0}])
def test_causal_attention_is_computed_here(served, layout, options):
    inputs = draw(layout)
    own, ours = own_and_ours(inputs, is_causal=True, **options)
    assert served == ["attention", "attention_backward"]
    for mine, torchs, true in zip(ours, own, truth(inputs, is_causal=True, **options), strict=True):
        torch.testing.assert_close(mine, true.float())
        assert mine.stride() == torchs.stride()


def test_lse_is_torchs_in_value_and_memory_order(served):
    inputs = draw()
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    _, own = operator(*inputs, is_causal=True)
    torch_flash.register()
    attention.activate_flash_attention_impl("scfa")
    try:
        _, ours = operator(*inputs, is_causal=True)
    finally:
        attention.restore_flash_attention_impl()
    assert served == ["attention"]
    torch.testing.assert_close(ours, own)
    assert ours.stride() == own.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(served, dtype):
    inputs = draw(dtype=dtype)
    own, ours = own_and_ours(inputs, is_causal=True)
    assert served == ["attention", "attention_backward"]
    for mine, torchs, true in zip(ours, own, truth(inputs, is_causal=True), strict=True):
        assert (mine - true).abs().max() <= 2 * (torchs - true).abs().max()


def test_fewer_key_heads():
    q, k, v = draw(heads_kv=2)
    right = sdpa(q, k, v, is_causal=True, enable_gqa=True)
    torch_flash.register()
    attention.activate_flash_attention_impl("scfa")
    try:
        torch.testing.assert_close(sdpa(q, k, v, is_causal=True, enable_gqa=True), right)
    finally:
        attention.restore_flash_attention_impl()


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({}, {}, "only is_causal"),
        ({}, {"attn_mask": torch.ones(37, 37).tril(2).bool()}, "only is_causal"),
        ({"dtype": torch.float64}, {"is_causal": True}, "float64"),
    ],
)
def test_what_does_not_fit_is_torchs_own_to_the_bit(served, caplog, change, options, reason):
    torch_flash._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="scfa_core"):
        own, ours = own_and_ours(draw(**change), **options)
        own_and_ours(draw(**change), **options)
    assert served == []
    for mine, true in zip(ours, own, strict=True):
        assert torch.equal(mine, true)
    assert [reason in record.getMessage() for record in caplog.records] == [True]


def test_head_dims_of_no_backend_go_on(active):
    q, k, v = (x[..., :8].contiguous() for x in draw())
    sdpa(q, k, v, is_causal=True)
    assert active == []


def test_unequal_lengths_go_on(active):
    q, k, v = draw()
    right = scfa.attention(q[:, :, :9], k, v, scfa.Causal(), backend="reference")
    torch.testing.assert_close(sdpa(q[:, :, :9], k, v, is_causal=True), right)
    assert active == []


def test_nothing_changes_before_activation_nor_after_restoring(served):
    torch_flash.register("scfa-by-another-name")
    assert "scfa-by-another-name" in attention.list_flash_attention_impls()
    inputs = draw()
    sdpa(*inputs, is_causal=True)
    attention.activate_flash_attention_impl("scfa-by-another-name")
    assert attention.current_flash_attention_impl() == "scfa-by-another-name"
    attention.restore_flash_attention_impl()
    sdpa(*inputs, is_causal=True)
    assert served == []


def test_the_choice_of_backend_holds(active):
    with scfa.use_backend("reference"):
        by_reference = sdpa(*draw(), is_causal=True)
    right = scfa.attention(*draw(), backend="reference")
    assert torch.equal(by_reference, right)


def test_modules_of_torch_use_it(active):
    layer = torch.nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(20)
    layer.train()(torch.randn(2, 20, 64), src_mask=mask, is_causal=True).sum().backward()
    assert active == ["attention", "attention_backward"]


def test_compiled(active):
    """Strides are those that compiled code counts on."""

    def project(x):
        q, k, v = x.unbind(2)
        return sdpa(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True)

    torch._dynamo.reset()
    x = torch.randn(2, 37, 3, 4, 16, requires_grad=True)
    both = []
    for function in (torch.compile(project, fullgraph=True, backend="aot_eager"), project):
        out = function(x)
        both.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for mine, true in zip(*both, strict=True):
        torch.testing.assert_close(mine, true)
        assert mine.stride() == true.stride()
    assert active == ["attention", "attention_backward"] * 2


class Refuses:
    """Torch's own kernel, where it must not be called."""

    def call_boxed(self, *arguments, **options):
        raise AssertionError("torch's own kernel was called")


def test_operators_of_cuda_on_the_cpu(served):
    """Their signatures, and torch's formula for the gradient; tests/gpu runs them in place."""
    library = torch.library.Library("aten", "IMPL")
    own = Refuses()
    library.impl(CUDA_FORWARD, torch_flash._cuda_forward(own), "CPU", with_keyset=True)
    backward = torch_flash._cuda_backward(own)
    library.impl(f"{CUDA_FORWARD}_backward", backward, "CPU", with_keyset=True)
    inputs = draw("packed")
    out, lse, *_, seed, offset, _ = getattr(torch.ops.aten, CUDA_FORWARD)(*inputs, 0.0, True)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    assert served == ["attention", "attention_backward"]
    right = results(inputs, is_causal=True)
    for mine, true in zip((out, *grads), right, strict=True):
        torch.testing.assert_close(mine, true)
    assert lse.shape == (2, 4, 37)
    assert lse.is_contiguous()
    assert lse.dtype is torch.float32
    assert seed.dtype is offset.dtype is torch.uint64
    with pytest.raises(AssertionError, match="own kernel was called"):
        getattr(torch.ops.aten, CUDA_FORWARD)(*inputs, 0.5, True)


def test_a_torch_without_the_registry_is_told_so(monkeypatch):
    monkeypatch.delattr(attention, "register_flash_attention_impl")
    with pytest.raises(scfa.ScfaError, match="no registry of flash attention"):
        torch_flash.register()


@pytest.mark.parametrize("name", [None, 3, ""])
def test_a_name_that_is_none_raises(name):
    with pytest.raises(scfa.OptionError, match="name must be a word"):
        torch_flash.register(name)
    assert name not in attention.list_flash_attention_impls()
