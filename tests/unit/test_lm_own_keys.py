"""The language model's hash of keys of their own is that of the public layer."""

import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the language model needs torch (extra 'torch')")
ROOT = Path(__file__).parents[2]


def test_window_heads_beside_such_a_hash_see_themselves_and_take_the_usual_scale(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.lm.config import PRESETS
    from bench.lm.model import Mix

    config = dataclasses.replace(
        PRESETS["tiny"], attention="hash4ek,window24x2", heads=3, softmax_scale=5.0
    )
    torch.manual_seed(0)
    mix, x = Mix(config), torch.randn(2, 90, config.width)
    mix.output = torch.nn.Identity()
    got, _ = mix(x, torch.randn(1, 1, config.head_dim, 2), torch.zeros(2, config.head_dim), None)
    q, k, v = (rows[:, 1:] for rows in mix.project(x))
    row = torch.arange(90)
    near = (row[:, None] >= row) & (row[:, None] < row + 24)
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near)
    last = got.unflatten(2, (3, -1)).transpose(1, 2)[:, 1:]
    torch.testing.assert_close(last, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapt", ["none", "past", "even"])
def test_keys_of_their_own_are_hashed_apart_as_in_the_public_layer(adapt, monkeypatch):
    """The model's buckets, and what each head then sees, are `HashSelfAttention`'s."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.lm.config import PRESETS
    from bench.lm.model import LanguageModel
    from scfa_core.nn import HashSelfAttention

    name = {"none": "hash4k", "past": "hash4rk", "even": "hash4ek"}[adapt] + ",blocks24x1"
    config = dataclasses.replace(PRESETS["tiny"], attention=name, seqlen=200, layers=1, heads=3)
    torch.manual_seed(0)
    model = LanguageModel(config)
    layer = HashSelfAttention(
        config.width, 3, 4, seed=1, adapt=adapt, near_heads=1, near_block=24, momentum=0.5
    )
    block = model.blocks[0]
    q_weight, v_weight, k_weight = block.mix.query_value.weight.detach().split(config.width)
    layer.load_state_dict(
        {"query.weight": q_weight, "key.weight": k_weight, "value.weight": v_weight,
         "output.weight": block.mix.output.weight.detach()}, strict=False,
    )  # fmt: skip
    for step in range(3):
        text = torch.randint(0, 256, (2, 200))
        model(text, text)
        layer(block.norm_attention(model.embed(text)))
        if adapt != "none":
            model.adapt(max(1 / (step + 1), 0.5))
            layer.hash.move_centers()
            torch.testing.assert_close(model.turn[0], layer.hash.turn, rtol=1e-3, atol=1e-3)

    drawn = torch.nn.functional.normalize(torch.randn(1, 2, config.head_dim, 2), dim=2)
    layer.eval().hash.directions.copy_(drawn)
    directions = drawn if adapt == "none" else model.turn[0] @ drawn
    center = None if adapt == "none" else model.center[0]
    x = block.norm_attention(model.embed(text))
    got, _ = block.mix(x, directions, center, None)
    torch.testing.assert_close(got, layer(x), rtol=0, atol=1e-4)
