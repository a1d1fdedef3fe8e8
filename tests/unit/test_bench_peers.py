"""Peers: what each is given to compute, and how one that cannot take part says so."""

import itertools
import sys
import types

import bench_call
import played_peers
import pytest
import torch
from played_peers import CUDNN_SOURCE, FLASH_SOURCE, XFORMERS_SOURCE, written

from_the_checkout = bench_call.from_the_checkout
fake_peers, no_peer_stays = played_peers.fake_peers, played_peers.no_peer_stays


def test_a_peer_that_raises_costs_only_its_own_rows(monkeypatch):
    import argparse

    from bench import run

    def broken(inputs):
        raise ZeroDivisionError("of a peer\nmore")

    monkeypatch.setitem(run.METHODS, "flex", broken)
    options = {"original": None, "mode": ["forward"], "budget": None, "case": ["smoke-dense"]}
    options |= {"method": ["flex", "naive"], "limit": None, "seconds": 0.0}
    options |= {"gbps": None, "tflops": None, "smoke": False}
    first, second = run.sweep(argparse.Namespace(**options), set())
    assert first["reason"] == "ZeroDivisionError: of a peer"
    assert first["failed"]
    assert second["method"] == "naive"
    assert second["ms"] > 0


def test_a_file_that_is_not_the_original_says_why(tmp_path):
    from bench.cases import Case
    from bench.inputs import Inputs
    from bench.methods import CannotRun, original

    case = Case("x", 1, 2, 2, 128, 64, "hash4")
    inputs = Inputs(case, None, None, None, None, None, None, None)
    empty, broken = tmp_path / "empty.py", tmp_path / "broken.py"
    empty.write_text("")
    broken.write_text("raise ValueError('old triton')")
    for path, words in (
        (tmp_path / "none.py", "no Python file"),
        (empty, "no dynamic_sparse_attention"),
        (broken, "does not import: old triton"),
    ):
        with pytest.raises(CannotRun, match=words):
            original(str(path))(inputs)


@pytest.fixture
def flex_on_host(monkeypatch):
    """FlexAttention without its compiler and, as it has none on a CPU, without a backward."""
    from bench import flex, timed

    def forward_only(inputs, run, whole=None):
        every = whole or run
        planned = None if whole is None else (lambda: run(inputs.q, inputs.k, inputs.v))
        return timed.Timed(lambda: every(inputs.q, inputs.k, inputs.v), planned=planned)

    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    monkeypatch.setattr(flex, "autograd", forward_only)
    return flex.flex("TRITON")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_sorts_builds_and_permutes_in_the_timed_call(flex_on_host):
    from bench.cases import Case
    from bench.inputs import make_inputs, sampled_error

    inputs = make_inputs(Case("x", 1, 2, 2, 256, 32, "hash4", "float32", "cpu"))
    timed = flex_on_host(inputs)
    assert sampled_error(inputs, timed.forward()) < 1e-4
    assert sampled_error(inputs, timed.planned()) < 1e-4
    inputs.q_ids.copy_(inputs.q_ids.flip(-1))  # a new pattern must reach the next whole call
    assert sampled_error(inputs, timed.forward()) < 1e-4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pattern", ["dense", "samehash4", "qk50", "window64", "docs3", "ranges64"])
@pytest.mark.parametrize("heads", [2, 4])
def test_flex_serves_every_recipe(flex_on_host, pattern, heads):
    from bench.cases import Case
    from bench.inputs import make_inputs, sampled_error

    inputs = make_inputs(Case("x", 2, heads, 2, 256, 32, pattern, "float32", "cpu"))
    timed = flex_on_host(inputs)
    assert sampled_error(inputs, timed.forward()) < 1e-4
    assert (timed.plan is None) == (pattern in ("dense", "window64"))


