// Rows of one list, several read at a time: their keys, their flags, and the digits that order them.
#pragma once
#include "plan_params.cuh"

constexpr int kUnroll = 4;  // rounds of 32 rows whose keys are loaded before the first is used

// One list with batch and head fixed; lives in shared memory.
struct ListRows {
  ColumnRow groups[kMaxColumns];
  ColumnRow keeps[kMaxColumns];
  int n_groups, n_keeps, length;
  int n_bounds, seqlen_k;  // as in ListSet

  // Bit u: rows[u] is kept. All loads of one column are under way before the first is used.
  template <int kRows>
  __device__ __forceinline__ u32 kept(const int (&rows)[kRows]) const {
    u32 bits = (1u << kRows) - 1;
#pragma unroll 1
    for (int c = 0; c < n_keeps; ++c) {
      const ColumnRow column = keeps[c];
      bool flags[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) flags[u] = column.flag(rows[u]);
#pragma unroll
      for (int u = 0; u < kRows; ++u) bits &= ~((u32)!flags[u] << u);
    }
    return bits;
  }
};

template <int kRows>
__device__ __forceinline__ void load_keys(const ColumnRow& column, const int (&rows)[kRows], u64 (&keys)[kRows]) {
  if (column.wide) {
#pragma unroll
    for (int u = 0; u < kRows; ++u) keys[u] = ordered_key(*(const i64*)(column.base + rows[u] * column.row_stride), true);
  } else {
    int narrow[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) narrow[u] = *(const int*)(column.base + rows[u] * column.row_stride);
#pragma unroll
    for (int u = 0; u < kRows; ++u) keys[u] = ordered_key(narrow[u], false);
  }
}

// The same of column c of a list, whose last columns may be bounds.
template <int kRows>
__device__ __forceinline__ void load_keys(const ListRows& list, int c, const int (&rows)[kRows], u64 (&keys)[kRows]) {
  load_keys(list.groups[c], rows, keys);
  const int first_bound = list.n_groups - list.n_bounds;
  if (c < first_bound) return;
  const int shift = c < first_bound + list.n_bounds / 2 ? kStartBits : 0;
#pragma unroll
  for (int u = 0; u < kRows; ++u) keys[u] = bound_key(keys[u], list.groups[c].wide, list.seqlen_k, shift);
}

// Calls visit(rows, present) for all rows of the list, kUnroll of them at a time; bit u of `present`: rows[u] is in
// the list (otherwise it is 0, which may be read).
template <class Visit>
__device__ __forceinline__ void visit_rows(int length, Visit visit) {
  for (u32 first = threadIdx.x; first < (u32)length; first += blockDim.x * kUnroll) {  // unsigned: may pass 2^31
    int rows[kUnroll];
    u32 present = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const u32 row = first + u * blockDim.x;
      rows[u] = row < (u32)length ? (int)row : 0;
      present |= (u32)(row < (u32)length) << u;
    }
    visit(rows, present);
  }
}

// The digit of each row; that of a dropped one tells only that it is. kBounds: whether columns may be bounds.
template <bool kBounds>
__device__ __forceinline__ void digits_of(
    const ListRows& list, const DigitCursor& cursor, const Digit& digit, const int (&rows)[kUnroll], u32 (&digits)[kUnroll]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) digits[u] = 0;
  const bool one_group = digit.n_segments == 1 && (!kBounds || digit.segments[0].column < list.n_groups - list.n_bounds);
  if (one_group && !list.groups[digit.segments[0].column].wide) {  // as below, in a quarter of the instructions
    const Segment segment = digit.segments[0];
    const ColumnRow column = list.groups[segment.column];
    const u32 low = (u32)cursor.low[segment.column];
    u32 keys[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) keys[u] = *(const u32*)(column.base + rows[u] * column.row_stride);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) digits[u] = ((keys[u] ^ 0x80000000u) - low) >> segment.shift & segment.mask;
  } else {
#pragma unroll 1
    for (int s = 0; s < digit.n_segments; ++s) {
      const Segment segment = digit.segments[s];
      const u64 low = cursor.low[segment.column];
      u64 keys[kUnroll];
      if constexpr (kBounds) {
        load_keys(list, segment.column, rows, keys);
      } else {
        load_keys(list.groups[segment.column], rows, keys);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) digits[u] |= segment_value(segment, keys[u], low);
    }
  }
  if (digit.tests_keep) {
    const u32 kept = list.kept(rows);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) digits[u] = kept >> u & 1 ? digits[u] : digit.dropped;
  }
}
