"""Random problems: the recipe of each, its arrays, its truth, and how NumPy gives it to a backend.

What an answer may be off by is `testing`'s to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from scfa_core import patterns as pt
from scfa_core.reference.attention import attention as reference_attention
from scfa_core.reference.backend import narrow, widen
from scfa_core.reference.gradients import gradients as reference_gradients
from scfa_core.reference.masks import dense_mask
from scfa_core.testing_parts import Part, build_part, random_length, random_part


@dataclass(frozen=True)
class Spec:
    """Recipe of one problem; `build(spec)` makes the same arrays every time."""

    batch: int = 1
    heads: int = 1
    heads_kv: int = 1
    seqlen_q: int = 16
    seqlen_k: int = 16
    head_dim: int = 16
    head_dim_v: int = 16
    dtype: str = "float32"
    layout: str = "bhtd"
    softmax_scale: float | None = None
    parts: tuple[Part, ...] = (Part("causal"),)
    poison: bool = False
    seed: int = 0


class Results(NamedTuple):
    """out, lse and the three gradients of one problem."""

    out: Any
    lse: Any
    dq: Any
    dk: Any
    dv: Any


@dataclass(frozen=True)
class Case:
    """A problem with its arrays, all (batch, heads, seqlen, ...) NumPy; bfloat16 as uint16 bits."""

    spec: Spec
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    pattern: pt.Pattern
    mask: np.ndarray

    @property
    def softmax_scale(self) -> float:
        """The scale in force."""
        scale = self.spec.softmax_scale
        return self.spec.head_dim**-0.5 if scale is None else scale

    def wide(self) -> tuple[np.ndarray, ...]:
        """q, k, v, dout in float64."""
        return tuple(widen(x, self.spec.dtype) for x in (self.q, self.k, self.v, self.dout))


def build(spec: Spec) -> Case:
    """Make the arrays of `spec`; rows that take no part hold NaN and Inf if `spec.poison`."""
    rng = np.random.default_rng(spec.seed)
    pattern = build_part(spec.parts[0], spec, rng)
    for part in spec.parts[1:]:
        pattern = pattern & build_part(part, spec, rng)
    mask = dense_mask(pattern, spec.batch, spec.heads, spec.heads_kv, spec.seqlen_q, spec.seqlen_k)
    q = rng.standard_normal((spec.batch, spec.heads, spec.seqlen_q, spec.head_dim))
    k = rng.standard_normal((spec.batch, spec.heads_kv, spec.seqlen_k, spec.head_dim))
    v = rng.standard_normal((spec.batch, spec.heads_kv, spec.seqlen_k, spec.head_dim_v))
    dout = rng.standard_normal((*q.shape[:3], spec.head_dim_v))
    if spec.poison:
        blind = ~mask.any(axis=-1)
        group = spec.heads // spec.heads_kv
        seen = mask.reshape(spec.batch, spec.heads_kv, group, spec.seqlen_q, spec.seqlen_k)
        unseen = ~seen.any(axis=(2, 3))
        for x, rows in ((q, blind), (dout, blind), (k, unseen), (v, unseen)):
            x[rows] = rng.choice([np.nan, np.inf, -np.inf], (int(rows.sum()), 1))
    q, k, v, dout = (narrow(x, spec.dtype) for x in (q, k, v, dout))
    return Case(spec, q, k, v, dout, pattern, mask)


def random_spec(
    seed: int,
    *,
    most_rows: int = 200,
    dtypes: tuple[str, ...] = ("float32",),
    head_dims: tuple[int, ...] = (16, 24, 32, 64, 80, 128),
    most_parts: int = 3,
) -> Spec:
    """Draw a problem; the same seed and options give the same one on every machine."""
    rng = np.random.default_rng([seed, 20230601])
    heads_kv = int(rng.choice([1, 1, 2, 3]))
    seqlen_q = random_length(rng, most_rows)
    return Spec(
        batch=int(rng.choice([1, 1, 2])),
        heads=heads_kv * int(rng.choice([1, 1, 2, 4])),
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_q if rng.random() < 0.5 else random_length(rng, most_rows),
        head_dim=int(rng.choice(head_dims)),
        head_dim_v=int(rng.choice(head_dims)),
        dtype=str(rng.choice(dtypes)),
        layout=str(rng.choice(["bhtd", "bthd"])),
        softmax_scale=[None, None, 0.0, 0.3, -0.2][int(rng.integers(5))],
        parts=tuple(random_part(rng) for _ in range(int(rng.integers(1, most_parts + 1)))),
        poison=bool(rng.random() < 0.5),
        seed=seed,
    )


def truth(case: Case) -> Results:
    """Float64 results from the dense mask: no plan, no backend."""
    q, k, v, dout = case.wide()
    out, lse = reference_attention(q, k, v, case.mask, case.softmax_scale)
    return Results(out, lse, *reference_gradients(dout, q, k, v, case.mask, case.softmax_scale))


def run_numpy(case: Case, backend: str) -> tuple[Results, Any]:
    """Run one case through the public API on NumPy arrays: results in float64, and the plan."""
    import scfa_core as scfa

    spec = case.spec
    axes = (0, 2, 1, 3) if spec.layout == "bthd" else (0, 1, 2, 3)
    q, k, v, dout = (
        as_numpy_kind(x, spec.dtype).transpose(axes) for x in (case.q, case.k, case.v, case.dout)
    )
    options: dict[str, Any] = {
        "softmax_scale": spec.softmax_scale,
        "layout": spec.layout,
        "backend": backend,
    }
    plan = scfa.make_plan(case.pattern, q, k, layout=spec.layout, backend=backend)
    out, lse = scfa.attention(q, k, v, plan, return_lse=True, **options)
    grads = scfa.attention_backward(dout, q, k, v, out, lse, plan, **options)
    wide = [x.astype(np.float64).transpose(axes) for x in (out, *grads)]
    return Results(wide[0], lse.astype(np.float64), *wide[1:]), plan


def as_numpy_kind(x: np.ndarray, dtype: str) -> np.ndarray:
    """The same values as a NumPy array may hold them: bits of bfloat16 get their type."""
    if dtype != "bfloat16":
        return x
    import ml_dtypes

    return x.view(ml_dtypes.bfloat16)


def as_torch(x: np.ndarray, dtype: str, device: str) -> Any:
    """The same values as a torch tensor on a device: bits of bfloat16 get their type."""
    import torch

    if dtype == "bfloat16" and x.dtype == np.uint16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(np.ascontiguousarray(x)).to(device)
