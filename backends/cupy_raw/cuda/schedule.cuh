// Which tile is mine: heads one after another, so that the keys and values of a head stay in L2 while its tiles run.
#pragma once
#include "params.cuh"
#include "ptx.cuh"

struct Tile {
  int batch, head, first_row;
};

// Query tiles of a head from the last to the first: under causality the last see most keys, and short tiles end the grid.
template <int kBlockM>
SCFA_DEVICE Tile query_tile(const Params& p) {
  const int tiles = ceil_div(p.seqlen_q, kBlockM);
  const int block = block_here();
  const int list = block / tiles;
  const int tile = tiles - 1 - block % tiles;
  return {list / p.heads, list % p.heads, tile * kBlockM};
}

// Key tiles of a kv head from the first to the last: under causality the first are seen by most queries.
template <int kBlockN>
SCFA_DEVICE Tile key_tile(const Params& p) {
  const int tiles = ceil_div(p.seqlen_k, kBlockN);
  const int block = block_here();
  const int list = block / tiles;
  return {list / p.heads_kv, list % p.heads_kv, block % tiles * kBlockN};
}

// First position of a nondecreasing list whose value is at least `bound`; 32 probes at a time.
SCFA_DEVICE int warp_lower_bound(const int* values, int count, int bound) {
  int low = 0, high = count;  // the answer lies in [low, high]
  while (low < high) {
    const int step = ceil_div(high - low, kWarpSize);
    const int probe = low + int(threadIdx.x % kWarpSize) * step;
    const int below = __popc(__ballot_sync(kAllLanes, probe < high && values[probe] < bound));
    if (below == 0) {
      high = low;
    } else {
      const int last_below = low + (below - 1) * step;
      low = last_below + 1;
      high = min(last_below + step, high);
    }
  }
  return low;
}

// Sorted query rows [first, last) that can see keys [begin, end): all that do lie in it.
struct QueryRange {
  int first, last;
};

SCFA_DEVICE QueryRange warp_query_range_monotone(const int* key_start, const int* key_end, int rows, int begin, int end) {
  return {warp_lower_bound(key_end, rows, begin + 1), warp_lower_bound(key_start, rows, end)};
}

// The same where ranges follow no order: look at every row.
SCFA_DEVICE QueryRange warp_query_range_scan(const int* key_start, const int* key_end, int rows, int begin, int end) {
  int first = kIntMax, last = 0;
  for (int row = threadIdx.x % kWarpSize; row < rows; row += kWarpSize) {
    const int start = key_start[row], stop = key_end[row];
    if (start < stop && start < end && stop > begin) first = min(first, row), last = row + 1;
  }
  first = __reduce_min_sync(kAllLanes, first);
  last = __reduce_max_sync(kAllLanes, last);
  return {min(first, last), last};
}
