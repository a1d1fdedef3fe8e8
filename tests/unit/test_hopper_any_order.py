"""The Hopper kernels on fibers (hopper_host.py) against the truth: ranges in any order."""

import ctypes
import itertools
from dataclasses import replace

import hopper_host
import host_build
import numpy as np
import pytest
from hopper_host import (
    HASH,
    IN_ONE_PASS,
    TILE_HEADERS,
    check,
    check_case,
    described,
    run,
    source_of,
)
from scfa_core.backends.cupy_raw import launch_sm90

import scfa_core as scfa
from scfa_core import testing, testing_problems
from scfa_core.plan import PlanArrays
from scfa_core.problem import Problem
from scfa_core.testing import Part, Spec

pytestmark = host_build.NEEDS_COMPILER
kernels = hopper_host.kernels

TILES_DRIVER = """
// Which keys of its blocks the gathering warpgroup takes for seen, tile by tile.
template <int kRows, int kBlock>
void visit(const Params& p, int keys_of_tile, KeyUnion* unions, char* seen) {
  const TileData<kRows> data{64};
  const int thread = threadIdx.x, own = gather_owned_row(thread, 0);
  for (int tile = 0; tile < p.tiles; ++tile) {
    const QueryTile at = locate_query_tile<kRows>(p, tile);
    load_tile_rows(data, 0, PlannedRows(p, at), at.first_row, thread);
    __syncthreads();
    const KeyUnion keys = join_key_ranges(0);
    if (thread == 0) unions[tile] = keys;
    for (int first = keys.first; first < keys.end; first += kBlock) {
      const int key = first + min(own, kBlock - 1);
      const bool sees = seen_by_tile<kBlock>(data, keys, first, key, thread);
      if (own < kBlock) seen[tile * keys_of_tile + key] = sees;
    }
    __syncthreads();
  }
}

extern "C" void run(const int* starts, const int* ends, const int* indices, int rows, int tiles,
                    unsigned multiplier, unsigned shift, int keys_of_tile, KeyUnion* unions,
                    char* seen, int order) {
  std::vector<char> shared(64 + TileData<SCFA_ROWS>::kBytes);
  dynamic_shared = shared.data();
  blockDim = {kGatherThreads, 1, 1};
  Params p{};
  p.key_start = starts, p.key_end = ends, p.q_index = indices;
  p.seqlen_q = rows, p.tiles = p.tiles_per_head = tiles;
  p.by_tiles = {multiplier, shift};
  host::start_block(kGatherThreads, 64 + TileData<SCFA_ROWS>::kBytes);
  host::body = [&] { visit<SCFA_ROWS, SCFA_BLOCK_N>(p, keys_of_tile, unions, seen); };
  host::run_block(kGatherThreads, order);
}
"""


@pytest.mark.parametrize(
    ("style", "head_dim"),
    [
        ("random", 40),  # the kernels of 64, but for columns that are zeros
        *itertools.product(("random", "narrow", "reversed", "outside", "empty"), (64, 128, 256)),
    ],
)
def test_ranges_in_any_order(kernels, head_dim, style):
    """Grouped heads, and more rows in the last tile than there are queries."""
    parts = (Part("ranges", style),)
    heads = (2, 1) if head_dim == 128 else (4, 2)  # a second group takes the same way everywhere
    sizes = (1, *heads, 210, 333, head_dim, head_dim, "bfloat16")
    check(kernels, Spec(*sizes, parts=parts, poison=True, seed=head_dim), order=1, blocks=2)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["hash", "all together", "window"])
def test_where_there_is_order_both_kinds_of_kernels_give_the_same_bits(kernels, head_dim, name):
    """The envelopes of ranges in order are the ranges, and no block is passed over."""
    sizes = (1, 2, 1, 210, 277, head_dim, head_dim, "bfloat16")
    case = testing.build(Spec(*sizes, parts=IN_ONE_PASS[name], seed=9))
    for got, right in zip(run(kernels, case, any_order=True), run(kernels, case), strict=True):
        np.testing.assert_array_equal(got, right)


