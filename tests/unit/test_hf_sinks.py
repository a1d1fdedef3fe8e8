"""Models of transformers whose heads have a sink, as with eager attention."""

import pytest

torch = pytest.importorskip("torch", reason="transformers needs torch")
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install scfa-core[hf]"
)

from test_hf import ROPE, compare, same_text, tokens  # noqa: E402 - transformers may be absent

SINKS = {  # in every layer, or where a window is
    "gpt-oss": lambda: transformers.GptOssConfig(
        **ROPE,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=6,
        num_local_experts=2,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "mimo": lambda: transformers.MiMoV2FlashConfig(**ROPE, num_key_value_heads=2, sliding_window=6),
    "flint": lambda: transformers.FlintConfig(**ROPE, num_key_value_heads=2, sliding_window=6),
}


@pytest.mark.parametrize("name", SINKS)
def test_sinks(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(SINKS[name]()).eval()
    of_heads = [x for key, x in model.named_parameters() if key.endswith("sinks")]
    assert of_heads
    for x in of_heads:
        torch.nn.init.normal_(x)  # as of a trained model; a new one has all alike
    compare(model, input_ids=tokens())
    real = torch.arange(20).expand(2, -1) >= torch.tensor([[0], [7]])
    compare(model, where=real, input_ids=tokens(), attention_mask=real.long())
    assert same_text(model, num_beams=2)
    model.set_attn_implementation("scfa")
    logits = model(tokens()).logits
    for x in of_heads:
        torch.nn.init.constant_(x, -torch.inf)
    assert (model(tokens()).logits - logits).abs().max() > 1e-3
