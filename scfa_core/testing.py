"""Random problems, the truth beside them, and the rule by which an answer counts as exact.

Shared by the tests, `scfa verify` and the benchmarks. The rule (docs/numerics.md): against float64,
an answer's error may be at most twice that of the same formula evaluated step by step in the same
dtype, at its maximum and in norm. Only where a tensor is so small that this is a matter of luck are
a few roundings of the intermediates allowed on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from scfa_core import patterns as pt
from scfa_core.reference.attention import attention as reference_attention
from scfa_core.reference.attention import probabilities, spread_heads
from scfa_core.reference.backend import narrow, widen
from scfa_core.reference.gradients import gradients as reference_gradients
from scfa_core.reference.masks import dense_mask

ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
GROUP_STYLES = (
    "uniform",
    "zipf",
    "clustered",
    "single",
    "distinct",
    "extreme",
    "tile-edges",
    "alternating",
    "descending",
    "disjoint",
    "one-huge",
)
KEEP_STYLES = ("uniform", "all", "none", "one-head", "blocks", "floats")
RANGE_STYLES = ("random", "narrow", "reversed", "outside", "sorted", "empty")
SMALL = 4096  # entries that see anything, below which one lucky rounding decides the maximum


@dataclass(frozen=True)
class Part:
    """Recipe of one atomic pattern: kind, style of its random arrays, and one number."""

    kind: str
    style: str = "uniform"
    number: int = 4
    causal: bool = True


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


def _group_ids(
    style: str, rng: np.random.Generator, shape: tuple[int, ...], number: int, side: str
) -> np.ndarray:
    """Integer ids of one side; styles aim at the places where kernels go wrong."""
    seqlen = shape[-1]
    row = np.broadcast_to(np.arange(seqlen), shape)
    number = max(number, 1)
    if style == "zipf":
        return np.minimum(rng.zipf(1.5, shape), number).astype(np.int64)
    if style == "clustered":  # each stretch uses two of the buckets, q and k apart
        stretch = max(seqlen // 6, 1)
        choice = rng.integers(0, number, (*shape[:-1], -(-seqlen // stretch), 2))
        pick = rng.integers(0, 2, shape)
        return np.take_along_axis(
            choice.reshape(*shape[:-1], -1), (row // stretch) * 2 + pick, axis=-1
        )
    if style == "single":
        return np.full(shape, 7, np.int64)
    if style == "distinct":
        return rng.permuted(row, axis=-1)
    if style == "extreme":
        info = np.iinfo(np.int64)
        pool = np.array([info.min, info.min + 1, -1, 0, 1, info.max - 1, info.max])
        return rng.choice(pool, shape)
    if style == "tile-edges":  # group lengths one off the multiples of 8..128
        lengths = rng.choice([8, 16, 32, 64, 128], 64) + rng.integers(-1, 2, 64)
        return _in_runs(rng, shape, lengths)
    if style == "alternating":
        return row % min(number, 2)
    if style == "descending":
        return (seqlen - row) // max(seqlen // number, 1)
    if style == "disjoint":
        return rng.integers(0, number, shape) * 2 + (side == "q")
    if style == "one-huge":
        return np.where(rng.random(shape) < 0.9, 0, row + 1)
    return rng.integers(-(number // 2), number - number // 2, shape)


def _in_runs(rng: np.random.Generator, shape: tuple[int, ...], lengths: np.ndarray) -> np.ndarray:
    """Ids whose groups have the given lengths, scattered over the rows."""
    seqlen = shape[-1]
    ids = np.resize(np.repeat(np.arange(lengths.size), lengths), seqlen)
    return rng.permuted(np.broadcast_to(ids, shape), axis=-1)


def _keep_flags(
    style: str, rng: np.random.Generator, shape: tuple[int, ...], percent: int
) -> np.ndarray:
    if style == "all":
        return np.ones(shape, bool)
    if style == "none":
        return np.zeros(shape, bool)
    keep = rng.random(shape) * 100 < percent
    if style == "one-head":  # one head keeps everything, the others a few
        keep[:, 0] = True
    elif style == "blocks":
        keep = (np.arange(shape[-1]) // 50 + rng.integers(0, 2, (*shape[:-1], 1))) % 2 == 0
    elif style == "floats":
        return keep.astype(np.float32)
    return keep


def _ranges(
    style: str, rng: np.random.Generator, shape: tuple[int, ...], seqlen_k: int
) -> tuple[np.ndarray, np.ndarray]:
    start = rng.integers(0, seqlen_k + 1, shape)
    end = rng.integers(0, seqlen_k + 1, shape)
    if style == "narrow":
        end = start + rng.integers(0, 5, shape)
    elif style == "reversed":
        start, end = np.sort(start)[..., ::-1], np.sort(end)[..., ::-1]
    elif style == "outside":
        big = np.iinfo(np.int64)
        start = rng.choice([big.min, -5, 0, 1, seqlen_k, big.max], shape)
        end = rng.choice([big.min, -1, 0, seqlen_k - 1, seqlen_k + 9, big.max], shape)
    elif style == "sorted":
        start, end = np.sort(start), np.sort(end)
    elif style == "empty":
        end = np.minimum(start, end)
    return start, end


def _build_part(part: Part, spec: Spec, rng: np.random.Generator) -> pt.Pattern:
    q_shape = (spec.batch, spec.heads, spec.seqlen_q)
    k_shape = (spec.batch, spec.heads_kv, spec.seqlen_k)
    if rng.random() < 0.2:  # broadcast heads
        q_shape, k_shape = (spec.batch, 1, spec.seqlen_q), (spec.batch, 1, spec.seqlen_k)
    int_dtype = np.int32 if part.style != "extreme" and rng.random() < 0.5 else np.int64
    if part.kind == "causal":
        align = "bottom-right" if part.number % 2 else "top-left"
        return pt.Causal(include_self=part.causal, align=align)
    if part.kind == "hash":
        q_hash, k_hash = (
            _group_ids(part.style, rng, shape, part.number, side).astype(int_dtype)
            for shape, side in ((q_shape, "q"), (k_shape, "k"))
        )
        include_self = not part.causal or part.number % 3 != 0
        return pt.HashSparse(q_hash, k_hash, causal=part.causal, include_self=include_self)
    if part.kind == "documents":
        shapes = ((spec.batch, spec.seqlen_q), (spec.batch, spec.seqlen_k))
        q_ids, k_ids = (
            np.sort(_group_ids(part.style, rng, shape, part.number, side)).astype(int_dtype)
            for shape, side in zip(shapes, "qk", strict=True)
        )
        return pt.Documents(q_ids, k_ids, causal=part.causal)
    if part.kind == "keep":
        q_keep, k_keep = (
            _keep_flags(part.style, rng, shape, part.number) for shape in (q_shape, k_shape)
        )
        return pt.QKSparse(q_keep, k_keep, causal=part.causal)
    if part.kind == "window":
        return pt.SlidingWindow(part.number, causal=part.causal)
    if part.kind == "ranges":
        start, end = _ranges(part.style, rng, q_shape, spec.seqlen_k)
        return pt.KeyRanges(start.astype(np.int64), end.astype(np.int64))
    raise ValueError(f"no such kind of part: {part.kind!r}")


def build(spec: Spec) -> Case:
    """Make the arrays of `spec`; rows that take no part hold NaN and Inf if `spec.poison`."""
    rng = np.random.default_rng(spec.seed)
    pattern = _build_part(spec.parts[0], spec, rng)
    for part in spec.parts[1:]:
        pattern = pattern & _build_part(part, spec, rng)
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


def random_part(rng: np.random.Generator) -> Part:
    """Draw the recipe of one atomic pattern."""
    kind = str(rng.choice(["causal", "hash", "hash", "documents", "keep", "window", "ranges"]))
    styles = {
        "hash": GROUP_STYLES,
        "documents": GROUP_STYLES,
        "keep": KEEP_STYLES,
        "ranges": RANGE_STYLES,
    }.get(kind, ("uniform",))
    numbers = [20, 50, 80] if kind == "keep" else [0, 1, 2, 3, 5, 16, 70]
    return Part(kind, str(rng.choice(styles)), int(rng.choice(numbers)), bool(rng.random() < 0.7))


def random_length(rng: np.random.Generator, most: int) -> int:
    """Draw a length, mostly beside the edges of tiles."""
    edges = [1, 2, 7, 31, 33, 63, 64, 65, 97, 127, 128, 129, 191, 193, 255, 257]
    if rng.random() < 0.7:
        return min(int(rng.choice(edges)), most)
    return int(rng.integers(1, most + 1))


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


def _clean(case: Case) -> tuple[np.ndarray, ...]:
    """q, k, v, dout in float64 with poisoned rows set to 0 (they take no part)."""
    return tuple(np.where(np.isfinite(x), x, 0.0) for x in case.wide())


def baseline(case: Case) -> Results:
    """The formula as a framework evaluates it: every step rounded to the dtype, sums in float32.

    This is what torch's composite attention does in the same dtype.
    """
    dtype, scale = case.spec.dtype, case.softmax_scale
    acc = np.float64 if dtype == "float64" else np.float32

    def step(x: np.ndarray) -> np.ndarray:
        return widen(narrow(x.astype(np.float64), dtype), dtype).astype(acc)

    q, k, v, dout = (x.astype(acc) for x in _clean(case))
    heads, heads_kv = q.shape[1], k.shape[1]
    k, v = spread_heads(k, heads), spread_heads(v, heads)
    scores = np.where(case.mask, step(step(q @ k.swapaxes(-1, -2)) * acc(scale)), -np.inf)
    row_max = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    row_max = np.where(np.isfinite(row_max), row_max, 0).astype(acc)
    weights = np.exp((scores - row_max).astype(acc))
    row_sum = weights.sum(axis=-1, keepdims=True)
    p = step(weights / np.where(row_sum == 0, 1, row_sum))
    with np.errstate(divide="ignore"):
        lse = (row_max + np.log(row_sum))[..., 0]
    dp = step(dout @ v.swapaxes(-1, -2))
    ds = step(p * (dp - (p * dp).sum(axis=-1, keepdims=True)))

    def summed(x: np.ndarray) -> np.ndarray:
        shape = (x.shape[0], heads_kv, heads // heads_kv, *x.shape[2:])
        return step(x.reshape(shape).sum(axis=2))

    return Results(
        step(p @ v),
        lse,
        step(step(ds @ k) * acc(scale)),
        summed(step(step(ds.swapaxes(-1, -2) @ q) * acc(scale))),
        summed(step(p.swapaxes(-1, -2) @ dout)),
    )


def _rms_product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Size of the rounding noise of ``x @ y``: roots of summed squares, not of absolute values."""
    return np.sqrt(x**2 @ y**2)


