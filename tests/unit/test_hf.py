"""Tiny random models of transformers: logits, gradients and text as with eager attention."""

from types import SimpleNamespace

import pytest

import scfa_core as scfa

torch = pytest.importorskip("torch", reason="transformers needs torch")
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install scfa-core[hf]"
)

from transformers import masking_utils as theirs  # noqa: E402 - may be absent

from scfa_core import hf  # noqa: E402
from scfa_core.hf_masks import StructuredMask, read_mask  # noqa: E402

SIZES = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ROPE = {**SIZES, "intermediate_size": 96, "max_position_embeddings": 128}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**ROPE, num_key_value_heads=2),
    "qwen": lambda: transformers.Qwen2Config(
        **ROPE,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "mistral": lambda: transformers.MistralConfig(**ROPE, num_key_value_heads=1, sliding_window=6),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=64, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.0
    ),
}
SCALED = {
    "by layer": {"scale_attn_by_inverse_layer_idx": True},
    "none": {"scale_attn_weights": False},
    "upcast": {"reorder_and_upcast_attn": True},
}
OTHERS = {  # chunks, windows of several kinds of layers, cross attention
    "llama4": lambda: transformers.Llama4TextConfig(
        **ROPE,
        num_key_value_heads=2,
        head_dim=16,
        attention_chunk_size=6,
        num_local_experts=2,
        intermediate_size_mlp=96,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **ROPE, num_key_value_heads=2, head_dim=16, sliding_window=6, sliding_window_pattern=2
    ),
    "bart": lambda: transformers.BartConfig(
        vocab_size=61,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=64,
        attention_dropout=0.0,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    ),
}
NAMES = hf.register(window=7, buckets=4, near=3, seed=0)


@pytest.fixture(autouse=True)
def registered():
    """The options of this file, whatever was registered since (by a guide, say)."""
    hf.register(window=7, buckets=4, near=3, seed=0)


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(FAMILIES[request.param]()).eval()


def tokens(batch=2, seqlen=20):
    return torch.randint(2, 61, (batch, seqlen), generator=torch.Generator().manual_seed(1))


def compare(model, where=slice(None), **inputs):
    """Logits at `where` and gradients of every parameter, eager against ours."""
    results = []
    for name in ("eager", "scfa"):
        model.set_attn_implementation(name)
        logits = model(**inputs).logits[where]
        results.append((logits, torch.autograd.grad(logits.square().sum(), model.parameters())))
    (right, right_grads), (mine, grads) = results
    torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)
    torch.testing.assert_close(grads, right_grads, rtol=1e-3, atol=1e-4)


def test_plain(model):
    compare(model, input_ids=tokens())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model, side):
    real = torch.arange(20).expand(2, -1) < torch.tensor([[20], [13]])
    real = real.flip(1) if side == "left" else real
    compare(model, where=real, input_ids=tokens(), attention_mask=real.long())


def test_packed_documents(model):
    positions = torch.cat([torch.arange(n) for n in (7, 1, 12)])[None]
    inputs = {"input_ids": tokens(1), "position_ids": positions, "use_cache": False}
    compare(model, **inputs)
    model.set_attn_implementation("scfa")
    packed = model(**inputs).logits[0, 8:]
    alone = model(input_ids=tokens(1)[:, 8:]).logits[0]
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("cache", "padded"), [("dynamic", False), ("dynamic", True), ("static", True)]
)
def test_generated_text_is_the_same(model, cache, padded):
    mask = torch.ones(2, 20, dtype=torch.long)
    if padded:
        mask[0, :6] = 0
    texts = []
    for name in ("eager", "scfa"):
        model.set_attn_implementation(name)
        texts.append(
            model.generate(
                tokens(),
                attention_mask=mask,
                max_new_tokens=8,
                do_sample=False,
                cache_implementation=cache,
                pad_token_id=0,
            )
        )
    assert torch.equal(*texts)


