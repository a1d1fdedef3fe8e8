"""FlexAttention as its user pays for it: rows permuted where that helps, mask built, attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.inputs import Inputs
from bench.timed import CannotRun, Timed, autograd, found

Orders = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of queries, of keys, and back
Visible = Callable[[Any, Any, Any, Any], Any]  # mask_mod: batch, head, query, key -> seen or not


def flex(kernels: str) -> Callable[[Inputs], Timed]:
    """Return FlexAttention with the kernels of one of its back ends: ``TRITON`` or ``FLASH``.

    Hash patterns are sorted by bucket first, which is what leaves whole blocks out; the other
    patterns keep the order of rows. A pattern that is new at every call has its mask built in the
    timed forward; dense causal and windows have theirs built once, outside.
    """

    def prepare(inputs: Inputs) -> Timed:
        if kernels == "FLASH" and not found("flash_attn.cute"):
            raise CannotRun("flash_attn.cute, whose kernels these are, is not installed")
        if kernels == "FLASH" and inputs.case.dtype not in ("bfloat16", "float16"):
            raise CannotRun("flash_attn.cute's kernels are for bfloat16 and float16")
        if inputs.case.kind in ("hash", "samehash"):
            return _sorted_rows(inputs, kernels)
        return _rows_in_place(inputs, kernels)

    return prepare


def _compiled(inputs: Inputs, kernels: str) -> tuple[Callable[..., torch.Tensor], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # A function is compiled for eight shapes at most; the ninth case would quietly run eagerly.
    torch.compiler.reset()
    attend = functools.partial(
        torch.compile(flex_attention, dynamic=False),
        enable_gqa=inputs.case.heads != inputs.case.heads_kv,
        # Triton is what every version takes unless told; older ones do not know the option.
        kernel_options=None if kernels == "TRITON" else {"BACKEND": kernels},
    )
    return attend, torch.compile(create_block_mask, dynamic=False)


def blocks_of(inputs: Inputs, kernels: str) -> dict[str, Any]:
    """Sizes of the mask's blocks, where the kernels do not take the usual 128 by 128.

    flash_attn.cute's forward tile for wide heads has 80 keys, and shrinks to a block of fewer.
    """
    wide = kernels == "FLASH" and inputs.case.head_dim > 128
    return {"BLOCK_SIZE": (128, 64)} if wide else {}


def key_head(head: Any, group: int) -> Any:
    """Key head of a query head; without groups the mask is spared a division."""
    return head if group == 1 else head // group


def mask_of(inputs: Inputs) -> tuple[Visible, bool, bool]:
    """mask_mod of a pattern whose rows stay in place; whether it differs by batch, by head."""
    case, first, second = inputs.case, inputs.q_ids, inputs.k_ids
    group = case.heads // case.heads_kv
    if case.kind == "dense":
        return lambda b, h, i, j: i >= j, False, False
    if case.kind == "window":
        return lambda b, h, i, j: (i >= j) & (i - j < case.number), False, False
    if case.kind == "docs":
        return lambda b, h, i, j: (i >= j) & (first[b, i] == first[b, j]), True, False
    if case.kind == "qk":

        def both_kept(b: Any, h: Any, i: Any, j: Any) -> Any:
            return (i >= j) & first[b, h, i] & second[b, key_head(h, group), j]

        return both_kept, True, True
    return lambda b, h, i, j: (first[b, h, i] <= j) & (j < second[b, h, i]), True, True


def _rows_in_place(inputs: Inputs, kernels: str) -> Timed:
    case = inputs.case
    visible, by_batch, by_head = mask_of(inputs)
    attend, build = _compiled(inputs, kernels)
    if not by_batch:  # small enough to be built without compiling, which takes a minute
        from torch.nn.attention.flex_attention import create_block_mask as build
    batch, heads = case.batch if by_batch else None, case.heads if by_head else None
    blocks = blocks_of(inputs, kernels)

    def plan() -> Any:
        sizes = (batch, heads, case.seqlen, case.seqlen)
        return build(visible, *sizes, device=case.device, **blocks)

    def attend_by(make: Callable[[], Any]) -> Callable[..., torch.Tensor]:
        return lambda q, k, v: attend(q, k, v, block_mask=make())

    block_mask = plan()
    given = attend_by(lambda: block_mask)
    timed = autograd(inputs, given, attend_by(plan) if by_batch else None)
    timed.plan = plan if by_batch else None
    return timed


def _sorted_rows(inputs: Inputs, kernels: str) -> Timed:
    case = inputs.case
    group = case.heads // case.heads_kv
    attend, build = _compiled(inputs, kernels)
    # What the mask reads: new tensors for each pattern, which does not compile anew for them. A
    # backward needs those of its forward, which no later pattern may change.
    q_order: Any = None
    k_order: Any = None
    q_sorted: Any = None
    k_sorted: Any = None
    places = torch.arange(case.seqlen, device=case.device).expand_as(inputs.q_ids)
    blocks = blocks_of(inputs, kernels)

    def sort() -> Orders:
        """What a new pattern costs before its mask is built."""
        nonlocal q_order, k_order, q_sorted, k_sorted
        q_sorted, q_order = torch.sort(inputs.q_ids, stable=True)
        k_sorted, k_order = torch.sort(inputs.k_ids, stable=True)
        return q_order, k_order, torch.empty_like(q_order).scatter_(-1, q_order, places)

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        g = key_head(h, group)
        same = q_sorted[b, h, i] == k_sorted[b, g, j]
        return same & (q_order[b, h, i] >= k_order[b, g, j])

    def rows(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))

    def plan() -> tuple[Orders, Any]:
        orders = sort()
        sizes = (case.batch, case.heads, case.seqlen, case.seqlen)
        return orders, build(visible, *sizes, device=case.device, **blocks)

    def permuted(make: Callable[[], tuple[Orders, Any]]) -> Callable[..., torch.Tensor]:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            (q_new, k_new, back), mask = make()
            out = attend(rows(q, q_new), rows(k, k_new), rows(v, k_new), block_mask=mask)
            return rows(out, back)

        return run

    given = plan()
    timed = autograd(inputs, permuted(lambda: given), permuted(plan))
    timed.plan = plan
    return timed
