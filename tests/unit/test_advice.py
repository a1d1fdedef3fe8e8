"""Where a shape or a wrong kind says what was meant, the message says how to write it."""

import re

import numpy as np
import pytest

import scfa_core as scfa
from scfa_core.hashing import angular_hash, random_directions

Q, K = np.zeros((2, 4, 8, 16), np.float32), np.zeros((2, 2, 8, 16), np.float32)
IDS = np.zeros((2, 8), int)


def hashed(q_hash):
    return scfa.HashSparse(q_hash, np.zeros((1, 1, 8), int))


ONE_ROUND = angular_hash(Q, random_directions(4, 16, 4, seed=0))
MEANT = {
    "ids of one sequence": (scfa.Documents(IDS[0]), "q_ids[None] has the axis of sequences"),
    "ids of heads": (scfa.Documents(IDS[:, None]), "ids have no axis of heads"),
    "cu_seqlens": (scfa.Documents(np.array([0, 3, 8])), "Documents.from_cu_seqlens makes them"),
    "ids of fewer rows": (scfa.Documents(IDS, IDS[:, 1:]), "others than queries, are the second"),
    "flags of rows": (scfa.QKSparse(IDS, IDS), "q_keep[:, None] has the axis of heads"),
    "hashes of heads": (hashed(np.zeros((4, 8), int)), "q_hash[None] has the axis of sequences"),
    "hashes of a row": (hashed(IDS[0]), "q_hash[None, None] has the axes of sequences and heads"),
    "rounds": (hashed(ONE_ROUND), "of one round take q_hash[0], of several scfa_core.hashing.dis"),
    "rows first": (hashed(np.zeros((2, 8, 4), int)), "heads come before rows here, whatever"),
    "keys of query heads": (
        scfa.HashSparse(np.zeros((2, 4, 8), int), np.zeros((2, 4, 8), int)),
        "keys have 2 heads (heads_kv), each shared by several of the queries",
    ),
    "the class": (scfa.Causal, "got the class Causal; make one: Causal(...)"),
    "a list": ([scfa.Causal()], "got list; where all must hold a & b is the pattern"),
    "a word": ("causal", "got 'causal'; Causal() is the default"),
    "a flag": (True, "got True; Causal() is the default"),
    "a mask": (np.ones((8, 8), bool), "got ndarray; no dense mask is read: Documents(ids) and"),
}


@pytest.mark.parametrize("name", MEANT)
def test_the_message_says_how_it_is_written(name):
    pattern, words = MEANT[name]
    for call in (
        lambda: scfa.attention(Q, K, K, pattern, backend="reference"),
        lambda: scfa.make_plan(pattern, Q, K, backend="reference"),
    ):
        with pytest.raises(scfa.ScfaError, match=re.escape(words)):
            call()


@pytest.mark.parametrize("name", MEANT)
def test_tensors_are_told_the_same(name):
    torch = pytest.importorskip("torch", reason="tensors are torch's")
    pattern, words = MEANT[name]
    if isinstance(pattern, scfa.Pattern):
        (part,) = pattern.parts
        fields = [x for x in type(part).__slots__ if isinstance(getattr(part, x), np.ndarray)]
        arrays = {x: torch.from_numpy(getattr(part, x)) for x in fields}
        pattern = type(part)(**arrays)
    elif isinstance(pattern, np.ndarray):
        pattern, words = torch.from_numpy(pattern), words.replace("ndarray", "Tensor")
    q, k = torch.from_numpy(Q), torch.from_numpy(K)
    with pytest.raises(scfa.ScfaError, match=re.escape(words)):
        scfa.attention(q, k, k, pattern, backend="reference")


@pytest.mark.parametrize("name", ["ids of one sequence", "flags of rows", "rounds", "rows first"])
def test_what_is_advised_fits(name):
    advised = {
        "ids of one sequence": scfa.Documents(IDS[0][None]),
        "flags of rows": scfa.QKSparse(IDS[:, None], IDS[:, None]),
        "rounds": hashed(ONE_ROUND[0]),
        "rows first": hashed(np.zeros((2, 8, 4), int).swapaxes(1, 2)),
    }[name]
    scfa.make_plan(advised, Q, K, backend="reference")


