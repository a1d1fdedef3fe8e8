"""Self-attention among the queries and keys that each head keeps, by lot or by learned scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from scfa_core.dropping import gated, places, random_keep, threshold_keep
from scfa_core.errors import PatternError, ShapeError
from scfa_core.nn.attention import SparseSelfAttention
from scfa_core.patterns import Causal, Documents, Pattern, QKSparse
from scfa_core.plan import Plan
from scfa_core.problem import check_flag, check_share
from scfa_core.torch_checks import broadcasts


class DropSelfAttention(SparseSelfAttention):
    """Each head drops some queries and keys; what is dropped attends to nothing.

    Parameters
    ----------
    width, heads : int
    keep : float
        Share of rows that stay, queries and keys alike.
    how : "random" | "top-k" | "threshold"
        ``"random"``: each row by lot, in training only unless `always`. ``"top-k"``: the rows of
        highest score, which a linear layer learns; a row's fate depends on later rows, so such a
        model cannot generate. ``"threshold"``: rows of positive score; `keep` has no say.
    always : bool
        Whether ``"random"`` also drops in evaluation, as the paper's layer does.
    **options
        As for `SparseSelfAttention`.

    Raises
    ------
    PatternError
        An unknown `how`, or a `keep` that is no number from 0 to 1. In a call: a plan.
    ShapeError, OptionError
        As `SparseSelfAttention`.

    Notes
    -----
    Scores learn by straight-through gradients: `scfa_core.dropping.drop_attention`.

    ``"top-k"`` keeps ``round(keep * rows)`` rows of each sequence, padding left out of both, and of
    each document where there are several: what each would keep alone. A subclass whose
    `make_patterns` has documents or flags is read in the same way.
    """

    _takes_pattern = False

    def __init__(
        self,
        width: int,
        heads: int,
        keep: float = 0.5,
        *,
        how: str = "random",
        always: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(width, heads, **options)
        if how not in ("random", "top-k", "threshold"):
            raise PatternError(f"how must be 'random', 'top-k' or 'threshold', got {how!r}")
        check_share("keep", keep)
        check_flag("always", always)
        self.keep = keep
        self.how = how
        self.always = always
        learned = how != "random"
        self.query_score = nn.Linear(width, heads) if learned else None
        self.key_score = nn.Linear(width, self.heads_kv) if learned else None

    def make_patterns(self, q: Tensor, k: Tensor) -> list[Pattern]:
        """The triangle; `attend` drops."""
        return [Causal(include_self=self.include_self)]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, patterns: Sequence[Pattern | Plan]
    ) -> Tensor:
        """Attention among the kept rows; `x` is the input of all rows of the keys.

        Fewer queries than keys are the last rows, as beside a cache.
        """
        (pattern,) = patterns
        if isinstance(pattern, Plan):
            raise PatternError("DropSelfAttention chooses rows at every call and takes no plan")
        if self.query_score is None or self.key_score is None:
            if not (self.training or self.always):
                return super().attend(q, k, v, x, patterns)
            q_keep, k_keep = (random_keep(y.shape[:3], self.keep, device=y.device) for y in (q, k))
            return super().attend(q, k, v, x, [pattern & QKSparse(q_keep, k_keep, causal=False)])
        if x.shape[1] != k.shape[2]:
            raise ShapeError(
                f"x must be the layer's input of all {k.shape[2]} rows that the keys are of, which "
                f"chooses among them, got {tuple(x.shape)}"
            )
        before = k.shape[2] - q.shape[2]
        if before and self.how == "top-k":
            raise PatternError(
                "how='top-k' chooses among all rows of a sequence: give whole ones; 'threshold' "
                "serves a cache"
            )
        k_scores = self.key_score(x).transpose(1, 2)
        q_scores = self.query_score(x[:, before:]).transpose(1, 2)
        q_keep = self._choose(q_scores, pattern, "q")
        k_keep = self._choose(k_scores, pattern, "k")
        v = gated(v, k_keep, k_scores)
        out = super().attend(q, k, v, x, [pattern & QKSparse(q_keep, k_keep, causal=False)])
        return gated(out, q_keep, q_scores)

    def _choose(self, scores: Tensor, pattern: Pattern, side: str) -> Tensor:
        """Flags of the rows to keep, padding not among them: its scores may be anything."""
        among, groups = _limits(pattern, side, scores)
        if self.how == "threshold":
            chosen = threshold_keep(scores)
        else:
            place, rows = places(scores, among, groups)
            chosen = place <= (self.keep * rows.double()).round()  # as round(keep * rows) does
        return chosen if among is None else chosen & among

    def extra_repr(self) -> str:
        """Sizes and choices, for printing."""
        share = "" if self.how == "threshold" else f", keep={self.keep}"
        return f"{super().extra_repr()}, how={self.how!r}{share}"


def _limits(pattern: Pattern, side: str, scores: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """Flags of the rows that `pattern` lets take part, and ids of their documents; side "q" or "k".

    What does not fit the scores is left to `attention`, which has words for it.
    """
    among: Tensor | None = None
    groups: list[Tensor] = []
    for part in pattern.parts:
        if isinstance(part, QKSparse):
            flags = part.q_keep if side == "q" else part.k_keep
            if _fits(flags, 3, scores):
                among = flags != 0 if among is None else among & (flags != 0)
        elif isinstance(part, Documents):
            ids = part.q_ids if side == "q" else part.k_ids
            if _fits(ids, 2, scores[:, 0]):
                groups.append(ids[:, None])
    return among, groups


def _fits(x: Any, axes: int, scores: Tensor) -> bool:
    """Whether an array of a pattern can be set beside scores, (batch, heads, seqlen) or less."""
    return (
        isinstance(x, Tensor)
        and x.ndim == axes
        and not x.is_complex()
        and x.device == scores.device
        and broadcasts(x.shape, scores.shape)
    )
