// What the fused kernels are told of each key tile, so that they need not search at the start of one,
// with nothing else to do: a record for each tile (bwd_fused_sm90_tiles.cuh) says which of its keys
// some query sees, and which queries of each query head may see one. Ranges must be nondecreasing
// along the sorted queries (plan.monotone). Include after mbarrier.cuh, params_sm90.cuh,
// choice_sm90.cuh, query_data_sm90.cuh and bwd_fused_sm90_tiles.cuh.
#pragma once
#include "search_sm90.cuh"

// Add keys [from, to) of the tile that each lane names to those that nobody sees; all lanes get them.
__device__ __forceinline__ void add_gaps(unsigned (&unseen)[kSeenWords], int from, int to) {
  to = min(to, kTileKeys);
  if (!__any_sync(0xFFFFFFFFu, from < to)) return;
#pragma unroll
  for (int i = 0; i < kSeenWords; ++i) {
    const int low = min(max(from - 32 * i, 0), 32), high = min(max(to - 32 * i, 0), 32);
    const unsigned bits = static_cast<unsigned>((1ull << high) - (1ull << low));
    unseen[i] |= __reduce_or_sync(0xFFFFFFFFu, from < to ? bits : 0);
  }
}

// Which keys of a tile do the rows of one list not see? Starts and ends are nondecreasing, so those
// are the gaps between the end of one row and the start of the next, from `first` on, the first row
// to end beyond key0.
__device__ __forceinline__ void find_gaps(unsigned (&unseen)[kSeenWords], const int* starts,
                                          const int* ends, int first, int count, int key0,
                                          int lane) {
  constexpr int kAtOnce = 4;  // rows of a lane whose loads are waited for together
  int before = key0;          // end of the row before
#pragma unroll 1
  for (int row0 = first; before < key0 + kTileKeys; row0 += 32 * kAtOnce) {
    int start[kAtOnce], end[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = row0 + 32 * i + lane;
      start[i] = row < count ? starts[row] : kSeesNothing;
      end[i] = row < count ? ends[row] : kSeesNothing;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      int previous = __shfl_up_sync(0xFFFFFFFFu, end[i], 1);
      if (lane == 0) previous = before;
      add_gaps(unseen, max(previous - key0, 0), start[i] - key0);
      before = __shfl_sync(0xFFFFFFFFu, end[i], 31);
    }
  }
}

__device__ __forceinline__ void record_key_tile(const Params& p, int share, int tile, int lane) {
  const KeyTile at = locate_key_tile(p, tile);
  if (share == kSome && !goes(p, kFused, at.z)) return;
  const int key0 = at.number * kTileKeys;
  int* record = key_tile_record(p, tile);
  unsigned seen[kSeenWords] = {};
  for (int member = 0; member < p.group_size; ++member) {
    const int z = at.b * p.heads + at.h_kv * p.group_size + member;
    const long long list = static_cast<long long>(z) * p.seqlen_q;
    const int *starts = p.key_start + list, *ends = p.key_end + list;
    // Nobody sees keys beyond those that are kept, so nothing is searched for them.
    const int count = key0 < p.k_count[at.z] ? p.q_count[z] : 0;
    constexpr int kHalf = kTileKeys / 2;
    Search searches[] = {{ends, key0, 0, count},
                         {starts, key0 + kTileKeys - 1, 0, count},
                         {ends, key0 + kHalf, 0, count},
                         {starts, key0 + kHalf - 1, 0, count}};
    if (count > 0) search_all(searches, lane);
    const int first = searches[0].high, beyond = searches[1].high;
    if (lane == 0) {
      int* bounds = record + kSeenWords + kTileBounds * member;
      const int *rows = p.q_index + list, last = beyond - 1;
      const bool may_run = first <= last && rows[last] - rows[first] == last - first;
      bounds[0] = first == count ? kSeesNothing : (first & ~1) | may_run;
      bounds[1] = beyond;
      bounds[2] = searches[2].high;
      bounds[3] = searches[3].high;
    }
    unsigned unseen[kSeenWords] = {};
    find_gaps(unseen, starts, ends, first, count, key0, lane);
#pragma unroll
    for (int i = 0; i < kSeenWords; ++i) seen[i] |= ~unseen[i];
  }
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kSeenWords; ++i) record[i] = static_cast<int>(seen[i]);
  }
}

// The records of all tiles: warps `warp`, warp + warps, ... of those that make them.
__device__ __forceinline__ void record_key_tiles(const Params& p, int share, int warp, int warps) {
  for (int tile = warp; tile < p.tiles; tile += warps) {
    record_key_tile(p, share, tile, threadIdx.x % 32);
  }
}
