// Exact float32 tiles on the ordinary cores: 16 x 16 threads, thread (y, x) owns rows y * R .. of one tile.
//
// A tile is rows of kDim + 4 floats: the 4 keep the lanes that read the same column of neighbouring rows apart.
#pragma once
#include "exact.cuh"

constexpr int kSide = 16;
constexpr int kThreads = kSide * kSide;

SCFA_DEVICE constexpr int pitch(int dim) { return dim + 4; }

SCFA_DEVICE int thread_x() { return threadIdx.x % kSide; }

SCFA_DEVICE int thread_y() { return threadIdx.x / kSide; }

// Rows index[0 .. valid_rows) of an array into a tile; zeros in the other rows.
template <int kRows, int kDim>
SCFA_DEVICE void block_load_rows(float* tile, const float* base, i64 row_stride, const int* index, int valid_rows) {
  constexpr int kChunks = kDim / 4;
  for (int item = threadIdx.x; item < kRows * kChunks; item += kThreads) {
    const int row = item / kChunks;
    const int column = item % kChunks * 4;
    float4 values = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row < valid_rows) {
      const float* source = base + index[row] * row_stride + column;
      values = kAligned ? *reinterpret_cast<const float4*>(source) : make_float4(source[0], source[1], source[2], source[3]);
    }
    *reinterpret_cast<float4*>(tile + row * pitch(kDim) + column) = values;
  }
}

// acc[r][c] = own row (y * kR + r) . streamed row (x + 16 * c)
template <int kDim, int kR, int kC>
SCFA_DEVICE void thread_dots(float (&acc)[kR][kC], const float* own, const float* streamed) {
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int c = 0; c < kC; ++c) acc[r][c] = 0.0f;
#pragma unroll 2
  for (int d = 0; d < kDim; d += 4) {
    float4 a[kR], b[kC];
#pragma unroll
    for (int r = 0; r < kR; ++r) a[r] = *reinterpret_cast<const float4*>(own + (thread_y() * kR + r) * pitch(kDim) + d);
#pragma unroll
    for (int c = 0; c < kC; ++c) b[c] = *reinterpret_cast<const float4*>(streamed + (thread_x() + kSide * c) * pitch(kDim) + d);
#pragma unroll
    for (int r = 0; r < kR; ++r)
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        acc[r][c] = fmaf(a[r].x, b[c].x, acc[r][c]);
        acc[r][c] = fmaf(a[r].y, b[c].y, acc[r][c]);
        acc[r][c] = fmaf(a[r].z, b[c].z, acc[r][c]);
        acc[r][c] = fmaf(a[r].w, b[c].w, acc[r][c]);
      }
  }
}

// Output rows of one thread: columns 4 * x + 64 * c .. + 3. Each tile is summed by itself, and joins with what sums before it lost:
// one by one, the terms of a long row would vanish beside their sum.
template <int kDim, int kR>
struct RowTile {
  static constexpr int kBlocks = ceil_div(kDim, 4 * kSide);
  float value[kR][kBlocks][4], lost[kR][kBlocks][4];

  SCFA_DEVICE static int column(int block) { return 4 * thread_x() + 4 * kSide * block; }

  SCFA_DEVICE void init() {
#pragma unroll
    for (int r = 0; r < kR; ++r) scale_row(r, 0.0f, true);
  }
  SCFA_DEVICE void scale_row(int r, float factor, bool clear = false) {
#pragma unroll
    for (int c = 0; c < kBlocks; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        value[r][c][i] = clear ? 0.0f : value[r][c][i] * factor;
        lost[r][c][i] = clear ? 0.0f : lost[r][c][i] * factor;
      }
  }
  // value += weights (rows of kCount + 1) @ streamed
  template <int kCount>
  SCFA_DEVICE void add_product(const float* weights, const float* streamed) {
    float chain[kR][kBlocks][4];
#pragma unroll
    for (int r = 0; r < kR; ++r)
#pragma unroll
      for (int c = 0; c < kBlocks; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) chain[r][c][i] = 0.0f;
#pragma unroll 2
    for (int j = 0; j < kCount; ++j) {
      float w[kR];
#pragma unroll
      for (int r = 0; r < kR; ++r) w[r] = weights[(thread_y() * kR + r) * (kCount + 1) + j];
#pragma unroll
      for (int c = 0; c < kBlocks; ++c) {
        if (column(c) >= kDim) continue;
        const float4 x = *reinterpret_cast<const float4*>(streamed + j * pitch(kDim) + column(c));
#pragma unroll
        for (int r = 0; r < kR; ++r) {
          chain[r][c][0] = fmaf(w[r], x.x, chain[r][c][0]);
          chain[r][c][1] = fmaf(w[r], x.y, chain[r][c][1]);
          chain[r][c][2] = fmaf(w[r], x.z, chain[r][c][2]);
          chain[r][c][3] = fmaf(w[r], x.w, chain[r][c][3]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kR; ++r)
#pragma unroll
      for (int c = 0; c < kBlocks; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) add_with_loss(value[r][c][i], lost[r][c][i], chain[r][c][i]);
  }
  SCFA_DEVICE void store_row(int r, float* row, float factor) const {
#pragma unroll
    for (int c = 0; c < kBlocks; ++c) {
      if (column(c) >= kDim) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) row[column(c) + i] = value[r][c][i] * factor;
    }
  }
  // Whether a value of row r is NaN or Inf, in this thread.
  SCFA_DEVICE bool tainted(int r) const {
    float taint = 0.0f;
#pragma unroll
    for (int c = 0; c < kBlocks; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (column(c) < kDim) taint = fmaf(value[r][c][i], 0.0f, taint);
    return taint != 0.0f;
  }
};

// Reductions over the 16 threads that share a row.
SCFA_DEVICE float row_max(float x) {
#pragma unroll
  for (int other = 1; other < kSide; other *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, other));
  return x;
}

SCFA_DEVICE float row_sum(float x) {
#pragma unroll
  for (int other = 1; other < kSide; other *= 2) x += __shfl_xor_sync(kAllLanes, x, other);
  return x;
}

SCFA_DEVICE bool row_any(bool x) { return ((__ballot_sync(kAllLanes, x) >> (threadIdx.x % kWarpSize & kSide)) & 0xffff) != 0; }
