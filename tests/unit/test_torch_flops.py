"""Flop of attention, counted by torch's own counter: the visible pairs, forward and backward."""

import doctest

import pytest

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import scfa_core as scfa  # noqa: E402
from scfa_core import torch_flops  # noqa: E402
from scfa_core.hashing import angular_hash, random_directions  # noqa: E402
from scfa_core.merging import attention_over  # noqa: E402
from scfa_core.nn import AngularHash  # noqa: E402

BATCH, HEADS, HEADS_KV, ROWS, DIM, DIM_V = 2, 4, 2, 9, 16, 24
ALL = BATCH * HEADS * ROWS * ROWS
FORWARD, BACKWARD = 2 * (DIM + DIM_V), 2 * (3 * DIM + 2 * DIM_V)
WINDOW = BATCH * HEADS * (1 + 2 + 3 * (ROWS - 2))  # pairs of a window of 3


@pytest.fixture(autouse=True)
def _registered():
    torch_flops.register()
    torch_flops.register()  # no harm


def tensors(layout="bhtd", device="cpu"):
    sizes = (HEADS, DIM), (HEADS_KV, DIM), (HEADS_KV, DIM_V)
    made = [torch.randn(BATCH, heads, ROWS, dim, device=device) for heads, dim in sizes]
    swapped = [x.transpose(1, 2).contiguous() for x in made]
    return [x.requires_grad_() for x in (made if layout == "bhtd" else swapped)]


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("planned", [False, True])
def test_visible_pairs_are_counted(layout, planned):
    q, k, v = tensors(layout)
    pattern = scfa.SlidingWindow(3)
    pattern = scfa.make_plan(pattern, q, k, layout=layout) if planned else pattern
    outs = []
    forward = counted(lambda: outs.append(scfa.attention(q, k, v, pattern, layout=layout)))
    assert forward == WINDOW * FORWARD
    assert counted(lambda: outs[0].sum().backward()) == WINDOW * BACKWARD


def test_a_backward_of_what_was_not_watched_is_counted():
    q, k, v = tensors()
    out = scfa.attention(q, k, v, scfa.SlidingWindow(3))
    assert counted(lambda: out.sum().backward()) == WINDOW * BACKWARD


def test_all_parts_of_a_union_are_counted():
    q, k, v = tensors()
    parts = [scfa.SlidingWindow(3), scfa.Causal(lag=3)]
    causal = BATCH * HEADS * ROWS * (ROWS + 1) // 2
    both = counted(lambda: attention_over(q, k, v, parts).sum().backward())
    assert both == causal * (FORWARD + BACKWARD)


@pytest.mark.parametrize("place", ["meta", "fake"])
@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_what_cannot_be_read_counts_all_pairs(place, layout):
    def run():
        q, k, v = tensors(layout, "meta" if place == "meta" else "cpu")
        scfa.attention(q, k, v, scfa.SlidingWindow(3), layout=layout).sum().backward()

    def faked():
        with FakeTensorMode():
            run()

    assert counted(run if place == "meta" else faked) == ALL * (FORWARD + BACKWARD)


def test_hashing_counts_its_products():
    x, directions = tensors()[0], torch.from_numpy(random_directions(HEADS_KV, DIM, 8, rounds=3))
    assert counted(lambda: angular_hash(x, directions)) == 2 * 3 * x.numel() * 4

    about_the_past = AngularHash(HEADS_KV, DIM, 8, query_heads=HEADS, adapt="past").eval()
    with torch.no_grad():
        assert counted(lambda: about_the_past(x)) >= 2 * x.numel() * 4  # and what centers it


def test_the_example_runs():
    result = doctest.testmod(torch_flops, extraglobs={"scfa": scfa})
    assert result.attempted > 0
    assert result.failed == 0
