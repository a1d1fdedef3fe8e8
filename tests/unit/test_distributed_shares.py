"""Shares of a pattern, of heads and of queries, and what is refused; one process is enough."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="distributed attention needs torch")
if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

import sharded  # noqa: E402
import torch.distributed as dist  # noqa: E402
from sharded import SEQLEN, patterns  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import Shard  # noqa: E402

import scfa_core as scfa  # noqa: E402
from scfa_core import distributed  # noqa: E402
from scfa_core.distributed_rules import _splits_evenly  # noqa: E402


def draw():
    """Q, k and v in float32."""
    return [x.float() for x in sharded.draw()[:3]]


def test_shares_are_equal_or_none():
    for size, mesh, even in (
        (8, (8, 8), True),  # 64 shares of 8 heads are no way to share
        (6, (2, 2), False),  # 4 shares of 6 heads
        (2, (2, 2), True),
        (3, (2,), False),
        (1, (2, 4), True),
    ):
        assert _splits_evenly(size, mesh) is even


@pytest.fixture
def alone(tmp_path):
    """A group of this process only."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


ATTEND = (distributed.ulysses_attention, distributed.gathered_attention)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("attend", ATTEND)
@pytest.mark.parametrize("widths", [(16, 16), (16, 32)])
def test_keys_may_be_more_than_queries(attend, widths):
    q, *_ = draw()
    k, v = (torch.randn(2, 2, 2 * SEQLEN, n) for n in widths)
    for pattern in (
        scfa.Causal(align="bottom-right"),
        scfa.SlidingWindow(100, causal=False),
        scfa.KeyRanges(torch.zeros(1, 1, SEQLEN).long(), torch.full((1, 1, SEQLEN), 40)),
    ):
        both = []
        for function in (attend, scfa.attention):
            tensors = [x.detach().requires_grad_() for x in (q, k, v)]
            out = function(*tensors, pattern)
            both.append([out.detach(), *torch.autograd.grad(out.square().sum(), tensors)])
        torch.testing.assert_close(*both, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("attend", ATTEND)
def test_gradients_that_record_a_graph(attend):
    tensors = [x.requires_grad_() for x in draw()]
    losses = [f(*tensors, scfa.Causal()).square().sum() for f in (attend, scfa.attention)]
    for mine, right in zip(
        torch.autograd.grad(losses[0], tensors, create_graph=True),
        torch.autograd.grad(losses[1], tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_rows_of_every_integer_type(dtype):
    rows = torch.arange(SEQLEN).flip(0)
    q, k, v = (x.index_select(2, rows) for x in draw())
    out = distributed.gathered_attention(q, k, v, scfa.SlidingWindow(5), rows=rows.to(dtype))
    right = scfa.attention(*draw(), scfa.SlidingWindow(5)).index_select(2, rows)
    torch.testing.assert_close(out, right, rtol=0, atol=1e-6)


def test_few_rows_among_more_than_their_type_counts():
    rows = torch.tensor([0, 3, 100], dtype=torch.uint8)
    mine = distributed.queries_of(scfa.SlidingWindow(200, causal=False), rows, 300, 300)
    right = scfa.SlidingWindow(200, causal=False).mask(300, 300)[:, :, rows.long()]
    assert (mine.mask(3, 300) == right).all()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("attend", ATTEND)
def test_what_could_not_be_exchanged_raises(attend):
    q, k, v = draw()
    for wrong, error, words in (
        ((q[0], k, v), scfa.ShapeError, r"q must have 4 axes .* got q.shape=\(4, 24, 16\)"),
        ((q, k.numpy(), v), scfa.DTypeError, "k must be a torch tensor .* got ndarray"),
        ((q, k, v[:, :1]), scfa.ShapeError, "k and v must agree in all but the last axis"),
        ((q, k, v[:, :, 1:]), scfa.ShapeError, "k and v must agree in all but the last axis"),
    ):
        with pytest.raises(error, match=words):
            attend(*wrong, scfa.Causal())
    with pytest.raises(scfa.ShapeError, match="name the 12 rows of k, got 24"):
        distributed.gathered_attention(
            q, k[:, :, :12], v[:, :, :12], scfa.Causal(), rows=torch.arange(SEQLEN)
        )


@pytest.mark.usefixtures("alone")
def test_mistakes_are_told():
    mesh = init_device_mesh("cpu", (1,))
    for wrong in (Shard(2), Shard(3), [Shard(0), Shard(1)], []):
        with pytest.raises(scfa.PatternError, match="1 dimensions"):
            distributed.distribute_pattern(patterns()["hash"], mesh, wrong)
    for attend in ATTEND:
        for wrong in ({"layout": "bthd"}, {"return_lse": True}):
            with pytest.raises(scfa.OptionError, match="returns out alone"):
                attend(*draw()[:3], scfa.Causal(), **wrong)
        plan = scfa.make_plan(scfa.Causal(), *draw()[:2])
        with pytest.raises(scfa.PatternError, match="pattern of the whole sequence"):
            attend(*draw()[:3], plan)
    with pytest.raises(scfa.PatternError, match="distribute_pattern takes the pattern"):
        distributed.distribute_pattern(None, mesh, Shard(0))
    with pytest.raises(scfa.PatternError, match=r"1 dimensions .* got None"):
        distributed.distribute_pattern(scfa.Causal(), mesh, None)
    with pytest.raises(scfa.OptionError, match="mesh must be a DeviceMesh, got NoneType"):
        distributed.distribute_pattern(scfa.Causal(), None, Shard(0))
    rows = torch.arange(SEQLEN)
    for wrong, error, words in (
        (rows[:5], scfa.ShapeError, f"name the {SEQLEN} rows of q, got 5"),
        (rows.double(), scfa.DTypeError, "rows must be an integer tensor"),
        (rows.tolist(), scfa.DTypeError, "rows must be a torch tensor"),
        (rows + 9, scfa.PatternError, "each once; in order they have 9 in place of 0"),
        (rows * 0, scfa.PatternError, "each once; in order they have 0 in place of 1"),
    ):
        with pytest.raises(error, match=words):
            distributed.gathered_attention(*draw()[:3], scfa.Causal(), rows=wrong)
    with pytest.raises(scfa.ShapeError, match="must be an int"):
        distributed.zigzag_rows(8.0)


@pytest.mark.parametrize("name", patterns())
def test_some_queries_see_what_they_saw(name):
    pattern = patterns()[name]
    sizes = {"batch": 2, "heads": 4, "heads_kv": 2}
    rows = torch.tensor([23, 0, 5, 6, 11])
    mine = distributed.queries_of(pattern, rows, SEQLEN, SEQLEN).mask(5, SEQLEN, **sizes)
    assert (mine == pattern.mask(SEQLEN, SEQLEN, **sizes)[:, :, rows]).all()


def test_some_queries_of_windows_beyond_any_length():
    rows = torch.tensor([2, 0], dtype=torch.int32)
    for far in (2**31, 2**63 - 1, 10**30):
        for pattern in (
            scfa.Causal(lag=far, align="bottom-right"),
            scfa.SlidingWindow(far),
            scfa.SlidingWindow(far, causal=False),
        ):
            mine = distributed.queries_of(pattern, rows, 9, 4).mask(2, 4)
            assert (mine == pattern.mask(9, 4)[:, :, [2, 0]]).all()


def test_bottom_right_queries():
    pattern = scfa.Causal(align="bottom-right")
    mine = distributed.queries_of(pattern, torch.tensor([2, 0]), 4, 9).mask(2, 9)
    assert (mine == pattern.mask(4, 9)[:, :, [2, 0]]).all()


def test_some_heads_see_what_they_saw():
    hashes = patterns()["mixed"]
    sizes = {"batch": 2, "heads": 4, "heads_kv": 2}
    half = {"batch": 2, "heads": 2, "heads_kv": 1}
    whole = hashes.mask(SEQLEN, SEQLEN, **sizes)
    for rank in range(2):
        mine = distributed.heads_of(hashes, rank, 2).mask(SEQLEN, SEQLEN, **half)
        assert (mine == whole[:, 2 * rank : 2 * rank + 2]).all()


def test_what_sees_everything_is_whole_for_every_rank():
    everything = scfa.Intersection()
    assert distributed.heads_of(everything, 0, 2).mask(5, 7).all()
    assert distributed.queries_of(everything, torch.arange(3), 5, 7).mask(3, 7).all()


NUMPY_HASH = scfa.HashSparse(np.zeros((1, 4, 6), int), np.zeros((1, 4, 6), int))
TOO_SHORT = scfa.QKSparse(torch.ones(1, 4, 3).bool(), torch.ones(1, 4, 6).bool())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3, 0, 2), scfa.PatternError, "heads_of takes the pattern .* got int"),
        ((scfa.Causal(), 2, 2), scfa.PatternError, "rank must be below ranks=2, got 2"),
        ((scfa.Causal(), 0, "2"), scfa.PatternError, "ranks must be an int"),
        ((patterns()["hash"], 0, 3), scfa.ShapeError, "3 ranks must divide the 4 heads"),
        ((NUMPY_HASH, 0, 2), scfa.DTypeError, "torch tensor, got ndarray"),
    ],
)
def test_shares_of_heads_that_do_not_fit_raise(arguments, error, words):
    with pytest.raises(error, match=words):
        distributed.heads_of(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3, torch.tensor([1]), 6, 6), scfa.PatternError, "queries_of takes the pattern"),
        ((scfa.Causal(), [1, 2], 6, 6), scfa.DTypeError, "torch tensor .*got list"),
        ((scfa.Causal(), torch.tensor([1.0]), 6, 6), scfa.DTypeError, "integer tensor"),
        ((scfa.Causal(), torch.tensor([[1]]), 6, 6), scfa.ShapeError, r"must have 1 axis \(n\)"),
        ((scfa.Causal(), torch.tensor([1]), "6", 6), scfa.ShapeError, "seqlen_q must be an int"),
        ((NUMPY_HASH, torch.tensor([1]), 6, 6), scfa.DTypeError, "torch tensor, got ndarray"),
        ((scfa.Causal(), torch.tensor([1, 6]), 6, 6), scfa.PatternError, "from 0 to 5, got 6"),
        ((scfa.Causal(), torch.tensor([-1]), 6, 6), scfa.PatternError, "from 0 to 5, got -1"),
        ((TOO_SHORT, torch.tensor([1]), 6, 6), scfa.ShapeError, "each of the 6 queries .*whole"),
    ],
)
def test_queries_that_are_none_raise(arguments, error, words):
    with pytest.raises(error, match=words):
        distributed.queries_of(*arguments)
