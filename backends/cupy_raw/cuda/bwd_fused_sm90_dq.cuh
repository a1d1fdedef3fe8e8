// Last part of bwd_fused_sm90.cu: the warpgroup that makes dq of every step and writes what is
// complete, and the warps that add the rest to its sums in a fixed order.
#pragma once

#include "bwd_fused_sm90_sums.cuh"

constexpr int kQueryThreads = 128;
constexpr int kTileEnds = 1 << 8;  // beside a step's buffer of keys: it is the last of its key tile
// In place of a query tile: this key tile is done, no step of it having said so; there are no more.
constexpr int kTileDone = -1;
constexpr int kAllDone = -2;

// Warps 2 and 3, in turn, so that one tile's way to memory hides the other's: add dq tiles to their
// sums, or fetch a sum that is complete but for a tile to come. Told `before`, the key tiles that add
// earlier, or ~before for a sum to fetch.
__device__ __forceinline__ void carry_sums(const Params& p, Shared shared, int carrier, int lane) {
  unsigned loaded = 0;  // parity of the next sum to fetch
  for (unsigned parity = 0;; parity ^= 1) {
    barrier_wait(shared.sum_full(carrier), parity);
    const int tile = uniform(shared_load(shared.load(carrier)));
    if (tile < 0) return;
    const int before = uniform(shared_load(shared.load(carrier) + 4));
    if (carries(lane)) {
      const int z = p.by_query_tiles.quotient(tile), part = tile - z * p.query_tiles;
      const int slot = z - p.by_slots.quotient(z) * p.slots;
      float* sum = p.dq_sum + static_cast<long long>(slot * p.query_tiles + part) * kSumFloats;
      if (before < 0) {
        barrier_arrive(shared.sum_empty(carrier));  // whoever asked waits for what is fetched
        wait_until(p.added + tile, ~before);
        global_proxy_fence();
        fetch_sum(shared.sum(carrier), sum, shared.sum_loaded(carrier));
        barrier_wait(shared.sum_loaded(carrier), loaded);
        if (lane == 0) store_release(p.added + tile, kComplete);
      } else {
        if (before == 0) {
          wait_for_room(p, tile, z);
        } else {
          wait_until(p.added + tile, before);
        }
        global_proxy_fence();
        start_sum(sum, shared.sum(carrier), before == 0);
        wait_until_read();
        barrier_arrive(shared.sum_empty(carrier));
        wait_until_added();  // from here on it is seen as if this thread had written it
        if (lane == 0) count_release(p.added + tile);
      }
    }
    if (before < 0) loaded ^= 1;
    __syncwarp();
  }
}

// Warpgroup 3: dQ = dS K of every step, given to those who add it or, by the last key tile, written.
__device__ __forceinline__ void sum_queries(const Params& p, Shared shared) {
  static_assert(kCarriers == 2, "one and the other");
  const int thread = threadIdx.x % kQueryThreads;
  const int warp = uniform(thread / 32), lane = thread % 32;
  Ring<kChanges> change;
  Ring<kCarriers> sum;
  unsigned loads = 0;  // a bit for each carrier: parity of the next sum that it fetches
  bool asked = false;  // is the sum of this step on its way?
  bool begins = true;  // is this the first step of its key tile?
  // Tell a carrier of a tile, whose sum is to be added to or, ~before, fetched; its room is free.
  const auto tell_carrier = [&](int tile, int before) {
    if (thread == 0) {
      shared_store(shared.load(sum.slot), tile);
      shared_store(shared.load(sum.slot) + 4, before);
    }
    barrier_release(shared.sum_full(sum.slot), lane);
    sum.advance();
  };
  const auto ask_for_sum = [&](int tile, int before) {
    barrier_wait(shared.sum_empty(sum.slot), sum.parity ^ 1);
    tell_carrier(tile, ~before);
  };
  while (true) {
    barrier_wait(shared.changes_full(change.slot), change.parity);
    const unsigned job = shared.job(change.slot);
    unsigned words[4];
    shared_load_words(words, job);
    const int tile = uniform(static_cast<int>(words[0]));
    if (tile == kAllDone) break;
    const int number = uniform(static_cast<int>(words[1]));  // of the key tile
    const int lowest = uniform(static_cast<int>(words[2]));
    const int beyond = uniform(static_cast<int>(words[3]));
    const int keys_of_step = uniform(shared_load(job + 16));
    const unsigned keys = keys_of_step & (kTileEnds - 1);  // buffer
    if (tile == kTileDone) {
      barrier_release(shared.changes_empty(change.slot), lane);
      barrier_release(shared.key_empty(keys), lane);
      change.advance();
      begins = true;
      continue;
    }
    const int z = p.by_query_tiles.quotient(tile);
    const int before = beyond - 1 - number;  // key tiles that add to this query tile earlier
    const bool finishes = number == lowest, joins = finishes && before > 0;
    // The key tile that finishes a query tile finishes the next one too, if it sees that.
    const int before_next = finishes ? uniform(shared_load(job + 20)) - 1 - number : 0;
    float grad[kHeadDim / 2];
    QueryRows rows;
    if (finishes) rows.look_up(p, z, tile, 16 * warp + lane / 4);
    // Keys of a tile, which others copied, and rooms of sums, which this warp has read.
    if (begins || finishes) async_proxy_fence();
    begins = keys_of_step & kTileEnds;
    if (joins && !asked) ask_for_sum(tile, before);
    const unsigned room = sum.slot ^ 1;  // of this step's sum
    wgmma_fence();
    product_of_columns<kBlockN>(grad, shared.changes(change.slot), shared.key(keys));
    wgmma_commit();
    asked = before_next > 0;
    if (asked) ask_for_sum(tile + 1, before_next);
    wgmma_wait<0>();
    pin(grad);
    barrier_release(shared.changes_empty(change.slot), lane);
    change.advance();
    if (keys_of_step & kTileEnds) barrier_release(shared.key_empty(keys), lane);

    // Each thread has its 32 numbers of a tile in eight places of 16 bytes.
    if (joins) {
      barrier_wait(shared.sum_loaded(room), loads >> room & 1);
      loads ^= 1u << room;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; i += 4) {
        unsigned sums[4];
        shared_load_words(sums, shared.sum(room) + 16 * thread + 512 * i);
#pragma unroll
        for (int j = 0; j < 4; ++j) grad[i + j] += __int_as_float(static_cast<int>(sums[j]));
      }
    }
    if (finishes) {
      rows.write(p, grad, z, 0, lane);
    } else {
      barrier_wait(shared.sum_empty(sum.slot), sum.parity ^ 1);
      const unsigned target = shared.sum(sum.slot) + 16 * thread;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; i += 4) {
        shared_store_four(target + 512 * i, grad[i], grad[i + 1], grad[i + 2], grad[i + 3]);
      }
      shared_writes_fence();
      tell_carrier(tile, before);
    }
  }
  for (int i = 0; i < kCarriers; ++i) {
    barrier_wait(shared.sum_empty(sum.slot), sum.parity ^ 1);
    tell_carrier(-1, 0);
  }
}
