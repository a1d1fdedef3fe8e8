// Stable counting sort of one list by one block: the order of rows after each pass goes from one buffer to the
// other. Every warp owns a stretch of the list, counts its digits, and later places them in the same order.
#pragma once
#include "plan_params.cuh"

constexpr u32 kEveryLane = 0xffffffffu;
constexpr int kMaxBins = 1 << kMaxDigitBits;
constexpr int kUnroll = 4;  // rounds of 32 rows whose keys are loaded before the first is used

// One list with batch and head fixed; lives in shared memory.
struct ListRows {
  ColumnRow groups[kMaxColumns];
  ColumnRow keeps[kMaxColumns];
  int n_groups, n_keeps, length;

  __device__ __forceinline__ bool is_dropped(int row) const {
    bool kept = true;
#pragma unroll 1
    for (int c = 0; c < n_keeps; ++c) kept = kept && keeps[c].flag(row);
    return !kept;
  }
  __device__ __forceinline__ u64 key(int column, int row) const {
    return ordered_key(groups[column].integer(row), groups[column].wide != 0);
  }
};

// Where an order of rows lies: in place (row i at i), in shared memory (16 bits a row), or in global memory.
struct Order {
  u16* shared;
  int* global;

  __device__ __forceinline__ int get(int i) const { return shared ? shared[i] : global ? global[i] : i; }
  __device__ __forceinline__ void set(int i, int row) const {
    if (shared) {
      shared[i] = (u16)row;
    } else {
      global[i] = row;
    }
  }
};

// What the block knows of its list after looking at every row once.
struct Survey {
  u64 any_one[kMaxColumns], all_one[kMaxColumns], low[kMaxColumns];  // over kept rows
  u64 any_above[kMaxColumns];                                        // ones of key - low
  int dropped;
};

__device__ __forceinline__ u64 warp_or(u64 x) {
  for (int step = 16; step; step >>= 1) x |= __shfl_xor_sync(kEveryLane, x, step);
  return x;
}

__device__ __forceinline__ u64 warp_min(u64 x) {
  for (int step = 16; step; step >>= 1) {
    u64 other = __shfl_xor_sync(kEveryLane, x, step);
    x = other < x ? other : x;
  }
  return x;
}

// Counts dropped rows and finds, per column, the bits that differ among kept rows and the smallest key.
__device__ inline void survey_rows(const ListRows& list, Survey& survey) {
  const int lane = threadIdx.x % 32;
  for (int c = threadIdx.x; c < kMaxColumns; c += blockDim.x) {
    survey.any_one[c] = survey.any_above[c] = 0;
    survey.all_one[c] = survey.low[c] = ~0ull;
  }
  if (threadIdx.x == 0) survey.dropped = 0;
  __syncthreads();  // the sums below start from these values
  if (list.n_keeps > 0) {
    int dropped = 0;
    for (int row = threadIdx.x; row < list.length; row += blockDim.x) dropped += list.is_dropped(row);
    for (int step = 16; step; step >>= 1) dropped += __shfl_xor_sync(kEveryLane, dropped, step);
    if (lane == 0 && dropped) atomicAdd(&survey.dropped, dropped);
  }
  for (int c = 0; c < list.n_groups; ++c) {
    u64 any_one = 0, any_zero = 0, low = ~0ull;
    for (int row = threadIdx.x; row < list.length; row += blockDim.x) {
      if (list.is_dropped(row)) continue;
      u64 key = list.key(c, row);
      any_one |= key;
      any_zero |= ~key;
      low = key < low ? key : low;
    }
    any_one = warp_or(any_one);
    any_zero = warp_or(any_zero);
    low = warp_min(low);
    if (lane == 0) {
      atomicOr(&survey.any_one[c], any_one);
      atomicAnd(&survey.all_one[c], ~any_zero);
      atomicMin(&survey.low[c], low);
    }
  }
  __syncthreads();  // survey is complete but for any_above
}

// For columns whose keys differ in many bits: the bits that differ once the smallest key is subtracted.
// Ids from -1 to 15 differ in every bit, but their distances from -1 in five.
__device__ inline void survey_distances(const ListRows& list, Survey& survey) {
  for (int c = 0; c < list.n_groups; ++c) {
    if (survey.dropped == list.length || count_bits(survey.any_one[c] ^ survey.all_one[c]) <= kMaxDigitBits) continue;
    u64 low = survey.low[c], any_above = 0;
    for (int row = threadIdx.x; row < list.length; row += blockDim.x) {
      if (!list.is_dropped(row)) any_above |= list.key(c, row) - low;
    }
    any_above = warp_or(any_above);
    if (threadIdx.x % 32 == 0) atomicOr(&survey.any_above[c], any_above);
  }
  __syncthreads();  // any_above is complete
}

__device__ inline void start_cursor(const ListRows& list, const Survey& survey, DigitCursor& cursor) {
  cursor.n_columns = list.n_groups;
  cursor.has_dropped = survey.dropped > 0 && survey.dropped < list.length;
  for (int c = 0; c < list.n_groups; ++c) {
    u64 differing = survey.dropped == list.length ? 0 : survey.any_one[c] ^ survey.all_one[c];
    bool by_distance = count_bits(differing) > kMaxDigitBits && count_bits(survey.any_above[c]) < count_bits(differing);
    cursor.varying[c] = by_distance ? survey.any_above[c] : differing;
    cursor.low[c] = by_distance ? survey.low[c] : 0;
  }
}

