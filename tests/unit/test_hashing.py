"""Angular hashing by its formula, several rounds as a partition of their union, balance."""

import numpy as np
import pytest
from scfa_core.reference.attention import attention as dense_attention

import scfa_core as scfa
from scfa_core import hashing
from scfa_core.merging import attention_over


def by_formula(x, directions):
    """argmax over [xR, -xR], spelled out; (rounds, batch, heads, seqlen)."""
    group = x.shape[1] // directions.shape[1]
    turned = np.einsum("bhtd,rhdn->rbhtn", x, np.repeat(directions, group, axis=1))
    return np.concatenate([turned, -turned], axis=-1).argmax(axis=-1)


@pytest.mark.parametrize(("heads", "own_heads"), [(3, 3), (4, 2), (4, 1)])
@pytest.mark.parametrize("rounds", [1, 3])
def test_buckets_follow_the_formula(heads, own_heads, rounds, monkeypatch):
    x = np.random.default_rng(0).standard_normal((2, heads, 161, 24)).astype(np.float32)
    directions = hashing.random_directions(own_heads, 24, 10, rounds=rounds, seed=1)
    right = by_formula(x.astype(np.float64), directions.astype(np.float64))
    whole = hashing.angular_hash(x, directions)
    assert whole.dtype == np.int32
    np.testing.assert_array_equal(whole, right)
    monkeypatch.setattr(hashing, "_WORKSPACE", 1000)  # a few rows at a time
    np.testing.assert_array_equal(hashing.angular_hash(x, directions), right)