def test_ranges_in_any_order_in_the_build_for_the_sanitizer(kernels):
    parts = (Part("ranges", "random"),)
    spec = Spec(1, 2, 2, 150, 170, 64, 64, "bfloat16", parts=parts, poison=True, seed=6)
    check(kernels, spec, order=1, sanitize=True)


@pytest.mark.parametrize("seed", range(3))
def test_ranges_in_any_order_within_groups(kernels, seed):
    parts = (*HASH, Part("ranges", "random"), Part("keep", "uniform", 80))
    sizes = (2, 2, 1, 260, 300, 64, 64, "float16")
    check(kernels, Spec(*sizes, parts=parts, poison=True, seed=seed), order=seed)


def envelopes_of(kernels, start, end, order):
    """What the kernel makes of the lists (heads, rows)."""
    heads, rows = start.shape
    problem = Problem(1, heads, heads, rows, 8, 64, 64, "bfloat16", "cpu", 0.1)
    start, end = (np.ascontiguousarray(x, np.int32) for x in (start, end))
    lists = [described(x, "int32") for x in (start, start, start, start, start, end)]
    made = np.full((2, heads, rows), -7, np.int32)
    at = (made[0].ctypes.data, made[1].ctypes.data)
    params = launch_sm90._params(
        *(problem, PlanArrays.of([*lists, None], False), (None,) * 8, None, (0, 0), 0),
        *((1, heads), heads),
        envelopes=at,
    )
    run_kernel = kernels.kernel("bwd_envelope_sm90", "bfloat16", 64, None).result()
    run_kernel(params, 2 * heads, 1024, 0, order)
    return made


@pytest.mark.parametrize("rows", [1, 5, 127, 129, 4095, 4096, 4097, 8193, 12301])
def test_envelopes(kernels, rows):
    """Nondecreasing bounds of rows that see anything; a head of each style."""
    rng = np.random.default_rng(rows)
    styles = ("random", "falling", "two places", "mostly empty", "one", "rising")
    given = [ranges_of(style, rng, rows, 900) for style in styles]
    given.append((np.full(rows, 5), np.full(rows, 5)))  # nobody sees anything
    start, end = (np.stack(x) for x in zip(*given, strict=True))
    sees = start < end
    made_start, made_end = envelopes_of(kernels, start, end, rows % 3)
    right = np.maximum.accumulate(np.where(sees, end, 0), -1)
    np.testing.assert_array_equal(made_end, right)
    right = np.where(sees, start, 2**31 - 1)[:, ::-1]
    right = np.minimum.accumulate(right, -1)[:, ::-1]
    np.testing.assert_array_equal(made_start, right)


def check_ranges(kernels, sizes, start, end, dtype="bfloat16", **how):
    """Ranges given row by row, the same for every head; rows that take no part hold NaN and Inf."""
    spec = Spec(*sizes, dtype, parts=(Part("ranges", "random"),), poison=True, seed=4)
    given = (1, sizes[1], sizes[3])
    ranges = [np.broadcast_to(np.asarray(x), given).copy() for x in (start, end)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing_problems, "build_part", lambda *_: scfa.KeyRanges(*ranges))
        case = testing.build(spec)
    check_case(kernels, case, **how)


SAWTOOTH, NESTED, FAR_APART, ROWS_APART = "sawtooth", "nested", "far apart", 1000


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("style", [SAWTOOTH, NESTED, FAR_APART])
def test_gradients_where_blocks_of_queries_see_nothing_of_a_tile(kernels, head_dim, style):
    """Between blocks that do, more of them than there are buffers; edges beside those of tiles."""
    rows = ROWS_APART if style == FAR_APART else 400
    row = np.arange(rows)
    if style == SAWTOOTH:  # each 100 queries see the keys 0 to 199 again
        start = 2 * (row % 100) - 1 + row // 100
        end = start + 3
    elif style == NESTED:  # ever shorter, then ever longer
        start = np.minimum(row, rows - 1 - row)
        end = 399 - start
        start, end = np.where(row % 2, start, 200), np.where(row % 3, end, 201)
    else:  # the first and the last queries see the first keys, one of a group each
        start = np.full(rows, 256)
        end = start + 1
        edge = [0, 63, 64, rows - 65, rows - 1]
        start[edge] = [63, 0, 127, 64, 0]
        end[edge] = [64, 1, 129, 65, 260]
        start[400:480] = 300  # of no keys
    sizes = (1, 1, 1, rows, 400, head_dim, head_dim)
    check_ranges(kernels, sizes, np.clip(start, 0, 400), np.clip(end, 0, 400), order=2)


