// Last part of bwd_fused_sm90.cu: the warpgroup that makes dq of every step and writes what is
// complete, and the warps that add the rest to its sums in a fixed order.
#pragma once

#include "bwd_fused_sm90_sums.cuh"

constexpr int kQueryThreads = 128;
constexpr int kTileEnds = 1 << 8;  // beside a step's buffer of keys: it is the last of its key tile
// In place of a query tile: this key tile is done, no step of it having said so; there are no more.
constexpr int kTileDone = -1;
constexpr int kAllDone = -2;
constexpr int kSumRead = -1;  // in place of the tiles before: the sum is complete and has been read

// Warps 2 and 3, in turn, so that one tile's way to memory hides the other's: add dq tiles to their
// sums.
__device__ __forceinline__ void carry_sums(const Params& p, Shared shared, int carrier, int lane) {
  for (unsigned parity = 0;; parity ^= 1) {
    barrier_wait(shared.sum_full(carrier), parity);
    const int tile = uniform(shared_load(shared.load(carrier)));
    if (tile < 0) return;
    if (carries(lane)) {
      const int before = shared_load(shared.load(carrier) + 4);
      const int z = p.by_query_tiles.quotient(tile), part = tile - z * p.query_tiles;
      const int slot = z - p.by_slots.quotient(z) * p.slots;
      if (before == kSumRead) {
        barrier_arrive(shared.sum_empty(carrier));
        if (lane == 0) store_release(p.added + tile, kComplete);
      } else {
        if (before == 0) {
          wait_for_room(p, tile, z);
        } else {
          wait_until(p.added + tile, before);
        }
        global_proxy_fence();
        start_sum(p.dq_sum + static_cast<long long>(slot * p.query_tiles + part) * kSumFloats,
                  shared.sum(carrier), before == 0);
        wait_until_read();
        barrier_arrive(shared.sum_empty(carrier));
        wait_until_added();  // from here on it is seen as if this thread had written it
        if (lane == 0) store_release(p.added + tile, before + 1);
      }
    }
    __syncwarp();
  }
}

// Warpgroup 3: dQ = dS K of every step, given to those who add it or, by the last key tile, written.
__device__ __forceinline__ void sum_queries(const Params& p, Shared shared) {
  const int thread = threadIdx.x % kQueryThreads;
  const int warp = uniform(thread / 32), lane = thread % 32;
  Ring<kChanges> change;
  Ring<kCarriers> sum;
  while (true) {
    barrier_wait(shared.changes_full(change.slot), change.parity);
    const unsigned job = shared.job(change.slot);
    const int tile = uniform(shared_load(job));
    if (tile == kAllDone) break;
    const int number = uniform(shared_load(job + 4));  // of the key tile
    const int lowest = uniform(shared_load(job + 8)), beyond = uniform(shared_load(job + 12));
    const int keys_of_step = uniform(shared_load(job + 16));
    const unsigned keys = keys_of_step & (kTileEnds - 1);  // buffer
    if (tile == kTileDone) {
      barrier_release(shared.changes_empty(change.slot), lane);
      barrier_release(shared.key_empty(keys), lane);
      change.advance();
      continue;
    }
    const int z = p.by_query_tiles.quotient(tile), part = tile - z * p.query_tiles;
    const int before = beyond - 1 - number;  // key tiles that add to this query tile earlier
    const bool finishes = number == lowest, joins = finishes && before > 0;
    float grad[kHeadDim / 2];
    QueryRows rows;
    if (finishes) rows.look_up(p, z, tile, 16 * warp + lane / 4);
    async_proxy_fence();
    if (joins) {
      // The key tile that finishes a head's rows does so in every step of its own, and no room is free
      // before: so all of a sum is on its way at once, straight to where the product is added to it.
      if (lane == 0) wait_until(p.added + tile, before);
      __syncwarp();
      const int slot = z - p.by_slots.quotient(z) * p.slots;
      const float* source =
          p.dq_sum + static_cast<long long>(slot * p.query_tiles + part) * kSumFloats + 4 * thread;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; i += 4) {
        float sum[4];
        load_sum_four(source + 128 * i, sum);
#pragma unroll
        for (int j = 0; j < 4; ++j) grad[i + j] = sum[j];
      }
      pin(grad);
      wgmma_fence();
      product_of_columns<kBlockN, true>(grad, shared.changes(change.slot), shared.key(keys));
    } else {
      wgmma_fence();
      product_of_columns<kBlockN, false>(grad, shared.changes(change.slot), shared.key(keys));
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(grad);
    barrier_release(shared.changes_empty(change.slot), lane);
    change.advance();
    if (keys_of_step & kTileEnds) barrier_release(shared.key_empty(keys), lane);

    if (!finishes || joins) {
      barrier_wait(shared.sum_empty(sum.slot), sum.parity ^ 1);
      if (!finishes) {  // each thread has its 32 numbers of a tile in eight places of 16 bytes
        const unsigned target = shared.sum(sum.slot) + 16 * thread;
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; i += 4) {
          shared_store_four(target + 512 * i, grad[i], grad[i + 1], grad[i + 2], grad[i + 3]);
        }
      }
      if (thread == 0) {
        shared_store(shared.load(sum.slot), tile);
        shared_store(shared.load(sum.slot) + 4, finishes ? kSumRead : before);
      }
      shared_writes_fence();
      barrier_release(shared.sum_full(sum.slot), lane);
      sum.advance();
    }
    if (finishes) rows.write(p, grad, z, 0, lane);
  }
  for (int i = 0; i < kCarriers; ++i) {
    barrier_wait(shared.sum_empty(sum.slot), sum.parity ^ 1);
    if (thread == 0) shared_store(shared.load(sum.slot), -1);
    barrier_release(shared.sum_full(sum.slot), lane);
    sum.advance();
  }
}
