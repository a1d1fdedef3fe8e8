"""Options of the wrong kind raise at the door, whichever way a call takes, and say what came."""

import re

import numpy as np
import pytest

import scfa_core as scfa
from scfa_core import hashing, merging

X = np.zeros((1, 2, 4, 16), np.float32)
ROWS = np.zeros((1, 2, 4), np.int64)


def mistakes(x, attend):
    """What the core functions refuse: error, words, call."""
    return {
        "a word for a flag": (
            scfa.OptionError,
            "deterministic must be True or False, got 'no'",
            lambda: attend(x, x, x, deterministic="no"),
        ),
        "a number for a flag": (
            scfa.OptionError,
            "deterministic must be True or False, got 1",
            lambda: attend(x, x, x, deterministic=1),
        ),
        "a word for return_lse": (
            scfa.OptionError,
            "return_lse must be True or False, got 'x'",
            lambda: attend(x, x, x, return_lse="x"),
        ),
        "nothing for a flag": (
            scfa.OptionError,
            "deterministic must be True or False, got None",
            lambda: attend(x, x, x, deterministic=None),
        ),
        "a scale in words": (
            scfa.ScaleError,
            "must be a finite number or None",
            lambda: attend(x, x, x, softmax_scale="0.5"),
        ),
        "a scale that is a flag": (
            scfa.ScaleError,
            "got True",
            lambda: attend(x, x, x, softmax_scale=True),
        ),
        "a scale that is an array": (
            scfa.ScaleError,
            "multiply q by a scale that is learned",
            lambda: attend(x, x, x, softmax_scale=x[0, 0, 0, 0:1].sum()[None]),
        ),
        "layout of another kind": (
            scfa.LayoutError,
            "layout must be one of",
            lambda: attend(x, x, x, layout=["bhtd"]),
        ),
        "backend of another kind": (
            scfa.UnknownBackend,
            "backend must be one of",
            lambda: attend(x, x, x, backend=["reference"]),
        ),
        "backends by number": (
            scfa.UnknownBackend,
            "got 0",
            lambda: attend(x, x, x, backend=0),
        ),
        "backward": (
            scfa.OptionError,
            "deterministic must be True or False, got 'no'",
            lambda: scfa.attention_backward(
                x, x, x, x, x, x[..., 0], scfa.Causal(), deterministic="no"
            ),
        ),
        "backward in words": (
            scfa.ScaleError,
            "must be a finite number",
            lambda: scfa.attention_backward(
                x, x, x, x, x, x[..., 0], scfa.Causal(), softmax_scale="1"
            ),
        ),
        "union": (
            scfa.OptionError,
            "return_lse must be",
            lambda: merging.attention_over(x, x, x, [scfa.Causal()], return_lse=2),
        ),
        "a pattern alone for a union": (
            scfa.PatternError,
            "patterns must be a list of patterns, got Causal",
            lambda: merging.attention_over(x, x, x, scfa.Causal()),
        ),
        "plan of a plan": (
            scfa.PatternError,
            "make_plan takes a scfa_core pattern (Causal(), HashSparse(...), ...), got Plan",
            lambda: scfa.make_plan(scfa.make_plan(scfa.Causal(), x, x), x, x),
        ),
        "values of a plan": (
            scfa.PatternError,
            "validate takes a scfa_core pattern (Causal(), HashSparse(...), ...), got Plan",
            lambda: scfa.validate(scfa.make_plan(scfa.Causal(), x, x), x, x),
        ),
        "window of a flag": (scfa.PatternError, "int >= 0", lambda: scfa.SlidingWindow(True)),
        "context": (scfa.UnknownBackend, "got None", lambda: scfa.use_backend(None).__enter__()),
        "half a bucket": (
            scfa.PatternError,
            "buckets must be an even int of at least 2, got 8.0",
            lambda: hashing.random_directions(1, 16, 8.0),
        ),
        "half a head": (
            scfa.PatternError,
            "heads must be an int, got 1.5",
            lambda: hashing.random_directions(1.5, 16, 8),
        ),
    }


def refuses(mistake):
    error, words, call = mistake
    for _ in range(2):  # nothing wrong is remembered
        with pytest.raises(error, match=re.escape(words)) as caught:
            call()
        assert isinstance(caught.value, scfa.ScfaError)


@pytest.mark.parametrize("name", mistakes(X, scfa.attention))
def test_of_numpy_calls(name):
    scfa.attention(X, X, X, deterministic=True, backend="reference")  # 1 == True is remembered
    refuses(mistakes(X, scfa.attention)[name])


