"""Decoding: queries that are the last rows of a longer sequence, and keys that lie in pieces.

Patterns count positions of queries and keys from 0. With a cache the queries are the last rows, so
that they stand at ``seqlen_k - seqlen_q`` and on: `at_end` says that of any pattern. Keys of a
shared prefix and keys of a cache need not be put together: `attention_in_parts` merges exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scfa_core.api import attention
from scfa_core.array_kinds import adopt, check_dense, is_torch_tensor
from scfa_core.errors import DTypeError, PatternError, ShapeError
from scfa_core.merging import as_list, check_sinks, merge_attention, merge_sinks, namespace
from scfa_core.patterns import (
    Causal,
    Documents,
    HashSparse,
    Intersection,
    KeyRanges,
    Pattern,
    QKSparse,
    SlidingWindow,
)
from scfa_core.plan import Plan
from scfa_core.problem import check_flag, check_layout

__all__ = ["at_end", "attention_in_parts"]


def at_end(pattern: Pattern, q: Any, k: Any, *, layout: str = "bhtd") -> Pattern:
    """Move the queries of a pattern to the end: row i stands at ``seqlen_k - seqlen_q + i``.

    >>> import numpy as np
    >>> q, k = np.zeros((1, 1, 2, 16)), np.zeros((1, 1, 5, 16))
    >>> at_end(SlidingWindow(3), q, k).mask(2, 5)[0, 0].astype(int).tolist()
    [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]

    Parameters
    ----------
    pattern : Pattern
        Its arrays are those of these queries and of all keys; `KeyRanges` name keys and stay.
    q : array, (batch, heads, seqlen_q, head_dim)
        The last rows of the sequence. Sizes and device are read.
    k : array, (batch, heads_kv, seqlen_k, head_dim)
        Cached keys and new ones.
    layout : "bhtd" | "bthd"
        Of `q` and `k`.

    Returns
    -------
    pattern : Pattern
        The same for as many queries as keys.

    Raises
    ------
    PatternError
        No pattern of this package.
    LayoutError
        An unknown layout.
    DTypeError, ShapeError
        What is no array, or has other than 4 axes. A nested or sparse tensor is a LayoutError.

    Notes
    -----
    Reads no values and waits for no device. Decoding row by row under ``at_end`` of a pattern gives
    the rows that one call under the pattern gives.
    """
    seqlen_q, seqlen_k = _length("q", q, layout), _length("k", k, layout)
    if not isinstance(pattern, Pattern):
        raise PatternError(
            f"at_end takes a pattern of the sequence, got {type(pattern).__name__}; make the plan "
            "of what it returns"
        )
    if seqlen_q == seqlen_k:
        return pattern
    parts: list[Pattern] = []
    for part in pattern.parts:
        parts += _moved(part, q, seqlen_q, seqlen_k)
    return parts[0] if len(parts) == 1 else Intersection(*parts)


def _length(name: str, x: Any, layout: str) -> int:
    """Rows of an array of four axes."""
    rows = 1 if check_layout(layout) else 2
    check_dense(name, x)
    if not hasattr(x, "shape"):
        raise DTypeError(f"{name} must be an array, got {type(x).__name__}")
    if len(x.shape) != 4:
        raise ShapeError(f"{name} must have 4 axes, got {name}.shape={tuple(x.shape)}")
    length: int = x.shape[rows]
    return length


def _moved(part: Pattern, q: Any, seqlen_q: int, seqlen_k: int) -> list[Pattern]:
    """What one part comes to; only causality and windows know where a query stands."""
    below = Causal(align="bottom-right")
    if isinstance(part, KeyRanges):
        return [part]
    if isinstance(part, Causal):
        return [Causal(align="bottom-right", lag=part.lag)]
    if isinstance(part, SlidingWindow):
        position = _positions(q, seqlen_q, seqlen_k)
        ahead = 1 if part.causal else part.window
        reach = min(part.window, seqlen_q + seqlen_k)  # a longer window sees all
        return [KeyRanges(position + (1 - reach), position + min(ahead, seqlen_q + seqlen_k))]
    if isinstance(part, HashSparse):
        if not part.causal:
            return [part]
        below = Causal(part.include_self, align="bottom-right")
        return [HashSparse(part.q_hash, part.k_hash, causal=False), below]
    if isinstance(part, QKSparse):
        moved: Pattern = QKSparse(part.q_keep, part.k_keep, causal=False)
    elif isinstance(part, Documents):
        moved = Documents(part.q_ids, part.k_ids, causal=False)
    else:
        raise PatternError(f"at_end knows the patterns of scfa_core, got {part!r}")
    return [moved, below] if part.causal else [moved]


def _positions(q: Any, seqlen_q: int, seqlen_k: int) -> Any:
    """Where the queries stand, (1, 1, seqlen_q), in q's library or one it is seen by, there."""
    q = adopt(q)
    xp = namespace(q)
    if is_torch_tensor(q):
        return xp.arange(seqlen_q, device=q.device).view(1, 1, -1) + (seqlen_k - seqlen_q)
    if xp.__name__ == "cupy":
        with q.device:
            return xp.arange(seqlen_q)[None, None] + (seqlen_k - seqlen_q)
    return xp.arange(seqlen_q)[None, None] + (seqlen_k - seqlen_q)


