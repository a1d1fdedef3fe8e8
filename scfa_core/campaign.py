"""Structured problems beyond `testing.random_spec`: what ``scfa verify --deep`` runs.

Each aims at ways in which tiles, groups or lists go wrong: up to four clauses of `campaign_clauses`
at once, inputs that are views. Short problems are held against the dense truth; long ones, where
that is quadratic, at sampled queries and keys.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scfa_core import patterns as pt
from scfa_core import testing
from scfa_core.campaign_clauses import FAMILIES, MORE, Shapes, draw_clause, further_clause
from scfa_core.campaign_judge import sampled_verdicts, visible
from scfa_core.dispatch import load_backend
from scfa_core.patterns.base import map_arrays
from scfa_core.reference.backend import narrow
from scfa_core.reference.masks import dense_mask
from scfa_core.testing import Case, Part, Results, Spec

if TYPE_CHECKING:
    from scfa_core.verify_findings import Finding

DEEP_ROWS = 4096
DENSE_PAIRS = 2**19  # (query, key) pairs of all heads up to which the whole truth is computed
DRAWS = 20  # attempts to draw clauses that show something together
VIEWS = ("plain", "columns", "rows", "offset", "other-layout", "expanded", "backwards")
VIEWS_OF_DOUT = (*VIEWS, "last-axis")
HEAD_DIMS, HEAD_DIMS_V = (16, 24, 32, 64, 72, 128), (16, 32, 40, 64, 128)


def _length(rng: np.random.Generator, most: int) -> int:
    """Mostly beside a multiple of 8 up to 320; sometimes up to `most`."""
    draw = rng.random()
    if draw < 0.8:
        return min(max(8 * int(rng.integers(0, 41)) + int(rng.integers(-1, 2)), 1), most)
    if draw < 0.95:
        return min(int(rng.integers(1, 1025)), most)
    return int(rng.integers(1, most + 1))


@dataclass(frozen=True)
class DeepProblem:
    """A case (its mask empty where it would be too large), and how the inputs are laid out."""

    case: Case
    views: tuple[str, ...]  # of q, k, v, dout

    @property
    def dense(self) -> bool:
        """Whether the case has its mask."""
        return self.case.mask.size > 0


class Drawn(NamedTuple):
    """A problem before its tensors: what a plan needs."""

    spec: Spec
    pattern: pt.Pattern
    mask: np.ndarray  # empty where it would be too large
    rng: np.random.Generator  # draws the rest


def draw(
    seed: int, *, most_rows: int = DEEP_ROWS, dtypes: tuple[str, ...], changed: bool = False
) -> DeepProblem:
    """Draw a problem; the same seed and options give the same one on every machine."""
    if changed:
        from scfa_core import campaign_changes

        return fill(campaign_changes.draw_pattern(seed, most_rows=most_rows, dtypes=dtypes))
    return fill(draw_pattern(seed, most_rows=most_rows, dtypes=dtypes))


def draw_pattern(seed: int, *, most_rows: int, dtypes: tuple[str, ...]) -> Drawn:
    """Draw sizes and clauses of a problem.

    Clauses that show nothing together are drawn anew, but where the family is "empty".
    """
    for attempt in range(DRAWS):
        again = [attempt] if attempt else []  # the first draw of a seed is what it always was
        rng = np.random.default_rng([seed, 16020603, *again])
        spec, pattern = _draw(rng, seed, most_rows, dtypes)
        drawn = Drawn(spec, pattern, mask_of(spec, pattern), rng)
        if spec.parts[0].kind == "empty" or shows_something(drawn):
            break
    return drawn


def mask_of(spec: Spec, pattern: pt.Pattern) -> np.ndarray:
    """The dense mask, empty where it would be too large."""
    sizes = (spec.batch, spec.heads, spec.heads_kv, spec.seqlen_q, spec.seqlen_k)
    if spec.batch * spec.heads * spec.seqlen_q * spec.seqlen_k > DENSE_PAIRS:
        return np.zeros((0,), bool)
    return dense_mask(pattern, *sizes)


def shows_something(drawn: Drawn) -> bool:
    """Whether any query sees a key; of problems without a mask, any of some queries."""
    spec = drawn.spec
    if drawn.mask.size > 0:
        return bool(drawn.mask.any())
    rows = np.unique(np.linspace(0, spec.seqlen_q - 1, 64).astype(int))
    return any(
        visible(drawn.pattern, spec, b, h, rows).any()
        for b, h in np.ndindex(spec.batch, spec.heads)
    )


def _draw(
    rng: np.random.Generator, seed: int, most_rows: int, dtypes: tuple[str, ...]
) -> tuple[Spec, pt.Pattern]:
    """One attempt of `draw_pattern`."""
    family = FAMILIES[seed % len(FAMILIES)]
    heads_kv, batch = int(rng.choice([1, 1, 2, 3])), int(rng.choice([1, 1, 2]))
    heads = heads_kv * int(rng.choice([1, 1, 2, 3, 4]))
    seqlen_q = _length(rng, most_rows)
    seqlen_k = seqlen_q if rng.random() < 0.5 else _length(rng, most_rows)
    shapes = Shapes((batch, heads, seqlen_q), (batch, heads_kv, seqlen_k))
    pattern = draw_clause(rng, shapes, family, seed // len(FAMILIES))
    families = [family]
    for _ in range(int(rng.choice([0, 0, 1, 1, 2, 3]))):
        more = str(rng.choice(MORE))
        clause = further_clause(rng, shapes, more, seed)
        pattern = pattern & clause
        families.append(more)
    spec = Spec(
        *(batch, heads, heads_kv, seqlen_q, seqlen_k),
        head_dim=int(rng.choice(HEAD_DIMS)),
        head_dim_v=int(rng.choice(HEAD_DIMS_V)),
        dtype=str(rng.choice(dtypes)),
        layout=str(rng.choice(["bhtd", "bthd"])),
        softmax_scale=[None, None, None, 0.0, 0.3, -0.2][int(rng.integers(6))],
        parts=tuple(Part(name, "deep") for name in families),
        poison=bool(rng.random() < 0.5),
        seed=seed,
    )
    return spec, pattern


def fill(drawn: Drawn) -> DeepProblem:
    """Draw the tensors of a problem, and how they are laid out."""
    spec, pattern, mask, rng = drawn
    q_rows = (spec.batch, spec.heads, spec.seqlen_q)
    k_rows = (spec.batch, spec.heads_kv, spec.seqlen_k)
    q, k, v, dout = (
        rng.standard_normal((*shape, dim))
        for shape, dim in (
            (q_rows, spec.head_dim),
            (k_rows, spec.head_dim),
            (k_rows, spec.head_dim_v),
            (q_rows, spec.head_dim_v),
        )
    )
    views = tuple(map(str, (*rng.choice(VIEWS, 3), rng.choice(VIEWS_OF_DOUT))))
    if spec.poison and mask.size > 0:
        _poison(rng, mask, q, k, v, dout)
    if spec.poison:  # heads that share memory hold the same, which poisoned ones do not
        views = tuple("plain" if view == "expanded" else view for view in views)
    q, k, v, dout = (
        narrow(np.broadcast_to(x[:, :1], x.shape) if view == "expanded" else x, spec.dtype)
        for x, view in zip((q, k, v, dout), views, strict=True)
    )
    return DeepProblem(Case(spec, q, k, v, dout, pattern, mask), views)


def _poison(rng: np.random.Generator, mask: np.ndarray, *tensors: np.ndarray) -> None:
    """NaN and Inf into rows that take no part; tensors are q, k, v, dout."""
    q, k, v, dout = tensors
    blind = ~mask.any(axis=-1)
    batch, heads_kv, seqlen_k = k.shape[:3]
    unseen = ~mask.reshape(batch, heads_kv, -1, seqlen_k).any(axis=2)
    for x, rows in ((q, blind), (dout, blind), (k, unseen), (v, unseen)):
        x[rows] = rng.choice([np.nan, np.inf, -np.inf], (int(rows.sum()), 1))


# Running -----------------------------------------------------------------------------------------


def _view(x: np.ndarray, view: str, to_device: Callable[[np.ndarray], Any], numpy: bool) -> Any:
    """The values of `x` on the device, as a view of something larger or of another order."""
    batch, heads, rows, dim = x.shape
    if view == "columns":
        wide = np.full((batch, heads, rows, dim + 24), 1, x.dtype)
        wide[..., 8 : 8 + dim] = x
        return to_device(wide)[..., 8 : 8 + dim]
    if view == "rows":
        return to_device(np.repeat(x, 2, axis=2))[:, :, ::2]
    if view == "last-axis":
        return to_device(np.repeat(x, 2, axis=-1))[..., ::2]
    if view == "offset":  # rows not aligned to 16 bytes
        flat = np.concatenate([np.zeros(3, x.dtype), x.ravel()])
        return to_device(flat)[3:].reshape(x.shape)
    if view == "other-layout":
        return to_device(np.ascontiguousarray(x.swapaxes(1, 2))).swapaxes(1, 2)
    if view == "expanded":
        one = to_device(np.ascontiguousarray(x[:, :1]))
        return np.broadcast_to(one, x.shape) if numpy else one.expand(*x.shape)
    if view == "backwards" and numpy:
        return np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1]
    return to_device(np.ascontiguousarray(x))


def run(problem: DeepProblem, backend: str) -> tuple[Results, dict[str, np.ndarray]]:
    """Run one problem through the public API: results and plan in NumPy, heads first."""
    on_host = getattr(load_backend(backend), "memory", "host") == "host"
    bits = problem.case.spec.dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None
    if on_host and not bits:
        return run_in(problem, backend, *_numpy_ways(), numpy=True)
    return run_in(problem, backend, *_torch_ways("cpu" if on_host else "cuda"), numpy=False)


def run_in(
    problem: DeepProblem,
    backend: str,
    to_device: Callable[..., Any],
    to_host: Callable[..., Any],
    *,
    numpy: bool,
) -> tuple[Results, dict[str, np.ndarray]]:
    """`run` with the arrays of one library: ``to_device(x, dtype)`` makes them."""
    from scfa_core.verify import call

    case, spec = problem.case, problem.case.spec

    def typed(x: np.ndarray) -> Any:
        return to_device(x, spec.dtype)

    tensors = [
        _view(testing.as_numpy_kind(x, spec.dtype) if numpy else x, view, typed, numpy)
        for x, view in zip((case.q, case.k, case.v, case.dout), problem.views, strict=True)
    ]
    pattern = map_arrays(case.pattern, lambda x: to_device(np.ascontiguousarray(x), ""))
    return call(spec, backend, tensors, pattern, to_host)


def _numpy_ways() -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (lambda x, dtype: x), (lambda x: x.astype(np.float64))


def _torch_ways(device: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return partial(testing.as_torch, device=device), lambda x: x.detach().double().cpu().numpy()


def verify_deep(
    backend: str,
    seed: int,
    *,
    most_rows: int,
    dtypes: tuple[str, ...],
    against: str | None = None,
    changed: bool = False,
    repeat: int = 0,
) -> Finding:
    """Run one problem forward and backward, hold everything against truth and reference plan."""
    from scfa_core.verify import hold

    problem = draw(seed, most_rows=most_rows, dtypes=dtypes, changed=changed)
    case = problem.case

    def judge(got: Results, plan: dict[str, np.ndarray], tf32: bool) -> list[testing.Verdict]:
        if problem.dense:
            return testing.judge(case, got, tf32=tf32)
        return sampled_verdicts(case, got, plan, tf32=tf32)

    return hold(
        case,
        (backend, against),
        run=lambda name: run(problem, name),
        judge=judge,
        repeat=repeat,
        told=f" (views of q, k, v, dout: {problem.views})",
    )
