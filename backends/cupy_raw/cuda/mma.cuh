// Tensor cores by mma.sync m16n8k16: products of tiles, one warp at a time.
//
// With lane = 4 * g + t, an accumulator block of 16 x 8 holds (row g, columns 2t, 2t+1) and (row g + 8, the same columns).
// Packed to 16 bits, two neighbouring blocks are the left operand of the next product without any exchange.
#pragma once
#include "copy.cuh"

// Where a lane points ldmatrix: its place in the first 16 rows and 16 columns is kept apart from where those lie in shared
// memory, because only the former takes part in the swizzle and is the same for every tile. kPanel: bytes of 64 columns.
template <int kPanel>
struct Operand {
  u32 rows, lane;

  // `step` groups of 16 columns and `block` groups of 16 rows further.
  SCFA_DEVICE u32 at(int step, int block) const {
    return rows + (lane ^ ((step & 3) << 5)) + (step >> 2) * kPanel + block * (16 * kRowBytes);
  }
};

// For left operands, and right operands read transposed.
template <int kTileRows>
SCFA_DEVICE Operand<kTileRows * kRowBytes> left_operand(const char* tile, int row) {
  const int lane = threadIdx.x % kWarpSize;
  return {shared_address(tile) + row * kRowBytes, u32(chunk_offset(lane & 15, lane >> 4, 0))};
}

// For right operands stored with their columns as rows.
template <int kTileRows>
SCFA_DEVICE Operand<kTileRows * kRowBytes> right_operand(const char* tile, int row) {
  const int lane = threadIdx.x % kWarpSize;
  return {shared_address(tile) + row * kRowBytes, u32(chunk_offset((lane & 7) + ((lane & 16) >> 1), (lane >> 3) & 1, 0))};
}

// The left operand: kMi * 16 rows and kSteps * 16 columns of a tile, held in registers for the whole kernel.
template <int kMi, int kSteps, class Left>
SCFA_DEVICE void warp_load_left(u32 (&a)[kMi][kSteps][4], Left left) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi) load_matrices(a[mi][step], left.at(step, mi));
}

// acc += left @ right^T, both stored as rows of the reduced dimension (scores = q @ k^T). Left from registers.
template <int kMi, int kNb, int kSteps, class Right>
SCFA_DEVICE void warp_product_nt(float (&acc)[kMi][kNb][4], const u32 (&a)[kMi][kSteps][4], Right right) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int nb = 0; nb < kNb; nb += 2) {
      u32 b[4];
      load_matrices(b, right.at(step, nb / 2));
#pragma unroll
      for (int mi = 0; mi < kMi; ++mi) {
        multiply_add(acc[mi][nb], a[mi][step], b[0], b[1]);
        multiply_add(acc[mi][nb + 1], a[mi][step], b[2], b[3]);
      }
    }
}

// The same with the left operand read from its tile at each step.
template <int kSteps, int kMi, int kNb, class Left, class Right>
SCFA_DEVICE void warp_product_nt(float (&acc)[kMi][kNb][4], Left left, Right right) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    u32 a[kMi][4];
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi) load_matrices(a[mi], left.at(step, mi));
#pragma unroll
    for (int nb = 0; nb < kNb; nb += 2) {
      u32 b[4];
      load_matrices(b, right.at(step, nb / 2));
#pragma unroll
      for (int mi = 0; mi < kMi; ++mi) {
        multiply_add(acc[mi][nb], a[mi], b[0], b[1]);
        multiply_add(acc[mi][nb + 1], a[mi], b[2], b[3]);
      }
    }
  }
}

// Scores as the left operand of the next product: kNb blocks of 8 columns become kNb / 2 steps of 16.
template <int kMi, int kNb>
SCFA_DEVICE void warp_pack(u32 (&a)[kMi][kNb / 2][4], const float (&acc)[kMi][kNb][4]) {
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int step = 0; step < kNb / 2; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[mi][step][2 * half] = pack_pair(acc[mi][2 * step + half][0], acc[mi][2 * step + half][1]);
        a[mi][step][2 * half + 1] = pack_pair(acc[mi][2 * step + half][2], acc[mi][2 * step + half][3]);
      }
}

// acc += left @ right, right stored as rows (out = p @ v): kSteps * 16 rows of a tile, kNb * 8 columns.
template <int kMi, int kNb, int kSteps, class Right>
SCFA_DEVICE void warp_product_nn(float (&acc)[kMi][kNb][4], const u32 (&a)[kMi][kSteps][4], Right right) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int nb = 0; nb < kNb; nb += 2) {
      u32 b[4];
      load_matrices_transposed(b, right.at(nb / 2, step));
#pragma unroll
      for (int mi = 0; mi < kMi; ++mi) {
        multiply_add(acc[mi][nb], a[mi][step], b[0], b[1]);
        multiply_add(acc[mi][nb + 1], a[mi][step], b[2], b[3]);
      }
    }
}

// Accumulator rows, each times its factor, as 16-bit rows of a swizzled tile (`tile` points at the warp's first row).
template <int kMi, int kNb>
SCFA_DEVICE void warp_store_rows(char* tile, int tile_rows, const float (&acc)[kMi][kNb][4], const float (&factor)[kMi][2]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int nb = 0; nb < kNb; ++nb) {
        const int offset = chunk_offset(mi * 16 + half * 8 + lane / 4, nb, tile_rows) + (lane % 4) * 4;
        *reinterpret_cast<u32*>(tile + offset) =
            pack_pair(acc[mi][nb][2 * half] * factor[mi][half], acc[mi][nb][2 * half + 1] * factor[mi][half]);
      }
}

// Adds 0 * x for every accumulator of each row: 0 where all are finite, NaN where one is not.
template <int kMi, int kNb>
SCFA_DEVICE void warp_row_taint(float (&taint)[kMi][2], const float (&acc)[kMi][kNb][4]) {
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int nb = 0; nb < kNb; ++nb)
#pragma unroll
      for (int i = 0; i < 4; ++i) taint[mi][i / 2] = fmaf(acc[mi][nb][i], 0.0f, taint[mi][i / 2]);
}