def test_varlen_on_sorted_rows_against_float64(monkeypatch):
    from torch.nn import functional

    from bench import methods
    from bench.cases import Case
    from bench.inputs import make_inputs, sampled_error

    def by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        ends = cu_seqlens_q.tolist()
        parts = []
        for i, j in itertools.pairwise(ends):
            assert j - i <= max_seqlen_q
            part = (x[i:j].transpose(0, 1) for x in (q, k, v))
            out = functional.scaled_dot_product_attention(*part, is_causal=causal)
            parts.append(out.transpose(0, 1))
        return torch.cat(parts)

    peer = types.SimpleNamespace(flash_attn_varlen_func=by_sequence)
    monkeypatch.setattr(methods, "_import", lambda module: peer)
    inputs = make_inputs(Case("x", 2, 2, 2, 256, 32, "samehash4", "float32", "cpu"))
    timed = methods.flash_varlen(inputs)
    out, (dq, _, _) = timed.forward(), timed.backward()
    assert sampled_error(inputs, out, dq) < 1e-4


def test_flex_forgets_compiled_shapes_so_that_a_long_sweep_stays_compiled(monkeypatch):
    from bench import flex

    forgotten, options = [], []
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *a, **given: options.append(given))
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(True))
    grouped = type("Inputs", (), {"case": type("Case", (), {"heads": 4, "heads_kv": 2})})
    for kernels in ("TRITON", "FLASH"):
        flex._compiled(grouped, kernels)[0]()
    assert len(forgotten) == 2
    assert [given["enable_gqa"] for given in options] == [True, True]
    assert [given["kernel_options"] for given in options] == [None, {"BACKEND": "FLASH"}]


