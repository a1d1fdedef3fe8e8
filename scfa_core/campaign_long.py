"""Problems of up to 131072 rows, judged to the last entry: ``scfa verify --deep --long N``.

Few heads, lengths beside powers of two and primes, patterns whose visible pairs can be counted in
seconds. An error at the far end of a long problem is small beside the largest entries of the whole,
so the rule is asked of every stretch of rows by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from scfa_core import campaign, campaign_clauses, testing
from scfa_core import patterns as pt
from scfa_core.campaign import DeepProblem
from scfa_core.campaign_blocks import (
    Answers,
    count_visible,
    evaluate,
    numbers_on,
    stored_out_sizes,
)
from scfa_core.campaign_clauses import Shapes
from scfa_core.campaign_judge import visible
from scfa_core.patterns.base import map_arrays
from scfa_core.reference.backend import narrow
from scfa_core.testing import Case, Part, Results, Spec, Verdict
from scfa_core.verify_against import multiplies_tf32, on_host

if TYPE_CHECKING:
    from scfa_core.verify_findings import Finding

LONG_ROWS = 131_072
LENGTHS = (
    *(4097, 131_071, 131_072),
    *(2**k + one for k in range(13, 17) for one in (-1, 0, 1)),
    *(4099, 5003, 6007, 10_007, 12_289, 20_011, 24_593, 40_009, 50_021, 80_021, 100_003),
)  # the last line are primes
FAMILIES = ("buckets", *campaign_clauses.FAMILIES, "window", "causal")
ENTRIES = 2**23  # of q: what long problems may have in heads they lack in rows
HOST_PAIRS, CUDA_PAIRS = 2**24, 2**32  # visible (query, key) pairs of all heads, about
LOOKED_AT = 64  # queries of each head from which the pairs are estimated
DRAWS = 30
SINK_EVERY, SINK_LEAD = 4096, 17.0  # keys, and nats by which their scores lead all others
STRETCH, STRETCH_OF_LSE = 512, 4096  # rows judged together: never fewer than SMALL entries


def _length(rng: np.random.Generator, most: int) -> int:
    fitting = [n for n in LENGTHS if n <= most]
    return int(rng.choice(fitting)) if fitting else most


def _clause(rng: np.random.Generator, shapes: Shapes, family: str, seed: int) -> pt.Pattern:
    """One pattern of a family: those of `campaign_clauses`, and hashes to few or many buckets."""
    causal = bool(rng.random() < 0.8)
    if family == "causal":
        return pt.Causal(seed % 2 == 0, "bottom-right" if rng.random() < 0.5 else "top-left")
    if family == "window":
        return pt.SlidingWindow(int(rng.choice([1, 63, 64, 1000, 4097])), causal=causal)
    if family == "buckets":
        number = int(rng.choice([8, 64, 1000, 8192]))
        q_hash, k_hash = (rng.integers(0, number, shape, np.int32) for shape in shapes)
        return pt.HashSparse(q_hash, k_hash, causal=causal)
    return campaign_clauses.draw_clause(rng, shapes, family, seed)


def draw(seed: int, *, most_rows: int, most_pairs: int, dtypes: tuple[str, ...]) -> DeepProblem:
    """Draw a problem; the same seed and options give the same one on every machine.

    Clauses that show nothing, or more than `most_pairs`, are drawn anew, later with fewer rows.
    """
    spec: Spec
    pattern: pt.Pattern
    for attempt in range(DRAWS):
        rng = np.random.default_rng([seed, 131_072, attempt])
        most = max(most_rows >> max(attempt - 5, 0), 64)
        spec, pattern = _draw(rng, seed, most, dtypes)
        pairs = _estimated_pairs(spec, pattern)
        if pairs <= most_pairs and (pairs > 0 or spec.parts[0].kind == "empty"):
            break
    rng = np.random.default_rng([seed, 131_072])
    views = [str(rng.choice(campaign.VIEWS)) for _ in range(3)]
    views.append(str(rng.choice(campaign.VIEWS_OF_DOUT)))
    if spec.poison:  # heads that share memory hold the same, which poisoned ones do not
        views = ["plain" if view == "expanded" else view for view in views]
    q_rows, k_rows = (
        (spec.batch, spec.heads, spec.seqlen_q),
        (spec.batch, spec.heads_kv, spec.seqlen_k),
    )
    shapes = (
        (*q_rows, spec.head_dim),
        (*k_rows, spec.head_dim),
        (*k_rows, spec.head_dim_v),
        (*q_rows, spec.head_dim_v),
    )
    tensors: list[np.ndarray] = []
    for shape, view in zip(shapes, views, strict=True):
        x = rng.standard_normal(shape, np.float32)
        x = np.broadcast_to(x[:, :1], shape).copy() if view == "expanded" else x
        tensors.append(x)
    if rng.random() < 0.3 and spec.softmax_scale != 0.0:
        _add_sinks(spec, tensors[0], tensors[1])
        spec = replace(spec, parts=(*spec.parts, Part("sinks", "long")))
    q, k, v, dout = (narrow(x, spec.dtype) for x in tensors)
    case = Case(spec, q, k, v, dout, pattern, np.zeros((0,), bool))
    return DeepProblem(case, tuple(views))


def _add_sinks(spec: Spec, q: np.ndarray, k: np.ndarray) -> None:
    """Let every 4096th key outweigh all others: one of these is too small for the sum of a row.

    Together they are not: sums that take them one by one lose them.
    """
    scale = spec.head_dim**-0.5 if spec.softmax_scale is None else spec.softmax_scale
    size = (SINK_LEAD / abs(scale)) ** 0.5
    q[..., 0] = size
    k[..., 0] = 0.0
    k[:, :, ::SINK_EVERY, 0] = size * np.sign(scale)


def _draw(
    rng: np.random.Generator, seed: int, most_rows: int, dtypes: tuple[str, ...]
) -> tuple[Spec, pt.Pattern]:
    """One attempt: sizes and pattern."""
    family = FAMILIES[seed % len(FAMILIES)]
    seqlen_q = _length(rng, most_rows)
    seqlen_k = seqlen_q if rng.random() < 0.7 else _length(rng, most_rows)
    heads, heads_kv = [(1, 1), (1, 1), (2, 1), (2, 2), (3, 1), (3, 3)][int(rng.integers(6))]
    widest = ENTRIES // max(seqlen_q, seqlen_k)  # columns of all heads
    heads, heads_kv = (1, 1) if heads * 16 > widest else (heads, heads_kv)
    dims = [dim for dim in (16, 32, 64, 128) if heads * dim <= max(widest, 16)]
    shapes = Shapes((1, heads, seqlen_q), (1, heads_kv, seqlen_k))
    pattern = _clause(rng, shapes, family, seed // len(FAMILIES))
    families = [family]
    for _ in range(int(rng.choice([0, 0, 0, 1, 2]))):
        families.append(str(rng.choice(["buckets", "drops", "packed", "window", "causal"])))
        pattern = pattern & _clause(rng, shapes, families[-1], int(rng.integers(96)))
    spec = Spec(
        *(1, heads, heads_kv, seqlen_q, seqlen_k),
        head_dim=int(rng.choice(dims)),
        head_dim_v=int(rng.choice(dims)),
        dtype=str(rng.choice(dtypes)),
        layout=str(rng.choice(["bhtd", "bthd"])),
        softmax_scale=[None, None, None, 0.0, 0.3, -0.2][int(rng.integers(6))],
        parts=tuple(Part(name, "long") for name in families),
        poison=bool(rng.random() < 0.5),
        seed=seed,
    )
    return spec, pattern


def _estimated_pairs(spec: Spec, pattern: pt.Pattern) -> float:
    """Visible pairs of all heads, from some queries of each."""
    rows = np.unique(np.linspace(0, spec.seqlen_q - 1, LOOKED_AT).astype(int))
    seen = [visible(pattern, spec, b, h, rows).sum() for b, h in np.ndindex(spec.batch, spec.heads)]
    return float(sum(seen)) * spec.seqlen_q / rows.size


def poisoned(case: Case, counts: np.ndarray, seen: np.ndarray) -> Case:
    """The case with NaN and Inf in the rows that `count_visible` found to take no part."""
    rng = np.random.default_rng(case.spec.seed)
    found = []
    for x, rows in (
        (case.q, counts == 0),
        (case.k, ~seen),
        (case.v, ~seen),
        (case.dout, counts == 0),
    ):
        bad = rng.choice([np.nan, np.inf, -np.inf], (int(rows.sum()), 1))
        x = x.copy()
        x[rows] = narrow(bad, case.spec.dtype)
        found.append(x)
    q, k, v, dout = found
    return replace(case, q=q, k=k, v=v, dout=dout)


def stretch_verdicts(
    case: Case,
    got: Results,
    answers: Answers,
    of_out: dict[str, np.ndarray],
    *,
    tf32: bool = False,
) -> Iterator[Verdict]:
    """The worst stretch of rows of each result; `of_out` as `stored_out_sizes` finds it."""
    for name in Results._fields:
        tensors = [np.asarray(getattr(x, name), np.float64) for x in (got, *answers)]
        if tensors[0].shape != tensors[1].shape:
            yield Verdict(name, np.inf, np.inf, f"shape {tensors[0].shape}")
            continue
        verdicts = []
        length = STRETCH_OF_LSE if name == "lse" else STRETCH
        for b, h in np.ndindex(tensors[0].shape[:2]):
            for first in range(0, tensors[0].shape[2], length):
                mine, true, plain, size = (x[b, h, first : first + length] for x in tensors)
                from_out = of_out[name][b, h, first : first + length] if name in of_out else None
                found = testing.judge_tensor(
                    name, mine, true, plain, size, case, from_out=from_out, tf32=tf32
                )
                where = f"; head {h}, rows from {first}"
                verdicts.append(found._replace(detail=found.detail + where))
        yield max(verdicts, key=lambda v: max(v.max_ratio, v.norm_ratio))


def count_verdict(case: Case, plan: dict[str, np.ndarray], counts: np.ndarray) -> Verdict:
    """Whether the plan shows every query as many keys as its mask does."""
    mine = np.zeros_like(counts)
    np.put_along_axis(mine, plan["q_index"], plan["key_end"] - plan["key_start"], axis=-1)
    wrong = int((mine != counts).sum())
    return Verdict("plan", *((np.inf,) * 2 if wrong else (0.0, 0.0)), f"{wrong} queries see others")


def verify_long(
    backend: str,
    seed: int,
    *,
    most_rows: int,
    dtypes: tuple[str, ...],
    against: str | None = None,
    repeat: int = 0,
) -> Finding:
    """Run one problem forward and backward, hold everything against truth and reference plan."""
    from scfa_core.verify import crash, hold

    names = [name for name in (backend, against) if name is not None]
    host = on_host(*names)
    most_pairs = HOST_PAIRS if host else CUDA_PAIRS
    problem = draw(seed, most_rows=most_rows, most_pairs=most_pairs, dtypes=dtypes)
    case, spec = problem.case, problem.case.spec
    told = f" (views of q, k, v, dout: {problem.views})"
    try:
        device = "numpy" if host else "cuda"
        numbers = numbers_on(device, spec.dtype)
        pattern = map_arrays(case.pattern, numbers.integers)
        counts, seen = count_visible(numbers, pattern, spec)
        if spec.poison:
            case = poisoned(case, counts, seen)
            problem = replace(problem, case=case)
        answers = {
            tf32: evaluate(numbers_on(device, spec.dtype, tf32=tf32), case, pattern)
            for tf32 in {multiplies_tf32(name, spec) for name in names}
        }
        of_out = stored_out_sizes(numbers, case, pattern)
    except Exception as error:  # one bad problem must not hide its seed
        return crash(error, spec, told)
    return hold(
        case,
        (backend, against),
        run=lambda name: campaign.run(problem, name),
        judge=lambda got, plan, tf32: [
            count_verdict(case, plan, counts),
            *stretch_verdicts(case, got, answers[tf32], of_out, tf32=tf32),
        ],
        answers=answers,
        repeat=repeat,
        told=told,
    )
