"""FlexAttention as its user pays for it: rows permuted where that helps, mask built, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.inputs import Inputs
from bench.timed import CannotRun, Timed, autograd

Visible = Callable[[Any, Any, Any, Any], Any]  # mask_mod: batch, head, query, key -> seen or not


def flex(inputs: Inputs) -> Timed:
    """FlexAttention on any case whose heads are not grouped.

    Hash patterns are sorted by bucket first, which is what leaves whole blocks out; the other
    patterns keep the order of rows. A pattern that is new at every call has its mask built in the
    timed forward; dense causal and windows have theirs built once, outside.
    """
    case = inputs.case
    if case.heads != case.heads_kv:
        raise CannotRun("grouped heads are not written for FlexAttention here")
    if case.kind in ("hash", "samehash"):
        return _sorted_rows(inputs)
    return _rows_in_place(inputs)


def _compiled() -> tuple[Callable[..., torch.Tensor], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention, dynamic=False)
    return attend, torch.compile(create_block_mask, dynamic=False)


def mask_of(inputs: Inputs) -> tuple[Visible, bool, bool]:
    """mask_mod of a pattern whose rows stay in place; whether it differs by batch, by head."""
    case, first, second = inputs.case, inputs.q_ids, inputs.k_ids
    if case.kind == "dense":
        return lambda b, h, i, j: i >= j, False, False
    if case.kind == "window":
        return lambda b, h, i, j: (i >= j) & (i - j < case.number), False, False
    if case.kind == "docs":
        return lambda b, h, i, j: (i >= j) & (first[b, i] == first[b, j]), True, False
    if case.kind == "qk":
        return lambda b, h, i, j: (i >= j) & first[b, h, i] & second[b, h, j], True, True
    return lambda b, h, i, j: (first[b, h, i] <= j) & (j < second[b, h, i]), True, True


def _rows_in_place(inputs: Inputs) -> Timed:
    case = inputs.case
    visible, by_batch, by_head = mask_of(inputs)
    attend, build = _compiled()
    if not by_batch:  # small enough to be built without compiling, which takes a minute
        from torch.nn.attention.flex_attention import create_block_mask as build
    batch, heads = case.batch if by_batch else None, case.heads if by_head else None

    def plan() -> Any:
        return build(visible, batch, heads, case.seqlen, case.seqlen, device=case.device)

    block_mask = plan()
    timed = autograd(inputs, lambda q, k, v: attend(q, k, v, block_mask=block_mask))
    if by_batch:
        timed.plan, timed.planned = plan, timed.forward

        def whole() -> torch.Tensor:
            with torch.no_grad():
                return attend(inputs.q, inputs.k, inputs.v, block_mask=plan())

        timed.forward = whole
    return timed


def _sorted_rows(inputs: Inputs) -> Timed:
    case = inputs.case
    attend, build = _compiled()
    # The mask reads these four in place, so that a new pattern does not compile anew.
    q_order, k_order, back = (torch.empty_like(inputs.q_ids, dtype=torch.int64) for _ in range(3))
    q_sorted, k_sorted = torch.empty_like(inputs.q_ids), torch.empty_like(inputs.k_ids)
    places = torch.arange(case.seqlen, device=case.device).expand_as(back)

    def sort() -> None:
        """What a new pattern costs before its mask is built."""
        torch.sort(inputs.q_ids, stable=True, out=(q_sorted, q_order))
        torch.sort(inputs.k_ids, stable=True, out=(k_sorted, k_order))
        back.scatter_(-1, q_order, places)

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        same = q_sorted[b, h, i] == k_sorted[b, h, j]
        return same & (q_order[b, h, i] >= k_order[b, h, j])

    def rows(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))

    def plan() -> Any:
        sort()
        sizes = (case.batch, case.heads, case.seqlen, case.seqlen)
        return build(visible, *sizes, device=case.device)

    def permuted(mask: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attend(rows(q, q_order), rows(k, k_order), rows(v, k_order), block_mask=mask)
        return rows(out, back)

    block_mask = plan()
    timed = autograd(inputs, lambda q, k, v: permuted(block_mask, q, k, v))
    timed.plan = plan
    timed.planned = timed.forward

    def whole() -> torch.Tensor:
        with torch.no_grad():
            return permuted(plan(), inputs.q, inputs.k, inputs.v)

    timed.forward = whole
    return timed
