"""The reference behind the backend interface: host arrays, float64 inside, quadratic memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from scfa_core.reference import attention as _attention
from scfa_core.reference import gradients as _gradients
from scfa_core.reference import planner as _planner


def widen(x: np.ndarray, dtype: str) -> np.ndarray:
    """Copy to float64; bfloat16 comes as uint16 bits, the upper half of a float32."""
    if dtype == "bfloat16":
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def narrow(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round float64 to `dtype`, to nearest even; bfloat16 as uint16 bits."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "bfloat16":
            return x.astype(dtype)
        single = _round_to_odd(x)
        bits = single.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(single), quiet_nan, rounded >> np.uint32(16)).astype(np.uint16)


def _round_to_odd(x: np.ndarray) -> np.ndarray:
    """float64 to float32, inexact results made odd, so that rounding on to bfloat16 is right."""
    single = x.astype(np.float32)
    inexact = np.isfinite(single) & (single.astype(np.float64) != x)
    toward_zero = np.where(np.abs(single.astype(np.float64)) > np.abs(x), -1, 0)
    bits = single.view(np.int32) + np.where(inexact, toward_zero, 0).astype(np.int32)
    return np.where(inexact, bits | 1, bits).astype(np.int32).view(np.float32)


def mask_of(plan: Any, group_size: int) -> np.ndarray:
    """The dense mask that a plan's ranges describe, query by query."""
    batch, heads, seqlen_q = plan.q_index.shape
    seqlen_k = plan.k_index.shape[2]
    mask = np.zeros((batch, heads, seqlen_q, seqlen_k), bool)
    for b in range(batch):
        for h in range(heads):
            keys = plan.k_index[b, h // group_size]
            for r in range(seqlen_q):
                seen = keys[plan.key_start[b, h, r] : plan.key_end[b, h, r]]
                mask[b, h, plan.q_index[b, h, r], seen] = True
    return mask


class ReferenceBackend:
    """Slow and right. Chosen only by name."""

    name = "reference"
    memory = "host"

    def availability(self) -> str | None:
        """Return None: NumPy is always there."""
        return None

    def can_run(self, problem: Any) -> str | None:
        """Return None: every problem on the host."""
        return None

    def make_plan(self, problem: Any, clauses: Any, plan: Any, ctx: Any) -> None:
        """Fill `plan` by the plain planner."""
        lists = _planner.plan_lists(
            clauses,
            problem.batch,
            problem.heads,
            problem.heads_kv,
            problem.seqlen_q,
            problem.seqlen_k,
        )
        for target, values in zip(plan[:6], lists, strict=True):
            target[...] = values

    def forward(
        self,
        problem: Any,
        plan: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        ctx: Any,
    ) -> None:
        """Write out and lse."""
        q, k, v = (widen(x, problem.dtype) for x in (q, k, v))
        mask = mask_of(plan, problem.group_size)
        result, result_lse = _attention.attention(q, k, v, mask, problem.softmax_scale)
        out[...] = narrow(result, problem.dtype)
        lse[...] = result_lse

    def backward(
        self,
        problem: Any,
        plan: Any,
        dout: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        dq: Any,
        dk: Any,
        dv: Any,
        ctx: Any,
    ) -> None:
        """Write dq, dk, dv; out and lse are computed anew rather than trusted.

        But for rows whose lse is that of several patterns merged.
        """
        dout, q, k, v, out = (widen(x, problem.dtype) for x in (dout, q, k, v, out))
        mask = mask_of(plan, problem.group_size)
        scale = problem.softmax_scale
        grads = _gradients.gradients(dout, q, k, v, mask, scale, (out, lse))
        for target, values in zip((dq, dk, dv), grads, strict=True):
            target[...] = narrow(values, problem.dtype)


BACKEND = ReferenceBackend()
