// Where kernels that own key tiles (bwd_dkdv_sm90.cu, bwd_fused_sm90.cu, bwd_fused128_sm90.cu) keep
// in shared memory what belongs to a block of queries beside their rows, and which queries each
// query head has for a tile.
#pragma once

constexpr int kMaxGroup = 16;  // query heads of one kv head; launch_sm90.py sends larger elsewhere
constexpr int kSeesNothing = 0x7FFFFFFF;  // a range start beyond every key

// Bytes of a block's lse, -delta, key_start and key_end.
__device__ constexpr int query_data_bytes(int rows) { return 16 * rows; }

// Bytes of the bounds of two tiles: those of the next are searched while this one is in use.
__device__ constexpr int bounds_bytes(int bounds) { return 2 * 4 * kMaxGroup * bounds; }

// Data of blocks of kRows queries from kDataBase on; from kBoundsBase on, kBounds bounds of each
// query head.
template <int kRows, int kDataBase, int kBounds, int kBoundsBase>
struct QueryData {
  unsigned base;
  __device__ __forceinline__ unsigned lse(unsigned i) const {
    return base + kDataBase + i * query_data_bytes(kRows);
  }
  __device__ __forceinline__ unsigned delta(unsigned i) const { return lse(i) + 4 * kRows; }
  __device__ __forceinline__ unsigned starts(unsigned i) const { return lse(i) + 8 * kRows; }
  __device__ __forceinline__ unsigned ends(unsigned i) const { return lse(i) + 12 * kRows; }
  __device__ __forceinline__ unsigned bound(unsigned buffer, int member, int i) const {
    return base + kBoundsBase + 4 * ((buffer * kMaxGroup + member) * kBounds + i);
  }
};
