// Second part of bwd_fused128_sm90.cu: weights and score gradients in transposed form (rows are keys,
// columns queries). As in weigh_columns_sm90.cuh, but in two halves: products of the first run while
// the second is made.
//
// A load waits behind all that products under way have still to read of shared memory. So what is weighed
// by is loaded as long before it is needed as there are registers for it.
#pragma once

struct Weighing {
  static constexpr int kColumns = kBlockM / 8;  // pairs of columns of this thread
  static constexpr int kEarly = 4;              // of them, whose delta is loaded before dP has come
  int key0, own, q;  // first key of the warpgroup; keys of this thread: own and own + 8; lane % 4
  int2 column[kColumns];  // lse, ends, starts or delta of this thread's columns
  bool ends_inside, starts_inside;  // some pair is not seen

  __device__ __forceinline__ void load_columns(unsigned row, int first = 0, int end = kColumns) {
#pragma unroll
    for (int block = first; block < end; ++block) {
      column[block] = shared_load_pair(row + 32 * block + 8 * q);
    }
  }
  __device__ __forceinline__ int of_column(int i) const {
    return i & 1 ? column[i / 4].y : column[i / 4].x;
  }

  // Zero by selection, not by product: an unseen row may hold anything.
  __device__ __forceinline__ void clear_unseen(float (&values)[kBlockM / 2], const Shared& shared,
                                               unsigned slot) {
    if (ends_inside) {
      load_columns(shared.ends(slot));
#pragma unroll
      for (int i = 0; i < kBlockM / 2; ++i) {
        values[i] = own + 8 * half_of(i) < of_column(i) ? values[i] : 0.0f;
      }
    }
    if (starts_inside) {
      load_columns(shared.starts(slot));
#pragma unroll
      for (int i = 0; i < kBlockM / 2; ++i) {
        values[i] = own + 8 * half_of(i) >= of_column(i) ? values[i] : 0.0f;
      }
    }
  }

  // Before the products of the block are issued. Ranges are nondecreasing: the first query ends first,
  // the last one starts last.
  __device__ __forceinline__ void load(const Shared& shared, unsigned slot) {
    const int first_end = shared_load(shared.ends(slot));
    const int last_start = shared_load(shared.starts(slot) + 4 * (kBlockM - 1));
    load_columns(shared.lse(slot));
    ends_inside = __any_sync(0xFFFFFFFFu, first_end < key0 + 64);
    starts_inside = __any_sync(0xFFFFFFFFu, last_start > key0);
  }

  // P^T = exp2(S^T * scale - lse), of scores that have come.
  __device__ __forceinline__ void weigh_scores(float (&scores)[kBlockM / 2], const Shared& shared,
                                               unsigned slot, float scale_log2) {
#pragma unroll
    for (int i = 0; i < kBlockM / 2; ++i) {
      scores[i] = exp2_fast(scores[i] * scale_log2 - __int_as_float(of_column(i)));
    }
    clear_unseen(scores, shared, slot);
  }

  // What there is room for of delta: before the next products are issued, and once the scores are weighed.
  __device__ __forceinline__ void load_delta(const Shared& shared, unsigned slot) {
    load_columns(shared.delta(slot), 0, kEarly);
  }

  // dS^T = P^T (dP^T - delta), of slopes that have come.
  __device__ __forceinline__ void weigh_slopes(float (&slopes)[kBlockM / 2],
                                               const float (&weights)[kBlockM / 2],
                                               const Shared& shared, unsigned slot) {
    load_columns(shared.delta(slot), kEarly);
#pragma unroll
    for (int i = 0; i < kBlockM / 2; ++i) {
      slopes[i] = weights[i] * (slopes[i] + __int_as_float(of_column(i)));  // it is -delta
    }
    clear_unseen(slopes, shared, slot);
  }
};
