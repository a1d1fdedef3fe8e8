"""Options of other libraries' attention functions, and what says the same here."""

from __future__ import annotations

from collections.abc import Iterable

from scfa_core.errors import OptionError

_CAUSAL = "Causal() is the pattern by default, and Intersection() lets every query see every key"
_WHO = (
    "a pattern says who sees whom (Documents, HashSparse, QKSparse, SlidingWindow, KeyRanges, and "
    "a & b of these), and no dense mask or function of pairs is read"
)
_PADDING = (
    "pattern & QKSparse(real[:, None], real[:, None], causal=False), real False where a row is "
    "padding"
)
_SCORES = "scores are not changed here"
_WINDOW = "SlidingWindow(left + 1), for here the query's own key counts"
_PACKED = "Documents.from_cu_seqlens(cu_seqlens, rows) over one packed sequence"

_SAID_HERE = {
    "causal": _CAUSAL,
    "is_causal": _CAUSAL,
    "attn_mask": _WHO,
    "attention_mask": f"{_WHO}; padding is {_PADDING}",
    "mask": _WHO,
    "mask_mod": _WHO,
    "block_mask": f"{_WHO}; make_plan(pattern, q, k) is what is kept between layers",
    "key_padding_mask": _PADDING,
    "attn_bias": _SCORES,
    "score_mod": _SCORES,
    "alibi_slopes": _SCORES,
    "softcap": _SCORES,
    "s_aux": "sinks=",
    "learnable_sink": "sinks=",
    "scale": "softmax_scale=",
    "sm_scale": "softmax_scale=",
    "dropout": "there is no dropout inside the softmax",
    "dropout_p": "there is no dropout inside the softmax",
    "enable_gqa": "grouped heads need no flag",
    "window": _WINDOW,
    "window_size": _WINDOW,
    "cu_seqlens": _PACKED,
    "cu_seqlens_q": _PACKED,
    "cu_seqlens_k": _PACKED,
    "max_seqlen_q": _PACKED,
    "max_seqlen_k": _PACKED,
    "block_table": "paged caches are not read here; keys and values are arrays",
    "kernel_options": "tile shapes are chosen by the kernels",
    "return_attn_probs": "return_lse=True gives the log-sum-exp; weights are never formed",
    "return_softmax_lse": "return_lse=True",
    "plan": "a plan goes where a pattern goes",
}


def unknown_options(function: str, options: Iterable[str], known: str) -> OptionError:
    """Say which options a function does not take, and what those of other libraries are here."""
    names = list(options)
    advice = dict.fromkeys(
        _SAID_HERE.get(name, f"beside its arrays it takes {known}") for name in names
    )
    return OptionError(
        f"{function} takes no option {', '.join(map(repr, names))}: {'; '.join(advice)}"
    )
