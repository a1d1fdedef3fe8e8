"""Other libraries on a GPU: CuPy, numba device arrays, JAX, transformers, the example on arrays."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import scfa_core as scfa

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 2e-5  # float32 beside float64


def draw(seqlen=200):
    """q, k, v, dout and hashes on the host, and what is right."""
    rng = np.random.default_rng(0)
    q, dout = rng.standard_normal((2, 2, 4, seqlen, 32), np.float32)
    k, v = rng.standard_normal((2, 2, 2, seqlen, 32), np.float32)
    hashes = [rng.integers(0, 5, (2, heads, seqlen), np.int32) for heads in (4, 2)]
    pattern = scfa.HashSparse(*hashes)
    out, lse = scfa.attention(q, k, v, pattern, return_lse=True, backend="reference")
    grads = scfa.attention_backward(dout, q, k, v, out, lse, pattern, backend="reference")
    return (q, k, v, dout), hashes, (out, lse, *grads)


def both_ways(arrays, hashes, **options):
    """Forward and backward under one plan."""
    q, k, v, dout = arrays
    plan = scfa.make_plan(scfa.HashSparse(*hashes), q, k, **options)
    out, lse = scfa.attention(q, k, v, plan, return_lse=True, **options)
    return out, lse, *scfa.attention_backward(dout, q, k, v, out, lse, plan, **options)


def same(mine, right):
    for got, wanted in zip(mine, right, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)


@pytest.fixture
def cupy(torch):
    return pytest.importorskip("cupy", reason="needs the extra cuda13 or cuda12")


def test_cupy_arrays_come_back_as_cupy_arrays(cupy, backend):
    arrays, hashes, right = draw()
    arrays, hashes = ([cupy.asarray(x) for x in group] for group in (arrays, hashes))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        mine = both_ways(arrays, hashes, backend=backend)
    stream.synchronize()
    assert all(type(x) is cupy.ndarray for x in mine)
    same([x.get() for x in mine], right)


def test_numba_device_arrays_come_back_as_numba_device_arrays(cupy, backend):
    cuda = pytest.importorskip("numba.cuda", reason="needs numba-cuda")
    arrays, hashes, right = draw()
    arrays, hashes = ([cuda.to_device(x) for x in group] for group in (arrays, hashes))
    mine = both_ways(arrays, hashes, backend=backend)
    assert all(cuda.is_cuda_array(x) and type(x) is type(arrays[0]) for x in mine)
    same([x.copy_to_host() for x in mine], right)


def test_jax_arrays_come_through_dlpack(cupy, backend, monkeypatch):
    # or it takes three quarters of the card, which other workers need
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    try:
        (device, *_) = jax.devices("gpu")
    except RuntimeError:
        pytest.skip("this JAX sees no GPU")
    arrays, hashes, right = draw()
    arrays, hashes = ([jax.device_put(x, device) for x in group] for group in (arrays, hashes))
    mine = both_ways(arrays, hashes, backend=backend)
    assert all(type(x) is cupy.ndarray for x in mine)
    back = [jax.dlpack.from_dlpack(x) for x in mine]
    assert all(x.devices() == {device} for x in back)
    same([np.asarray(x) for x in back], right)


def test_merging_and_decoding_on_cupy_arrays(cupy, backend):
    from scfa_core.decoding import at_end, attention_in_parts
    from scfa_core.merging import attention_over
    from scfa_core.sinks import sinks_backward

    (q, k, v, _), _, _ = draw()
    window, far = scfa.SlidingWindow(30), scfa.Causal(lag=30)
    right = scfa.attention(q, k, v, backend="reference")
    q, k, v = (cupy.asarray(x) for x in (q, k, v))
    same([attention_over(q, k, v, [window, far], backend=backend).get()], [right])
    sinks = cupy.asarray(np.linspace(-2, 2, q.shape[1]).astype("float32"))
    out, lse = scfa.attention(q, k, v, window, sinks=sinks, return_lse=True, backend=backend)
    on_host = [x.get() for x in (q, k, v)]
    more = {"sinks": sinks.get(), "return_lse": True, "backend": "reference"}
    same([out.get(), lse.get()], scfa.attention(*on_host, window, **more))
    gradient = sinks_backward(out.get(), out.get(), lse.get(), sinks.get())
    np.testing.assert_allclose(sinks_backward(out, out, lse, sinks).get(), gradient, rtol=1e-4)
    new, below = q[:, :, -3:].copy(), scfa.Causal(align="bottom-right")
    parts = [(k[:, :, :90], v[:, :, :90], None), (k[:, :, 90:], v[:, :, 90:], below)]
    same([attention_in_parts(new, parts, backend=backend).get()], [right[:, :, -3:]])
    last = scfa.attention(new, k, v, at_end(scfa.Causal(), new, k), backend=backend)
    same([last.get()], [right[:, :, -3:]])


def test_the_example_on_arrays_learns_on_the_gpu(cupy, backend, monkeypatch, capsys):
    script = ROOT / "examples" / "train_arrays.py"
    if not script.exists():
        pytest.skip("the tests run outside a source tree")
    spec = importlib.util.spec_from_file_location("train_arrays", script)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", [script.name, "--backend", backend])
    example.main()
    text = capsys.readouterr().out
    assert "(cupy)" in text
    first, last = (float(x) for x in re.findall(r"loss (\S+)", text))
    assert last < first / 20


@pytest.fixture
def transformers(torch):
    found = pytest.importorskip("transformers", reason="needs the extra hf")
    from scfa_core import hf

    hf.register(window=40, buckets=4, near=8)
    return found


def make_model(torch, transformers, kind, dtype, device="cuda"):
    """Tiny, random; windows shorter than the text in every other layer of Qwen."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "max_position_embeddings": 512}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=101, n_positions=512, n_embd=128, n_layer=2, n_head=4, attn_pdrop=0.0
        )
    else:
        sizes |= {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        if kind == "qwen":
            sizes |= {"use_sliding_window": True, "sliding_window": 30}
            sizes |= {"layer_types": ["full_attention", "sliding_attention"]}
        config = (transformers.LlamaConfig if kind == "llama" else transformers.Qwen2Config)(
            **sizes
        )
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval().to(device=device, dtype=getattr(torch, dtype))


def padded(torch, seqlen=100, device="cuda"):
    text = torch.randint(2, 101, (2, seqlen), generator=torch.Generator().manual_seed(1))
    real = torch.arange(seqlen).expand(2, -1) >= torch.tensor([[17], [0]])
    return text.to(device), real.to(device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])
