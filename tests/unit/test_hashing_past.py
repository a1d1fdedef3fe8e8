"""The operator ``scfa::past_hash``, and what kernels that hash are given."""

import math
import weakref
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="about torch tensors")

from test_hashing_torch import DIM, directions, rows  # noqa: E402
from torch import library  # noqa: E402

import scfa_core as scfa  # noqa: E402
from scfa_core import hashing, torch_hashing  # noqa: E402
from scfa_core.nn.past import past_hash  # noqa: E402
from scfa_core.torch_hashing import PAST_HASH, past_mean  # noqa: E402


def test_the_operator_that_hashes_about_the_past():
    start = rows(1, 4, DIM)
    for x in (rows(0, 2, 4, 70, DIM), rows(0, 2, 70, 4, DIM).transpose(1, 2)):
        library.opcheck(PAST_HASH, (x, directions(2, 3), start))
        bucket, mean = past_hash(x, directions(2, 3), start)
        assert torch.equal(bucket, hashing.angular_hash(x, directions(2, 3), mean))
    both = torch.stack((x, x + 1), 3)
    mapped = torch.func.vmap(lambda y: past_hash(y, directions(2, 3), start), in_dims=3)
    slices, means = mapped(both)
    assert (slices[0] == bucket).float().mean() > 0.99  # strides decide how torch sums
    torch.testing.assert_close(means[0], mean)
    narrow = 100 + x.to(torch.bfloat16)  # sums of 16 bits would be off by units
    torch.testing.assert_close(past_mean(narrow, start), past_mean(narrow.float(), start))
    shared = past_mean(x, start[:2])
    torch.testing.assert_close(shared, past_mean(x, start[:2].repeat_interleave(2, 0)))


