"""Whole models of transformers as one graph: whatever their masks, logits and gradients as eager's.

`torch.compile(fullgraph=True)` raises where a graph would break.
"""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="transformers needs torch")
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install scfa-core[hf]"
)

from scfa_core import hf  # noqa: E402 - transformers may be absent
from scfa_core.hf_directions import _kept  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),  # of dynamo itself
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(
        **SIZES,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=6),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=64, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.0
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SIZES, attention_chunk_size=6, num_local_experts=2, intermediate_size_mlp=96
    ),
    "flint": lambda: transformers.FlintConfig(**SIZES, sliding_window=6),  # with sinks
}


@pytest.fixture(autouse=True)
def fresh():
    """The options of this file, and no graph of another test."""
    hf.register(window=7, buckets=4, near=3, seed=0)
    torch._dynamo.reset()


def made(family, **changes):
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.update(changes)
    if family == "gpt2":
        config.bos_token_id = config.eos_token_id = None
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokens(batch=2, seqlen=20):
    return torch.randint(2, 61, (batch, seqlen), generator=torch.Generator().manual_seed(1))


def packed(*lengths):
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": tokens(1, sum(lengths)), "position_ids": positions}


def padded():
    real = torch.ones_like(tokens())
    real[0, :6] = 0
    return {"input_ids": tokens(), "attention_mask": real}


INPUTS = {
    "no mask": lambda: {"input_ids": tokens()},
    "padded": padded,
    "packed": lambda: packed(7, 1, 12),
}


