"""The operator ``scfa::top_blocks``: one kernel on a GPU that has it, plain torch elsewhere.

Tracing sees one call with an int32 result, as with ``scfa::angular_hash``. `choosing.chosen_blocks`
has checked the arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from scfa_core.dispatch import load_backend
from scfa_core.torch_fakes import register_fake
from scfa_core.torch_framework import TORCH_FRAMEWORK, dtype_name, raw_stream
from scfa_core.torch_ops import batched

__all__ = ["TOP_BLOCKS", "kernel_reason", "top_blocks"]

LIBRARY = library.Library("scfa", "FRAGMENT")
LIBRARY.define(
    "top_blocks(Tensor scores, SymInt block, SymInt first, SymInt last, bool ahead, SymInt top) "
    "-> Tensor"
)
TOP_BLOCKS = torch.ops.scfa.top_blocks.default


def kernel_reason(scores: Tensor, top: int) -> str | None:
    """None if the kernel reads `scores`, otherwise why plain torch does."""
    backend = load_backend("cupy")
    if isinstance(backend, str):
        return backend
    from scfa_core.backends.cupy_raw.choosing import reason_against

    return reason_against(dtype_name(scores.dtype), top, scores.device.index)


def top_blocks(scores: Tensor, block: int, first: int, last: int, ahead: bool, top: int) -> Tensor:
    """Blocks (top, batch, heads, rows) of the highest scores that end before a row's own, int32.

    Row r of `scores` (batch, heads, blocks, rows) stands at place ``first + r`` of the keys. Who
    has no choice left gets the number of the `last` block, or, in that one and where `ahead` is
    False, one more. One maximum after the other takes a fraction of the time of topk.
    Works on a copy of the scores.
    """
    places = torch.arange(scores.shape[3], dtype=torch.int32, device=scores.device)
    own = (first + places) // block
    none = last + (own == last).int() if ahead else torch.full_like(own, last + 1)
    number = torch.arange(scores.shape[2], dtype=torch.int32, device=scores.device)
    scores = scores.masked_fill(number.unsqueeze(-1) >= own, -torch.inf)
    found = [none.expand(*scores.shape[:2], -1)] * (top if not scores.shape[2] else 0)
    while len(found) < top:
        best = scores.max(dim=-2, keepdim=True)
        scores.scatter_(-2, best.indices, -torch.inf)
        absent = best.values.isneginf().squeeze(-2)
        found.append(torch.where(absent, none, best.indices.squeeze(-2).int()))
    return torch.stack(found) if found else _fake(scores, block, first, last, ahead, top)


def _on_cuda(scores: Tensor, block: int, first: int, last: int, ahead: bool, top: int) -> Tensor:
    if kernel_reason(scores, top) is not None:
        return top_blocks(scores, block, first, last, ahead, top)
    from scfa_core.backends.cupy_raw.choosing import run_top_blocks

    ids = _fake(scores, block, first, last, ahead, top)
    scores = scores.detach().resolve_neg().contiguous()
    rows, out = (TORCH_FRAMEWORK.native(x, "cuda") for x in (scores, ids))
    run_top_blocks(rows, out, block, first, last, ahead, raw_stream(ids.device.index))
    return ids


def _fake(scores: Tensor, block: int, first: int, last: int, ahead: bool, top: int) -> Tensor:
    shape = (top, *scores.shape[:2], scores.shape[3])
    return scores.new_empty(shape, dtype=torch.int32)


def _batched(info, in_dims, *arguments):  # type: ignore[no-untyped-def]
    """`torch.func.vmap` rule: every slice by itself."""
    (ids,), _ = batched(lambda *one: (TOP_BLOCKS(*one),))(info, in_dims, *arguments)
    return ids, 0


LIBRARY.impl("top_blocks", top_blocks, "CPU")
LIBRARY.impl("top_blocks", _on_cuda, "CUDA")
register_fake("top_blocks", _fake, LIBRARY)
library.register_vmap(TOP_BLOCKS, _batched, lib=LIBRARY)
