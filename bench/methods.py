"""Who is timed: this package by backend, and its peers. Each says why it cannot take part."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import scfa_core as scfa
from bench.flex import flex
from bench.inputs import Inputs
from bench.timed import CannotRun, Timed, autograd, found
from scfa_core.dispatch import unavailable_reason


def ours(backend: str) -> Callable[[Inputs], Timed]:
    """Return the method that runs this package on one backend."""

    def prepare(inputs: Inputs) -> Timed:
        reason = unavailable_reason(backend)  # of this one alone: others take long to ask
        if reason is not None:
            raise CannotRun(reason)
        q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
        pattern = inputs.pattern
        plan = scfa.make_plan(pattern, q, k, backend=backend)
        out, lse = scfa.attention(q, k, v, plan, return_lse=True, backend=backend)
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]

        def both() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(
                scfa.attention(*leaves, pattern, backend=backend), leaves, dout
            )

        return Timed(
            forward=lambda: scfa.attention(q, k, v, pattern, backend=backend),
            backward=lambda: scfa.attention_backward(
                dout, q, k, v, out, lse, plan, backend=backend
            ),
            plan=lambda: scfa.make_plan(pattern, q, k, backend=backend),
            planned=lambda: scfa.attention(q, k, v, plan, backend=backend),
            lse=lambda: lse,
            both=both,
        )

    return prepare


def sdpa(kernel: str) -> Callable[[Inputs], Timed]:
    """Return torch's scaled_dot_product_attention held to one of its kernels; dense causal only."""

    def prepare(inputs: Inputs) -> Timed:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if kernel == "CUDNN_ATTENTION" and inputs.case.device != "cuda":
            raise CannotRun("cuDNN computes on a GPU only")
        choice = getattr(SDPBackend, kernel)
        gqa = inputs.case.heads != inputs.case.heads_kv

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(choice):
                return functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=gqa
                )

        try:
            return autograd(inputs, run)
        except RuntimeError as error:
            raise CannotRun(str(error).splitlines()[0]) from error

    return prepare


def naive(inputs: Inputs) -> Timed:
    """Masked softmax with the scores materialised: what a first implementation does."""
    case = inputs.case
    if case.rows * case.seqlen * 4 > 8e9:
        raise CannotRun("scores would take more than 8 GB")
    sizes = {"batch": case.batch, "heads": case.heads, "heads_kv": case.heads_kv}
    mask = torch.from_numpy(inputs.pattern.mask(case.seqlen, case.seqlen, **sizes))
    hidden = ~mask.to(case.device)
    group = case.heads // case.heads_kv

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = (q @ k.transpose(-1, -2) * case.head_dim**-0.5).masked_fill(hidden, float("-inf"))
        return torch.softmax(scores.float(), -1).nan_to_num(0.0).to(q.dtype) @ v

    return autograd(inputs, run)


FLASH = {
    "flash-attn-2": "flash_attn",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute",
}


def installed_peers() -> list[str]:
    """Names of the dense peers beyond torch that can be imported here."""
    modules = FLASH | {"cudnn-frontend": "cudnn", "xformers": "xformers"}
    return [name for name, module in modules.items() if found(module)]


def _import(module: str) -> Any:
    if not found(module):
        raise CannotRun(f"{module} is not installed")
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a foreign module raises
        raise CannotRun(f"{module} does not import: {error}") from error


def _first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def _newest_flash() -> str:
    """Of the generations installed; the second, which `_import` then misses, if none is."""
    return next((name for name in reversed(FLASH) if found(FLASH[name])), "flash-attn-2")


def flash(name: str | None, **options: Any) -> Callable[[Inputs], Timed]:
    """Return flash-attn of one generation, or the newest installed; dense causal only."""

    def prepare(inputs: Inputs) -> Timed:
        function = _import(FLASH[name or _newest_flash()]).flash_attn_func

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            rows = (x.transpose(1, 2) for x in (q, k, v))
            return _first(function(*rows, causal=True, **options)).transpose(1, 2)

        return autograd(inputs, run)

    return prepare


