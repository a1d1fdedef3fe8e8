"""Hugging Face transformers: `register` makes ``attn_implementation="scfa"`` work.

>>> import scfa_core.hf
>>> scfa_core.hf.register()
('scfa', 'scfa_window', 'scfa_hash')

Then ``AutoModelForCausalLM.from_pretrained(name, attn_implementation="scfa")``. Nothing of a model
changes but the function that computes attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from scfa_core.extras import missing

try:
    import torch
    from torch import Tensor
    from torch.nn.functional import pad
except ModuleNotFoundError as error:
    raise missing("scfa_core.hf", "torch", error) from error
try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils import output_capturing
except ImportError as error:
    raise missing("scfa_core.hf", "hf", error, "transformers 5.24 or newer") from error

import scfa_core.torch_hashing
import scfa_core.torch_union_ops  # noqa: F401  (both register operators: loaded programs need them)
from scfa_core.api import attention
from scfa_core.errors import PatternError, ShapeError
from scfa_core.hashing import angular_hash
from scfa_core.hashing_checks import check_buckets
from scfa_core.hf_directions import DIRECTIONS
from scfa_core.hf_masks import StructuredMask, read_mask
from scfa_core.hf_symbols import Band
from scfa_core.merging import attention_over
from scfa_core.patterns import HashSparse, Pattern, SlidingWindow
from scfa_core.plan import Plan
from scfa_core.problem import HEAD_DIM_STEP, MAX_HEAD_DIM, MIN_HEAD_DIM, as_size

__all__ = ["register"]

# Arguments that change the scores or ask for them; none is supported, so each is refused by name.
_REFUSED = {
    "softcap": "soft-capped scores",
    "sinks": "attention sinks of each query",
    "indices": "a choice of keys by an indexer",
    "block_indices": "a choice of blocks by an indexer",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
    "output_attentions": "attention weights as an output",
}

_SEEDS = 2**48  # times layers they are 64-bit ints, as operators take them


class Options(NamedTuple):
    """What `register` was given; a model's config may say otherwise."""

    window: int | None
    buckets: int
    near: int
    seed: int

    def checked(self) -> Options:
        """Raise on what is no option; a config may hold anything."""
        if self.window is not None:
            as_size("window", SlidingWindow(self.window).window, 1, PatternError)
        check_buckets(self.buckets)
        as_size("near", self.near, error=PatternError)
        if as_size("seed", self.seed, error=PatternError) >= _SEEDS:
            raise PatternError(f"seed must be below 2**48, got {self.seed}")
        return self


def register(
    *, window: int | None = None, buckets: int = 16, near: int = 0, seed: int = 0
) -> tuple[str, ...]:
    """Add the attention implementations to transformers.

    - ``"scfa"``: exactly the attention of the model, by this package's kernels;
    - ``"scfa_window"``: a query sees its last `window` keys only;
    - ``"scfa_hash"``: a query sees the keys of its hash bucket, and its last `near` keys.

    In an encoder those are the nearest on either side, ``|i - j| < window``. In cross attention, of
    a decoder to an encoder, no key is nearer than another: neither `window` nor `near` holds there.

    Parameters
    ----------
    window : int, optional
        Keys that a query of ``"scfa_window"`` sees, itself among them. A model's own sliding
        window, where it has one, still holds.
    buckets : int
        Of the angular hash, even. Directions differ between layers and key heads.
    near : int
        Nearest keys seen whatever their bucket, the query's own among them; 0 for none.
    seed : int
        Of the directions.

    Returns
    -------
    names : tuple of str
        What may now be passed as ``attn_implementation``.

    Raises
    ------
    PatternError
        A window, `buckets`, `near` or a seed that is none; here, or in a call where the model's
        config says it.

    Notes
    -----
    ``scfa_window``, ``scfa_buckets``, ``scfa_near`` and ``scfa_seed`` in a model's config take
    precedence, and are saved with it. Padding masks, packed ``position_ids``, sliding windows,
    chunks and KV caches work; other masks, ``cu_seq_lens`` without such positions, dropout of
    attention weights and modified scores raise `PatternError`. A padding query gives 0, where eager
    attention gives an average.
    """
    options = Options(window, buckets, near, seed).checked()
    kinds = {"scfa": None, "scfa_window": _window_patterns, "scfa_hash": _hash_patterns}
    for name, make in kinds.items():
        AttentionInterface.register(name, partial(_attend, make, options))
        AttentionMaskInterface.register(name, partial(read_mask, ahead=make is None))
    return tuple(kinds)


MakePatterns = Callable[[Any, Options, StructuredMask, Tensor, Tensor], "list[Pattern | Plan]"]