def test_logits_and_gradients_of_models(torch, transformers, backend, kind, dtype):
    text, real = padded(torch)
    model = make_model(torch, transformers, kind, "float32")

    def results(implementation):
        model.set_attn_implementation(implementation)
        logits = model(text, attention_mask=real.long()).logits.float()[real]
        return logits.detach(), torch.cat(
            [x.flatten().float() for x in torch.autograd.grad(logits.square().sum(), weights)]
        )

    weights = list(model.parameters())
    right = results("eager")
    model.to(getattr(torch, dtype))
    weights = list(model.parameters())
    with scfa.use_backend(backend):
        mine, own = results("scfa"), results("eager")
    for got, theirs, wanted in zip(mine, own, right, strict=True):
        slack = 1e-3 if dtype == "float32" else 0  # eager is exactly right there
        assert (got - wanted).norm() <= 2 * (theirs - wanted).norm() + slack * wanted.norm()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["scfa", "scfa_window", "scfa_hash"])
def test_generation_sees_what_one_call_sees(torch, transformers, backend, implementation, cache):
    text, real = padded(torch)
    model = make_model(torch, transformers, "qwen", "float32")
    model.set_attn_implementation(implementation)
    with scfa.use_backend(backend), torch.no_grad():
        steps = model.generate(
            text,
            attention_mask=real.long(),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
            disable_compile=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        real = torch.cat([real, real.new_ones(2, 8)], dim=1)
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        whole = model(steps.sequences, attention_mask=real.long(), position_ids=positions).logits
    mine = torch.stack(steps.logits, dim=1)
    torch.testing.assert_close(mine, whole[:, 99:107], rtol=0, atol=1e-4)


ONE_GRAPH = {  # model, implementation, inputs, plans in the graph: one a mask; a hash's in layers
    "causal": ("llama", "scfa", "plain", 1),
    "padded": ("llama", "scfa", "padded", 1),
    "windows in every other layer": ("qwen", "scfa", "padded", 2),
    "packed": ("llama", "scfa", "packed", 1),
    "hash": ("llama", "scfa_hash", "padded", 2 * 2),  # of near keys, and of far ones of a bucket
}


def compare_one_graph(torch, transformers, device, kind, implementation, inputs, plans):
    """Logits and gradients of a model as one graph, uncompiled, and with `eager` attention."""
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    model = make_model(torch, transformers, kind, "float32", device)
    text, real = padded(torch, device=device)
    given = {"input_ids": text, "use_cache": False}
    if inputs == "padded":
        given["attention_mask"] = real.long()
    else:
        real = torch.ones_like(real)
    if inputs == "packed":
        lengths = (41, 1, 58)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        given["position_ids"] = positions.expand(2, -1)
    planned = []

    def count(graph, _):
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        planned.append(called.count(torch.ops.scfa.make_plan.default))
        return graph.forward

    def results(call):
        logits = call(**given).logits[real]
        grads = torch.autograd.grad(logits.square().sum(), model.parameters())
        return logits.detach(), torch.cat([x.flatten() for x in grads])

    model.set_attn_implementation(implementation)
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    mine = results(torch.compile(model, backend=backend, fullgraph=True))  # the first call of all
    assert planned == [plans, 0]
    bounds = [(results(model), 1e-5)]
    if implementation == "scfa":
        model.set_attn_implementation("eager")
        bounds.append((results(model), 1e-3))
    for right, bound in bounds:
        for got, wanted in zip(mine, right, strict=True):
            assert (got - wanted).norm() <= bound * wanted.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its compiler imports torch.jit
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of dynamo itself
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
@pytest.mark.parametrize("mask", ONE_GRAPH)
def test_a_whole_model_is_one_graph(torch, transformers, backend, mask):
    with scfa.use_backend(backend):
        compare_one_graph(torch, transformers, "cuda", *ONE_GRAPH[mask])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("implementation", ["scfa", "scfa_hash"])
def test_replayed_as_a_cuda_graph(torch, transformers, backend, implementation, recwarn):
    """`reduce-overhead` records the model once; new tokens go through the replay."""
    torch._dynamo.reset()
    model = make_model(torch, transformers, "llama", "float32")
    model.set_attn_implementation(implementation)
    replayed = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    generator = torch.Generator("cuda").manual_seed(2)
    with scfa.use_backend(backend), torch.no_grad():
        for _ in range(4):  # two of them plain, as torch warms up and records
            text = torch.randint(2, 101, (2, 100), device="cuda", generator=generator)
            torch.compiler.cudagraph_mark_step_begin()
            got = replayed(input_ids=text, use_cache=False).logits.clone()
            wanted = model(input_ids=text, use_cache=False).logits
            assert (got - wanted).norm() <= 1e-4 * wanted.norm()
    skipped = [str(w.message) for w in recwarn if "skipping cudagraphs" in str(w.message)]
    assert not skipped
