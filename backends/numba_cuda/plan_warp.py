"""How the warps of a block share a list: contiguous stretches, 32 consecutive rows a round.

Rows of one bin keep their order over warps, rounds and lanes: a lane's rank is how many lanes below
it hold the same bin.
"""

from __future__ import annotations

from numba import int32, uint32
from scfa_core.backends.numba_cuda.compiling import SIMULATED, device

if SIMULATED:
    from scfa_core.backends.numba_cuda import plan_twins
else:
    from numba import cuda

THREADS = 64 if SIMULATED else 512  # of a block, at most; a power of 2
WARPS = THREADS // 32
ALL_LANES = uint32(0xFFFFFFFF)
ROUNDS = 4  # of 32 rows, whose ids are loaded before the first is used


def threads_of(rows: int) -> int:
    """Threads of a block that takes a list of `rows` rows."""
    return min(THREADS, 128 if rows <= 1024 else 256 if rows <= 2048 else 512)


if SIMULATED:
    ballot, warp_barrier = plan_twins.ballot, plan_twins.warp_barrier
else:

    @device
    def ballot(condition):
        """Bit of every lane in which the condition holds; all lanes must ask."""
        return uint32(cuda.ballot_sync(ALL_LANES, condition))

    @device
    def warp_barrier():
        """What any lane wrote before is seen by all lanes after."""
        cuda.syncwarp()


@device
def rows_of_warp(rows, warps):
    """Rows of a warp's stretch, a multiple of 32."""
    return ((rows + warps - 1) // warps + 31) // 32 * 32


@device
def lanes_before(count):
    """Bits of the first `count` lanes, of all or none where count lies outside 0 to 32."""
    return uint32((1 << min(max(int32(count), int32(0)), int32(32))) - 1)


@device
def has_bit(x, bit):
    """Whether x and `bit`, a power of 2, have a bit in common; both are uint32."""
    return uint32(x & bit) != uint32(0)


@device
def lanes_that_agree(lanes, votes, mine):
    """Those of `lanes` whose vote is `mine`."""
    return uint32(lanes & (votes if mine else votes ^ ALL_LANES))


@device
def sum_warps(counts, entry, pitch, warps):
    """Rows of one bin in the whole list; the bin's count of the first warp is counts[entry]."""
    total = 0
    for w in range(warps):
        total += counts[entry + w * pitch]
    return total


@device
def sum_bins(sums, first, end):
    """Rows of all bins from `first` to before `end`."""
    total = 0
    for entry in range(first, end):
        total += sums[entry]
    return total


@device
def start_warps(counts, entry, pitch, warps, place):
    """Replace a bin's count of each warp by the place of the warp's first row of that bin."""
    for w in range(warps):
        count = counts[entry + w * pitch]
        counts[entry + w * pitch] = place
        place += count