def test_flex_flash_without_its_kernels_says_so(monkeypatch):
    from bench.methods import METHODS, CannotRun

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CannotRun, match="flash_attn"):
        METHODS["flex-flash"](None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pattern", ["dense", "hash4"])
def test_flex_flash_has_blocks_that_its_kernels_take(flex_on_host, monkeypatch, pattern):
    from torch.nn.attention import flex_attention

    from bench import flex
    from bench.cases import Case
    from bench.inputs import make_inputs, sampled_error

    seen = []

    def eager(inputs, kernels):
        def attend(q, k, v, block_mask):
            seen.append(block_mask.BLOCK_SIZE)
            return flex_attention.flex_attention(q, k, v, block_mask=block_mask)

        return attend, flex_attention.create_block_mask

    monkeypatch.setattr(flex, "found", lambda module: True)
    monkeypatch.setattr(flex, "_compiled", eager)
    for kernels in ("TRITON", "FLASH"):
        for head_dim in (64, 128, 256):
            inputs = make_inputs(Case("x", 1, 1, 1, 256, head_dim, pattern, "bfloat16", "cpu"))
            assert sampled_error(inputs, flex.flex(kernels)(inputs).forward()) < 2e-2
    assert seen == [(128, 128)] * 5 + [(128, 64)]


def test_flex_flash_is_for_half_precision(monkeypatch):
    from bench import flex
    from bench.cases import Case
    from bench.inputs import make_inputs

    monkeypatch.setattr(flex, "found", lambda module: True)
    inputs = make_inputs(Case("x", 1, 1, 1, 128, 32, "dense", "float32", "cpu"))
    with pytest.raises(flex.CannotRun, match="bfloat16 and float16"):
        flex.flex("FLASH")(inputs)


PEERS = ("flash-attn-2", "flash-attn-3", "flash-attn-4", "cudnn-frontend", "xformers")


def test_peers_are_found_by_import_and_only_then(fake_peers):
    from bench.cases import select
    from bench.methods import installed_peers
    from bench.run import default_methods

    assert installed_peers() == list(PEERS)
    assert set(PEERS) < set(default_methods(select(["A-hash16-16k"])[0], False))
    assert "flash-varlen" in default_methods(select(["A-samehash16-16k"])[0], False)


def test_the_fourth_generation_of_flash_attn_alone_is_no_second(tmp_path, monkeypatch):
    from bench.methods import METHODS, CannotRun, installed_peers

    folder = tmp_path / "flash_attn" / "cute"  # and no flash_attn/__init__.py, as its wheel has it
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(FLASH_SOURCE.replace("WRAP", ""))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed_peers() == ["flash-attn-4"]
    with pytest.raises(CannotRun, match="flash_attn is not installed"):
        METHODS["flash-attn-2"](None)


def test_the_fourth_generation_is_asked_for_a_fixed_order_by_name(fake_peers):
    import importlib

    from bench.cases import Case
    from bench.inputs import make_inputs
    from bench.methods import METHODS

    inputs = make_inputs(Case("x", 1, 1, 1, 64, 32, "dense", "bfloat16", "cpu"))
    for name in ("flash-attn-4", "flash-attn-4-deterministic"):
        METHODS[name](inputs)
    assert importlib.import_module("flash_attn.cute").asked == [False, True]


DENSE_PEERS = (*PEERS, "flash-attn-4-deterministic", "flash-attn", "sdpa-math", "sdpa-flash")


@pytest.mark.parametrize("name", DENSE_PEERS)
def test_a_dense_peer_computes_causal_attention(fake_peers, name):
    from bench.cases import Case
    from bench.inputs import as_dense, make_inputs, sampled_error, sampled_key_error
    from bench.methods import METHODS

    inputs = make_inputs(Case("x", 2, 2, 2, 256, 32, "hash4", "bfloat16", "cpu"))
    timed = METHODS[name](inputs)
    dense = as_dense(inputs)
    for run in (timed.backward, timed.both):
        dq, dk, dv = run()
        assert sampled_error(dense, timed.forward(), dq) < 2e-2
        assert sampled_key_error(dense, None, timed.forward(), dk, dv) < 2e-2
    assert sampled_error(inputs, timed.forward()) > 0.1, "the sparse truth is another"


def test_cudnn_serves_grouped_heads_and_says_what_it_declines(fake_peers, tmp_path):
    from bench.cases import Case
    from bench.inputs import make_inputs, sampled_error, sampled_key_error
    from bench.methods import METHODS, CannotRun

    inputs = make_inputs(Case("x", 1, 4, 2, 128, 32, "dense", "float16", "cpu"))
    timed = METHODS["cudnn-frontend"](inputs)
    dq, dk, dv = timed.backward()  # with no forward called since
    assert sampled_error(inputs, timed.forward(), dq) < 3e-3
    assert sampled_key_error(inputs, None, timed.forward(), dk, dv) < 3e-3
    refusal = "raise cudnnGraphNotSupportedError('no engine\\nand more')"
    written(tmp_path, {"cudnn/__init__.py": CUDNN_SOURCE.replace("REFUSAL", refusal)})
    del sys.modules["cudnn"]
    with pytest.raises(CannotRun, match=r"^cuDNN declines: no engine$"):
        METHODS["cudnn-frontend"](inputs)
    missing = "def create_handle(): raise RuntimeError('no cudnnCreate')"
    written(tmp_path, {"cudnn/__init__.py": missing + CUDNN_SOURCE.split("def create_handle")[0]})
    del sys.modules["cudnn"]
    with pytest.raises(CannotRun, match="cuDNN does not start: no cudnnCreate"):
        METHODS["cudnn-frontend"](inputs)


XFORMERS_FINDS_THE_SECOND = """
import importlib.util

if importlib.util.find_spec("flash_attn"):
    import flash_attn.flash_attn_interface
"""


@pytest.mark.parametrize("imported", [False, True])
def test_xformers_imports_beside_the_fourth_generation_alone(tmp_path, monkeypatch, imported):
    from bench.cases import Case
    from bench.inputs import make_inputs, sampled_error
    from bench.methods import METHODS

    written(
        tmp_path,
        {
            "flash_attn/cute/__init__.py": FLASH_SOURCE.replace("WRAP", ""),
            "xformers/__init__.py": "",
            "xformers/ops/__init__.py": XFORMERS_FINDS_THE_SECOND + XFORMERS_SOURCE,
        },
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    inputs = make_inputs(Case("x", 1, 2, 2, 128, 32, "dense", "bfloat16", "cpu"))
    if imported:
        METHODS["flash-attn-4"](inputs)
    before = sys.modules.get("flash_attn")
    assert sampled_error(inputs, METHODS["xformers"](inputs).forward()) < 2e-2
    assert sys.modules.get("flash_attn") is before
    assert sampled_error(inputs, METHODS["flash-attn-4"](inputs).forward()) < 2e-2


def test_xformers_without_its_compiled_part_says_what_it_was_built_for(tmp_path, monkeypatch):
    from bench.cases import Case
    from bench.inputs import make_inputs
    from bench.methods import METHODS, CannotRun

    words = "can't load CUDA extensions. It was built for:\n    PyTorch 2\n  Please reinstall it"
    files = {
        "xformers/__init__.py": "from . import _cpp_lib",
        "xformers/_cpp_lib.py": f"_cpp_library_load_exception = ImportError({words!r})",
        "xformers/ops/__init__.py": XFORMERS_SOURCE,
    }
    written(tmp_path, files)
    monkeypatch.syspath_prepend(str(tmp_path))
    inputs = make_inputs(Case("x", 1, 2, 2, 64, 32, "dense", "bfloat16", "cpu"))
    with pytest.raises(
        CannotRun, match=r"^can't load CUDA extensions\. It was built for: PyTorch 2$"
    ):
        METHODS["xformers"](inputs)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_is_not_installed_or_does_not_import_says_so(tmp_path, monkeypatch, name):
    from bench.cases import Case
    from bench.inputs import make_inputs
    from bench.methods import METHODS, CannotRun, installed_peers

    inputs = make_inputs(Case("x", 1, 2, 2, 64, 32, "dense", "bfloat16", "cpu"))
    assert name not in installed_peers()
    with pytest.raises(CannotRun, match="is not installed"):
        METHODS[name](inputs)
    for module in ("flash_attn/cute", "flash_attn_interface", "xformers/ops", "cudnn"):
        (tmp_path / module).mkdir(parents=True)
        (tmp_path / module / "__init__.py").write_text("raise ImportError('another CUDA')")
    if name == "flash-attn-2":
        (tmp_path / "flash_attn/__init__.py").write_text("raise ImportError('another CUDA')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CannotRun, match="does not import: another CUDA"):
        METHODS[name](inputs)


def test_a_peer_with_a_wrong_gradient_is_not_timed(monkeypatch):
    from bench import run
    from bench.cases import Case
    from bench.inputs import make_inputs
    from bench.methods import METHODS

    inputs = make_inputs(Case("x", 1, 2, 1, 256, 32, "hash4", "float32", "cpu"))

    def wrong(mode, which):
        def method(inputs):
            timed = METHODS["sdpa-flash"](inputs)
            right = getattr(timed, mode)

            def twisted():
                grads = list(right())
                grads[which] = 1.1 * grads[which]
                return grads

            setattr(timed, mode, twisted)
            return timed

        return method

    (row,) = run.measure(inputs, "sdpa-flash", METHODS["sdpa-flash"], ["both"], 0.0)
    assert row["mode"] == "both"
    assert 0 < row["error"] < 1e-4
    for mode in ("backward", "both"):
        for which in range(3):  # dq, dk, dv
            with pytest.raises(AssertionError, match="relative error"):
                list(run.measure(inputs, "sdpa-flash", wrong(mode, which), [mode], 0.0))


def test_shapes_that_share_their_code_are_compiled_once():
    from bench.cases import select
    from bench.precompile import distinct

    names = [case.name for case in distinct(select(["buckets", "drops", "A-dense-16k"]))]
    assert names == ["A-hash2-16k", "A-qk10-16k", "A-dense-16k"]
    assert len(distinct(select(["A-hash16-8k", "A-hash16-16k", "A-hash16-16k-fp16"]))) == 3


def test_precompile_shares_one_cache_and_says_what_it_missed(tmp_path, monkeypatch, capsys):
    from bench import jit, precompile

    seen = []

    def child(case, method, environment, timeout):
        seen.append((case, environment["TORCHINDUCTOR_CACHE_DIR"], timeout))
        if case == "A-qk50-16k":
            return {"reason": "compiling took longer than the limit of 5 s"}
        return {"first_ms": 3000.0, "second_ms": 500.0}

    monkeypatch.setattr(jit, "child", child)
    line = ["--cache", str(tmp_path / "c"), "--processes", "2", "--limit", "5", "--case"]
    assert precompile.main([*line, "A-hash16-16k", "A-hash4-16k"]) == 0
    assert precompile.main([*line, "A-hash16-16k", "A-qk50-16k"]) == 1
    out = capsys.readouterr().out
    assert [case for case, _, _ in seen].count("A-hash16-16k") == 2
    assert "A-hash4-16k" not in out
    assert "2.5 s" in out
    assert "longer than the limit" in out
    where = precompile.cache_at(tmp_path / "c")["TORCHINDUCTOR_CACHE_DIR"]
    assert {cache for _, cache, _ in seen} == {where}
    assert where.startswith(str(tmp_path / "c"))
