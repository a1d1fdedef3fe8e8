// What the host tells the planner's kernels; planner.py packs the same fields in the same order.
#pragma once
#include "plan_math.cuh"

constexpr u32 kEveryLane = 0xffffffffu;

// An integer or flag array (batch, heads, rows); strides in elements, 0 where broadcast.
struct Column {
  const void* base;
  i64 batch_stride, head_stride, row_stride;
  i64 wide;  // 1: int64, 0: int32 (groups and bounds); flags are bytes
};

// The query lists or the key lists: one list per (batch, head).
struct ListSet {
  Column groups[kMaxColumns];  // then, for queries that are sorted by them, starts and as many ends
  Column keeps[kMaxColumns];
  int* index;    // (batch, heads, length) out
  int* count;    // (batch, heads) out
  int* scratch;  // (batch, heads, length), anything
  int n_groups, n_keeps, heads, length;
  int n_bounds, seqlen_k;  // how many of n_groups are starts or ends; rows that these may name
};

// Of the keys of a query's group: those before it, those up to its own row, all.
constexpr int kSeesBefore = 0, kSeesItself = 1, kSeesAll = 2;

struct SortParams {
  ListSet queries, keys;
  i64 n_query_lists;    // batch * heads; key lists follow
  int* key_start;       // (batch, heads, seqlen_q) out, by plan_causal or plan_parts only; likewise key_end; both are null where the
                        // lists of keys alone are wanted, which then stand for those of queries too
  int* key_end;
  int* done;            // (batch, heads): 1 where plan_causal or plan_parts served the list; null where neither ran
  int capacity;         // plan_sort: rows of the order buffer in shared memory
  int group_size;       // query heads per key head
  int max_bits, staged; // of these two: bits of a digit; plan_causal: whether rows are ordered in shared memory
  int sees;             // plan_causal: what row i sees of its group's keys
  int part_rows;        // plan_parts_*: rows of a list that one block takes; what they share lies in keys.scratch
};

struct RangeParams {
  Column q_groups[kMaxColumns], k_groups[kMaxColumns];
  Column starts[kMaxColumns], ends[kMaxColumns];
  i64 lo_offset, hi_offset;  // far outside of all rows where there is no such bound
  int* q_index;              // (batch, heads, seqlen_q); written by plan_identity only
  int* q_count;              // (batch, heads)
  int* k_index;              // (batch, heads_kv, seqlen_k)
  int* k_count;              // (batch, heads_kv)
  int* key_start;            // (batch, heads, seqlen_q) out
  int* key_end;
  const int* done;           // as in SortParams
  int n_groups, n_bounds, monotone, heads, heads_kv, group_size, seqlen_q, seqlen_k, batch, tiles_q, tiles_k, unused;
};

// One row of numbers of a Column: the part that is left once batch and head are fixed.
struct ColumnRow {
  const char* base;
  i64 row_stride;  // in bytes
  int wide;

  SCFA_HD i64 integer(int row) const {
    const char* place = base + row * row_stride;
    return wide ? *(const i64*)place : (i64) * (const int*)place;
  }
  SCFA_HD bool flag(int row) const { return *(const unsigned char*)(base + row * row_stride) != 0; }
};

SCFA_HD ColumnRow column_row(const Column& column, int batch, int head, int flag_bytes) {
  int size = flag_bytes ? flag_bytes : column.wide ? 8 : 4;
  i64 offset = batch * column.batch_stride + head * column.head_stride;
  return {(const char*)column.base + offset * size, column.row_stride * size, (int)column.wide};
}

// Key rows [low, high) that query row `row` may see by its interval clauses, clipped, low <= high.
struct Interval {
  int low, high;
};

SCFA_HD Interval query_interval(
    int row, int seqlen_k, i64 lo_offset, i64 hi_offset, const ColumnRow* starts, const ColumnRow* ends, int n_bounds) {
  i64 low = clip(row + lo_offset, 0, seqlen_k);
  i64 high = clip(row + hi_offset, 0, seqlen_k);
  for (int c = 0; c < n_bounds; ++c) {
    i64 start = clip(starts[c].integer(row), 0, seqlen_k);
    i64 end = clip(ends[c].integer(row), 0, seqlen_k);
    low = start > low ? start : low;
    high = end < high ? end : high;
  }
  return {(int)low, (int)(high < low ? low : high)};
}
