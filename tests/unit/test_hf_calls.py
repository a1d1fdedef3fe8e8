"""The function that transformers calls in each layer: what it sees, and what it refuses."""

from types import SimpleNamespace

import pytest

import scfa_core as scfa

torch = pytest.importorskip("torch", reason="transformers needs torch")
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install scfa-core[hf]"
)

from transformers import masking_utils as theirs  # noqa: E402 - may be absent

from scfa_core import hf  # noqa: E402
from scfa_core.hashing import random_directions  # noqa: E402
from scfa_core.hf_masks import read_mask  # noqa: E402


@pytest.fixture(autouse=True)
def registered():
    """The options of this file, whatever was registered since."""
    hf.register(window=7, buckets=4, near=3, seed=0)


def qkv(seed=0, heads_kv=2, queries=20, keys=20):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, queries, 16), (2, heads_kv, keys, 16), (2, heads_kv, keys, 16))
    return [torch.randn(s, generator=generator) for s in shapes]


def dense(q, k, v, mask, scale):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, dim=-1).nan_to_num() @ v).transpose(1, 2)


def call(name, module, q, k, v, mask, **kwargs):
    interface = transformers.AttentionInterface()[name]
    return interface(module, q, k, v, mask, scaling=0.2, **kwargs)[0]


@pytest.mark.parametrize("shift", [0, 6])
def test_window_and_hash_see_what_they_say(shift):
    q, k, v = qkv(queries=20 - shift)
    i = torch.arange(20 - shift)[:, None] + shift
    j = torch.arange(20)[None]
    mask = read_mask(2, 20 - shift, 20, q_offset=shift)
    module = SimpleNamespace(config=SimpleNamespace(), layer_idx=1)
    out = call("scfa_window", module, q, k, v, mask)
    right = dense(q, k, v, (j <= i) & (j > i - 7), 0.2)
    torch.testing.assert_close(out, right, rtol=0, atol=1e-5)
    directions = torch.from_numpy(random_directions(2, 16, 4, seed=1))
    a, b = (hf.angular_hash(x, directions)[0] for x in (q, k))
    same = a[..., :, None] == b.repeat_interleave(2, dim=1)[..., None, :]
    for near in (3, 0):
        module.config.scfa_near = near  # the config overrules
        out = call("scfa_hash", module, q, k, v, mask)
        right = dense(q, k, v, (same | (j > i - near)) & (j <= i), 0.2)
        torch.testing.assert_close(out, right, rtol=0, atol=1e-5)
    other = SimpleNamespace(config=module.config, layer_idx=2)
    assert not torch.equal(call("scfa_hash", other, q, k, v, mask), out)


def test_no_mask_means_what_the_module_says():
    q, k, v = qkv(queries=5)
    i, j = torch.arange(5)[:, None] + 15, torch.arange(20)[None]
    for module, kwargs, mask in (
        (SimpleNamespace(is_causal=True), {}, j <= i),
        (SimpleNamespace(is_causal=False), {}, j >= 0),
        (SimpleNamespace(is_causal=True), {"is_causal": False}, j >= 0 * i),
    ):
        out = call("scfa", module, q, k, v, None, **kwargs)
        torch.testing.assert_close(out, dense(q, k, v, mask.expand(5, 20), 0.2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["scfa", "scfa_window", "scfa_hash"])
def test_a_window_without_a_mask_is_honoured(name):
    q, k, v = qkv(queries=5)
    module = SimpleNamespace(is_causal=True, config=SimpleNamespace(scfa_window=20, scfa_near=20))
    i, j = torch.arange(5)[:, None] + 15, torch.arange(20)[None]
    out = call(name, module, q, k, v, None, sliding_window=3)
    right = dense(q, k, v, (j <= i) & (j > i - 3), 0.2)
    torch.testing.assert_close(out, right, rtol=0, atol=1e-5)
    module.is_causal = False
    with pytest.raises(scfa.PatternError, match="both ways must come as a mask"):
        call(name, module, q, k, v, None, sliding_window=3)


@pytest.mark.parametrize(("queries", "keys"), [(8, 20), (20, 8), (19, 19)])
def test_a_mask_of_other_sizes_raises(queries, keys):
    q, k, v = qkv(queries=queries, keys=keys)
    with pytest.raises(scfa.PatternError, match=f"{queries} queries and {keys} keys"):
        call("scfa", SimpleNamespace(is_causal=True), q, k, v, read_mask(2, 20, 20))


@pytest.mark.parametrize("name", ["scfa", "scfa_window", "scfa_hash"])
def test_sinks_take_weight_from_whatever_is_seen(name):
    q, k, v = qkv()
    module = SimpleNamespace(is_causal=True, layer_idx=0)
    seen = call(name, module, q, k, v, None).transpose(1, 2)
    scores = call(name, module, q, k, torch.eye(20).expand(2, 2, 20, 20), None)
    weights = scores.transpose(1, 2)
    assert weights.sum(-1).allclose(torch.ones(2, 4, 20))
    sinks = torch.tensor([0.0, -1.0, 2.0, -torch.inf])
    dots = (q @ k.repeat_interleave(2, 1).mT) * 0.2
    total = torch.where(weights > 0, dots, -torch.inf).logsumexp(-1)
    share = (total - sinks[:, None]).sigmoid()
    mine = call(name, module, q, k, v, None, s_aux=sinks).transpose(1, 2)
    torch.testing.assert_close(mine, seen * share[..., None], rtol=0, atol=1e-6)


def test_what_is_not_supported_raises():
    q, k, v = qkv()
    module = SimpleNamespace(is_causal=True)
    for kwargs, words in (
        ({"dropout": 0.1}, "attn_pdrop"),
        ({"softcap": 30.0}, "soft-capped"),
        ({"sinks": torch.zeros(2, 4, 20, 1)}, "sinks"),
        ({"indices": torch.zeros(2, 20, 3)}, "indexer"),
        ({"block_indices": torch.zeros(2, 1, 20, 3)}, "indexer"),
        ({"output_attentions": True}, "weights as an output"),
    ):
        with pytest.raises(scfa.PatternError, match=words):
            call("scfa", module, q, k, v, None, **kwargs)
    with pytest.raises(scfa.PatternError, match="takes no Tensor"):
        call("scfa", module, q, k, v, torch.zeros(2, 1, 20, 20))
    hf.register(window=None)
    try:
        with pytest.raises(scfa.PatternError, match="needs a window"):
            call("scfa_window", module, q, k, v, None)
    finally:
        hf.register(window=7, buckets=4, near=3, seed=0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"window": -3}, "window must be an int >= 0 .*got -3"),
        ({"window": "7"}, "window must be an int"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"buckets": 5}, "buckets must be an even int"),
        ({"near": -1}, "near must be at least 0"),
        ({"near": 2.5}, "near must be an int"),
        ({"seed": None}, "seed must be an int"),
        ({"seed": 2**48}, "seed must be below"),
    ],
)
def test_options_that_are_none_raise(wrong, words):
    with pytest.raises(scfa.PatternError, match=words):
        hf.register(**wrong)
    q, k, v = qkv()
    (name, value), *_ = wrong.items()
    module = SimpleNamespace(is_causal=True, config=SimpleNamespace(**{f"scfa_{name}": value}))
    with pytest.raises(scfa.PatternError, match=words):
        call("scfa_hash", module, q, k, v, None)


