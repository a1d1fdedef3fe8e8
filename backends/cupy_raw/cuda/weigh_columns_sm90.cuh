// Weights and score gradients in transposed form, for the backward kernels that own keys: rows are
// keys, columns queries. Include after the kernel's first part (Shared, kBlockM).
#pragma once
#include "order_sm90.cuh"

// What weighing needs of a block of queries.
struct QueryColumns {
  int2 column[kBlockM / 8];  // lse of this thread's columns; ends and starts while masks are made
  // The first end and the last start: of the block where ranges are nondecreasing, as its first
  // query ends first; in any order, of the two queries that this lane looked at.
  int first_end, last_start;

  // Where ranges lie in any order, before anything else: does some query of the block see one of the
  // warpgroup's keys, key0 to key0 + 63? All lanes of a warp call it, and all get the answer.
  __device__ __forceinline__ bool look(const Shared& shared, unsigned slot, int key0) {
    static_assert(32 < kBlockM && kBlockM <= 64, "two queries a lane, or the last one again");
    const int lane = threadIdx.x % 32;
    const int other = 4 * (kBlockM == 64 ? 32 : min(32, kBlockM - 1 - lane));
    const unsigned starts = shared.starts(slot) + 4 * lane, ends = shared.ends(slot) + 4 * lane;
    const int start[2] = {shared_load(starts), shared_load(starts + other)};
    const int end[2] = {shared_load(ends), shared_load(ends + other)};
    first_end = min(end[0], end[1]);
    last_start = max(start[0], start[1]);
    bool seen = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) seen |= max(start[i], key0) < min(end[i], key0 + 64);
    return __any_sync(0xFFFFFFFFu, seen);
  }

  // Wait for the block in the next slot; does it see any of the warpgroup's keys? Where ranges are
  // nondecreasing it is known to.
  template <int kSlots>
  __device__ __forceinline__ bool wait_and_look(const Shared& shared, const Ring<kSlots>& query,
                                                int key0) {
    if constexpr (kMonotone) return true;
    barrier_wait(shared.query_full(query.slot), query.parity);
    return look(shared, query.slot, key0);
  }

  // Before the products of the block are issued: this chain of loads would otherwise be waited for.
  __device__ __forceinline__ void load(const Shared& shared, unsigned slot, int q) {
    if constexpr (kMonotone) {
      first_end = shared_load(shared.ends(slot));
      last_start = shared_load(shared.starts(slot) + 4 * (kBlockM - 1));
    }
#pragma unroll
    for (int block = 0; block < kBlockM / 8; ++block) {
      column[block] = shared_load_pair(shared.lse(slot) + 32 * block + 8 * q);
    }
  }

  // Negative deltas alone, likewise.
  __device__ __forceinline__ void load_delta(const Shared& shared, unsigned slot, int q) {
#pragma unroll
    for (int block = 0; block < kBlockM / 8; ++block) {
      column[block] = shared_load_pair(shared.delta(slot) + 32 * block + 8 * q);
    }
  }

  // P^T alone of the block whose scores have come; what is not seen becomes `unseen`. Is all seen?
  __device__ __forceinline__ bool weights(float (&scores)[kBlockM / 2], const Shared& shared,
                                          unsigned slot, int q, int key0, int own,
                                          float scale_log2, float unseen) {
    const bool ends_inside = __any_sync(0xFFFFFFFFu, first_end < key0 + 64);
    const bool starts_inside = __any_sync(0xFFFFFFFFu, last_start > key0);
#pragma unroll
    for (int i = 0; i < kBlockM / 2; ++i) {
      const int lse = i & 1 ? column[i / 4].y : column[i / 4].x;
      scores[i] = exp2_fast(scores[i] * scale_log2 - __int_as_float(lse));
    }
    if (ends_inside) {
#pragma unroll
      for (int i = 0; i < kBlockM / 2; ++i) {
        if (i % 4 == 0) column[i / 4] = shared_load_pair(shared.ends(slot) + 8 * i + 8 * q);
        const int end = i & 1 ? column[i / 4].y : column[i / 4].x;
        scores[i] = own + 8 * half_of(i) < end ? scores[i] : unseen;
      }
    }
    if (starts_inside) {
#pragma unroll
      for (int i = 0; i < kBlockM / 2; ++i) {
        if (i % 4 == 0) column[i / 4] = shared_load_pair(shared.starts(slot) + 8 * i + 8 * q);
        const int start = i & 1 ? column[i / 4].y : column[i / 4].x;
        scores[i] = own + 8 * half_of(i) >= start ? scores[i] : unseen;
      }
    }
    return !(ends_inside || starts_inside);
  }

  // Slopes that start from -delta: their product with dO then ends in dP^T - delta.
  __device__ __forceinline__ void start(float (&slopes)[kBlockM / 2], const Shared& shared,
                                        unsigned slot, int q) {
#pragma unroll
    for (int i = 0; i < kBlockM / 2; i += 2) {
      const int2 pair = shared_load_pair(shared.delta(slot) + 32 * (i / 4) + 8 * q);
      slopes[i] = __int_as_float(pair.x);
      slopes[i + 1] = __int_as_float(pair.y);
    }
  }

  // P^T and dS^T of the block whose scores have come; waits for the slopes itself, from which delta has
  // been taken already. The warpgroup owns keys key0 to key0 + 63, this thread `own` and own + 8.
  __device__ __forceinline__ void weigh(float (&scores)[kBlockM / 2], float (&slopes)[kBlockM / 2],
                                        const Shared& shared, unsigned slot, int q, int key0,
                                        int own, float scale_log2) {
    const bool ends_inside = __any_sync(0xFFFFFFFFu, first_end < key0 + 64);
    const bool starts_inside = __any_sync(0xFFFFFFFFu, last_start > key0);
    // P^T = exp2(S^T * scale - lse), lse of columns.
#pragma unroll
    for (int i = 0; i < kBlockM / 2; ++i) {
      const int lse = i & 1 ? column[i / 4].y : column[i / 4].x;
      scores[i] = exp2_fast(scores[i] * scale_log2 - __int_as_float(lse));
    }
    wgmma_wait<0>();
    pin(slopes);
#pragma unroll
    for (int i = 0; i < kBlockM / 2; ++i) slopes[i] *= scores[i];
    // Zero by selection, not by product: an unseen row may hold anything.
    if (ends_inside) {
#pragma unroll
      for (int i = 0; i < kBlockM / 2; ++i) {
        if (i % 4 == 0) column[i / 4] = shared_load_pair(shared.ends(slot) + 8 * i + 8 * q);
        const bool seen = own + 8 * half_of(i) < (i & 1 ? column[i / 4].y : column[i / 4].x);
        scores[i] = seen ? scores[i] : 0.0f;
        slopes[i] = seen ? slopes[i] : 0.0f;
      }
    }
    if (starts_inside) {
#pragma unroll
      for (int i = 0; i < kBlockM / 2; ++i) {
        if (i % 4 == 0) column[i / 4] = shared_load_pair(shared.starts(slot) + 8 * i + 8 * q);
        const bool seen = own + 8 * half_of(i) >= (i & 1 ? column[i / 4].y : column[i / 4].x);
        scores[i] = seen ? scores[i] : 0.0f;
        slopes[i] = seen ? slopes[i] : 0.0f;
      }
    }
  }
};