def test_the_operator_that_gives_less_to_full_buckets():
    start, spread = rows(1, 4, DIM), torch.linspace(0.3, 2, DIM)
    x, table = spread * rows(0, 2, 4, 900, DIM), directions(2, 3)
    library.opcheck(PAST_HASH, (x[:, :, :70], table, start, True))
    plain, mean = past_hash(x, table, start)
    bucket, same = past_hash(x, table, start, even=True)
    assert torch.equal(mean, same)
    right = torch.empty_like(bucket)
    buckets = 2 * table.shape[3]
    for first in range(0, 900, hashing.CENTER_ROWS):
        before = torch.nn.functional.one_hot(plain[..., :first].long(), buckets).sum(3)
        fill = buckets * (before + 2.0) / (first + 2 * buckets)
        block = slice(first, first + hashing.CENTER_ROWS)
        y = x[:, :, block] - mean[:, :, first // hashing.CENTER_ROWS, None]
        y = y @ table.repeat_interleave(2, 1)[:, None]
        factor = fill ** -(0.75 / (math.log2(buckets) - 1.5))
        y = torch.cat((y, -y), -1) * factor[:, :, :, None]
        right[..., block] = y.argmax(-1).int()
    assert (bucket == right).float().mean() > 0.999
    fills = [hashing.bucket_balance(y, buckets).effective_buckets for y in (plain, bucket)]
    assert fills[0] < fills[1]
    last = past_hash(x[1:, 2:], table[:, 1:], start[2:], even=True)[0]
    assert (last == bucket[:, 1:, 2:]).float().mean() > 0.999
    two = table[..., :1]  # one border, which no factor moves
    assert torch.equal(past_hash(x, two, start, even=True)[0], past_hash(x, two, start)[0])


def test_long_sequences_are_made_even_a_stretch_at_a_time(monkeypatch):
    x, table, start = rows(0, 1, 4, 900, DIM) + 1, directions(2, 3), rows(1, 4, DIM)
    right, _ = past_hash(x, table, start, even=True)
    monkeypatch.setattr(torch_hashing, "rows_at_once", lambda *_: 128)
    mine, _ = past_hash(x, table, start, even=True)
    assert (mine == right).float().mean() > 0.999


def test_what_cannot_be_hashed_about_the_past_is_refused_by_name():
    x, table, start = rows(0, 4, 4, 70, DIM), directions(2, 3), rows(1, 4, DIM)
    centers = rows(2, 4, 4, 2, DIM)  # which angular_hash takes
    for bad in (start[:3], start[:0], start[:, 1:]):
        with pytest.raises(scfa.ShapeError, match="start must be"):
            past_hash(x, table, bad)
    with pytest.raises(scfa.ShapeError, match="start must have 2 axes"):
        past_hash(x, table, centers)
    with pytest.raises(scfa.ShapeError, match="x must have 4 axes"):
        past_hash(x[0], table, start)
    with pytest.raises(scfa.DTypeError, match="start must be a torch tensor"):
        past_hash(x, table, None)
    with pytest.raises(scfa.DTypeError, match="x must be a torch tensor"):
        past_hash(x.numpy(), table, start)
    with pytest.raises(scfa.DTypeError, match="start must be real"):
        past_hash(x, table, start + 0j)
    with pytest.raises(scfa.OptionError, match="even must be True or False"):
        past_hash(x, table, start, "no")


def test_rows_that_the_kernel_of_centers_alone_takes(monkeypatch):
    """Directions that fit the shared memory of a card, but not beside the products of a tile."""
    x, table, start = rows(0, 2, 4, 70, DIM), directions(2, 3), rows(1, 4, DIM)
    seen = []

    def kernel(*arguments):
        seen.append(arguments)
        return torch_hashing.hash_rows(*arguments)

    monkeypatch.setattr(
        torch_hashing, "kernel_reason", lambda *_, past: "too many" if past else None
    )
    monkeypatch.setattr(torch_hashing, "_on_cuda", kernel)
    found = torch_hashing._past_on_cuda(x, table, start)
    assert len(seen) == 1
    assert all(map(torch.equal, found, past_hash(x, table, start)))
    found = torch_hashing._past_on_cuda(x, table, start, True)
    assert all(map(torch.equal, found, past_hash(x, table, start, even=True)))


@pytest.mark.parametrize("launch", ["run_angular_hash", "run_past_hash"])
def test_what_a_kernel_reads_is_there_when_it_is_launched(monkeypatch, launch):
    """Copies of what it cannot read as it is: an address keeps nothing alive."""
    from scfa_core.backends.cupy_raw import hashing as kernels

    seen, alive = [], []

    def native(y, memory):
        seen.append(weakref.ref(y))
        return y.view_as(y).data  # another tensor, as an address is

    def launched(*arguments, even=False):
        alive.extend(ref() is not None for ref in seen)

    monkeypatch.setattr(torch_hashing, "kernel_reason", lambda *_, past=False: None)
    monkeypatch.setattr(torch_hashing, "raw_stream", lambda device: 0)
    monkeypatch.setattr(torch_hashing, "TORCH_FRAMEWORK", SimpleNamespace(native=native))
    monkeypatch.setattr(kernels, launch, launched)
    x = rows(0, 2, 4, DIM, 70).transpose(2, 3)
    run = {"run_angular_hash": torch_hashing._on_cuda, "run_past_hash": torch_hashing._past_on_cuda}
    run[launch](x, directions(2, 3).double(), rows(1, 4, DIM).half())
    assert len(alive) >= 4
    assert all(alive)


def test_no_heads_and_no_rounds_of_the_past():
    x, table, start = rows(0, 2, 4, 70, DIM), directions(2, 3), rows(1, 4, DIM)
    bucket, mean = past_hash(x[:, :0], table, start)
    assert (bucket.shape, mean.shape) == ((3, 2, 0, 70), (2, 0, 2, DIM))
    bucket, mean = past_hash(x, table[:0], start)
    assert bucket.shape == (0, 2, 4, 70)
    torch.testing.assert_close(mean, past_mean(x, start))
    for rows_of, table_of in (
        (x[:, :0], table),
        (x[:0], table),
        (x[:, :, :0], table),
        (x, table[:0]),
    ):
        bucket, mean = past_hash(rows_of, table_of, start, even=True)
        plain, same = past_hash(rows_of, table_of, start)
        assert torch.equal(bucket, plain)
        assert torch.equal(mean, same)
