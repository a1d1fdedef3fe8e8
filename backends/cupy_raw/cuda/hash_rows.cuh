// Rows times directions, exactly enough: what both hashing kernels share.
//
// A float is the sum of 3 bfloat16, a half of 2, so that products on tensor cores are exact and sums float32. Lanes load 16
// neighbouring bytes of a row, and directions are stored in the order that this gives.
#pragma once
#include "ptx.cuh"

#ifndef SCFA_BLOCKS
#error "SCFA_BLOCKS (groups of 8 directions): set by hashing.py"
#endif
#ifndef SCFA_THREADS
#error "SCFA_THREADS (of a block): set by hashing.py"
#endif
#ifndef SCFA_X_ELEMENT
#error "SCFA_X_ELEMENT (0 float32, 1 float16, 2 bfloat16): set by hashing.py"
#endif

constexpr int kBlocks = SCFA_BLOCKS;
constexpr int kThreads = SCFA_THREADS;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kChunk = 32;  // columns that four lanes load at once
constexpr int kChunks = kHeadDim / kChunk;
constexpr int kParts = 3;  // bfloat16 parts of a direction
// Chunks loaded at once: 128 bytes of a row, where both halves are there, which memory gives together.
constexpr int kAhead = SCFA_X_ELEMENT > 0 && kChunks % 2 == 0 ? 2 : 1;
constexpr int kLoadsAtOnce = kChunks <= 2 ? kChunks / kAhead : 1;  // of the loop; all of them would spill
constexpr int kMi = kAhead == 1 && kBlocks <= 4 ? 2 : 1;           // blocks of 16 rows a warp takes at a time
constexpr int kNobody = kIntMax;
constexpr int kCenterRows = 64;  // that share a center, where a list has several; tiles are whole numbers of them
static_assert(kIsBf16, "parts are bfloat16 whatever x is");
static_assert(kHeadDim % kChunk == 0, "SCFA_HEAD_DIM is rounded up to whole chunks");
static_assert(kBlocks >= 1 && kBlocks <= 8, "accumulators of up to 64 directions fit the registers");

// Eight elements of a row: float32 (0), float16 (1) or bfloat16 (2).
template <int kElement>
struct Eight {
  static constexpr int kWords = kElement ? 4 : 8;  // of four bytes
  static constexpr int kParts = 3 - kElement;      // bfloat16 parts of an element
};
using EightOfX = Eight<SCFA_X_ELEMENT>;
constexpr int kFloat = 0;
using Words = u32[kAhead][kMi][2][EightOfX::kWords];  // of rows g and g + 8 of each block, loaded ahead

using Operands = uint2[kChunks * 2][kBlocks][kParts][kWarpSize];  // directions, as the right side of a product

// The upper halves of two floats: bfloat16 cut off, not rounded, so that nothing overflows and the rest has the same sign.
SCFA_DEVICE u32 upper_halves(float low, float high) { return (__float_as_uint(low) >> 16) | (__float_as_uint(high) & 0xffff0000u); }

SCFA_DEVICE float without_upper_half(float x) { return x - __uint_as_float(__float_as_uint(x) & 0xffff0000u); }

// A half as a float by moving its exponent; infinity becomes 65536, which points the same way.
SCFA_DEVICE float float_of_half(u32 bits) {
  constexpr float kBias = 5192296858534827628530496329220096.0f;  // 2 ** (127 - 15)
  return __uint_as_float((bits & 0x8000u) << 16 | __float_as_uint(__uint_as_float((bits & 0x7fffu) << 13) * kBias));
}

// Eight neighbouring elements, of which the first `valid` exist; the others are 0. kWide: all or nothing, by 16 bytes.
template <int kElement, bool kWide>
SCFA_DEVICE void load_words(u32 (&words)[Eight<kElement>::kWords], const char* source, int valid) {
  constexpr int kWords = Eight<kElement>::kWords;
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = 0;
  if constexpr (kWide) {
    if (valid <= 0) return;
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 packed = *reinterpret_cast<const uint4*>(source + 4 * i);
      words[i] = packed.x, words[i + 1] = packed.y, words[i + 2] = packed.z, words[i + 3] = packed.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= valid) break;
      if constexpr (kElement == kFloat) {
        words[i % kWords] = reinterpret_cast<const u32*>(source)[i];
      } else {
        words[i / 2] |= u32(reinterpret_cast<const u16*>(source)[i]) << 16 * (i % 2);
      }
    }
  }
}

