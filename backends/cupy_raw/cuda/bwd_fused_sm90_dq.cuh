// Last part of bwd_fused_sm90.cu: the warpgroup that makes dq of every step and writes what is
// complete, and the warps that add the rest to its sums in a fixed order.
#pragma once

// Values of Params::added: the sum has been read and its room is free; at most one key tile visits,
// and there is no sum in memory.
constexpr int kComplete = 0x7FFFFFFF;
constexpr int kNoSum = 0x7FFFFFFE;
constexpr int kQueryThreads = 128;
// In place of a query tile: this key tile is done; there are no more.
constexpr int kTileDone = -1;
constexpr int kAllDone = -2;

__device__ __forceinline__ int load_acquire(const int* address) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(int* address, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void wait_until(const int* address, int value) {
#if SCFA_DEBUG_WAIT
  const long long begin = clock64();
#endif
  while (load_acquire(address) != value) {
#if SCFA_DEBUG_WAIT
    if (clock64() - begin > 4000000000LL) asm volatile("trap;");
#endif
  }
}

// What others did to global memory, seen by this thread, comes before its bulk copies.
__device__ __forceinline__ void global_proxy_fence() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// The room of this tile's sum is that of the head `slots` before, which may still be in use.
__device__ __forceinline__ void wait_for_room(const Params& p, int tile, int z) {
  for (int other = z - p.slots; other >= 0; other -= p.slots) {
    tile -= p.slots * p.query_tiles;
    if (load_acquire(p.added + tile) == kNoSum) continue;  // look at the one before that
    wait_until(p.added + tile, kComplete);
    return;
  }
}

// Send a dq tile to memory (the first) or add it (the others).
__device__ __forceinline__ void start_sum(float* target, unsigned tile, bool first) {
  if (first) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target),
                 "r"(tile), "n"(kSumBytes)
                 : "memory");
  } else {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target),
        "r"(tile), "n"(kSumBytes)
        : "memory");
  }
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// The tile in shared memory may be overwritten.
__device__ __forceinline__ void wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// The sum in memory is complete, as if this thread had written it.
__device__ __forceinline__ void wait_until_added() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Warps 2 and 3, in turn, so that one tile's way to memory hides the other's: add dq tiles to their
// sums.
__device__ __forceinline__ void carry_sums(const Params& p, Shared shared, int carrier, int lane) {
  for (unsigned parity = 0;; parity ^= 1) {
    barrier_wait(shared.sum_full(carrier), parity);
    const int tile = uniform(shared_load(shared.load(carrier)));
    if (tile < 0) return;
    if (lane == 0) {
      const int before = shared_load(shared.load(carrier) + 4);
      const int z = p.by_query_tiles.quotient(tile), part = tile - z * p.query_tiles;
      const int slot = z - p.by_slots.quotient(z) * p.slots;
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
      store_release(p.added + tile, before + 1);
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
    const unsigned keys = uniform(shared_load(job + 16));  // buffer
    if (tile == kTileDone) {
      barrier_release(shared.changes_empty(change.slot), lane);
      barrier_release(shared.key_empty(keys), lane);
      change.advance();
      continue;
    }
    float grad[kHeadDim / 2];
    async_proxy_fence();
    wgmma_fence();
    new_product_of_columns<kBlockN>(grad, shared.changes(change.slot), shared.key(keys));
    wgmma_commit();
    const int z = p.by_query_tiles.quotient(tile), part = tile - z * p.query_tiles;
    const int before = beyond - 1 - number;  // key tiles that add to this query tile earlier
    wgmma_wait<0>();
    pin(grad);
    barrier_release(shared.changes_empty(change.slot), lane);
    change.advance();

    // Each thread has its 32 numbers of a tile in eight places of 16 bytes.
    if (number != lowest) {
      barrier_wait(shared.sum_empty(sum.slot), sum.parity ^ 1);
      const unsigned target = shared.sum(sum.slot) + 16 * thread;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; i += 4) {
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(target + 512 * i),
                     "f"(grad[i]), "f"(grad[i + 1]), "f"(grad[i + 2]), "f"(grad[i + 3])
                     : "memory");
      }
      if (thread == 0) {
        shared_store(shared.load(sum.slot), tile);
        shared_store(shared.load(sum.slot) + 4, before);
      }
      shared_writes_fence();
      barrier_release(shared.sum_full(sum.slot), lane);
      sum.advance();
    } else {
      if (before > 0) {
        if (thread == 0) wait_until(p.added + tile, before);
        named_barrier_sync(kQueryBarrier, kQueryThreads);  // the sum of the others is there
        const int slot = z - p.by_slots.quotient(z) * p.slots;
        const float* source =
            p.dq_sum + static_cast<long long>(slot * p.query_tiles + part) * kSumFloats +
            4 * thread;
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; i += 4) {
          float other[4];
          asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                       : "=f"(other[0]), "=f"(other[1]), "=f"(other[2]), "=f"(other[3])
                       : "l"(source + 128 * i)
                       : "memory");
#pragma unroll
          for (int j = 0; j < 4; ++j) grad[i + j] += other[j];
        }
        named_barrier_sync(kQueryBarrier, kQueryThreads);  // all have read the sum
        if (thread == 0) store_release(p.added + tile, kComplete);
      }
      const int b = p.by_query_heads.quotient(z), h = z - b * p.heads;
      const long long list = static_cast<long long>(z) * p.seqlen_q;
      const int sorted = part * kBlockM + 16 * warp + lane / 4;
      int index[2];
      float scale[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool there = sorted + 8 * i < p.seqlen_q;
        index[i] = there ? p.q_index[list + sorted + 8 * i] : -1;
        // Rows that see nothing become exact zeros.
        scale[i] = there && p.row_lse[list + sorted + 8 * i] != SCFA_INFINITY ? p.scale : 0.0f;
      }
      scatter_rows(grad, scale, p.dq.of_head(b, h), p.dq.row, index, lane);
    }
  }
  for (int i = 0; i < kCarriers; ++i) {
    barrier_wait(shared.sum_empty(sum.slot), sum.parity ^ 1);
    if (thread == 0) shared_store(shared.load(sum.slot), -1);
    barrier_release(shared.sum_full(sum.slot), lane);
    sum.advance();
  }
}