def same_text(model, options=lambda name: {}, **common):
    """Greedy or beam text by eager and by ours, the first row padded on the left."""
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    common |= {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    texts = []
    for name in ("eager", "scfa"):
        model.set_attn_implementation(name)
        texts.append(model.generate(tokens(), **common, **options(name)))
    return torch.equal(*texts)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", OTHERS)
def test_generated_text_of_other_families(name, beams, cache):
    torch.manual_seed(0)
    kind = transformers.AutoModelForCausalLM
    if name == "bart":
        kind, cache = transformers.AutoModelForSeq2SeqLM, "dynamic"
    model = kind.from_config(OTHERS[name]()).eval()
    assert same_text(model, num_beams=beams, cache_implementation=cache)


@pytest.mark.slow
def test_compiled_generation_with_a_static_cache_is_one_graph():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["qwen"]()).eval()

    def compiled(name):
        config = transformers.CompileConfig(backend="eager", mode=None, fullgraph=True)
        config._compile_all_devices = True  # or a CPU would not compile
        return {"compile_config": config} if name == "scfa" else {}

    assert same_text(model, compiled, cache_implementation="static")


@pytest.mark.parametrize("name", SCALED)
def test_scales_of_gpt2(name):
    torch.manual_seed(0)
    config = FAMILIES["gpt2"]()
    config.update(SCALED[name])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert all(hasattr(config, option) for option in SCALED[name])
    compare(model, input_ids=tokens())


