// What the planner computes without knowing of threads: digits, intervals, searches. Compiles as host C++ too
// (SCFA_HOST), where tests compare it with the reference.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#ifdef SCFA_HOST
#define SCFA_HD inline
#else
#define SCFA_HD __host__ __device__ __forceinline__
#endif

constexpr int kMaxColumns = 8;    // group clauses, and keep clauses, of one side
constexpr int kMaxDigitBits = 8;  // of one counting pass
constexpr int kStartBits = 10;    // START_BITS of scfa_core.lowering

SCFA_HD int count_bits(u64 value) {
#ifdef __CUDA_ARCH__
  return __popcll(value);
#else
  return __builtin_popcountll(value);
#endif
}

SCFA_HD int lowest_bit(u64 value) {  // value != 0
#ifdef __CUDA_ARCH__
  return __ffsll((i64)value) - 1;
#else
  return __builtin_ctzll(value);
#endif
}

SCFA_HD int ceil_div(int value, int unit) { return value / unit + (value % unit != 0); }

// Signed keys as unsigned ones of the same order; narrow keys stay 32 bits wide.
SCFA_HD u64 ordered_key(i64 key, bool wide) {
  return wide ? (u64)key ^ (1ull << 63) : (u64)((u32)key ^ 0x80000000u);
}

// A run of neighbouring key bits and its place in a digit.
struct Segment {
  int column, shift, out_shift;
  u32 mask;
};

// One counting pass: which key bits it looks at. At most one segment per bit.
struct Digit {
  int bits, n_segments;
  u32 dropped;      // digit of a dropped row
  int tests_keep;   // whether any row is dropped
  Segment segments[kMaxDigitBits];
};

// The bits that tell kept rows of one list apart, least significant first: the last column's first, then the
// others', then whether the row is dropped. Bits on which all rows agree are never looked at.
struct DigitCursor {
  u64 varying[kMaxColumns];  // of key - low, for kept rows
  u64 low[kMaxColumns];
  int n_columns;
  int has_dropped;

  SCFA_HD int total_bits() const {
    int total = has_dropped;
    for (int c = 0; c < n_columns; ++c) total += count_bits(varying[c]);
    return total;
  }

  // Takes the next `bits` bits off the cursor.
  SCFA_HD void next(int bits, Digit& digit) {
    digit.bits = bits;
    digit.tests_keep = has_dropped;
    digit.n_segments = 0;
    digit.dropped = 0;
    int filled = 0;
    int column = n_columns - 1;
    while (filled < bits) {
      while (column >= 0 && varying[column] == 0) --column;
      if (column < 0) {
        digit.dropped = 1u << filled;
        return;  // this was the last bit
      }
      int shift = lowest_bit(varying[column]);
      u64 rest = varying[column] >> shift;
      int run = ~rest == 0 ? 64 : lowest_bit(~rest);
      if (run > bits - filled) run = bits - filled;
      digit.segments[digit.n_segments++] = {column, shift, filled, (1u << run) - 1};
      varying[column] &= ~((u64)((1u << run) - 1) << shift);
      filled += run;
    }
  }
};

SCFA_HD u32 segment_value(const Segment& segment, u64 key, u64 low) {
  return ((u32)((key - low) >> segment.shift) & segment.mask) << segment.out_shift;
}

// Rows that one of `parts` warps owns: whole rounds of 32, in order.
SCFA_HD int rows_per_warp(int length, int parts) { return ceil_div(ceil_div(length, parts), 32) * 32; }

SCFA_HD i64 clip(i64 value, i64 low, i64 high) { return value < low ? low : value > high ? high : value; }

// What orders queries by a bound, given as `ordered_key` makes it: whole steps of 2^shift rows of the keys there are.
SCFA_HD u64 bound_key(u64 key, bool wide, int seqlen_k, int shift) {
  const i64 bound = wide ? (i64)(key ^ (1ull << 63)) : (i64)(int)((u32)key ^ 0x80000000u);
  return (u64)clip(bound, 0, seqlen_k) >> shift;
}

// One step of a search by 32 probes: probe `lane` looks at entry `position(lane)`; `below` says how many probes
// (a prefix of them) lie below the target.
struct WideSearch {
  int low, high;  // the answer lies in [low, high]

  SCFA_HD bool done() const { return low >= high; }
  SCFA_HD int stride() const { return ceil_div(high - low, 32); }
  SCFA_HD int position(int lane) const {  // may lie beyond high - 1: such probes do not count as below
    i64 place = (i64)low + (i64)(lane + 1) * stride() - 1;
    return place < high ? (int)place : high;
  }
  SCFA_HD void narrow(int below) {
    i64 step = stride();
    i64 first = low + below * step;          // every entry before it is below
    i64 last = low + (below + 1) * step - 1;  // probe `below` is not
    low = first < high ? (int)first : high;
    high = last < high ? (int)last : high;
    if (high < low) high = low;
  }
};

// First entry of [low, high) that does not precede the target; `high` if all do.
template <class Precedes>
SCFA_HD int lower_bound(int low, int high, Precedes precedes) {
  while (low < high) {
    int middle = low + (high - low) / 2;
    if (precedes(middle)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}
