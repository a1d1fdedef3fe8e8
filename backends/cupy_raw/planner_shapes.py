"""Shapes of the planner's blocks: threads, rows and shared memory, from sizes alone.

Nothing here knows of clauses or arrays. Byte counts mirror the layouts in plan_sort, plan_causal
and plan_parts_place.
"""

from __future__ import annotations

from typing import NamedTuple

_MAX_BINS = 256
_SHARED_ROWS = 1 << 16  # the order buffer in shared memory holds 16-bit rows
_STATIC_SHARED = 2048  # of plan_sort or plan_causal, rounded up
_MAX_BITS = 8  # kMaxDigitBits
_LEAST_BITS = 5  # of plan_causal where shared memory is short
_LEAST_ROWS = 16384  # of few lists that several blocks share
_LEAST_PART = 1024  # rows
_PART_SHAPES = ((512, 8192), (512, 4096), (256, 2048))  # threads, and rows of a part at most


def sort_threads(longest: int) -> int:
    """Threads of a plan_sort block: about 8 to 32 rows each."""
    return 512 if longest > 4096 else 256 if longest > 1024 else 128


def sort_shared_bytes(threads: int, capacity: int) -> int:
    """Dynamic shared memory of plan_sort: counts per warp, their totals, and the order buffer."""
    return threads // 32 * (_MAX_BINS + 1) * 4 + _MAX_BINS * 4 + 2 * capacity


def sort_capacity(threads: int, lengths: tuple[int, int], most_shared: int) -> int:
    """Rows that the order buffer holds: the longer list's, else the shorter's, else none."""
    for length in sorted(lengths, reverse=True):
        fits = sort_shared_bytes(threads, length) <= most_shared - _STATIC_SHARED
        if length <= _SHARED_ROWS and fits:
            return length
    return 0


class OnePass(NamedTuple):
    """How plan_causal, or the plan_parts kernels, are launched."""

    threads: int
    shared_bytes: int
    max_bits: int
    staged: bool  # rows are ordered in shared memory
    part_rows: int = 0  # rows that one block takes; 0: the whole list, by plan_causal

    def parts(self, rows: int) -> int:
        """Blocks of a list."""
        return -(-rows // self.part_rows) if self.part_rows else 1


def count_bytes(threads: int, bits: int) -> int:
    """Shared memory for the counts of both sides, 32 bits for each warp and bin."""
    return 2 * 4 * (threads // 32) * ((1 << bits) + 1)


def one_pass_bytes(threads: int, bits: int, staged_rows: int) -> int:
    """Dynamic shared memory of plan_causal: first places and counts of both sides, three orders.

    Beside orders counts are kept in 16 bits. They are made in 32, where the orders come later.
    """
    bins, counts = 1 << bits, count_bytes(threads, bits)
    if not staged_rows:
        return 2 * 4 * bins + 16 + counts
    kept = 2 * 2 * (threads // 32) * (bins + 2)
    return 2 * 4 * bins + kept + 16 + max(3 * 2 * (staged_rows + 7), counts)


def part_bytes(threads: int, bits: int, part_rows: int) -> int:
    """Dynamic shared memory of plan_parts_place: sums, counts, three orders, bins of both sides."""
    return 6 * 4 * (1 << bits) + count_bytes(threads, bits) + 16 + 8 * part_rows


def choose_one_pass(lists: int, rows: int, multiprocessors: int, most_shared: int) -> OnePass:
    """Shape plan_causal's blocks: two on a multiprocessor if there are lists for it, or one.

    Orders are staged in shared memory where they fit; the more buckets fit, the better.
    """
    threads = 128 if rows <= 1024 else 256 if rows <= 2048 else 512
    shapes = [(threads, most_shared // 2)] if lists > multiprocessors else []
    shapes.append((1024 if rows > 4096 else threads, most_shared))
    for staged in (True, False) if rows < _SHARED_ROWS else (False,):
        for threads, most in shapes:
            for bits in range(_MAX_BITS, _LEAST_BITS - 1, -1):
                size = one_pass_bytes(threads, bits, rows if staged else 0)
                if size <= most - _STATIC_SHARED:
                    return OnePass(threads, size, bits, staged)
    return OnePass(128, one_pass_bytes(128, 0, 0), 0, staged=False)


def choose_parts(lists: int, rows: int, multiprocessors: int, most_shared: int) -> OnePass | None:
    """Share long lists among several blocks each.

    Few lists get enough blocks to fill the card, two at a time; it is filled several times where
    parts would not fit shared memory otherwise. Lists whose rows 16 bits cannot number, which
    plan_causal never stages, are shared however many there are. None where plan_causal serves as
    well, or where there is too little shared memory.
    """
    few = 2 * lists <= multiprocessors
    if rows < (_LEAST_ROWS if few else _SHARED_ROWS):
        return None
    wanted = -(-rows // max(2 * multiprocessors // lists, 1))
    for most in (most_shared // 2, most_shared):
        for threads, most_rows in _PART_SHAPES:
            times = -(-wanted // most_rows)
            part_rows = max(-(-wanted // (times * threads)) * threads, _LEAST_PART)
            size = part_bytes(threads, _MAX_BITS, part_rows)
            if part_bytes(threads, _MAX_BITS, most_rows) <= most - _STATIC_SHARED:
                return OnePass(threads, size, _MAX_BITS, staged=True, part_rows=part_rows)
    return None
