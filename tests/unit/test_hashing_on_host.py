"""The angular hashing kernel, compiled as host C++ and run on fibers, against float64 products.

Tensor cores are played by ptx_on_host.hpp; all else is the shipped source.
"""

import host_build
import numpy as np
import pytest
from once import shared_folder
from scfa_core.backends.cupy_raw import hashing, nvrtc

from scfa_core.arrays import DeviceArray
from scfa_core.hashing import random_directions
from scfa_core.hashing_checks import CENTER_ROWS, EVEN_START, MOST_SUM, PAST_START, even_power

SOURCE = """
#include "cuda_on_host.hpp"
#include "ptx.cuh"
struct alignas(8) uint2 {
  unsigned x, y;
};
#include "hash_angular.cu"
extern "C" void run(const HashParams* p, int blocks, int threads, int shared_bytes, int order) {
  static_assert(sizeof(HashParams) == 104, "as hashing.py packs it");
  if (shared_bytes < (int)sizeof(Shared)) std::abort();
  host::launch(scfa_hash_angular, *p, blocks, threads, shared_bytes, order);
}
"""

PAST_RUN = """
#include "hash_past.cu"
extern "C" void run(const PastParams* p, int blocks, int threads, int shared_bytes, int order) {
  static_assert(sizeof(PastParams) == 144, "as hashing.py packs it");
  if (shared_bytes != (int)sizeof(Shared)) std::abort();
  host::launch(scfa_hash_past, *p, blocks, threads, shared_bytes, order);
}
"""
PAST = SOURCE[: SOURCE.index('#include "hash_angular.cu"')] + PAST_RUN

pytestmark = host_build.NEEDS_COMPILER


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    played = (host_build.HERE / "ptx_on_host.hpp").read_text()
    sources = {**nvrtc.read_sources(), "ptx.cuh": played}
    compiler = host_build.HostCompiler(shared_folder(tmp_path_factory), sources)
    yield compiler
    compiler.close()