// Rows g and g + 8 of each block of 16 from `first` on, up to `end`: what lane 4 g + t multiplies of a chunk.
template <int kRowBlocks>
SCFA_DEVICE void load_rows(u32 (&words)[kRowBlocks][2][EightOfX::kWords], const char* x, i64 x_row, int first, int end, int chunk,
                           int head_dim, int lane) {
#pragma unroll
  for (int mi = 0; mi < kRowBlocks; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + mi * 16 + half * 8 + lane / 4, column = chunk * kChunk + lane % 4 * 8;
      const char* source = x + row * x_row + column * (EightOfX::kWords / 2);
      load_words<SCFA_X_ELEMENT, kAligned>(words[mi][half], source, row < end ? head_dim - column : 0);
    }
}

// kAhead chunks of rows from `first` on.
SCFA_DEVICE void load_chunks(Words& words, const char* x, i64 x_row, int first, int end, int chunk, int head_dim, int lane) {
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load_rows(words[i], x, x_row, first, end, chunk + i, head_dim, lane);
}

// `present` becomes what is in `words`, `chunk` and so on of rows from `first` on; then the chunks after those are loaded there,
// after the last the first ones of the rows from `next` on.
SCFA_DEVICE void load_ahead(Words& present, Words& words, const char* x, i64 x_row, int first, int next, int end, int chunk, int head_dim,
                            int lane) {
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead)
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < EightOfX::kWords; ++i) present[ahead][mi][half][i] = words[ahead][mi][half][i];
  const bool ends = chunk + kAhead == kChunks;
  load_chunks(words, x, x_row, ends ? next : first, end, ends ? 0 : chunk + kAhead, head_dim, lane);
}

// Eight elements as parts: parts[i] holds the i-th bfloat16 of each, two to a word.
template <int kElement>
SCFA_DEVICE void split(u32 (&parts)[Eight<kElement>::kParts][4], const u32 (&words)[Eight<kElement>::kWords]) {
  constexpr int kWords = Eight<kElement>::kWords;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    if constexpr (kElement == 2) {
      parts[0][pair] = words[pair];
    } else {
      float low, high;
      if constexpr (kElement == 1) {
        low = float_of_half(words[pair] & 0xffffu), high = float_of_half(words[pair] >> 16);
      } else {
        low = __uint_as_float(words[2 * pair % kWords]), high = __uint_as_float(words[(2 * pair + 1) % kWords]);
      }
#pragma unroll
      for (int i = 0; i < Eight<kElement>::kParts; ++i) {
        parts[i][pair] = upper_halves(low, high);
        low = without_upper_half(low), high = without_upper_half(high);
      }
    }
  }
}

// acc += rows @ R over one chunk of columns, part by part; what is left out is below the last bit of a float. `words`: rows
// g and g + 8 of each block of 16.
template <int kElement, int kRowBlocks>
SCFA_DEVICE void multiply_chunk(float (&acc)[kRowBlocks][kBlocks][4], const u32 (&words)[kRowBlocks][2][Eight<kElement>::kWords],
                                const Operands& operands, int chunk, int lane) {
  constexpr int kXParts = Eight<kElement>::kParts;
  u32 parts[kRowBlocks][2][kXParts][4];
#pragma unroll
  for (int mi = 0; mi < kRowBlocks; ++mi)
#pragma unroll
    for (int half = 0; half < 2; ++half) split<kElement>(parts[mi][half], words[mi][half]);
#pragma unroll
  for (int step = 0; step < 2; ++step)
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint2 operand = operands[chunk * 2 + step][block][part][lane];
#pragma unroll
        for (int x_part = 0; x_part < smaller(kXParts, kParts - part); ++x_part)
#pragma unroll
          for (int mi = 0; mi < kRowBlocks; ++mi) {
            const u32 a[4] = {parts[mi][0][x_part][2 * step], parts[mi][1][x_part][2 * step],
                              parts[mi][0][x_part][2 * step + 1], parts[mi][1][x_part][2 * step + 1]};
            multiply_add(acc[mi][block], a, operand.x, operand.y);
          }
      }
}