def attention_in_parts(
    q: Any,
    parts: Sequence[tuple[Any, Any, Pattern | Plan | None]],
    *,
    sinks: Any = None,
    softmax_scale: float | None = None,
    layout: str = "bhtd",
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Any:
    """Attend to keys that lie in several pieces, as if they lay in one.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((3, 2, 1, 16))  # a new token of three texts
    >>> prompt = np.broadcast_to(rng.standard_normal((1, 2, 9, 16)), (3, 2, 9, 16))
    >>> own = rng.standard_normal((3, 2, 4, 16))
    >>> pieces = [(prompt, prompt, None), (own, own, Causal(align="bottom-right"))]
    >>> attention_in_parts(q, pieces, backend="reference").shape
    (3, 2, 1, 16)

    Parameters
    ----------
    q, sinks, softmax_scale, layout, return_lse, deterministic, backend
        As for `scfa_core.attention`; torch, NumPy or CuPy. Sinks count once, not in each piece.
    parts : sequence of (k, v, pattern)
        Pieces that no two share a key of. A pattern, or a plan of it, is that of the queries and of
        this piece's keys, which count from 0; None sees every key of the piece. A prefix that all
        sequences share may be expanded to the batch without a copy.

    Returns
    -------
    out, or (out, lse)
        As `scfa_core.attention`; differentiable in q and in every piece.

    Raises
    ------
    PatternError
        No pieces, or one that is not (k, v, pattern).
    ScfaError
        As `scfa_core.attention`.

    Notes
    -----
    One call per piece, and a merge of the size of `out` for each. Weights of pieces come from lse,
    which is float32: with float64 arrays the result is as good as that.
    """
    check_flag("return_lse", return_lse)
    _length("q", q, layout)  # a mistake in q is told before any part is looked at
    if sinks is not None:
        check_sinks(sinks, q, layout)
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "layout": layout,
        "deterministic": deterministic,
        "backend": backend,
    }
    results = []
    for part in as_list("parts", parts):
        if not isinstance(part, (tuple, list)) or len(part) != 3:
            held = f" of {len(part)}" if isinstance(part, (tuple, list)) else ""
            raise PatternError(
                "a part must be (k, v, pattern), the pattern None where all keys are seen, got "
                f"a {type(part).__name__}{held}"
            )
        k, v, pattern = part
        if pattern is None:
            pattern = Intersection()  # no number in it, so that lengths may stay open when traced
        results.append(attention(q, k, v, pattern, return_lse=True, **options))
    if not results:
        raise PatternError("attention_in_parts needs at least one part")
    if len(results) > 1:
        results = [merge_attention(*zip(*results, strict=True), layout=layout)]
    out, lse = results[0]
    if sinks is not None:
        out, lse = merge_sinks(out, lse, sinks, layout)
    return (out, lse) if return_lse else out
