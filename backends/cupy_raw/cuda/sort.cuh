// Stable counting sort of one list by one block: the order of rows after each pass goes from one buffer to the
// other. Every warp owns a stretch of the list, counts its digits, and later places them in the same order.
#pragma once
#include "plan_rows.cuh"
#include "plan_warp.cuh"

constexpr int kMaxBins = 1 << kMaxDigitBits;

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
  int n_columns;  // the last ones, by which the rows are in order already, left out
};

// Calls visit(key) for one column of all kept rows.
template <class Visit>
__device__ __forceinline__ void visit_keys(const ListRows& list, int column, Visit visit) {
  visit_rows(list.length, [&](const int(&rows)[kUnroll], u32 present) {
    u64 keys[kUnroll];
    load_keys(list, column, rows, keys);
    present &= list.kept(rows);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (present >> u & 1) visit(keys[u]);
    }
  });
}

// Finds the last column in which some row, dropped or not, has a lesser key than the row before.
__device__ inline void survey_order(const ListRows& list, Survey& survey) {
  if (threadIdx.x == 0) survey.n_columns = 0;
  __syncthreads();  // it starts from this value
#pragma unroll 1
  for (int c = list.n_groups - 1; c >= 0; --c) {
    bool in_order = true;
    visit_rows(list.length, [&](const int(&rows)[kUnroll], u32) {
      int rows_before[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) rows_before[u] = rows[u] > 0 ? rows[u] - 1 : 0;
      u64 keys[kUnroll], keys_before[kUnroll];
      load_keys(list, c, rows, keys);
      load_keys(list, c, rows_before, keys_before);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) in_order &= keys[u] >= keys_before[u];
    });
    if (!in_order) atomicMax(&survey.n_columns, c + 1);
    __syncthreads();  // every thread has told
    if (survey.n_columns > c) break;  // the same for all threads: what the next column adds is less
  }
}

// Counts dropped rows and finds, per column, the bits that differ among kept rows.
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
    visit_rows(list.length, [&](const int(&rows)[kUnroll], u32 present) { dropped += __popc(present & ~list.kept(rows)); });
    dropped = warp_sum(dropped);
    if (lane == 0 && dropped) atomicAdd(&survey.dropped, dropped);
  }
#pragma unroll 1
  for (int c = 0; c < survey.n_columns; ++c) {
    u64 any_one = 0, any_zero = 0;
    visit_keys(list, c, [&](u64 key) {
      any_one |= key;
      any_zero |= ~key;
    });
    any_one = warp_or(any_one);
    any_zero = warp_or(any_zero);
    if (lane == 0) {
      atomicOr(&survey.any_one[c], any_one);
      atomicAnd(&survey.all_one[c], ~any_zero);
    }
  }
  __syncthreads();  // survey is complete but for low and any_above
}

// For columns whose keys differ in many bits: the bits that differ once the smallest key is subtracted.
// Ids from -1 to 15 differ in every bit, but their distances from -1 in five.
__device__ inline void survey_distances(const ListRows& list, Survey& survey) {
#pragma unroll 1
  for (int c = 0; c < survey.n_columns; ++c) {
    if (survey.dropped == list.length || count_bits(survey.any_one[c] ^ survey.all_one[c]) <= kMaxDigitBits) continue;
    u64 low = ~0ull;
    visit_keys(list, c, [&](u64 key) { low = key < low ? key : low; });
    low = warp_min(low);
    if (threadIdx.x % 32 == 0) atomicMin(&survey.low[c], low);
    __syncthreads();  // low is complete
    low = survey.low[c];
    u64 any_above = 0;
    visit_keys(list, c, [&](u64 key) { any_above |= key - low; });
    any_above = warp_or(any_above);
    if (threadIdx.x % 32 == 0) atomicOr(&survey.any_above[c], any_above);
  }
  __syncthreads();  // any_above is complete
}

__device__ inline void start_cursor(const ListRows& list, const Survey& survey, DigitCursor& cursor) {
  cursor.n_columns = survey.n_columns;
  cursor.has_dropped = survey.dropped > 0 && survey.dropped < list.length;
  for (int c = 0; c < survey.n_columns; ++c) {
    u64 differing = survey.dropped == list.length ? 0 : survey.any_one[c] ^ survey.all_one[c];
    bool by_distance = count_bits(differing) > kMaxDigitBits && count_bits(survey.any_above[c]) < count_bits(differing);
    cursor.varying[c] = by_distance ? survey.any_above[c] : differing;
    cursor.low[c] = by_distance ? survey.low[c] : 0;
  }
}

// Lanes among `active` that hold the same digit as this one.
__device__ __forceinline__ u32 warp_peers(u32 digit, int bits, u32 active) {
  u32 peers = active;
#pragma unroll
  for (int b = 0; b < kMaxDigitBits; ++b) {
    if (b == bits) break;  // the same for all lanes
    bool one = digit >> b & 1;
    u32 votes = __ballot_sync(kEveryLane, one);
    peers &= one ? votes : ~votes;
  }
  return peers;
}

// Walks this warp's stretch of the list in order, kUnroll rounds of 32 rows at a time: visit(rows, digits, left), where
// `left` rows are left from the first round on. Called by all 32 lanes.
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
      const u32 i = round + 32 * u + lane;
      rows[u] = i < end ? source.get((int)i) : 0;
    }
    digits_of<true>(list, cursor, digit, rows, digits);
    visit(rows, digits, (int)(end - round));
  }
}

// One stable pass from `source` to `target`. `counts` is (warps, bins + 1) and `firsts` is (bins,), in shared memory.
__device__ inline void sort_pass(
    const ListRows& list, const DigitCursor& cursor, const Digit& digit, const Order& source,
    const Order& target, int* counts, int* firsts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int bins = 1 << digit.bits;
  int* my_counts = counts + warp * pitch_of<int>(bins);

  // count: how many rows of each digit are in this warp's stretch
  for (int bin = lane; bin < bins; bin += 32) my_counts[bin] = 0;
  __syncwarp();
  walk_stretch(list, cursor, digit, source, [&](const int(&)[kUnroll], const u32(&digits)[kUnroll], int left) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (32 * u + lane < left) atomicAdd(&my_counts[digits[u]], 1);
    }
  });
  __syncthreads();  // every warp's counts are there

  // scan: per digit over the warps, then over the digits
  scan_counts(counts, counts, firsts, bins, 0);
  __syncthreads();  // firsts holds the first place of each digit

  // place: rows of one digit keep their order, over warps, rounds and lanes
  walk_stretch(list, cursor, digit, source, [&](const int(&rows)[kUnroll], const u32(&digits)[kUnroll], int left) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (32 * u >= left) break;  // the same for all lanes
      const bool present = 32 * u + lane < left;
      const u32 peers = warp_peers(digits[u], digit.bits, __ballot_sync(kEveryLane, present));
      const int place = present ? firsts[digits[u]] + my_counts[digits[u]] + __popc(peers & ((1u << lane) - 1)) : 0;
      __syncwarp();  // all lanes have read the count that the leader changes
      if (present) {
        target.set(place, rows[u]);
        if (lane == __ffs(peers) - 1) my_counts[digits[u]] += __popc(peers);
      }
      __syncwarp();  // the next round reads the new count
    }
  });
  __syncthreads();  // target is complete; counts may be reused
}