def _attend(
    make: MakePatterns | None,
    registered: Options,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: StructuredMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; out is (batch, seqlen, heads, head_dim), as transformers wants it."""
    _refuse(dropout, kwargs)
    mask = _structured(module, query, key, attention_mask, kwargs)
    patterns: list[Pattern | Plan] = []
    if make is not None:
        patterns = make(module, _options_of(module, registered), mask, query, key)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    size = value.shape[3]
    query, key, value = (_fit(x) for x in (query, key, value))
    patterns = patterns or [mask.plan(query, key)]
    sinks = kwargs.get("s_aux")  # the name that gpt-oss and others give them
    if len(patterns) == 1:
        out = attention(query, key, value, patterns[0], sinks=sinks, softmax_scale=scaling)
    else:
        out = attention_over(query, key, value, patterns, sinks=sinks, softmax_scale=scaling)
    return out[..., :size].transpose(1, 2).contiguous(), None


def _fit(x: Tensor) -> Tensor:
    """Pad heads to a size that kernels take; zeros change no score, and are cut from the output."""
    size = x.shape[3]
    if size > MAX_HEAD_DIM:
        raise ShapeError(
            f"heads must be of size {MAX_HEAD_DIM} at most, got {size}; use "
            "attn_implementation='sdpa' for this model"
        )
    fitting = max(MIN_HEAD_DIM, -(-size // HEAD_DIM_STEP) * HEAD_DIM_STEP)
    return x if fitting == size else pad(x, (0, fitting - size))


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise on whatever would change the result and is not computed here."""
    if dropout:
        raise PatternError(
            f"scfa_core does not drop attention weights, got {dropout=}; set the model's attention "
            "dropout to 0 (attention_dropout=0.0 or attn_pdrop=0.0 in its config)"
        )
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise PatternError(
                f"scfa_core does not compute {what}, got {name}; use attn_implementation='eager'"
            )
    if _weights_are_collected():
        raise PatternError(
            "scfa_core does not compute attention weights as an output, got output_attentions; use "
            "attn_implementation='eager'"
        )


def _weights_are_collected() -> bool:
    """Whether the model asks for weights without a word to its layers, as GPT-2 does."""
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None or torch.compiler.is_compiling():
        return False
    return any("attentions" in name for name in collector.get() or ())


def _structured(
    module: Any,
    query: Tensor,
    key: Tensor,
    attention_mask: StructuredMask | Tensor | None,
    kwargs: dict[str, Any],
) -> StructuredMask:
    """Return the mask that the model made, or the one that its absence means."""
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if isinstance(attention_mask, StructuredMask):
        if attention_mask.shape[2:] != (queries, keys):
            raise PatternError(
                f"the layer has {queries} queries and {keys} keys, its mask is of "
                f"{attention_mask.shape[2]} and {attention_mask.shape[3]}; pass an attention_mask "
                "that is as long as all tokens, cached ones too, or, where the model itself cuts "
                "its mask or its keys, use attn_implementation='sdpa'"
            )
        _refuse_lengths(kwargs, attention_mask.packed)
        return attention_mask
    if attention_mask is not None:
        raise PatternError(
            f"scfa_core takes no {type(attention_mask).__name__} as an attention mask, got shape "
            f"{tuple(attention_mask.shape)}; pass a padding mask (batch, seqlen) to the model, or "
            "use attn_implementation='sdpa' for custom masks"
        )
    _refuse_lengths(kwargs, packed=False)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    band = Band(hi=1) if causal else Band()
    window = kwargs.get("sliding_window")
    if window is not None:
        if not causal:
            raise PatternError(
                "a sliding window both ways must come as a mask, got sliding_window="
                f"{window} without one; let the model make its mask"
            )
        band = band.narrowed(Band(lo=1 - window))
    return StructuredMask((batch, queries, keys), keys - queries, band, [], None)


def _refuse_lengths(kwargs: dict[str, Any], packed: bool) -> None:
    """Raise on lengths of packed sequences that the mask knows nothing of."""
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if kwargs.get(name) is not None and not packed:
            raise PatternError(
                f"{name} says that sequences are packed, and the model's mask does not: pass "
                "position_ids that restart with each sequence, attention_mask=None and "
                "use_cache=False"
            )


def _options_of(module: Any, registered: Options) -> Options:
    """Let the model's config overrule what was registered."""
    config = getattr(module, "config", None)
    values: dict[str, Any] = {
        name: getattr(config, f"scfa_{name}", default)
        for name, default in registered._asdict().items()
    }
    return Options(**values).checked()


def _window_patterns(
    module: Any, options: Options, mask: StructuredMask, query: Tensor, key: Tensor
) -> list[Pattern | Plan]:
    """The model's mask, and keys nearer than `window`: a causal mask leaves the last ones."""
    if options.window is None:
        raise PatternError(
            "attn_implementation='scfa_window' needs a window: scfa_core.hf.register(window=...) "
            "or config.scfa_window"
        )
    if _crosses(module, mask):
        return [mask.pattern(query.device)]
    return [mask.pattern(query.device, Band(1 - options.window, options.window))]


def _hash_patterns(
    module: Any, options: Options, mask: StructuredMask, query: Tensor, key: Tensor
) -> list[Pattern | Plan]:
    """The model's mask within buckets; apart from them the nearest keys, each pair once."""
    directions = _directions(module, options, key)
    same = HashSparse(*(angular_hash(x, directions)[0] for x in (query, key)), causal=False)
    near = options.near
    if near < 1 or _crosses(module, mask):
        return [mask.pattern(query.device) & same]
    nearest = mask.pattern(query.device, Band(1 - near, near))
    patterns: list[Pattern | Plan] = [nearest]
    patterns.append(mask.pattern(query.device, Band(hi=1 - near)) & same)
    if mask.band.hi is None or mask.band.hi > near:  # there are later keys than the nearest
        patterns.append(mask.pattern(query.device, Band(lo=near)) & same)
    return patterns


def _crosses(module: Any, mask: StructuredMask) -> bool:
    """Whether keys are of another sequence, so that no key is nearer to a query than another."""
    if mask.band.hi is not None:
        return False
    if mask.shape[2] != mask.shape[3]:
        return True
    of_decoder = getattr(module, "is_decoder", False) and not getattr(module, "is_causal", False)
    return of_decoder or "Cross" in type(module).__name__


def _directions(module: Any, options: Options, key: Tensor) -> Tensor:
    """Directions of one layer."""
    layer = getattr(module, "layer_idx", None) or 0
    seed = options.seed * 10_007 + layer
    return DIRECTIONS(key.shape[1], key.shape[3], options.buckets, seed, key.device)
