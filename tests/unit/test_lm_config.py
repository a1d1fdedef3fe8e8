"""What a configuration of the language model says: names of attention, the schedule."""

import dataclasses
from pathlib import Path
from unittest import mock

import pytest

torch = pytest.importorskip("torch", reason="the language model needs torch (extra 'torch')")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hash4,window16", "after a comma comes what the last heads see"),
        ("hash4,window16x12", "of 12 heads, got 'hash4,window16x12'"),
        ("hash4,blocks0x1", "after a comma"),
        ("hash4,window0x1", "after a comma"),
        ("hash4o", "no such attention: 'hash4o'"),
        ("blocks4e", "no such attention"),
        ("window", "no such attention"),
        ("dense4o", "no such attention"),
        ("dense,blocks16x1", "blocks are groups beside those of a hash"),
        ("hash4+window8,blocks16x1", "blocks are groups"),
    ],
)
def test_heads_of_two_kinds_held_wrong(name, told, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.lm.attend import attend_for
    from bench.lm.config import Config

    with pytest.raises(SystemExit, match=told):
        attend_for(Config(attention=name))


@pytest.mark.parametrize("name", ["hash4ck", "hash4e+window8k", "nonek", "densek,window8x1"])
def test_variants_that_cannot_have_keys_of_their_own_say_so(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.lm.config import PRESETS
    from bench.lm.model import LanguageModel

    with pytest.raises(SystemExit, match=r"keys of their own are for densek, .*window128x4; got"):
        LanguageModel(dataclasses.replace(PRESETS["tiny"], attention=name))


@pytest.mark.parametrize(
    "name", ["densek", "window8k", "blocks8k", "dense", "window8", "blocks8", "denseo", "window8o"]
)
def test_keys_are_projected_or_the_normalised_queries(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.lm.config import PRESETS
    from bench.lm.model import Mix, Rotary

    config = dataclasses.replace(
        PRESETS["tiny"], attention=name, positions="rotary", softmax_scale=1.0
    )
    torch.manual_seed(0)
    mix, x, width = Mix(config), torch.randn(2, 40, config.width), config.width
    rotate = Rotary(50, config.head_dim)
    got, _ = mix(x, None, None, None)
    by_heads = lambda y: y.unflatten(-1, (config.heads, -1)).transpose(1, 2)  # noqa: E731
    q, v, *own = (by_heads(y) for y in (x @ mix.query_value.weight.T).split(width, -1))
    assert bool(own) is name.endswith("k")
    k = own[0] if own else q / q.norm(dim=-1, keepdim=True)
    scores = rotate(q) @ rotate(k).mT * (config.head_dim**-0.5 if own else 1.0)
    ago = torch.arange(40)[:, None] - torch.arange(40)
    hidden = name == "blocks8" or name.endswith("o")  # where its own key is the nearest of all
    seen = (ago >= int(hidden)) & (ago < (8 if "window" in name else 40))
    if "blocks" in name:  # of the second of two heads, half a block further
        block = (torch.arange(40) + torch.tensor([0, 4])[:, None]) // 8
        seen = (block[:, :, None] == block[:, None, :]) & seen
    out = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0) @ v
    torch.testing.assert_close(got, mix.output(out.transpose(1, 2).flatten(2)))


def test_a_layer_of_another_kind_is_turned_too(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.lm.config import PRESETS
    from bench.lm.model import LanguageModel, Rotary

    config = dataclasses.replace(PRESETS["tiny"], attention="reformer4", positions="rotary")
    model, text = LanguageModel(config), torch.randint(0, 256, (1, 60))
    turns = [part for part in model.modules() if isinstance(part, Rotary)]
    assert len(turns) == config.layers
    assert torch.isfinite(model(text, text))
    assert not [name for name in model.state_dict() if "table" in name]


@pytest.mark.parametrize("name", ["hash4e", "hash4ek"])
def test_rows_are_hashed_before_or_after_they_are_turned(name, monkeypatch):
    """What the model says is hashed, and what its attention is given."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.lm.config import PRESETS
    from bench.lm.model import LanguageModel

    told, text = {}, torch.randint(0, 256, (1, 60))
    for positions in ("rotary", "rotary-first"):
        config = dataclasses.replace(PRESETS["tiny"], attention=name, positions=positions, layers=1)
        torch.manual_seed(0)
        model = LanguageModel(config)
        mix = model.blocks[0].mix
        # What attention is given in place of buckets: the rows themselves.
        monkeypatch.setattr(mix, "buckets", lambda rows, *_: (rows, None))
        monkeypatch.setattr(mix, "attend", mock.Mock(side_effect=lambda q, k, v, *_: v))
        model.states(text)
        given = mix.attend.call_args.args[3]
        (told[positions],) = model.queries(text, model.directions())
        torch.testing.assert_close(given, told[positions])
        rotate = mix.rotary
    torch.testing.assert_close(rotate(told["rotary"]), told["rotary-first"])


def test_rates_of_learning(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.lm.config import Config
    from bench.lm.train import learning_rate

    cosine = Config(learning_rate=1.0, warmup=10, steps=110)
    rates = [learning_rate(cosine, step) for step in (0, 9, 10, 60, 110, 500)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1, 0.1])
    flat = Config(learning_rate=1.0, warmup=10, steps=110, schedule="trapezoid", seconds=50.0)
    assert learning_rate(flat, 89) == 1.0
    assert learning_rate(flat, 100) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(flat, 20, seconds=45.0) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(flat, 20, seconds=99.0) == pytest.approx(0.1)
    with pytest.raises(SystemExit, match="schedule must be"):
        learning_rate(Config(schedule="flat"), 200)
