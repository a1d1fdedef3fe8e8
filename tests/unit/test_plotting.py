"""What `Plan.plot` refuses before it draws: places and tiles that are none, and empty plans."""

import numpy as np
import pytest

import scfa_core as scfa
from scfa_core.plotting import original_mask

pytest.importorskip("matplotlib", reason="draws (extra 'plot')")


def plan_of(batch=2, heads=3, seqlen=8):
    x = np.zeros((batch, heads, seqlen, 16), np.float32)
    return scfa.make_plan(scfa.Causal(), x, x, backend="reference")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": "a"}, "plot: batch must be an int, got 'a'"),
        ({"batch": 0.5}, r"plot: batch must be an int, got 0\.5"),
        ({"head": True}, "plot: head must be an int, got True"),
        ({"head": None}, "plot: head must be an int, got None"),
        ({"block": "64"}, "plot: block must be an int, got '64'"),
        ({"block": 0}, "plot: block must be at least 1, got 0"),
        ({"batch": 2}, r"the plan has batch 0\.\.1 and head 0\.\.2, got batch=2, head=0"),
        ({"head": 3}, r"the plan has batch 0\.\.1 and head 0\.\.2, got batch=0, head=3"),
        ({"head": -1}, "plot: head must be at least 0, got -1"),
    ],
)
def test_what_is_no_place_in_a_plan(options, words):
    with pytest.raises(scfa.ShapeError, match=f"^{words}$"):
        plan_of().plot(**options)


def test_the_mask_of_a_head_is_the_plans():
    rng = np.random.default_rng(0)
    q, k = (np.zeros((2, heads, 9, 16), np.float32) for heads in (6, 2))
    ids = [rng.integers(0, 3, (2, heads, 9)) for heads in (6, 2)]
    plan = scfa.make_plan(scfa.HashSparse(*ids), q, k, backend="reference")
    for b, h in np.ndindex(2, 6):
        assert (original_mask(plan, b, h) == plan.to_dense()[b, h]).all()


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"heads": 0}])
def test_a_plan_without_heads_says_so(sizes):
    words = "the plan has no head to draw: it was made for batch="
    with pytest.raises(scfa.ShapeError, match=words):
        plan_of(**sizes).plot()


def test_any_integer_names_a_head():
    plan_of().plot(np.int64(1), np.uint8(2), block=np.int32(4))