def compare(model, backend, **inputs):
    """Logits and gradients of every parameter: eager attention, and ours as one graph."""
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    results = []
    for name in ("eager", "scfa"):
        model.set_attn_implementation(name)
        call = model
        if name == "scfa":
            call = torch.compile(model, backend=backend, fullgraph=True)
        logits = call(**inputs, use_cache=False).logits[real]
        results.append((logits, torch.autograd.grad(logits.square().sum(), model.parameters())))
    (right, right_grads), (mine, grads) = results
    torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)
    torch.testing.assert_close(grads, right_grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("family", ["qwen3", "llama4"])
def test_windows_and_chunks_are_one_graph(family, inputs):
    compare(made(family), "eager", **INPUTS[inputs]())


def test_a_mask_that_comes_with_a_batch_of_another_size():
    """Then the batch is traced as a number of its own, and the mask's size is a plain one."""
    model = made("qwen3")  # a full layer and one of a window
    calls = [{"input_ids": tokens(3)}, padded(), {"input_ids": tokens(4, 26)}]
    model.set_attn_implementation("eager")
    right = [model(**inputs, use_cache=False).logits for inputs in calls]
    model.set_attn_implementation("scfa")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for inputs, logits in zip(calls, right, strict=True):
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        mine = compiled(**inputs, use_cache=False).logits
        torch.testing.assert_close(mine[real], logits[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "flint"])
def test_packed_documents_are_one_graph(family):
    compare(made(family), "eager", **packed(7, 1, 12))


def test_packed_windows_are_one_graph_backward_too():
    compare(made("qwen3"), "aot_eager", **packed(7, 1, 12))


@pytest.mark.parametrize("name", ["scfa", "scfa_window", "scfa_hash"])
def test_one_graph_serves_packings_of_any_length(name):
    model = made("mistral")
    model.set_attn_implementation(name)
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for lengths in ((7, 1, 12), (9, 24), (2, 2, 2, 21)):
        inputs = packed(*lengths) | {"use_cache": False}
        mine = compiled(**inputs).logits
        torch.testing.assert_close(mine, model(**inputs).logits, rtol=0, atol=1e-5)
    assert len(graphs) == 1


def test_a_static_cache_filled_in_the_graph():
    """Prefill in two pieces and steps; the graph makes the masks, from a position on the device."""
    model = made("qwen3")
    model.set_attn_implementation("scfa")
    logits = []
    for call in (model, torch.compile(model, backend="eager", fullgraph=True)):
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        with torch.no_grad():
            pieces = [
                call(tokens()[:, a:b], past_key_values=cache).logits
                for a, b in ((0, 9), (9, 17), (17, 18), (18, 19), (19, 20))
            ]
        logits.append(torch.cat(pieces, dim=1))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1], model(tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_of_one_mask_share_a_plan_in_the_graph(checkpointed):
    """And layers that are computed twice do not plan anew."""
    from torch._dynamo.backends.common import aot_autograd

    counts = []

    def count(module, inputs):
        called = [node.target for node in module.graph.nodes if node.op == "call_function"]
        counts.append(called.count(torch.ops.scfa.make_plan.default))
        return module.forward

    model = made("llama")
    model.set_attn_implementation("scfa")
    if checkpointed:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    inputs = packed(7, 1, 12) | {"use_cache": False}
    right = model(**inputs).logits
    mine = torch.compile(model, backend=backend, fullgraph=True)(**inputs).logits
    weight = model.lm_head.weight
    grads = [torch.autograd.grad(x.square().sum(), weight)[0] for x in (mine, right)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    assert counts == [1, 0]


def test_layers_of_other_heads_than_the_config_says_plan_for_themselves():
    model = made("llama")
    model.set_attn_implementation("scfa")
    right = model(**packed(7, 1, 12), use_cache=False).logits
    model.config.num_key_value_heads = 1  # layers keep what they were built with
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mine = compiled(**packed(7, 1, 12), use_cache=False).logits
    torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_hash_is_compiled_from_the_first_call(dynamic):
    """Its directions, drawn nowhere yet, are an operator of the graph; another seed is traced."""
    _kept.cache_clear()
    model = made("qwen3", num_hidden_layers=1, layer_types=["full_attention"])
    model.set_attn_implementation("scfa_hash")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)
    calls = [{"input_ids": tokens()}, {"input_ids": tokens(3, 33)}, padded()]
    results = []
    for seed, some in ((0, calls), (1, calls[-1:])):  # each call of another kind is a trace
        model.config.scfa_seed = seed
        for inputs in some:
            both = [call(**inputs, use_cache=False).logits for call in (compiled, model)]
            torch.testing.assert_close(*both, rtol=0, atol=1e-5)
            grads = (torch.autograd.grad(x.square().sum(), model.parameters()) for x in both)
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
        results.append(both[0])
    assert not torch.equal(*results)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_hash_generates_from_a_compiled_first_call(cache):
    """Prefill and steps as graphs; then the model itself, uncompiled."""
    _kept.cache_clear()
    model = made("qwen3")
    model.set_attn_implementation("scfa_hash")
    whole = model.forward
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | padded()
    config = transformers.CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True  # or a CPU would not compile
    model.forward = torch.compile(whole, backend="eager", fullgraph=True)
    mine = model.generate(**options, cache_implementation=cache, compile_config=config)
    model.forward = whole
    assert torch.equal(mine, model.generate(**options, cache_implementation="dynamic"))


@pytest.mark.parametrize("name", ["scfa", "scfa_hash"])
def test_an_exported_model_takes_padding_and_windows(name):
    _kept.cache_clear()
    model = made("qwen3")
    model.set_attn_implementation(name)
    inputs = padded() | {"use_cache": False}
    exported = torch.export.export(model, (), inputs, strict=False).module()
    mine, right = exported(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)


LOAD = """
import sys, torch, scfa_core.hf
program = torch.export.load(sys.argv[1]).module()
torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_a_saved_program_needs_no_more_than_this_import(tmp_path):
    """In a process of its own, which has made no model; a hash has operators of every kind."""

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = made("qwen3")
            self.model.set_attn_implementation("scfa_hash")

        def forward(self, text):
            return self.model(text, use_cache=False).logits

    logits = Logits()
    program, text, out = (tmp_path / file for file in ("program.pt2", "text", "out"))
    torch.export.save(torch.export.export(logits, (tokens(),), strict=False), program)
    torch.save(tokens(), text)
    subprocess.run([sys.executable, "-c", LOAD, program, text, out], check=True, timeout=120)
    torch.testing.assert_close(torch.load(out), logits(tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["scfa", "scfa_window", "scfa_hash"])
@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_an_exported_model_leaves_its_length_open(family, name):
    _kept.cache_clear()
    if family == "bert":
        sizes = {"vocab_size": 61, "hidden_size": 64, "num_attention_heads": 4}
        config = transformers.BertConfig(
            **sizes, num_hidden_layers=1, intermediate_size=96, attention_probs_dropout_prob=0.0
        )
        model = transformers.BertModel(config).eval()
    else:
        model = made(family)
    model.set_attn_implementation(name)
    model.config.use_cache = False
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, 61, (2, 40), generator=generator)
    open_length = {"input_ids": {1: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(
        model, (ids[:, :20].clone(),), dynamic_shapes=open_length
    ).module()
    for length in (20, 40, 7):
        mine, right = (call(ids[:, :length].clone()) for call in (exported, model))
        torch.testing.assert_close(mine[0], right[0], rtol=0, atol=1e-5)


def test_a_growing_cache_is_no_new_graph_at_every_step():
    model = made("qwen3")
    model.set_attn_implementation("scfa")
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    ids = torch.randint(2, 61, (1, 20), generator=torch.Generator().manual_seed(2))
    past = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        compiled(ids[:, :9], past_key_values=past)
        for t in range(9, 20):
            compiled(ids[:, t : t + 1], past_key_values=past)
    assert counter.frame_count <= 4
