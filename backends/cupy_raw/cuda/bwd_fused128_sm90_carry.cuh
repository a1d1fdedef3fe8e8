// Last part of bwd_fused128_sm90.cu: the warps that add dq tiles to their sums in a fixed order, and
// fetch a sum for the key tile that completes it.
#pragma once

#include "bwd_fused_sm90_sums.cuh"

// How dq of a query tile goes on, and what a carrier is told of it.
enum Kind {
  kAdd,    // to the sum in memory
  kFetch,  // added to the sum, which the carrier fetches, and written: no key tile comes after this
  kAlone,  // written: there is no sum, and nothing to carry
  kEnd     // there are no more
};
struct Turn {
  int kind, before;  // key tiles that add to the query tile earlier
  unsigned carrier, parity;  // who carries it, in which round
  int fetch;                 // parity of Shared::sum_loaded
};

// There is one room for a dq tile in shared memory, and the carriers take turns: it is free once the
// other one's last tile has left.
__device__ __forceinline__ void wait_for_room_here(const Shared& shared, unsigned carrier,
                                                   unsigned parity) {
  static_assert(kCarriers == 2, "one and the other");
  barrier_wait(shared.sum_empty(carrier ^ 1), parity ^ (carrier == 0));
}

// `first_start` and `last_end` are those of the queries of the step.
__device__ __forceinline__ Turn take_turn(int first_start, int last_end, int number,
                                          const Ring<kCarriers>& carrier, int fetch) {
  const int lowest = first_start / kBlockN;
  const int before = (last_end + kBlockN - 1) / kBlockN - 1 - number;
  return {number != lowest ? kAdd : before > 0 ? kFetch : kAlone, before, carrier.slot,
          carrier.parity, fetch};
}

// One warp tells the carrier whose turn it is.
__device__ __forceinline__ void announce(const Shared& shared, const Turn& turn, int query_tile,
                                         int lane) {
  barrier_wait(shared.job_empty(turn.carrier), turn.parity ^ 1);
  shared_store_four(shared.job(turn.carrier), query_tile, turn.before, turn.kind, turn.fetch);
  barrier_release(shared.job_full(turn.carrier), lane);
}

// Let go of the room for a dq tile in place of the multiplying warps, by as many arrivals.
__device__ __forceinline__ void release_for_all(unsigned barrier, int lane) {
  constexpr int kWarps = 4 * kWarpgroups;
  if constexpr (kSanitize) {
    for (int i = 0; i < kWarps; ++i) barrier_arrive(barrier);
  } else if (lane < kWarps) {
    barrier_arrive(barrier);
  }
}

// Warps 2 and 3, in turn, so that one tile's way to memory hides the other's.
__device__ __forceinline__ void carry_sums(const Params& p, Shared shared, int carrier, int lane) {
  unsigned full_parity = 0;
  for (unsigned parity = 0;; parity ^= 1) {
    barrier_wait(shared.job_full(carrier), parity);
    const unsigned job = shared.job(carrier);
    const int tile = uniform(shared_load(job)), before = uniform(shared_load(job + 4));
    const int kind = uniform(shared_load(job + 8)), fetch = uniform(shared_load(job + 12));
    barrier_release(shared.job_empty(carrier), lane);
    if (kind == kEnd) return;
    const int z = p.by_query_tiles.quotient(tile), part = tile - z * p.query_tiles;
    const int slot = z - p.by_slots.quotient(z) * p.slots;
    float* sum = p.dq_sum + static_cast<long long>(slot * p.query_tiles + part) * kSumFloats;
    if (carries(lane)) {
      if (before == 0) {
        wait_for_room(p, tile, z);
      } else {
        wait_until(p.added + tile, before);
      }
      global_proxy_fence();
    }
    __syncwarp();
    if (kind == kAdd) {
      barrier_wait(shared.sum_full(carrier), full_parity);
      full_parity ^= 1;
      if (carries(lane)) {
        start_sum(sum, shared.sum(), before == 0);
        wait_until_read();
      }
      __syncwarp();
      release_for_all(shared.sum_empty(carrier), lane);
      if (carries(lane)) {
        wait_until_added();  // from here on it is seen as if this thread had written it
        if (lane == 0) store_release(p.added + tile, before + 1);
      }
    } else {
      wait_for_room_here(shared, carrier, parity);
      if (carries(lane)) {
        fetch_sum(shared.sum(), sum, shared.sum_loaded());
        barrier_wait(shared.sum_loaded(), fetch);
        if (lane == 0) store_release(p.added + tile, kComplete);
      }
    }
    __syncwarp();
  }
}
