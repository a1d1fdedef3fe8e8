// Which key tile the gathering warps of a fused kernel take, and what they load before they know of it.
// Include after Shared.
#pragma once

#include "bwd_fused_sm90_tiles.cuh"

// Take a tile and tell the others its number. No earlier than there is room for its first queries:
// others wait for its sums as long as this block is at the tile before.
__device__ __forceinline__ int take_tile(const Params& p, Shared shared, unsigned buffer,
                                         int thread) {
  if (thread == 0) {
    const int next = atomicAdd(p.counter, 1);
    int tile = own_tile<false>(p, kFused, shared.share(), next, 0);
    if (kInTurn && tile < p.tiles) tile = tile_in_turn(p, tile, shared_load(shared.in_turn()));
    shared_store(shared.tile(buffer), tile);
  }
  named_barrier_sync(kProducerBarrier, kRowThreads);  // the tile number is written
  __syncwarp();  // thread 0 is back: or ptxas writes all that follows twice
  return uniform(shared_load(shared.tile(buffer)));
}

// What gathering threads load of a tile at once: the original rows of its keys, -1 for those that nobody
// sees, and the bounds of its query heads, which go to shared memory. Dq adds up products with all
// keys of a tile, with those that nobody sees by zero: they must be numbers, so zeros are fetched.
__device__ __forceinline__ void load_key_tile(const Params& p, Shared shared, unsigned buffer,
                                              int tile, const KeyTile& at, int thread,
                                              int (&rows)[kBlockN / kRowThreads]) {
  static_assert(kBlockN == kTileKeys && kBounds == kTileBounds, "as the records were made");
  static_assert(kBounds * kMaxGroup <= kRowThreads, "a bound each");
  const int* record = key_tile_record(p, tile);
  const int* k_index = p.k_index + static_cast<long long>(at.z) * p.seqlen_k;
  int seen[kBlockN / kRowThreads];
#pragma unroll
  for (int i = 0; i < kBlockN / kRowThreads; ++i) {
    const int key = gather_owned_row<kRowThreads>(thread, i);
    seen[i] = record[key / 32] >> (key % 32) & 1;
    // Both loads at once, though rows of dropped keys may never have been written, which initcheck
    // need not see.
    const bool looks = !kSanitize || seen[i];
    rows[i] = looks ? k_index[min(at.number * kBlockN + key, p.seqlen_k - 1)] : -1;
  }
  // Those beyond write the last bound once more: a branch here has ptxas double all that follows.
  const int bound = min(thread, kBounds * p.group_size - 1);
  shared_store(shared.bound(buffer, 0, 0) + 4 * bound, record[kSeenWords + bound]);
#pragma unroll
  for (int i = 0; i < kBlockN / kRowThreads; ++i) rows[i] = seen[i] ? rows[i] : -1;
  named_barrier_sync(kProducerBarrier, kRowThreads);  // the bounds are written
}