def test_torch_agrees_with_numpy_and_ignores_length_and_autocast(monkeypatch):
    torch = pytest.importorskip("torch", reason="compares torch tensors with NumPy arrays")
    x = np.random.default_rng(2).standard_normal((1, 4, 150, 32)).astype(np.float32)
    directions = hashing.random_directions(2, 32, 16, rounds=2, seed=3)
    right = hashing.angular_hash(x, directions)
    tensors = torch.from_numpy(x).requires_grad_(), torch.from_numpy(directions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = hashing.angular_hash(*tensors)
    assert mine.dtype == torch.int32
    assert not mine.requires_grad
    np.testing.assert_array_equal(mine.numpy(), right)
    longer = hashing.angular_hash(tensors[0] * 7.5, tensors[1])
    np.testing.assert_array_equal(longer.numpy(), right)
    monkeypatch.setattr(hashing, "_WORKSPACE", 1000)
    np.testing.assert_array_equal(hashing.angular_hash(*tensors).numpy(), right)


def test_opposite_vectors_never_share_a_bucket():
    x = np.random.default_rng(4).standard_normal((1, 2, 300, 16)).astype(np.float32)
    directions = hashing.random_directions(2, 16, 8, seed=0)
    there, back = hashing.angular_hash(x, directions), hashing.angular_hash(-x, directions)
    np.testing.assert_array_equal((there + 4) % 8, back)


def test_directions_are_seeded_unit_columns():
    a, b, c = (hashing.random_directions(2, 48, 6, rounds=2, seed=s) for s in (5, 5, 6))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    np.testing.assert_allclose(np.linalg.norm(a, axis=2), 1, rtol=1e-6)
    assert not np.array_equal(a[0], a[1])


@pytest.mark.parametrize(
    "wrong",
    [{"buckets": 7}, {"buckets": 0}, {"rounds": 0}, {"heads": 0}, {"seed": "x"}, {"seed": -1}],
)
def test_impossible_directions_raise(wrong):
    with pytest.raises(scfa.PatternError):
        hashing.random_directions(**({"heads": 1, "head_dim": 16, "buckets": 4} | wrong))


def test_axes_that_do_not_fit_raise():
    directions = hashing.random_directions(2, 16, 4)
    with pytest.raises(scfa.ShapeError, match="multiple of these heads"):
        hashing.angular_hash(np.zeros((1, 3, 5, 16), np.float32), directions)
    with pytest.raises(scfa.ShapeError, match="same head_dim"):
        hashing.angular_hash(np.zeros((1, 2, 5, 24), np.float32), directions)
    with pytest.raises(scfa.ShapeError, match="needs x"):
        hashing.angular_hash(np.zeros((2, 5, 16), np.float32), directions)


@pytest.mark.parametrize(("rounds", "buckets"), [(1, 8), (2, 8), (2, 6), (3, 4), (3, 2)])
@pytest.mark.parametrize("include_self", [True, False])
def test_rounds_partition_the_pairs_that_share_any_bucket(rounds, buckets, include_self):
    rng = np.random.default_rng(7)
    q = rng.integers(0, buckets, (rounds, 2, 4, 33), dtype=np.int32)
    k = rng.integers(0, buckets, (rounds, 2, 2, 40), dtype=np.int32)
    patterns = hashing.disjoint_rounds(q, k, buckets, include_self=include_self)
    bits = int(np.ceil(np.log2(buckets)))
    assert len(patterns) == sum(bits**r for r in range(rounds))
    seen = sum(p.mask(33, 40, batch=2, heads=4, heads_kv=2).astype(int) for p in patterns)
    shared = (q[..., :, None] == np.repeat(k, 2, axis=2)[..., None, :]).any(axis=0)
    i, j = np.arange(33)[:, None], np.arange(40)[None, :]
    np.testing.assert_array_equal(seen, shared & (j <= i if include_self else j < i))


def test_attention_over_rounds_is_attention_over_their_union():
    rng = np.random.default_rng(8)
    q, k, v = rng.standard_normal((3, 2, 3, 50, 16))
    directions = hashing.random_directions(3, 16, 8, rounds=2, seed=0)
    q_bucket, k_bucket = (hashing.angular_hash(x, directions) for x in (q, k))
    patterns = hashing.disjoint_rounds(q_bucket, k_bucket, 8)
    out, lse = attention_over(q, k, v, patterns, return_lse=True, backend="reference")
    shared = (q_bucket[..., :, None] == k_bucket[..., None, :]).any(axis=0)
    right, right_lse = dense_attention(q, k, v, shared & np.tri(50, dtype=bool), 0.25)
    np.testing.assert_allclose(out, right, rtol=0, atol=1e-6)
    np.testing.assert_allclose(lse, right_lse, rtol=0, atol=1e-6)


def test_too_many_rounds_and_unequal_rounds_raise():
    ids = np.zeros((16, 1, 1, 4), np.int32)
    for rounds, buckets, parts in ((16, 16, "1,431,655,765"), (6, 16, "1,365"), (64, 2, "64")):
        many = np.zeros((rounds, 1, 1, 4), np.int32)
        with pytest.raises(scfa.PatternError, match=f"are {parts} patterns.*2 or 3 rounds"):
            hashing.disjoint_rounds(many, many, buckets)
    with pytest.raises(scfa.PatternError, match="rounds of buckets"):
        hashing.disjoint_rounds(ids[:2], ids[:1], 16)


def test_what_cannot_be_hashed_raises():
    rows, directions = np.zeros((1, 2, 5, 16), np.float32), hashing.random_directions(2, 16, 4)
    for wrong in (None, rows.tolist(), "x", 3):
        with pytest.raises(scfa.DTypeError, match="x must be an array"):
            hashing.angular_hash(wrong, directions)
        with pytest.raises(scfa.DTypeError, match="directions must be an array"):
            hashing.angular_hash(rows, wrong)
    with pytest.raises(scfa.DTypeError, match="center must be an array"):
        hashing.angular_hash(rows, directions, 0.5)
    with pytest.raises(scfa.ShapeError, match="directions have 0 heads"):
        hashing.angular_hash(rows, directions[:, :0])
    with pytest.raises(scfa.ShapeError, match="center must be"):
        hashing.angular_hash(rows, directions, np.zeros((0, 16), np.float32))


def test_arrays_of_two_libraries_or_devices_raise():
    torch = pytest.importorskip("torch", reason="mixes torch tensors with NumPy arrays")
    rows, directions = np.zeros((1, 2, 5, 16), np.float32), hashing.random_directions(2, 16, 4)
    tensors = torch.from_numpy(rows), torch.from_numpy(directions)
    center, ids = np.zeros((2, 16), np.float32), np.zeros((1, 1, 1, 4), np.int32)
    for given, words in (
        ((tensors[0], directions), "directions must come from the library of x, torch.Tensor, got"),
        ((rows, tensors[1]), "got torch.Tensor; convert"),
        ((*tensors, center), "center must come from"),
    ):
        with pytest.raises(scfa.DeviceError, match=words):
            hashing.angular_hash(*given)
    with pytest.raises(scfa.DeviceError, match="on the device of x, cpu, got meta"):
        hashing.angular_hash(tensors[0], tensors[1].to("meta"))
    with pytest.raises(scfa.DeviceError, match="k_bucket must come from the library of q_bucket"):
        hashing.disjoint_rounds(torch.from_numpy(ids), ids, 16)


def test_rounds_of_what_is_no_bucket_raise():
    ids = np.zeros((2, 1, 1, 4), np.int32)
    for buckets in (-4, 0, "4", 4.0, True):
        with pytest.raises(scfa.PatternError, match="buckets must be"):
            hashing.disjoint_rounds(ids, ids, buckets)
    with pytest.raises(scfa.ShapeError, match=r"q_bucket must be \(rounds, batch, heads, seqlen\)"):
        hashing.disjoint_rounds(ids[0], ids[0], 4)
    with pytest.raises(scfa.DTypeError, match=r"k_bucket must hold integers.* got float32"):
        hashing.disjoint_rounds(ids, ids.astype(np.float32), 4)
    with pytest.raises(scfa.DTypeError, match="q_bucket must be an array"):
        hashing.disjoint_rounds(None, ids, 4)
    with pytest.raises(scfa.PatternError, match="at least one round"):
        hashing.disjoint_rounds(ids[:0], ids[:0], 4)
    with pytest.raises(scfa.OptionError, match="causal"):
        hashing.disjoint_rounds(ids, ids, 4, causal="no")


def test_balance_of_what_is_no_bucket_raises():
    ids = np.zeros((2, 4), np.int32)
    for buckets in ("4", 4.0, -4, 0, None):
        with pytest.raises(scfa.PatternError, match="buckets must be"):
            hashing.bucket_balance(ids, buckets)
    with pytest.raises(scfa.ShapeError, match="seqlen"):
        hashing.bucket_balance(np.zeros((), np.int32), 4)
    with pytest.raises(scfa.DTypeError, match=r"must hold integers.* got float64"):
        hashing.bucket_balance(ids + 0.5, 4)
    for wrong in (None, [0, 1]):
        with pytest.raises(scfa.DTypeError, match="bucket must be an array"):
            hashing.bucket_balance(wrong, 4)


def test_balance_counts():
    ids = np.array([[0, 0, 0, 1], [0, 1, 2, 3]])
    balance = hashing.bucket_balance(ids, 4)
    np.testing.assert_array_equal(balance.counts, [[3, 1, 0, 0], [1, 1, 1, 1]])
    assert balance.largest == 3
    assert balance.imbalance == 3
    assert balance.effective_buckets == pytest.approx((1 / (0.75**2 + 0.25**2) + 4) / 2)
    assert balance.empty == 0.25
    with pytest.raises(scfa.PatternError, match=r"\[0, 3\)"):
        hashing.bucket_balance(ids, 3)


@pytest.mark.parametrize("shape", [(2, 3, 0), (2, 0, 5), (0,)])
def test_balance_of_nothing(shape):
    balance = hashing.bucket_balance(np.zeros(shape, np.int32), 4)
    assert balance.counts.shape == (*shape[:-1], 4)
    assert not balance.counts.any()
    assert (balance.largest, balance.imbalance, balance.effective_buckets) == (0, 0, 0)


def test_random_vectors_fill_buckets_evenly():
    x = np.random.default_rng(9).standard_normal((1, 2, 4096, 64)).astype(np.float32)
    bucket = hashing.angular_hash(x, hashing.random_directions(2, 64, 16, seed=2))
    balance = hashing.bucket_balance(bucket, 16)
    assert balance.empty == 0
    assert balance.effective_buckets > 15


@pytest.mark.parametrize("own_heads", [4, 2, 1])
def test_a_center_is_subtracted_and_makes_buckets_even(own_heads):
    torch = pytest.importorskip("torch", reason="compares torch tensors with NumPy arrays")
    rng = np.random.default_rng(7)
    center = (3 * rng.standard_normal((own_heads, 32))).astype(np.float32)
    each = center.repeat(4 // own_heads, axis=0)[:, None]
    x = rng.standard_normal((2, 4, 500, 32)).astype(np.float32) + each
    directions = hashing.random_directions(2, 32, 16, rounds=2, seed=3)
    mine = hashing.angular_hash(x, directions, center)
    right = hashing.angular_hash(x - each, directions)
    assert (mine == right).mean() > 0.999  # all but those whose best two directions are level
    tensors = (torch.from_numpy(y) for y in (x, directions, center))
    assert (hashing.angular_hash(*tensors).numpy() == right).mean() > 0.999
    crowded, even = (
        hashing.bucket_balance(y, 16).effective_buckets
        for y in (hashing.angular_hash(x, directions), mine)
    )
    assert crowded < 8 < 14 < even
    with pytest.raises(scfa.ShapeError, match="center must be"):
        hashing.angular_hash(x, directions, center[:, :5])


@pytest.mark.parametrize("own_heads", [4, 1])
@pytest.mark.parametrize("seqlen", [1, 64, 200])
def test_a_center_for_every_64_rows(own_heads, seqlen, monkeypatch):
    torch = pytest.importorskip("torch", reason="compares torch tensors with NumPy arrays")
    rng = np.random.default_rng(7)
    blocks = -(-seqlen // hashing.CENTER_ROWS)
    center = 3 * rng.standard_normal((2, own_heads, blocks, 32)).astype(np.float32)
    each = center.repeat(4 // own_heads, axis=1).repeat(hashing.CENTER_ROWS, axis=2)[:, :, :seqlen]
    x = rng.standard_normal((2, 4, seqlen, 32)).astype(np.float32) + each
    directions = hashing.random_directions(2, 32, 16, rounds=2, seed=3)
    right = by_formula((x - each).astype(np.float64), directions.astype(np.float64))
    tensors = [torch.from_numpy(y) for y in (x, directions, center)]
    for workspace in (1 << 24, 1000):  # all rows at once, and 64
        monkeypatch.setattr(hashing, "_WORKSPACE", workspace)
        for mine in (hashing.angular_hash(x, directions, center), hashing.angular_hash(*tensors)):
            assert (np.asarray(mine) == right).mean() > 0.999
    for wrong in (center[:1], center[:, :, 1:], center[..., 1:], center[:, :0], center[0]):
        with pytest.raises(scfa.ShapeError, match=r"ceil\(seqlen / 64\)"):
            hashing.angular_hash(x, directions, wrong)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_no_heads_no_columns_and_complex_numbers(library):
    def to(*arrays):
        if library == "numpy":
            return arrays
        torch = pytest.importorskip("torch", reason="about torch tensors")
        return [torch.from_numpy(y) for y in arrays]

    x, directions = np.ones((1, 2, 5, 16), np.float32), hashing.random_directions(2, 16, 8, seed=1)
    assert hashing.angular_hash(*to(x[:, :0], directions)).shape == (1, 1, 0, 5)
    with pytest.raises(scfa.ShapeError, match="of 2 buckets or more"):
        hashing.angular_hash(*to(x, directions[..., :0]))
    for name, arrays in (
        ("x", (x + 1j, directions)),
        ("center", (x, directions, np.ones((2, 16)) + 1j)),
    ):
        with pytest.raises(scfa.DTypeError, match=f"{name} must be real numbers"):
            hashing.angular_hash(*to(*arrays))


def test_rows_seen_through_a_transpose_and_narrow_rows():
    torch = pytest.importorskip("torch", reason="about torch tensors")
    x = torch.randn(2, 50, 4, 32, generator=torch.Generator().manual_seed(1))
    directions = torch.from_numpy(hashing.random_directions(4, 32, 16, rounds=3, seed=3))
    right = hashing.angular_hash(x.numpy().swapaxes(1, 2), directions.numpy())
    assert np.array_equal(hashing.angular_hash(x.transpose(1, 2), directions).numpy(), right)
    narrow = x.bfloat16().transpose(1, 2)
    right = hashing.angular_hash(narrow.float().numpy(), directions.numpy())
    assert np.array_equal(hashing.angular_hash(narrow, directions).numpy(), right)
