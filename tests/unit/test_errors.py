"""The table of mistakes: each raises a child of ScfaError, says what came and what to do."""

import re

import numpy as np
import pytest

import scfa_core as scfa

Q = np.zeros((2, 4, 8, 16), np.float32)
K = np.zeros((2, 2, 8, 16), np.float32)
INTS = np.zeros((2, 4, 8), np.int64)
K_INTS = np.zeros((2, 2, 8), np.int64)
IDS = np.zeros((2, 8), np.int64)


def attend(q=Q, k=K, v=K, pattern=None, **options):
    return scfa.attention(q, k, v, pattern, backend=options.pop("backend", "reference"), **options)


MISTAKES = {
    "rank": (scfa.ShapeError, "4 axes", lambda: attend(q=Q[0])),
    "batch": (scfa.ShapeError, "same batch", lambda: attend(k=K[:1], v=K[:1])),
    "head_dim of k": (
        scfa.ShapeError,
        "same head_dim",
        lambda: attend(k=np.zeros((2, 2, 8, 24), np.float32)),
    ),
    "v unlike k": (scfa.ShapeError, "k and v must agree", lambda: attend(v=K[:, :, :5])),
    "heads": (
        scfa.ShapeError,
        "heads_kv must divide heads",
        lambda: attend(
            k=np.zeros((2, 3, 8, 16), np.float32), v=np.zeros((2, 3, 8, 16), np.float32)
        ),
    ),
    "head_dim 12": (
        scfa.ShapeError,
        "multiple of 8 from 16 to 256",
        lambda: attend(*[np.zeros((1, 1, 8, 12), np.float32)] * 3),
    ),
    "head_dim 264": (
        scfa.ShapeError,
        "multiple of 8 from 16 to 256",
        lambda: attend(*[np.zeros((1, 1, 8, 264), np.float32)] * 3),
    ),
    "integer q": (scfa.DTypeError, "must be one of", lambda: attend(q=Q.astype(np.int32))),
    "mixed dtypes": (scfa.DTypeError, "share a dtype", lambda: attend(k=K.astype(np.float64))),
    "a list": (scfa.DTypeError, "must be an array", lambda: attend(q=[[1.0]])),
    "last axis strided": (
        scfa.LayoutError,
        "contiguous",
        lambda: attend(q=np.zeros((2, 4, 8, 32), np.float32)[..., ::2]),
    ),
    "layout": (scfa.LayoutError, "layout must be one of", lambda: attend(layout="thd")),
    "NaN scale": (scfa.ScaleError, "finite", lambda: attend(softmax_scale=float("nan"))),
    "Inf scale": (scfa.ScaleError, "finite", lambda: attend(softmax_scale=float("inf"))),
    "scale beyond float32": (
        scfa.ScaleError,
        "softmax_scale must be at most",
        lambda: attend(softmax_scale=-1e39),
    ),
    "text scale": (scfa.ScaleError, "finite number", lambda: attend(softmax_scale="big")),
    "not a pattern": (scfa.PatternError, "must be a scfa_core pattern", lambda: attend(pattern=3)),
    "float hashes": (
        scfa.DTypeError,
        "integer array",
        lambda: attend(pattern=scfa.HashSparse(INTS.astype(float), K_INTS)),
    ),
    "flags in words": (
        scfa.DTypeError,
        "QKSparse.k_keep must be an array of bools",
        lambda: attend(pattern=scfa.QKSparse(INTS, K_INTS.astype(str))),
    ),
    "byte-swapped values": (
        scfa.DTypeError,
        "got byte-swapped float32; cast it",
        lambda: attend(v=K.astype(K.dtype.newbyteorder())),
    ),
    "byte-swapped hashes": (
        scfa.DTypeError,
        "got byte-swapped int64; cast it",
        lambda: attend(pattern=scfa.HashSparse(INTS, K_INTS.astype(K_INTS.dtype.newbyteorder()))),
    ),
    "document ids as hashes": (
        scfa.ShapeError,
        "HashSparse.q_hash must broadcast to (batch, heads, seqlen)",
        lambda: attend(pattern=scfa.Documents(IDS) & scfa.HashSparse(IDS, IDS)),
    ),
    "uint64 against int64": (
        scfa.DTypeError,
        "uint64 compares with uint64 only",
        lambda: attend(pattern=scfa.HashSparse(INTS.astype(np.uint64), K_INTS)),
    ),
    "int64 against uint64": (
        scfa.DTypeError,
        "uint64 compares with uint64 only",
        lambda: attend(pattern=scfa.HashSparse(INTS, K_INTS.astype(np.uint64))),
    ),
    "more rows than an int32 counts": (
        scfa.ShapeError,
        "must be at most 2147483647, got 1073741824 + 1073741824",
        lambda: scfa.attention(*[np.broadcast_to(np.zeros(16, np.float32), (1, 1, 2**30, 16))] * 3),
    ),
    "hash shape": (
        scfa.ShapeError,
        "must broadcast to",
        lambda: attend(pattern=scfa.HashSparse(INTS[:, :3], K_INTS)),
    ),
    "ids of rank 3": (
        scfa.ShapeError,
        "(batch, seqlen)",
        lambda: attend(pattern=scfa.Documents(INTS)),
    ),
    "hash as a list": (scfa.PatternError, "must be an array", lambda: scfa.HashSparse([1], [1])),
    "self excluded, not causal": (
        scfa.PatternError,
        "needs causal=True",
        lambda: scfa.HashSparse(INTS, K_INTS, causal=False, include_self=False),
    ),
    "negative lag": (scfa.PatternError, "int >= 0", lambda: scfa.Causal(lag=-1)),
    "true lag": (scfa.PatternError, "int >= 0", lambda: scfa.Causal(lag=True)),
    "float lag": (scfa.PatternError, "int >= 0", lambda: scfa.Causal(lag=1.0)),
    "negative window": (scfa.PatternError, "int >= 0", lambda: scfa.SlidingWindow(-1)),
    "float window": (scfa.PatternError, "must be an int", lambda: scfa.SlidingWindow(2.0)),
    "alignment": (scfa.PatternError, "align must be one of", lambda: scfa.Causal(align="left")),
    "a number for a flag": (scfa.PatternError, "True or False", lambda: scfa.Causal(1)),
    "too many hashes": (
        scfa.PatternError,
        "at most 8",
        lambda: attend(
            pattern=scfa.Intersection(
                *(scfa.HashSparse(INTS.copy(), K_INTS.copy()) for _ in range(9))
            )
        ),
    ),
    "backend": (scfa.UnknownBackend, "must be one of", lambda: attend(backend="cuda")),
    "cupy on NumPy arrays": (
        scfa.BackendUnavailable,
        "cannot serve this call",
        lambda: attend(backend="cupy"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name):
    error, words, call = MISTAKES[name]
    with pytest.raises(error, match=re.escape(words)) as caught:
        call()
    assert isinstance(caught.value, scfa.ScfaError)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (scfa.ShapeError, ValueError),
        (scfa.DTypeError, TypeError),
        (scfa.DeviceError, ValueError),
        (scfa.LayoutError, ValueError),
        (scfa.PatternError, ValueError),
        (scfa.ScaleError, ValueError),
        (scfa.OptionError, TypeError),
        (scfa.GradientError, RuntimeError),
        (scfa.BackendUnavailable, RuntimeError),
        (scfa.UnknownBackend, ValueError),
    ],
)
def test_errors_are_builtins_too(error, builtin):
    assert issubclass(error, builtin)
    assert issubclass(error, scfa.ScfaError)


