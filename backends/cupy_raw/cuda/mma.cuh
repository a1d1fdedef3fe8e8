// Tensor cores by mma.sync: products of tiles, one warp at a time. 16-bit elements by m16n8k16, float32 as TF32 by m16n8k8:
// in bytes their operands lie alike, 32 bytes of a row a step.
//
// With lane = 4 * g + t, an accumulator block of 16 x 8 holds (row g, columns 2t, 2t+1) and (row g + 8, the same columns).
// Packed to 16 bits, two neighbouring blocks are the left operand of the next product without any exchange. As TF32 one
// block is, if columns 2t and 2t+1 take the places of t and t + 4, as then do rows of the right operand.
#pragma once
#include "copy.cuh"

// Where a lane points ldmatrix: its place in the first 16 rows and 16 columns is kept apart from where those lie in shared
// memory, because only the former takes part in the swizzle and is the same for every tile. kPanel: bytes of a panel.
template <int kPanel>
struct Operand {
  u32 rows, lane;

  // `step` groups of kStepColumns columns and `block` groups of 16 rows further.
  SCFA_DEVICE u32 at(int step, int block) const {
    return rows + (lane ^ ((step & 3) << 5)) + (step >> 2) * kPanel + block * (16 * kRowBytes);
  }
};

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

// For right operands stored as rows: 16-bit ones are read transposed, of float32 a lane reads one element at a time.
template <int kTileRows>
SCFA_DEVICE Operand<kTileRows * kRowBytes> rows_operand(const char* tile, int row) {
  if constexpr (kElementBytes == 2) return left_operand<kTileRows>(tile, row);
  const int lane = thread_here() % kWarpSize;  // row 2t, column g
  return {shared_address(tile) + row * kRowBytes, u32(chunk_offset(2 * (lane % 4), lane / 16, 0) + lane / 4 % 4 * 4)};
}

// The left operand: kMi * 16 rows and kSteps * kStepColumns columns of a tile, held in registers for the whole kernel.
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
#pragma unroll kElementBytes == 4 ? 4 : kSteps
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

// Scores as the left operand of the next product: kNb blocks of 8 columns become kSteps steps.
template <int kMi, int kNb, int kSteps>
SCFA_DEVICE void warp_pack(u32 (&a)[kMi][kSteps][4], const float (&acc)[kMi][kNb][4]) {
  static_assert(kSteps * kStepColumns == kNb * 8, "all columns, each once");
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kElementBytes == 2) {
          a[mi][step][2 * half] = pack_pair(acc[mi][2 * step + half][0], acc[mi][2 * step + half][1]);
          a[mi][step][2 * half + 1] = pack_pair(acc[mi][2 * step + half][2], acc[mi][2 * step + half][3]);
        } else {
          a[mi][step][2 * half] = __float_as_uint(as_multiplied(acc[mi][step][half]));
          a[mi][step][2 * half + 1] = __float_as_uint(as_multiplied(acc[mi][step][2 + half]));
        }
      }
}

// Of a right operand stored as rows: the rows of one step, columns of blocks nb and nb + 1.
template <class Right>
SCFA_DEVICE void load_rows(u32 (&b)[4], Right right, int nb, int step) {
  if constexpr (kElementBytes == 2) {
    load_matrices_transposed(b, right.at(nb / 2, step));
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 address = right.at(nb + i, step / 2) + step % 2 * (8 * kRowBytes);
      b[2 * i] = load_word(address);
      b[2 * i + 1] = load_word((address ^ 16) + kRowBytes);  // row 2t + 1: its swizzle differs in the lowest bit
    }
  }
}

// acc += left @ right, right stored as rows (out = p @ v): kSteps * kStepColumns rows of a tile, kNb * 8 columns.
template <int kMi, int kNb, int kSteps, class Right>
SCFA_DEVICE void warp_product_nn(float (&acc)[kMi][kNb][4], const u32 (&a)[kMi][kSteps][4], Right right) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int nb = 0; nb < kNb; nb += 2) {
      u32 b[4];
      load_rows(b, right, nb, step);
#pragma unroll
      for (int mi = 0; mi < kMi; ++mi) {
        multiply_add(acc[mi][nb], a[mi][step], b[0], b[1]);
        multiply_add(acc[mi][nb + 1], a[mi][step], b[2], b[3]);
      }
    }
}

// The same with left as float32: of TF32 what rounding takes from it is multiplied as well, which leaves 22 bits of mantissa.
template <int kMi, int kNb, int kColumns, class Right>
SCFA_DEVICE void warp_product_nn_unrounded(float (&acc)[kMi][kNb][4], float (&left)[kMi][kColumns][4], Right right) {
  u32 a[kMi][kColumns * 8 / kStepColumns][4];
  if constexpr (!kIsTf32) {
    warp_pack(a, left);
    warp_product_nn(acc, a, right);
  } else {
    u32 rest[kMi][kColumns][4];
    warp_pack(a, left);
#pragma unroll
    for (int i = 0; i < kMi * kColumns * 4; ++i) {
      float& x = left[i / (kColumns * 4)][i / 4 % kColumns][i % 4];
      x -= as_multiplied(x);
    }
    warp_pack(rest, left);
#pragma unroll
    for (int step = 0; step < kColumns; ++step)
#pragma unroll
      for (int nb = 0; nb < kNb; nb += 2) {
        u32 b[4];
        load_rows(b, right, nb, step);
#pragma unroll
        for (int mi = 0; mi < kMi; ++mi) {
          multiply_add(acc[mi][nb], rest[mi][step], b[0], b[1]);
          multiply_add(acc[mi][nb + 1], rest[mi][step], b[2], b[3]);
          multiply_add(acc[mi][nb], a[mi][step], b[0], b[1]);
          multiply_add(acc[mi][nb + 1], a[mi][step], b[2], b[3]);
        }
      }
  }
}

// Accumulator rows, each times its factor, as rows of a swizzled tile (`tile` points at the warp's first row).
template <int kMi, int kNb>
SCFA_DEVICE void warp_store_rows(char* tile, int tile_rows, const float (&acc)[kMi][kNb][4], const float (&factor)[kMi][2]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int nb = 0; nb < kNb; ++nb) {
        const int row = mi * 16 + half * 8 + lane / 4;
        if constexpr (kElementBytes == 2) {
          const int offset = chunk_offset(row, nb, tile_rows) + (lane % 4) * 4;
          *reinterpret_cast<u32*>(tile + offset) =
              pack_pair(acc[mi][nb][2 * half] * factor[mi][half], acc[mi][nb][2 * half + 1] * factor[mi][half]);
        } else {
          const int offset = chunk_offset(row, 2 * nb + lane % 4 / 2, tile_rows) + (lane % 2) * 8;
          *reinterpret_cast<float2*>(tile + offset) =
              make_float2(acc[mi][nb][2 * half] * factor[mi][half], acc[mi][nb][2 * half + 1] * factor[mi][half]);
        }
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