@pytest.mark.parametrize(("head_dim", "odd"), [(64, -1), (64, 0), (64, 1), (128, -1)])
def test_ranges_that_begin_and_end_beside_blocks(kernels, head_dim, odd):
    """A head for each pair of bounds; row 75 is off by one, and rows 30 and 110 see nothing."""
    sizes = (1, 9, 3, 190, 420, head_dim, head_dim, "float16")
    case = testing.build(Spec(*sizes, parts=(Part("ranges", "random"),), seed=8))
    start, end = np.zeros((2, 1, 9, 190), np.int64)
    begin_off, end_off = np.mgrid[-1:2, -1:2].reshape(2, 1, 9, 1)
    start[..., 64:] = 128 + begin_off
    end[..., :64], end[..., 64:] = 400, 256 + end_off
    start[..., 75] += odd
    end[..., 75] -= odd
    start[..., [30, 110]], end[..., [30, 110]] = 390, [[390, 129]]
    key = np.arange(420)
    mask = (start[..., None] <= key) & (key < end[..., None])
    check_case(kernels, replace(case, pattern=scfa.KeyRanges(start, end), mask=mask))


def ranges_of(style, rng, rows, keys):
    """Ranges [start, end) of `rows` queries among `keys` keys."""
    row = np.arange(rows)
    start, end = rng.integers(0, keys + 1, (2, rows))
    length = rng.integers(0, 200, rows)
    if style == "short":
        end = start + rng.integers(1, 40, rows)
    elif style == "of few keys":
        end = start + rng.integers(0, 3, rows)
    elif style == "neighbours overlap":
        start = row * keys // rows + rng.integers(-30, 31, rows)
        end = start + 61 + length
    elif style == "neighbours touch":  # up and down, some with a key between them
        cuts = np.cumsum(rng.integers(-40, 41, rows + 1)) + keys // 2
        cuts = cuts + np.linspace(0, rng.integers(-200, 201), rows + 1).astype(int)
        start, end = np.minimum(cuts[:-1], cuts[1:]), np.maximum(cuts[:-1], cuts[1:])
        start = start + (rng.random(rows) < 0.1)
    elif style.startswith("one key between"):
        cuts = np.linspace(0, keys, rows + 1).astype(int)
        start, end = cuts[:-1], cuts[1:].copy()
        at = rng.integers(0, min(rows, 64))
        end[at] = max(end[at] - 1, start[at])
        if style.endswith("falling"):
            start, end = start[::-1], end[::-1]
    elif style == "falling":
        start = np.sort(start)[::-1]
        end = start + length
    elif style == "two places":
        start = np.where(rng.random(rows) < 0.5, 5, keys - 210) + rng.integers(0, 9, rows)
        end = start + length
    elif style == "mostly empty":
        end = np.where(rng.random(rows) < 0.05, end, start - rng.integers(0, 2, rows))
    elif style == "edges of blocks":
        start, end = 16 * rng.integers(0, 6, (2, rows)) + rng.integers(-1, 2, (2, rows))
        start, end = start + 1, end + 64
    elif style == "one":
        end[:] = start[:] = keys // 2
        at = rng.integers(0, rows)
        start[at], end[at] = 0, keys
    elif style == "rising":
        start = np.sort(start)
        end = np.maximum(np.sort(np.minimum(start + length // 4, keys)), start)
    start, end = np.clip(start, 0, keys), np.clip(end, 0, keys)
    return np.ascontiguousarray(start, np.int32), np.ascontiguousarray(end, np.int32)


TILES_IN_ANY_ORDER = (
    *("random", "short", "of few keys", "neighbours overlap", "neighbours touch", "falling"),
    *("two places", "mostly empty", "edges of blocks", "one", "rising"),
    *("one key between, rising", "one key between, falling"),
)


def visited(kernels, shape, start, end, keys, monotone, order=0):
    """What each tile visits of its keys, and what of them it takes for seen."""
    rows_of_tile, block = shape
    constants = (("ROWS", rows_of_tile), ("BLOCK_N", block), ("MONOTONE", int(monotone)))
    source = source_of(TILE_HEADERS, TILES_DRIVER)
    run = kernels.start(source, (*constants, ("BFLOAT16", 1))).result()
    rows = start.size
    tiles, room = -(-rows // rows_of_tile), keys + block
    unions, seen = np.full((tiles, 4), -7, np.int32), np.full((tiles, room), -1, np.int8)
    index = np.arange(rows, dtype=np.int32)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (start, end, index, unions, seen)]
    by_tiles = launch_sm90._divisor(tiles)
    run(*pointers[:3], rows, tiles, *by_tiles, room, *pointers[3:], order)
    return unions[::-1], seen[::-1]  # the last rows are the first tile


def check_visits(kernels, shape, start, end, keys, monotone, what, order=0):
    """Compare with the definition; returns what is said of gaps, tile by tile."""
    unions, seen = visited(kernels, shape, start, end, keys, monotone, order)
    for tile, (first, last, *_) in enumerate(unions):
        end_row = start.size - (len(unions) - 1 - tile) * shape[0]  # the first tile may lack rows
        of_tile = slice(max(end_row - shape[0], 0), end_row)
        key = np.arange(keys)
        sees = ((start[of_tile, None] <= key) & (key < end[of_tile, None])).any(0)
        some = np.flatnonzero(sees)
        assert (first, last) == ((some[0], some[-1] + 1) if some.size else (0, 0)), what
        beyond = first - (first - last) // shape[1] * shape[1]
        assert (seen[tile, :first] == -1).all(), what
        assert (seen[tile, last:beyond] == 0).all(), what
        assert (seen[tile, beyond:] == -1).all(), what
        np.testing.assert_array_equal(seen[tile, first:last], sees[first:last], what)
    return unions[:, 2:]


TILE_SHAPES = pytest.mark.parametrize("shape", [(192, 128), (128, 96), (128, 80), (64, 48)])


@TILE_SHAPES
@pytest.mark.parametrize("style", TILES_IN_ANY_ORDER)
def test_keys_that_a_tile_sees(kernels, shape, style):
    """Each key that a row of the tile sees, and no other; and doubt only where there are gaps."""
    rng = np.random.default_rng(len(style))
    for trial, rows in enumerate((1, 2, 63, 65, 191, 192, 193, 300, 400)):
        keys = int(rng.choice([1, 47, 128, 129, 400, 900])) if trial < 8 else 900
        ranges = ranges_of(style, rng, rows, keys)
        for monotone in (False, True) if style.endswith("rising") else (False,):
            what = f"{style}, {rows} rows, {keys} keys"
            gaps = check_visits(kernels, shape, *ranges, keys, monotone, what, trial % 3)
            if style == "neighbours overlap":
                assert (gaps[:, 0] >= gaps[:, 1]).all(), what  # no key need be asked about


@TILE_SHAPES
@pytest.mark.parametrize("falling", [False, True])
def test_a_gap_beside_the_edge_of_a_block(kernels, shape, falling):
    for at in range(shape[1] - 2, shape[1] + 2):
        for width in (1, 2):
            start, end = np.array([[5, 5 + at + width], [5 + at, 333]], np.int32)
            if falling:
                start, end = start[::-1].copy(), end[::-1].copy()
            for monotone in (False,) if falling else (False, True):
                check_visits(kernels, shape, start, end, 400, monotone, f"{at}, {width}")
