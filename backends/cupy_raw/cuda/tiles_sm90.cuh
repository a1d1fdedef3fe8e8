// Which tile of sorted query rows a block works on, which keys that tile's rows see, and the row
// data shared between the gathering warpgroups and the multiplying ones. Used by the kernels that
// own query tiles (fwd_sm90.cu, bwd_dq_sm90.cu).
#pragma once

#include "order_sm90.cuh"

constexpr int kProducerBarrier = 1;  // named barrier of all gathering warpgroups

// Shared-memory addresses of one query buffer's row data: kRows ints each of key_start, key_end,
// q_index, then the header.
template <int kRows>
struct TileData {
  static constexpr int kBytes = 12 * kRows + 16;
  unsigned base;

  __device__ __forceinline__ unsigned starts() const { return base; }
  __device__ __forceinline__ unsigned ends() const { return base + 4 * kRows; }
  __device__ __forceinline__ unsigned indices() const { return base + 8 * kRows; }
  __device__ __forceinline__ unsigned tile() const { return base + 12 * kRows; }
  __device__ __forceinline__ unsigned first_key() const { return base + 12 * kRows + 4; }
  __device__ __forceinline__ unsigned key_blocks() const { return base + 12 * kRows + 8; }
};

// A tile by name: head z = b * heads + h, its key/value head, and the sorted row it starts at. The
// last rows of a head go first: they see most. Of the last 2^p.in_turn heads, the first tile of each, then
// the second of each, and so on: so few multiprocessors are left with a long tile at the end. Where rows fill
// no whole number of tiles, the last tile of a head begins before its first row: there is least to do for
// rows that do not exist.
struct QueryTile {
  int z, b, h, h_kv, first_row;
};

template <int kRows>
__device__ __forceinline__ QueryTile locate_query_tile(const Params& p, int tile) {
  const int together = 1 << p.in_turn, last = p.by_tiles.quotient(p.tiles) - together;
  int z = p.by_tiles.quotient(tile), number = tile - z * p.tiles_per_head;
  if (z >= last) {
    const int turn = tile - last * p.tiles_per_head;
    number = turn >> p.in_turn;
    z = last + (turn & (together - 1));
  }
  const int b = p.by_heads.quotient(z), h = z - b * p.heads;
  return {z, b, h, p.by_group.quotient(h), p.seqlen_q - (number + 1) * kRows};
}

// The keys a query tile visits, [first, end) of the sorted list, and the part of them, [gap_first,
// gap_end), outside which no key is unseen by every row of the tile: a key that no row sees has rows
// that end before it and rows that start after it, so somewhere one is the other's neighbour, and it
// lies in the gap between their ranges.
struct KeyUnion {
  int first, end, gap_first, gap_end;
};

// A tile's rows as the plan has them. Rows before the first repeat its range.
struct PlannedRows {
  const int *starts, *ends, *indices;
  int first_row, last;

  __device__ __forceinline__ PlannedRows(const Params& p, const QueryTile& tile)
      : starts(p.key_start), ends(p.key_end), indices(p.q_index),
        first_row(tile.first_row), last(p.seqlen_q - 1) {
    const long long list = static_cast<long long>(tile.z) * p.seqlen_q;
    starts += list, ends += list, indices += list;
  }
  __device__ __forceinline__ int place(int r) const { return min(max(first_row + r, 0), last); }
  __device__ __forceinline__ int start(int r) const { return starts[place(r)]; }
  __device__ __forceinline__ int end(int r) const { return ends[place(r)]; }
  __device__ __forceinline__ int index(int r) const { return indices[place(r)]; }
};

// The same, brought to shared memory by stage_tile_rows.
template <int kRows>
struct StagedRows : TileData<kRows> {
  __device__ __forceinline__ int at(unsigned array, int r) const {
    return shared_load(array + 4 * min(r, kRows - 1));
  }
  __device__ __forceinline__ int start(int r) const { return at(this->starts(), r); }
  __device__ __forceinline__ int end(int r) const { return at(this->ends(), r); }
  __device__ __forceinline__ int index(int r) const { return at(this->indices(), r); }
};

