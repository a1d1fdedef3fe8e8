// Rows between global and shared memory: gathers by index into a swizzled tile, scatters out of one.
//
// A tile of R rows is cut into panels of 128 bytes (64 columns of 16 bits); the 16-byte chunk c of row r lies at
//   (c / 8) * R * 128 + r * 128 + ((c % 8) ^ (r % 8)) * 16
// so that 8 lanes reading one chunk of 8 rows (ldmatrix) and 8 lanes writing one row (cp.async) each touch all 32 banks.
#pragma once
#include "ptx.cuh"

constexpr int kRowBytes = 128;

SCFA_DEVICE constexpr int padded(int dim) { return ceil_div(dim, 16) * 16; }

SCFA_DEVICE constexpr int tile_bytes(int rows, int dim) { return ceil_div(dim * kElementBytes, kRowBytes) * rows * kRowBytes; }

SCFA_DEVICE int chunk_offset(int row, int chunk, int rows) {
  return (chunk >> 3) * (rows * kRowBytes) + row * kRowBytes + (((chunk & 7) ^ (row & 7)) << 4);
}

// A value as products take it: TF32 is float32 rounded to 10 mantissa bits, every other type is what it is.
SCFA_DEVICE float as_multiplied(float x) {
  if constexpr (kIsTf32) return round_tf32(x);
  return x;
}

SCFA_DEVICE float to_float(float x) { return x; }

SCFA_DEVICE float to_float(u16 x) {
  float low, high;
  unpack_pair(x, low, high);
  return low;
}

template <class T>
SCFA_DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return T(pack_pair(x, 0.0f) & 0xffffu);
  }
}

// Eight elements of one row as floats.
SCFA_DEVICE void load8(const u16* source, float (&values)[8]) {
  u32 words[4];
  if constexpr (kAligned) {
    const uint4 packed = *reinterpret_cast<const uint4*>(source);
    words[0] = packed.x, words[1] = packed.y, words[2] = packed.z, words[3] = packed.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = u32(source[2 * i]) | (u32(source[2 * i + 1]) << 16);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack_pair(words[i], values[2 * i], values[2 * i + 1]);
}

SCFA_DEVICE void load8(const float* source, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = source[i];
}

// 16 bytes of a row that may begin anywhere.
SCFA_DEVICE void load_chunk(uint4& packed, const u16* source) {
  packed.x = u32(source[0]) | (u32(source[1]) << 16), packed.y = u32(source[2]) | (u32(source[3]) << 16);
  packed.z = u32(source[4]) | (u32(source[5]) << 16), packed.w = u32(source[6]) | (u32(source[7]) << 16);
}

SCFA_DEVICE void load_chunk(uint4& packed, const float* source) {
  packed.x = __float_as_uint(source[0]), packed.y = __float_as_uint(source[1]);
  packed.z = __float_as_uint(source[2]), packed.w = __float_as_uint(source[3]);
}

SCFA_DEVICE void store_chunk(u16* target, uint4 packed) {
  const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) target[2 * i] = u16(words[i]), target[2 * i + 1] = u16(words[i] >> 16);
}

SCFA_DEVICE void store_chunk(float* target, uint4 packed) {
  target[0] = __uint_as_float(packed.x), target[1] = __uint_as_float(packed.y);
  target[2] = __uint_as_float(packed.z), target[3] = __uint_as_float(packed.w);
}

