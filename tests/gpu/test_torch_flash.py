"""torch's own attention on a GPU, computed here (tests/unit/test_torch_flash.py has the rest)."""

import pytest


@pytest.fixture
def attention(torch):
    attention = pytest.importorskip("torch.nn.attention")
    if not hasattr(attention, "register_flash_attention_impl"):
        pytest.skip("this torch has no registry of flash attention")
    yield attention
    if attention.current_flash_attention_impl() is not None:
        attention.restore_flash_attention_impl()


def counting(function, calls):
    """`function`, whose name is noted in `calls` each time."""

    def counted(*arguments, **options):
        calls.append(function.__name__)
        return function(*arguments, **options)

    return counted


def results(torch, inputs, **options):
    out = torch.nn.functional.scaled_dot_product_attention(*inputs, **options)
    return out, *torch.autograd.grad(out.float().square().sum(), inputs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("heads_kv", [8, 2])
def test_causal_attention_is_computed_here(torch, attention, monkeypatch, dtype, heads_kv):
    from scfa_core import torch_flash

    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(2, 777, heads, 64, device="cuda", generator=generator)
        .to(getattr(torch, dtype))
        .transpose(1, 2)
        .requires_grad_()
        for heads in (8, heads_kv, heads_kv)
    ]
    options = {"is_causal": True, "enable_gqa": heads_kv != 8}
    wide = [x.detach().double().requires_grad_() for x in inputs]
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        true = results(torch, wide, **options)
    calls = []
    for name in ("attention", "attention_backward"):
        monkeypatch.setattr(torch_flash, name, counting(getattr(torch_flash, name), calls))
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        own = results(torch, inputs, **options)
        torch_flash.register()
        attention.activate_flash_attention_impl("scfa")
        ours = results(torch, inputs, **options)
        dense = results(torch, inputs, enable_gqa=heads_kv != 8)
        attention.restore_flash_attention_impl()
        assert calls == ["attention", "attention_backward"]
        own_dense = results(torch, inputs, enable_gqa=heads_kv != 8)
    for mine, theirs, right in zip(ours, own, true, strict=True):
        assert (mine - right).abs().max() <= 2 * (theirs - right).abs().max()
        assert mine.stride() == theirs.stride()
    assert torch.equal(dense[0], own_dense[0])