// Load the tile's row data into shared memory, and what each warp finds of its key range into
// `scratch`. All threads of one warpgroup call it; a barrier must follow, and another one before the
// next call.
template <int kRows, class Rows>
__device__ __forceinline__ void load_tile_rows(TileData<kRows> data, unsigned scratch,
                                               const Rows& rows, int first_row, int thread) {
  constexpr int kNone = 0x7FFFFFFF, kCount = (kRows + kGatherThreads - 1) / kGatherThreads;
  int start[kCount], end[kCount], index[kCount], next[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {  // all loads in flight together
    // Rows before the first are neither gathered nor stored.
    const int r = thread + i * kGatherThreads;
    start[i] = rows.start(r);
    end[i] = rows.end(r);
    index[i] = first_row + r >= 0 ? rows.index(r) : -1;
    next[i] = rows.start(r + 1);
  }
  KeyUnion keys{kNone, 0, kNone, 0};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int r = thread + i * kGatherThreads;
    if (r < kRows) {
      shared_store(data.starts() + 4 * r, start[i]);
      shared_store(data.ends() + 4 * r, end[i]);
      shared_store(data.indices() + 4 * r, index[i]);
      const bool sees = start[i] < end[i], gap = r + 1 < kRows && next[i] > end[i];
      keys.first = sees ? min(keys.first, start[i]) : keys.first;
      keys.end = sees ? max(keys.end, end[i]) : keys.end;
      keys.gap_first = gap ? min(keys.gap_first, end[i]) : keys.gap_first;
      keys.gap_end = gap ? max(keys.gap_end, next[i]) : keys.gap_end;
    }
  }
  if constexpr (!kMonotone) {  // then the later of two neighbours may also see the earlier keys
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int r = thread + i * kGatherThreads;
      const int next_end = rows.end(r + 1);
      const bool gap = r + 1 < kRows && start[i] > next_end;
      keys.gap_first = gap ? min(keys.gap_first, next_end) : keys.gap_first;
      keys.gap_end = gap ? max(keys.gap_end, start[i]) : keys.gap_end;
    }
  }
  keys.first = __reduce_min_sync(0xFFFFFFFFu, keys.first);
  keys.end = __reduce_max_sync(0xFFFFFFFFu, keys.end);
  keys.gap_first = __reduce_min_sync(0xFFFFFFFFu, keys.gap_first);
  keys.gap_end = __reduce_max_sync(0xFFFFFFFFu, keys.gap_end);
  if (thread % 32 == 0) {
    const unsigned mine = scratch + 16 * (thread / 32);
    shared_store(mine, keys.first);
    shared_store(mine + 4, keys.end);
    shared_store(mine + 8, keys.gap_first);
    shared_store(mine + 12, keys.gap_end);
  }
}

// The key range of a tile, from what the four warps of load_tile_rows found.
__device__ __forceinline__ KeyUnion join_key_ranges(unsigned scratch) {
  KeyUnion keys{0x7FFFFFFF, 0, 0x7FFFFFFF, 0};
#pragma unroll
  for (int warp = 0; warp < kGatherThreads / 32; ++warp) {
    const int2 range = shared_load_pair(scratch + 16 * warp),
               gap = shared_load_pair(scratch + 16 * warp + 8);
    keys.first = min(keys.first, range.x);
    keys.end = max(keys.end, range.y);
    keys.gap_first = min(keys.gap_first, gap.x);
    keys.gap_end = max(keys.gap_end, gap.y);
  }
  keys.first = uniform(keys.first);
  keys.end = uniform(keys.end);
  if constexpr (!kMonotone) {
    keys.gap_first = uniform(keys.gap_first);
    keys.gap_end = uniform(keys.gap_end);
  }
  if (keys.first >= keys.end) keys.first = keys.end = 0;
  return keys;
}

// Bring the row data of a tile nearer, ahead of load_tile_rows; one warp calls it with the tile
// number in its lane 0.
template <int kRows>
__device__ __forceinline__ void prefetch_tile_rows(const Params& p, int number, int lane) {
  number = __shfl_sync(0xFFFFFFFFu, number, 0);
  if (number >= p.tiles) return;
  const QueryTile tile = locate_query_tile<kRows>(p, number);
  constexpr int kLines = kRows / 32 + 1;  // of 128 bytes, wherever the first row lies in its line
  if (lane < 3 * kLines) {
    const int* array = lane < kLines ? p.key_start : lane < 2 * kLines ? p.key_end : p.q_index;
    const int row = min(max(tile.first_row + 32 * (lane % kLines), 0), p.seqlen_q - 1);
    const int* line = array + static_cast<long long>(tile.z) * p.seqlen_q + row;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
  }
}

