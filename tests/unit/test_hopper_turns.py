"""In which order tiles are handed out (tiles_sm90.cuh, bwd_fused_sm90_tiles.cuh)."""

import ctypes
import dataclasses

import hopper_host
import host_build
import numpy as np
import pytest
from hopper_host import TILE_HEADERS, source_of
from scfa_core.backends.cupy_raw import launch_sm90

from scfa_core.problem import Problem

pytestmark = host_build.NEEDS_COMPILER
kernels = hopper_host.kernels

ROWS = 64
DRIVER = """
extern "C" void run(int tiles, int per_head, int heads, int group, int in_turn, int seqlen_q,
                    const Divisor* divisors, QueryTile* found) {
  Params p{};
  p.tiles = tiles, p.tiles_per_head = per_head, p.heads = heads, p.group_size = group;
  p.in_turn = in_turn, p.seqlen_q = seqlen_q;
  p.by_tiles = divisors[0], p.by_heads = divisors[1], p.by_group = divisors[2];
  for (int tile = 0; tile < tiles; ++tile) found[tile] = locate_query_tile<64>(p, tile);
}
"""


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 1), (3, 3), (4, 2), (5, 1), (8, 4)])
@pytest.mark.parametrize("rows", [1, 64, 65, 300])
@pytest.mark.parametrize("kernel", ["fwd", "dq"])
def test_each_tile_once_and_the_last_heads_in_turn(kernels, batch, heads, group, rows, kernel):
    """Of dq, whose heads may be passed over, all come one after the other."""
    function = kernels.start(source_of(TILE_HEADERS, DRIVER), (("BFLOAT16", 1), ("MONOTONE", 1)))
    per_head, lists = -(-rows // ROWS), batch * heads
    in_turn = launch_sm90._in_turn(lists) if kernel == "fwd" else 0
    divisors = [launch_sm90._divisor(number) for number in (per_head, heads, group)]
    found = np.full((per_head * lists, 5), -7, np.int32)
    function.result()(
        *(len(found), per_head, heads, group, in_turn, rows),
        *(ctypes.c_void_p(x.ctypes.data) for x in (np.array(divisors, np.uint32), found)),
    )
    z, b, h, h_kv, first_row = found.T
    np.testing.assert_array_equal(z, b * heads + h)
    np.testing.assert_array_equal(h_kv, h // group)
    number = (rows - first_row) // ROWS - 1  # 0: the last rows of its head
    np.testing.assert_array_equal(first_row, rows - (number + 1) * ROWS)
    together = 1 << in_turn
    assert together == (1 if kernel == "dq" else {1: 1, 2: 2, 3: 2}.get(lists, 4))
    before = [(list_, tile) for list_ in range(lists - together) for tile in range(per_head)]
    after = [(lists - together + i, tile) for tile in range(per_head) for i in range(together)]
    assert list(zip(z, number, strict=True)) == before + after


KEY_TILES = """
extern "C" void run(int tiles, int per_head, int in_turn, const Divisor* divisor, int* found) {
  Params p{};
  p.tiles = tiles, p.tiles_per_head = per_head, p.by_tiles = *divisor;
  for (int n = 0; n < tiles; ++n) found[n] = tile_in_turn(p, n, in_turn);
}
"""


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 9, 31])
@pytest.mark.parametrize("in_turn", range(4))
@pytest.mark.parametrize("per_head", [1, 2, 7])
def test_key_tiles_of_so_many_heads_in_turn(kernels, heads, in_turn, per_head):
    """Groups of heads, and those left over one after the other; each head's tiles in order."""
    headers = ("products_sm90.cuh", "params_sm90.cuh", "query_data_sm90.cuh")
    headers += ("choice_sm90.cuh", "bwd_fused_sm90_tiles.cuh")
    function = kernels.start(source_of(headers, KEY_TILES), (("BFLOAT16", 1),))
    found = np.full(heads * per_head, -7, np.int32)
    divisor = np.array(launch_sm90._divisor(per_head), np.uint32)
    pointers = (ctypes.c_void_p(x.ctypes.data) for x in (divisor, found))
    function.result()(len(found), per_head, in_turn, *pointers)
    together = 1 << in_turn
    whole = heads // together * together
    groups = [range(first, first + together) for first in range(0, whole, together)]
    groups += [range(head, head + 1) for head in range(whole, heads)]
    expected = [z * per_head + n for group in groups for n in range(per_head) for z in group]
    assert found.tolist() == expected


COUNTS = """
extern "C" int run(const int* visits, int count, int in_turn) {
  int counter[2] = {};
  for (int i = 0; i < count; ++i) counter[1] += visits_for_turns(visits[i]);
  Params p{};
  p.counter = counter, p.in_turn = in_turn;
  return heads_in_turn(p);
}
"""


@pytest.mark.parametrize(
    ("visits", "turns"),
    [
        ([5] * 100, 3),
        ([19] * 100, 3),  # 2432 keys, which 16 heads keep in L2
        ([20] * 100, 0),
        ([5] * 100 + [100] * 5, 3),  # 160 of 660, as no more than 32 of a tile are counted
        ([5] * 100 + [100] * 6, 0),
        ([0, -3, 0], 0),  # nobody visits anything
        ([2**20] * 4_000_000, 0),
    ],
)
def test_heads_have_turns_where_short_ranges_are_most_of_the_work(kernels, visits, turns):
    headers = ("products_sm90.cuh", "params_sm90.cuh", "query_data_sm90.cuh")
    headers += ("choice_sm90.cuh", "bwd_fused_sm90_tiles.cuh")
    function = kernels.start(source_of(headers, COUNTS), (("BFLOAT16", 1),)).result()
    counted = np.array(visits, np.int32)
    assert function(ctypes.c_void_p(counted.ctypes.data), len(visits), 3) == turns
    assert function(ctypes.c_void_p(counted.ctypes.data), len(visits), 0) == 0


@pytest.mark.parametrize(
    ("batch", "heads", "group", "seqlen_q", "most"),
    [(4, 12, 1, 8192, 4), (4, 48, 1, 16384, 3), (1, 12, 1, 32768, 2), (1, 8, 8, 4096, 0),
     (2, 8, 4, 16384, 1), (1, 4, 1, 1024, 2), (1, 1, 1, 131072, 0)],
)  # fmt: skip
def test_no_more_heads_in_turn_than_have_sums(batch, heads, group, seqlen_q, most):
    """A head's room must be free of a head whose tiles were all handed out before."""
    sizes = (batch, heads, heads // group, seqlen_q, seqlen_q, 64, 64, "bfloat16", "cuda:0", 1.0)
    problem = Problem(*sizes)
    slots = launch_sm90._sum_slots(problem)
    assert launch_sm90._fused_in_turn(problem, slots) == most
    assert group << most <= slots
    assert launch_sm90._fused_in_turn(problem, 0) == 0
    wide = dataclasses.replace(problem, head_dim=128, head_dim_v=128)
    assert launch_sm90._fused_in_turn(wide, launch_sm90._sum_slots(wide)) == 0