__device__ __forceinline__ u32 digit_of(const ListRows& list, const DigitCursor& cursor, const Digit& digit, int row) {
  if (digit.tests_keep && list.is_dropped(row)) return digit.dropped;
  u32 value = 0;
#pragma unroll 1
  for (int s = 0; s < digit.n_segments; ++s) {
    const Segment& segment = digit.segments[s];
    value |= segment_value(segment, list.key(segment.column, row), cursor.low[segment.column]);
  }
  return value;
}

// Lanes among `active` that hold the same digit as this one.
__device__ __forceinline__ u32 warp_peers(u32 digit, int bits, u32 active) {
  u32 peers = active;
#pragma unroll 1
  for (int b = 0; b < bits; ++b) {
    bool one = digit >> b & 1;
    u32 votes = __ballot_sync(kEveryLane, one);
    peers &= one ? votes : ~votes;
  }
  return peers;
}

// Walks this warp's stretch of the list in order; `visit(row, digit, peers, lane_is_active)` is called by all 32 lanes.
template <class Visit>
__device__ __forceinline__ void walk_stretch(
    const ListRows& list, const DigitCursor& cursor, const Digit& digit, const Order& source, Visit visit) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int stretch = rows_per_warp(list.length, blockDim.x / 32);
  const u32 begin = (u32)warp * stretch;  // unsigned: a stretch may end beyond 2^31
  const u32 end = begin + stretch < (u32)list.length ? begin + stretch : list.length;
  for (u32 round = begin; round < end; round += 32 * kUnroll) {
    int rows[kUnroll];
    u32 digits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      u32 i = round + 32 * u + lane;
      rows[u] = i < end ? source.get((int)i) : 0;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      digits[u] = round + 32 * u + lane < end ? digit_of(list, cursor, digit, rows[u]) : 0;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (round + 32 * u >= end) break;  // the same for all lanes
      bool active = round + 32 * u + lane < end;
      u32 peers = warp_peers(digits[u], digit.bits, __ballot_sync(kEveryLane, active));
      visit(rows[u], digits[u], peers, active);
    }
  }
}

// One stable pass from `source` to `target`. `counts` is (warps, bins + 1) and `firsts` is (bins,), in shared memory.
__device__ inline void sort_pass(
    const ListRows& list, const DigitCursor& cursor, const Digit& digit, const Order& source,
    const Order& target, int* counts, int* firsts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  const int bins = 1 << digit.bits;
  const int pitch = bins + 1;  // odd: a column of `counts` lies in 32 banks
  int* my_counts = counts + warp * pitch;

  // count: how many rows of each digit are in this warp's stretch
  for (int bin = lane; bin < bins; bin += 32) my_counts[bin] = 0;
  __syncwarp();
  walk_stretch(list, cursor, digit, source, [&](int, u32 value, u32 peers, bool active) {
    if (active && lane == __ffs(peers) - 1) my_counts[value] += __popc(peers);
    __syncwarp();  // the next round may add to the same bin from another lane
  });
  __syncthreads();  // every warp's counts are there

  // scan: per digit over the warps, then over the digits
  for (int bin = warp; bin < bins; bin += n_warps) {
    int count = lane < n_warps ? counts[lane * pitch + bin] : 0;
    int sum = count;
    for (int step = 1; step < 32; step <<= 1) {
      int below = __shfl_up_sync(kEveryLane, sum, step);
      if (lane >= step) sum += below;
    }
    if (lane < n_warps) counts[lane * pitch + bin] = sum - count;
    if (lane == 31) firsts[bin] = sum;
  }
  __syncthreads();  // firsts holds the total of each digit
  if (warp == 0) {
    int carry = 0;
    for (int start = 0; start < bins; start += 32) {
      int count = start + lane < bins ? firsts[start + lane] : 0;
      int sum = count;
      for (int step = 1; step < 32; step <<= 1) {
        int below = __shfl_up_sync(kEveryLane, sum, step);
        if (lane >= step) sum += below;
      }
      if (start + lane < bins) firsts[start + lane] = carry + sum - count;
      carry += __shfl_sync(kEveryLane, sum, 31);
    }
  }
  __syncthreads();  // firsts holds the first place of each digit

  // place: rows of one digit keep their order, over warps, rounds and lanes
  walk_stretch(list, cursor, digit, source, [&](int row, u32 value, u32 peers, bool active) {
    int place = active ? firsts[value] + my_counts[value] + __popc(peers & ((1u << lane) - 1)) : 0;
    __syncwarp();  // all lanes have read the count that the leader changes
    if (active) {
      target.set(place, row);
      if (lane == __ffs(peers) - 1) my_counts[value] += __popc(peers);
    }
    __syncwarp();  // the next round reads the new count
  });
  __syncthreads();  // target is complete; counts may be reused
}