// The directions of one round and head as right operands: lane 4 g + t of step s gets direction g of its block and the
// columns that lane t loads of x in that step.
SCFA_DEVICE void block_load_directions(Operands& operands, const float* directions, int head_dim, int n_directions) {
  for (int item = threadIdx.x; item < kChunks * 2 * kBlocks * kWarpSize; item += kThreads) {
    const int lane = item % kWarpSize, block = item / kWarpSize % kBlocks, step = item / kWarpSize / kBlocks;
    const int column = block * 8 + lane / 4;
    const int first = step / 2 * kChunk + lane % 4 * 8 + step % 2 * 4;
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = column < n_directions && first + i < head_dim;
      values[i] = exists ? directions[(first + i) * n_directions + column] : 0.0f;
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint2& operand = operands[step][block][part][lane];
      operand.x = upper_halves(values[0], values[1]), operand.y = upper_halves(values[2], values[3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = without_upper_half(values[i]);
    }
  }
}

// One warp: c @ R of up to 16 centers, `stride` floats apart, as of so many rows; 0 without any. A row of `moved` for each.
SCFA_DEVICE void multiply_centers(float (*moved)[8 * kBlocks], const Operands& operands, const float* center, int centers, int stride,
                                  int head_dim, int lane) {
  const int g = lane / 4, t = lane % 4;
  float acc[1][kBlocks][4] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    u32 words[1][2][Eight<kFloat>::kWords];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 8 + g, column = chunk * kChunk + t * 8;
      const float* source = center + row * stride + column;
      const bool there = center != nullptr && row < centers;
      load_words<kFloat, false>(words[0][half], reinterpret_cast<const char*>(source), there ? head_dim - column : 0);
    }
    multiply_chunk<kFloat, 1>(acc, words, operands, chunk, lane);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = half * 8 + g;
        if (row < centers) moved[row][block * 8 + 2 * t + i] = acc[0][block][2 * half + i];
      }
}

// The larger product, of equals the lower bucket; a NaN is never larger.
SCFA_DEVICE void take_better(float& value, int& bucket, float other_value, int other_bucket) {
  if (other_value > value || (other_value == value && other_bucket < bucket)) value = other_value, bucket = other_bucket;
}

// argmax [y, -y] of row g (half 0) or g + 8 of a block of 16, y the products less what the center moves: over the lane's own
// directions, then over the four lanes of the row. A row of NaN has bucket 0. kWeighs: `factors` of [y, -y], as bits.
template <bool kWeighs = false>
SCFA_DEVICE int bucket_of(const float (&products)[kBlocks][4], int half, const float (&moved)[8 * kBlocks], const int* factors,
                          int n_directions, int lane) {
  float best = -infinity();
  int at = kNobody;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = block * 8 + 2 * (lane % 4) + i;
      const float y = products[block][2 * half + i] - moved[column];
      if (column >= n_directions) continue;
      const float above = kWeighs ? y * __int_as_float(factors[column]) : y;
      const float below = kWeighs ? -y * __int_as_float(factors[column + n_directions]) : -y;
      take_better(best, at, above, column);
      take_better(best, at, below, column + n_directions);
    }
#pragma unroll
  for (int other = 1; other < 4; other *= 2) {
    const float other_best = __shfl_xor_sync(kAllLanes, best, other);
    const int other_at = __shfl_xor_sync(kAllLanes, at, other);
    take_better(best, at, other_best, other_at);
  }
  return at == kNobody ? 0 : at;
}
