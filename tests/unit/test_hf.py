"""Tiny random models of transformers: logits, gradients and text as with eager attention."""

import pytest

import scfa_core as scfa

torch = pytest.importorskip("torch", reason="transformers needs torch")
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install scfa-core[hf]"
)

from scfa_core import hf  # noqa: E402 - transformers may be absent

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


def test_packed_lengths_need_packed_positions(model):
    """Lengths alone reach the layers only: the mask would let documents see each other."""
    model.set_attn_implementation("scfa")
    ends = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "use_cache": False}
    positions = torch.cat([torch.arange(n) for n in (7, 1, 12)])[None]
    both = model(tokens(1), position_ids=positions, **lengths).logits
    assert torch.equal(both, model(tokens(1), position_ids=positions, use_cache=False).logits)
    if not isinstance(model, transformers.GPT2LMHeadModel):  # its layers are not told lengths
        with pytest.raises(scfa.PatternError, match="position_ids that restart"):
            model(tokens(1), **lengths)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["scfa", "scfa_window", "scfa_hash"])
def test_steps_with_a_cache_see_what_one_call_sees(model, name, cache):
    """A batch padded on the left, eight tokens further than any window of these models."""
    model.set_attn_implementation(name)
    mask = torch.arange(28).expand(2, -1) >= torch.tensor([[6], [0]])
    told = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    steps = model.generate(
        tokens(),
        attention_mask=mask[:, :20].long(),
        cache_implementation=cache,
        return_dict_in_generate=True,
        **told,
    )
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    whole = model(steps.sequences, attention_mask=mask.long(), position_ids=positions).logits
    mine = torch.stack(steps.logits, dim=1)
    torch.testing.assert_close(mine, whole[:, 19:27], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_as_eager(model, dtype):
    right = model(tokens()).logits
    logits = {}
    for name in ("eager", "scfa"):
        model.to(dtype).set_attn_implementation(name)
        logits[name] = model(tokens()).logits
    assert logits["scfa"].dtype == dtype
    errors = {name: (x - right).norm() for name, x in logits.items()}
    assert errors["scfa"] <= 2 * errors["eager"]


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
def test_compiled_layers():
    """Each layer is one graph by itself."""
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 1
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("scfa_hash")
    inputs = {"input_ids": tokens(), "use_cache": False}
    right = model(**inputs).logits
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    mine = model(**inputs).logits
    mine.sum().backward()
    torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of dynamo itself
@pytest.mark.parametrize("name", ["scfa", "scfa_hash"])
def test_a_whole_model_with_a_padding_mask_is_one_graph(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]()).eval()
    model.set_attn_implementation(name)
    real = torch.ones_like(tokens())
    real[0, :7] = 0
    inputs = {"input_ids": tokens(), "attention_mask": real, "use_cache": False}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mine, right = compiled(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)
    grads = (torch.autograd.grad(x.square().sum(), model.lm_head.weight) for x in (mine, right))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_layers_share_one_plan(monkeypatch):
    from scfa_core import hf_masks

    made = []
    plan = hf_masks.make_plan
    monkeypatch.setattr(hf_masks, "make_plan", lambda *a: made.append(1) or plan(*a))
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    model.set_attn_implementation("scfa")
    model(tokens())
    assert len(made) == 1


def test_custom_masks_raise_in_a_model(model):
    model.set_attn_implementation("scfa")
    with pytest.raises(scfa.PatternError, match="custom masks"):
        model(tokens(), attention_mask=torch.ones(2, 1, 20, 20, dtype=torch.bool))
    if not isinstance(model, transformers.GPT2LMHeadModel):  # it makes two axes of any number
        with pytest.raises(
            scfa.PatternError, match=r"got an attention mask of shape \(2, 20, 20\)"
        ):
            model(tokens(), attention_mask=torch.ones(2, 20, 20, dtype=torch.bool))


def test_a_padding_mask_too_short_raises(model):
    model.set_attn_implementation("scfa")
    with pytest.raises(scfa.PatternError, match="as long as all tokens"):
        model(tokens(), attention_mask=torch.ones(2, 15), use_cache=False)


def test_weights_as_an_output_raise(model):
    """GPT-2 tells its layers nothing and would return an empty tuple."""
    model.set_attn_implementation("scfa")
    with pytest.raises(scfa.PatternError, match="weights as an output"):
        model(tokens(), output_attentions=True)
    hidden = model(tokens(), output_hidden_states=True).hidden_states
    assert len(hidden) == 3


@pytest.mark.parametrize("head_dim", [4, 12, 20])
def test_heads_of_a_size_that_kernels_do_not_take(head_dim):
    """Tiny checkpoints have them; zeros are appended, and the scale stays that of the model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**ROPE, num_key_value_heads=2, head_dim=head_dim)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    compare(model, input_ids=tokens())
    for name in ("scfa_window", "scfa_hash"):
        model.set_attn_implementation(name)
        assert model(tokens()).logits.isfinite().all()


def test_heads_too_large_raise():
    config = transformers.LlamaConfig(**ROPE, num_key_value_heads=1, head_dim=512)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("scfa")
    with pytest.raises(scfa.ShapeError, match="256 at most, got 512; use attn_impl"):
        model(tokens())


@pytest.mark.parametrize("padded", [[0], [0, 1]])
def test_sequences_of_padding_alone(model, padded):
    """Logits and gradients stay finite; the other sequence is what eager makes of it."""
    real = torch.ones_like(tokens())
    real[padded] = 0
    model.set_attn_implementation("scfa")
    logits = model(tokens(), attention_mask=real).logits
    grads = torch.autograd.grad(logits.sum(), model.parameters())
    assert all(x.isfinite().all() for x in (logits, *grads))
    if padded == [0]:
        compare(model, where=1, input_ids=tokens(), attention_mask=real)


def test_attention_dropout_raises_in_training():
    config = FAMILIES["gpt2"]()
    config.attn_pdrop = 0.1
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    model.set_attn_implementation("scfa")
    with pytest.raises(scfa.PatternError, match="attn_pdrop"):
        model(tokens())
    model.eval()(tokens())


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_steps_of_a_decoder_with_cross_attention_are_those_of_one_call(name):
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(OTHERS["bart"]()).eval()
    model.set_attn_implementation(name)
    source, target = tokens(seqlen=12), tokens(seqlen=12)  # of one length: no size tells them apart
    whole = model(input_ids=source, decoder_input_ids=target, use_cache=False).logits
    encoded, past, steps = model.get_encoder()(source), None, []
    for t in range(12):
        step = model(
            encoder_outputs=encoded,
            decoder_input_ids=target[:, t : t + 1],
            past_key_values=past,
            use_cache=True,
        )
        past = step.past_key_values
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-5)