def test_packed_lengths_need_a_packed_mask():
    ends = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    q, k, v = qkv()
    with pytest.raises(scfa.PatternError, match="cu_seq_lens_k says"):
        call("scfa", SimpleNamespace(is_causal=True), q, k, v, None, cu_seq_lens_k=ends)
    chunks = theirs.chunked_causal_mask_function(5, torch.zeros(2, dtype=torch.long))
    mask = read_mask(2, 20, 20, mask_function=chunks)
    with pytest.raises(scfa.PatternError, match="cu_seq_lens_q says"):
        call("scfa", SimpleNamespace(is_causal=True), q, k, v, mask, cu_seq_lens_q=ends)


@pytest.mark.parametrize("mode", ["fake", "inference", "written over"])
def test_kept_directions_are_nobodys_to_change(mode):
    """A first call under a mode of torch leaves ordinary directions to the next; so does a graph
    that writes over what it was given."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from scfa_core.hf_directions import DIRECTIONS, _kept

    _kept.cache_clear()
    use = (2, 16, 4, 11, torch.device("cpu"))
    with {"fake": FakeTensorMode, "inference": torch.inference_mode}.get(mode, torch.no_grad)():
        first = DIRECTIONS(*use)
        assert first.shape == (1, 2, 16, 2)
        first.zero_()
    second = DIRECTIONS(*use)
    assert torch.equal(second, torch.from_numpy(random_directions(2, 16, 4, seed=11)))
    assert not second.is_inference()


def same_buckets(q, k):
    directions = torch.from_numpy(random_directions(2, 16, 4, seed=1))
    a, b = (hf.angular_hash(x, directions)[0] for x in (q, k))
    return a[..., :, None] == b.repeat_interleave(2, dim=1)[..., None, :]


def test_an_encoder_sees_what_is_near_on_either_side():
    q, k, v = qkv()
    far = (torch.arange(20)[:, None] - torch.arange(20)).abs()
    module = SimpleNamespace(config=SimpleNamespace(), layer_idx=1, is_causal=False)
    out = call("scfa_window", module, q, k, v, None)
    torch.testing.assert_close(out, dense(q, k, v, far < 7, 0.2), rtol=0, atol=1e-5)
    out = call("scfa_hash", module, q, k, v, None)
    right = dense(q, k, v, same_buckets(q, k) | (far < 3), 0.2)
    torch.testing.assert_close(out, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("queries", [20, 8, 1])
def test_no_key_of_another_sequence_is_near(queries):
    """In cross attention neither the place of a query nor the number of them matters."""
    q, k, v = qkv(queries=queries)
    module = SimpleNamespace(
        config=SimpleNamespace(), layer_idx=1, is_causal=False, is_decoder=True
    )
    out = call("scfa_window", module, q, k, v, None)
    every = torch.ones(queries, 20, dtype=torch.bool)
    torch.testing.assert_close(out, dense(q, k, v, every, 0.2), rtol=0, atol=1e-5)
    out = call("scfa_hash", module, q, k, v, None)
    right = dense(q, k, v, same_buckets(q, k), 0.2)
    torch.testing.assert_close(out, right, rtol=0, atol=1e-5)
