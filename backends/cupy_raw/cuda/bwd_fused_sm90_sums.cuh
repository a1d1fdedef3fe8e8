// Sums of dq in memory, added to by one key tile after another: whose turn it is, the bulk copies, and
// where a complete one is written. Include after params_sm90.cuh, products_sm90.cuh and kSumBytes.
#pragma once

// Values of Params::added: the sum has been read and its room is free; at most one key tile visits,
// and there is no sum in memory.
constexpr int kComplete = 0x7FFFFFFF;
constexpr int kNoSum = 0x7FFFFFFE;

__device__ __forceinline__ int load_acquire(const int* address) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(int* address, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// One more has added.
__device__ __forceinline__ void count_release(int* address) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(address) : "memory");
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

// Four floats of a sum that others have added to.
__device__ __forceinline__ void load_sum_four(const float* address, float (&values)[4]) {
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
               : "l"(address)
               : "memory");
}

// The lanes of a carrying warp that carry: one starts bulk copies and waits for them, or all share
// the work of their own loads and stores.
__device__ __forceinline__ bool carries(int lane) { return kSanitize || lane == 0; }

// What start_sum does, by all lanes of a warp.
__device__ __forceinline__ void add_by_warp(float* target, unsigned tile, bool first) {
#pragma unroll 1
  for (int i = 4 * (threadIdx.x % 32); i < kSumFloats; i += 4 * 32) {
    const int2 a = shared_load_pair(tile + 4 * i), b = shared_load_pair(tile + 4 * i + 8);
    float sum[4] = {};
    if (!first) load_sum_four(target + i, sum);
    target[i] = sum[0] + __int_as_float(a.x);
    target[i + 1] = sum[1] + __int_as_float(a.y);
    target[i + 2] = sum[2] + __int_as_float(b.x);
    target[i + 3] = sum[3] + __int_as_float(b.y);
  }
}

// Send a dq tile to memory (the first) or add it (the others).
__device__ __forceinline__ void start_sum(float* target, unsigned tile, bool first) {
  if constexpr (kSanitize) {
    add_by_warp(target, tile, first);
  } else if (first) {
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
  if constexpr (kSanitize) __syncwarp();  // or as if it had written what all lanes did
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// What fetch_sum does, by all lanes of a warp.
__device__ __forceinline__ void fetch_by_warp(unsigned tile, const float* source,
                                              unsigned barrier) {
#pragma unroll 1
  for (int i = 4 * (threadIdx.x % 32); i < kSumFloats; i += 4 * 32) {
    float sum[4];
    load_sum_four(source + i, sum);
    shared_store_four(tile + 4 * i, sum[0], sum[1], sum[2], sum[3]);
  }
  barrier_arrive(barrier);
}

// Bring a sum to a room in shared memory; it arrives at the barrier.
__device__ __forceinline__ void fetch_sum(unsigned tile, const float* source, unsigned barrier) {
  if constexpr (kSanitize) {
    fetch_by_warp(tile, source, barrier);
  } else {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "n"(kSumBytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(tile),
        "l"(source), "n"(kSumBytes), "r"(barrier)
        : "memory");
  }
}

// Where rows of a dq tile go that is to be written: looked up while its product is made.
struct QueryRows {
  int index[2];
  float lse[2];

  // `own`: the first of this thread's two rows of the tile.
  __device__ __forceinline__ void look_up(const Params& p, int z, int query_tile, int own) {
    const long long list = static_cast<long long>(z) * p.seqlen_q;
    const int sorted = (query_tile - z * p.query_tiles) * kBlockM + own;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = sorted + 8 * i < p.seqlen_q;
      index[i] = there ? p.q_index[list + sorted + 8 * i] : -1;
      lse[i] = there ? p.row_lse[list + sorted + 8 * i] : SCFA_INFINITY;
    }
  }

  // 64 columns of query head z, from `column_bytes` into a row.
  __device__ __forceinline__ void write(const Params& p, const float (&grad)[32], int z,
                                        int column_bytes, int lane) {
    const int b = p.by_query_heads.quotient(z), h = z - b * p.heads;
    // Rows that see nothing become exact zeros.
    const float scale[2] = {lse[0] != SCFA_INFINITY ? p.scale : 0.0f,
                            lse[1] != SCFA_INFINITY ? p.scale : 0.0f};
    scatter_rows(grad, scale, p.dq.of_head(b, h) + column_bytes, p.dq.row, index, lane);
  }
};
