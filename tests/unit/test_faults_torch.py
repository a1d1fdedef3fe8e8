"""NaN and infinities in rows that are hashed, and what a hash remembers of them."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="about torch tensors")

import scfa_core as scfa  # noqa: E402
from scfa_core import nn  # noqa: E402
from scfa_core.hashing_checks import CENTER_ROWS, PAST_START  # noqa: E402
from scfa_core.nn.past import less_past  # noqa: E402
from scfa_core.torch_hashing import past_mean  # noqa: E402

BUCKETS, DIM, HEADS, SEQLEN = 8, 16, 4, 400
BAD = {"NaN": float("nan"), "infinity": float("inf"), "both infinities": None}
ROW = 100  # where it stands: in the second block of `past_mean`


def rows(seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, HEADS, SEQLEN, DIM, generator=generator) + 2


def spoiled(x, what):
    """`x` with one bad row of its first sequence, in its second head."""
    y = x.clone()
    y[0, 1, ROW, 3] = float("inf") if BAD[what] is None else BAD[what]
    if BAD[what] is None:
        y[0, 1, ROW + 1, 3] = float("-inf")
    return y


def hash_of(adapt):
    """A hash that has seen batches before."""
    own = nn.AngularHash(HEADS, DIM, BUCKETS, seed=3, adapt=adapt)
    for seed in range(2) if adapt != "none" else ():
        own(rows(seed))
        own.move_centers()
    return own


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("adapt", nn.hashing.ADAPTS)
def test_a_bad_row_does_not_reach_other_rows(adapt, what):
    own, x = hash_of(adapt), rows(7)
    (right,), (bad,) = own(x), own(spoiled(x, what))
    assert ((bad >= 0) & (bad < BUCKETS)).all()
    same = bad == right
    same[0, 0, 1, ROW : ROW + 2] = True
    if adapt not in ("past", "even"):
        assert same.all()
        return
    # The mean of earlier rows does without the block of the bad one, and is known later.
    later = same[0, 0, 1, CENTER_ROWS * (ROW // CENTER_ROWS + 1) :]
    assert same.sum() == same.numel() - (~later).sum()
    assert later.float().mean() > 0.7


@pytest.mark.parametrize("what", BAD)
def test_the_past_is_that_of_blocks_without_bad_rows(what):
    x = spoiled(rows(0), what)
    start = torch.full((HEADS, DIM), 0.5)
    less = less_past(x, past_mean(x, start))
    for row in (0, CENTER_ROWS, 2 * CENTER_ROWS, 3 * CENTER_ROWS + 9, SEQLEN - 1):
        known = [at for at in range(row // CENTER_ROWS) if at != ROW // CENTER_ROWS]
        blocks = [x[0, 1, CENTER_ROWS * at : CENTER_ROWS * (at + 1)] for at in known]
        total = torch.cat([start[1].expand(PAST_START, DIM), *blocks])
        torch.testing.assert_close(less[0, 1, row], x[0, 1, row] - total.mean(0))


def test_huge_rows_do_not_outgrow_the_sum_of_all():
    x = torch.zeros(1, 1, 64 * 200, 4)
    x[:, :, : 64 * 100] = 4e36
    mean = past_mean(x, torch.zeros(1, 4))
    assert mean.isfinite().all()
    assert not mean.any()


@pytest.mark.parametrize("what", BAD)
def test_the_past_of_a_sharded_sequence_is_the_same(what, monkeypatch):
    """One rank that holds all blocks out of order: the exchange is nothing then."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "distributed").exists() or not torch.distributed.is_available():
        pytest.skip("needs the bench of a source tree, and torch.distributed")
    monkeypatch.syspath_prepend(str(root))
    from bench.distributed import models

    monkeypatch.setattr(models, "gather", lambda x, axis, group: x)
    x = spoiled(rows(0)[:, :, : 6 * CENTER_ROWS], what)
    start = torch.full((HEADS, DIM), 0.5)
    held = torch.arange(6 * CENTER_ROWS).view(6, CENTER_ROWS)[[3, 0, 5, 1, 4, 2]].flatten()
    mine = models.past_mean_of_all(x[:, :, held], start, held)
    right = past_mean(x, start)[:, :, [3, 0, 5, 1, 4, 2]]
    torch.testing.assert_close(mine, right)
    assert right.isfinite().all()


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("adapt", nn.hashing.ADAPTS[1:])
def test_a_bad_batch_does_not_stay_in_the_buffers(adapt, what):
    """As a step that a loss scaler skips: the next ones must be as if it had not been."""
    own, x = hash_of(adapt), rows(7)
    own(spoiled(x, what))
    own.move_centers()
    assert all(buffer.isfinite().all() for buffer in own.buffers())
    without = hash_of(adapt)
    without(x[1:])  # in the second head only the second sequence counts
    without.move_centers()
    for mine, other in zip(own.centers, without.centers, strict=True):
        torch.testing.assert_close(mine.place[1], other.place[1])
        if mine.spread is not None and adapt == "whiten":
            torch.testing.assert_close(mine.spread[1], other.spread[1])


@pytest.mark.parametrize("adapt", nn.hashing.ADAPTS[1:])
def test_a_head_without_a_finite_sequence_keeps_what_it_knew(adapt):
    own = hash_of(adapt)
    known = [buffer.clone() for buffer in (own.centers[0].mean, own.centers[0].place)]
    own(torch.full((2, HEADS, SEQLEN, DIM), float("nan")))
    assert torch.equal(own.centers[0].mean, known[0])
    own.move_centers()
    assert own.centers[0].place.isfinite().all()
    (bucket,) = own(rows(8))
    assert len(bucket.unique()) == BUCKETS


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("kind", ["numpy.float32", "numpy.float64", "array", "tensor"])
def test_a_scale_that_tracing_makes_a_tensor_is_named(kind):
    """torch.compile traces NumPy's numbers as arrays; its own words did not say which."""
    scale = {
        "numpy.float32": np.float32(0.25),
        "numpy.float64": np.float64(0.25),
        "array": np.array(0.25),
        "tensor": torch.tensor(0.25),
    }[kind]
    x = torch.randn(1, 2, 20, 16)

    def attend(x, scale):
        return scfa.attention(x, x, x, softmax_scale=scale)

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"a number of Python.*float\(scale\)"):
        compiled(x, scale)
    torch.testing.assert_close(compiled(x, float(scale)), attend(x, 0.25))
