"""Layers beside a cache of keys: new rows get what they get in a call of the whole sequence."""

import pytest

import scfa_core as scfa

torch = pytest.importorskip("torch", reason="these are torch modules")

from scfa_core import nn  # noqa: E402 - needs torch
from scfa_core.decoding import at_end  # noqa: E402

WIDTH, HEADS, SEQLEN = 64, 4, 60
LAYERS = {
    "dense": lambda: nn.DenseSelfAttention(WIDTH, HEADS, heads_kv=2),
    "window": lambda: nn.WindowSelfAttention(WIDTH, HEADS, 9),
    "hash": lambda: nn.HashSelfAttention(WIDTH, HEADS, 4, seed=1),
    "rounds": lambda: nn.HashSelfAttention(WIDTH, HEADS, 4, seed=1, rounds=2, heads_kv=2),
    "whitened": lambda: nn.HashSelfAttention(WIDTH, HEADS, 4, seed=1, adapt="whiten"),
    "shared": lambda: nn.HashSelfAttention(
        WIDTH, HEADS, 4, seed=1, shared_qk=True, include_self=False
    ),
    "near": lambda: nn.HashSelfAttention(WIDTH, HEADS, 4, seed=1, near_heads=3, near_block=7),
    "near, grouped": lambda: nn.HashSelfAttention(
        WIDTH, HEADS, 4, seed=1, near_heads=1, near_block=16, heads_kv=2
    ),
    "near, shared": lambda: nn.HashSelfAttention(
        WIDTH, HEADS, 4, seed=1, near_heads=2, near_block=16, shared_qk=True
    ),
    "threshold": lambda: nn.DropSelfAttention(WIDTH, HEADS, how="threshold", heads_kv=2),
}


def layer_and_input(make):
    torch.manual_seed(5)
    layer = make()
    x = torch.randn(2, SEQLEN, WIDTH)
    if getattr(getattr(layer, "hash", None), "adapt", "none") != "none":
        layer(x)
        nn.move_centers(layer)
    return layer.eval(), x


def cached(layer, x, rows):
    """The last `rows` of the sequence beside all its keys; the layer's output for them."""
    q, k, v = layer.project(x)
    q = q[:, :, -rows:]
    patterns = [at_end(pattern, q, k) for pattern in layer.make_patterns(q, k)]
    out = layer.attend(q, k, v, x, patterns)
    return layer.output(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("rows", [1, 5, SEQLEN])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_the_last_rows_get_what_they_get_in_the_whole(name, rows):
    layer, x = layer_and_input(LAYERS[name])
    torch.testing.assert_close(cached(layer, x, rows), layer(x)[:, -rows:], rtol=0, atol=2e-6)
    early = x[:, :23]  # one row after another, too
    torch.testing.assert_close(
        torch.cat([cached(layer, x[:, :end], 1) for end in (21, 22, 23)], dim=1),
        layer(early)[:, -3:],
        rtol=0,
        atol=2e-6,
    )


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: nn.HashSelfAttention(WIDTH, HEADS, 4, adapt="past"), "adapt='past' buckets"),
        (
            lambda: nn.HashSelfAttention(WIDTH, HEADS, 4, adapt="even", near_heads=1),
            "adapt='even' buckets of queries hang on all earlier queries: give whole",
        ),
        (
            lambda: nn.HashSelfAttention(WIDTH, HEADS, 4, adapt="center", shared_qk=True),
            "shared_qk and adapt='center'",
        ),
        (lambda: nn.DropSelfAttention(WIDTH, HEADS, how="top-k"), "'threshold' serves a cache"),
    ],
)
def test_what_hangs_on_rows_that_are_not_there_is_refused(make, told):
    layer, x = layer_and_input(make)
    with pytest.raises(scfa.PatternError, match=told):
        cached(layer, x, 1)


def test_scores_of_the_new_row_alone_do_not_choose_among_all_keys():
    layer, x = layer_and_input(LAYERS["threshold"])
    q, k, v = layer.project(x)
    q = q[:, :, -1:]
    patterns = [at_end(pattern, q, k) for pattern in layer.make_patterns(q, k)]
    with pytest.raises(scfa.ShapeError, match=r"all 60 rows that the keys are of.*\(2, 1, 64\)"):
        layer.attend(q, k, v, x[:, -1:], patterns)