def magnitudes(case: Case) -> Results:
    """Typical size of each result's terms: times a unit roundoff, one rounding of each step."""
    q, k, v, dout = _clean(case)
    heads, heads_kv = q.shape[1], k.shape[1]
    scale = abs(case.softmax_scale)
    k, v = spread_heads(k, heads), spread_heads(v, heads)
    p, lse = probabilities(q, k, case.mask, case.softmax_scale)
    moved = 1.0 + scale * (_rms_product(q, k.swapaxes(-1, -2)) + np.abs(q @ k.swapaxes(-1, -2)))
    if case.spec.dtype in ("float32", "float64"):  # p = exp(s - lse), and lse is rounded once
        moved = moved + np.where(np.isfinite(lse), np.abs(lse), 0.0)[..., None]
    p = p * moved
    dp = _rms_product(dout, v.swapaxes(-1, -2))
    ds = p * (dp + np.sqrt(((p * dp) ** 2).sum(axis=-1, keepdims=True)))

    def summed(x: np.ndarray) -> np.ndarray:
        shape = (x.shape[0], heads_kv, heads // heads_kv, *x.shape[2:])
        return np.sqrt((x.reshape(shape) ** 2).sum(axis=2))

    lse_size = np.where(np.isfinite(lse), np.abs(lse), 0.0) + p.max(axis=-1, initial=0.0)
    return Results(
        _rms_product(p, v),
        lse_size,
        scale * _rms_product(ds, k),
        summed(scale * _rms_product(ds.swapaxes(-1, -2), q)),
        summed(_rms_product(p.swapaxes(-1, -2), dout)),
    )


class Verdict(NamedTuple):
    """How one tensor fared: error over allowed error, at its maximum and in norm; fine up to 1."""

    name: str
    max_ratio: float
    norm_ratio: float
    detail: str

    @property
    def ok(self) -> bool:
        """Whether both ratios are within the rule."""
        return self.max_ratio <= 1.0 and self.norm_ratio <= 1.0


def judge(case: Case, got: Results, right: Results | None = None) -> list[Verdict]:
    """Hold `got` (float64 or NumPy arrays, None to leave one out) against the truth by the rule."""
    right = truth(case) if right is None else right
    plain, sizes = baseline(case), magnitudes(case)
    verdicts = []
    for name, mine, true, other, size in zip(
        Results._fields, got, right, plain, sizes, strict=True
    ):
        if mine is not None:
            verdicts.append(_judge_one(name, np.asarray(mine, np.float64), true, other, size, case))
    return verdicts


def _judge_one(
    name: str,
    mine: np.ndarray,
    true: np.ndarray,
    other: np.ndarray,
    size: np.ndarray,
    case: Case,
) -> Verdict:
    if mine.shape != true.shape:
        return Verdict(name, np.inf, np.inf, f"shape {mine.shape}, expected {true.shape}")
    if mine.size == 0:
        return Verdict(name, 0.0, 0.0, "empty")
    special = ~np.isfinite(true)
    same = (mine[special] == true[special]) | (np.isnan(mine[special]) & np.isnan(true[special]))
    wrong = int((~same).sum()) + int((~np.isfinite(mine[~special])).sum())
    if wrong:
        return Verdict(name, np.inf, np.inf, f"{wrong} entries are NaN or Inf, or should be")
    mine, true, other, size = (x[~special] for x in (mine, true, other, size))
    error, plain_error = np.abs(mine - true), np.abs(other - true)
    accumulator = ROUNDOFF["float64" if case.spec.dtype == "float64" else "float32"]
    stored = ROUNDOFF["float32" if name == "lse" else case.spec.dtype]
    luck = 4 * ROUNDOFF[case.spec.dtype] if np.count_nonzero(size) < SMALL else 0.0
    # In float64 the truth has roundings of its own and the plain formula repeats them exactly;
    # nothing coarser hides that a sum of n terms rounds n times.
    longest = max(case.spec.seqlen_q * case.spec.heads // case.spec.heads_kv, case.spec.seqlen_k)
    terms = max(16.0, 2 * longest**0.5) if case.spec.dtype == "float64" else 2.0
    slack = (terms * accumulator + luck) * size + 2 * stored * np.abs(true)
    allowed_max = 2 * plain_error.max(initial=0.0) + slack.max(initial=0.0)
    allowed_norm = 2 * np.linalg.norm(plain_error) + np.linalg.norm(slack)
    tiny = np.finfo(np.float64).tiny
    return Verdict(
        name,
        float(error.max(initial=0.0) / (allowed_max + tiny)),
        float(np.linalg.norm(error) / (allowed_norm + tiny)),
        f"max error {error.max(initial=0.0):.2e}, same-dtype formula "
        f"{plain_error.max(initial=0.0):.2e}",
    )


def run_numpy(case: Case, backend: str) -> tuple[Results, Any]:
    """Run one case through the public API on NumPy arrays: results in float64, and the plan."""
    import scfa_core as scfa

    spec = case.spec
    axes = (0, 2, 1, 3) if spec.layout == "bthd" else (0, 1, 2, 3)
    q, k, v, dout = (
        _as_numpy_kind(x, spec.dtype).transpose(axes) for x in (case.q, case.k, case.v, case.dout)
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


def _as_numpy_kind(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return x
    import ml_dtypes

    return x.view(ml_dtypes.bfloat16)