def test_decoding_in_pieces_equals_one_call(model):
    for name in NAMES:
        model.set_attn_implementation(name)
        whole = model(tokens()).logits
        first = model(tokens()[:, :12], use_cache=True)
        cache = first.cache if hasattr(first, "cache") else first.past_key_values
        keyword = "cache" if hasattr(first, "cache") else "past_key_values"
        second = model(tokens()[:, 12:], **{keyword: cache})
        pieces = torch.cat([first.logits, second.logits], dim=1)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_training_with_checkpointing(use_reentrant):
    """With padding and windows; the first real token is predicted from a row of padding."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["qwen"]()).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    real = torch.arange(20).expand(2, -1) >= torch.tensor([[6], [0]])
    labels = tokens().masked_fill(~real, -100)
    labels[0, 6] = -100
    results = []
    for name in ("eager", "scfa"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(tokens(), attention_mask=real.long(), labels=labels).loss.backward()
        results.append([x.grad.clone() for x in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of dynamo itself
@pytest.mark.parametrize(("name", "whole"), [("scfa", True), ("scfa_hash", False)])
def test_compiled(name, whole):
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 1
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation(name)
    inputs = {"input_ids": tokens(), "use_cache": False}
    right = model(**inputs).logits
    if whole:
        with torch.no_grad():
            mine = torch.compile(model, backend="aot_eager")(**inputs).logits
    else:
        for layer in model.model.layers:  # the part worth compiling is one graph
            layer.compile(backend="aot_eager", fullgraph=True)
        mine = model(**inputs).logits
        mine.sum().backward()
    torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)


def test_layers_share_one_plan(monkeypatch):
    from scfa_core import hf_masks

    made = []
    plan = hf_masks.make_plan
    monkeypatch.setattr(hf_masks, "make_plan", lambda *a: made.append(1) or plan(*a))
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    model.set_attn_implementation("scfa")
    model(tokens())
    assert len(made) == 1


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
    directions = hf._draw(2, 16, 4, 0, 1, q.device)
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


def test_what_is_not_supported_raises():
    q, k, v = qkv()
    module = SimpleNamespace(is_causal=True)
    for kwargs, words in (
        ({"dropout": 0.1}, "attn_pdrop"),
        ({"softcap": 30.0}, "soft-capped"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
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
        ({"window": -3}, "window must be an int >= 0, got -3"),
        ({"window": "7"}, "window must be an int"),
        ({"buckets": 5}, "buckets must be an even int"),
        ({"near": -1}, "near must be at least 0"),
        ({"near": 2.5}, "near must be an int"),
        ({"seed": None}, "seed must be an int"),
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


def test_custom_four_axis_mask_raises_in_a_model(model):
    model.set_attn_implementation("scfa")
    with pytest.raises(scfa.PatternError, match="custom masks"):
        model(tokens(), attention_mask=torch.ones(2, 1, 20, 20, dtype=torch.bool))


def test_attention_dropout_raises_in_training():
    config = FAMILIES["gpt2"]()
    config.attn_pdrop = 0.1
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    model.set_attn_implementation("scfa")
    with pytest.raises(scfa.PatternError, match="attn_pdrop"):
        model(tokens())
    model.eval()(tokens())


def and_masks(*pieces):
    return theirs.and_masks(*pieces)


def mask_functions():
    """Name, function, and whether it needs as many keys as queries."""
    ids = torch.tensor([[0] * 6 + [1] * 10, [0] * 2 + [1] * 3 + [2] * 11])
    rows = torch.arange(16)
    positions = torch.stack([(rows - (row == x).nonzero()[0]) for row in ids for x in row])
    positions = torch.stack([positions[n * 16 + rows, rows] for n in range(2)])
    causal, left = theirs.causal_mask_function, torch.tensor([3, 0])
    packed = theirs.packed_sequence_mask_function(ids)
    window = theirs.sliding_window_causal_mask_function(4)
    return {
        "causal": (causal, False),
        "window": (window, False),
        "window of 1": (theirs.sliding_window_causal_mask_function(1), False),
        "bidirectional": (theirs.bidirectional_mask_function, False),
        "window both ways": (theirs.sliding_window_bidirectional_mask_function(3), False),
        "chunked": (theirs.chunked_causal_mask_function(5, left), False),
        "lower bound alone": (theirs.sliding_window_overlay(4), False),
        "packed": (
            and_masks(theirs.remap_positions_for_packed_sequence(causal, positions), packed),
            True,
        ),
        "packed window": (
            and_masks(theirs.remap_positions_for_packed_sequence(window, positions), packed),
            True,
        ),
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "q_offset", "kv_offset"),
    [(16, 16, 0, 0), (5, 16, 11, 0), (1, 16, 15, 0), (5, 24, 11, 0), (4, 9, 12, 7), (6, 6, 9, 9)],
)
@pytest.mark.parametrize("name", mask_functions())
def test_masks_read_as_transformers_draws_them(name, queries, keys, q_offset, kv_offset, padded):
    function, square = mask_functions()[name]
    if square and (queries, keys) != (16, 16):
        queries, keys, q_offset, kv_offset = 16, 16, 0, 0
    real = torch.arange(16).expand(2, -1) >= torch.tensor([[3], [0]]) if padded else None
    for offset in (q_offset, torch.tensor(q_offset)):
        sizes = {
            "batch_size": 2,
            "q_length": queries,
            "kv_length": keys,
            "q_offset": offset,
            "kv_offset": kv_offset,
            "mask_function": function,
            "attention_mask": real,
        }
        right = theirs.sdpa_mask(**sizes, allow_is_causal_skip=False)
        mask = read_mask(**sizes)
        mine = mask.pattern(torch.device("cpu")).mask(queries, keys, batch=2)
        assert torch.equal(torch.from_numpy(mine), right.expand(2, 1, queries, keys))
        assert mask.shape == (2, 1, queries, keys)
        assert isinstance(mask, StructuredMask)


def test_unknown_mask_functions_raise():
    odd = theirs.or_masks(theirs.causal_mask_function, lambda b, h, q, k: k < 3)
    with pytest.raises(scfa.PatternError, match="or_mask"):
        read_mask(1, 4, 4, mask_function=odd)
    chunked = theirs.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long))
    packed = theirs.remap_positions_for_packed_sequence(chunked, torch.arange(4)[None])
    with pytest.raises(scfa.PatternError, match="in packed sequences"):
        read_mask(1, 4, 4, mask_function=packed)
