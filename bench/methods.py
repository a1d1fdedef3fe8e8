"""Who is timed: this package by backend, and its peers. Each says why it cannot take part."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

import scfa_core as scfa
from bench.inputs import Inputs


class CannotRun(Exception):  # noqa: N818 - a reason, not an error
    """A method does not serve this case or this machine; the message is the reason."""


@dataclass
class Timed:
    """What to time. Each callable does the whole work of its mode, ready to be repeated."""

    forward: Callable[[], torch.Tensor]  # from raw inputs to out in the user's order
    backward: Callable[[], tuple[torch.Tensor, ...]] | None = None  # from dout; forward done before
    plan: Callable[[], Any] | None = None
    planned: Callable[[], torch.Tensor] | None = None  # forward with the plan given
    lse: Callable[[], torch.Tensor] | None = None


def ours(backend: str) -> Callable[[Inputs], Timed]:
    """Return the method that runs this package on one backend."""

    def prepare(inputs: Inputs) -> Timed:
        reason = scfa.backends()[backend]
        if reason != "available":
            raise CannotRun(reason)
        q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
        pattern = inputs.pattern
        plan = scfa.make_plan(pattern, q, k, backend=backend)
        out, lse = scfa.attention(q, k, v, plan, return_lse=True, backend=backend)
        return Timed(
            forward=lambda: scfa.attention(q, k, v, pattern, backend=backend),
            backward=lambda: scfa.attention_backward(
                dout, q, k, v, out, lse, plan, backend=backend
            ),
            plan=lambda: scfa.make_plan(pattern, q, k, backend=backend),
            planned=lambda: scfa.attention(q, k, v, plan, backend=backend),
            lse=lambda: lse,
        )

    return prepare


def _autograd(inputs: Inputs, run: Callable[..., torch.Tensor]) -> Timed:
    """Time any differentiable function of q, k, v."""
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = run(*leaves)

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return run(inputs.q, inputs.k, inputs.v)

    return Timed(forward, backward)


def sdpa(kernel: str) -> Callable[[Inputs], Timed]:
    """Return torch's scaled_dot_product_attention held to one of its kernels; dense causal only."""

    def prepare(inputs: Inputs) -> Timed:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        choice = getattr(SDPBackend, kernel)
        gqa = inputs.case.heads != inputs.case.heads_kv

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(choice):
                return functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=gqa
                )

        try:
            return _autograd(inputs, run)
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

    return _autograd(inputs, run)


def flex(inputs: Inputs) -> Timed:
    """FlexAttention as its user pays: rows permuted, mask built, attention, rows put back."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = inputs.case
    if case.kind not in ("hash", "dense"):
        raise CannotRun("only the hash and dense recipes are written for FlexAttention here")
    compiled = torch.compile(flex_attention, dynamic=False)
    build = torch.compile(create_block_mask, dynamic=False)
    sizes = (case.batch, case.heads, case.seqlen, case.seqlen)
    if case.kind == "dense":
        mask = build(lambda b, h, i, j: i >= j, None, None, case.seqlen, case.seqlen)
        return _autograd(inputs, lambda q, k, v: compiled(q, k, v, block_mask=mask))

    q_order = torch.argsort(inputs.q_ids, dim=-1, stable=True)
    k_order = torch.argsort(inputs.k_ids, dim=-1, stable=True)
    q_sorted, k_sorted = inputs.q_ids.gather(-1, q_order), inputs.k_ids.gather(-1, k_order)

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        same = q_sorted[b, h, i] == k_sorted[b, h, j]
        return same & (q_order[b, h, i] >= k_order[b, h, j])

    def rows(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))

    block_mask = build(visible, *sizes)
    back = torch.argsort(q_order, dim=-1)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = compiled(rows(q, q_order), rows(k, k_order), rows(v, k_order), block_mask=block_mask)
        return rows(out, back)

    timed = _autograd(inputs, run)
    timed.plan = lambda: build(visible, *sizes)
    timed.planned = timed.forward

    def whole() -> torch.Tensor:
        with torch.no_grad():
            mask = build(visible, *sizes)
            out = compiled(
                rows(inputs.q, q_order),
                rows(inputs.k, k_order),
                rows(inputs.v, k_order),
                block_mask=mask,
            )
            return rows(out, back)

    timed.forward = whole
    return timed


def flash_attn(inputs: Inputs) -> Timed:
    """The newest flash-attn that is installed; dense causal only."""
    for module in ("flash_attn.cute", "flash_attn_interface", "flash_attn"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found:
            function = importlib.import_module(module).flash_attn_func
            break
    else:
        raise CannotRun("flash-attn is not installed")

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return _autograd(inputs, run)


def original(path: str) -> Callable[[Inputs], Timed]:
    """Return the 2023 Triton kernels, from a file that the user names."""

    def prepare(inputs: Inputs) -> Timed:
        case = inputs.case
        if case.kind not in ("hash", "qk") or case.head_dim != 64 or case.dtype != "bfloat16":
            raise CannotRun("the original serves hash and QK patterns, head_dim 64, bfloat16")
        spec = importlib.util.spec_from_file_location("original_kernels", path)
        if spec is None or spec.loader is None:
            raise CannotRun(f"no Python file at {path}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        dtype = torch.int32 if case.kind == "hash" else torch.bfloat16
        ids = [x.transpose(1, 2).to(dtype).contiguous() for x in (inputs.q_ids, inputs.k_ids)]

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            rows = (x.transpose(1, 2).contiguous() for x in (q, k, v))
            out = module.dynamic_sparse_attention(*rows, *ids, sparsity_mode=case.kind)
            return out.transpose(1, 2)

        return _autograd(inputs, run)

    return prepare


METHODS: dict[str, Callable[[Inputs], Timed]] = {
    "scfa-cupy": ours("cupy"),
    "scfa-numba-cuda": ours("numba-cuda"),
    "scfa-numba-cpu": ours("numba-cpu"),
    "sdpa-cudnn": sdpa("CUDNN_ATTENTION"),
    "sdpa-flash": sdpa("FLASH_ATTENTION"),
    "sdpa-math": sdpa("MATH"),
    "flex": flex,
    "flash-attn": flash_attn,
    "naive": naive,
}
