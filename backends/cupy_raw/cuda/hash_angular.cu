// hash_angular: the bucket of every row under random directions, without the products ever reaching memory.
//
// computes       bucket = argmax [y, -y],  y = x @ R - c @ R  (R float32; no center c: y = x @ R); of equals the lowest index.
//                A head has one center, or one for every kCenterRows rows of each sequence
// grid/block     one block of 128 threads per tile_rows rows of one (batch, head) and one round; rounds of a tile lie side
//                by side, so that all but the first find its rows in L2. A warp takes kMi * 16 rows at a time.
// shared memory  the directions as mma operands, 48 * kHeadDim * kBlocks bytes, and c @ R of each center, 32 * kBlocks bytes
// inputs         x (batch, heads, seqlen, head_dim) with any strides but the last; R (rounds, own_heads, head_dim, directions)
//                and c (center_heads, head_dim) or (batch, center_heads, centers, head_dim) contiguous; bucket (rounds, batch,
//                heads, seqlen) contiguous
// version        tensor cores on exact parts: a float is the sum of 3 bfloat16, a half of 2, so that products are exact
//                and sums float32. Lanes load 16 neighbouring bytes of a row, and R is stored in the order that this gives.
#include "ptx.cuh"

#ifndef SCFA_BLOCKS
#error "SCFA_BLOCKS (groups of 8 directions): set by hashing.py"
#endif
#ifndef SCFA_X_ELEMENT
#error "SCFA_X_ELEMENT (0 float32, 1 float16, 2 bfloat16): set by hashing.py"
#endif

constexpr int kBlocks = SCFA_BLOCKS;
constexpr int kThreads = 128;
constexpr int kChunk = 32;  // columns that four lanes load at once
constexpr int kChunks = kHeadDim / kChunk;
constexpr int kChunksAtOnce = kChunks <= 2 ? kChunks : 1;  // of the loop; all of them would spill
constexpr int kParts = 3;                       // bfloat16 parts of a direction
constexpr int kMi = kBlocks <= 4 ? 2 : 1;       // blocks of 16 rows a warp takes at a time
constexpr int kResident = SCFA_X_ELEMENT == 2 && kBlocks <= 2 ? 6 : 4;  // blocks of a multiprocessor: as many as spill nothing
constexpr int kNobody = kIntMax;
constexpr int kCenterRows = 64;  // that share a center, where a list has several; tiles are whole numbers of them
static_assert(kIsBf16, "parts are bfloat16 whatever x is");
static_assert(kHeadDim % kChunk == 0, "SCFA_HEAD_DIM is rounded up to whole chunks");
static_assert(kBlocks >= 1 && kBlocks <= 8, "accumulators of up to 64 directions fit the registers");

struct HashParams {
  const char* x;
  const float* directions;
  const float* center;  // null: none
  int* bucket;
  i64 x_batch, x_head, x_row;  // strides in bytes
  int batch, heads, own_heads, center_heads, seqlen, head_dim, n_directions, rounds, tile_rows, tiles;
  int centers;  // of each list; 0: a head has one for all batches
};

// Eight elements of a row: float32 (0), float16 (1) or bfloat16 (2).
template <int kElement>
struct Eight {
  static constexpr int kWords = kElement ? 4 : 8;  // of four bytes
  static constexpr int kParts = 3 - kElement;      // bfloat16 parts of an element
};
using EightOfX = Eight<SCFA_X_ELEMENT>;
constexpr int kFloat = 0;

struct Shared {
  uint2 operand[kChunks * 2][kBlocks][kParts][kWarpSize];

  // c @ R lies behind, for each center of the tile.
  SCFA_DEVICE float* moved(int center) { return reinterpret_cast<float*>(this + 1) + center * (8 * kBlocks); }
};

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
                                const Shared& shared, int chunk, int lane) {
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
        const uint2 operand = shared.operand[chunk * 2 + step][block][part][lane];
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
SCFA_DEVICE void block_load_directions(Shared& shared, const HashParams& p, const float* directions) {
  for (int item = threadIdx.x; item < kChunks * 2 * kBlocks * kWarpSize; item += kThreads) {
    const int lane = item % kWarpSize, block = item / kWarpSize % kBlocks, step = item / kWarpSize / kBlocks;
    const int column = block * 8 + lane / 4;
    const int first = step / 2 * kChunk + lane % 4 * 8 + step % 2 * 4;
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = column < p.n_directions && first + i < p.head_dim;
      values[i] = exists ? directions[(first + i) * p.n_directions + column] : 0.0f;
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint2& operand = shared.operand[step][block][part][lane];
      operand.x = upper_halves(values[0], values[1]), operand.y = upper_halves(values[2], values[3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = without_upper_half(values[i]);
    }
  }
}

// One warp: c @ R of up to 16 centers, as of so many rows; 0 without any.
SCFA_DEVICE void multiply_centers(Shared& shared, const HashParams& p, const float* center, int centers, int lane) {
  const int g = lane / 4, t = lane % 4;
  float acc[1][kBlocks][4] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    u32 words[1][2][Eight<kFloat>::kWords];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 8 + g, column = chunk * kChunk + t * 8;
      const float* source = center + row * p.head_dim + column;
      const bool there = center != nullptr && row < centers;
      load_words<kFloat, false>(words[0][half], reinterpret_cast<const char*>(source), there ? p.head_dim - column : 0);
    }
    multiply_chunk<kFloat, 1>(acc, words, shared, chunk, lane);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = half * 8 + g;
        if (row < centers) shared.moved(row)[block * 8 + 2 * t + i] = acc[0][block][2 * half + i];
      }
}

