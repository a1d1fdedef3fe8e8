"""Plan: sort rows by groups and bounds with a stable counting sort, then find every query's range.

Near-linear in seqlen. Clause arrays come as a table of addresses and byte strides, so that any
number of columns, of either integer type and any strides, is served by one compiled kernel.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# numba infers the types of compiled functions from their arguments.

import numpy as np
from scfa_core.backends.numba_cpu.compiling import device_function, kernel
from scfa_core.backends.numba_cpu.vector import atomic_next, load_int8, load_int32, load_int64

__all__ = ["key_ranges", "sort_lists", "table"]

ADDRESS, ITEMSIZE, BATCH_STRIDE, HEAD_STRIDE, ROW_STRIDE = range(5)
DIGIT_BITS = 11  # of one pass over wide values
UNBOUNDED = 2**62
UNCLIPPED = -1  # limit of a column whose values are taken as they are


def table(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    """Describe (batch, heads, seqlen) arrays to the kernels; keep the arrays alive meanwhile."""
    rows = [(x.__array_interface__["data"][0], x.itemsize, *x.strides) for x in arrays]
    return np.array(rows, np.int64).reshape(len(rows), 5)


@device_function
def value_at(column, row):
    """Entry `row` of a column whose address already points at its (batch, head)."""
    address = column[ADDRESS] + row * column[ROW_STRIDE]
    if column[ITEMSIZE] == 8:
        return load_int64(address)
    if column[ITEMSIZE] == 4:
        return load_int32(address)
    return load_int8(address)


@device_function
def at_head(columns, b, h):
    """Copy of a table with addresses moved to one (batch, head)."""
    moved = columns.copy()
    for c in range(len(moved)):
        moved[c, ADDRESS] += b * moved[c, BATCH_STRIDE] + h * moved[c, HEAD_STRIDE]
    return moved


@device_function
def counting_pass(values, order, count, least, shift, bins, values_out, order_out):
    """Sort stably by ``(value - least) >> shift & (bins.size - 1)``."""
    bins[:] = 0
    mask = np.uint64(bins.size - 1)
    for r in range(count):
        bins[((np.uint64(values[r]) - least) >> shift) & mask] += 1
    total = 0
    for digit in range(bins.size):
        entries = bins[digit]
        bins[digit] = total
        total += entries
    for r in range(count):
        digit = ((np.uint64(values[r]) - least) >> shift) & mask
        place = bins[digit]
        bins[digit] = place + 1
        values_out[place] = values[r]
        order_out[place] = order[r]


@device_function
def key_at(column, row, limit, shift):
    """Entry `row`, or of a bound, which has a limit: how many steps of ``2**shift`` rows."""
    value = value_at(column, row)
    return value if limit == UNCLIPPED else min(max(value, np.int64(0)), limit) >> shift


@device_function
def sort_by_column(column, limit, shift, order, count, values, values_spare, order_spare):
    """Sort ``order[:count]`` by a column, stably, in as few counting passes as its range needs."""
    least = greatest = key_at(column, np.int64(order[0]), limit, shift)
    ascending = True
    previous = least
    for r in range(count):
        value = key_at(column, np.int64(order[r]), limit, shift)
        values[r] = value
        ascending = ascending and value >= previous
        previous = value
        least, greatest = min(least, value), max(greatest, value)
    if ascending:
        return
    base = np.uint64(least)
    span = np.uint64(greatest) - base
    small = DIGIT_BITS
    while small < 24 and (1 << small) < 2 * count:
        small += 1
    bits = 1
    while bits < 64 and (span >> np.uint64(bits)) > 0:
        bits += 1
    digit = bits if bits <= small else DIGIT_BITS
    bins = np.empty(1 << digit, np.int64)
    for shift in range(0, bits, digit):
        counting_pass(values, order, count, base, np.uint64(shift), bins, values_spare, order_spare)
        values[:count] = values_spare[:count]
        order[:count] = order_spare[:count]


@kernel
def sort_lists(
    counter, lists, heads, seqlen, groups, bounds, seqlen_k, start_bits, keeps, index, counts
):
    """Fill `index` and `counts` of every list: kept rows by (groups, bounds, row), then dropped.

    The first half of `bounds` are starts, which count in steps of ``2**start_bits`` keys.
    """
    values, values_spare = np.empty(seqlen, np.int64), np.empty(seqlen, np.int64)
    order_spare = np.empty(seqlen, np.int32)
    while True:
        task = atomic_next(counter)
        if task >= lists:
            break
        b, h = task // heads, task % heads
        order = index[task * seqlen : (task + 1) * seqlen]
        flags = at_head(keeps, b, h)
        kept = dropped = 0
        for row in range(seqlen):
            keep = True
            for c in range(len(flags)):
                keep = keep and value_at(flags[c], row) != 0
            if keep:
                order[kept] = row
                kept += 1
            else:
                order_spare[dropped] = row
                dropped += 1
        order[kept:] = order_spare[:dropped]
        counts[task] = kept
        columns, limits = at_head(groups, b, h), at_head(bounds, b, h)
        if kept > 1:
            for c in range(len(limits) - 1, -1, -1):
                shift = np.int64(start_bits if 2 * c < len(limits) else 0)
                sort_by_column(
                    limits[c], seqlen_k, shift, order, kept, values, values_spare, order_spare
                )
            for c in range(len(columns) - 1, -1, -1):
                sort_by_column(
                    columns[c], UNCLIPPED, 0, order, kept, values, values_spare, order_spare
                )


@device_function
def compare(q_columns, q_row, k_columns, k_row):
    """-1, 0, 1: order of a key's group tuple against a query's."""
    for c in range(len(q_columns)):
        of_query, of_key = value_at(q_columns[c], q_row), value_at(k_columns[c], k_row)
        if of_key != of_query:
            return -1 if of_key < of_query else 1
    return 0


@device_function
def lower_bound(keys, first, last, row):
    """First place in the ascending ``keys[first:last]`` that is not below `row`."""
    while first < last:
        middle = (first + last) // 2
        if keys[middle] < row:
            first = middle + 1
        else:
            last = middle
    return first


@kernel
def key_ranges(
    counter, batch, heads, heads_kv, seqlen_q, seqlen_k,
    q_groups, k_groups, starts, ends, lo_offset, hi_offset,
    q_index, q_count, k_index, k_count, key_start, key_end,
):  # fmt: skip
    """Fill key_start and key_end: walk the sorted queries and the sorted keys side by side."""
    while True:
        task = atomic_next(counter)
        if task >= batch * heads:
            break
        b, h = task // heads, task % heads
        g = h // (heads // heads_kv)
        queries = q_index[task * seqlen_q : (task + 1) * seqlen_q]
        list_k = b * heads_kv + g
        keys = k_index[list_k * seqlen_k : (list_k + 1) * seqlen_k]
        kept, kept_keys = np.int64(q_count[task]), np.int64(k_count[list_k])
        start_of, end_of = at_head(starts, b, h), at_head(ends, b, h)
        q_columns, k_columns = at_head(q_groups, b, h), at_head(k_groups, b, g)
        first = last = np.int64(0)  # sorted keys of the current query's group
        for r in range(kept):
            i = np.int64(queries[r])
            if r == 0 or compare(q_columns, i, q_columns, np.int64(queries[r - 1])) != 0:
                first = last
                while first < kept_keys and (
                    compare(q_columns, i, k_columns, np.int64(keys[first])) < 0
                ):
                    first += 1
                last = first
                while last < kept_keys and (
                    compare(q_columns, i, k_columns, np.int64(keys[last])) == 0
                ):
                    last += 1
            low, high = max(np.int64(0), i + lo_offset), min(seqlen_k, i + hi_offset)
            for c in range(len(start_of)):
                low = max(low, value_at(start_of[c], i))
                high = min(high, value_at(end_of[c], i))
            low = min(low, seqlen_k)
            start = lower_bound(keys, first, last, low)
            key_start[task * seqlen_q + r] = start
            key_end[task * seqlen_q + r] = lower_bound(keys, start, last, max(low, high))
        for r in range(kept, seqlen_q):
            key_start[task * seqlen_q + r] = kept_keys
            key_end[task * seqlen_q + r] = kept_keys
