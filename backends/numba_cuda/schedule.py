"""Which keys a tile of queries visits, which queries a tile of keys, and whether at all."""

from __future__ import annotations

from numba import int32
from scfa_core.backends.numba_cuda.compiling import device


@device
def tile_is_wanted(flags, flag_rows, head, row, seqlen):
    """Whether the tile at `row` must be computed: all if flag_rows is 0, else where a flag is set.

    flags holds one entry per `flag_rows` sorted rows of each head.
    """
    if flag_rows == 0:
        return True
    per_head = (seqlen + flag_rows - 1) // flag_rows
    return flags[head * per_head + row // flag_rows] != 0


@device
def any_is_wanted(flags, flag_rows, rows, tiles, first, count, step, last_first, seqlen):
    """Whether one of the tiles first, first + step, ... below `count` must be computed: 1 or 0.

    A head has `tiles` of `rows` rows, its last one first if `last_first`. The threads of a block
    share its tiles, so that one without any ends after a few loads that do not wait for each other.
    """
    if flag_rows == 0:
        return 1
    found = 0
    for tile in range(first, count, step):
        place = tile % tiles
        if last_first:
            place = tiles - 1 - place
        if tile_is_wanted(flags, flag_rows, tile // tiles, place * rows, seqlen):
            found = 1
    return found


@device
def key_span(key_start, key_end, b, h, m0, m1, monotone):
    """Sorted keys [first, last) that hold the ranges of sorted queries [m0, m1)."""
    first = key_start[b, h, m0]
    last = key_end[b, h, m1 - 1]
    if not monotone:
        first = int32(2147483647)
        last = int32(0)
        for r in range(m0, m1):
            if key_start[b, h, r] < key_end[b, h, r]:
                first = min(first, key_start[b, h, r])
                last = max(last, key_end[b, h, r])
        first = min(first, last)  # nobody sees a key
    return first, last


@device
def key_core(key_start, key_end, b, h, m0, m1, monotone):
    """Sorted keys [first, last) that every sorted query of [m0, m1) sees."""
    first = key_start[b, h, m1 - 1]
    last = key_end[b, h, m0]
    if not monotone:
        for r in range(m0, m1):
            first = max(first, key_start[b, h, r])
            last = min(last, key_end[b, h, r])
    return first, last


@device
def first_above(values, b, h, count, bound):
    """First place of the nondecreasing values[b, h, :count] that holds more than `bound`."""
    low = 0
    high = count
    while low < high:
        middle = (low + high) // 2
        if values[b, h, middle] > bound:
            high = middle
        else:
            low = middle + 1
    return low


@device
def query_span(key_start, key_end, b, h, n0, n1, seqlen_q, monotone):
    """Sorted queries [first, last) among which are all that see a key of [n0, n1)."""
    if not monotone:
        return 0, seqlen_q
    return (
        first_above(key_end, b, h, seqlen_q, n0),
        first_above(key_start, b, h, seqlen_q, n1 - 1),
    )


@device
def next_query_tile(key_start, key_end, b, h, m0, size, last, n0, n1, monotone):
    """First tile of `size` sorted queries from m0 on, in steps of `size`, that sees [n0, n1)."""
    if not monotone:
        while m0 < last:
            low, high = key_span(key_start, key_end, b, h, m0, min(m0 + size, last), monotone)
            if low < n1 and high > n0:
                break
            m0 += size
    return int32(m0)
