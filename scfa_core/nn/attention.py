"""Self-attention layers that differ in one method: which pattern their queries and keys follow."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn, zeros
from torch.nn.functional import normalize

from scfa_core.api import attention
from scfa_core.dispatch import check_name
from scfa_core.errors import DTypeError, OptionError, PatternError, ShapeError
from scfa_core.merging import attention_over
from scfa_core.nn.limits import limits_of, narrowed
from scfa_core.patterns import Causal, Pattern, SlidingWindow
from scfa_core.plan import Plan
from scfa_core.problem import HEAD_DIMS, as_size, check_flag, check_scale
from scfa_core.torch_checks import check_tensor
from scfa_core.torch_framework import dtype_name

MakePattern = Callable[[Tensor, Tensor], Pattern]


class SparseSelfAttention(nn.Module):
    """Causal self-attention under a pattern: project, attend, project back.

    Dense unless `pattern` is given or a subclass has its own `make_patterns`.

    Parameters
    ----------
    width : int
        Channels in and out.
    heads : int
        Query heads.
    heads_kv : int, optional
        Key and value heads, a divisor of `heads`; `heads` by default.
    head_dim : int, optional
        Of queries, keys and values; ``width // heads`` by default.
    pattern : callable, optional
        ``pattern(q, k) -> Pattern`` from q (batch, heads, seqlen, head_dim) and k, with
        `include_self` and causality of its own. Layers named by their pattern take none.
    shared_qk : bool
        Keys are the queries, normalised to length 1, with no projection of their own (the paper's
        hash layers). Needs ``heads_kv == heads``.
    include_self : bool
        False: a row does not see itself; of use with `shared_qk`, where each row would see little
        else.
    softmax_scale : float, optional
        Default ``head_dim ** -0.5``.
    sinks : bool
        A learned logit of each head in the softmax, 0 to begin with, so that a row may attend to
        nothing; see `scfa_core.attention`.
    bias : bool
        Of the projections.
    rotary : callable, optional
        Applied to q and, apart, to k, each (batch, heads, seqlen, head_dim), before normalisation
        and hashing; a module is registered as a child.
    backend : str, optional
        As for `scfa_core.attention`.

    Raises
    ------
    ShapeError
        Heads that do not divide, `shared_qk` with fewer key heads, sizes that are none, or a
        head_dim that `scfa_core.attention` does not take.
    OptionError
        A flag that is not a bool, a hook that cannot be called, a pattern beside one that is there,
        an option that no layer has.
    ScaleError
        A softmax_scale that is no finite number.
    PatternError
        In a call: `pattern` or `make_patterns` returned none.
    """

    _takes_pattern = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        heads_kv: int | None = None,
        head_dim: int | None = None,
        pattern: MakePattern | None = None,
        shared_qk: bool = False,
        include_self: bool = True,
        softmax_scale: float | None = None,
        sinks: bool = False,
        bias: bool = False,
        rotary: Callable[[Tensor], Tensor] | None = None,
        backend: str | None = None,
        **unknown: NoReturn,  # of layers that hand their own options on
    ) -> None:
        super().__init__()
        if unknown:
            raise OptionError(
                f"{type(self).__name__} takes no option {', '.join(map(repr, sorted(unknown)))}; "
                "beside their own all layers take heads_kv, head_dim, pattern, shared_qk, "
                "include_self, softmax_scale, sinks, bias, rotary, backend"
            )
        heads_kv = heads if heads_kv is None else heads_kv
        width, heads, heads_kv = (
            as_size(name, size, 1)
            for name, size in (("width", width), ("heads", heads), ("heads_kv", heads_kv))
        )
        for name, flag in (
            ("shared_qk", shared_qk),
            ("include_self", include_self),
            ("sinks", sinks),
            ("bias", bias),
        ):
            check_flag(name, flag)
        for name, hook in (("pattern", pattern), ("rotary", rotary)):
            if hook is not None and not callable(hook):
                raise OptionError(
                    f"{name} must be a function, got {type(hook).__name__}"
                    + ("; a fixed one goes as lambda q, k: pattern" if name == "pattern" else "")
                )
        if pattern is not None and not self._takes_pattern:
            raise OptionError(
                f"{type(self).__name__} has a pattern of its own and would ignore another; narrow "
                "it in make_patterns of a subclass, or give SparseSelfAttention the pattern"
            )
        if pattern is not None and not include_self:
            raise OptionError(
                "include_self=False is for the layer's own pattern; build it into yours, e.g. "
                "pattern & Causal(include_self=False)"
            )
        if heads % heads_kv or (head_dim is None and width % heads):
            raise ShapeError(
                "heads must be a multiple of heads_kv and divide width (or pass head_dim), got "
                f"{width=}, {heads=}, {heads_kv=}"
            )
        if shared_qk and heads_kv != heads:
            raise ShapeError(f"shared_qk needs heads_kv == heads, got {heads_kv=}, {heads=}")
        self.width = width
        self.heads = heads
        self.heads_kv = heads_kv
        self.head_dim = width // heads if head_dim is None else as_size("head_dim", head_dim, 1)
        if self.head_dim not in HEAD_DIMS:
            raise ShapeError(
                f"head_dim must be a multiple of {HEAD_DIMS.step} from {HEAD_DIMS[0]} to "
                f"{HEAD_DIMS[-1]}, got {self.head_dim} ({width=}, {heads=}); take other heads, or "
                "pass head_dim, which need not be width // heads"
            )
        check_scale(softmax_scale, self.head_dim, "float64")  # what no dtype takes
        if backend is not None:
            check_name(backend)
        self.pattern = pattern
        self.shared_qk = shared_qk
        self.include_self = include_self
        self.softmax_scale = softmax_scale
        self.sinks = nn.Parameter(zeros(heads)) if sinks else None
        self.rotary = rotary
        self.backend = backend
        self.query = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.key = None if shared_qk else nn.Linear(width, heads_kv * self.head_dim, bias=bias)
        self.value = nn.Linear(width, heads_kv * self.head_dim, bias=bias)
        self.output = nn.Linear(heads * self.head_dim, width, bias=bias)

    def make_patterns(self, q: Tensor, k: Tensor) -> list[Pattern]:
        """Who sees whom, as pairwise disjoint patterns; q, k (batch, heads, seqlen, head_dim)."""
        if self.pattern is not None:
            made = self.pattern(q, k)
            if not isinstance(made, Pattern):
                raise PatternError(
                    f"pattern(q, k) must return a scfa_core pattern, got {type(made).__name__}; "
                    "several disjoint ones come from make_patterns of a subclass, a plan is given "
                    "to each call: layer(x, plan=plan)"
                )
            return [made]
        return [Causal(include_self=self.include_self)]

    def forward(
        self,
        x: Tensor,
        *,
        documents: Tensor | None = None,
        keep: Tensor | None = None,
        plan: Plan | None = None,
    ) -> Tensor:
        """Attend.

        Parameters
        ----------
        x : Tensor, (batch, seqlen, width)
        documents : integer Tensor, (batch, seqlen), optional
            Rows see rows of their own document only.
        keep : bool Tensor, (batch, seqlen), optional
            False where a row is padding: nobody sees it and its attention is 0.
        plan : Plan, optional
            Instead of the layer's own pattern, e.g. one plan for all layers.

        Returns
        -------
        out : Tensor, (batch, seqlen, width)

        Raises
        ------
        ShapeError, DTypeError
            Axes other than these, what is no tensor, or a dtype other than that of the weights
            outside of autocast.
        PatternError
            A plan beside documents or keep; a plan that is none.
        """
        if check_tensor("x", x, "batch", "seqlen", "width").shape[2] != self.width:
            raise ShapeError(f"x must be (batch, seqlen, {self.width}), got {tuple(x.shape)}")
        q, k, v = self.project(x)
        patterns: Sequence[Pattern | Plan]
        if plan is None:
            limits = limits_of(x, documents, keep)
            patterns = [narrowed(p, limits) for p in self._made_patterns(q, k)]
        elif not isinstance(plan, Plan):
            raise PatternError(
                f"plan must be a Plan, as make_plan makes it, got {type(plan).__name__}; a pattern "
                "is given to SparseSelfAttention when it is made"
            )
        elif documents is None and keep is None:
            patterns = [plan]
        else:
            raise PatternError("documents and keep belong into the plan; pass them or a plan")
        return self.output(self.attend(q, k, v, x, patterns).transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, heads, seqlen, head_dim) views."""
        q, v = (self._split(applied(p, x)) for p in (self.query, self.value))
        q = q if self.rotary is None else self.rotary(q)
        if self.key is None:
            return q, normalize(q, dim=-1).to(q.dtype), v
        k = self._split(applied(self.key, x))
        return q, k if self.rotary is None else self.rotary(k), v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, patterns: Sequence[Pattern | Plan]
    ) -> Tensor:
        """Attention of (batch, heads, seqlen, head_dim) tensors; `x` is the layer's input."""
        options: dict[str, Any] = {
            "sinks": self.sinks,
            "softmax_scale": self.softmax_scale,
            "backend": self.backend,
        }
        if len(patterns) == 1:
            out: Tensor = attention(q, k, v, patterns[0], **options)
        else:
            out = attention_over(q, k, v, patterns, **options)
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _made_patterns(self, q: Tensor, k: Tensor) -> list[Pattern]:
        """What `make_patterns` of this class or a derived one returns, if it is a list of any."""
        made: Any = self.make_patterns(q, k)
        listed = list(made) if isinstance(made, Iterable) else []
        if not listed or not all(isinstance(x, (Pattern, Plan)) for x in listed):
            raise PatternError(
                f"make_patterns of {type(self).__name__} must return a list of disjoint patterns, "
                f"of one at least, got {made!r}"
            )
        return listed

    def extra_repr(self) -> str:
        """Sizes and choices, for printing."""
        text = f"width={self.width}, heads={self.heads}, head_dim={self.head_dim}"
        if self.heads_kv != self.heads:
            text += f", heads_kv={self.heads_kv}"
        if self.shared_qk:
            text += ", shared_qk=True"
        if not self.include_self:
            text += ", include_self=False"
        if self.sinks is not None:
            text += ", sinks=True"
        return text