@pytest.mark.parametrize("way", ["eager", "operator", "compiled"])
@pytest.mark.parametrize("name", mistakes(X, scfa.attention))
def test_of_torch_calls(name, way, monkeypatch):
    torch = pytest.importorskip("torch", reason="about torch tensors")
    from scfa_core import torch_bridge

    x, attend = torch.zeros(1, 2, 4, 16), scfa.attention
    scfa.attention(x, x, x, deterministic=True)
    if way == "compiled":
        attend = torch.compile(scfa.attention, backend="eager")
    if way == "operator":
        monkeypatch.setattr(torch_bridge, "is_plain", lambda *tensors: False)
    refuses(mistakes(x, attend)[name])


@pytest.mark.parametrize("scale", [np.float32(0.5), np.int64(2), 1, 0])
def test_numbers_of_any_kind_are_scales(scale):
    x = np.random.default_rng(0).standard_normal(X.shape).astype(np.float32)
    mine = scfa.attention(x, x, x, softmax_scale=scale, backend="reference")
    right = scfa.attention(x, x, x, softmax_scale=float(scale), backend="reference")
    np.testing.assert_array_equal(mine, right)


def layers():
    """What modules and helpers of torch refuse: error, words, call."""
    torch = pytest.importorskip("torch", reason="about torch modules")
    from scfa_core import compat, dropping, nn

    x, keep = torch.zeros(1, 2, 4, 16), torch.ones(1, 2, 4, dtype=torch.bool)
    return {
        "width": (scfa.ShapeError, "width must be an int", lambda: nn.DenseSelfAttention(64.0, 4)),
        "heads": (scfa.ShapeError, "heads must be at least 1", lambda: nn.DenseSelfAttention(8, 0)),
        "head_dim": (
            scfa.ShapeError,
            "head_dim must be an int",
            lambda: nn.DenseSelfAttention(64, 4, head_dim="16"),
        ),
        "shared_qk": (
            scfa.OptionError,
            "shared_qk must be True or False, got 'yes'",
            lambda: nn.DenseSelfAttention(64, 4, shared_qk="yes"),
        ),
        "include_self": (
            scfa.OptionError,
            "include_self must be",
            lambda: nn.DenseSelfAttention(64, 4, include_self=0),
        ),
        "bias": (scfa.OptionError, "bias must be", lambda: nn.DenseSelfAttention(64, 4, bias=1)),
        "pattern": (
            scfa.OptionError,
            "lambda q, k: pattern",
            lambda: nn.DenseSelfAttention(64, 4, pattern=scfa.Causal()),
        ),
        "rotary": (
            scfa.OptionError,
            "rotary must be a function",
            lambda: nn.DenseSelfAttention(64, 4, rotary=True),
        ),
        "window": (scfa.PatternError, "int >= 0", lambda: nn.WindowSelfAttention(64, 4, -1)),
        "always": (
            scfa.OptionError,
            "always must be",
            lambda: nn.DropSelfAttention(64, 4, always="x"),
        ),
        "keep": (
            scfa.PatternError,
            "keep must be a number from 0 to 1, got nan",
            lambda: nn.DropSelfAttention(64, 4, float("nan")),
        ),
        "redraw": (
            scfa.OptionError,
            "redraw must be",
            lambda: nn.AngularHash(4, 16, 8, redraw="no"),
        ),
        "center": (scfa.OptionError, "center must be", lambda: nn.AngularHash(4, 16, 8, center=1)),
        "momentum": (
            scfa.PatternError,
            "momentum must be a number from 0 to 1, got 10",
            lambda: nn.AngularHash(4, 16, 8, momentum=10),
        ),
        "buckets": (scfa.PatternError, "even int", lambda: nn.AngularHash(4, 16, "8")),
        "chunk": (
            scfa.ShapeError,
            "chunk must be an int",
            lambda: nn.ReformerAttention(64, 4, 8, 2.5),
        ),
        "random keep": (
            scfa.PatternError,
            "keep must be a number from 0 to 1, got '1'",
            lambda: dropping.random_keep((3,), "1"),
        ),
        "half a row": (
            scfa.PatternError,
            "k must be an int, got 2.5",
            lambda: dropping.top_k_keep(torch.zeros(5), 2.5),
        ),
        "self": (
            scfa.OptionError,
            "include_self must be",
            lambda: dropping.drop_attention(x, x, x, keep, keep, include_self=None),
        ),
        "lse of gates": (
            scfa.OptionError,
            "takes no return_lse",
            lambda: dropping.drop_attention(x, x, x, keep, keep, return_lse=True),
        ),
        "nb_hash": (
            scfa.PatternError,
            "nb_hash must be an even int",
            lambda: compat.hash_attention_fn(x, x, x, nb_hash=8.0),
        ),
        "sparsity": (
            scfa.PatternError,
            "sparsity must be a number",
            lambda: compat.qk_attention_fn(x, x, x, sparsity="half"),
        ),
        "sm_scale": (
            scfa.ScaleError,
            "must be a finite number",
            lambda: compat.hash_sparse_attention(x, x, x, keep, keep, sm_scale="1"),
        ),
    }


def test_of_layers():
    for mistake in layers().values():
        refuses(mistake)