// Start bringing the rows of the tile that lane 0 has the number of to shared memory, and that number;
// `full` then completes a phase. One warp calls it.
template <int kRows>
__device__ __forceinline__ void stage_tile_rows(const Params& p, StagedRows<kRows> staged,
                                                unsigned full, int number, int lane) {
  number = __shfl_sync(0xFFFFFFFFu, number, 0);
  if (number < p.tiles) {
    const PlannedRows rows(p, locate_query_tile<kRows>(p, number));
#pragma unroll 1
    for (int r = lane; r < kRows; r += 32) {
      const int place = rows.place(r);
      copy_word(staged.starts() + 4 * r, rows.starts + place, true);
      copy_word(staged.ends() + 4 * r, rows.ends + place, true);
      copy_word(staged.indices() + 4 * r, rows.indices + place, true);
    }
  }
  barrier_arrive_after_copies(full);
  if (lane == 0) {
    shared_store(staged.tile(), number);
    barrier_arrive(full);
  }
}
constexpr int kStagings = 33;  // arrivals of one stage_tile_rows

// Where ranges are nondecreasing: is this key seen by a row of the tile?
template <int kRows>
__device__ __forceinline__ bool seen_in_order(TileData<kRows> data, int key) {
  int row = 0;  // lower bound: the first row whose range ends beyond the key
#pragma unroll 1
  for (int count = kRows; count > 0;) {
    const int half = count / 2;
    const bool beyond = shared_load(data.ends() + 4 * (row + half)) > key;
    row = beyond ? row : row + half + 1;
    count = beyond ? half : count - half - 1;
  }
  return row < kRows && shared_load(data.starts() + 4 * row) <= key;
}

// A bit for each of the 32 rows of a block that the lanes of a warp own (gather_owned_row), in the
// order of these rows: is it before `row`? Both count from the warp's first.
__device__ __forceinline__ unsigned owned_before(int row) {
  constexpr int kPass = kGatherThreads / kLanesPerRow, kRun = 32 / kLanesPerRow;
  const int clipped = min(max(row, 0), kGatherThreads - 1);
  return (1u << min(clipped % kPass, kRun) << clipped / kPass * kRun) - 1;
}

// Where ranges lie in any order: is the key that this thread owns in the block [first, end) seen by
// a row of the tile? All lanes of a warp call it.
template <int kRows>
__device__ __forceinline__ bool seen_in_any_order(TileData<kRows> data, int first, int end,
                                                  int thread) {
  const int lane = thread % 32;
  bool whole = false, part = false;
#pragma unroll 1
  for (int row = 0; row < kRows; row += 32) {
    const int start = shared_load(data.starts() + 4 * (row + lane)),
              stop = shared_load(data.ends() + 4 * (row + lane));
    whole |= start <= first && end <= stop;
    part |= start < end && first < stop;
  }
  if (__any_sync(0xFFFFFFFFu, whole)) return true;
  if (!__any_sync(0xFFFFFFFFu, part)) return false;
  const int origin = first + gather_owned_row(thread - lane, 0);
  unsigned seen = 0;
#pragma unroll 1
  for (int row = 0; row < kRows; row += 32) {
    seen |= owned_before(shared_load(data.ends() + 4 * (row + lane)) - origin) &
            ~owned_before(shared_load(data.starts() + 4 * (row + lane)) - origin);
  }
  seen = __reduce_or_sync(0xFFFFFFFFu, seen);
  return seen >> (lane % kLanesPerRow * (32 / kLanesPerRow) + lane / kLanesPerRow) & 1;
}

// Is `key`, the one that this thread owns in the block of kBlock keys from `first` on, seen by any
// row of the tile? Exact, so that rows nobody sees are never multiplied, not even by zero.
template <int kBlock, int kRows>
__device__ __forceinline__ bool seen_by_tile(TileData<kRows> data, const KeyUnion& keys, int first,
                                             int key, int thread) {
  if constexpr (kMonotone) {
    const bool doubtful = key >= keys.gap_first && key < keys.gap_end;
    return key < keys.end && (!doubtful || seen_in_order(data, key));
  } else {
    const int end = min(first + kBlock, keys.end);
    bool seen = true;
    if (first < keys.gap_end && end > keys.gap_first) {
      seen = seen_in_any_order(data, first, end, thread);
    }
    return seen & (key < keys.end);
  }
}