// Rows index[0 .. valid_rows) of a (rows, kDim) array into a swizzled tile; the other rows and the padding columns become 0.
// With kAligned a row stride fits 32 bits, so that an address is one multiply-add; whole tiles need no other arithmetic.
template <int kRows, int kDim, int kThreads>
SCFA_DEVICE void block_gather(char* tile, const Element* base, i64 row_stride, const int* index, int valid_rows) {
  constexpr u32 kChunks = padded(kDim) / kChunkColumns;
  constexpr u32 kItems = kRows * kChunks;
  const u32 thread = thread_here();
  const u32 tile_address = shared_address(tile);
  if (kAligned && kDim == padded(kDim) && valid_rows >= kRows) {
    const u32 stride_bytes = u32(row_stride) * kElementBytes;
    constexpr u32 kStep = kThreads / kChunks;
    if constexpr (kThreads % (8 * kChunks) == 0 && kRows % kStep == 0) {  // a thread keeps its chunk; rows 8 n apart
      const char* source = reinterpret_cast<const char*>(base) + thread % kChunks * 16;
      const u32 target = tile_address + chunk_offset(thread / kChunks, thread % kChunks, kRows);
#pragma unroll
      for (u32 row = 0; row < kRows; row += kStep) {
        copy16_async(target + row * kRowBytes, source + u64(u32(index[thread / kChunks + row])) * stride_bytes);
      }
    } else {
#pragma unroll
      for (u32 first = 0; first < kItems; first += kThreads) {
        const u32 row = (first + thread) / kChunks, chunk = (first + thread) % kChunks;
        if (kItems % kThreads != 0 && row >= kRows) break;
        const char* source = reinterpret_cast<const char*>(base) + chunk * 16 + u64(u32(index[row])) * stride_bytes;
        copy16_async(tile_address + chunk_offset(row, chunk, kRows), source);
      }
    }
    return;
  }
#pragma unroll 1
  for (u32 item = thread; item < kItems; item += kThreads) {
    const int row = item / kChunks, chunk = item % kChunks;
    const bool wanted = row < valid_rows && chunk * kChunkColumns < kDim;
    const Element* source = wanted ? base + index[row] * row_stride + chunk * kChunkColumns : base;
    if constexpr (kAligned) {
      copy16_async(tile_address + chunk_offset(row, chunk, kRows), source, wanted);
    } else {
      uint4 packed = make_uint4(0, 0, 0, 0);
      if (wanted) load_chunk(packed, source);
      *reinterpret_cast<uint4*>(tile + chunk_offset(row, chunk, kRows)) = packed;
    }
  }
}

// Rounds what this thread has copied by block_gather to what is multiplied, once for all who read it. The thread has waited
// for its copies; a barrier follows.
template <int kRows, int kDim, int kThreads>
SCFA_DEVICE void block_round(char* tile) {
  if constexpr (kIsTf32) {
    constexpr u32 kChunks = padded(kDim) / kChunkColumns;
    constexpr u32 kItems = kRows * kChunks;
    const u32 thread = thread_here();
#pragma unroll 4
    for (u32 first = 0; first < kItems; first += kThreads) {
      const u32 item = first + thread;
      if (kItems % kThreads != 0 && item >= kItems) break;
      float4& x = *reinterpret_cast<float4*>(tile + chunk_offset(item / kChunks, item % kChunks, kRows));
      x = make_float4(as_multiplied(x.x), as_multiplied(x.y), as_multiplied(x.z), as_multiplied(x.w));
    }
  }
}

// kCount four-byte values in the background; zeros from `valid` on.
template <int kCount, int kThreads, class T>
SCFA_DEVICE void block_copy_values(T* target, const T* source, int valid) {
  const int thread = thread_here();
#pragma unroll
  for (int first = 0; first < kCount; first += kThreads) {
    const int item = first + thread;
    if (kCount % kThreads != 0 && item >= kCount) break;
    copy4_async(shared_address(target) + 4 * item, item < valid ? source + item : source, item < valid);
  }
}

// kWarpRows rows of a swizzled tile, from row `first_row` on, to the rows index[...] of an array; index < 0: no such row.
template <int kWarpRows, int kTileRows, int kDim>
SCFA_DEVICE void warp_scatter(const char* tile, int first_row, Element* base, i64 row_stride, const int* index) {
  constexpr int kChunks = kDim / kChunkColumns;
  constexpr int kItems = kWarpRows * kChunks;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 4
  for (int first = 0; first < kItems; first += kWarpSize) {
    const int item = first + lane;
    if (kItems % kWarpSize != 0 && item >= kItems) break;
    const int row = first_row + item / kChunks;
    const int chunk = item % kChunks;
    const int target_row = index[row];
    if (target_row < 0) continue;
    const uint4 packed = *reinterpret_cast<const uint4*>(tile + chunk_offset(row, chunk, kTileRows));
    Element* target = base + target_row * row_stride + chunk * kChunkColumns;
    if constexpr (kAligned) {
      *reinterpret_cast<uint4*>(target) = packed;
    } else {
      store_chunk(target, packed);
    }
  }
}

// Changes the sign of kWarpRows rows of a tile, for this warp's own later ldmatrix.
template <int kWarpRows, int kTileRows, int kDim>
SCFA_DEVICE void warp_negate_rows(char* tile, int first_row) {
  constexpr u32 kSigns = kElementBytes == 2 ? 0x80008000u : 0x80000000u;
  for (int item = threadIdx.x % kWarpSize; item < kWarpRows * padded(kDim) / kChunkColumns; item += kWarpSize) {
    uint4& packed = *reinterpret_cast<uint4*>(tile + chunk_offset(first_row + item % kWarpRows, item / kWarpRows, kTileRows));
    packed.x ^= kSigns, packed.y ^= kSigns, packed.z ^= kSigns, packed.w ^= kSigns;
  }
  order_shared_accesses();
  __syncwarp();  // every lane's rows are negated
}
