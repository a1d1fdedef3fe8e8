// Which key tile the gathering warps of a fused kernel take, and which of its keys they fetch.
// Include after Shared.
#pragma once

#include "bwd_fused_sm90_tiles.cuh"

// Take a tile, the one that `claimed` names if it is not kUnclaimed, and tell the others its number.
// Not one tile ahead: others would wait for its sums as long as this block is at the last one.
constexpr int kUnclaimed = -1;
__device__ __forceinline__ int take_tile(const Params& p, Shared shared, unsigned buffer,
                                         int thread, int claimed = kUnclaimed) {
  if (thread == 0) {
    const int next = claimed == kUnclaimed ? atomicAdd(p.counter, 1) : claimed;
    shared_store(shared.tile(buffer), own_tile<false>(p, kFused, shared.share(), next, 0));
  }
  named_barrier_sync(kProducerBarrier, kRowThreads);  // the tile number is written
  return uniform(shared_load(shared.tile(buffer)));
}

// dq adds up products with all keys of a tile, with those that nobody sees by zero: they must be
// numbers, so those become zeros. Does one row see all keys of the tile, so that there are none?
__device__ __forceinline__ bool sees_all(const Params& p, Shared shared, unsigned buffer) {
  bool all = false;
  for (int member = 0; member < p.group_size; ++member) {
    all |= uniform(shared_load(shared.bound(buffer, member, 3))) <
           uniform(shared_load(shared.bound(buffer, member, 2)));
  }
  return all;
}

// Is this key seen by a row of the tile's query heads, of which `first_z` is the first? Nothing is
// searched where `all` are (sees_all).
__device__ __forceinline__ bool seen_by_group(const Params& p, Shared shared, unsigned buffer,
                                              int first_z, int key, bool all) {
  bool seen = all;
  for (int member = 0; member < p.group_size && !seen; ++member) {
    const int z = first_z + member, low = shared_load(shared.bound(buffer, member, 0));
    const long long list = static_cast<long long>(z) * p.seqlen_q;
    seen = seen_by_rows(p.key_start + list, p.key_end + list, low,
                        shared_load(shared.bound(buffer, member, 3)), p.q_count[z], key);
  }
  return seen;
}