def flash_varlen(inputs: Inputs) -> Timed:
    """The newest flash-attn's varlen on rows sorted by one hash: each bucket is a sequence.

    Only where queries and keys share their hash is a sorted bucket causal like a sequence.
    Sorting, permuting and putting back are part of the forward; backward goes through them.
    """
    case = inputs.case
    if case.kind != "samehash" or case.heads != case.heads_kv:
        raise CannotRun("varlen on sorted rows needs one hash for q and k, and as many key heads")
    function = _import(FLASH[_newest_flash()]).flash_attn_varlen_func
    lists = case.batch * case.heads
    ids = inputs.q_ids.reshape(lists, case.seqlen)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        order = torch.argsort(ids, dim=-1, stable=True)
        first = torch.arange(lists, device=ids.device)[:, None]
        rows = (order + first * case.seqlen).reshape(-1)
        counts = torch.zeros(lists, case.number, dtype=torch.int32, device=ids.device)
        counts.scatter_add_(1, ids.long(), torch.ones_like(ids))
        ends = functional.pad(counts.reshape(-1).cumsum(0), (1, 0)).to(torch.int32)
        most = int(counts.max())
        packed = (x.reshape(-1, 1, case.head_dim).index_select(0, rows) for x in (q, k, v))
        out = _first(
            function(
                *packed,
                cu_seqlens_q=ends,
                cu_seqlens_k=ends,
                max_seqlen_q=most,
                max_seqlen_k=most,
                causal=True,
            )
        )
        return torch.empty_like(out).index_copy(0, rows, out).reshape(q.shape)

    return autograd(inputs, run)


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Let a mere folder of a module's name, which `find_spec` takes for the module, not be seen."""
    if found(module):
        yield
        return
    loaded: dict[str, Any] = sys.modules  # None there: not to be imported
    before = loaded.get(module)
    loaded[module] = None
    try:
        yield
    finally:
        del loaded[module]
        if before is not None:
            loaded[module] = before


def xformers(inputs: Inputs) -> Timed:
    """Memory-efficient attention of xformers, whichever kernel it picks; dense causal only."""
    with _hidden("flash_attn"):  # beside the fourth generation alone it wants the second's parts
        ops = _import("xformers.ops")
    compiled = getattr(sys.modules.get("xformers"), "_cpp_lib", None)
    refused = getattr(compiled, "_cpp_library_load_exception", None)
    if refused is not None:  # then it has no kernel for a GPU, torch's own included
        raise CannotRun(" ".join(str(refused).partition("Please reinstall")[0].split()))
    if inputs.case.heads != inputs.case.heads_kv:
        raise CannotRun("grouped heads are not written for xformers here")

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = (x.transpose(1, 2) for x in (q, k, v))
        return ops.memory_efficient_attention(*rows, attn_bias=ops.LowerTriangularMask()).transpose(
            1, 2
        )

    return autograd(inputs, run)


@functools.cache
def _cudnn_handle(cudnn: Any) -> Any:
    """One for all cases: each holds memory of the card."""
    try:
        return cudnn.create_handle()
    except RuntimeError as error:
        raise CannotRun(f"cuDNN does not start: {error}") from error