def test_a_plan_of_the_other_layout_is_told_as_such():
    plan = scfa.make_plan(scfa.Causal(), Q.swapaxes(1, 2), K.swapaxes(1, 2)[:, :, :1])
    with pytest.raises(scfa.ShapeError, match=r"make a plan for these$"):
        scfa.attention(Q, K, K, plan)
    mixed_up = scfa.make_plan(scfa.Causal(), Q.swapaxes(1, 2), Q.swapaxes(1, 2))
    with pytest.raises(scfa.ShapeError, match=r"for these: make_plan takes their layout as well$"):
        scfa.attention(Q, Q, Q, mixed_up)


@pytest.mark.parametrize(
    "pattern",
    [scfa.Documents(IDS[0]), scfa.KeyRanges(IDS[0], IDS[0]), scfa.QKSparse(IDS, IDS)],
    ids=lambda pattern: type(pattern).__name__,
)
def test_a_mask_is_shown_of_no_pattern_that_attention_refuses(pattern):
    """Broadcasting from the last axis took flags of sequences for those of heads."""
    with pytest.raises(scfa.ShapeError, match="axis by axis"):
        pattern.mask(8, 8, heads=2)


FOREIGN = {
    "causal": "Causal() is the pattern by default, and Intersection()",
    "is_causal": "Causal() is the pattern by default",
    "attn_mask": "no dense mask or function of pairs is read",
    "attention_mask": "padding is pattern & QKSparse(real[:, None], real[:, None], causal=False)",
    "block_mask": "make_plan(pattern, q, k) is what is kept",
    "score_mod": "scores are not changed here",
    "scale": "softmax_scale=",
    "dropout_p": "no dropout inside the softmax",
    "enable_gqa": "grouped heads need no flag",
    "window_size": "SlidingWindow(left + 1)",
    "cu_seqlens_q": "Documents.from_cu_seqlens(cu_seqlens, rows)",
    "return_softmax_lse": "return_lse=True",
    "s_aux": "sinks=",
    "softmax_sclae": "it takes pattern, sinks, softmax_scale, layout, return_lse, deterministic, ",
}


@pytest.mark.parametrize("option", FOREIGN)
def test_options_of_other_libraries_are_translated(option):
    words = re.escape(f"attention takes no option {option!r}: ") + ".*" + re.escape(FOREIGN[option])
    with pytest.raises(scfa.OptionError, match=words) as caught:
        scfa.attention(Q, K, K, backend="reference", **{option: None})
    assert isinstance(caught.value, TypeError)


def test_all_options_of_another_library_are_told():
    with pytest.raises(scfa.OptionError, match=r"'dropout_p', 'causal': .*no dropout.*Causal\(\)"):
        scfa.attention(Q, K, K, dropout_p=0.0, causal=True)


def test_the_options_told_are_those_there_are():
    code = scfa.attention.__code__
    names = code.co_varnames[3 : code.co_argcount + code.co_kwonlyargcount]
    with pytest.raises(scfa.OptionError, match=re.escape(", ".join(names)) + "$"):
        scfa.attention(Q, K, K, unheard_of=1)


def test_a_batch_of_one_beside_another_is_told_how_it_spreads():
    with pytest.raises(scfa.ShapeError, match=r"; .expand the one of 1, without a copy$"):
        scfa.attention(Q, K[:1], K[:1])
    assert scfa.attention(Q, *[np.broadcast_to(K[:1], K.shape)] * 2).shape == Q.shape
    three = np.zeros((3, 2, 8, 16), np.float32)
    with pytest.raises(scfa.ShapeError, match=r"same batch.*\)$"):
        scfa.attention(Q, three, three)