def device_array(x, dtype):
    return DeviceArray(x.ctypes.data, x.shape, tuple(s // x.itemsize for s in x.strides), dtype, 0)


def narrow(x, dtype):
    """Array of `dtype` (bfloat16 as bits) and what it holds as float64."""
    if dtype != "bfloat16":
        y = x.astype(dtype)
        return y, y.astype(np.float64)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def run(compiler, x, dtype, directions, center=None, rows=hashing._LEAST_TILE, order=0):
    bucket = np.full((directions.shape[0], *x.shape[:3]), -9, np.int32)
    arrays = device_array(x, dtype), device_array(directions, "float32")
    middle = None if center is None else device_array(center, "float32")
    blocks, params = hashing.pack(*arrays, middle, bucket.ctypes.data, rows)
    dim, count = x.shape[3], directions.shape[3]
    values = hashing.constants(dtype, dim, count, aligned=hashing.is_aligned(arrays[0]))
    shared = hashing.shared_bytes(dim, count, rows)
    compiler.start(SOURCE, values).result()(params, blocks, hashing.THREADS, shared, order)
    return bucket


def run_past(compiler, x, dtype, directions, start, order=0, even=False):
    batch, heads, seqlen, dim = x.shape
    rounds, _, _, count = directions.shape
    bucket = np.full((rounds, *x.shape[:3]), -9, np.int32)
    mean = np.full((batch, heads, -(-seqlen // 64), dim), np.nan, np.float32)
    words = hashing.past_room(*x.shape, count, rounds if even else 0)
    room = np.zeros(words + 1, np.int32)
    room[-1] = 77
    arrays = (device_array(x, dtype), *(device_array(y, "float32") for y in (directions, start)))
    results = (y.ctypes.data for y in (bucket, mean, room))
    blocks, params = hashing.pack_past(*arrays, *results, even=even)
    aligned, threads = hashing.is_aligned(arrays[0]), hashing.past_threads(count)
    values = hashing.past_constants(dtype, dim, count, aligned=aligned, even=even)
    shared = hashing.past_shared_bytes(dim, count, even=even)
    compiler.start(PAST, values).result()(params, blocks, threads, shared, order)
    assert room[-1] == 77  # nothing behind the room
    return bucket, mean


def mean_before(exact, start):
    """Mean of the rows before each block of 64, and of 16 times `start`, in float64."""
    seqlen = exact.shape[2]
    start = start.astype(np.float64).repeat(exact.shape[1] // len(start), 0)
    means = []
    for block in range(-(-seqlen // CENTER_ROWS)):
        total, rows = 16 * start + 0 * exact[:, :, 0], np.full((*exact.shape[:2], 1), 16.0)
        for other in range(block):
            own = exact[:, :, CENTER_ROWS * other : CENTER_ROWS * (other + 1)].sum(2)
            counts = np.all(np.abs(own) < 1e30, -1, keepdims=True)
            total, rows = total + np.where(counts, own, 0), rows + CENTER_ROWS * counts
        means.append(total / rows)
    return np.stack(means, 2)


def products(x, directions, center):
    """[y, -y] in float64, (rounds, batch, heads, seqlen, 2 n)."""
    heads, seqlen = x.shape[1:3]
    if center is not None:
        if center.ndim == 2:
            center = center[None, :, None].repeat(-(-seqlen // 64), 2)
        each = center.astype(np.float64).repeat(heads // center.shape[1], 1)
        x = x - each.repeat(64, 2)[:, :, :seqlen]
    directions = directions.astype(np.float64).repeat(heads // directions.shape[1], 1)
    y = np.einsum("bhtd,rhdn->rbhtn", x, directions)
    return np.concatenate([y, -y], axis=-1)


CASES = [
    # dtype, head_dim, directions, heads, own heads, center heads, seqlen, rounds
    ("bfloat16", 64, 8, 2, 2, 0, 150, 1),
    ("bfloat16", 64, 8, 4, 2, 1, 33, 2),
    ("bfloat16", 20, 3, 2, 1, 2, 17, 1),
    ("bfloat16", 40, 1, 1, 1, 0, 5, 1),
    ("float16", 64, 8, 2, 2, 2, 70, 1),
    ("bfloat16", 256, 8, 2, 1, 1, 300, 1),
    ("float16", 33, 12, 1, 1, 0, 40, 1),
    ("float32", 128, 32, 2, 1, 1, 40, 1),
    ("float32", 7, 40, 1, 1, 0, 20, 3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_buckets_are_those_of_float64_but_for_near_ties(compiler, case):
    dtype, dim, count, heads, own, center_heads, seqlen, rounds = case
    rng = np.random.default_rng(dim)
    x, exact = narrow(rng.standard_normal((2, heads, seqlen, dim), np.float32), dtype)
    directions = random_directions(own, dim, 2 * count, rounds=rounds, seed=1)
    center = rng.standard_normal((center_heads, dim), np.float32) if center_heads else None
    right = products(exact, directions, center)
    mine = run(compiler, x, dtype, directions, center)
    assert mine.min() >= 0
    assert mine.max() < 2 * count
    lost = right.max(-1) - np.take_along_axis(right, mine[..., None], -1)[..., 0]
    assert lost.max() < 1e-5  # of products of a few units: the rounding of a float32 sum
    assert (mine == right.argmax(-1)).mean() > 0.99


@pytest.mark.parametrize("rows", [128, 256, 1024])
@pytest.mark.parametrize(
    "case", [(64, 8, 2, 2, 301, 1), (20, 12, 4, 1, 64, 2), (64, 1, 2, 1, 129, 1)], ids=str
)
def test_a_center_for_every_64_rows(compiler, case, rows):
    dim, count, heads, center_heads, seqlen, rounds = case
    rng = np.random.default_rng(dim)
    x, exact = narrow(rng.standard_normal((2, heads, seqlen, dim), np.float32), "bfloat16")
    directions = random_directions(heads, dim, 2 * count, rounds=rounds, seed=1)
    shape = (2, center_heads, -(-seqlen // 64), dim)
    center = 2 * rng.standard_normal(shape, np.float32)
    right = products(exact, directions, center)
    mine = run(compiler, x, "bfloat16", directions, center, rows)
    lost = right.max(-1) - np.take_along_axis(right, mine[..., None], -1)[..., 0]
    assert lost.max() < 1e-5
    assert (mine == right.argmax(-1)).mean() > 0.99


PAST_CASES = [
    # dtype, head_dim, directions, heads, own heads, start heads, seqlen, rounds
    ("bfloat16", 64, 8, 2, 2, 2, 1, 1),
    ("bfloat16", 64, 8, 2, 1, 1, 65, 2),
    ("bfloat16", 20, 3, 2, 2, 1, 1100, 1),
    ("bfloat16", 64, 16, 1, 1, 1, 512, 1),
    ("float16", 128, 8, 1, 1, 1, 700, 1),
    ("bfloat16", 32, 24, 1, 1, 1, 700, 2),
    ("float16", 33, 2, 1, 1, 1, 1030, 1),
    ("float32", 7, 40, 1, 1, 1, 300, 1),
]


@pytest.mark.parametrize("case", PAST_CASES, ids=str)
def test_rows_are_hashed_about_the_mean_of_those_before(compiler, case):
    dtype, dim, count, heads, own, start_heads, seqlen, rounds = case
    rng = np.random.default_rng(seqlen)
    x = rng.standard_normal((2, heads, seqlen, dim), np.float32) + rng.standard_normal(dim)
    x, exact = narrow(x.astype(np.float32), dtype)
    directions = random_directions(own, dim, 2 * count, rounds=rounds, seed=1)
    start = rng.standard_normal((start_heads, dim), np.float32)
    wanted = mean_before(exact, start)
    mine, mean = run_past(compiler, x, dtype, directions, start)
    assert np.abs(mean - wanted).max() < 1e-5
    right = products(exact, directions, wanted)
    lost = right.max(-1) - np.take_along_axis(right, mine[..., None], -1)[..., 0]
    assert lost.max() < 2e-5
    assert (mine == right.argmax(-1)).mean() > 0.99


def factors_before(plain, buckets):
    """Of each row and bucket, from the plain buckets of blocks before its own, in float64."""
    seqlen = plain.shape[-1]
    each = (plain[..., None] == np.arange(buckets)).astype(np.float64)
    factors = np.empty((*plain.shape, buckets))
    for first in range(0, seqlen, CENTER_ROWS):
        count = each[..., :first, :].sum(-2)
        fill = buckets * (count + EVEN_START) / (first + buckets * EVEN_START)
        factors[..., first : first + CENTER_ROWS, :] = (fill ** -even_power(buckets))[..., None, :]
    return factors


@pytest.mark.parametrize("case", [*PAST_CASES, ("bfloat16", 8, 20, 1, 1, 1, 4800, 1)], ids=str)
def test_full_buckets_are_given_less(compiler, case):
    dtype, dim, count, heads, own, start_heads, seqlen, rounds = case
    rng = np.random.default_rng(seqlen)
    x = rng.standard_normal((2, heads, seqlen, dim)) * np.linspace(0.3, 2, dim)
    x, exact = narrow(x.astype(np.float32), dtype)
    directions = random_directions(own, dim, 2 * count, rounds=rounds, seed=1)
    start = rng.standard_normal((start_heads, dim), np.float32)
    plain, mean = run_past(compiler, x, dtype, directions, start)
    mine, same_mean = run_past(compiler, x, dtype, directions, start, even=True)
    np.testing.assert_array_equal(mean, same_mean)
    right = products(exact, directions, mean_before(exact, start)) * factors_before(
        plain, 2 * count
    )
    lost = right.max(-1) - np.take_along_axis(right, mine[..., None], -1)[..., 0]
    assert lost.max() < 1e-4
    assert (mine == right.argmax(-1)).mean() > 0.99
    if seqlen >= 512 and count > 2:
        fills = [np.stack([(y == b).sum(-1) for b in range(2 * count)]) for y in (plain, mine)]
        assert np.square(fills[1]).sum() < np.square(fills[0]).sum()


@pytest.mark.parametrize("seqlen", [4096, 4097, 4096 + 700, 3 * 4096 + 1])
def test_sums_of_many_tiles_are_added_by_groups(compiler, seqlen):
    rng = np.random.default_rng(seqlen)
    x, exact = narrow(rng.standard_normal((1, 1, seqlen, 8), np.float32) + 1, "bfloat16")
    directions, start = random_directions(1, 8, 40, seed=1), np.zeros((1, 8), np.float32)
    _, mean = run_past(compiler, x, "bfloat16", directions, start)
    assert np.abs(mean - mean_before(exact, start)).max() < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 4e36])
def test_blocks_with_bad_rows_count_for_nothing(compiler, dtype, bad):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((1, 2, 800, 32), np.float32)
    x[0, 1, 70, 3] = bad
    x[0, 0, 600, 31] = bad
    with np.errstate(over="ignore"):
        x, exact = narrow(x, dtype)
    start, directions = np.ones((1, 32), np.float32), random_directions(1, 32, 8, seed=1)
    mine, mean = run_past(compiler, x, dtype, directions, start)
    with np.errstate(invalid="ignore"):
        wanted = mean_before(exact, start)
    assert np.abs(mean - wanted).max() < 1e-5
    assert ((mine >= 0) & (mine < 8)).all()


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_means_in_any_order_of_threads_and_beside_any_sequence(compiler, order, even):
    rng = np.random.default_rng(6)
    x, _ = narrow(rng.standard_normal((3, 2, 1200, 64), np.float32), "bfloat16")
    start, directions = np.ones((2, 64), np.float32), random_directions(2, 64, 16, seed=1)
    both = run_past(compiler, x, "bfloat16", directions, start, order, even)
    last = run_past(compiler, x[2:], "bfloat16", directions, start, even=even)
    np.testing.assert_array_equal(both[0][:, 2:], last[0])
    np.testing.assert_array_equal(both[1][2:], last[1])


@pytest.mark.parametrize("order", [0, 1, 2])
def test_threads_in_any_order_and_tiles_of_any_size_give_the_same(compiler, order):
    rng = np.random.default_rng(3)
    x, _ = narrow(rng.standard_normal((1, 2, 300, 64), np.float32), "bfloat16")
    directions = random_directions(2, 64, 16, seed=1)
    first = run(compiler, x, "bfloat16", directions)
    again = run(compiler, x, "bfloat16", directions, rows=256, order=order)
    np.testing.assert_array_equal(first, again)


def test_strides_and_odd_starts(compiler):
    rng = np.random.default_rng(4)
    x, _ = narrow(rng.standard_normal((2, 3, 50, 64), np.float32), "bfloat16")
    directions = random_directions(3, 64, 16, seed=1)
    right = run(compiler, x, "bfloat16", directions)
    turned = np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
    odd = np.zeros((2, 3, 50, 65), np.uint16)[..., 1:]
    odd[...] = x
    assert not hashing.is_aligned(device_array(odd, "bfloat16"))
    for y in (turned, odd, np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1]):
        np.testing.assert_array_equal(run(compiler, y, "bfloat16", directions), right)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_ties_take_the_lowest_and_bad_rows_some_valid_bucket(compiler, dtype):
    dim, count = 32, 12
    directions = np.zeros((1, 1, dim, count), np.float32)
    directions[0, 0, 3, [2, 5, 11]] = 1  # three equal directions
    x = np.zeros((1, 1, 8, dim), np.float32)
    x[0, 0, 0, 3], x[0, 0, 1, 3] = 2, -2
    x[0, 0, 2] = np.nan
    x[0, 0, 3, 4] = np.inf
    x[0, 0, 4, 3] = 6e-5  # below the least normal half
    mine = run(compiler, narrow(x, dtype)[0], dtype, directions)[0, 0, 0]
    np.testing.assert_array_equal(mine[[0, 1, 4, 5]], [2, 2 + count, 2, 0])
    assert ((mine >= 0) & (mine < 2 * count)).all()


def test_kernel_and_package_agree_on_the_rows_of_a_center():
    assert hashing.CENTER_ROWS == CENTER_ROWS
    assert hashing._GROUP == 16
    for name, line in (
        ("hash_rows.cuh", f"kCenterRows = {CENTER_ROWS};"),
        ("hash_past.cu", f"kStartRows = {PAST_START}.0f;"),
        ("hash_past.cu", f"kMostSum = {MOST_SUM:.0e}f;".replace("e+", "e")),
        ("hash_past.cu", f"kGroup = {hashing._GROUP};"),
        ("hash_past.cu", f"kStartFill = {EVEN_START};"),
    ):
        assert line in nvrtc.read_sources()[name]


def test_what_is_not_served_has_a_reason():
    assert "float64" in hashing.reason_against("float64", 64, 8, 0)
    assert "head_dim" in hashing.reason_against("float32", 257, 8, 0)
    assert "128 buckets" in hashing.reason_against("float32", 64, 65, 0)


def test_blocks_fill_the_card():
    assert hashing.tile_rows(192, 16384, 132) == 1024
    assert hashing.tile_rows(8, 4096, 132) == 128