def cudnn_frontend(inputs: Inputs) -> Timed:
    """Forward and backward of cuDNN through its own frontend; dense causal only.

    Results and workspaces are allocated once, outside the timed calls.
    """
    cudnn = _import("cudnn")
    case = inputs.case
    kinds = {"bfloat16": "BFLOAT16", "float16": "HALF"}
    if case.dtype not in kinds:
        raise CannotRun("cuDNN's attention is for bfloat16 and float16")
    single = cudnn.data_type.FLOAT
    types = {torch.float32: single, inputs.q.dtype: getattr(cudnn.data_type, kinds[case.dtype])}
    handle = _cudnn_handle(cudnn)

    def built(
        node: str, given: dict[str, torch.Tensor], results: list[torch.Tensor], **options: Any
    ) -> Callable[[], None]:
        """Plan a graph of one node; return what runs it on the stream that torch is on."""
        graph = cudnn.pygraph(
            io_data_type=types[inputs.q.dtype],
            intermediate_data_type=single,
            compute_data_type=single,
            handle=handle,
        )
        named = {name: graph.tensor_like(x) for name, x in given.items()}
        options |= {"attn_scale": case.head_dim**-0.5, "use_causal_mask": True}
        made = getattr(graph, node)(name=node, **named, **options)
        filled = {named[name]: x for name, x in given.items()}
        for tensor, x in zip(made, results, strict=True):
            tensor.set_output(True).set_data_type(types[x.dtype])
            tensor.set_dim(list(x.shape)).set_stride(list(x.stride()))
            filled[tensor] = x
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        size = max(graph.get_workspace_size(), 1)
        work = torch.empty(size, dtype=torch.uint8, device=case.device)

        def run() -> None:
            cudnn.set_stream(handle, torch.cuda.current_stream().cuda_stream)
            graph.execute(filled, work, handle=handle)

        return run

    rows = {"q": inputs.q.detach(), "k": inputs.k.detach(), "v": inputs.v.detach()}
    out = torch.empty_like(inputs.q)
    lse = torch.empty(*inputs.q.shape[:3], 1, dtype=torch.float32, device=case.device)
    grads = [torch.empty_like(x) for x in rows.values()]
    try:
        attend = built("sdpa", rows, [out, lse], generate_stats=True)
        after = rows | {"o": out, "dO": inputs.dout, "stats": lse}
        differentiate = built("sdpa_backward", after, grads)
    except cudnn.cudnnGraphNotSupportedError as error:
        raise CannotRun(f"cuDNN declines: {str(error).splitlines()[0]}") from error

    def forward() -> torch.Tensor:
        attend()
        return out

    def backward() -> tuple[torch.Tensor, ...]:
        differentiate()
        return tuple(grads)

    def both() -> tuple[torch.Tensor, ...]:
        attend()
        return backward()

    attend()  # backward alone reads what a forward left
    return Timed(forward, backward, both=both)


def original(path: str) -> Callable[[Inputs], Timed]:
    """Return the 2023 Triton kernels, from a file that the user names."""

    def prepare(inputs: Inputs) -> Timed:
        case = inputs.case
        if case.kind not in ("hash", "qk") or case.head_dim != 64 or case.dtype != "bfloat16":
            raise CannotRun("the original serves hash and QK patterns, head_dim 64, bfloat16")
        spec = importlib.util.spec_from_file_location("original_kernels", path)
        if spec is None or spec.loader is None or not Path(path).is_file():
            raise CannotRun(f"not available: no Python file at {path}")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever a foreign file raises
            raise CannotRun(f"not available because {path} does not import: {error}") from error
        if not hasattr(module, "dynamic_sparse_attention"):
            raise CannotRun(f"not available: {path} has no dynamic_sparse_attention")
        # Kept rows are summed in the flags' own dtype: bfloat16 would miscount beyond 256.
        dtype = torch.int32 if case.kind == "hash" else torch.float32
        ids = [x.transpose(1, 2).to(dtype).contiguous() for x in (inputs.q_ids, inputs.k_ids)]

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            rows = (x.transpose(1, 2).contiguous() for x in (q, k, v))
            out = module.dynamic_sparse_attention(*rows, *ids, sparsity_mode=case.kind)
            return out.transpose(1, 2)

        return autograd(inputs, run)

    return prepare


METHODS: dict[str, Callable[[Inputs], Timed]] = {
    "scfa-cupy": ours("cupy"),
    "scfa-numba-cuda": ours("numba-cuda"),
    "scfa-numba-cpu": ours("numba-cpu"),
    "sdpa-cudnn": sdpa("CUDNN_ATTENTION"),
    "sdpa-flash": sdpa("FLASH_ATTENTION"),
    "sdpa-math": sdpa("MATH"),
    "flex": flex("TRITON"),
    "flex-flash": flex("FLASH"),
    "flash-attn": flash(None),
    **{name: flash(name) for name in FLASH},
    "flash-attn-4-deterministic": flash("flash-attn-4", deterministic=True),
    "flash-varlen": flash_varlen,
    "cudnn-frontend": cudnn_frontend,
    "xformers": xformers,
    "naive": naive,
}
