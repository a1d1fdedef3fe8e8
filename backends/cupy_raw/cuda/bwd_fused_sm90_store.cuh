// Last part of bwd_fused_sm90.cu: the storing warpgroup, which adds dq tiles to their sums in a
// fixed order and writes those that are complete.
#pragma once

// Values of Params::added: the sum has been read and its room is free; at most one key tile visits,
// and there is no sum in memory.
constexpr int kComplete = 0x7FFFFFFF;
constexpr int kNoSum = 0x7FFFFFFE;
constexpr int kStoreThreads = 64;  // of one half of the warpgroup

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

// Send a dq tile to memory (the first) or add it (the others); returns once it may be overwritten.
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
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ __forceinline__ void finish_sum() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// dq rows of a tile: the last contribution, in shared memory, plus the sum of the others.
__device__ __forceinline__ void write_rows(const Params& p, unsigned tile, const float* sum,
                                           bool others, int z, int first_row, int warp, int lane) {
  constexpr int kVectors = kHeadDim / 16;  // of four floats, of one thread and half the columns
  const int b = p.by_query_heads.quotient(z), h = z - b * p.heads;
  const long long list = static_cast<long long>(z) * p.seqlen_q;
#pragma unroll 1
  for (int unit = warp; unit < 8 * kPanels; unit += kStoreThreads / 32) {
    const int part = unit & 3, half = (unit >> 2) & 1, block = unit >> 3;
    const int offset = ((half * kVectors + 4 * block) * 128 + 32 * part + lane) * 4;
    float values[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) values[i] = 0.0f;
    if (others) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(values[4 * i]), "=f"(values[4 * i + 1]), "=f"(values[4 * i + 2]),
                       "=f"(values[4 * i + 3])
                     : "l"(sum + offset + 512 * i)
                     : "memory");
      }
    }
    const int sorted = first_row + 16 * part + lane / 4;
    int index[2];
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = sorted + 8 * i < p.seqlen_q;
      index[i] = there ? p.q_index[list + sorted + 8 * i] : -1;
      // Rows that see nothing become exact zeros.
      scale[i] = there && p.row_lse[list + sorted + 8 * i] != SCFA_INFINITY ? p.scale : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float last[4];
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(last[0]), "=f"(last[1]), "=f"(last[2]), "=f"(last[3])
                   : "r"(tile + 4 * offset + 2048 * i)
                   : "memory");
#pragma unroll
      for (int j = 0; j < 4; ++j) values[4 * i + j] += last[j];
    }
    scatter_rows(values, scale, p.dq.of_head(b, h) + half * kHeadDim + block * 64, p.dq.row, index,
                 lane);
  }
}

// Warpgroup 3: its halves take turns, so that one tile's way to memory hides the other's.
__device__ __forceinline__ void store_tiles(const Params& p, Shared shared) {
  const int thread = threadIdx.x % kStoreThreads;
  const int half = uniform((threadIdx.x % 128) / kStoreThreads);
  const int warp = uniform(thread / 32), lane = thread % 32;
  const int buffer = kStaging == 2 ? half : 0;
  unsigned parity = 0;
  for (unsigned step = buffer;; step += kStaging, parity ^= 1) {
    barrier_wait(shared.sum_full(buffer), parity);
    const unsigned job = shared.job(step % kJobs);
    const int tile = uniform(shared_load(job));
    if (tile < 0) break;
    if (kStaging == 1 && (step & 1) != half) {  // the other half's turn
      barrier_release(shared.sum_empty(buffer), lane);
      continue;
    }
    const int number = uniform(shared_load(job + 4));  // of the key tile
    const int lowest = uniform(shared_load(job + 8)), beyond = uniform(shared_load(job + 12));
    const int z = p.by_query_tiles.quotient(tile), part = tile - z * p.query_tiles;
    const int slot = z - p.by_slots.quotient(z) * p.slots;
    float* sum = p.dq_sum + static_cast<long long>(slot * p.query_tiles + part) * kSumFloats;
    const int before = beyond - 1 - number;  // key tiles that add to this query tile earlier
    if (number != lowest) {
      if (thread == 0) {
        if (before == 0) {
          wait_for_room(p, tile, z);
        } else {
          wait_until(p.added + tile, before);
        }
        global_proxy_fence();
        start_sum(sum, shared.sum(buffer), before == 0);
        barrier_arrive(shared.sum_empty(buffer));
        finish_sum();  // from here on it is seen as if this thread had written it
        store_release(p.added + tile, before + 1);
      } else if (lane == 0) {
        barrier_arrive(shared.sum_empty(buffer));  // this warp has read the job
      }
      __syncwarp();
    } else {
      if (before > 0) {
        if (thread == 0) wait_until(p.added + tile, before);
        named_barrier_sync(kStoreBarrier + half, kStoreThreads);  // the sum is there
      }
      write_rows(p, shared.sum(buffer), sum, before > 0, z, part * kBlockM, warp, lane);
      barrier_release(shared.sum_empty(buffer), lane);
      if (before > 0) {
        named_barrier_sync(kStoreBarrier + half, kStoreThreads);  // all have read the sum
        if (thread == 0) store_release(p.added + tile, kComplete);
        __syncwarp();
      }
    }
  }
}