def applied(projection: nn.Module, x: Tensor) -> Tensor:
    """Run a projection, and say what to do where its weights are of another dtype than `x`.

    Only what fails is refused: autocast, a hook or a quantized projection may make it right.
    """
    try:
        out: Tensor = projection(x)
    except RuntimeError as error:
        weight = getattr(projection, "weight", None)
        told = re.search("dtype|scalar type|Quantized", str(error))
        if not told or not isinstance(weight, Tensor) or weight.dtype == x.dtype:
            raise
        cure = "cast x, or the layer by .to" if x.is_floating_point() else "embed tokens first"
        cure = "x.dequantize()" if x.is_quantized else cure
        raise DTypeError(
            f"x must be {dtype_name(weight.dtype)} like the layer's weights, got "
            f"{dtype_name(x.dtype)}; {cure}"
        ) from error
    return out


class DenseSelfAttention(SparseSelfAttention):
    """Every row sees itself and all before it: the baseline of the others."""


class WindowSelfAttention(SparseSelfAttention):
    """Every row sees the last `window` rows, itself among them; other arguments as the base.

    Parameters
    ----------
    width, heads : int
    window : int

    Raises
    ------
    PatternError
        A window that is no int of at least 0.
    ShapeError, OptionError
        As `SparseSelfAttention`.
    """

    _takes_pattern = False

    def __init__(self, width: int, heads: int, window: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.window = SlidingWindow(window).window  # says what is wrong with it

    def make_patterns(self, q: Tensor, k: Tensor) -> list[Pattern]:
        """One window."""
        window: Pattern = SlidingWindow(self.window)
        return [window if self.include_self else window & Causal(include_self=False)]

    def extra_repr(self) -> str:
        """Sizes and choices, for printing."""
        return f"{super().extra_repr()}, window={self.window}"
