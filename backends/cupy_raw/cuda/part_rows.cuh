// Rows (batch, head, row) of kernels that pass once over memory: a thread takes eight columns of a row, a round of a block as many
// rows as its threads have columns for.
#pragma once
#include "copy.cuh"

constexpr int kThreads = 256;
constexpr int kColumns = 8;      // of a thread
constexpr int kMostParts = 16;   // that one launch takes

// Of an array whose last axis is contiguous, in elements.
struct RowStrides {
  i64 batch, head, row;
};

// What a thread has to do in its block's tile of `rounds` rounds.
struct ThreadRows {
  i64 list;         // batch * heads + head
  int batch, head, column;
  u32 row, step;    // its first row, and how far on the next one is
  u32 end;          // rows of the tile end here; no row where this thread is left over

  SCFA_DEVICE ThreadRows(int heads, int rows, int chunks, int tiles, int rounds) {
    list = blockIdx.x / tiles;
    batch = int(list / heads);
    head = int(list % heads);
    column = int(threadIdx.x) % chunks * kColumns;
    const u32 own = threadIdx.x / chunks;
    step = kThreads / chunks;
    const u32 first = blockIdx.x % tiles * (step * rounds), last = first + step * rounds;  // below 2^32: a tile beyond 2^31
    row = own < step ? first + own : last;
    end = last < u32(rows) ? last : u32(rows);
  }

  SCFA_DEVICE i64 offset(const RowStrides& strides, u32 at) const {
    return batch * strides.batch + head * strides.head + i64(at) * strides.row + column;
  }
};

SCFA_DEVICE void store8(u16* target, const float (&values)[8]) {
  uint4 packed;
  packed.x = pack_pair(values[0], values[1]), packed.y = pack_pair(values[2], values[3]);
  packed.z = pack_pair(values[4], values[5]), packed.w = pack_pair(values[6], values[7]);
  if constexpr (kAligned) {
    *reinterpret_cast<uint4*>(target) = packed;
  } else {
    store_chunk(target, packed);
  }
}

SCFA_DEVICE void store8(float* target, const float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) target[i] = values[i];
}
