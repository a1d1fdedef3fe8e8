"""What the functions of `scfa_core.dropping` refuse, and in which words."""

import re

import pytest

import scfa_core as scfa

torch = pytest.importorskip("torch", reason="dropping works on torch tensors")

from scfa_core import compat, dropping  # noqa: E402 - needs torch
from scfa_core.nn import DropSelfAttention  # noqa: E402

SCORES = torch.zeros(1, 2, 4)
ROWS = torch.zeros(1, 2, 4, 16)
KEEP = SCORES == 0


def attend(*tensors, **options):
    return dropping.drop_attention(*tensors, **options)


MISTAKES = {
    # random_keep
    "share": (lambda: dropping.random_keep((3,), 1.2), scfa.PatternError, "from 0 to 1"),
    "shape": (lambda: dropping.random_keep(5, 0.5), scfa.ShapeError, "sequence of sizes, got 5"),
    "size": (lambda: dropping.random_keep((2, -3), 0.5), scfa.ShapeError, "at least 0, got -3"),
    "half": (lambda: dropping.random_keep((2, 1.5), 0.5), scfa.ShapeError, "an int, got 1.5"),
    "seed": (
        lambda: dropping.random_keep((2, 3), 0.5, generator=3),
        scfa.OptionError,
        "must be a torch.Generator or None, got 3; a seed goes as",
    ),
    "seed of compat": (
        lambda: compat.qk_attention_fn(ROWS, ROWS, ROWS, generator=3),
        scfa.OptionError,
        "must be a torch.Generator or None, got 3",
    ),
    "generator of another device": (
        lambda: dropping.random_keep((2, 3), 0.5, device="cuda:1", generator=torch.Generator()),
        scfa.DeviceError,
        r"of the device drawn on, cuda:1, got one of cpu: torch.Generator\('cuda:1'\)",
    ),
    "device": (
        lambda: dropping.random_keep((2, 3), 0.5, device="foo"),
        scfa.DeviceError,
        "a torch.device or a name of one .* got 'foo'",
    ),
    "device of a kind": (
        lambda: dropping.random_keep((2, 3), 0.5, device=1.5),
        scfa.DeviceError,
        "got 1.5",
    ),
    # top_k_keep
    "array": (lambda: dropping.top_k_keep(SCORES.numpy(), 2), scfa.DTypeError, "got ndarray"),
    "number": (
        lambda: dropping.top_k_keep(SCORES[0, 0, 0], 2),
        scfa.ShapeError,
        "single number",
    ),
    "complex": (
        lambda: dropping.top_k_keep(SCORES + 0j, 2),
        scfa.DTypeError,
        "scores must be real numbers, got torch.complex64",
    ),
    "less than none": (lambda: dropping.top_k_keep(SCORES, -1), scfa.PatternError, "at least 0"),
    "k of floats": (
        lambda: dropping.top_k_keep(SCORES, torch.ones(1)),
        scfa.PatternError,
        "k must be integers, got torch.float32",
    ),
    "k of another shape": (
        lambda: dropping.top_k_keep(SCORES, torch.ones(3, 1).long()),
        scfa.ShapeError,
        r"k must broadcast to scores.shape=\(1, 2, 4\), got k.shape=\(3, 1\)",
    ),
    "among is a list": (
        lambda: dropping.top_k_keep(SCORES, 2, among=[True] * 4),
        scfa.DTypeError,
        "among must be a torch tensor, got list",
    ),
    "among of another length": (
        lambda: dropping.top_k_keep(SCORES, 2, among=KEEP[:, :, :3]),
        scfa.ShapeError,
        r"among must broadcast .* got among.shape=\(1, 2, 3\)",
    ),
    "among of more axes": (
        lambda: dropping.top_k_keep(SCORES[0], 2, among=KEEP),
        scfa.ShapeError,
        "among must broadcast",
    ),
    "among elsewhere": (
        lambda: dropping.top_k_keep(SCORES, 2, among=KEEP.to("meta")),
        scfa.DeviceError,
        "among must be on cpu like scores, got meta",
    ),
    "groups of flags": (
        lambda: dropping.top_k_keep(SCORES, 2, groups=KEEP),
        scfa.DTypeError,
        "groups must be integers, got torch.bool",
    ),
    "groups of floats": (
        lambda: dropping.top_k_keep(SCORES, 2, groups=SCORES),
        scfa.DTypeError,
        "groups must be integers, got torch.float32",
    ),
    # threshold_keep
    "list": (lambda: dropping.threshold_keep([1.0]), scfa.DTypeError, "got list"),
    "no threshold": (lambda: dropping.threshold_keep(SCORES, None), scfa.PatternError, "got None"),
    "complex scores": (
        lambda: dropping.threshold_keep(SCORES + 0j),
        scfa.DTypeError,
        "scores must be real numbers, got torch.complex64",
    ),
    "complex threshold": (
        lambda: dropping.threshold_keep(SCORES, torch.zeros(4) + 0j),
        scfa.DTypeError,
        "threshold must be real numbers",
    ),
    "threshold of another length": (
        lambda: dropping.threshold_keep(torch.randn(1, 2, 8), torch.zeros(7)),
        scfa.ShapeError,
        r"threshold must broadcast to scores.shape=\(1, 2, 8\), got threshold.shape=\(7,\)",
    ),
    "threshold of more axes": (
        lambda: dropping.threshold_keep(SCORES, torch.zeros(5, 1, 2, 4)),
        scfa.ShapeError,
        "threshold must broadcast",
    ),
    "threshold of more heads": (
        lambda: dropping.threshold_keep(SCORES[:, :1], torch.zeros(1, 2, 4)),
        scfa.ShapeError,
        "threshold must broadcast",
    ),
    # straight_through
    "flags of NumPy": (
        lambda: dropping.straight_through(SCORES.numpy() > 0, SCORES),
        scfa.DTypeError,
        "keep",
    ),
    "no scores": (lambda: dropping.straight_through(KEEP, None), scfa.DTypeError, "scores"),
    "integers": (
        lambda: dropping.straight_through(KEEP, SCORES.long()),
        scfa.DTypeError,
        "floating-point numbers, which have gradients; got torch.int64",
    ),
    "two shapes": (
        lambda: dropping.straight_through(KEEP[:, :1], SCORES),
        scfa.ShapeError,
        "keep and scores must have one shape",
    ),
    "two devices": (
        lambda: dropping.straight_through(KEEP.to("meta"), SCORES),
        scfa.DeviceError,
        "keep and scores must be on one device, got meta and cpu",
    ),
    # drop_attention
    "another pattern": (
        lambda: attend(ROWS, ROWS, ROWS, KEEP, KEEP, pattern=scfa.SlidingWindow(3)),
        scfa.OptionError,
        "takes no other",
    ),
    "unknown": (
        lambda: attend(ROWS, ROWS, ROWS, KEEP, KEEP, foo=1),
        scfa.OptionError,
        "drop_attention takes softmax_scale, deterministic, backend as further options, got foo",
    ),
    "self": (
        lambda: attend(ROWS, ROWS, ROWS, KEEP, KEEP, causal=False, include_self=False),
        scfa.PatternError,
        "needs causal",
    ),
    "q_scores": (
        lambda: attend(ROWS, ROWS, ROWS, KEEP, KEEP, q_scores=SCORES[:, :1]),
        scfa.ShapeError,
        "q_keep and q_scores must have one shape",
    ),
    "k_scores": (
        lambda: attend(ROWS, ROWS, ROWS, KEEP, KEEP, k_scores=SCORES.long()),
        scfa.DTypeError,
        "k_scores must be floating-point",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_held_wrong_is_told(mistake):
    call, error, words = MISTAKES[mistake]
    with pytest.raises(error, match=words):
        call()


RIGHT = torch.zeros(2, 2, 4, 16)
FLAGS = torch.ones(2, 2, 4, dtype=torch.bool)
WRONG = {
    "one sequence": {"v": RIGHT[:1]},
    "one head": {"v": RIGHT[:, :1]},
    "one row": {"v": RIGHT[:, :, :1]},
    "three axes": {"v": RIGHT[0]},
    "two axes": {"v": RIGHT[0, 0]},
    "more rows": {"v": RIGHT.repeat(1, 1, 2, 1)},
    "another width": {"v": RIGHT[..., :12]},
    "nothing": {"v": None},
    "a list": {"v": [1.0]},
    "NumPy": {"v": RIGHT.numpy()},
    "half": {"v": RIGHT.half()},
    "integers": {"v": RIGHT.long()},
    "complex": {"v": RIGHT + 0j},
    "float8": {"v": RIGHT.to(torch.float8_e4m3fn)},
    "elsewhere": {"v": RIGHT.to("meta")},
    "nested": {"v": "nested"},
    "short flags": {"k_keep": FLAGS[:, :, :3]},
    "flags of a row": {"v": RIGHT[:, :, :1], "k_keep": FLAGS[:, :, :3]},
    "flags of more sequences": {"k_keep": FLAGS.repeat(2, 1, 1)},
    "flags of two axes": {"k_keep": FLAGS[0]},
    "k of fewer rows": {"k": RIGHT[:, :, :2]},
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("wrong", WRONG)
def test_key_scores_hide_no_mistake(wrong, layout):
    """Gates broadcast v, or failed at it, before anybody had looked at it."""
    given = {"k": RIGHT, "v": RIGHT, "k_keep": FLAGS, **WRONG[wrong]}
    for name in ("k", "v") if layout == "bthd" else ():
        if getattr(given[name], "ndim", 0) == 4:
            given[name] = given[name].swapaxes(1, 2)
    if wrong == "nested":
        given["v"] = torch.nested.nested_tensor(list(RIGHT))
    q = RIGHT.transpose(1, 2) if layout == "bthd" else RIGHT
    call = (q, given["k"], given["v"], FLAGS, given["k_keep"])
    with pytest.raises(scfa.ScfaError) as plain:
        dropping.drop_attention(*call, layout=layout)
    scores = torch.zeros(given["k_keep"].shape)
    with pytest.raises(type(plain.value), match=re.escape(str(plain.value))):
        dropping.drop_attention(*call, layout=layout, k_scores=scores)


def test_limits_of_a_layer_that_do_not_fit_are_told_as_by_others():
    layer, x = DropSelfAttention(32, 2, how="top-k"), torch.zeros(2, 10, 32)
    for limits, error, words in (
        ({"keep": torch.ones(2, 9)}, scfa.ShapeError, "^keep must be .batch, seqlen. = .2, 10."),
        ({"keep": torch.ones(3, 10)}, scfa.ShapeError, "^keep must be .batch, seqlen."),
        ({"keep": torch.ones(2, 10).cfloat()}, scfa.DTypeError, "QKSparse.q_keep must be"),
        ({"keep": torch.ones(2, 10).to("meta")}, scfa.DeviceError, "QKSparse.q_keep must be on"),
        ({"documents": torch.ones(2, 9).long()}, scfa.ShapeError, "^documents must be .batch"),
        ({"documents": torch.ones(3, 10).long()}, scfa.ShapeError, "^documents must be .batch"),
        ({"documents": torch.ones(2, 10)}, scfa.DTypeError, "Documents.q_ids must be an int"),
        ({"documents": torch.ones(2, 10).cfloat()}, scfa.DTypeError, "Documents.q_ids must be"),
    ):
        with pytest.raises(error, match=words):
            layer(x, **limits)


def test_generators_of_the_right_device_or_of_none():
    drawn = [
        dropping.random_keep((2, 3), 0.5, device=device, generator=torch.Generator().manual_seed(3))
        for device in (None, "cpu", "cpu:0", torch.device("cpu"))
    ]
    assert all(torch.equal(x, drawn[0]) for x in drawn)
    assert dropping.random_keep((2,), 0.5, device="meta", generator=torch.Generator()).is_meta


def test_a_generator_is_held_against_the_default_device():
    with torch.device("cuda:1"), pytest.raises(scfa.DeviceError, match=r"drawn on, cuda:1, got"):
        dropping.random_keep((2, 3), 0.5, generator=torch.Generator("cpu"))