// The larger product, of equals the lower bucket; a NaN is never larger.
SCFA_DEVICE void take_better(float& value, int& bucket, float other_value, int other_bucket) {
  if (other_value > value || (other_value == value && other_bucket < bucket)) value = other_value, bucket = other_bucket;
}

extern "C" __global__ void __launch_bounds__(kThreads, kResident) scfa_hash_angular(const __grid_constant__ HashParams p) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
  const int round = int(blockIdx.x % p.rounds);
  const int tile = int(blockIdx.x / p.rounds % p.tiles);
  const int list = int(blockIdx.x / p.rounds / p.tiles);
  const int batch = list / p.heads, head = list % p.heads;

  const i64 own_head = (i64)round * p.own_heads + head / (p.heads / p.own_heads);
  const int tile_start = tile * p.tile_rows, tile_end = tile_start + smaller(p.seqlen - tile_start, p.tile_rows);
  const int center_head = head / (p.heads / p.center_heads);
  const float* center = p.center;
  int centers = 1;  // of the tile
  if (p.centers > 0) {
    const i64 center_list = (i64)batch * p.center_heads + center_head;
    center += (center_list * p.centers + tile_start / kCenterRows) * p.head_dim;
    centers = (tile_end - tile_start + kCenterRows - 1) / kCenterRows;
  } else if (center) {
    center += (i64)center_head * p.head_dim;
  }
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const char* x = p.x + batch * p.x_batch + head * p.x_head;
  u32 words[kMi][2][EightOfX::kWords];  // of rows g and g + 8, loaded a chunk ahead
  const auto load_chunk = [&](int first, int chunk) {
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + mi * 16 + half * 8 + g, column = chunk * kChunk + t * 8;
        const char* source = x + row * p.x_row + column * (EightOfX::kWords / 2);
        load_words<SCFA_X_ELEMENT, kAligned>(words[mi][half], source, row < tile_end ? p.head_dim - column : 0);
      }
  };
  constexpr int kStep = kThreads / kWarpSize * kMi * 16;
  int first = tile_start + warp * kMi * 16;
  load_chunk(first, 0);
  block_load_directions(shared, p, p.directions + own_head * p.head_dim * p.n_directions);
  __syncthreads();  // operands are complete
  if (warp == 0) multiply_centers(shared, p, center, centers, lane);
  __syncthreads();  // moved is complete

  int* bucket = p.bucket + ((i64)round * p.batch * p.heads + list) * p.seqlen;
  for (; first < tile_end; first += kStep) {
    float acc[kMi][kBlocks][4] = {};
#pragma unroll kChunksAtOnce
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      u32 present[kMi][2][EightOfX::kWords];
#pragma unroll
      for (int mi = 0; mi < kMi; ++mi)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < EightOfX::kWords; ++i) present[mi][half][i] = words[mi][half][i];
      const bool ends = chunk + 1 == kChunks;
      load_chunk(ends ? first + kStep : first, ends ? 0 : chunk + 1);
      multiply_chunk<SCFA_X_ELEMENT, kMi>(acc, present, shared, chunk, lane);
    }

    // argmax [y, -y] of rows g and g + 8: over the lane's own directions, then over the four lanes of a row
#pragma unroll
    for (int mi = 0; mi < kMi; ++mi) {
      const float* moved = shared.moved(p.centers > 0 ? (first - tile_start + mi * 16) / kCenterRows : 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float best = -infinity();
        int at = kNobody;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int column = block * 8 + 2 * t + i;
            const float y = acc[mi][block][2 * half + i] - moved[column];
            if (column >= p.n_directions) continue;
            take_better(best, at, y, column);
            take_better(best, at, -y, column + p.n_directions);
          }
#pragma unroll
        for (int other = 1; other < 4; other *= 2) {
          const float other_best = __shfl_xor_sync(kAllLanes, best, other);
          const int other_at = __shfl_xor_sync(kAllLanes, at, other);
          take_better(best, at, other_best, other_at);
        }
        const int row = first + mi * 16 + half * 8 + g;
        if (t == half && row < tile_end) bucket[row] = at == kNobody ? 0 : at;  // nobody: a row of NaN
      }
    }
  }
}