def test_companions_of_backward_are_checked():
    out, lse = attend(return_lse=True)
    with pytest.raises(scfa.ShapeError, match="dout must have shape"):
        scfa.attention_backward(out[:1], Q, K, K, out, lse, scfa.Causal(), backend="reference")
    with pytest.raises(scfa.DTypeError, match="lse must be float32"):
        scfa.attention_backward(
            out, Q, K, K, out, lse.astype(np.float64), scfa.Causal(), backend="reference"
        )


def test_plan_for_other_sizes():
    plan = scfa.make_plan(scfa.Causal(), Q[:, :, :5], K, backend="reference")
    with pytest.raises(scfa.ShapeError, match="the plan was made for"):
        attend(pattern=plan)


def test_validate_names_the_first_wrong_entry():
    ends = np.full((2, 4, 8), 8)
    ends[1, 2, 3] = 9
    with pytest.raises(scfa.PatternError, match=r"KeyRanges.end\[1, 2, 3\] must be at most"):
        scfa.validate(scfa.KeyRanges(INTS, ends), Q, K)
    with pytest.raises(scfa.PatternError, match=r"KeyRanges.start\[0, 0, 0\] must be at least 0"):
        scfa.validate(scfa.KeyRanges(INTS - 1, ends), Q, K)
    with pytest.raises(scfa.PatternError, match="at most end"):
        scfa.validate(scfa.KeyRanges(INTS + 3, INTS + 2), Q, K)
    with pytest.raises(scfa.PatternError, match=r"QKSparse.q_keep.*must be 0 or 1, got 2"):
        scfa.validate(scfa.QKSparse(INTS + 2, K_INTS), Q, K)
    scfa.validate(scfa.KeyRanges(INTS, np.minimum(ends, 8)) & scfa.Causal(), Q, K)


@pytest.mark.parametrize(
    ("batch", "heads", "tq", "tk"), [(0, 2, 3, 3), (1, 2, 0, 3), (1, 2, 3, 0), (1, 0, 3, 3)]
)
def test_empty_tensors_give_empty_results(batch, heads, tq, tk):
    q = np.ones((batch, heads, tq, 16), np.float32)
    k = np.ones((batch, heads, tk, 16), np.float32)
    out, lse = scfa.attention(q, k, k, return_lse=True, backend="reference")
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    assert not out.any()
    assert np.isneginf(lse).all()
    grads = scfa.attention_backward(out, q, k, k, out, lse, scfa.Causal(), backend="reference")
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
    assert not any(g.any() for g in grads)


def test_an_array_in_place_of_a_number_is_told_by_its_shape():
    rows = np.zeros((1, 2, 300, 64), np.float32)
    with pytest.raises(scfa.ShapeError, match=r"must be an int, got an array of shape \(1, 2"):
        scfa.Causal().mask(rows, rows)
    with pytest.raises(scfa.PatternError, match=r"got an array of shape \(1, 2, 300, 64\)$"):
        scfa.SlidingWindow(8, causal=rows)
